"""Policy-gradient mask learning: keep-probabilities of units learned from losses alone, without a backward pass.

Source: Gao et al., "Bypass Back-propagation: Optimization-based Structural Pruning for Large Language Models via
Policy Gradient", ACL 2025 (arXiv 2406.10576).

Departures: budgets are counted in cost, so that units of different size can share one; the final mask keeps at
least one unit of every axis, without which a block has no width; the baseline `batch`, see `policy_gradient`; and the
probabilities at the start come from standardised scores, see `initial_probabilities`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..errors import ConfigError, TrainingError
from ..units import Axis

BASELINES = ("moving", "batch")
_HALVINGS = 100  # more than float64 has bits: bisection ends at neighbouring numbers


@dataclass(frozen=True, kw_only=True)
class PolicyGradientConfig:
    """How many masks are tried, and how fast probabilities follow."""

    steps: int = field(default=15000, metadata={"help": "Steps; each tries `masks` masks on one batch."})
    masks: int = field(default=2, metadata={"help": "Masks that are tried in a step, each with a forward pass."})
    learning_rate: float = field(default=6e-3, metadata={"help": "At the start; falls to 0 as a cosine."})
    baseline: str = field(
        default="moving",
        metadata={"help": "What losses are compared with. moving: those of earlier steps. batch: those of this step."},
    )
    window: int = field(default=5, metadata={"help": "Earlier steps whose mean loss is the moving baseline."})
    shared_budget: bool = field(
        default=False, metadata={"help": "One budget over all kinds of units, instead of one for each kind."}
    )

    def __post_init__(self) -> None:
        for name, least in (("steps", 1), ("masks", 2), ("window", 1)):
            if getattr(self, name) < least:
                raise ConfigError(f"{name} is at least {least}, got {getattr(self, name)}.")
        if not 0.0 < self.learning_rate < math.inf:
            raise ConfigError(f"learning_rate is a finite number > 0, got {self.learning_rate}.")
        if self.baseline not in BASELINES:
            raise ConfigError(f"unknown baseline {self.baseline!r}; known: {', '.join(BASELINES)}.")

    def rate(self, step: int) -> float:
        """Learning rate of step `step` (0-based)."""
        return self.learning_rate * 0.5 * (1.0 + math.cos(math.pi * min(step, self.steps) / self.steps))


def policy_gradient(probabilities: Tensor, masks: Tensor, losses: Tensor, baseline: float) -> Tensor:
    """g = 1 / (K - 1) sum_k (L_k - d) (m_k - s) / sqrt(s (1 - s)).

    The score of a Bernoulli variable is (m - s) / (s (1 - s)); divided by the standard deviation alone, g estimates
    sqrt(s (1 - s)) dE[L]/ds, whose variance does not grow where s is close to 0 or 1. With d = the mean of these K
    losses this holds exactly; with a d that does not know these masks the expectation is K / (K - 1) times that.
    Where s is 0 or 1 all masks agree, and g is 0.

    Args:
        probabilities: s, [units] float64 in [0, 1].
        masks: m, [K, units] bool, drawn with probability s.
        losses: L, [K] float64.
        baseline: d.
    Returns:
        [units] float64.
    """
    spread = (probabilities * (1.0 - probabilities)).sqrt()
    centred = (losses - baseline)[:, None] * (masks.to(probabilities) - probabilities)
    g = centred.sum(0) / (len(masks) - 1)
    return torch.where(spread > 0.0, g / spread.clamp(min=torch.finfo(spread.dtype).tiny), 0.0)


def project(probabilities: Tensor, costs: Tensor, budget: float) -> Tensor:
    """The nearest s in [0, 1] with sum(cost * s) <= budget: clip(s - v * cost, 0, 1), with v >= 0 by bisection.

    With equal costs this is the paper's projection.

    Args:
        probabilities: [units] float64, any values.
        costs: [units] float64, > 0.
        budget: >= 0, in units of cost.
    Returns:
        [units] float64.
    """

    def at(v: float) -> Tensor:
        return (probabilities - v * costs).clamp(0.0, 1.0)

    if float((at(0.0) * costs).sum()) <= budget:
        return at(0.0)
    # At `high` all are 0: (s / cost) * cost may round to less than s, hence the margin.
    margin = 1.0 + 4.0 * torch.finfo(torch.float64).eps
    low, high = 0.0, max(0.0, float((probabilities / costs).max())) * margin
    for _ in range(_HALVINGS):
        middle = 0.5 * (low + high)
        if float((at(middle) * costs).sum()) <= budget:
            high = middle
        else:
            low = middle
    return at(high)


def initial_probabilities(scores: Tensor) -> Tensor:
    """sigmoid of standardised scores: probabilities before their projection.

    The paper maps Wanda-sp scores and leaves open how; scores of different axes have different scales, so each axis is
    standardised by itself.

    Args:
        scores: [units] of one axis, larger = keep.
    Returns:
        [units] float64 in (0, 1).
    """
    scores = scores.double()
    return torch.sigmoid((scores - scores.mean()) / scores.std(correction=0).clamp(min=torch.finfo(scores.dtype).tiny))


class PolicyLearner:
    """Keep-probabilities of the units of all axes, and what is learned about them from losses.

    `masks = learner.sample()`, measure the loss of the model under each, `learner.update(losses)`; after the last step
    `learner.keep()`.

    Args:
        axes: whose units may go.
        keep_fraction: rho in (0, 1]: part of the cost of all units that may stay; for each kind of axis, or over all
            with `config.shared_budget`.
        config: see there.
        costs: {axis name: [units] > 0}, such as the parameters of each unit; default: every unit 1.
        scores: {axis name: [units]} to start from, larger = keep; default: every probability keep_fraction.
        seed: of the random numbers.
    Attributes:
        step: how often `update` was called.
    Raises:
        ConfigError: the fraction does not pay for one unit of every axis, or scores or costs do not fit the axes.
    """

    def __init__(
        self,
        axes: Sequence[Axis],
        keep_fraction: float,
        config: PolicyGradientConfig,
        *,
        costs: Mapping[str, Tensor] | None = None,
        scores: Mapping[str, Tensor] | None = None,
        seed: int = 0,
    ) -> None:
        if not axes:
            raise ConfigError("there are no axes, so nothing can be pruned.")
        if not 0.0 < keep_fraction <= 1.0:
            raise ConfigError(f"keep_fraction is in (0, 1], got {keep_fraction}. To keep half write 0.5.")
        self.axes, self.keep_fraction, self.config = list(axes), keep_fraction, config
        self._counts = [axis.count for axis in self.axes]
        self._costs = torch.ones(sum(self._counts), dtype=torch.float64)
        if costs is not None:
            self._costs = torch.cat([_numbers(costs, axis, "costs") for axis in self.axes])
        for axis, each in zip(self.axes, self._costs.split(self._counts), strict=True):
            if not float(each.min()) > 0.0:
                raise ConfigError(f"{axis.name}: a unit costs {each.min().item()}; costs are positive numbers.")
        self._groups = self._budget_groups()
        start = torch.full((len(self._costs),), keep_fraction, dtype=torch.float64)
        if scores is not None:
            start = torch.cat([initial_probabilities(_numbers(scores, axis, "scores")) for axis in self.axes])
        self._probabilities = self._projected(start)
        self._generator = torch.Generator().manual_seed(seed)
        self._masks: Tensor | None = None
        self._earlier: list[float] = []
        self.step = 0

    @property
    def probabilities(self) -> dict[str, Tensor]:
        """{axis name: s [units] float64}."""
        return self._by_axis(self._probabilities.clone())

    def sample(self) -> list[dict[str, Tensor]]:
        """K masks, each {axis name: bool [units]}, True = kept; `update` is told their losses in this order."""
        shape = (self.config.masks, len(self._probabilities))
        uniform = torch.rand(shape, dtype=torch.float64, generator=self._generator)
        self._masks = uniform < self._probabilities
        return [self._by_axis(mask) for mask in self._masks]

    def update(self, losses: Sequence[float]) -> None:
        """s <- project(s - lr g), from the losses of the masks that `sample` gave last.

        The moving baseline is the mean loss of the last `window` steps before this one; in the first step, which has
        none, that of this step.

        Raises:
            ConfigError: no masks were drawn since the last update, or the losses are not as many as the masks.
            TrainingError: a loss is NaN or inf.
        """
        if self._masks is None or len(losses) != len(self._masks):
            drawn = 0 if self._masks is None else len(self._masks)
            raise ConfigError(f"update got {len(losses)} losses for {drawn} masks. Call sample() before each update.")
        for number, loss in enumerate(losses):
            if not math.isfinite(loss):
                raise TrainingError(
                    f"step {self.step}: the loss under mask {number} is {loss}. Load the model in float32 or bfloat16, "
                    "and check it."
                )
        mean = math.fsum(losses) / len(losses)
        is_own = self.config.baseline == "batch" or not self._earlier
        baseline = mean if is_own else math.fsum(self._earlier) / len(self._earlier)
        found = torch.tensor(losses, dtype=torch.float64)
        g = policy_gradient(self._probabilities, self._masks, found, baseline)
        self._probabilities = self._projected(self._probabilities - self.config.rate(self.step) * g)
        self._earlier = [*self._earlier, mean][-self.config.window :]
        self._masks = None
        self.step += 1

    def keep(self) -> dict[str, Tensor]:
        """{axis name: bool [units]}: the most probable units of all axes together, as many as the budget pays for.

        The best unit of every axis stays in any case. Of equal ones the first stay.
        """
        keep = torch.zeros(len(self._probabilities), dtype=torch.bool)
        best = torch.cat(
            [
                torch.arange(len(part)) == part.argmax()
                for part in self._probabilities.split(self._counts)
            ]
        )  # fmt: skip
        for units, budget in self._groups:
            left = budget - float(self._costs[units & best].sum())
            keep |= units & best
            rest = (units & ~best).nonzero().flatten()
            order = rest[self._probabilities[rest].sort(descending=True, stable=True).indices]
            for unit in order.tolist():
                cost = float(self._costs[unit])
                if cost <= left + 1e-9 * cost:  # so that a rounded budget does not lose a unit
                    keep[unit] = True
                    left -= cost
        return self._by_axis(keep)

    def state_dict(self) -> dict[str, Any]:
        """All that `load_state_dict` needs to go on with the same numbers. Take it between `update` and `sample`."""
        return {
            "probabilities": self.probabilities,
            "earlier": list(self._earlier),
            "step": self.step,
            "keep_fraction": self.keep_fraction,
            "generator": self._generator.get_state(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over the state of a learner of the same axes and budget.

        Raises:
            ConfigError: the state is that of other axes, or of another budget.
        """
        theirs = {name: len(each) for name, each in state["probabilities"].items()}
        ours = {axis.name: axis.count for axis in self.axes}
        if theirs != ours or state["keep_fraction"] != self.keep_fraction:
            raise ConfigError(
                f"the saved probabilities are of {len(theirs)} axes with {sum(theirs.values())} units at "
                f"keep_fraction={state['keep_fraction']}, these of {len(ours)} axes with {sum(ours.values())} units at "
                f"keep_fraction={self.keep_fraction}. Go on with the model and the budget that the run was started "
                "with."
            )
        self._probabilities = torch.cat([state["probabilities"][name] for name in ours])
        self._earlier, self.step = list(state["earlier"]), state["step"]
        self._generator.set_state(state["generator"])
        self._masks = None

    def _budget_groups(self) -> list[tuple[Tensor, float]]:
        """(which units share a budget [units] bool, the budget in cost)."""
        kinds = [axis.kind for axis in self.axes]
        groups = [set(kinds)] if self.config.shared_budget else [{kind} for kind in dict.fromkeys(kinds)]
        found = []
        for group in groups:
            units = torch.cat([torch.full((axis.count,), axis.kind in group) for axis in self.axes])
            total = float(self._costs[units].sum())
            parts = zip(self.axes, self._costs.split(self._counts), strict=True)
            least = sum(float(costs.max()) for axis, costs in parts if axis.kind in group)
            if self.keep_fraction * total < least * (1.0 - 1e-12):
                raise ConfigError(
                    f"keep_fraction={self.keep_fraction} of {', '.join(sorted(group))} does not pay for one unit of "
                    f"every axis. The smallest that does is {math.ceil(least / total * 1e4) / 1e4}."
                )
            found.append((units, self.keep_fraction * total))
        return found

    def _projected(self, probabilities: Tensor) -> Tensor:
        found = probabilities.clone()
        for units, budget in self._groups:
            costs = self._costs[units]
            # In units of the mean cost, so that the step of the bisection is one of probability.
            found[units] = project(probabilities[units], costs / costs.mean(), budget / float(costs.mean()))
        return found

    def _by_axis(self, values: Tensor) -> dict[str, Tensor]:
        return {axis.name: part for axis, part in zip(self.axes, values.split(self._counts), strict=True)}


def _numbers(values: Mapping[str, Tensor], axis: Axis, what: str) -> Tensor:
    """[units] float64 of one axis, finite."""
    if axis.name not in values:
        raise ConfigError(f"{axis.name}: has no entry in {what}.")
    found = values[axis.name].detach().cpu().double()
    if found.shape != (axis.count,) or not bool(found.isfinite().all()):
        raise ConfigError(
            f"{axis.name}: {what} are one finite number for each of its {axis.count} units, got {list(found.shape)} "
            f"with {int((~found.isfinite()).sum())} that are NaN or infinite."
        )
    return found
