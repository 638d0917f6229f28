"""GPT-2. Its linears are `Conv1D`: stored [in, out], made sparse along `in` like any other."""

from __future__ import annotations

from .family import ModelFamily
from .structure import Structure

GPT2 = ModelFamily(
    name="gpt2",
    attention=("attn.c_attn", "attn.c_proj"),
    mlp=("mlp.c_fc", "mlp.c_proj"),
    blocks="transformer.h",
    norms=("ln_1", "ln_2", "ln_f"),
    structure=Structure(
        attention="attn",
        heads=("c_attn",),
        heads_out="c_proj",
        channels=("c_fc",),
        channels_out="c_proj",
        norm="layer",
        head_dim_field="",
        kv_heads_field="",
        channels_field="n_inner",
    ),
)
