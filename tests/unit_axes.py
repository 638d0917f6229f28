"""Axes built by hand, with random weights and with statistics of random inputs."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from hf_adaptive_sparse.unit_scores import InputMoments, UnitStats
from hf_adaptive_sparse.units import Axis, Span
from tests.layers import seeded

HIDDEN = 10
KINDS = ("kv_head", "mlp_channel", "transposed")


def consecutive(units: int, width: int) -> Tensor:
    return torch.arange(units * width).view(units, width)


def hand_made_axis(kind: str) -> tuple[Axis, dict[str, tuple[int, ...]]]:
    """An axis and the shapes of its tensors: three KV heads of four, each with two query heads; or seven channels.

    "transposed" stores weights [in, out], and all it makes in one tensor, as GPT-2 and Phi-3 do.
    """
    if kind == "kv_head":
        spans = (
            Span("attn.q_proj.weight", 0, consecutive(3, 8)),
            Span("attn.q_proj.bias", 0, consecutive(3, 8)),
            Span("attn.k_proj.weight", 0, consecutive(3, 4)),
            Span("attn.v_proj.weight", 0, consecutive(3, 4)),
            Span("attn.o_proj.weight", 1, consecutive(3, 8), reads=True),
        )
        shapes = ((24, HIDDEN), (24,), (12, HIDDEN), (12, HIDDEN), (HIDDEN, 24))
        axis = Axis("attn", "kv_head", 0, 3, spans)
    elif kind == "mlp_channel":
        spans = (
            Span("mlp.gate_proj.weight", 0, consecutive(7, 1)),
            Span("mlp.up_proj.weight", 0, consecutive(7, 1)),
            Span("mlp.down_proj.weight", 1, consecutive(7, 1), reads=True),
        )
        shapes = ((7, HIDDEN), (7, HIDDEN), (HIDDEN, 7))
        axis = Axis("mlp", "mlp_channel", 0, 7, spans)
    else:
        both = torch.cat([consecutive(7, 1), consecutive(7, 1) + 7], dim=1)
        spans = (
            Span("mlp.c_fc.weight", 1, both),
            Span("mlp.c_fc.bias", 0, both),
            Span("mlp.c_proj.weight", 0, consecutive(7, 1), reads=True),
        )
        shapes = ((HIDDEN, 14), (14,), (7, HIDDEN))
        axis = Axis("mlp", "mlp_channel", 0, 7, spans)
    return axis, {span.tensor: shape for span, shape in zip(axis.spans, shapes, strict=True)}


def random_inputs(axis: Axis, seed: int, windows: int = 3, length: int = 5) -> dict[str, Tensor]:
    """What each reading weight reads: [windows, length, in] float64, with a mean that is not 0."""
    generator, found = seeded(seed + 7), {}
    for span in axis.spans:
        if span.reads:
            shape = (windows, length, span.index.numel())
            found[span.tensor] = torch.randn(shape, generator=generator, dtype=torch.float64) + 0.5
    return found


def moments_of(inputs: Tensor) -> InputMoments:
    """Of [windows, length, in]."""
    return InputMoments(
        tokens=inputs.shape[0] * inputs.shape[1],
        sums=inputs.sum((0, 1)),
        squares=inputs.square().sum((0, 1)),
        magnitudes=inputs.abs().mean(1).square().sum(0),
    )


def random_axis(kind: str, seed: int) -> tuple[Axis, dict[str, Tensor], UnitStats]:
    """An axis with random weights, and statistics that serve every score."""
    axis, shapes = hand_made_axis(kind)
    generator = seeded(seed)
    weights = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    stats = UnitStats(
        gradients={name: torch.randn(shape, generator=generator) for name, shape in shapes.items()},
        inputs={name: moments_of(inputs) for name, inputs in random_inputs(axis, seed).items()},
        losses={axis.name: torch.randn(axis.count, generator=generator, dtype=torch.float64)},
    )
    return axis, weights, stats


def axes_of_llama(model: nn.Module) -> list[Axis]:
    """KV heads and channels of every block of a model whose blocks are named as Llama's."""
    config, axes = model.config, []
    heads, kv_heads, size = config.num_attention_heads, config.num_key_value_heads, config.head_dim
    for block in range(config.num_hidden_layers):
        attention, mlp = f"model.layers.{block}.self_attn", f"model.layers.{block}.mlp"
        queries, keys = consecutive(kv_heads, heads // kv_heads * size), consecutive(kv_heads, size)
        channels = consecutive(config.intermediate_size, 1)
        spans = (
            Span(f"{attention}.q_proj.weight", 0, queries),
            Span(f"{attention}.k_proj.weight", 0, keys),
            Span(f"{attention}.v_proj.weight", 0, keys),
            Span(f"{attention}.o_proj.weight", 1, queries, reads=True),
        )
        axes.append(Axis(attention, "kv_head", block, kv_heads, spans))
        spans = (
            Span(f"{mlp}.gate_proj.weight", 0, channels),
            Span(f"{mlp}.up_proj.weight", 0, channels),
            Span(f"{mlp}.down_proj.weight", 1, channels, reads=True),
        )
        axes.append(Axis(mlp, "mlp_channel", block, config.intermediate_size, spans))
    return axes


def channels_of_gpt2(model: nn.Module) -> list[Axis]:
    """Channels of every MLP of a GPT-2, whose weights are stored [in, out]."""
    axes = []
    for block in range(model.config.n_layer):
        name, channels = f"transformer.h.{block}.mlp", consecutive(4 * model.config.n_embd, 1)
        spans = (
            Span(f"{name}.c_fc.weight", 1, channels),
            Span(f"{name}.c_fc.bias", 0, channels),
            Span(f"{name}.c_proj.weight", 0, channels, reads=True),
        )
        axes.append(Axis(name, "mlp_channel", block, len(channels), spans))
    return axes
