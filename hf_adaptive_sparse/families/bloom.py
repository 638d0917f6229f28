"""BLOOM. The norm behind the embedding is among its norms."""

from __future__ import annotations

from .family import ModelFamily

BLOOM = ModelFamily(
    name="bloom",
    attention=("query_key_value", "self_attention.dense"),
    mlp=("dense_h_to_4h", "dense_4h_to_h"),
    blocks="transformer.h",
    norms=("word_embeddings_layernorm", "input_layernorm", "post_attention_layernorm", "ln_f"),
)
