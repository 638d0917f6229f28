"""GPT-NeoX and Pythia."""

from __future__ import annotations

from .family import ModelFamily

GPT_NEOX = ModelFamily(
    name="gpt_neox",
    attention=("query_key_value", "attention.dense"),
    mlp=("dense_h_to_4h", "dense_4h_to_h"),
    blocks="gpt_neox.layers",
    norms=("input_layernorm", "post_attention_layernorm", "final_layer_norm"),
)
