"""Where tensors lie while they are not computed with: on the device, in memory, or in files mapped into memory."""

from __future__ import annotations

import ctypes
import math
import mmap
import os
import platform
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import chain

import torch
from torch import Tensor, nn

from ..errors import ConfigError, OutputError

OFFLOADS = ("none", "cpu", "disk")

# Bytes; no dtype needs more.
_ALIGNMENT = 64


def check_device(device: torch.device | str | None) -> None:
    """Raise ConfigError where no tensor can be held on a device; None is where the model is."""
    if device is None:
        return
    try:
        held = torch.empty(0, device=device)
    except (RuntimeError, AssertionError, TypeError) as problem:
        reason = str(problem).strip().splitlines()[0].rstrip(".")
        raise ConfigError(
            f"device {str(device)!r} cannot be used here: {reason}. Pass cpu or an accelerator that torch finds, or "
            "None for where the model is."
        ) from problem
    if held.is_meta:
        raise ConfigError("device 'meta' holds no values, so nothing can be computed on it. Pass cpu or cuda.")


class Store:
    """Keeps hidden states and the weights of blocks whose turn it is not.

    Args:
        offload: "none": hidden states on the device, weights where the model has them. "cpu": both in memory.
            "disk": both in temporary files, mapped into memory, so that the system can take their memory back at any
            time. They have no name, so that their space is free again when nothing uses them, also after a kill.
        device: on which blocks are computed.
        folder: of the temporary files; None: where the system makes them.
    Raises:
        ConfigError: an unknown `offload`.
    """

    def __init__(self, offload: str, device: torch.device, folder: str | os.PathLike | None = None) -> None:
        if offload not in OFFLOADS:
            raise ConfigError(f"unknown offload {offload!r}; known: {', '.join(OFFLOADS)}.")
        self._offload, self._device = offload, device
        self._folder = folder
        self._maps: list[mmap.mmap] = []
        self._homes: dict[int, Tensor] = {}
        self._origins: list[tuple[Tensor, torch.device]] = []

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """A tensor for hidden states; of unset values."""
        if self._offload == "disk":
            return self._map([(shape, dtype)])[0]
        return torch.empty(shape, dtype=dtype, device="cpu" if self._offload == "cpu" else self._device)

    def fetch(self, block: nn.Module) -> None:
        """Bring the weights of a block to the device; with "cpu" by way of memory, with "disk" by way of a file.

        With "disk", what was mapped when the model was loaded is not written to: such pages would stay in memory until
        the whole model is gone.
        """
        tensors = list(_tensors(block))
        homes = [tensor.data for tensor in tensors]
        self._origins += [(tensor, tensor.device) for tensor in tensors]
        if self._offload == "disk":
            homes = self._map([(tuple(tensor.shape), tensor.dtype) for tensor in tensors])
            for tensor, home in zip(tensors, homes, strict=True):
                home.copy_(tensor.data)
        elif self._offload == "cpu":
            homes = [home.to("cpu") for home in homes]
        for tensor, home in zip(tensors, homes, strict=True):
            self._homes[id(tensor)] = home
            tensor.data = home.to(self._device)

    def put_back(self, block: nn.Module) -> None:
        """Bring the weights of a block back to where they lay before they went to the device."""
        for tensor in _tensors(block):
            home = self._homes.pop(id(tensor))
            if home.device != tensor.device:
                home.copy_(tensor.data)
                tensor.data = home
        self.release()

    def release(self) -> None:
        """Give the memory of mapped files back to the system, which reads them again when they are used."""
        for mapped in self._maps:
            if hasattr(mmap, "MADV_DONTNEED"):
                mapped.madvise(mmap.MADV_DONTNEED)
        if self._offload != "none":
            _trim()

    def close(self) -> None:
        """Bring the weights back to the device they were on. Those of a model in memory stay mapped."""
        for tensor, device in self._origins:
            if tensor.device != device:
                tensor.data = tensor.data.to(device)
        self._origins.clear()
        self._maps.clear()

    def _map(self, wanted: list[tuple[tuple[int, ...], torch.dtype]]) -> list[Tensor]:
        """New tensors of these shapes and dtypes, one after another in one file."""
        offsets, size = [], 0
        for shape, dtype in wanted:
            offsets.append(size)
            size += -(-math.prod(shape) * dtype.itemsize // _ALIGNMENT) * _ALIGNMENT
        with _readable_errors(self._folder, size), tempfile.TemporaryFile(dir=self._folder) as file:
            if hasattr(os, "posix_fallocate"):
                # Where the disk is full, a file with holes would end the process later, and not this call.
                os.posix_fallocate(file.fileno(), 0, max(size, 1))
            else:
                file.truncate(max(size, 1))
            mapped = mmap.mmap(file.fileno(), 0)
        self._maps.append(mapped)
        return [
            torch.frombuffer(mapped, dtype=dtype, count=math.prod(shape), offset=offset).view(shape)
            if math.prod(shape)
            else torch.empty(shape, dtype=dtype)
            for (shape, dtype), offset in zip(wanted, offsets, strict=True)
        ]


def _trim() -> None:
    """Have glibc give back what was freed: with 32 blocks the peak was 225 MB with it and 258 MB without.

    It takes tensors of up to 32 MB from one heap as soon as one of that size was freed, and keeps what is free in it
    below the last one that is in use.
    """
    if platform.libc_ver()[0] == "glibc":
        ctypes.CDLL(None).malloc_trim(0)


@contextmanager
def _readable_errors(folder: str | os.PathLike | None, size: int) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise OutputError(
            f"{folder or tempfile.gettempdir()}: cannot hold {size} bytes of offloaded tensors ({error.strerror}). "
            "Choose another folder with offload_folder, or use offload='cpu'."
        ) from error


def _tensors(block: nn.Module) -> Iterator[Tensor]:
    return chain(block.parameters(), block.buffers())
