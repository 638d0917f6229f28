"""Packed layers inside a transformers model: finding, replacing, reading and expanding them."""

from __future__ import annotations

import contextlib

import torch
from accelerate.hooks import add_hook_to_module
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.integrations.accelerate import load_offloaded_parameter
from transformers.pytorch_utils import Conv1D

from ..errors import ConfigError, FormatError, TargetError
from ..formats import two_four
from ..layers import PackedLinear

LINEAR_TYPES = (nn.Linear, Conv1D, PackedLinear)


def packed_modules(model: nn.Module) -> dict[str, PackedLinear]:
    """The packed layers of a model by name, each once."""
    return {name: module for name, module in model.named_modules() if isinstance(module, PackedLinear)}


def set_packed_backend(model: nn.Module, backend: str) -> int:
    """Keep the packed layers of a model "packed" (small) or "dense" (fast). Returns how many there are.

    Raises:
        TargetError: the model has none.
        ConfigError: there is no such backend, or a layer is offloaded.
        PatternError: a layer was written to since it was loaded, and is no longer 2:4.
    """
    modules = packed_modules(model)
    if not modules:
        raise TargetError(f"{type(model).__name__} has no packed layers; loading a packed folder makes them.")
    for name, module in modules.items():
        if backend != module.backend:
            _refuse_offloaded(name, module)
        module.set_backend(backend, name)
    return len(modules)


def replace_by_packed(model: PreTrainedModel, name: str, stored_shape: tuple[int, ...] | None) -> None:
    """Put an empty packed layer (on the meta device) where a linear layer is.

    Args:
        name: as in the checkpoint: with or without the prefix of the base model, as `from_pretrained` allows.
        stored_shape: of the values in the checkpoint, if known.
    Raises:
        FormatError: the model has no such linear layer, or one of another shape.
    """
    place, module = _find(model, name)
    if type(module) not in (nn.Linear, Conv1D):
        found = "has no such module" if module is None else f"has a {type(module).__name__} there"
        raise FormatError(
            f"config.json: lists {name} as packed, but {type(model).__name__} {found}. The file is damaged, "
            f"or of another model."
        )
    transposed = type(module) is Conv1D
    rows, columns = module.weight.shape[::-1] if transposed else module.weight.shape
    if stored_shape not in (None, (rows, columns // 2)):
        raise FormatError(
            f"{name}: the stored values are {list(stored_shape)}, {type(model).__name__} needs "
            f"{[rows, columns // 2]}. The files are of different models."
        )
    has_bias, dtype = module.bias is not None, module.weight.dtype
    packed = PackedLinear(columns, rows, has_bias, "meta", dtype, transposed=transposed)
    packed._is_hf_initialized = True  # or transformers would try to fill `weight` with random values
    model.set_submodule(place, packed.train(module.training))


def linear_weight(model: PreTrainedModel, name: str, module: nn.Module) -> Tensor:
    """The weight [out, in] of a linear layer; also of a Conv1D, a packed one, and one that is offloaded."""
    if isinstance(module, PackedLinear) and module.backend == "packed":
        values = resident(model, f"{name}.weight_values", module.weight_values)
        return two_four.unpack(values, resident(model, f"{name}.weight_meta", module.weight_meta))
    weight = resident(model, f"{name}.weight", module.weight).detach()
    return weight.t() if isinstance(module, Conv1D) else weight


def resident(model: PreTrainedModel, name: str, tensor: Tensor) -> Tensor:
    """The tensor of this name, fetched if it is offloaded to memory or disk."""
    return load_offloaded_parameter(model, name) if tensor.is_meta else tensor


def expand(model: PreTrainedModel) -> None:
    """Replace every packed layer by the ordinary one that computes the same: `nn.Linear`, or `Conv1D`."""
    for name, module in packed_modules(model).items():
        _refuse_offloaded(name, module)
        with torch.device("meta"):
            if module.transposed:
                dense = Conv1D(module.out_features, module.in_features)
            else:
                dense = nn.Linear(module.in_features, module.out_features)
        module.set_backend("dense")
        weight = module.weight.detach()
        dense.weight, dense.bias = nn.Parameter(weight.t() if module.transposed else weight), module.bias
        if hasattr(module, "_hf_hook"):  # of accelerate: brings the inputs to the device of the layer
            add_hook_to_module(dense, module._hf_hook)
        model.set_submodule(name, dense.train(module.training))


def _find(model: PreTrainedModel, name: str) -> tuple[str, nn.Module | None]:
    prefix = f"{model.base_model_prefix}."
    for candidate in (name, name.removeprefix(prefix), prefix + name):
        with contextlib.suppress(AttributeError):
            return candidate, model.get_submodule(candidate)
    return name, None


def _refuse_offloaded(name: str, module: PackedLinear) -> None:
    if any(tensor.is_meta for tensor in (*module.parameters(), *module.buffers())):
        raise ConfigError(
            f"{name}: is offloaded, so it stays packed and is expanded at every call. Load the model with a "
            f"device_map that keeps it in memory."
        )
