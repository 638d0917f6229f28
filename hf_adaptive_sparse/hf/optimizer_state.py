"""What an optimizer remembers of a parameter is cut with it."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor
from torch.nn import Parameter
from torch.optim import Optimizer

from ..errors import ConfigError


def cut(tensor: Tensor, cuts: Mapping[int, Tensor]) -> Tensor:
    """A copy of `tensor` with the positions of `cuts` alone: dimension -> [kept] int64."""
    for dim, positions in cuts.items():
        tensor = tensor.index_select(dim, positions.to(tensor.device))
    return tensor


def check_state(
    optimizer: Optimizer, parameters: Mapping[str, Parameter], cuts: Mapping[str, Mapping[int, Tensor]]
) -> None:
    """Raise ConfigError unless the optimizer trains some of `parameters` and its state of those in `cuts` can be cut.

    It can where every tensor of it is a single number or has the shape of its parameter.
    """
    trained = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    if not any(id(parameter) in trained for parameter in parameters.values()):
        raise ConfigError(
            f"optimizer: this {type(optimizer).__name__} trains no parameter of the model. Pass the one that was "
            "made for it, or None."
        )
    for name in cuts:
        parameter = parameters[name]
        for key, value in optimizer.state.get(parameter, {}).items():
            if isinstance(value, Tensor) and value.dim() and value.shape != parameter.shape:
                raise ConfigError(
                    f"optimizer: {key} of {name} is {list(value.shape)} and the parameter {list(parameter.shape)}, so "
                    f"the {type(optimizer).__name__} cannot be cut with it. Pass None, and make a new optimizer."
                )


def slice_state(optimizer: Optimizer, parameter: Parameter, cuts: Mapping[int, Tensor]) -> None:
    """Cut every tensor of the parameter's state that has its shape; the parameter itself is not cut yet."""
    state = optimizer.state.get(parameter, {})
    for key, value in state.items():
        if isinstance(value, Tensor) and value.dim() and value.shape == parameter.shape:
            state[key] = cut(value, cuts)


def drop_parameters(optimizer: Optimizer, removed: list[Parameter]) -> None:
    """Take parameters out of the groups and the state of an optimizer."""
    gone = {id(parameter) for parameter in removed}
    for group in optimizer.param_groups:
        stays = [id(parameter) not in gone for parameter in group["params"]]
        for key in ("params", "param_names"):
            if key in group:
                group[key] = [each for each, here in zip(group[key], stays, strict=True) if here]
    for parameter in removed:
        optimizer.state.pop(parameter, None)
