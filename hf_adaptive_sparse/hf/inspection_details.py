"""What is looked at besides zeros: rows that are the same, and what a configuration says of how a model was made."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
import xxhash
from torch import Tensor

from .quantizer import QUANT_METHOD
from .shrunk_manifest import KEY as MANIFEST

_OF_ADAPTERS = ("peft_type", "base_model_name_or_path", "pattern", "mask_policy", "init_mask", "layout", "slorb_k")


class RowPrints:
    """Fingerprints (xxh3, 64 bits) of the rows of a matrix [rows, columns] while parts of it pass by, from the left.

    -0.0 counts as 0.0. Two rows that differ have the same fingerprint with a probability of 2^-64.
    """

    def __init__(self, rows: int, columns: int) -> None:
        self.columns = columns
        self.digests = np.zeros(rows, dtype=np.uint64)
        self.filled = torch.zeros(rows, dtype=torch.int64)
        self._states: dict[int, Any] = {}

    def add(self, part: Tensor, row: int, column: int) -> None:
        """Take a part whose upper left corner is at (row, column); all that stands left of it was there before."""
        zero = part == 0
        self.filled[row : row + len(part)] += part.shape[1] - zero.sum(1)
        values = part.masked_fill(zero, 0.0).contiguous().view(torch.uint8).numpy()
        whole = part.shape[1] == self.columns
        for number, data in enumerate(values, start=row):
            if whole:
                self.digests[number] = xxhash.xxh3_64_intdigest(data)
                continue
            state = self._states.setdefault(number, xxhash.xxh3_64())
            state.update(data)
            if column + part.shape[1] == self.columns:
                self.digests[number] = self._states.pop(number).intdigest()

    def zero_rows(self) -> int:
        """How many rows have no value."""
        return int((self.filled == 0).sum())

    def same_rows(self) -> list[tuple[int, int]]:
        """(row, the first row that it is the same as), of rows that have a value, by rows."""
        digests, first, place = np.unique(self.digests, return_index=True, return_inverse=True)
        if len(digests) == len(self.digests):
            return []
        earlier = first[place]
        later = np.flatnonzero((earlier != np.arange(len(earlier))) & (self.filled.numpy() > 0))
        return [(int(row), int(earlier[row])) for row in later]

    def whole(self) -> int:
        """Of the whole matrix."""
        return xxhash.xxh3_64_intdigest(self.digests.tobytes())


def provenance_of(config: Mapping[str, Any]) -> dict[str, Any]:
    """How a model was made, as its configuration tells: method, parameters, parent, tokens; lists of names as counts.

    Args:
        config: of `config.json`, or of an adapter's `adapter_config.json`.
    """
    found: dict[str, Any] = {}
    if "peft_type" in config:
        found |= {key: config[key] for key in _OF_ADAPTERS if config.get(key) is not None}
    about = config.get(QUANT_METHOD)
    if isinstance(about, Mapping):
        found |= {key: len(value) if key == "modules" else value for key, value in about.items()}
    packed = config.get("quantization_config")
    if isinstance(packed, Mapping) and packed.get("quant_method") == QUANT_METHOD:
        keys = ("format_version", "pattern", "value_dtype", "value_bits", "group_size", "producer", "sparsity")
        found["packed"] = {key: packed[key] for key in keys if packed.get(key) is not None}
        found["packed"]["modules"] = len(packed.get("modules") or ())
    manifest = config.get(MANIFEST)
    if isinstance(manifest, Mapping):
        found["shrunk"] = {key: len(value) if key == "kept" else value for key, value in manifest.items()}
    for key in ("_name_or_path", "transformers_version"):
        if found and config.get(key):
            found[key.strip("_")] = config[key]
    return found


def claimed_two_four(config: Mapping[str, Any]) -> frozenset[str]:
    """Names of the weights that a configuration says are 2:4."""
    names: set[str] = set()
    for key in (QUANT_METHOD, "quantization_config"):
        about = config.get(key)
        if isinstance(about, Mapping) and about.get("pattern") == "2:4":
            names |= {f"{name}.weight" for name in about.get("modules") or () if isinstance(name, str)}
    return frozenset(names)
