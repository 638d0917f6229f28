"""OPT. Its `project_in` and `project_out` (350M only) belong to the embeddings and stay dense."""

from __future__ import annotations

from .family import ModelFamily
from .structure import Structure

OPT = ModelFamily(
    name="opt",
    attention=("q_proj", "k_proj", "v_proj", "out_proj"),
    mlp=("fc1", "fc2"),
    blocks="model.decoder.layers",
    norms=("self_attn_layer_norm", "final_layer_norm"),
    structure=Structure(
        heads_out="out_proj",
        mlp="",
        channels=("fc1",),
        channels_out="fc2",
        norm="layer",
        head_dim_field="",
        kv_heads_field="",
        channels_field="ffn_dim",
    ),
)
