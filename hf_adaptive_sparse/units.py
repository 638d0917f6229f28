"""Coupled units: what can be removed from a model as a whole, and which slices of which tensors go with it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from .errors import ConfigError

KINDS = ("kv_head", "mlp_channel", "expert", "hidden", "layer")


@dataclass(frozen=True, eq=False)
class Span:
    """The slices of one tensor that belong to the units of an axis.

    Attributes:
        tensor: full name of the parameter.
        dim: of the tensor as it is stored, along which the units lie.
        index: [units, k] int64, the positions along `dim` of each unit. The positions of all units are distinct.
        reads: whether the slices read the units (columns of o_proj, down_proj), rather than make them.
    """

    tensor: str
    dim: int
    index: Tensor
    reads: bool = False


@dataclass(frozen=True, eq=False)
class Axis:
    """Units of one kind in one place: the KV heads of one attention, the channels of one MLP.

    Attributes:
        name: full name of the module that holds them; of a hidden axis that of the model, of layers that of the list.
        kind: of KINDS. A kv_head is a KV head with all query heads that read it.
        block: number of the decoder block; None for hidden and layer.
        count: units.
        spans: of every tensor that has a part in each unit.
    """

    name: str
    kind: str
    block: int | None
    count: int
    spans: tuple[Span, ...]

    def cost(self, shapes: Mapping[str, torch.Size]) -> int:
        """Parameters that go when one unit goes, given the shape of every tensor.

        Raises:
            ConfigError: the axis of the layers, which take whole tensors and may differ.
        """
        if not self.spans:
            raise ConfigError(
                f"{self.name}: units of kind {self.kind} take whole tensors, and need not cost the same. Ask "
                "unit_numel(model, axis)."
            )
        total = 0
        for span in self.spans:
            shape = shapes[span.tensor]
            total += shape.numel() // shape[span.dim] * span.index.shape[1]
        return total
