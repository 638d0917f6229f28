"""Tiny random models for the tests of the walk over blocks, and slow, obvious versions of what it measures."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForMaskedLM, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from ..tiny_models import CONFIGS, tiny_model

_EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 16}
MOE_CONFIGS = {
    "mixtral": {**CONFIGS["llama"], **_EXPERTS, "num_local_experts": 4},
    "qwen3_moe": {**CONFIGS["llama"], **_EXPERTS, "num_experts": 4},
    # With a shared expert, which is an ordinary MLP, and its gate.
    "qwen2_moe": {**CONFIGS["llama"], **_EXPERTS, "num_experts": 4, "shared_expert_intermediate_size": 16},
    # Stored [experts, in, out], with biases.
    "gpt_oss": {
        **CONFIGS["llama"],
        **_EXPERTS,
        "num_local_experts": 4,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    },
}
_BERT = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
}
ALL = (*CONFIGS, *MOE_CONFIGS, "bert")


def any_model(model_type: str, seed: int = 0, **changes) -> PreTrainedModel:
    """A random model of two blocks, in eval mode."""
    if model_type in CONFIGS:
        return tiny_model(model_type, seed, **changes)
    torch.manual_seed(seed)
    if model_type == "bert":
        return AutoModelForMaskedLM.from_config(AutoConfig.for_model("bert", **_BERT, **changes)).eval()
    config = AutoConfig.for_model(model_type, **{**MOE_CONFIGS[model_type], **changes})
    model = AutoModelForCausalLM.from_config(config).eval()
    for name, parameter in model.named_parameters():
        if "experts" in name:  # left small or zero by some of them
            nn.init.normal_(parameter, std=0.1)
    return model


def linears(model: nn.Module) -> dict[str, nn.Module]:
    """Every nn.Linear and Conv1D of a model."""
    return {name: module for name, module in model.named_modules() if isinstance(module, (nn.Linear, Conv1D))}


@torch.no_grad()
def inputs_of(model: PreTrainedModel, windows: Tensor, rows: int = 2) -> dict[str, Tensor]:
    """What each linear layer reads over all windows: {name: [tokens, in] float64}."""
    found: dict[str, list[Tensor]] = {}

    def keep(name: str) -> Callable:
        return lambda module, args: found.setdefault(name, []).append(args[0].flatten(0, -2).double())

    handles = [module.register_forward_pre_hook(keep(name)) for name, module in linears(model).items()]
    for batch in windows.split(rows):
        model(input_ids=batch)
    for handle in handles:
        handle.remove()
    return {name: torch.cat(parts) for name, parts in found.items()}


@torch.no_grad()
def hidden_states(model: PreTrainedModel, blocks: list[nn.Module], windows: Tensor, rows: int = 2) -> Tensor:
    """What the last block returns when the model itself runs: [windows, length, features]."""
    found = []
    handle = blocks[-1].register_forward_hook(
        lambda _, args, out: found.append(out if torch.is_tensor(out) else out[0])
    )
    for batch in windows.split(rows):
        model(input_ids=batch)
    handle.remove()
    return torch.cat(found)
