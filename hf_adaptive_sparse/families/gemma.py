"""Gemma 1 to 3, text models, and the text half of Gemma 3 with images."""

from __future__ import annotations

from .family import ModelFamily
from .structure import Structure

_ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
_MLP = ("gate_proj", "up_proj", "down_proj")
_SANDWICH_NORMS = (
    "input_layernorm",
    "post_attention_layernorm",
    "pre_feedforward_layernorm",
    "post_feedforward_layernorm",
    "norm",
)

GEMMA = ModelFamily(
    name="gemma",
    attention=_ATTENTION,
    mlp=_MLP,
    blocks="model.layers",
    norms=("input_layernorm", "post_attention_layernorm", "norm"),
    structure=Structure(norm="rms_plus_one"),
)
GEMMA2 = ModelFamily(
    name="gemma2",
    attention=_ATTENTION,
    mlp=_MLP,
    blocks="model.layers",
    norms=_SANDWICH_NORMS,
    structure=Structure(norm="rms_plus_one"),
)
GEMMA3_TEXT = ModelFamily(
    name="gemma3_text",
    attention=_ATTENTION,
    mlp=_MLP,
    blocks="model.layers",
    norms=(*_SANDWICH_NORMS, "q_norm", "k_norm"),
)
# The tower that sees images has q, k and v of the same names.
GEMMA3 = ModelFamily(
    name="gemma3",
    attention=_ATTENTION,
    mlp=_MLP,
    blocks="model.language_model.layers",
    norms=(*_SANDWICH_NORMS, "q_norm", "k_norm"),
    scope="language_model",
)
