"""Phi 3 and 4: query, key and value in one matrix, gate and up in another."""

from __future__ import annotations

from .family import ModelFamily
from .structure import Structure

PHI3 = ModelFamily(
    name="phi3",
    attention=("qkv_proj", "o_proj"),
    mlp=("gate_up_proj", "down_proj"),
    blocks="model.layers",
    norms=("input_layernorm", "post_attention_layernorm", "norm"),
    structure=Structure(heads=("qkv_proj",), heads_from_config=True, channels=("gate_up_proj",), channel_parts=2),
)
