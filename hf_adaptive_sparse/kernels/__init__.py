"""How a packed weight is multiplied: `kernel(input, weight, bias) -> output`, by name in KERNELS."""

from __future__ import annotations

import functools
import os
import warnings
from collections.abc import Callable

import torch
from torch import Tensor

from ..errors import ConfigError
from . import compiled, expanding
from .expanding import PackedWeight

Kernel = Callable[[Tensor, PackedWeight, Tensor | None], Tensor]

KERNELS: dict[str, Kernel] = {"compiled": compiled.linear, "torch": expanding.linear}
EXPANSIONS: dict[str, Callable[[PackedWeight], Tensor]] = {"compiled": compiled.expand, "torch": expanding.expand}
CHOICES = ("auto", *KERNELS)
KERNEL_VARIABLE = "HF_ADAPTIVE_SPARSE_KERNEL"


def check_kernel(kernel: str) -> None:
    """ConfigError if there is no such kernel, or it was named and cannot run."""
    if kernel not in CHOICES:
        raise ConfigError(f"unknown kernel {kernel!r}; known: {', '.join(CHOICES)}.")
    if kernel == "compiled":
        compiled.load()


@torch.compiler.assume_constant_result
def choose(kernel: str, device_type: str) -> str:
    """The name in KERNELS of what runs: for "auto" the compiled one on a CPU, if it can be built.

    HF_ADAPTIVE_SPARSE_KERNEL in the environment says what "auto" is. If the compiled kernel cannot be built, a
    warning says so and why, once, and the torch kernel runs.
    """
    if kernel != "auto":
        return kernel
    asked = os.environ.get(KERNEL_VARIABLE, "auto")
    if asked != "auto":
        if asked not in KERNELS:
            raise ConfigError(f"{KERNEL_VARIABLE} is {asked!r}; known: {', '.join(CHOICES)}.")
        return asked
    return _buildable() if device_type == "cpu" else "torch"


@functools.cache
def _buildable() -> str:
    try:
        compiled.load()
    except ConfigError as error:
        warnings.warn(
            f"packed layers run with the torch kernel, which expands every weight at every call and is slow: {error} "
            f"Or load with backend='dense', which expands once. kernel='torch' asks for this kernel without a warning.",
            stacklevel=2,
        )
        return "torch"
    return "compiled"


__all__ = ["CHOICES", "EXPANSIONS", "KERNELS", "Kernel", "PackedWeight", "check_kernel", "choose"]
