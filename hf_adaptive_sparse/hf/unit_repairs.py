"""What makes up for units that go without training: a bias in the linears that read them, or new weights of these."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from ..methods.adaptive_width import repaired_readers
from ..unit_scores import UnitStats, flap_biases
from ..units import Axis
from .block_parts import out_features


def missing_biases(model: nn.Module, axes: Sequence[Axis]) -> int:
    """Numbers in the biases that `add_biases` would give to linears without one that read units of these axes."""
    names = {span.tensor.rpartition(".")[0] for axis in axes for span in axis.spans if span.reads}
    linears = [model.get_submodule(name) for name in names]
    return sum(out_features(linear) for linear in linears if linear.bias is None)


def reader_biases(
    axes: Sequence[Axis], weights: Mapping[str, Tensor], stats: UnitStats, keep: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Name of every weight that reads units that go -> [out] float32, what they returned on average (FLAP)."""
    biases: dict[str, Tensor] = {}
    for axis in axes:
        if not keep[axis.name].all():
            biases |= flap_biases(axis, weights, stats, keep[axis.name])
    return biases


@torch.no_grad()
def add_biases(model: nn.Module, biases: Mapping[str, Tensor]) -> None:
    """Add to the bias of the linear of each weight, which gets one where it has none."""
    for name, bias in biases.items():
        linear = model.get_submodule(name.rpartition(".")[0])
        if linear.bias is None:
            linear.bias = nn.Parameter(bias.to(linear.weight.dtype), requires_grad=linear.weight.requires_grad)
        else:
            linear.bias.add_(bias.to(linear.bias.dtype))


@torch.no_grad()
def repair_readers(
    axes: Sequence[Axis], weights: Mapping[str, Tensor], stats: UnitStats, keep: Mapping[str, Tensor]
) -> None:
    """Solve the weights that read units that go, in place, for what they returned with them; see repaired_readers."""
    for axis in axes:
        if not keep[axis.name].all():
            for name, solved in repaired_readers(axis, weights, stats, keep[axis.name]).items():
                weights[name].copy_(solved)
