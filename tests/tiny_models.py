"""Random models of every family, from a config: two blocks, and nothing is downloaded."""

from __future__ import annotations

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

VOCABULARY = 64
_LLAMA_LIKE = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_TOKENS = {name: _LLAMA_LIKE[name] for name in ("vocab_size", "pad_token_id", "bos_token_id", "eos_token_id")}
_BLOCKS = {"num_hidden_layers": 2, "num_attention_heads": 4, "hidden_size": 32}
CONFIGS = {
    **{name: _LLAMA_LIKE for name in ("llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text", "phi3")},
    "gemma3": {
        "text_config": _LLAMA_LIKE,
        "vision_config": {
            "hidden_size": 16,
            "intermediate_size": 32,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "image_size": 28,
            "patch_size": 14,
        },
    },
    # word_embed_proj_dim makes it the variant with project_in and project_out.
    "opt": {**_TOKENS, **_BLOCKS, "ffn_dim": 64, "word_embed_proj_dim": 16, "max_position_embeddings": 64},
    "gpt2": {**_TOKENS, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64},
    "gpt_neox": {**_TOKENS, **_BLOCKS, "intermediate_size": 64, "max_position_embeddings": 64},
    "falcon": {**_TOKENS, **_BLOCKS},
    "bloom": {**_TOKENS, "hidden_size": 32, "n_layer": 2, "n_head": 4},
}


def tiny_model(
    model_type: str = "llama", seed: int = 0, dtype: torch.dtype = torch.float32, **changes
) -> PreTrainedModel:
    """A random causal language model of a family, in eval mode; `changes` go into its config."""
    torch.manual_seed(seed)
    config = AutoConfig.for_model(model_type, **{**CONFIGS[model_type], **changes})
    # As from_pretrained casts: parameters alone, for rotary frequencies stay float32.
    return AutoModelForCausalLM.from_config(config, dtype=dtype).eval()


def tokens(batch: int = 2, length: int = 12, seed: int = 0) -> torch.Tensor:
    """Random token ids, [batch, length], none of them special."""
    return torch.randint(3, VOCABULARY, (batch, length), generator=torch.Generator().manual_seed(seed))
