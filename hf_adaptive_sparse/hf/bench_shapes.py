"""Times of every backend for every shape of packed layer that a model has, on random weights: values do not matter."""

from __future__ import annotations

import itertools
import json
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from ..backend_forwards import forward_of, usable_backends
from ..backend_timing import Clock, Measured, time_in_turns
from ..errors import FormatError
from ..formats import FORMATS
from ..formats.two_four import dtype_name
from ..layers import PackedLinear
from .backend_times import TimesKey, device_name
from .linear_inventory import LinearKind
from .quantizer import AdaptiveSparseQuantizationConfig
from .tensor_files import StoredTensor, read_header

ROWS = {"cpu": (1, 4, 16, 64, 256), "cuda": (1, 4, 16, 64, 256, 1024, 4096)}

# In a model every layer is read from memory, since all the others were read since its last turn. So there are as many
# copies as no cache holds, and they are called in turns.
_COLD_BYTES = 2**28
_MOST_COPIES = 16
_NIBBLES = torch.tensor([4, 8, 9, 12, 13, 14], dtype=torch.uint8)


@dataclass(frozen=True, order=True)
class LayerShape:
    """Packed layers that take the same time."""

    shape: tuple[int, int]  # (out, in)
    dtype: str
    value_bits: int = 0

    @property
    def stored_dtype(self) -> str:
        return f"int{self.value_bits}>{self.dtype}" if self.value_bits else self.dtype

    @property
    def dense_bytes(self) -> int:
        return self.shape[0] * self.shape[1] * getattr(torch, self.dtype).itemsize


def shapes_of_folder(folder: Path, dtype: str | None = None) -> dict[LayerShape, int]:
    """The shapes of the packed layers of a packed folder, and how many there are of each: from headers alone.

    Args:
        dtype: that the model will be loaded in; default: as it is stored.
    Raises:
        FormatError: config.json cannot be read by this version, or a tensor is missing.
    """
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    stored = AdaptiveSparseQuantizationConfig(**config["quantization_config"]).stored_values()
    tensors: dict[str, StoredTensor] = {}
    for file in sorted(folder.glob("model.sparse24*.safetensors")):
        tensors |= read_header(file)[0]  # the two tensors of a layer may be in different files
    found: Counter[LayerShape] = Counter()
    for module, kind in stored.items():
        meta, values = (tensors.get(f"{module}.{suffix}") for suffix in FORMATS["2:4"].suffixes[::-1])
        if meta is None or values is None:
            raise FormatError(f"{folder}: the packed tensors of {module} are missing. The folder is not complete.")
        rows, octets = meta.shape
        found[LayerShape((rows, 8 * octets), dtype or dtype_name(kind.dtype or values.dtype), kind.bits or 0)] += 1
    return dict(sorted(found.items()))


def shapes_of_kinds(kinds: Iterable[LinearKind], dtype: str) -> dict[LayerShape, int]:
    """The shapes that a model would have packed."""
    found: Counter[LayerShape] = Counter()
    for kind in kinds:
        if kind.packed:
            found[LayerShape(kind.shape, dtype)] += kind.count
    return dict(sorted(found.items()))


def random_layer(shape: LayerShape, device: torch.device, generator: torch.Generator) -> PackedLinear:
    """A packed layer with random values at random places, without a bias."""
    rows, columns = shape.shape
    dtype, bits = getattr(torch, shape.dtype), shape.value_bits or None
    scale = None if bits is None else torch.full((rows, 1), 0.01)
    layer = PackedLinear(columns, rows, False, "cpu", dtype, value_bits=bits, scale=scale)
    values, meta = layer.weight_values.data, layer.weight_meta
    if bits is None:
        values.copy_(torch.randn(values.shape, generator=generator))
    else:
        kind = torch.iinfo(values.dtype)
        values.copy_(torch.randint(kind.min + 1, kind.max + 1, values.shape, generator=generator))
    low, high = (_NIBBLES[torch.randint(6, meta.shape, generator=generator)] for _ in range(2))
    meta.copy_(low | high << 4)
    return layer.to(device)


def time_shape(
    shape: LayerShape,
    rows: Sequence[int],
    device: torch.device,
    *,
    backends: Sequence[str] | None = None,
    repetitions: int = 5,
    seconds: float = 0.02,
    clock: Clock = time.perf_counter,
    seed: int = 0,
    on_rows: Callable[[int], None] | None = None,
) -> dict[str, dict[int, Measured]]:
    """Seconds of one call of every backend, for every number of rows.

    Args:
        backends: which, besides dense; default: all that can compute this layer on this device.
        repetitions, seconds, clock: as for `time_in_turns`.
        on_rows: called after every number of rows with how many are done.
    Raises:
        ConfigError: a backend that was asked for cannot compute this layer.
    """
    generator = torch.Generator().manual_seed(seed)
    copies = min(_MOST_COPIES, max(1, -(-_COLD_BYTES // shape.dense_bytes)))
    layers = [random_layer(shape, device, generator) for _ in range(copies)]
    names = list(usable_backends(layers[0])[0]) if backends is None else list(dict.fromkeys(("dense", *backends)))
    forwards = {name: [forward_of(name, layer) for layer in layers] for name in names}
    found: dict[str, dict[int, Measured]] = {name: {} for name in names}
    with torch.inference_mode():
        for done, count in enumerate(rows, start=1):
            x = torch.randn(count, shape.shape[1], generator=generator).to(device, getattr(torch, shape.dtype))
            calls = {name: _in_turns(each, x) for name, each in forwards.items()}
            measured = time_in_turns(calls, repetitions=repetitions, seconds=seconds, clock=clock)
            for name, times in measured.items():
                found[name][count] = times
            if on_rows is not None:
                on_rows(done)
    return found


def _in_turns(forwards: Sequence[Callable], x: torch.Tensor) -> Callable[[], object]:
    turn = itertools.cycle(forwards)
    return lambda: next(turn)(x)


def key_of(shape: LayerShape, device: torch.device) -> TimesKey:
    """Under which the times of this shape are kept."""
    return TimesKey(device_name(device), torch.__version__, shape.shape, shape.dtype, shape.value_bits)
