"""The axes of a Llama, written out by hand."""

from __future__ import annotations

import torch
from torch import nn

from hf_adaptive_sparse.units import Axis, Span


def llama_axes(model: nn.Module, with_layers: bool = False) -> list[Axis]:
    """KV heads and MLP channels of every block, attention first; then the layers."""
    config, axes = model.config, []
    for block, layer in enumerate(model.model.layers):
        place = f"model.layers.{block}"
        groups, width = config.num_key_value_heads, config.head_dim
        queries = torch.arange(config.num_attention_heads * width).view(groups, -1)
        keys = torch.arange(groups * width).view(groups, -1)
        spans = (
            Span(f"{place}.self_attn.q_proj.weight", 0, queries),
            Span(f"{place}.self_attn.k_proj.weight", 0, keys),
            Span(f"{place}.self_attn.v_proj.weight", 0, keys),
            Span(f"{place}.self_attn.o_proj.weight", 1, queries, reads=True),
        )
        axes.append(Axis(f"{place}.self_attn", "kv_head", block, groups, spans))
        channels = layer.mlp.gate_proj.out_features
        each = torch.arange(channels)[:, None]
        spans = (
            Span(f"{place}.mlp.gate_proj.weight", 0, each),
            Span(f"{place}.mlp.up_proj.weight", 0, each),
            Span(f"{place}.mlp.down_proj.weight", 1, each, reads=True),
        )
        axes.append(Axis(f"{place}.mlp", "mlp_channel", block, channels, spans))
    if with_layers:
        axes.append(Axis("model.layers", "layer", None, len(model.model.layers), ()))
    return axes
