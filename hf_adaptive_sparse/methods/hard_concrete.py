"""Hard-concrete gates under Lagrangian constraints: masks of units learned towards a given shape.

Source: Xia et al., "Sheared LLaMA", ICLR 2024 (arXiv 2310.06694), section 2.1, and its published code; the gates are
those of Louizos et al., "Learning Sparse Neural Networks through L0 Regularization", ICLR 2018, section 2.2.

Departures: no gates of the hidden width, which its RMSNorm would have to know; units are KV heads with all their query
heads, where the paper has models without shared KV heads only. The random numbers come from a generator of our own.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..errors import ConfigError
from ..units import Axis

TEMPERATURE = 2 / 3  # b
LOW, HIGH = -0.1, 1.1  # the sigmoid is stretched to this range before it is clipped
INITIAL = 5.0  # a at the start; the first clamp lowers it to ln 100
CLAMP = (math.log(0.01), math.log(100.0))
FOLD = 0.8  # slope of the soft value in the published code


@dataclass(frozen=True, kw_only=True)
class HardConcreteConfig:
    """How long gates are learned, and how fast."""

    steps: int = field(default=3200, metadata={"help": "Optimizer steps in which gates are learned."})
    ramp_fraction: float = field(
        default=0.2, metadata={"help": "Part of the run, from its start, in which the target grows to the shape."}
    )
    weight_lr: float = field(default=1e-4, metadata={"help": "Learning rate of the weights; 0 = they stay."})
    gate_lr: float = field(default=1.0, metadata={"help": "Learning rate of the gates."})
    multiplier_lr: float = field(default=1.0, metadata={"help": "Learning rate of the multipliers, which ascend."})

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise ConfigError(f"steps is a number of optimizer steps >= 1, got {self.steps}.")
        if not 0.0 <= self.ramp_fraction <= 1.0:
            raise ConfigError(
                f"ramp_fraction is a fraction of the run in [0, 1], got {self.ramp_fraction}. For half the run write "
                "0.5."
            )
        if not 0.0 <= self.weight_lr < math.inf:
            raise ConfigError(
                f"weight_lr is a finite number >= 0, got {self.weight_lr}. 0 leaves the weights as they are."
            )
        for name in ("gate_lr", "multiplier_lr"):
            if not 0.0 < getattr(self, name) < math.inf:
                raise ConfigError(f"{name} is a finite number > 0, got {getattr(self, name)}.")

    def ramp(self, step: int) -> float:
        """Which part of the target holds at optimizer step `step` (0-based): linear from 0 to 1."""
        length = self.ramp_fraction * self.steps
        return min(1.0, step / length) if length else 1.0


def hard_concrete(log_alpha: Tensor, uniform: Tensor) -> Tensor:
    """z = clip(1.2 s - 0.1, 0, 1), s = sigmoid((ln u - ln(1 - u) + a) / b), b = 2/3.

    Args:
        log_alpha: a, any shape, float32.
        uniform: u in (0, 1), of the same shape.
    """
    s = torch.sigmoid((uniform.log() - torch.log1p(-uniform) + log_alpha) / TEMPERATURE)
    return (s * (HIGH - LOW) + LOW).clamp(0.0, 1.0)


def open_probability(log_alpha: Tensor) -> Tensor:
    """P(z > 0) = sigmoid(a - b ln(0.1 / 1.1))."""
    return torch.sigmoid(log_alpha - TEMPERATURE * math.log(-LOW / HIGH))


def soft_value(log_alpha: Tensor) -> Tensor:
    """sigmoid(0.8 a / b): what the published code folds into the weights of a unit that stays."""
    return torch.sigmoid(FOLD * log_alpha / TEMPERATURE)


def lagrangian(sparsity: Tensor, target: Tensor, multipliers: Tensor) -> Tensor:
    """mean(l1 (e - t) + l2 (e - t)^2) over the axes of one kind.

    Args:
        sparsity, target: e and t, [axes]: expected and wanted fraction of closed gates.
        multipliers: [2]: l1, l2.
    Returns:
        a scalar, to be made small by the gates and large by the multipliers.
    """
    gap = sparsity - target
    return (multipliers[0] * gap + multipliers[1] * gap.square()).mean()


class HardConcreteGates:
    """Gates of the units of all axes, and the multipliers that drive each kind of axis to its count.

    Args:
        axes: whose units get gates.
        shape: units to keep in every axis of a kind: {"layer": 4, "kv_head": 2, "mlp_channel": 96}. A kind that is not
            in it gets no gates.
        seed: of the random numbers.
        device: of parameters and gates.
    Attributes:
        log_alpha: {axis name: [units] float32}, to be descended.
        multipliers: {kind: [2] float32}, to be ascended. Zero at the start.
    Raises:
        ConfigError: the shape is empty, names a kind that no axis has, or a count that an axis cannot have.
    """

    def __init__(
        self,
        axes: Sequence[Axis],
        shape: Mapping[str, int],
        *,
        seed: int = 0,
        device: torch.device | str = "cpu",
    ) -> None:
        check_shape(axes, shape)
        self.shape = dict(shape)
        self.axes = [axis for axis in axes if axis.kind in shape]
        self.log_alpha = {
            axis.name: torch.full((axis.count,), INITIAL, device=device, requires_grad=True) for axis in self.axes
        }
        self.multipliers = {kind: torch.zeros(2, device=device, requires_grad=True) for kind in shape}
        # Of the CPU, so that a run draws the same numbers on any device.
        self._generator = torch.Generator().manual_seed(seed)

    @torch.no_grad()
    def clamp_(self) -> None:
        """Bring every a back to [ln 0.01, ln 100], in place: before each forward pass, as the published code does."""
        for log_alpha in self.log_alpha.values():
            log_alpha.clamp_(*CLAMP)

    def sample(self) -> dict[str, Tensor]:
        """{axis name: z [units] float32} with new random numbers; gradients reach log_alpha."""
        found = {}
        for name, log_alpha in self.log_alpha.items():
            uniform = torch.rand(log_alpha.shape, generator=self._generator)
            # Never 0, whose logarithm is -inf; 1 is never drawn.
            uniform = uniform.clamp(min=torch.finfo(torch.float32).tiny).to(log_alpha.device)
            found[name] = hard_concrete(log_alpha, uniform)
        return found

    def sparsity(self) -> dict[str, Tensor]:
        """{kind: [axes] float32}: the expected fraction of closed gates in each axis."""
        return {
            kind: torch.stack(
                [1.0 - open_probability(self.log_alpha[axis.name]).mean() for axis in self.axes if axis.kind == kind]
            )
            for kind in self.shape
        }

    def penalty(self, ramp: float = 1.0) -> Tensor:
        """The sum over kinds of `lagrangian`, a scalar.

        Args:
            ramp: part of the target that holds now, see `HardConcreteConfig.ramp`.
        """
        total = next(iter(self.multipliers.values())).new_zeros(())
        for kind, sparsity in self.sparsity().items():
            counts = [axis.count for axis in self.axes if axis.kind == kind]
            target = [ramp * (1.0 - self.shape[kind] / count) for count in counts]
            total = total + lagrangian(sparsity, sparsity.new_tensor(target), self.multipliers[kind])
        return total

    @torch.no_grad()
    def keep(self) -> dict[str, Tensor]:
        """{axis name: bool [units]}: the units of each axis with the largest a, as many as the shape says."""
        found = {}
        for axis in self.axes:
            # Stable, so that of equal ones the first stay.
            order = self.log_alpha[axis.name].cpu().sort(descending=True, stable=True).indices
            found[axis.name] = torch.zeros(axis.count, dtype=torch.bool)
            found[axis.name][order[: self.shape[axis.kind]]] = True
        return found

    @torch.no_grad()
    def final_gates(self) -> dict[str, Tensor]:
        """{axis name: [units] float32}: the soft value of the units that stay, 0 for the others."""
        return {
            name: torch.where(keep.to(self.log_alpha[name].device), soft_value(self.log_alpha[name]), 0.0)
            for name, keep in self.keep().items()
        }

    def state_dict(self) -> dict[str, Any]:
        """All that `load_state_dict` needs to go on with the same numbers; tensors are copies."""
        return {
            "log_alpha": {name: each.detach().clone() for name, each in self.log_alpha.items()},
            "multipliers": {kind: each.detach().clone() for kind, each in self.multipliers.items()},
            "shape": dict(self.shape),
            "generator": self._generator.get_state(),
        }

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over the state of gates of the same axes and shape, in place.

        Raises:
            ConfigError: the state is that of other axes, or of another shape.
        """
        theirs = {name: len(each) for name, each in state["log_alpha"].items()}
        ours = {axis.name: axis.count for axis in self.axes}
        if theirs != ours or state["shape"] != self.shape:
            raise ConfigError(
                f"the saved gates are of {_summary(theirs)} towards {state['shape']}, these of {_summary(ours)} "
                f"towards {self.shape}. Go on with the model and the shape that the run was started with."
            )
        for name, each in self.log_alpha.items():
            each.copy_(state["log_alpha"][name])
        for kind, each in self.multipliers.items():
            each.copy_(state["multipliers"][kind])
        self._generator.set_state(state["generator"])


def check_shape(axes: Sequence[Axis], shape: Mapping[str, int]) -> None:
    """Raise ConfigError unless every axis of a kind that `shape` names can keep so many units."""
    kinds = sorted({axis.kind for axis in axes})
    if not shape:
        raise ConfigError(f"the shape is empty. Say how many units to keep of {', '.join(kinds)}.")
    for kind, count in shape.items():
        if kind not in kinds:
            raise ConfigError(f"the shape names {kind}, and the axes are of {', '.join(kinds)}.")
        for axis in axes:
            if axis.kind == kind and not 1 <= count <= axis.count:
                raise ConfigError(
                    f"{axis.name}: the shape keeps {count} units of kind {kind}, and there are {axis.count}. Keep 1 to "
                    f"{min(each.count for each in axes if each.kind == kind)}."
                )


def _summary(counts: Mapping[str, int]) -> str:
    return f"{len(counts)} axes with {sum(counts.values())} units"
