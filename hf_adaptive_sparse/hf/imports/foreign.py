"""What a checkpoint of another tool holds, as an ordinary model would hold it: names, shapes, and one tensor at a time.

Every importer turns its format into a `ForeignModel`; what comes after (loading, saving) knows no format.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...formats.value_codes import StoredGrid


class ForeignTensor(NamedTuple):
    """A tensor that is read when it is asked for.

    `nbytes` is what it takes in its source, with all that belongs to it: bits, scales, masks.
    """

    dtype: torch.dtype
    shape: tuple[int, ...]
    nbytes: int
    load: Callable[[], Tensor]


class Branch(NamedTuple):
    """A low-rank branch beside a linear layer: y = x W^T + (x P^T) S^T."""

    projection: Callable[[], Tensor]
    """P, [rank, in]"""
    scale: Callable[[], Tensor]
    """S, [out, rank]"""


@dataclass(frozen=True, kw_only=True)
class ForeignModel:
    """A checkpoint of another tool.

    Args:
        source: the file or folder.
        format: what it was recognised as, for people.
        tensors: of the ordinary model, by the names that transformers knows.
        config: loads config.json of the ordinary model; a ConfigError says that a base must be named for it.
        tokenizer_from: folder or Hub id that may hold a tokenizer.
        grids: of layers whose values are integer codes times scales: loads the grid.
        branches: of layers that have one, by name of the layer.
        notes: what is not carried over or was worked out, a sentence each.
    """

    source: Path
    format: str
    tensors: Mapping[str, ForeignTensor]
    config: Callable[[], Mapping[str, Any]]
    tokenizer_from: str | None = None
    grids: Mapping[str, Callable[[], StoredGrid]] = field(default_factory=dict)
    branches: Mapping[str, Branch] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


class Importer(NamedTuple):
    """How checkpoints of one tool are read; IMPORTERS is keyed by the name of the tool."""

    about: str
    """What it reads, for lists of known formats."""
    recognises: Callable[[Path], bool]
    """Whether a file or folder is such a checkpoint, by names, config.json and headers alone."""
    read: Callable[[Path, str | None], ForeignModel]
    """(file or folder, folder or Hub id of the base model) -> what it holds."""
