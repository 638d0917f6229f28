"""Llama 1 to 3, and everything that loads as `LlamaForCausalLM`."""

from __future__ import annotations

from .family import ModelFamily
from .structure import Structure

LLAMA = ModelFamily(
    name="llama",
    attention=("q_proj", "k_proj", "v_proj", "o_proj"),
    mlp=("gate_proj", "up_proj", "down_proj"),
    blocks="model.layers",
    norms=("input_layernorm", "post_attention_layernorm", "norm"),
    structure=Structure(),
)
