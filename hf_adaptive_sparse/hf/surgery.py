"""Units are removed from a model in memory: its parameters, the state of an optimizer, its modules and its config."""

from __future__ import annotations

import difflib
import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ..errors import ConfigError
from ..families import Structure
from ..units import Axis
from .block_parts import block_parts, find_structure
from .blocks import BlockStack, check_blocks
from .optimizer_state import check_state, cut, drop_parameters, slice_state
from .shrunk_config import remove_layers, tell_config, tell_modules
from .units import check_layers_can_go, find_axes, hidden_norms

# Of one parameter: dimension -> [kept] int64 positions along it.
Cuts = dict[int, Tensor]


def remove_units(model: nn.Module, keep: Mapping[str, Tensor], optimizer: Optimizer | None = None) -> None:
    """Remove units from a model in place, so that it computes what it computed with these units at zero.

    Everything is checked before anything is changed. Parameters stay the same objects with other values, their
    gradients and the optimizer's state of the same shape are cut alike, so training goes on at once; the parameters
    of removed layers leave the optimizer. Attributes of the modules follow, so `forward` and `generate` work at once.

    Fewer hidden channels: an RMS norm over d' of d channels divides by sqrt(d / d') times as much, so norm weights are
    multiplied by sqrt(d / d') and `rms_norm_eps` by d / d'; where embeddings are multiplied by the root of the hidden
    size, they take up the change, and a tied head gives it back through the final norm. Norms over single heads (of
    Qwen3) get the new eps too, since their config has only one. The moments of the optimizer are cut, not scaled.

    The config says what all blocks have; where they differ, the largest, and `block_widths` says the rest. GPT-2 and
    OPT have no field for the size of a head, so their config keeps its number of heads: the model in memory is right,
    and no config of theirs builds it. The config of a model that `export_shrunk` wrote says every width. No config
    checks itself here: LlamaConfig wants the heads to divide the hidden size and refuses when it is saved.

    Args:
        keep: name of an axis, as `find_axes` says it -> [units] bool, True = stays. Axes that are not named stay
            whole. After layers were removed, later names have the new numbers.
        optimizer: that trains the model.
    Raises:
        ConfigError: an axis that the model does not have, a mask of another length or dtype, or one that leaves too
            little; an optimizer of other parameters, or with a state that cannot be cut.
        TargetError: a family without a declared structure, or a model that cannot be changed; layers of one that
            computes something else without a layer than with it at zero (OPT 350M, whose norms follow the sums).
    """
    structure, stack = find_structure(model)
    # A model of shapes alone is cut too, to learn what would be left.
    if not all(parameter.is_meta for parameter in model.parameters()):
        check_blocks(model, stack)
    axes = _find(model, keep)
    chosen = {name: _checked(model, axes[name], mask) for name, mask in keep.items()}
    parameters = dict(model.named_parameters())
    cuts = _cuts(parameters, [(axes[name], mask) for name, mask in chosen.items() if not mask.all()])
    layers = chosen.get(stack.name, torch.ones(len(stack.blocks), dtype=torch.bool))
    removed = [each for index in (~layers).nonzero() for each in stack.blocks[index].parameters()]
    if optimizer is not None:
        check_state(optimizer, parameters, cuts)

    if (hidden := chosen.get(model.base_model_prefix)) is not None:
        _rescale(model, structure, stack, int(hidden.sum()), len(hidden))
    for name, positions in cuts.items():
        if optimizer is not None:
            slice_state(optimizer, parameters[name], positions)
        _cut_parameter(parameters[name], positions)
    if removed:
        remove_layers(model, stack, layers, structure)
        stack = find_structure(model)[1]
        if optimizer is not None:
            drop_parameters(optimizer, removed)
    parts = [block_parts(structure, stack, index) for index in range(len(stack.blocks))]
    tell_config(model.config, structure, parts)
    tell_modules(model, structure, parts)


def block_widths(model: nn.Module) -> list[dict[str, int]]:
    """The widths of every block, read off its weights, by the names of Llama's config.

    Returns:
        Of each block "num_attention_heads", "num_key_value_heads" and "intermediate_size"; of a block with experts
        "num_experts" in the place of the last. The config of a model can say this only where all blocks agree and,
        for the heads, where it has a field for the size of a head (GPT-2 and OPT have none).
    """
    structure, stack = find_structure(model)
    return [block_parts(structure, stack, index).widths for index in range(len(stack.blocks))]


