"""How a sparse weight is stored: `pack(weight) -> tensors`, `unpack(*tensors) -> weight`; nothing is lost.

Of a weight that stands on a grid, `value_codes.encode` makes the first tensor smaller still, `decode` undoes it.
`mask_bits` stores masks without weights; `sparse_bitmask` reads what compressed-tensors wrote.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor

from . import two_four


class Format(NamedTuple):
    """A way of storing weights of one pattern; FORMATS is keyed by the name of that pattern."""

    pack: Callable[..., tuple[Tensor, ...]]
    unpack: Callable[..., Tensor]
    validate: Callable[..., None]
    suffixes: tuple[str, ...]
    """What is added to the name of a layer to name each tensor, in the order in which `pack` returns them."""


FORMATS: dict[str, Format] = {
    "2:4": Format(two_four.pack, two_four.unpack, two_four.validate, ("weight_values", "weight_meta")),
}

__all__ = ["FORMATS", "Format"]
