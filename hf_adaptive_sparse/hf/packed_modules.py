"""Packed layers inside a transformers model: finding, replacing, reading and expanding them."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping

import torch
from accelerate.hooks import add_hook_to_module
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.integrations.accelerate import load_offloaded_parameter
from transformers.pytorch_utils import Conv1D

from ..backend_dispatch import undo_dispatch
from ..errors import ConfigError, FormatError, PatternError, TargetError
from ..formats import two_four, value_codes
from ..formats.two_four import dtype_name
from ..layers import PackedLinear
from .stored_values import StoredValues
from .tensor_files import StoredTensor

LINEAR_TYPES = (nn.Linear, Conv1D, PackedLinear)


def packed_modules(model: nn.Module) -> dict[str, PackedLinear]:
    """The packed layers of a model by name, each once."""
    return {name: module for name, module in model.named_modules() if isinstance(module, PackedLinear)}


def set_packed_backend(model: nn.Module, backend: str, *, kernel: str = "auto") -> int:
    """Keep the packed layers of a model "packed" (small) or "dense" (expanded once). Returns how many there are.

    Args:
        kernel: how packed layers are multiplied: "compiled", "torch", or "auto" (`quantizer.loading_options`).
    Raises:
        TargetError: the model has none.
        ConfigError: there is no such backend or kernel, or a layer is offloaded, or the kernel cannot run.
        PatternError: a layer was written to since it was loaded, and is no longer 2:4.
    """
    modules = packed_modules(model)
    if not modules:
        raise TargetError(f"{type(model).__name__} has no packed layers; loading a packed folder makes them.")
    for name, module in modules.items():
        undo_dispatch(module)
        if backend != module.backend:
            _refuse_offloaded(name, module)
        module.set_backend(backend, name, kernel=kernel)
    return len(modules)


def replace_by_packed(
    model: PreTrainedModel,
    name: str,
    stored: StoredValues,
    tensors: Mapping[str, StoredTensor],
    *,
    as_saved: bool,
) -> None:
    """Put an empty packed layer (on the meta device) where a linear layer is.

    Args:
        name: as in the checkpoint: with or without the prefix of the base model, as `from_pretrained` allows.
        stored: how its values are stored.
        tensors: of the checkpoint, as far as they are known.
        as_saved: in the dtype in which it was saved, and not in that of the model.
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
    values, scale = tensors.get(f"{name}.weight_values"), tensors.get(f"{name}.{value_codes.SUFFIX}")
    needed = (rows, columns * (stored.bits or 8) // 16)
    if values is not None and values.shape != needed:
        raise FormatError(
            f"{name}: the stored values are {list(values.shape)}, {type(model).__name__} needs "
            f"{list(needed)}. The files are of different models."
        )
    has_bias, dtype, empty = module.bias is not None, module.weight.dtype, None
    if stored.bits is not None:
        dtype = stored.dtype if as_saved else dtype
        groups = 1 if stored.group_size is None else columns // stored.group_size
        empty = torch.empty(rows, groups, dtype=torch.float32 if scale is None else scale.dtype, device="meta")
    packed = PackedLinear(
        columns, rows, has_bias, "meta", dtype, transposed=transposed,
        value_bits=stored.bits, scale=empty, value_dtype=stored.dtype,
    )  # fmt: skip
    packed._is_hf_initialized = True  # or transformers would try to fill `weight` with random values
    model.set_submodule(place, packed.train(module.training))


def linear_weight(model: PreTrainedModel, name: str, module: nn.Module) -> Tensor:
    """The weight [out, in] of a linear layer; also of a Conv1D, a packed one, and one that is offloaded."""
    if isinstance(module, PackedLinear) and module.backend == "packed":
        values = resident(model, f"{name}.weight_values", module.weight_values)
        if module.weight_scale is not None:
            scale = resident(model, f"{name}.{value_codes.SUFFIX}", module.weight_scale)
            values = value_codes.decode(values, scale, module.value_dtypes)
        return two_four.unpack(values, resident(model, f"{name}.weight_meta", module.weight_meta))
    weight = resident(model, f"{name}.weight", module.weight).detach()
    return weight.t() if isinstance(module, Conv1D) else weight


def loaded_grid(model: PreTrainedModel, name: str, module: nn.Module) -> value_codes.StoredGrid | None:
    """The grid of a quantised packed layer; None for every other layer.

    Raises:
        PatternError: the layer was cast since, so that its weight is not on the grid any more.
    """
    grid = module.grid if isinstance(module, PackedLinear) else None
    if grid is None:
        return None
    if len(module.value_dtypes) > 1:
        before, after = map(dtype_name, (module.value_dtypes[0], module.value_dtypes[-1]))
        raise PatternError(
            f"{name}: its codes stand for {before} values, and it was cast to {after}. Load the model in {before} to "
            f"keep them, or call model.dequantize() to save it without."
        )
    return grid._replace(scales=resident(model, f"{name}.{value_codes.SUFFIX}", grid.scales))


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
            f"{name}: is offloaded, so it stays packed. Load the model with a "
            f"device_map that keeps it in memory."
        )
