"""How sparse each matrix becomes: measures what the chosen allocator reads, and asks it."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Collection
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from ..allocation import (
    ALLOCATORS,
    error_curve_allocation,
    evolutionary_search,
    level_allocation,
    level_grid,
)
from ..errors import ConfigError
from ..methods.one_shot import MIXED, Goal, OneShotConfig, prune_group
from ..patterns import Unstructured
from ..saliency import NEEDS
from ..sensitivity import hutchinson_traces, outlier_ratio, output_error, tail_heaviness
from .blocks import Member
from .calibration import walk_blocks
from .data import WindowDataset
from .evaluation import evaluation_mode
from .loss_gradients import causal_loss, check_predictions, fisher_traces, frozen

# Where error curves are measured, around the target; and how far a matrix may be from it.
_CURVE_STEPS = (-0.15, -0.1, -0.05, 0.0, 0.05, 0.1, 0.15)
_FITNESS_WINDOWS = 16


@dataclass(frozen=True, kw_only=True)
class Chosen:
    """A goal for every matrix, and what it was derived from (empty for uniform)."""

    goals: dict[str, Goal]
    sensitivity: dict[str, float] = field(default_factory=dict)


def check_budget(members: dict[str, Member], config: OneShotConfig) -> None:
    """Raise ConfigError if no measurement whatever can lead to goals that add up to the target."""
    if config.pattern not in (MIXED, "unstructured"):
        return
    units = {name: _unit(name, config) for name in members}
    numel = {name: member.weight.numel() for name, member in members.items()}
    total = _sum_over_units(numel, units)
    if config.resolved.allocation in ALLOCATORS:
        _goals(_by_sensitivity(dict.fromkeys(total, 0.0), total, config), units, numel, config)
        return
    levels = {units[name]: points for name, points in _levels(units, total, config).items()}
    _by_curves({unit: [(sparsity, 0.0) for sparsity, _ in points] for unit, points in levels.items()}, total, config)


def check_loss(model: nn.Module, tokens: Tensor, config: OneShotConfig) -> None:
    """Raise ConfigError, DataError where the model's own loss is to be measured, and it has none on these windows."""
    reader, instead = "", ""
    allocations = sorted(set(ALLOCATORS) - {"ranked"})
    if "gradient" in config.needs:
        scores = sorted(name for name, needs in NEEDS.items() if "gradient" not in needs)
        reader, instead = f"saliency {config.resolved.saliency!r}", f"saliency={' or '.join(scores)}"
    elif config.pattern == MIXED:
        reader = f"pattern {MIXED!r}"
        instead = f"an n:m pattern, or pattern 'unstructured' with allocation={' or '.join(allocations)}"
    elif config.pattern == "unstructured" and config.resolved.allocation not in allocations:
        reader, instead = f"allocation {config.resolved.allocation!r}", f"allocation={' or '.join(allocations)}"
    if not reader:
        return
    if not model.can_generate():
        raise ConfigError(
            f"{type(model).__name__}: is no causal language model, and {reader} reads the loss of one. Use {instead}."
        )
    check_predictions(tokens)


def choose_goals(
    model: nn.Module,
    windows: WindowDataset | Tensor,
    members: dict[str, Member],
    config: OneShotConfig,
    *,
    batch_size: int,
    device: torch.device | str | None,
    offload: str,
    skip: Collection[str],
    seed: int,
) -> Chosen:
    """One goal per matrix, so that the zeros of all add up to the target.

    Raises:
        ConfigError: the budget cannot be met with this pattern.
    """
    parts = config.resolved
    if config.pattern not in (MIXED, "unstructured"):
        pattern = config.fixed_pattern
        return Chosen(goals={name: Goal(pattern, pattern.sparsity) for name in members})
    units = {name: _unit(name, config) for name in members}
    numel = {name: member.weight.numel() for name, member in members.items()}
    walk = {"batch_size": batch_size, "device": device, "offload": offload, "skip": skip}
    if parts.allocation in ALLOCATORS:
        sensitivity = _SENSITIVITY[parts.allocation](model, windows, members, config, walk, seed)
        per_unit = _mean_over_units(sensitivity, units, numel)
        found = _by_sensitivity(per_unit, _sum_over_units(numel, units), config)
        return Chosen(goals=_goals(found, units, numel, config), sensitivity=sensitivity)
    gradients = fisher_traces(model, windows, list(members), batch_size=batch_size, device=device)
    # An error in no special direction meets the gradient of one output, not of all of them.
    importance = {name: trace.output_gradient / members[name].shape[0] for name, trace in gradients.items()}
    total = _sum_over_units(numel, units)
    levels = _levels(units, total, config)
    curves, database = _measure_curves(model, windows, levels, config, walk, keep=parts.allocation == "evolutionary")
    weighted = _sum_curves(curves, importance, units)
    found = _by_curves(weighted, total, config)
    if parts.allocation == "evolutionary":
        unit_levels = {unit: [sparsity for sparsity, _ in points] for unit, points in weighted.items()}
        found = _search(model, windows, members, units, unit_levels, total, found, database, config, batch_size, seed)
    return Chosen(goals=_goals(found, units, numel, config), sensitivity=importance)


