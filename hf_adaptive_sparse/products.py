"""Matrix products of float32 tensors that are as fast as the values in them allow."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

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
