"""Qwen 3, dense models: queries and keys are normalised per head."""

from __future__ import annotations

from .family import ModelFamily
from .structure import Structure

QWEN3 = ModelFamily(
    name="qwen3",
    attention=("q_proj", "k_proj", "v_proj", "o_proj"),
    mlp=("gate_proj", "up_proj", "down_proj"),
    blocks="model.layers",
    norms=("input_layernorm", "post_attention_layernorm", "q_norm", "k_norm", "norm"),
    structure=Structure(head_norms=("q_norm", "k_norm")),
)
