"""Falcon, with one or with two norms per block."""

from __future__ import annotations

from .family import ModelFamily

FALCON = ModelFamily(
    name="falcon",
    attention=("query_key_value", "self_attention.dense"),
    mlp=("dense_h_to_4h", "dense_4h_to_h"),
    blocks="transformer.h",
    norms=("input_layernorm", "post_attention_layernorm", "ln_attn", "ln_mlp", "ln_f"),
)
