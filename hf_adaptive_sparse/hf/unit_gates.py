"""Gates on units: what a unit gives is multiplied by a number while the model runs, and its weights stay."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ..errors import TargetError
from ..units import Axis, Span
from .units import check_layers_can_go

GATED = ("kv_head", "mlp_channel", "layer")


@contextmanager
def gated(model: nn.Module, axes: Sequence[Axis], gates: Mapping[str, Tensor]) -> Iterator[None]:
    """Within the context every unit counts as much as its gate says: 0 = as if it were removed, 1 = as it is.

    The gate of a KV head or an MLP channel multiplies what the linear layer behind it reads. The gate of a layer
    multiplies what its two sub-blocks return, bias included; where a norm follows (gemma2, olmo2), it undoes gates
    other than 0. The model is as it was when the context ends, however it ends.

    Args:
        axes: of kinds in GATED. For a layer axis those of all its blocks must be among them: they name the layers whose
            outputs are multiplied.
        gates: {axis name: [units] float}; may require gradients. Looked up at every forward pass, so a caller may put
            new ones into the mapping. An axis without gates is left as it is.
    Raises:
        TargetError: an axis cannot be gated, or gates and axes do not fit each other; gates of layers on a model from
            which `remove_units` removes none.
    """
    known = {axis.name: axis for axis in axes}
    for name, gate in gates.items():
        if name not in known:
            raise TargetError(f"{name}: has gates, and is none of the {len(axes)} axes.")
        if gate.shape != (known[name].count,):
            raise TargetError(f"{name}: has {known[name].count} units, and its gates are {list(gate.shape)}.")
    handles = []
    try:
        for axis in axes:
            if axis.name not in gates:
                continue
            if axis.kind == "layer":
                check_layers_can_go(model)
                for block, module in _adding_layers(model, axis, axes):
                    handles.append(module.register_forward_hook(partial(_scale_output, gates, axis.name, block)))
            else:
                for span in _reading_spans(axis):
                    hook = partial(_scale_input, gates, axis.name, span)
                    handles.append(_reader(model, axis, span).register_forward_pre_hook(hook, with_kwargs=True))
        yield
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def fold_gates(model: nn.Module, axes: Sequence[Axis], gates: Mapping[str, Tensor]) -> None:
    """Multiply gates into the weights, in place: the model then computes what it did in `gated(model, axes, gates)`.

    Raises:
        TargetError: as `gated`.
    """
    with gated(model, axes, gates):  # refuses what does not fit, before anything is written
        pass
    for axis in axes:
        if axis.name not in gates:
            continue
        gate = gates[axis.name]
        if axis.kind == "layer":
            for block, module in _adding_layers(model, axis, axes):
                for parameter in module.parameters(recurse=False):
                    parameter.mul_(gate[block].to(parameter))
        else:
            for span in _reading_spans(axis):
                weight = _reader(model, axis, span).weight
                scale = _spread(gate.to(weight.device), span, weight.shape[span.dim]).to(weight.dtype)
                weight.mul_(scale[:, None] if span.dim == 0 else scale)


def _scale_input(
    gates: Mapping[str, Tensor], name: str, span: Span, module: nn.Module, args: tuple, kwargs: dict
) -> tuple[tuple, dict]:
    if args:
        return (_scaled(args[0], gates[name], span), *args[1:]), kwargs
    key = next(iter(kwargs))
    return args, {**kwargs, key: _scaled(kwargs[key], gates[name], span)}


def _scaled(x: Tensor, gate: Tensor, span: Span) -> Tensor:
    return x * _spread(gate.to(x.device), span, x.shape[-1]).to(x.dtype)


def _scale_output(
    gates: Mapping[str, Tensor], name: str, block: int, module: nn.Module, args: tuple, output: Tensor
) -> Tensor:
    return output * gates[name][block].to(output)


def _spread(gate: Tensor, span: Span, features: int) -> Tensor:
    """[features]: the gate of the unit that each position belongs to; 1 where it belongs to none."""
    index = span.index.to(gate.device)
    return gate.new_ones(features).index_copy(0, index.flatten(), gate[:, None].expand(index.shape).flatten())


def _reading_spans(axis: Axis) -> list[Span]:
    spans = [span for span in axis.spans if span.reads]
    if axis.kind not in GATED or not spans:
        raise TargetError(
            f"{axis.name}: units of kind {axis.kind} cannot be gated, or nothing reads them. Gates are for "
            f"{', '.join(GATED)}."
        )
    return spans


def _reader(model: nn.Module, axis: Axis, span: Span) -> nn.Module:
    """The linear layer that reads the units of an axis."""
    place, _, key = span.tensor.rpartition(".")
    module = model.get_submodule(place)
    transposed = isinstance(module, Conv1D)
    if key != "weight" or not (transposed or isinstance(module, nn.Linear)) or span.dim != (0 if transposed else 1):
        raise TargetError(
            f"{axis.name}: {span.tensor} reads its units along dimension {span.dim} of a {type(module).__name__}. "
            "Gates need the input features of an nn.Linear or Conv1D."
        )
    return module


def _adding_layers(model: nn.Module, layers: Axis, axes: Sequence[Axis]) -> list[tuple[int, nn.Module]]:
    """(block, linear layer that adds to the residual stream), for every block."""
    found = []
    for block in range(layers.count):
        inside = [axis for axis in axes if axis.block == block and axis.kind in ("kv_head", "mlp_channel")]
        if {axis.kind for axis in inside} != {"kv_head", "mlp_channel"}:
            raise TargetError(
                f"{layers.name}: block {block} needs an axis of KV heads and one of MLP channels, which name the "
                f"layers that add to the residual stream; found {', '.join(axis.name for axis in inside) or 'none'}. "
                "Pass all axes of the model."
            )
        found += [(block, _reader(model, axis, span)) for axis in inside for span in _reading_spans(axis)]
    return found
