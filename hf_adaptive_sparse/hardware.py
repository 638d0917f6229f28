"""How fast a machine can be at most: the larger of bytes by bandwidth and operations by rate (the roofline).

Source: Williams, Waterman, Patterson, "Roofline: an insightful visual performance model", CACM 52 (4), 2009. It is a
bound from above: no kernel reaches it, and a kernel for the stored form has to exist at all.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from .errors import ConfigError

_DATA_SHEET = "NVIDIA data sheet, peaks without sparsity"


@dataclass(frozen=True, kw_only=True)
class Hardware:
    """What a machine can do, at best.

    Attributes:
        bytes_per_second: of reading its memory.
        flops_per_second: dtype -> operations per second of dense products, 2 for a multiplication with its addition.
        memory_bytes: of the device; None: not known.
        sparse_factor: by how much its matrix units speed up a 2:4 product; 1 where there are none for it.
        source: where the numbers are from.
    """

    name: str
    bytes_per_second: float
    flops_per_second: Mapping[str, float]
    memory_bytes: float | None = None
    sparse_factor: float = 1.0
    source: str = ""

    def __post_init__(self) -> None:
        rates = {"bytes_per_second": self.bytes_per_second, **self.flops_per_second}
        for what, value in rates.items():
            if not 0.0 < value < math.inf:
                raise ConfigError(f"{self.name}: {what} is a rate above 0, got {value}.")
        if not self.flops_per_second:
            raise ConfigError(f"{self.name}: needs operations per second of at least one dtype.")

    def rate(self, dtype: str) -> float:
        """Operations per second in `dtype`; in the fastest it has where `dtype` is not in its table.

        A dtype of 16 bits counts as the other one: matrix units run both alike.
        """
        twin = {"float16": "bfloat16", "bfloat16": "float16"}.get(dtype, dtype)
        for name in (dtype, twin):
            if name in self.flops_per_second:
                return self.flops_per_second[name]
        raise ConfigError(
            f"{self.name}: its operations per second in {dtype} are not known; known: "
            f"{', '.join(sorted(self.flops_per_second))}. Choose one of these with --dtype."
        )

    def seconds(self, nbytes: float, flops: float, dtype: str, sparse_flops: float = 0.0) -> float:
        """The least time for reading so many bytes and doing so much arithmetic, the two at the same time.

        Args:
            flops: of dense products.
            sparse_flops: of 2:4 products, counted as if they were dense.
        """
        arithmetic = flops + sparse_flops / self.sparse_factor
        return max(nbytes / self.bytes_per_second, arithmetic / self.rate(dtype))

    def fits(self, nbytes: float) -> bool | None:
        """Whether so much fits its memory; None where that is not known."""
        return None if self.memory_bytes is None else nbytes <= self.memory_bytes


def _nvidia(name: str, gigabytes: int, bandwidth: float, half: float, single: float, source: str) -> Hardware:
    return Hardware(
        name=name, bytes_per_second=bandwidth * 1e9, memory_bytes=gigabytes * 1e9, sparse_factor=2.0, source=source,
        flops_per_second={"bfloat16": half * 1e12, "float32": single * 1e12},
    )  # fmt: skip


# Name on the command line -> peaks. Half precision with sums in float32; float32 without TF32.
HARDWARE: dict[str, Hardware] = {
    "a100": _nvidia("A100 SXM 80 GB", 80, 2039, 312, 19.5, _DATA_SHEET),
    "a100-40gb": _nvidia("A100 SXM 40 GB", 40, 1555, 312, 19.5, _DATA_SHEET),
    "h100": _nvidia("H100 SXM 80 GB", 80, 3350, 989.4, 67, _DATA_SHEET),
    "h100-pcie": _nvidia("H100 PCIe 80 GB", 80, 2000, 756, 51, _DATA_SHEET),
    "h200": _nvidia("H200 SXM 141 GB", 141, 4800, 989.4, 67, _DATA_SHEET),
    "l4": _nvidia("L4 24 GB", 24, 300, 121, 30.3, _DATA_SHEET),
    "rtx-4090": _nvidia("RTX 4090 24 GB", 24, 1008, 165.2, 82.6, "NVIDIA Ada architecture paper, without sparsity"),
}


def custom_hardware(gigabytes_per_second: float, gigaflops_per_second: float) -> Hardware:
    """A machine of which two numbers are known: for a CPU, what `stream` and a large product measure."""
    rate = gigaflops_per_second * 1e9
    return Hardware(
        name=f"{gigabytes_per_second:g} GB/s, {gigaflops_per_second:g} GFLOP/s",
        bytes_per_second=gigabytes_per_second * 1e9,
        flops_per_second={"float32": rate, "bfloat16": rate},
        source="given on the command line; the same rate for every dtype",
    )