def _by_sensitivity(sensitivity: dict[str, float], total: dict[str, int], config: OneShotConfig) -> dict[str, float]:
    allocation = config.resolved.allocation
    options = {} if config.spread is None or allocation == "uniform" else {"spread": config.spread}
    return ALLOCATORS[allocation](sensitivity, total, config.target, **options)


def _by_curves(
    curves: dict[str, list[tuple[float, float]]], total: dict[str, int], config: OneShotConfig
) -> dict[str, float]:
    """One of the sparsities of the curves, where only these have stored weights or patterns; else any in between."""
    by_levels = config.pattern == MIXED or config.resolved.allocation == "evolutionary"
    return (level_allocation if by_levels else error_curve_allocation)(curves, total, config.target)


def _unit(name: str, config: OneShotConfig) -> str:
    if config.allocation_unit == "matrix":
        return name
    parts = name.split(".")
    number = next(place for place, part in enumerate(parts) if part.isdigit())
    return ".".join(parts[: number + 1])


def _sum_over_units(numel: dict[str, int], units: dict[str, str]) -> dict[str, int]:
    total: dict[str, int] = defaultdict(int)
    for name, count in numel.items():
        total[units[name]] += count
    return dict(total)


def _mean_over_units(sensitivity: dict[str, float], units: dict[str, str], numel: dict[str, int]) -> dict[str, float]:
    total = _sum_over_units(numel, units)
    mean: dict[str, float] = defaultdict(float)
    for name, value in sensitivity.items():
        mean[units[name]] += value * numel[name] / total[units[name]]
    return dict(mean)


def _goals(
    sparsity: dict[str, float], units: dict[str, str], numel: dict[str, int], config: OneShotConfig
) -> dict[str, Goal]:
    if config.pattern == MIXED:
        patterns = config.level_patterns()
        return {name: Goal(patterns[sparsity[unit]], sparsity[unit]) for name, unit in units.items()}
    pattern = Unstructured(config.resolved.scope)
    zeros = whole_zeros(sparsity, units, numel, config.target)
    return {name: Goal(pattern, zeros[name] / numel[name]) for name in units}


def whole_zeros(
    sparsity: dict[str, float], units: dict[str, str], numel: dict[str, int], target: float
) -> dict[str, int]:
    """Zeros of every matrix, as many in all as the units have; at least one weight of each matrix stays.

    Raises:
        ConfigError: every matrix would have to lose its last weight.
    """
    zeros: dict[str, int] = {}
    carried: dict[str, float] = defaultdict(float)
    for name, unit in units.items():
        # What rounding leaves over goes to the next matrix of the unit.
        exact = sparsity[unit] * numel[name] + carried[unit]
        zeros[name] = min(round(exact), numel[name] - 1)
        carried[unit] = exact - zeros[name]
    # A unit of several matrices may keep a single weight: what has no room in it goes to the others.
    left = {unit: round(rest) for unit, rest in carried.items()}
    rest = sum(left.values())
    for anywhere in (False, True):
        for name, unit in units.items():
            more = min(rest if anywhere else left[unit], numel[name] - 1 - zeros[name])
            zeros[name] += more
            left[unit] -= more
            rest -= more
    if rest:
        total, kept = sum(numel.values()), sum(numel.values()) - sum(zeros.values()) - rest
        raise ConfigError(
            f"a sparsity of {target} leaves {kept} of {total} weights, fewer than one for each of {len(numel)} "
            f"matrices. Ask for at most {(total - len(numel)) / total:.6g}."
        )
    return zeros


def _fisher(model, windows, members, config, walk, seed) -> dict[str, float]:
    options = {"batch_size": walk["batch_size"], "device": walk["device"]}
    if config.sensitivity == "fisher":
        traces = fisher_traces(model, windows, list(members), **options)
        return {name: trace.trace / members[name].weight.numel() for name, trace in traces.items()}
    return _hutchinson(model, windows, members, config, walk["device"], seed)


def _hutchinson(model, windows, members, config, device, seed) -> dict[str, float]:
    tokens = windows.tokens if isinstance(windows, WindowDataset) else windows
    parameters = {name: member.parameter for name, member in members.items()}
    shared = next((name for name, member in members.items() if member.parameter.ndim != 2), None)
    if shared is not None:
        raise ConfigError(
            f"{shared}: is one of several experts in a parameter, whose trace is not known by expert. Use "
            "sensitivity='fisher'."
        )
    cursor = iter(range(config.probes))

    def loss() -> Tensor:
        window = tokens[next(cursor) % len(tokens)][None].long().to(model.device)
        total, count = causal_loss(model, window)
        return total / count

    # The fused kernels of attention have no second derivative.
    with frozen(model, device), torch.enable_grad(), sdpa_kernel(SDPBackend.MATH):
        try:
            for parameter in parameters.values():
                parameter.requires_grad_(True)
            found = hutchinson_traces(loss, parameters, config.probes, torch.Generator().manual_seed(seed))
        finally:
            for parameter in parameters.values():
                parameter.requires_grad_(False)  # `frozen` gives it back to those that had it
    return {name: estimate.mean / members[name].weight.numel() for name, estimate in found.items()}


