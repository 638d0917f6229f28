"""Ways to damage a packed folder or a folder of masks, each drawn at random from a seed."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path

Corruption = Callable[[Path, random.Random, Path], str]
"""Damages a folder, given a second checkpoint of the same architecture; says what it did."""


def files_of(folder: Path, pattern: str = "*") -> list[Path]:
    return sorted(path for path in folder.glob(pattern) if path.is_file())


def flip_byte(folder: Path, draw: random.Random, other: Path) -> str:
    return _change_byte(draw.choice(files_of(folder)), draw, draw.randrange(1, 256))


def flip_bit(folder: Path, draw: random.Random, other: Path) -> str:
    return _change_byte(draw.choice(files_of(folder)), draw, 1 << draw.randrange(8))


def flip_byte_of_header(folder: Path, draw: random.Random, other: Path) -> str:
    file = draw.choice(files_of(folder, "*.safetensors"))
    length = 8 + int.from_bytes(file.read_bytes()[:8], "little")
    return _change_byte(file, draw, draw.randrange(1, 256), end=length)


def flip_byte_of_tensor(folder: Path, draw: random.Random, other: Path) -> str:
    file = draw.choice(files_of(folder, "*.safetensors"))
    length = 8 + int.from_bytes(file.read_bytes()[:8], "little")
    return _change_byte(file, draw, draw.randrange(1, 256), start=length)


def truncate(folder: Path, draw: random.Random, other: Path) -> str:
    file = draw.choice(files_of(folder))
    length = draw.randrange(file.stat().st_size)
    file.write_bytes(file.read_bytes()[:length])
    return f"{file.name} cut to {length} bytes"


def append(folder: Path, draw: random.Random, other: Path) -> str:
    file = draw.choice(files_of(folder))
    extra = draw.randbytes(draw.randrange(1, 40))
    file.write_bytes(file.read_bytes() + extra)
    return f"{file.name} and {extra!r}"


def overwrite_range(folder: Path, draw: random.Random, other: Path) -> str:
    file = draw.choice(files_of(folder))
    data = bytearray(file.read_bytes())
    start = draw.randrange(len(data))
    length = min(draw.randrange(1, 500), len(data) - start)
    data[start : start + length] = draw.choice([bytes(length), b"\xff" * length, draw.randbytes(length)])
    file.write_bytes(data)
    return f"{file.name}: {length} bytes from {start}"


def remove_bytes(folder: Path, draw: random.Random, other: Path) -> str:
    file = draw.choice(files_of(folder))
    data = file.read_bytes()
    start = draw.randrange(len(data))
    length = draw.randrange(1, 20)
    file.write_bytes(data[:start] + data[start + length :])
    return f"{file.name}: without {length} bytes from {start}"


def delete_file(folder: Path, draw: random.Random, other: Path) -> str:
    file = draw.choice(files_of(folder))
    file.unlink()
    return f"{file.name} deleted"


def empty_file(folder: Path, draw: random.Random, other: Path) -> str:
    file = draw.choice(files_of(folder))
    file.write_bytes(b"")
    return f"{file.name} emptied"


def edit_json(folder: Path, draw: random.Random, other: Path) -> str:
    """Change, remove, rename or add one entry, anywhere in a JSON file."""
    file = draw.choice(files_of(folder, "*.json"))
    content = json.loads(file.read_text())
    containers = list(_containers(content))
    container = draw.choice([each for each in containers if each])
    key = draw.choice(list(container) if isinstance(container, dict) else range(len(container)))
    action = draw.choice(["change", "change", "change", "remove", "rename", "add"])
    before = container[key]
    if action == "change" or isinstance(container, list):
        container[key] = draw.choice([value for value in _other_values(before, draw) if value != before])
    elif action == "remove":
        del container[key]
    elif action == "rename":
        container[f"{key}_"] = container.pop(key)
    else:
        container["added"] = draw.choice([1, "text", None, {}])
    file.write_text(json.dumps(content))
    return f"{file.name}: {action} {key} (was {str(before)[:40]})"


def swap_tensors(folder: Path, draw: random.Random, other: Path) -> str:
    """Exchange the bytes, the places or the names of two tensors of one file, of equal size where there are such."""
    file = draw.choice([file for file in files_of(folder, "*.safetensors") if len(_header(file)) > 2])
    header = _header(file)
    metadata = header.pop("__metadata__")
    pairs = [(a, b) for a in header for b in header if a < b and _size(header[a]) == _size(header[b])]
    first, second = draw.choice(pairs or [tuple(draw.sample(sorted(header), 2))])
    data = bytearray(file.read_bytes()[8 + int.from_bytes(file.read_bytes()[:8], "little") :])
    if draw.random() < 0.5 and pairs:
        (a, b), (c, d) = header[first]["data_offsets"], header[second]["data_offsets"]
        data[a:b], data[c:d] = data[c:d], data[a:b]
        how = "bytes"
    else:
        header[first], header[second] = header[second], header[first]
        how = "entries"
    _write(file, {"__metadata__": metadata, **header}, bytes(data))
    return f"{file.name}: {how} of {first} and {second}"


def edit_header(folder: Path, draw: random.Random, other: Path) -> str:
    """Change dtype, shape, place, name or digest of a tensor, or the metadata, in a header that stays readable."""
    file = draw.choice(files_of(folder, "*.safetensors"))
    header, raw = _header(file), file.read_bytes()
    data = raw[8 + int.from_bytes(raw[:8], "little") :]
    names = [name for name in header if name != "__metadata__"]
    name = draw.choice(names)
    action = draw.choice(["dtype", "shape", "place", "remove", "rename", "metadata", "no metadata", "digest"])
    if action == "dtype":
        header[name]["dtype"] = draw.choice(
            [each for each in ("BF16", "F16", "F32", "U8", "I8", "I16", "X") if each != header[name]["dtype"]]
        )
    elif action == "shape":
        header[name]["shape"] = draw.choice([header[name]["shape"][::-1] + [1], [-1], [], [7, 7]])
    elif action == "place":
        header[name]["data_offsets"][draw.randrange(2)] += draw.choice([-8, 8, 10**9])
    elif action == "remove":
        del header[name]
    elif action == "rename":
        header[name + "x"] = header.pop(name)
    elif action == "metadata":
        key = draw.choice([key for key in header["__metadata__"] if key != "format"])
        header["__metadata__"][key] = draw.choice(["", "{}", "2", "1.10", "[]", '{"a": 1}', "null"])
    elif action == "no metadata":
        del header["__metadata__"]
    else:
        digests = json.loads(header["__metadata__"]["adaptive_sparse_tensors"])
        digests[name] = f"{draw.getrandbits(128):032x}"
        header["__metadata__"]["adaptive_sparse_tensors"] = json.dumps(digests)
    _write(file, header, data)
    return f"{file.name}: {action} of {name}"


def mix_checkpoints(folder: Path, draw: random.Random, other: Path) -> str:
    """Take one or all files of a kind from another checkpoint of the same architecture."""
    pattern = draw.choice(["*.safetensors", "*.json", "config.json", "*index.json"])
    files = [file.name for file in files_of(other, pattern) or files_of(other, "config.json") or files_of(other)]
    chosen = files if draw.random() < 0.5 else [draw.choice(files)]
    for name in chosen:
        shutil.copy(other / name, folder / name)
    return f"{', '.join(chosen)} of another checkpoint"


def swap_files(folder: Path, draw: random.Random, other: Path) -> str:
    """Exchange the names of two files, of two shards where there are such."""
    files = files_of(folder, draw.choice(["*.safetensors", "*"]))
    first, second = draw.sample(files if len(files) > 1 else files_of(folder), 2)
    (a, b) = first.read_bytes(), second.read_bytes()
    first.write_bytes(b)
    second.write_bytes(a)
    return f"{first.name} and {second.name}"


CORRUPTIONS: dict[str, Corruption] = {
    each.__name__: each
    for each in (
        flip_byte, flip_bit, flip_byte_of_header, flip_byte_of_tensor, truncate, append, overwrite_range, remove_bytes,
        delete_file, empty_file, edit_json, swap_tensors, edit_header, mix_checkpoints, swap_files,
    )
}  # fmt: skip


def _change_byte(file: Path, draw: random.Random, mask: int, start: int = 0, end: int | None = None) -> str:
    data = bytearray(file.read_bytes())
    place = draw.randrange(start, end or len(data))
    data[place] ^= mask
    file.write_bytes(data)
    return f"{file.name}: byte {place} ^ {mask:#x}"


def _containers(content):
    if isinstance(content, dict | list):
        yield content
        for value in content.values() if isinstance(content, dict) else content:
            yield from _containers(value)


def _other_values(value, draw: random.Random) -> list:
    if isinstance(value, bool):
        return [not value, None, "yes"]
    if isinstance(value, int | float):
        return [value + 1, value * 2 + 1, -value - 1, 0, value + 0.5, None, "text", [value]]
    if isinstance(value, str):
        return [value + "x", value[:-1], value[::-1], "", None, 3, value.upper()]
    return [None, 3, "text", [], {}, [value]]


def _header(file: Path) -> dict:
    raw = file.read_bytes()
    return json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")])


def _write(file: Path, header: dict, data: bytes) -> None:
    encoded = json.dumps(header).encode()
    encoded += b" " * (-len(encoded) % 8)
    file.write_bytes(len(encoded).to_bytes(8, "little") + encoded + data)


def _size(entry: dict) -> tuple:
    return entry["dtype"], tuple(entry["shape"])
