"""Phi 3 and 4: query, key and value in one matrix, gate and up in another."""

from __future__ import annotations

from .family import ModelFamily

PHI3 = ModelFamily(
    name="phi3",
    attention=("qkv_proj", "o_proj"),
    mlp=("gate_up_proj", "down_proj"),
    blocks="model.layers",
    norms=("input_layernorm", "post_attention_layernorm", "norm"),
)
