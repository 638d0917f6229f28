"""Where a model keeps its linears: `config.model_type` -> `ModelFamily`."""

from __future__ import annotations

from .bloom import BLOOM
from .falcon import FALCON
from .family import ModelFamily
from .gemma import GEMMA, GEMMA2, GEMMA3, GEMMA3_TEXT
from .gpt2 import GPT2
from .gpt_neox import GPT_NEOX
from .llama import LLAMA
from .mistral import MISTRAL
from .opt import OPT
from .phi3 import PHI3
from .qwen2 import QWEN2
from .qwen3 import QWEN3

FAMILIES: dict[str, ModelFamily] = {
    family.name: family
    for family in (
        LLAMA,
        MISTRAL,
        QWEN2,
        QWEN3,
        GEMMA,
        GEMMA2,
        GEMMA3,
        GEMMA3_TEXT,
        PHI3,
        OPT,
        GPT2,
        GPT_NEOX,
        FALCON,
        BLOOM,
    )
}

__all__ = ["FAMILIES", "ModelFamily"]