def _outliers(model, windows, members, config, walk, seed) -> dict[str, float]:
    found = {}
    for visit in walk_blocks(model, windows, needs={"squares"}, propagate="dense", **walk):
        for group in visit.groups:
            for member in group.members:
                found[member.name] = outlier_ratio(member.weight, group.stats)
    return found


def _tails(model, windows, members, config, walk, seed) -> dict[str, float]:
    return {name: tail_heaviness(member.weight, name) for name, member in members.items()}


def _nothing(model, windows, members, config, walk, seed) -> dict[str, float]:
    return dict.fromkeys(members, 1.0)


_SENSITIVITY: dict[str, Callable[..., dict[str, float]]] = {
    "uniform": _nothing,
    "ranked": _fisher,
    "owl": _outliers,
    "alpha": _tails,
}


def _levels(
    units: dict[str, str], total: dict[str, int], config: OneShotConfig
) -> dict[str, list[tuple[float, Goal]]]:
    """name -> the (sparsity of its unit, goal) pairs at which the matrix is measured."""
    if config.pattern == MIXED:
        patterns = config.level_patterns()
        return {name: [(sparsity, Goal(pattern, sparsity)) for sparsity, pattern in patterns.items()] for name in units}
    if config.resolved.allocation == "evolutionary":
        grid = level_grid(total, config.target)
    else:
        steps = [config.target + step for step in _CURVE_STEPS if 0.0 <= config.target + step < 1.0]
        grid = dict.fromkeys(total, steps)
    pattern = Unstructured(config.resolved.scope)
    return {name: [(sparsity, Goal(pattern, sparsity)) for sparsity in grid[unit]] for name, unit in units.items()}


def _measure_curves(model, windows, levels, config, walk, keep: bool):
    """Errors of every matrix at its levels, on dense inputs; with `keep` the weights as well, by sparsity."""
    cheap = OneShotConfig(method="sparsegpt", pattern="unstructured")
    curves: dict[str, list[tuple[float, float]]] = {}
    database: dict[str, dict[float, Tensor]] = {}
    for visit in walk_blocks(model, windows, needs={"gram"}, propagate="dense", damping=config.damping, **walk):
        for group in visit.groups:
            weights = [member.weight for member in group.members]
            names = [member.name for member in group.members]
            for number in range(len(levels[names[0]])):
                goals = [levels[name][number][1] for name in names]
                pruned = prune_group(weights, group.stats, goals, cheap)
                for name, weight, result in zip(names, weights, pruned, strict=True):
                    sparsity = levels[name][number][0]
                    error = output_error(weight, result.weight, group.stats, relative=False)
                    curves.setdefault(name, []).append((sparsity, error))
                    if keep:
                        database.setdefault(name, {})[sparsity] = result.weight.cpu()
    return curves, database


def _sum_curves(curves, importance, units) -> dict[str, list[tuple[float, float]]]:
    found: dict[str, list[tuple[float, float]]] = {}
    for name, points in curves.items():
        scaled = [(sparsity, importance[name] * error) for sparsity, error in points]
        before = found.get(units[name])
        if before is not None:
            scaled = [(sparsity, error + more) for (sparsity, error), (_, more) in zip(before, scaled, strict=True)]
        found[units[name]] = scaled
    return found


def _search(model, windows, members, units, levels, total, start, database, config, batch_size, seed):
    """EvoPress: fitness is the KL divergence of the assembled model to the dense one."""
    tokens = (windows.tokens if isinstance(windows, WindowDataset) else windows)[:_FITNESS_WINDOWS].long()
    dense = {name: member.weight.clone() for name, member in members.items()}

    def logits(rows: Tensor) -> Tensor:
        return F.log_softmax(model(input_ids=rows.to(model.device), use_cache=False).logits.float(), dim=-1)

    try:
        with evaluation_mode(model):
            teacher = torch.cat([logits(rows) for rows in tokens.split(batch_size)])

            def fitness(assignment: dict[str, float], effort: int) -> float:
                for name, member in members.items():
                    member.set_weight(database[name][assignment[units[name]]])
                rows = tokens[:effort]
                kl = sum(
                    F.kl_div(logits(part), true, log_target=True, reduction="sum").item()
                    for part, true in zip(rows.split(batch_size), teacher[:effort].split(batch_size), strict=True)
                )
                return kl / rows.numel()

            return evolutionary_search(
                levels, total, config.target, fitness, generator=torch.Generator().manual_seed(seed), start=start,
                generations=config.generations,
            ).sparsity  # fmt: skip
    finally:
        for name, member in members.items():
            member.set_weight(dense[name])
