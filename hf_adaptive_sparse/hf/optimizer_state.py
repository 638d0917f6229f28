"""What an optimizer remembers of a parameter is cut with it."""

from __future__ import annotations

from collections import OrderedDict, defaultdict
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.optim import Optimizer

from ..errors import ConfigError

# Rows and columns differ, and it is as large as optimizers want a weight before they store its state in fewer bits.
_TRIED_SHAPE = (64, 128)


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
        for key, value in uncut(parameter, optimizer.state.get(parameter, {})).items():
            raise ConfigError(
                f"optimizer: {key} of {name} is {list(value.shape)} and the parameter {list(parameter.shape)}, so "
                f"the {type(optimizer).__name__} cannot be cut with it. Pass None, and make a new optimizer; for a "
                "Trainer, set reset_moments=True in the ShrinkConfig."
            )


def uncut(parameter: Tensor, state: Mapping[str, Any]) -> dict[str, Tensor]:
    """What of the state of a parameter cannot be cut with it, by key."""
    return {
        key: value
        for key, value in state.items()
        if isinstance(value, Tensor) and value.dim() and value.shape != parameter.shape
    }


def tried_state(optimizer: Optimizer) -> dict[Tensor, dict[str, Any]]:
    """What the optimizer will remember: the state of a small weight in each of its groups after one step.

    The optimizer stays as it is. Empty where it takes no such step, for instance because it wants a closure.
    """
    devices = {parameter.device for group in optimizer.param_groups for parameter in group["params"][:1]}
    trial = object.__new__(type(optimizer))
    vars(trial).update(vars(optimizer))
    trial.state, trial.param_groups = defaultdict(dict), []
    trial._optimizer_step_pre_hooks, trial._optimizer_step_post_hooks = OrderedDict(), OrderedDict()
    for group in optimizer.param_groups:
        for parameter in group["params"][:1]:
            weight = Parameter(torch.zeros(_TRIED_SHAPE, dtype=parameter.dtype, device=parameter.device))
            weight.grad = torch.ones_like(weight)
            trial.param_groups.append({**group, "params": [weight]})
    # Some optimizers draw random numbers, and a run is to go on with those that it would have had.
    with torch.random.fork_rng([device for device in devices if device.type == "cuda"]):
        try:
            # By its class: a schedule of the learning rate hides the method of the object behind one that counts.
            type(optimizer).step(trial)
        except Exception:  # any optimizer may come, and what it cannot do here is no mistake of the caller
            return {}
    return {weight: state for weight, state in trial.state.items() if isinstance(weight, Tensor)}


def slice_state(optimizer: Optimizer, parameter: Parameter, cuts: Mapping[int, Tensor]) -> None:
    """Cut every tensor of the parameter's state that has its shape; the parameter itself is not cut yet."""
    state = optimizer.state.get(parameter, {})
    for key, value in state.items():
        if isinstance(value, Tensor) and value.dim() and value.shape == parameter.shape:
            state[key] = cut(value, cuts)


def forget_moments(optimizer: Optimizer) -> None:
    """The moments become 0; counters of steps go on, and with them the schedule of the learning rate.

    A state that cannot be cut goes whole, and the optimizer begins it again with its next step.
    """
    for parameter, state in optimizer.state.items():
        if uncut(parameter, state):
            state.clear()
        for key, value in state.items():
            if isinstance(value, Tensor) and value.dim():
                state[key] = value.new_zeros(value.shape)


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
