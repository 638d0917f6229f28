"""Where a model keeps its linears, and how they hang together, by `config.model_type`."""

from __future__ import annotations

from .bloom import BLOOM
from .experts import MIXTRAL, QWEN3_MOE
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
from .structure import Structure

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

# Of the models from which units can be removed.
STRUCTURES: dict[str, Structure] = {
    **{name: family.structure for name, family in FAMILIES.items() if family.structure is not None},
    "mixtral": MIXTRAL,
    "qwen3_moe": QWEN3_MOE,
}


def stock_type(model_type: str) -> str:
    """The model type that is declared here: of "shrunk_llama", whose blocks have different widths, "llama"."""
    return model_type.removeprefix("shrunk_")


__all__ = ["FAMILIES", "STRUCTURES", "ModelFamily", "Structure", "stock_type"]
