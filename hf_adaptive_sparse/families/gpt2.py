"""GPT-2. Its linears are `Conv1D`: stored [in, out], made sparse along `in` like any other."""

from __future__ import annotations

from .family import ModelFamily

GPT2 = ModelFamily(
    name="gpt2",
    attention=("attn.c_attn", "attn.c_proj"),
    mlp=("mlp.c_fc", "mlp.c_proj"),
    blocks="transformer.h",
    norms=("ln_1", "ln_2", "ln_f"),
)
