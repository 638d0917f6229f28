"""Which linear layers of a model are 2:4 and can be packed, and why the others cannot."""

from __future__ import annotations

import difflib
from collections import Counter
from collections.abc import Collection, Iterable

from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from transformers import PreTrainedModel

from ..errors import ConfigError, PatternError, TargetError
from ..formats import two_four
from .packed_modules import LINEAR_TYPES, linear_weight


def packable_modules(
    model: PreTrainedModel, only: Iterable[str] | None = None, quantized: Collection[str] = ()
) -> tuple[dict[str, nn.Module], dict[str, str]]:
    """The linear layers that are exactly 2:4, and why the others are not packed.

    Args:
        only: names of the layers to pack; each of them must be packable.
        quantized: names of weights that have a grid: linear layers, and experts as `one_shot` names them.
    Returns:
        Layers to pack by name, and the reason by name of every other linear layer, and expert in `quantized`.
    Raises:
        TargetError: a name in `only` or `quantized` is no linear layer.
        PatternError: a layer in `only` cannot be packed.
    """
    linear = {name: module for name, module in model.named_modules() if isinstance(module, LINEAR_TYPES)}
    wanted = set(linear) if only is None else set(only)
    experts = _experts(model, quantized)
    for name in sorted({*wanted, *quantized} - set(linear) - experts):
        close = difflib.get_close_matches(name, linear, 3) or sorted(linear)[:3]
        raise TargetError(
            f"{name}: is not a linear layer of {type(model).__name__}; the closest are {', '.join(close)}."
        )
    uses = Counter(id(parameter) for _, parameter in model.named_parameters(remove_duplicate=False))
    tied = {*model.all_tied_weights_keys, *model.all_tied_weights_keys.values()}
    chosen, skipped = {}, {}
    for name, module in linear.items():
        if name not in wanted:
            reason = "is not asked for in `modules`"
        elif f"{name}.weight" in tied or uses[id(module._parameters.get("weight"))] > 1:
            reason = "shares its weight with another layer"
        else:
            reason = _reason(model, name, module)
        if reason is None:
            chosen[name] = module
        elif name in wanted and only is not None:
            raise PatternError(f"{name}: cannot be packed: it {reason}. Remove it from `modules`.")
        else:
            skipped[name] = reason
    return chosen, skipped | dict.fromkeys(sorted(experts), "is one of several experts in a parameter")


def _experts(model: nn.Module, names: Iterable[str]) -> set[str]:
    """Those of the names that are one weight of a stacked parameter, such as `experts.down_proj[0]`."""
    stacked = {name: len(parameter) for name, parameter in model.named_parameters() if parameter.dim() == 3}
    found = set()
    for name in names:
        parameter, _, number = name.removesuffix("]").partition("[")
        if number.isdecimal() and int(number) < stacked.get(parameter, 0):
            found.add(name)
    return found


def refuse_adapters(model: nn.Module, function: str) -> None:
    """Raise ConfigError unless `model` is a plain model of transformers, without adapters in it."""
    if isinstance(model, PeftModel) or any(isinstance(module, BaseTunerLayer) for module in model.modules()):
        raise ConfigError(
            f"{function}: this {type(model).__name__} has adapters in it. Call "
            f"merge_and_unload() on it first, and save what it returns."
        )
    if not isinstance(model, PreTrainedModel):
        raise ConfigError(f"{function}: saves models of transformers, got a {type(model).__name__}.")


def _reason(model: PreTrainedModel, name: str, module: nn.Module) -> str | None:
    if type(module) not in LINEAR_TYPES:
        return f"is a {type(module).__name__}, which may compute something else"
    weight = linear_weight(model, name, module)
    if weight.dtype not in two_four.VALUE_DTYPES:
        return f"has values of {str(weight.dtype).removeprefix('torch.')}"
    if weight.shape[1] % 8:
        return f"has {weight.shape[1]} input features, which is no multiple of 8"
    violation = two_four.first_violation(weight)
    return violation and "is not 2:4: row {}, group {} has {} non-zeros".format(*violation)
