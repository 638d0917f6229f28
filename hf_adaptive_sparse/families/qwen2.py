"""Qwen 2 and 2.5: as Llama, with biases on q, k and v."""

from __future__ import annotations

from .family import ModelFamily
from .structure import Structure

QWEN2 = ModelFamily(
    name="qwen2",
    attention=("q_proj", "k_proj", "v_proj", "o_proj"),
    mlp=("gate_proj", "up_proj", "down_proj"),
    blocks="model.layers",
    norms=("input_layernorm", "post_attention_layernorm", "norm"),
    structure=Structure(),
)
