"""Measured times of backends, kept in a file beside the caches of the user, so that models can be set up by them.

The file is JSON: `{"version": 1, "tables": [{"device", "torch", "shape": [out, in], "dtype", "value_bits",
"seconds": {backend: {rows: seconds}}}]}`. A table is found again by the first five: times of another device, another
number of threads or another version of torch are never used.
"""

from __future__ import annotations

import json
import math
import os
import platform
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import constants

from ..backend_choice import Times
from ..backend_forwards import place_of
from ..errors import FormatError
from ..formats.two_four import dtype_name
from ..layers import PackedLinear
from .files import atomic_file

VERSION = 1
PATH_VARIABLE = "HF_ADAPTIVE_SPARSE_TIMES"


@dataclass(frozen=True, order=True)
class TimesKey:
    """What a table of times is of.

    Attributes:
        device: as `device_name` says.
        torch: its version.
        shape: (out, in) of the weight.
        dtype: of its values.
        value_bits: of their codes, 0 where they are stored as they are.
    """

    device: str
    torch: str
    shape: tuple[int, int]
    dtype: str
    value_bits: int = 0

    @classmethod
    def of(cls, layer: PackedLinear) -> TimesKey:
        """Of a layer where it is now."""
        device, dtype = place_of(layer)
        shape = layer.out_features, layer.in_features
        return cls(device_name(device), torch.__version__, shape, dtype_name(dtype), layer.value_bits or 0)


def device_name(device: torch.device) -> str:
    """The card; or the processor, with the number of threads that torch uses, on which times depend as much."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    if device.type != "cpu":
        return device.type
    threads = torch.get_num_threads()
    return f"{_processor()}, {threads} thread{'s' if threads > 1 else ''}"


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{names[0] if names else platform.processor() or 'cpu'} ({platform.machine()})"


def times_path() -> Path:
    """Where times are kept: HF_ADAPTIVE_SPARSE_TIMES, or backend_times.json in our folder under HF_HOME."""
    given = os.environ.get(PATH_VARIABLE)
    return Path(given) if given else Path(constants.HF_HOME) / "hf_adaptive_sparse" / "backend_times.json"


def load_times(path: Path | None = None) -> dict[TimesKey, Times]:
    """All tables of the file; none if there is no file.

    Raises:
        FormatError: it is damaged or of another version.
    """
    path = path or times_path()
    if not path.exists():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if content["version"] != VERSION:
            raise ValueError(f"version {content['version']!r}, expected {VERSION}")
        return dict(map(_read, content["tables"]))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as problem:
        reason = f"{type(problem).__name__}: {problem}" if isinstance(problem, KeyError) else str(problem)
        raise FormatError(
            f"{path}: measured times cannot be read ({reason}). Remove the file, and measure again with bench --save."
        ) from problem


def save_times(tables: Mapping[TimesKey, Times], path: Path | None = None) -> Path:
    """Add tables to the file; one of the same key takes the place of the old one. Returns the path.

    Raises:
        FormatError: the file is there and cannot be read; it stays as it is.
        OutputError: it cannot be written.
    """
    path = path or times_path()
    merged = load_times(path) | dict(tables)
    content = {"version": VERSION, "tables": [_entry(key, merged[key]) for key in sorted(merged)]}
    with atomic_file(path) as temporary:
        temporary.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    return path


def _entry(key: TimesKey, times: Times) -> dict[str, Any]:
    seconds = {name: {str(rows): value for rows, value in sorted(each.items())} for name, each in times.items()}
    return vars(key) | {"shape": list(key.shape), "seconds": seconds}


def _read(entry: dict[str, Any]) -> tuple[TimesKey, Times]:
    rows, columns = map(int, entry["shape"])
    key = TimesKey(
        str(entry["device"]), str(entry["torch"]), (rows, columns), str(entry["dtype"]), int(entry["value_bits"])
    )
    times = {
        str(name): {int(count): float(value) for count, value in each.items()}
        for name, each in entry["seconds"].items()
    }
    for name, each in times.items():
        for count, value in each.items():
            if count < 1 or not 0.0 < value < math.inf:
                raise ValueError(f"{rows}x{columns}: {name} has a time of {value} for {count} rows")
    return key, times
