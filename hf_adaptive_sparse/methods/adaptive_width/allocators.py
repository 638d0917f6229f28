"""How many units each axis loses in a step: `allocate(problem, state) -> Allocation`."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from ...errors import CalibrationError, ConfigError
from ...units import Axis
from .budget import Allocation, WidthProblem, WidthState, allocation, gone, whole_units, with_sparsity

_BISECTIONS = 100


def layer_importance(cosines: Tensor) -> Tensor:
    """Adapt-Pruner's importance of a block: how much it turns the residual stream, centred, and scaled to [-1, 1].

    d = mean(c) - c; I = d / max |d|: the sum is 0, and one block has 1 or -1. All equal: all 0.

    Args:
        cosines: [blocks], mean over tokens of the cosine of what enters and what leaves a block.
    Returns:
        [blocks] float64, larger = prune less.
    Raises:
        CalibrationError: a cosine is NaN or inf.
    """
    cosines = cosines.detach().double()
    if not cosines.isfinite().all():
        raise CalibrationError(
            f"block {int((~cosines.isfinite()).nonzero()[0])}: the cosine of its input and output is NaN or inf. Load "
            "the model in float32 or bfloat16, and check its loss on this text."
        )
    return _centred(cosines.mean() - cosines)


def axis_importance(axes: Sequence[Axis], importance: Tensor) -> dict[str, float]:
    """That of its block for every axis: attention and MLP share it, as in the paper. Without a block 0.

    Args:
        importance: [blocks], of `layer_importance`.
    """
    return {axis.name: 0.0 if axis.block is None else float(importance[axis.block]) for axis in axes}


def adaptive_widths(problem: WidthProblem, state: WidthState) -> Allocation:
    """Adapt-Pruner: the sparsity of each block grows by D - A * I, over all steps of the run.

    Source: arXiv 2502.03460, S_l = S_base - A * I_l, as its code applies it step by step. Departures from the code:
    the mean is over parameters, not blocks, and a shift of all sparsities found by bisection keeps it where some are
    clipped; sparsities are of the widths at the start of the run, not of the stage, and what rounding leaves over is
    carried on, without which heads are hardly ever removed; the step lands on its budget.

    Args:
        problem: reads `importance`, one number for every axis.
    Raises:
        ConfigError: an axis has no importance, or the state is of another model.
    """
    for axis in problem.axes:
        if axis.name not in problem.importance or not math.isfinite(problem.importance[axis.name]):
            raise ConfigError(
                f"{axis.name}: its importance is {problem.importance.get(axis.name)}, and adaptive widths need a "
                "number for every axis. Measure the cosines of the blocks."
            )
    return _cumulative(problem, state, problem.importance)


def uniform_widths(problem: WidthProblem, state: WidthState) -> Allocation:
    """Every axis loses the same part of its units; widths differ by what rounding to the budget asks for."""
    return _cumulative(problem, state, {axis.name: 0.0 for axis in problem.axes})


def saap_widths(problem: WidthProblem, state: WidthState) -> Allocation:
    """SAAP's adaptive structure search: axes whose importance fluctuates most lose most.

    Source: arXiv 2412.15127 ranks structures by the fluctuation of their importance and prunes the unstable ones; its
    exact index was not to be had. Ours: the fluctuation of an axis is the standard deviation of its scores over their
    mean (many units far below the mean can go), importance is minus that, centred and scaled to [-1, 1] within each
    kind of unit, and sparsities follow from it as in `adaptive_widths`. The paper's scores are `fused`.
    """
    stability = {}
    for axis in problem.axes:
        scores = problem.scores[axis.name].double()
        stability[axis.name] = -float(scores.std(correction=0) / scores.mean().abs().clamp(min=1e-300))
    importance: dict[str, float] = {}
    for kind in dict.fromkeys(axis.kind for axis in problem.axes):
        names = [axis.name for axis in problem.axes if axis.kind == kind]
        values = _centred(torch.tensor([stability[name] for name in names], dtype=torch.float64))
        importance |= dict(zip(names, values.tolist(), strict=True))
    return _cumulative(problem, state, importance)


def global_threshold_widths(problem: WidthProblem, state: WidthState) -> Allocation:
    """FLAP: the lowest standardised scores of the whole model go, until their parameters are the budget.

    Source: An et al., AAAI 2024, eq. 7 and its global search: scores are standardised within each axis, heads and
    channels are ranked together, and each counts with its parameters. A unit that does not fit what is left of the
    budget is passed over, so that the end is met to one unit of the smallest cost that is left. Departure: where a unit
    has several inputs, standardised over units, not over inputs.

    `limit` has no effect, for no unit is owed from one step to the next.
    """
    lost = gone(problem.axes, state)
    ranked: list[tuple[float, int]] = []
    for number, (axis, room) in enumerate(zip(problem.axes, problem.rooms, strict=True)):
        scores = problem.scores[axis.name].double()
        standard = (scores - scores.mean()) / scores.std(correction=0).clamp(min=1e-300)
        ranked += [(score, number) for score in standard.sort().values[:room].tolist()]
    ranked.sort(key=lambda unit: unit[0])
    prices, gap = problem.prices, problem.remove
    taken, passed = [0] * len(prices), []
    for score, number in ranked:
        if prices[number] <= gap:
            taken[number] += 1
            gap -= prices[number]
        elif gap > 0:
            passed.append((prices[number], score, number))
    if gap > 0:
        _, _, number = min(passed)
        taken[number] += 1
        gap -= prices[number]
        for _, other in reversed(ranked):
            if taken[other] and prices[other] <= -gap:
                taken[other] -= 1
                gap += prices[other]
    sparsity = [
        (before + now) / state.units[axis.name] for axis, before, now in zip(problem.axes, lost, taken, strict=True)
    ]
    return allocation(problem, taken, with_sparsity(state, problem.axes, sparsity))


def _cumulative(problem: WidthProblem, state: WidthState, importance: Mapping[str, float]) -> Allocation:
    """S <- clip(S + D - A * I + shift), with the shift that meets the budget; then whole units."""
    axes, prices, lost = problem.axes, problem.prices, gone(problem.axes, state)
    if not problem.remove:
        return allocation(problem, [0] * len(axes), state)
    start = [state.units[axis.name] for axis in axes]
    weights = [price * count for price, count in zip(prices, start, strict=True)]
    step = problem.remove / sum(weights)
    raw = [state.sparsity[axis.name] + step * (1.0 - problem.amplitude * importance[axis.name]) for axis in axes]
    highest = [(before + room) / count for before, room, count in zip(lost, problem.rooms, start, strict=True)]
    budget = problem.remove + sum(price * before for price, before in zip(prices, lost, strict=True))

    def clipped(shift: float) -> list[float]:
        return [min(max(value + shift, 0.0), top) for value, top in zip(raw, highest, strict=True)]

    low, high = -max(raw) - 1.0, 1.0 - min(raw)
    for _ in range(_BISECTIONS):
        middle = (low + high) / 2
        if math.fsum(s * weight for s, weight in zip(clipped(middle), weights, strict=True)) < budget:
            low = middle
        else:
            high = middle
    sparsity = clipped(high)
    wanted = [s * count - before for s, count, before in zip(sparsity, start, lost, strict=True)]
    scores = [problem.scores[axis.name] for axis in axes]
    taken = whole_units(wanted, problem.rooms, prices, scores, problem.remove, problem.most)
    return allocation(problem, taken, with_sparsity(state, axes, sparsity))


def _centred(values: Tensor) -> Tensor:
    centred = values - values.mean()
    largest = centred.abs().max() if len(centred) else centred.sum()
    return centred / largest if largest > 1e-12 else torch.zeros_like(centred)
