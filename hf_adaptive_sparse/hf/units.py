"""The coupled units of a model: which slices of which parameters make and read each head, channel, expert, layer."""

from __future__ import annotations

from collections.abc import Collection, Iterator

import torch
from torch import Tensor, nn

from ..errors import ConfigError, TargetError
from ..families import Structure
from ..units import KINDS, Axis, Span
from .block_parts import BlockParts, block_parts, find_structure
from .blocks import BlockStack
from .experts import expert_projections


def find_axes(model: nn.Module, kinds: Collection[str] = ("kv_head", "mlp_channel")) -> list[Axis]:
    """The axes of a model: block by block, attention before MLP or experts; then the hidden axis, then the layers.

    Each parameter has at most one span in an axis, and goes by its name in `model.named_parameters()`. Of a kv_head,
    the query heads are those that read it: h with h // (query heads / KV heads) = its number. A dense MLP has the
    kind mlp_channel, fused experts the kind expert, so a block has one of the two. The axis of the layers has no
    spans, for it takes whole tensors; what its units cost is said by `unit_numel`.

    Args:
        kinds: of KINDS. What the model does not have (experts in a dense model) gives no axis.
    Raises:
        ConfigError: a kind that is not known; a model with adapters.
        TargetError: a family without a declared structure; "hidden" of a model whose norms subtract the mean.
    """
    if unknown := [kind for kind in kinds if kind not in KINDS]:
        raise ConfigError(f"unknown kind of unit {unknown[0]!r}; known: {', '.join(KINDS)}.")
    structure, stack = find_structure(model)
    parts = [block_parts(structure, stack, index) for index in range(len(stack.blocks))]
    axes = []
    for index, block in enumerate(parts):
        axes.append(Axis(block.attention[0], "kv_head", index, block.kv_heads, tuple(_head_spans(block))))
        if block.experts is None:
            spans = tuple(_channel_spans(block, structure.channel_parts))
            axes.append(Axis(block.mlp[0], "mlp_channel", index, block.channels, spans))
        else:
            axes.append(Axis(block.experts[0], "expert", index, block.expert_count, tuple(_expert_spans(block))))
    axes = [axis for axis in axes if axis.kind in kinds]
    if "hidden" in kinds:
        axes.append(_hidden_axis(model, structure, stack, parts))
    if "layer" in kinds:
        axes.append(Axis(stack.name, "layer", None, len(stack.blocks), ()))
    return axes


def unit_numel(model: nn.Module, axis: Axis) -> Tensor:
    """Parameters that go when one unit goes: [units] int64. Of all but the layers, those of one axis cost the same."""
    if axis.kind == "layer":
        blocks = model.get_submodule(axis.name)
        return torch.tensor([sum(parameter.numel() for parameter in block.parameters()) for block in blocks])
    shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
    return torch.full((axis.count,), axis.cost(shapes))


def hidden_norms(model: nn.Module, structure: Structure) -> dict[str, nn.Module]:
    """Every norm over the hidden channels, by name: the norms of the model but those over single heads."""
    return {
        name: module
        for name, module in model.named_modules()
        if type(module).__name__.endswith("Norm") and name.rpartition(".")[2] not in structure.head_norms
    }


def check_layers_can_go(model: nn.Module) -> None:
    """Raise TargetError for a model that computes something else without a layer than with that layer at zero."""
    config = getattr(model, "config", None)
    if getattr(config, "scale_attn_by_inverse_layer_idx", False):
        because = (
            "scale_attn_by_inverse_layer_idx divides by the number of the layer, which changes for the layers behind a "
            "removed one"
        )
    elif not getattr(config, "do_layer_norm_before", True):
        because = (
            "do_layer_norm_before=False has the norms of a layer behind its sums, so a layer that adds nothing still "
            "changes what it passes on, and a removed one does not"
        )
    else:
        return
    raise TargetError(f"{type(model).__name__}: {because}. Only heads and channels can be removed from this model.")


