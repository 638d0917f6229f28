"""Safetensors files, written and read one tensor at a time, with a digest of every tensor in the header.

A file is 8 bytes (the length of the header, little-endian), the header (JSON: dtype, shape and place of
every tensor, and `__metadata__`, strings to strings), then the bytes of the tensors without gaps. It is
written here and not with the library, to hold one tensor in memory at a time and to have the digests in the
header.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import torch
import xxhash
from torch import Tensor

from ..errors import FormatError

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_CHUNK = 1 << 20  # stays in the cache of a CPU, where it is digested or worked on
_LONGEST_HEADER = 100_000_000  # as the library has it


@dataclass(frozen=True)
class StoredTensor:
    """Where a tensor stands in a file: `start` and `end` count from the first byte of the file."""

    file: Path
    name: str
    dtype_name: str
    shape: tuple[int, ...]
    start: int
    end: int

    @property
    def dtype(self) -> torch.dtype:
        return DTYPES[self.dtype_name]

    @property
    def nbytes(self) -> int:
        return self.end - self.start

    def load(self) -> Tensor:
        """The whole tensor."""
        data = bytearray(self.nbytes)
        with open(self.file, "rb") as file:
            file.seek(self.start)
            if file.readinto(data) != self.nbytes:
                raise FormatError(f"{self.file}: ends inside of {self.name}. The file is truncated.")
        if not data:
            return torch.empty(self.shape, dtype=self.dtype)
        return torch.frombuffer(data, dtype=self.dtype).view(self.shape)

    def chunks(self) -> Iterator[bytes]:
        """The bytes of the tensor, a part at a time."""
        with open(self.file, "rb") as file:
            file.seek(self.start)
            yield from map(bytes, self._parts(file, _CHUNK))

    def _parts(self, file: IO[bytes], size: int) -> Iterator[memoryview]:
        """As `chunks`, of a file that stands at `start`; each is overwritten by the next."""
        left, buffer = self.nbytes, memoryview(bytearray(min(self.nbytes, size)))
        while left:
            count = file.readinto(buffer[:left])
            if not count:
                raise FormatError(f"{self.file}: ends inside of {self.name}. The file is truncated.")
            left -= count
            yield buffer[:count]

    @property
    def rows_per_block(self) -> int:
        row_bytes = max(self.nbytes // max(self.shape[0], 1), 1)
        return max(_CHUNK // row_bytes // 8 * 8, 8)

    def blocks(self, rows_per_block: int | None = None) -> Iterator[tuple[int, Tensor]]:
        """(first row, rows) of a tensor of two or more dimensions; a few MB at a time, 8n rows."""
        row_bytes = max(self.nbytes // max(self.shape[0], 1), 1)
        step = rows_per_block or self.rows_per_block
        with open(self.file, "rb") as file:
            file.seek(self.start)
            for first in range(0, self.shape[0], step):
                rows = min(step, self.shape[0] - first)
                data = torch.empty(rows * row_bytes, dtype=torch.uint8, device="cpu")  # not that of a `with`
                if file.readinto(data.numpy()) != rows * row_bytes:
                    raise FormatError(f"{self.file}: ends inside of {self.name}. The file is truncated.")
                if data.numel():
                    yield first, data.view(self.dtype).view(rows, *self.shape[1:])

    def digest(self) -> str:
        """xxh3 of name, dtype, shape and bytes, so that tensors of equal bytes cannot trade places."""
        state = _digest_state(self.name, self.dtype_name, self.shape)
        with open(self.file, "rb", buffering=0) as file:
            file.seek(self.start)
            for part in self._parts(file, _CHUNK):
                state.update(part)
        return state.hexdigest()


def read_header(path: Path) -> tuple[dict[str, StoredTensor], dict[str, str]]:
    """The tensors of a safetensors file, and its metadata.

    Raises:
        FormatError: the file is missing or truncated, or its header is not one of such a file.
    """
    if not path.is_file():
        raise FormatError(f"{path}: the file is missing.")
    size = path.stat().st_size
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > min(size - 8, _LONGEST_HEADER):
            raise FormatError(f"{path}: the header does not fit in {size} bytes. The file is truncated.")
        header = file.read(length)
    try:
        entries = json.loads(header.decode("utf-8"), object_pairs_hook=_no_duplicates)
        if not isinstance(entries, dict):
            raise ValueError("it is no object")
        metadata = entries.pop("__metadata__", {})
        tensors = {name: _stored_tensor(path, name, entry, 8 + length) for name, entry in entries.items()}
        if not all(isinstance(value, str) for value in metadata.values()):
            raise ValueError("its metadata are not all strings")
        _check_places(tensors.values(), 8 + length, size)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise FormatError(f"{path}: the header cannot be read ({error}). The file is damaged.") from error
    return tensors, metadata


def write_tensors(
    path: Path,
    layout: Mapping[str, tuple[torch.dtype, tuple[int, ...]]],
    load: Callable[[str], Tensor],
    metadata: Mapping[str, str],
) -> dict[str, str]:
    """Write a safetensors file, asking for one tensor at a time.

    Args:
        layout: dtype and shape of every tensor, known before the first is loaded.
        load: the tensor of a name, on any device.
        metadata: may hold placeholders, to be filled by `rewrite_metadata`.
    Returns:
        The digest of every tensor.
    """
    entries, place, digests = {}, 0, {}
    for name, (dtype, shape) in layout.items():
        nbytes = torch.empty(shape, dtype=dtype, device="meta").nbytes
        entries[name] = {
            "dtype": _DTYPE_NAMES[dtype],
            "shape": list(shape),
            "data_offsets": [place, place + nbytes],
        }
        place += nbytes
    with open(path, "wb") as file:
        file.write(_header_bytes(metadata, entries))
        for name, (dtype, shape) in layout.items():
            data = _bytes_of(load(name), name, dtype, shape)
            state = _digest_state(name, _DTYPE_NAMES[dtype], shape)
            state.update(data)
            digests[name] = state.hexdigest()
            file.write(data)
    return digests


def rewrite_metadata(path: Path, metadata: Mapping[str, str]) -> None:
    """Replace the metadata of a file by others of exactly the same length, in place."""
    with open(path, "r+b") as file:
        length = int.from_bytes(file.read(8), "little")
        entries = json.loads(file.read(length))
        del entries["__metadata__"]
        new = _header_bytes(metadata, entries)
        assert len(new) == 8 + length, "the new metadata have another length"
        file.seek(0)
        file.write(new)


def digest_of_file(path: Path) -> str:
    """xxh3 of all bytes of a file."""
    state, buffer = xxhash.xxh3_128(), memoryview(bytearray(_CHUNK))
    with open(path, "rb", buffering=0) as file:
        while count := file.readinto(buffer):
            state.update(buffer[:count])
    return state.hexdigest()


def digest_of_digests(digests: Mapping[str, str]) -> str:
    """One digest for a whole checkpoint, however it is cut into files."""
    state = xxhash.xxh3_128()
    for name in sorted(digests):
        state.update(f"{name}\0{digests[name]}\n".encode())
    return state.hexdigest()


def digest_of_tensor(name: str, tensor: Tensor) -> str:
    """The digest that a tensor has in a file: xxh3 of name, dtype, shape and bytes."""
    dtype, shape = tensor.dtype, tuple(tensor.shape)
    state = _digest_state(name, _DTYPE_NAMES[dtype], shape)
    state.update(_bytes_of(tensor, name, dtype, shape))
    return state.hexdigest()


def _digest_state(name: str, dtype_name: str, shape: tuple[int, ...]) -> xxhash.xxh3_128:
    return xxhash.xxh3_128(f"{name}\0{dtype_name}\0{','.join(map(str, shape))}\0".encode())


def _header_bytes(metadata: Mapping[str, str], entries: Mapping[str, dict]) -> bytes:
    header = json.dumps({"__metadata__": dict(metadata), **entries}, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)  # so that the tensors are aligned
    return len(header).to_bytes(8, "little") + header


def _bytes_of(tensor: Tensor, name: str, dtype: torch.dtype, shape: tuple[int, ...]) -> memoryview:
    assert (tensor.dtype, tuple(tensor.shape)) == (dtype, shape), f"{name} is not as it was laid out"
    return memoryview(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())


def _stored_tensor(path: Path, name: str, entry: dict, data_start: int) -> StoredTensor:
    shape, (start, end) = tuple(entry["shape"]), entry["data_offsets"]
    if entry["dtype"] not in DTYPES:
        raise ValueError(f"{name} has the unknown dtype {entry['dtype']!r}")
    if not all(type(number) is int and number >= 0 for number in (*shape, start, end)):
        raise ValueError(f"{name} has a shape or a place that is no number")
    elements = 1
    for length in shape:
        elements *= length
    if end - start != elements * DTYPES[entry["dtype"]].itemsize:
        raise ValueError(f"{name} has {end - start} bytes, which is not {list(shape)} of {entry['dtype']}")
    return StoredTensor(path, name, entry["dtype"], shape, data_start + start, data_start + end)


def _check_places(tensors: Iterable[StoredTensor], data_start: int, size: int) -> None:
    place = data_start
    for tensor in sorted(tensors, key=lambda tensor: (tensor.start, tensor.end)):
        if tensor.start != place:
            raise ValueError(f"{tensor.name} starts at byte {tensor.start}, expected {place}")
        place = tensor.end
    if place != size:
        raise ValueError(f"the tensors end at byte {place} of {size}")


def _no_duplicates(pairs: list[tuple[str, object]]) -> dict[str, object]:
    entries = dict(pairs)
    if len(entries) != len(pairs):
        raise ValueError("a name occurs twice")
    return entries
