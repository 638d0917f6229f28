"""The dense model inside an adapted one, switched on for the time of a forward pass."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import AuxiliaryTrainingWrapper
from torch import nn

from ..errors import ConfigError, TargetError
from .adapter_layer import AdaptiveSparseLinear

# What dense_teacher switches, per model, so that a step does not walk over thousands of modules. Whatever
# adds layers to a model, or takes them out, calls forget_layers.
_switched: weakref.WeakKeyDictionary[nn.Module, list[nn.Module]] = weakref.WeakKeyDictionary()


def forget_layers() -> None:
    """The modules of some model have changed: look for them again."""
    _switched.clear()


@contextmanager
def dense_teacher(model: nn.Module) -> Iterator[None]:
    """Within the block, and without gradients, `model` computes as it did before any adapter was added to it.

    Adapters, `modules_to_save` and trained tokens all step aside; no parameter is written to and no
    `requires_grad` changes. May be nested. Dropout is as the model has it: `model.eval()` gives a teacher
    without.

    Args:
        model: a PeftModel, a model with native adapters, or either inside DDP, FSDP or torch.compile.
    Raises:
        TargetError: there is no sparse layer in the model.
        ConfigError: the dense model is not there any more: layout="inplace", trained biases, or merged.
    """
    switched = _switched.get(model)
    if switched is None:
        switched = _switched[model] = _find_switched(model)
    if any(isinstance(module, BaseTunerLayer) and module.merged_adapters for module in switched):
        raise ConfigError(
            "dense_teacher: an adapter is merged, so the weights of the model are not the dense ones. Call "
            "unmerge_adapter() first."
        )
    before = [_is_off(module) for module in switched]
    try:
        for module in switched:
            _set_off(module, True)
        with torch.no_grad():
            yield
    finally:
        for module, off in zip(switched, before, strict=True):
            _set_off(module, off)


def _find_switched(model: nn.Module) -> list[nn.Module]:
    kinds = (BaseTunerLayer, AuxiliaryTrainingWrapper)
    found = [module for module in model.modules() if isinstance(module, kinds)]
    layers = [module for module in found if isinstance(module, AdaptiveSparseLinear)]
    if not layers:
        raise TargetError(
            "dense_teacher: the model has no sparse layers. Add an adapter first: "
            "get_peft_model(model, AdaptiveSparseConfig())."
        )
    for config in (config for layer in layers for config in layer.adaptive_sparse_config.values()):
        if config.layout == "inplace":
            raise ConfigError(
                "dense_teacher: layout='inplace' trains the weights of the model itself, so there is no "
                "dense model to learn from. Use layout='copy', or give another model as the teacher."
            )
        if config.bias != "none":
            raise ConfigError(
                f"dense_teacher: bias={config.bias!r} trains the biases of the dense model in place, so "
                "that it is not the dense model any more. Use bias='none', or give another model as the "
                "teacher."
            )
    return found


def _is_off(module: nn.Module) -> bool:
    if isinstance(module, AdaptiveSparseLinear):
        return module.adaptive_sparse_dense
    return module._disable_adapters


def _set_off(module: nn.Module, off: bool) -> None:
    if isinstance(module, AdaptiveSparseLinear):
        module.adaptive_sparse_dense = off
    else:
        module._disable_adapters = off
