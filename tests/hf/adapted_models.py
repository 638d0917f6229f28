"""Tiny models with sparse adapters, and what tests do to them and look at."""

from __future__ import annotations

import torch
from peft import PeftModel, get_peft_model
from torch import nn
from transformers.pytorch_utils import Conv1D

from hf_adaptive_sparse.families import FAMILIES
from hf_adaptive_sparse.hf.adapter import AdaptiveSparseConfig, sparse_layers
from hf_adaptive_sparse.patterns import NMPattern
from tests.tiny_models import tiny_model, tokens

INPUT = tokens()


def adapted(model_type: str = "llama", model: nn.Module | None = None, **settings) -> PeftModel:
    """A random model of a family, or `model`, with an adapter of these settings; in eval mode."""
    model = tiny_model(model_type) if model is None else model
    return get_peft_model(model, AdaptiveSparseConfig(**settings)).eval()


@torch.no_grad()
def shake(model: nn.Module, seed: int = 0) -> nn.Module:
    """Move every trainable parameter and choose the masks anew, as training would."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        if parameter.requires_grad:
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.add_(noise.to(parameter.dtype), alpha=0.05)
    for layer in sparse_layers(model):
        if layer.config.mask_policy == "adaptive":
            layer.keep.copy_(NMPattern(2, 4).keep_mask(layer.weight.abs()))
    return model


def logits(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(INPUT).logits


def out_by_in(module: nn.Module) -> torch.Tensor:
    """The weight of a linear as [out, in], also of a Conv1D."""
    return module.weight.T if isinstance(module, Conv1D) else module.weight


def targets_of(model: nn.Module, family: str = "llama") -> list[nn.Module]:
    """The linears of the decoder blocks of a plain model."""
    return [module for name, module in model.named_modules() if FAMILIES[family].is_target(name)]


def pruned(model: nn.Module, family: str = "llama") -> nn.Module:
    """The model with all but the two largest of every four weights set to zero."""
    for module in targets_of(model, family):
        weight = out_by_in(module).data
        weight[~NMPattern(2, 4).keep_mask(weight.abs())] = 0.0
    return model


def is_two_four(weight: torch.Tensor) -> bool:
    """At most two of four neighbours along the inputs of [out, in] are not zero, and no zero is -0.0."""
    groups = weight.reshape(weight.shape[0], -1, 4)
    zeros = groups == 0
    return bool((zeros.sum(-1) >= 2).all()) and not bool((torch.signbit(groups) & zeros).any())
