"""Random models of every family with a declared structure; weights so large that every unit is seen in the logits."""

from __future__ import annotations

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from hf_adaptive_sparse.families import STRUCTURES
from hf_adaptive_sparse.units import Axis

from ..tiny_models import CONFIGS
from .walked_models import MOE_CONFIGS

# More heads and layers than elsewhere: two query heads for each of three KV heads, so that h // 2 and h % 3 differ.
WIDTHS = {
    "hidden_size": 24,
    "intermediate_size": 20,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 3,
    "head_dim": 4,
}
_OTHER = {
    "opt": {"hidden_size": 24, "ffn_dim": 20, "num_hidden_layers": 3, "num_attention_heads": 3},
    "gpt2": {"n_embd": 24, "n_inner": 20, "n_layer": 3, "n_head": 3},
}
FAMILIES_WITH_UNITS = tuple(STRUCTURES)


def unit_model(model_type: str, seed: int = 0, dtype: torch.dtype = torch.float32, **changes) -> PreTrainedModel:
    """A random model of three blocks, in eval mode; biases and norms are random too."""
    base = {**CONFIGS, **MOE_CONFIGS}[model_type]
    widths = {**_OTHER.get(model_type, WIDTHS)}
    if model_type == "qwen3_moe":  # its middle block has an ordinary MLP
        widths["mlp_only_layers"] = [1]
    if STRUCTURES[model_type].norm != "layer":
        # So large that it is seen. Norms over heads have the same, which cannot be right for both: there it is not.
        widths["rms_norm_eps"] = 1e-10 if STRUCTURES[model_type].head_norms else 0.01
    config = AutoConfig.for_model(model_type, **{**base, **widths, **changes})
    model = AutoModelForCausalLM.from_config(
        config, experts_implementation="eager"
    ).eval()  # the others know no float64
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3, generator=generator)
    return model.to(dtype)


def random_keep(axis: Axis, seed: int, least: int = 1) -> torch.Tensor:
    """A mask that removes at least one unit of an axis and keeps at least `least`."""
    generator = torch.Generator().manual_seed(seed)
    left = int(torch.randint(least, axis.count, (1,), generator=generator))
    keep = torch.zeros(axis.count, dtype=torch.bool)
    keep[torch.randperm(axis.count, generator=generator)[:left]] = True
    return keep
