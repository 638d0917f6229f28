"""Tiny random models whose linear layers are 2:4, and on a grid if asked for."""

from __future__ import annotations

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from hf_adaptive_sparse.formats.value_codes import StoredGrid
from hf_adaptive_sparse.patterns import NMPattern

from ..tiny_models import CONFIGS, tiny_model, tokens


def two_four_model(
    model_type: str = "llama", dtype: torch.dtype = torch.float32, seed: int = 0, **changes
) -> PreTrainedModel:
    """A random model, all its linear layers but the head pruned to 2:4 by magnitude."""
    if model_type in CONFIGS:
        model = tiny_model(model_type, seed, dtype, **changes)
    else:
        torch.manual_seed(seed)
        config = AutoConfig.for_model(model_type, **{**CONFIGS["llama"], **changes})
        model = AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
    for name, module in model.named_modules():
        if isinstance(module, (nn.Linear, Conv1D)) and name != "lm_head":
            prune(module)
    return model


def prune(module: nn.Linear | Conv1D) -> None:
    """Zero the two smallest of every four inputs of a layer."""
    transposed = isinstance(module, Conv1D)
    weight = module.weight.data.t() if transposed else module.weight.data
    weight = torch.where(NMPattern(2, 4).keep_mask(weight.abs()), weight, 0)
    module.weight.data = (weight.t() if transposed else weight).contiguous()


def quantize(
    model: PreTrainedModel, bits: int = 8, group: int | None = None, scale_dtype: torch.dtype = torch.float32
) -> dict[str, StoredGrid]:
    """Round all linear layers but the head to grids, in place; returns the grids by name."""
    linear = {name: module for name, module in model.named_modules() if isinstance(module, (nn.Linear, Conv1D))}
    return {name: round_to_grid(linear[name], bits, group, scale_dtype) for name in linear if name != "lm_head"}


def round_to_grid(
    module: nn.Linear | Conv1D, bits: int, group: int | None = None, scale_dtype: torch.dtype = torch.float32
) -> StoredGrid:
    """Round a layer, in place, to the grid that is returned."""
    transposed = isinstance(module, Conv1D)
    weight = module.weight.data.t() if transposed else module.weight.data
    groups = weight.float().unflatten(1, (-1, group or weight.shape[1]))
    scales = (groups.abs().amax(-1) / (2 ** (bits - 1) - 1)).clamp(min=1e-4).to(scale_dtype)
    codes = (groups / scales.float().unsqueeze(-1)).round().clamp(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
    rounded = (codes * scales.float().unsqueeze(-1)).flatten(1).to(weight.dtype)
    module.weight.data = (rounded.t() if transposed else rounded).contiguous()
    return StoredGrid(scales, bits)


@torch.no_grad()
def logits_of(model: nn.Module) -> torch.Tensor:
    return model(tokens()).logits