def _find(model: nn.Module, keep: Mapping[str, Tensor]) -> dict[str, Axis]:
    # The hidden axis only where it is asked for: not every family has it, and finding it looks at every parameter.
    kinds = ["kv_head", "mlp_channel", "expert", "layer"] + ["hidden"] * (model.base_model_prefix in keep)
    axes = {axis.name: axis for axis in find_axes(model, kinds)}
    for name in keep:
        if name not in axes:
            close = difflib.get_close_matches(name, axes, 3) or list(axes)[:3]
            raise ConfigError(
                f"{name!r}: is no axis of this {type(model).__name__}; the closest are {', '.join(close)}. find_axes "
                "lists them all."
            )
    return axes


def _checked(model: nn.Module, axis: Axis, keep: Tensor) -> Tensor:
    """The mask on the CPU, if it can be applied."""
    if not isinstance(keep, Tensor) or keep.dtype != torch.bool or keep.shape != (axis.count,):
        found = f"{keep.dtype} of {list(keep.shape)}" if isinstance(keep, Tensor) else f"a {type(keep).__name__}"
        raise ConfigError(
            f"{axis.name}: keep is a bool tensor of [{axis.count}], True for each unit of kind {axis.kind} that stays; "
            f"got {found}."
        )
    needed = model.config.num_experts_per_tok if axis.kind == "expert" else 1
    if (left := int(keep.sum())) < needed:
        raise ConfigError(
            f"{axis.name}: {left} of {axis.count} units of kind {axis.kind} would stay, and the model needs at least "
            f"{needed}. Keep more of them."
        )
    if axis.kind == "layer" and left < axis.count:
        check_layers_can_go(model)
    return keep.cpu()


def _cuts(parameters: Mapping[str, nn.Parameter], chosen: list[tuple[Axis, Tensor]]) -> dict[str, Cuts]:
    """What stays of every parameter that becomes smaller."""
    stays: dict[str, dict[int, Tensor]] = {}
    for axis, keep in chosen:
        for span in axis.spans:
            size = parameters[span.tensor].shape[span.dim]
            kept = stays.setdefault(span.tensor, {}).setdefault(span.dim, torch.ones(size, dtype=torch.bool))
            kept[span.index[~keep].flatten()] = False
    return {name: {dim: kept.nonzero().flatten() for dim, kept in dims.items()} for name, dims in stays.items()}


@torch.no_grad()
def _cut_parameter(parameter: nn.Parameter, cuts: Cuts) -> None:
    grad, parameter.grad = parameter.grad, None
    smaller = cut(parameter.data, cuts)
    # A graph that is still alive (a loss that the caller holds) keeps the node that sums this parameter's gradients,
    # with the shape it had; torch makes a new node when the dtype changes, not when the shape does.
    other = torch.float32 if parameter.dtype == torch.float16 else torch.float16
    parameter.data = parameter.data.new_empty(0, dtype=other)
    parameter.data = smaller
    parameter.grad = None if grad is None else cut(grad, cuts)


@torch.no_grad()
def _rescale(model: nn.Module, structure: Structure, stack: BlockStack, left: int, count: int) -> None:
    """RMS norms over `left` of `count` hidden channels return what they returned with the others at zero."""
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    final = 1.0
    if hasattr(embedding, "embed_scale"):
        ratio = math.sqrt(count / left)
        embedding.scalar_embed_scale /= ratio
        embedding.embed_scale /= ratio
        embedding.weight.mul_(ratio)
        if head is not None and head.weight is embedding.weight:
            final = 1 / ratio
    model.config.rms_norm_eps *= count / left
    shift = 1.0 if structure.norm == "rms_plus_one" else 0.0
    for name, norm in hidden_norms(model, structure).items():
        factor = math.sqrt(count / left) * (1.0 if name.startswith(f"{stack.name}.") else final)
        norm.weight.copy_((norm.weight.double() + shift) * factor - shift)
    for module in model.modules():
        for eps in ("eps", "variance_epsilon"):
            if type(module).__name__.endswith("Norm") and eps in vars(module):
                setattr(module, eps, model.config.rms_norm_eps)
