"""Which modules of a model become sparse, decided and checked before the first of them is touched."""

from __future__ import annotations

import difflib
from dataclasses import replace

import torch
from peft.tuners.tuners_utils import (
    BaseTunerLayer,
    _maybe_include_all_linear_layers,
    check_target_module_exists,
)
from peft.utils.integrations import gather_params_ctx
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ..errors import PatternError, TargetError
from ..families import FAMILIES, stock_type
from ..methods.slorb import check_blocks
from ..patterns import parse_pattern
from .adapter_config import AdaptiveSparseConfig
from .adapter_layer import AdaptiveSparseLinear, dense_weight, features

_FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
# Compute the same as nn.Linear, so that our forward may stand in for theirs.
_LINEAR_SUBCLASSES = ("FalconLinear",)


def resolve_targets(model: nn.Module, config: AdaptiveSparseConfig) -> dict[str, nn.Module]:
    """Fill in `config.target_modules` where it is None or "all-linear"; the modules that it names.

    Returns:
        {full name: linear}, in the order of the model. A linear that is sparse already is unwrapped.
    Raises:
        TargetError: no default for this model, or a name that no module has, or nothing is left.
    """
    names = _candidates(model)
    if config.target_modules is None:
        _take_family_default(model, names, config)
    elif isinstance(config.target_modules, str) and config.target_modules.lower() == "all-linear":
        _maybe_include_all_linear_layers(config, model)
        _drop_other_layers(config)
    matched = [name for name in names if check_target_module_exists(config, name)]
    _check_matches(model, names, matched, config)
    return {name: _unwrap(model.get_submodule(name)) for name in matched}


def _unwrap(module: nn.Module) -> nn.Module:
    return module.base_layer if isinstance(module, AdaptiveSparseLinear) else module


def _candidates(model: nn.Module) -> list[str]:
    names: list[str] = []
    wrapped: list[str] = []
    for name, module in model.named_modules():
        if name and not any(name.startswith(prefix) for prefix in wrapped):
            names.append(name)
        if isinstance(module, BaseTunerLayer):
            wrapped.append(f"{name}.")
    return names


def _take_family_default(model: nn.Module, names: list[str], config: AdaptiveSparseConfig) -> None:
    model_type = getattr(getattr(model, "config", None), "model_type", None)
    if stock_type(model_type or "") not in FAMILIES:
        raise TargetError(
            f"no default target modules for a model of type {model_type!r}; known: "
            f"{', '.join(sorted(FAMILIES))}. Name them with target_modules=[...], or write "
            "target_modules='all-linear'."
        )
    family = FAMILIES[stock_type(model_type)]
    if not family.scope:
        config.target_modules = set(family.targets)
        return
    config.target_modules = {name for name in names if family.is_target(name)}
    _drop_other_layers(config)


def _drop_other_layers(config: AdaptiveSparseConfig) -> None:
    # peft does not look at layers_to_transform for targets given by their full names.
    if config.layers_to_transform is None:
        return
    last_parts = [name.rpartition(".")[2] for name in config.target_modules]
    by_last_part = replace(config, target_modules=last_parts)
    config.target_modules = {name for name in config.target_modules if check_target_module_exists(by_last_part, name)}


def _check_matches(model: nn.Module, names: list[str], matched: list[str], config: AdaptiveSparseConfig) -> None:
    asked = config.target_modules
    if isinstance(asked, str):
        missing = [] if matched else [asked]
    else:
        missing = sorted(target for target in asked if not any(f".{name}".endswith(f".{target}") for name in names))
    if missing:
        linears = [name for name in names if _is_linear(_unwrap(model.get_submodule(name)))]
        close = dict.fromkeys(word for target in missing for word in _closest(target, linears))
        raise TargetError(
            "target_modules: no module of the model matches "
            f"{', '.join(repr(target) for target in missing)}. Closest names: {', '.join(close)}. Write "
            "the end of a module's name, a regular expression over full names, or 'all-linear'."
        )
    if not matched:
        raise TargetError(
            "target_modules: every module that it names is left out again by exclude_modules, "
            "modules_to_save or layers_to_transform. Leave at least one to make sparse."
        )


def _closest(target: str, names: list[str]) -> list[str]:
    known = sorted({name.rpartition(".")[2] for name in names})
    return difflib.get_close_matches(target.rpartition(".")[2], known, n=3, cutoff=0.4) or known[:5]


def _is_linear(module: nn.Module) -> bool:
    kind = type(module)
    return kind is nn.Linear or kind.__name__ in _LINEAR_SUBCLASSES or isinstance(module, Conv1D)


def check_target(module: nn.Module, name: str, config: AdaptiveSparseConfig, values: bool = True) -> None:
    """Whether a module can become sparse as the config asks.

    Args:
        name: of the module, for the message.
        values: whether to read the weight too, or its shape and dtype alone.
    Raises:
        TargetError: it is not a linear with a float weight in memory, or its weight has NaN or inf.
        PatternError: its shape, or with frozen masks its zeros, do not fit the pattern.
    """
    _check_kind(module, name, config)
    pattern, shape = parse_pattern(config.pattern), features(module)
    pattern.check_in_features(shape, name)
    if config.slorb_k is not None:
        check_blocks(shape[1], config.slorb_k, name)
    if values:
        with gather_params_ctx(module.weight):
            _check_values(dense_weight(module), name, config)


def _check_values(weight: Tensor, name: str, config: AdaptiveSparseConfig) -> None:
    finite = torch.isfinite(weight)
    if not finite.all():
        row, column = (~finite).nonzero()[0].tolist()
        raise TargetError(
            f"{name}: the weight has {int((~finite).sum())} values that are NaN or inf, the first at row "
            f"{row}, column {column}. The model is damaged; load it again, or from another source."
        )
    pattern = parse_pattern(config.pattern)
    violation = pattern.first_violation(weight) if config.mask_policy == "frozen" else None
    if violation is not None:
        row, group = violation
        raise PatternError(
            f"{name}: mask_policy='frozen' keeps the zeros that the model has, but row {row}, group "
            f"{group} is not {pattern.name}. Prune the model first, or use mask_policy='adaptive'."
        )


def _check_kind(module: nn.Module, name: str, config: AdaptiveSparseConfig) -> None:
    kind = f"{type(module).__module__}.{type(module).__qualname__}"
    if not _is_linear(module):
        raise TargetError(
            f"{name}: a {kind} cannot be made sparse, only torch.nn.Linear and transformers' Conv1D. Change "
            "`target_modules`, or add the module to `exclude_modules`."
        )
    if module.weight.is_meta:
        raise TargetError(
            f"{name}: the weight is on the meta device, and sparse training starts from its values. Load the "
            "model without offloading."
        )
    if module.weight.dtype not in _FLOATS:
        raise TargetError(
            f"{name}: the weight is {module.weight.dtype}, and sparse training starts from float weights. "
            "Load the model without quantization."
        )
    if config.layout == "inplace" and isinstance(module, Conv1D):
        raise TargetError(
            f"{name}: layout='inplace' trains the weight of the model itself, and a Conv1D stores it [in, "
            "out], across the groups. Use layout='copy'."
        )
