"""Matrix products of float32 tensors that are as fast as the values in them allow, and no faster than asked."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch


@contextmanager
def float32_products(dtype: torch.dtype) -> Iterator[None]:
    """Products of float32 tensors as exact as values of `dtype`: TF32 or bfloat16 only where these fit into it.

    Sums are in float32 then too; a GPU, or a CPU that multiplies bfloat16, is several times faster so.
    """
    half = dtype in (torch.float16, torch.bfloat16)
    exact = {
        torch.backends.cuda.matmul: "tf32" if half else "ieee",
        torch.backends.mkldnn.matmul: "bf16" if dtype == torch.bfloat16 else "ieee",
    }
    before = [setting.fp32_precision for setting in exact]
    try:
        for setting, precision in exact.items():
            setting.fp32_precision = precision
        yield
    finally:
        for setting, precision in zip(exact, before, strict=True):
            setting.fp32_precision = precision


@contextmanager
def without_autocast() -> Iterator[None]:
    """No torch.autocast inside, on the CPU or the accelerator: what a solver has in float32 stays in it."""
    accelerator = torch.accelerator.current_accelerator()
    kinds = {"cpu"} if accelerator is None else {"cpu", accelerator.type}
    active = [kind for kind in sorted(kinds) if torch.is_autocast_enabled(kind)]
    with ExitStack() as off:
        for kind in active:
            off.enter_context(torch.autocast(kind, enabled=False))
        try:
            yield
        finally:
            if active:
                torch.clear_autocast_cache()  # of casts of weights, which may have changed since
