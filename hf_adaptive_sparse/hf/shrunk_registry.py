"""The classes of models whose blocks have different widths, made known to transformers and peft by this import."""

from __future__ import annotations

from peft.utils.constants import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from . import shrunk_models as models

# Family -> its config and its causal language model, both built per layer.
SHRUNK_CLASSES: dict[str, tuple[type[PreTrainedConfig], type[PreTrainedModel]]] = {
    "llama": (models.ShrunkLlamaConfig, models.ShrunkLlamaForCausalLM),
    "mistral": (models.ShrunkMistralConfig, models.ShrunkMistralForCausalLM),
    "qwen2": (models.ShrunkQwen2Config, models.ShrunkQwen2ForCausalLM),
    "qwen3": (models.ShrunkQwen3Config, models.ShrunkQwen3ForCausalLM),
    "gemma": (models.ShrunkGemmaConfig, models.ShrunkGemmaForCausalLM),
    "gemma2": (models.ShrunkGemma2Config, models.ShrunkGemma2ForCausalLM),
    "phi3": (models.ShrunkPhi3Config, models.ShrunkPhi3ForCausalLM),
    "mixtral": (models.ShrunkMixtralConfig, models.ShrunkMixtralForCausalLM),
    "qwen3_moe": (models.ShrunkQwen3MoeConfig, models.ShrunkQwen3MoeForCausalLM),
    "opt": (models.ShrunkOPTConfig, models.ShrunkOPTForCausalLM),
    "gpt2": (models.ShrunkGPT2Config, models.ShrunkGPT2LMHeadModel),
}


def register() -> None:
    """So that `from_pretrained` finds the classes, and LoRA the default targets of their families."""
    lora_targets = TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
    for family, (config_class, model_class) in SHRUNK_CLASSES.items():
        AutoConfig.register(config_class.model_type, config_class, exist_ok=True)
        AutoModelForCausalLM.register(config_class, model_class, exist_ok=True)
        if family in lora_targets:
            lora_targets[config_class.model_type] = lora_targets[family]


register()