def _head_spans(block: BlockParts) -> Iterator[Span]:
    queries = block.heads // block.kv_heads * block.head_dim
    widths, start, indices = (queries, block.head_dim, block.head_dim), 0, []
    for width in widths:
        indices.append(_consecutive(block.kv_heads, width) + (start if len(block.heads_in) == 1 else 0))
        start += block.kv_heads * width
    if len(block.heads_in) == 1:
        indices = [torch.cat(indices, dim=1)]
    for (name, linear), index in zip(block.heads_in.items(), indices, strict=True):
        yield from _made(name, linear, index)
    yield _read(*block.heads_out, _consecutive(block.kv_heads, queries))


def _channel_spans(block: BlockParts, parts: int) -> Iterator[Span]:
    one = _consecutive(block.channels, 1)
    index = torch.cat([one + part * block.channels for part in range(parts)], dim=1)
    for name, linear in block.channels_in.items():
        yield from _made(name, linear, index)
    yield _read(*block.channels_out, one)


def _expert_spans(block: BlockParts) -> Iterator[Span]:
    index = _consecutive(block.expert_count, 1)
    for name, module in (block.experts, block.router):
        for key, _ in module.named_parameters(recurse=False):
            yield Span(f"{name}.{key}", 0, index)


def _hidden_axis(model: nn.Module, structure: Structure, stack: BlockStack, parts: list[BlockParts]) -> Axis:
    if structure.norm == "layer":
        raise TargetError(
            f"{type(model).__name__}: its norms subtract the mean over all hidden channels, so removing one is not "
            "the same as making it zero. Only models with RMS norms can have fewer hidden channels."
        )
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    index = _consecutive(embedding.weight.shape[1], 1)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    spans = [Span(names[id(embedding.weight)], 1, index)]
    for block in parts:
        spans += _hidden_spans(block, index)
    spans += [Span(f"{name}.weight", 0, index) for name in hidden_norms(model, structure)]
    if head is not None and head.weight is not embedding.weight:
        spans.append(Span(names[id(head.weight)], 1, index, reads=True))
    _check_all_are_covered(model, structure, parts, spans)
    return Axis(model.base_model_prefix, "hidden", None, len(index), tuple(spans))


def _hidden_spans(block: BlockParts, index: Tensor) -> Iterator[Span]:
    for name, linear in (*block.heads_in.items(), *block.channels_in.items()):
        yield _read(name, linear, index)
    yield from _made(*block.heads_out, index)
    if block.experts is None:
        yield from _made(*block.channels_out, index)
        return
    (name, experts), (router, _) = block.experts, block.router
    first, second = expert_projections(experts)
    yield Span(f"{name}.{first}", 1 if experts.is_transposed else 2, index, reads=True)
    yield Span(f"{name}.{second}", 2 if experts.is_transposed else 1, index)
    if experts.has_bias:
        yield Span(f"{name}.{second}_bias", 1, index)
    yield Span(f"{router}.weight", 1, index, reads=True)


def _check_all_are_covered(model: nn.Module, structure: Structure, parts: list[BlockParts], spans: list[Span]) -> None:
    """Raise TargetError for a parameter that may have hidden channels and is in no span."""
    free = {span.tensor for span in spans}
    for block in parts:
        free |= {f"{name}.bias" for name in (*block.heads_in, *block.channels_in)}
        free |= {f"{block.attention[0]}.{norm}.weight" for norm in structure.head_norms}
        if block.experts is not None and block.experts[1].has_bias:
            free |= {f"{block.experts[0]}.{expert_projections(block.experts[1])[0]}_bias", f"{block.router[0]}.bias"}
    if left := [f"{name} {list(parameter.shape)}" for name, parameter in model.named_parameters() if name not in free]:
        raise TargetError(
            f"{type(model).__name__}: it is not known whether {', '.join(left)} holds hidden channels: the structure "
            "that is declared for this family does not name it."
        )


def _consecutive(units: int, width: int) -> Tensor:
    """[units, width]: 0, 1, 2, ... row by row."""
    return torch.arange(units * width).view(units, width)


def _made(name: str, linear: nn.Module, index: Tensor) -> Iterator[Span]:
    yield Span(f"{name}.weight", 0 if isinstance(linear, nn.Linear) else 1, index)
    if linear.bias is not None:
        yield Span(f"{name}.bias", 0, index)


def _read(name: str, linear: nn.Module, index: Tensor) -> Span:
    return Span(f"{name}.weight", 1 if isinstance(linear, nn.Linear) else 0, index, reads=True)
