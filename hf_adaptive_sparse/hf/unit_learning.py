"""Loops that learn which units of a model stay: from losses alone, or with gates that are trained towards a shape."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import ConfigError, DataError, TrainingError
from ..methods.hard_concrete import HardConcreteConfig, HardConcreteGates
from ..methods.policy_gradient import PolicyGradientConfig, PolicyLearner
from ..units import Axis
from .calibration import check_tokens
from .data import WindowDataset
from .learning_progress import LearningProgress, restore_training, training_tensors
from .loss_gradients import Loss, causal_loss
from .unit_gates import fold_gates, gated
from .units import unit_numel
from .walk_state import windows_digest

# What a caller is shown after every step: the last entry of the history.
OnStep = Callable[[dict[str, float]], None]
_CLIP = 1.0  # norm of the gradient of the weights, as in the published code of Sheared LLaMA


@dataclass(frozen=True, eq=False)
class LearnedUnits:
    """What was learned about the units of a model.

    Attributes:
        keep: {axis name: bool [units]}, True = stays.
        gates: {axis name: [units] float}: keep-probabilities, or final gates with 0 for units that go.
        history: per step {"step", "loss", ...}: the mean loss per token, and what else the learner knows.
    """

    keep: dict[str, Tensor]
    gates: dict[str, Tensor]
    history: list[dict[str, float]]


def learn_by_policy(
    model: nn.Module,
    axes: Sequence[Axis],
    windows: WindowDataset | Tensor,
    keep_fraction: float,
    *,
    config: PolicyGradientConfig | None = None,
    scores: Mapping[str, Tensor] | None = None,
    batch_size: int = 8,
    seed: int = 0,
    loss: Loss = causal_loss,
    on_step: OnStep | None = None,
    progress: LearningProgress | None = None,
) -> LearnedUnits:
    """Bypass Back-propagation: units are drawn, the loss of the model under them is measured, nothing goes backwards.

    A unit costs the parameters that go with it. The model is not changed; dropout is off.

    Args:
        axes: whose units may go; of kinds that `unit_gates` can gate.
        windows: [windows, length] tokens, without padding; shuffled, and taken again when all were seen.
        keep_fraction: part of the parameters of all units that may stay, see `PolicyLearner`.
        scores: {axis name: [units]} to start from, such as Wanda-sp; default: all units alike.
        batch_size: windows in a forward pass; all masks of a step see the same.
        seed: of masks and batches.
        loss: for a model that is no causal language model.
        on_step: called after every step.
        progress: where the state is saved; a run that was killed goes on from it to the same numbers.
    Returns:
        masks, probabilities, and per step {"step", "loss", "undecided"}: the mean loss under the masks of the step, and
        the mean of 4 s (1 - s), which is 1 where all is open and 0 where all is decided.
    Raises:
        ConfigError, TargetError, DataError: settings, axes or windows that do not fit the model, each other, or
            those of the run that was killed.
        TrainingError: a loss is NaN or inf.
    """
    config = config or PolicyGradientConfig()
    costs = {axis.name: unit_numel(model, axis) for axis in axes}
    learner = PolicyLearner(axes, keep_fraction, config, costs=costs, scores=scores, seed=seed)
    gates: dict[str, Tensor] = {axis.name: torch.ones(axis.count) for axis in axes}
    history: list[dict[str, float]] = []
    batches = _batches(model, windows, batch_size, seed)
    settings = {"keep_fraction": keep_fraction, **_settings(config, axes, windows, batch_size, seed)}
    if progress is not None and (saved := progress.open(settings)) is not None:
        history = saved[1]["history"]
        learner.load_state_dict(_learner_state(*saved))
    with _in_mode(model, training=False), gated(model, axes, gates), torch.no_grad():
        for batch in islice(batches, learner.step, config.steps):
            losses = []
            for keep in learner.sample():
                gates.update({name: each.float().to(model.device) for name, each in keep.items()})
                total, count = loss(model, batch)
                losses.append(total.item() / count)
            learner.update(losses)
            s = torch.cat(list(learner.probabilities.values()))
            undecided = float((4.0 * s * (1.0 - s)).mean())
            history.append({"step": learner.step, "loss": sum(losses) / len(losses), "undecided": undecided})
            if on_step is not None:
                on_step(history[-1])
            if progress is not None and progress.is_due(learner.step, config.steps):
                _save(progress, learner.state_dict(), history)
    return LearnedUnits(learner.keep(), learner.probabilities, history)


def learn_to_shape(
    model: nn.Module,
    axes: Sequence[Axis],
    shape: Mapping[str, int],
    windows: WindowDataset | Tensor,
    *,
    config: HardConcreteConfig | None = None,
    batch_size: int = 8,
    seed: int = 0,
    fold: bool = True,
    loss: Loss = causal_loss,
    on_step: OnStep | None = None,
    progress: LearningProgress | None = None,
) -> LearnedUnits:
    """Sheared LLaMA's first stage: gates and weights are trained together until every axis has the count of the shape.

    The weights (those with requires_grad) are changed in place by AdamW without weight decay, unless
    `config.weight_lr` is 0; so train a copy if the dense model is needed. Gates descend and multipliers ascend by Adam.
    Departure: learning rates are constant.

    Args:
        axes: of the model; for a layer axis those of all its blocks.
        shape: units to keep in every axis of a kind, such as {"layer": 4, "kv_head": 2, "mlp_channel": 96}.
        windows: [windows, length] tokens, without padding; shuffled, and taken again when all were seen.
        batch_size: windows in a step.
        seed: of gates and batches.
        fold: whether the final gates are multiplied into the weights at the end, with 0 for units that go: the model
            then computes what it will when they are removed. False leaves that to the caller.
        loss: for a model that is no causal language model.
        on_step: called after every step.
        progress: where the state is saved; a run that was killed goes on from it to the same numbers.
    Returns:
        masks, final gates, and per step {"step", "loss", "penalty"} and {"sparsity/<kind>": expected fraction of closed
        gates}.
    Raises:
        ConfigError, TargetError, DataError: settings, axes or windows that do not fit the model, each other, or
            those of the run that was killed.
        TrainingError: the loss is NaN or inf.
    """
    config = config or HardConcreteConfig()
    learner = HardConcreteGates(axes, shape, seed=seed, device=model.device)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    weights = trained if config.weight_lr else []
    optimizers = [
        torch.optim.Adam(learner.log_alpha.values(), lr=config.gate_lr),
        torch.optim.Adam(learner.multipliers.values(), lr=config.multiplier_lr, maximize=True),
    ]
    if weights:
        optimizers.append(torch.optim.AdamW(weights, lr=config.weight_lr, weight_decay=0.0))
    gates = learner.sample()
    history: list[dict[str, float]] = []
    batches = _batches(model, windows, batch_size, seed)
    settings = {"shape": dict(shape), **_settings(config, axes, windows, batch_size, seed)}
    if progress is not None and (saved := progress.open(settings)) is not None:
        history = saved[1]["history"]
        learner.load_state_dict(_learner_state(*saved))
        restore_training(model, optimizers, saved[0])
    start = len(history)
    with _in_mode(model, training=bool(weights)), _frozen([] if weights else trained), gated(model, axes, gates):
        for step, batch in enumerate(islice(batches, start, config.steps), start=start):
            learner.clamp_()
            gates.update(learner.sample())
            with torch.enable_grad():
                total, count = loss(model, batch)
                mean, penalty = total / count, learner.penalty(config.ramp(step))
            if not bool(torch.isfinite(mean)):
                raise TrainingError(
                    f"step {step}: the loss is {mean.item()}. Lower weight_lr, or load the model in float32 or "
                    "bfloat16."
                )
            (mean + penalty).backward()
            if weights:
                torch.nn.utils.clip_grad_norm_(weights, _CLIP)
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad()
            sparsity = {f"sparsity/{kind}": each.mean().item() for kind, each in learner.sparsity().items()}
            history.append({"step": step + 1, "loss": mean.item(), "penalty": penalty.item(), **sparsity})
            if on_step is not None:
                on_step(history[-1])
            if progress is not None and progress.is_due(step + 1, config.steps):
                _save(progress, learner.state_dict(), history, training_tensors(model, optimizers))
    learner.clamp_()
    found = learner.final_gates()
    if fold:
        fold_gates(model, axes, found)
    return LearnedUnits(learner.keep(), found, history)


def _settings(
    config: HardConcreteConfig | PolicyGradientConfig,
    axes: Sequence[Axis],
    windows: WindowDataset | Tensor,
    batch_size: int,
    seed: int,
) -> dict[str, Any]:
    """What decides the numbers of a run, besides the weights of the model."""
    units = {axis.name: axis.count for axis in axes}
    drawn = {"windows": windows_digest(windows), "batch_size": batch_size, "seed": seed}
    return {**asdict(config), "units": units, **drawn}


def _save(
    progress: LearningProgress,
    state: Mapping[str, Any],
    history: list[dict[str, float]],
    tensors: Mapping[str, Tensor] | None = None,
) -> None:
    """The state of a learner: its tensors, also those in dicts, go to the tensors, the rest to the record."""
    found, record = dict(tensors or {}), {}
    for key, value in state.items():
        if isinstance(value, Tensor):
            found[f"learner.{key}"] = value
        elif isinstance(value, dict) and all(isinstance(each, Tensor) for each in value.values()):
            found |= {f"learner.{key}/{name}": each.clone() for name, each in value.items()}  # parts of one tensor
        else:
            record[key] = value
    progress.save(found, {"learner": record, "history": history})


def _learner_state(tensors: Mapping[str, Tensor], record: Mapping[str, Any]) -> dict[str, Any]:
    """What `_save` was given as `state`."""
    state: dict[str, Any] = dict(record["learner"])
    for name, tensor in tensors.items():
        kind, _, rest = name.partition(".")
        if kind == "learner":
            key, inside, name = rest.partition("/")
            if inside:
                state.setdefault(key, {})[name] = tensor
            else:
                state[key] = tensor
    return state


def _batches(model: nn.Module, windows: WindowDataset | Tensor, size: int, seed: int) -> Iterator[Tensor]:
    """[size, length] int64 on the device of the model, without end: every window once, in a new order each time."""
    tokens = windows.tokens if isinstance(windows, WindowDataset) else windows
    if size < 1:
        raise ConfigError(f"batch_size is at least 1, got {size}.")
    check_tokens(model, tokens)
    if len(tokens) < size:
        raise DataError(f"there are {len(tokens)} windows, fewer than batch_size={size}. Give more text, or lower it.")
    return _shuffled(tokens, size, seed, model.device)


def _shuffled(tokens: Tensor, size: int, seed: int, device: torch.device) -> Iterator[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    while True:
        order = torch.randperm(len(tokens), generator=generator)
        for rows in order[: len(order) - len(order) % size].split(size):
            yield tokens[rows].long().to(device)


@contextmanager
def _in_mode(model: nn.Module, training: bool) -> Iterator[None]:
    """All modules in one mode, and then each back to what it was."""
    before = {module: module.training for module in model.modules()}
    model.train(training)
    try:
        yield
    finally:
        for module, was in before.items():
            module.training = was


@contextmanager
def _frozen(parameters: Sequence[nn.Parameter]) -> Iterator[None]:
    """No gradients of these parameters are computed."""
    try:
        for parameter in parameters:
            parameter.requires_grad = False
        yield
    finally:
        for parameter in parameters:
            parameter.requires_grad = True
