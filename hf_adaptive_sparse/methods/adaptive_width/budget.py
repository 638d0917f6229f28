"""Widths under an exact budget of parameters: what an allocator is given, what it carries on, whole units.

A budget is a number of parameters to remove. Units of one axis all cost the same, and units of different axes add up,
so that any choice of widths has a price: the sum of units removed times their cost.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from ...errors import CalibrationError, ConfigError
from ...units import Axis


@dataclass(frozen=True)
class WidthState:
    """What is carried from one pruning step to the next, and saved in between: `dataclasses.asdict` is plain JSON.

    Attributes:
        units: axis name -> units at the start of the run; sparsities are fractions of them.
        sparsity: axis name -> cumulative sparsity as a real number. What rounding to whole units leaves over is the
            difference from the units that are gone, so that no step loses it.
    """

    units: dict[str, int]
    sparsity: dict[str, float]

    @classmethod
    def start(cls, axes: Sequence[Axis]) -> WidthState:
        """Of a model of which nothing was removed."""
        return cls({axis.name: axis.count for axis in axes}, {axis.name: 0.0 for axis in axes})


@dataclass(frozen=True, kw_only=True, eq=False)
class WidthProblem:
    """What every allocator reads. One that exists can be solved.

    Attributes:
        axes: as they are now.
        costs: axis name -> parameters of one unit (`unit_costs`).
        scores: axis name -> [units], any float dtype, larger = keep. Units of equal score go from the last on.
        remove: parameters to remove in this step.
        limit: parameters that this step may remove where one unit is larger than `remove`; default: `remove`. Between
            the steps of a run, what the last step may still remove: a step smaller than a head then does not starve
            heads, and the next one removes as much less.
        importance: axis name -> in [-1, 1], larger = prune less (`axis_importance`); the allocator `adaptive` reads it.
        amplitude: how far importance moves a sparsity, as a part of the mean sparsity of the step: A / D of
            Adapt-Pruner, 1 in all its experiments. With 1 the least important block loses twice the mean, the most
            important nothing.
        min_units: of each axis that stay.
        floors: axis name -> units that stay, where that is more.
    Raises:
        ConfigError: names that do not agree, axes that overlap, or a budget that cannot be met.
        CalibrationError: a score is NaN.
    """

    axes: Sequence[Axis]
    costs: Mapping[str, int]
    scores: Mapping[str, Tensor]
    remove: int
    limit: int | None = None
    importance: Mapping[str, float] = field(default_factory=dict)
    amplitude: float = 1.0
    min_units: int = 1
    floors: Mapping[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.min_units < 1:
            raise ConfigError(f"min_units is at least 1, got {self.min_units}: a block without a unit cannot run.")
        if self.amplitude < 0.0:
            raise ConfigError(f"amplitude of importance is at least 0, got {self.amplitude}. The paper has 1.")
        for axis in self.axes:
            for what, known in (("cost", self.costs), ("score", self.scores)):
                if axis.name not in known:
                    raise ConfigError(f"{axis.name}: has no {what}. Give one for every axis.")
            scores = self.scores[axis.name]
            if scores.shape != (axis.count,):
                raise ConfigError(f"{axis.name}: has {axis.count} units, got scores of shape {list(scores.shape)}.")
            if scores.isnan().any():
                raise CalibrationError(f"{axis.name}: the score of unit {int(scores.isnan().nonzero()[0])} is NaN.")
        most = sum(room * self.costs[axis.name] for axis, room in zip(self.axes, self.rooms, strict=True))
        if not 0 <= self.remove <= most:
            raise ConfigError(
                f"cannot remove {self.remove} parameters: the {_kinds(self.axes)} units of {len(self.axes)} axes that "
                f"may go hold {most}. Remove at most that many."
            )

    @property
    def rooms(self) -> list[int]:
        """Units that each axis can lose."""
        return [max(axis.count - max(self.min_units, self.floors.get(axis.name, 0)), 0) for axis in self.axes]

    @property
    def prices(self) -> list[int]:
        """Parameters of a unit of each axis."""
        return [self.costs[axis.name] for axis in self.axes]

    @property
    def most(self) -> int:
        """Parameters that this step may remove."""
        return max(self.remove, self.remove if self.limit is None else self.limit)


@dataclass(frozen=True, eq=False)
class Allocation:
    """Which units stay.

    Attributes:
        keep: axis name -> [units] bool, True = stays; on the device of the scores.
        removed: parameters that go.
        state: for the next step.
    """

    keep: dict[str, Tensor]
    removed: int
    state: WidthState


def unit_costs(axes: Sequence[Axis], shapes: Mapping[str, torch.Size]) -> dict[str, int]:
    """Parameters of one unit of every axis.

    Raises:
        ConfigError: two axes cut the same tensor along different dimensions, so that their costs do not add up.
    """
    cut: dict[str, tuple[int, str]] = {}
    for axis in axes:
        for span in axis.spans:
            dim, other = cut.setdefault(span.tensor, (span.dim, axis.name))
            if dim != span.dim and other != axis.name:
                raise ConfigError(
                    f"{axis.name}: cuts {span.tensor} along dimension {span.dim}, and {other} along {dim}, so that the "
                    "parameters of their units do not add up. Remove one kind of unit after the other."
                )
    return {axis.name: axis.cost(shapes) for axis in axes}


def min_reachable(
    axes: Sequence[Axis],
    costs: Mapping[str, int],
    total: int,
    min_units: int = 1,
    floors: Mapping[str, int] | None = None,
) -> int:
    """The fewest parameters that a model of `total` can be shrunk to, when `min_units` of every axis stay.

    Args:
        floors: axis name -> units that stay, where that is more.
    """
    floors = floors or {}
    return total - sum(
        max(axis.count - max(min_units, floors.get(axis.name, 0)), 0) * costs[axis.name] for axis in axes
    )


def parameters_to_remove(
    axes: Sequence[Axis],
    costs: Mapping[str, int],
    total: int,
    target: int,
    min_units: int = 1,
    floors: Mapping[str, int] | None = None,
) -> int:
    """How many of `total` parameters have to go to leave at most `target`; 0 where that is so already.

    Args:
        floors: axis name -> units that stay, where that is more than `min_units`.
    Raises:
        ConfigError: the target cannot be reached; the message names the smallest that can.
    """
    least = min_reachable(axes, costs, total, min_units, floors)
    if target < least:
        stay = sorted({max(min_units, (floors or {}).get(axis.name, 0)) for axis in axes})
        raise ConfigError(
            f"a target of {target} parameters cannot be reached: without any {_kinds(axes)} unit but "
            f"{' or '.join(map(str, stay))} per block the model still has {least} of its {total}. Ask for at least "
            f"{least} ({least / total:.4f} of them)."
        )
    return max(total - target, 0)


def allocation(problem: WidthProblem, removed: Sequence[int], state: WidthState) -> Allocation:
    """The units of the best scores stay; `removed` is how many of each axis go."""
    keep, parameters = {}, 0
    for axis, count in zip(problem.axes, removed, strict=True):
        order = problem.scores[axis.name].argsort(descending=True, stable=True)
        kept = torch.zeros(axis.count, dtype=torch.bool, device=order.device)
        kept[order[: axis.count - count]] = True
        keep[axis.name] = kept
        parameters += count * problem.costs[axis.name]
    return Allocation(keep, parameters, state)


def gone(axes: Sequence[Axis], state: WidthState) -> list[int]:
    """Units that each axis has lost since the start of the run."""
    for axis in axes:
        if axis.name not in state.units or axis.count > state.units[axis.name]:
            raise ConfigError(
                f"{axis.name}: has {axis.count} units, and the run began with {state.units.get(axis.name, 0)}. The "
                "state is of another model; start without it."
            )
    return [state.units[axis.name] - axis.count for axis in axes]


def with_sparsity(state: WidthState, axes: Sequence[Axis], sparsity: Sequence[float]) -> WidthState:
    """The state after a step."""
    return replace(state, sparsity={axis.name: value for axis, value in zip(axes, sparsity, strict=True)})


def whole_units(
    wanted: Sequence[float],
    rooms: Sequence[int],
    prices: Sequence[int],
    scores: Sequence[Tensor],
    remove: int,
    most: int,
) -> list[int]:
    """How many units of each axis go: close to what is wanted, and at least `remove` parameters in all.

    Units of one price are rounded together: each by itself, blocks of two heads would all lose one or all lose none.
    As many go as are wanted in all, from the axes that want it most; of those that want the same, from that whose next
    unit scores lowest. That may take up to `most`; then units are given back, and added, where the sum over axes of the
    squared error in parameters, price * (removed - wanted), falls most or grows least per parameter. With most = remove
    the surplus is below the smallest price as long as an axis of that price can lose a unit, or has lost one. In any
    case no removed unit could be given back.

    Args:
        wanted: units as real numbers; negative where an axis has lost more than its share in earlier steps.
        rooms: units that each axis can lose; together worth at least `remove`.
        prices: parameters of a unit.
        scores: [units] of every axis.
    """
    every = range(len(wanted))
    ascending = [each.double().sort().values.tolist() for each in scores]
    taken = [0] * len(wanted)
    for price in set(prices):
        _apportion([a for a in every if prices[a] == price], wanted, rooms, ascending, taken)
    removed = sum(taken[a] * prices[a] for a in every)
    slack = min(prices, default=1) - 1

    def give_back(above: int) -> None:
        """Units whose return leaves `remove`; then any, while more than `above` is removed."""
        nonlocal removed
        while removed > remove:
            held = [a for a in every if taken[a]]
            found = [a for a in held if prices[a] <= removed - remove] or (held if removed > above else [])
            if not found:
                return
            a = max(found, key=lambda a: prices[a] * (taken[a] - wanted[a] - 0.5))
            taken[a] -= 1
            removed -= prices[a]

    give_back(most + slack)
    while removed < remove:
        open_axes = [a for a in every if taken[a] < rooms[a]]
        fitting = [a for a in open_axes if prices[a] <= remove - removed]
        if fitting:
            a = min(fitting, key=lambda a: prices[a] * (taken[a] - wanted[a] + 0.5))
        else:
            a = min(open_axes, key=lambda a: (prices[a], taken[a] - wanted[a]))
        taken[a] += 1
        removed += prices[a]
    give_back(removed)
    return taken


def _apportion(
    group: Sequence[int],
    wanted: Sequence[float],
    rooms: Sequence[int],
    ascending: Sequence[Sequence[float]],
    taken: list[int],
) -> None:
    """Units of equal price: the nearest whole number of all that is wanted, each where the error falls most."""
    total = math.fsum(wanted[a] for a in group)
    count = min(max(math.floor(total + 0.5), 0), sum(rooms[a] for a in group))
    for a in group:
        taken[a] = min(max(math.floor(wanted[a]), 0), rooms[a])

    def first_to_go(a: int) -> tuple[float, float]:
        # Rounded, so that blocks that are treated alike want the same.
        return round(taken[a] - wanted[a], 9), ascending[a][taken[a]]

    missing = count - sum(taken[a] for a in group)
    for _ in range(missing):
        taken[min((a for a in group if taken[a] < rooms[a]), key=first_to_go)] += 1
    for _ in range(-missing):
        taken[max((a for a in group if taken[a]), key=lambda a: taken[a] - wanted[a])] -= 1


def _kinds(axes: Sequence[Axis]) -> str:
    return " and ".join(dict.fromkeys(axis.kind for axis in axes)) or "removable"
