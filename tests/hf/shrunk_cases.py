"""Tiny random models from which units were removed, alike in all blocks or not, and what a loaded one is asked."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from hf_adaptive_sparse.hf.shrunk_registry import SHRUNK_CLASSES
from hf_adaptive_sparse.hf.surgery import remove_units
from hf_adaptive_sparse.hf.units import find_axes

from ..tiny_models import tokens
from .unit_models import unit_model

FAMILIES = tuple(SHRUNK_CLASSES)
# Their configs divide the hidden size by the heads, so stock classes build them with all heads or not at all.
WITHOUT_HEAD_DIM = ("opt", "gpt2")
UNITS = ("kv_head", "mlp_channel", "expert")


def shrunk_model(
    family: str, even: bool, kinds: Collection[str] = UNITS, dtype: torch.dtype = torch.float32, **changes: Any
) -> PreTrainedModel:
    """A model of three blocks; `even`: each lost as many units. Else block i lost i, but one head and two experts stay.

    Which ones are lost is random.
    """
    model = unit_model(family, dtype=dtype, **changes)
    generator = torch.Generator().manual_seed(1)
    keep = {}
    for axis in find_axes(model, kinds):
        lost = 1 if even else axis.block * (3 if axis.kind == "mlp_channel" else 1)
        left = max(axis.count - lost, 2 if axis.kind == "expert" else 1)
        keep[axis.name] = torch.randperm(axis.count, generator=generator) < left
    remove_units(model, keep)
    return model


def add_biases(model: PreTrainedModel, *names: str) -> PreTrainedModel:
    """Give linears of the first block random biases, as a repair of their outputs does."""
    generator = torch.Generator().manual_seed(2)
    for name in names:
        linear = model.model.layers[0].get_submodule(name)
        linear.bias = nn.Parameter(torch.randn(linear.out_features, generator=generator, dtype=linear.weight.dtype))
    return model


def load(folder: Path, **options: Any) -> PreTrainedModel:
    """In the dtype in which it was saved."""
    return AutoModelForCausalLM.from_pretrained(folder, experts_implementation="eager", **options).eval()


@torch.no_grad()
def logits_of(model: nn.Module, ids: Tensor | None = None, **options: Any) -> Tensor:
    """[batch, tokens, vocabulary]."""
    return model(tokens(length=9) if ids is None else ids, **options).logits


def generated(model: PreTrainedModel, **options: Any) -> Tensor:
    """Eight tokens after the prompt, greedy."""
    return model.generate(tokens(length=5), max_new_tokens=8, min_new_tokens=8, do_sample=False, **options)


def assert_generates(model: PreTrainedModel) -> None:
    """With a dynamic and a static cache the same as without any."""
    expected = generated(model, use_cache=False)
    assert torch.equal(generated(model), expected)
    assert torch.equal(generated(model, cache_implementation="static"), expected)
