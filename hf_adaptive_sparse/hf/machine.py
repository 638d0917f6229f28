"""This machine as a `Hardware`: two short measurements."""

from __future__ import annotations

import os
import time

import torch
import torch.nn.functional as F

from ..formats.two_four import dtype_name
from ..hardware import Hardware
from .backend_times import device_name
from .one_shot_plan import measured_rate

_READ_BYTES = {"cpu": 2**28, "cuda": 2**31}
_TWO_FOUR_CAPABILITY = (8, 0)  # Ampere


def measured_hardware(device: torch.device, dtype: torch.dtype) -> Hardware:
    """What a device does: products of large matrices, and how fast a product with one row reads a large weight.

    Takes about three seconds and half a GB on a CPU. The numbers are those of torch on this device, with the threads
    that it has now, and below the peaks of a data sheet. Where float32 is faster than `dtype`, as 16 bits are not on
    many CPUs, its rate counts for both: a kernel may compute in it.
    """
    dtypes = list(dict.fromkeys((dtype, torch.float32)))
    rates = {dtype_name(each): measured_rate(device, each) for each in dtypes}
    rates[dtype_name(dtype)] = max(rates.values())
    memory, factor = _memory_bytes(device), 1.0
    if device.type == "cuda" and torch.cuda.get_device_capability(device) >= _TWO_FOUR_CAPABILITY:
        factor = 2.0
    return Hardware(
        name=f"this machine ({device_name(device)})",
        bytes_per_second=max(measured_bandwidth(device, each) for each in dtypes),
        flops_per_second=rates,
        memory_bytes=memory,
        sparse_factor=factor,
        source="measured now: products of large square matrices, and of one row with a weight larger than the caches",
    )


def measured_bandwidth(device: torch.device, dtype: torch.dtype, seconds: float = 0.5) -> float:
    """Bytes per second at which a product with one row reads a weight that no cache holds: the best of some of them."""
    size = _READ_BYTES.get(device.type, _READ_BYTES["cuda"])
    columns = 4096
    rows = size // dtype.itemsize // columns
    weight = torch.zeros(rows, columns, dtype=dtype, device=device)
    x = torch.ones(1, columns, dtype=dtype, device=device)
    best, until = 0.0, time.perf_counter() + seconds
    while best == 0.0 or time.perf_counter() < until:
        _wait(device)
        started = time.perf_counter()
        F.linear(x, weight)
        _wait(device)
        best = max(best, weight.nbytes / (time.perf_counter() - started))
    return best


def _memory_bytes(device: torch.device) -> float | None:
    if device.type == "cuda":
        return float(torch.cuda.mem_get_info(device)[1])
    if device.type == "cpu" and hasattr(os, "sysconf"):
        return float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    return None


def _wait(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize()
