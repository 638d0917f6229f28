"""Structural pruning of a transformers model: measure, score, allocate, remove, step by step."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ..errors import ConfigError, TargetError
from ..methods.adaptive_width import (
    WIDTH_ALLOCATORS,
    WidthProblem,
    WidthState,
    axis_importance,
    layer_importance,
    min_reachable,
    parameters_to_remove,
    round_widths,
    unit_costs,
)
from ..methods.adaptive_width.config import KINDS, ShrinkConfig
from ..unit_scores import NEEDS, UNIT_SCORES
from ..units import Axis
from .block_parts import block_parts, find_structure
from .data import WindowDataset
from .surgery import block_widths, remove_units
from .unit_repairs import add_biases, missing_biases, reader_biases, repair_readers
from .unit_statistics import unit_statistics
from .units import find_axes


@dataclass(frozen=True, kw_only=True)
class ShrinkStep:
    """One removal.

    Attributes:
        parameters: of the model afterwards.
        loss: mean loss of a token of the calibration text before it.
        importance: of every block, in [-1, 1]; empty where the allocator does not ask for it.
        widths: of every block afterwards.
    """

    parameters: int
    loss: float
    importance: list[float]
    widths: list[dict[str, int]]


@dataclass(kw_only=True)
class ShrinkReport:
    """What happened to a model.

    Attributes:
        dense_parameters, parameters: of the whole model, before and after.
        dense_widths, widths: of every block, by the names of Llama's config.
        kept: axis name -> units of the dense model that stay, ascending; the list of blocks is one of the axes.
        steps: in order.
        seconds: spent in them.
    """

    dense_parameters: int
    parameters: int
    dense_widths: list[dict[str, int]]
    widths: list[dict[str, int]]
    kept: dict[str, list[int]]
    steps: list[ShrinkStep] = field(default_factory=list)
    seconds: float = 0.0


class Shrinker:
    """Shrinks one model in as many steps as it is asked for, and carries on between them what rounding left over.

    Args:
        model: a causal language model of a family with a declared structure; it is changed in place.
        windows: [windows, length] calibration tokens.
        config: how; an allocation that is "auto" is that of pruning alone, unless the caller has settled it.
        batch_size: windows in a pass.
    Raises:
        TargetError: the structure of the model is not known.
    """

    def __init__(
        self, model: nn.Module, windows: WindowDataset | Tensor, config: ShrinkConfig, *, batch_size: int = 4
    ) -> None:
        self.model, self.windows, self.batch_size = model, windows, batch_size
        self.config = config.settled(trains=False)
        axes = self._axes()
        if not axes:
            raise TargetError(f"{type(model).__name__}: has neither heads nor channels that can go.")
        self.state = WidthState.start(axes)
        every = find_axes(model, (*KINDS, "layer"))
        self.kept = {axis.name: list(range(axis.count)) for axis in every}
        self._layers = every[-1].name
        self.shaped = False
        self.dense_parameters, self.dense_widths = self.parameters, block_widths(model)
        costs = unit_costs(axes, self._shapes())
        # What no step takes: an MLP as wide as one multiple would have to become as wide as none.
        multiples = self._multiples()
        self._floors = {
            axis.name: -(-max(config.min_units, number) // number) * number
            for axis in axes if (number := multiples.get(axis.kind))
        }  # fmt: skip
        self.target = round(config.target * self.dense_parameters)
        if self.config.equal_widths and self._least(axes, costs) <= self.target < self.dense_parameters:
            self._floors = self._equal_widths(axes, costs)
            self.target = self._least(axes, costs)
        self._step_parameters = max(1, round(config.step * sum(axis.count * costs[axis.name] for axis in axes)))
        # Left to the step that makes the widths multiples, which can move each of them by half of one.
        self._reserve = 0
        if not self.config.equal_widths:
            self._reserve = sum(multiples.get(axis.kind, 0) // 2 * costs[axis.name] for axis in axes)
        self.steps: list[ShrinkStep] = []
        self.seconds = 0.0

    @property
    def parameters(self) -> int:
        """Of the model as it is now, tied ones once."""
        return sum(parameter.numel() for parameter in self.model.parameters())

    @property
    def final_widths(self) -> dict[str, int] | None:
        """Axis name -> units at the end, where that is planned from the start: with equal widths."""
        return self._floors if self.config.equal_widths else None

    @property
    def replaced_layers(self) -> list[int]:
        """Of every layer that is left: the last of the dense layers that it stands for, those removed behind it too."""
        layers = self.kept[self._layers]
        return [*(layer - 1 for layer in layers[1:]), len(self.dense_widths) - 1]

    def check_target(self) -> None:
        """Raise ConfigError where the target of the config cannot be reached; the smallest that can is named."""
        axes = self._axes()
        costs = unit_costs(axes, self._shapes())
        number = self.config.multiple_of
        if narrow := [axis for axis in axes if axis.count < self._multiples().get(axis.kind, 0)]:
            raise ConfigError(
                f"{narrow[0].name}: is {narrow[0].count} wide, and multiple_of is {number}. Ask for multiples of at "
                "most the narrowest MLP, which can only become narrower."
            )
        asked = round(self.config.target * self.dense_parameters)
        if self.config.equal_widths and self.parameters == self.dense_parameters:
            self._check_equal(axes, costs, asked)
        added = self._added_biases(axes)
        parameters_to_remove(
            axes, costs, self.parameters + added, self.target, self.config.min_units, self._floors
        )

    def _check_equal(self, axes: list[Axis], costs: Mapping[str, int], asked: int) -> None:
        """Raise ConfigError where equal widths are not about as many parameters as were asked for."""
        narrowest: dict[str, int] = {}
        for axis in axes:
            narrowest[axis.kind] = min(axis.count, narrowest.get(axis.kind, axis.count))
        most = self.dense_parameters - sum((axis.count - narrowest[axis.kind]) * costs[axis.name] for axis in axes)
        if most < asked:
            raise ConfigError(
                f"equal widths: the blocks of this model differ, and with all as narrow as the narrowest it has {most} "
                f"of its {self.dense_parameters} parameters, fewer than the target of {asked}. Ask for at most "
                f"{math.floor(1e4 * most / self.dense_parameters) / 1e4:g} of them, or use allocation='uniform'."
            )
        if self.target >= self.dense_parameters:
            raise ConfigError(
                f"target {self.config.target}: the equal widths closest to it are those of the model, and nothing "
                "would go. Ask for less, or for widths by block with allocation='adaptive'."
            )

    def shrink_to(
        self,
        parameters: int,
        optimizer: Optimizer | None = None,
        on_step: Callable[[ShrinkStep], None] | None = None,
    ) -> None:
        """Remove units until at most so many parameters are left; nothing happens where that is so.

        The last step of the whole run also makes the widths multiples, where the config asks for it; then the model
        ends as close to the target as such widths come. Equal widths are known from the start, and `target` is theirs.

        Args:
            optimizer: that trains the model; its state is cut alike.
            on_step: called after every step.
        """
        started = time.perf_counter()
        finish = parameters <= self.target
        last = False
        while not last and (left := self._left(parameters)) > 0:
            last = left <= self._step_parameters + (self._reserve if finish else 0)
            if not self._remove(left if last else self._step_parameters, last and finish, optimizer):
                break
            if on_step is not None:
                on_step(self.steps[-1])
        # Steps that removed more than they were asked for may have left nothing for the last one, which rounds.
        if finish and not last and self._off_multiples() and self._remove(0, True, optimizer) and on_step is not None:
            on_step(self.steps[-1])
        self.seconds += time.perf_counter() - started

    def remove_learned(self, keep: Mapping[str, Tensor]) -> None:
        """Remove what a learner chose, once and instead of steps: the model then has the shape it was learned for.

        Args:
            keep: axis name -> [units] bool, of the dense model; layers too.
        """
        remove_units(self.model, {name: stays.cpu() for name, stays in keep.items()})
        for name, stays in keep.items():
            self.kept[name] = stays.nonzero().flatten().tolist()
        self.shaped = True

    def report(self) -> ShrinkReport:
        """So far."""
        return ShrinkReport(
            dense_parameters=self.dense_parameters,
            parameters=self.parameters,
            dense_widths=self.dense_widths,
            widths=block_widths(self.model),
            kept={name: list(units) for name, units in self.kept.items()},
            steps=list(self.steps),
            seconds=self.seconds,
        )

    def state_dict(self) -> dict[str, Any]:
        """Plain JSON: with it and the config, a run that was interrupted goes on as if it had not been."""
        return {
            "widths": asdict(self.state),
            "kept": self.kept,
            "shaped": self.shaped,
            "steps": [asdict(step) for step in self.steps],
            "seconds": self.seconds,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Make a dense model as small as the one whose state this is, without measuring anything.

        Only shapes become right (and the weights are those of the dense model): load the checkpoint afterwards.

        Raises:
            ConfigError: the state is of another model, or this one was pruned already.
        """
        kept = {name: [int(unit) for unit in units] for name, units in state["kept"].items()}
        if self.parameters != self.dense_parameters or kept.keys() != self.kept.keys():
            raise ConfigError("the state of a shrinking run fits only the dense model that the run began with.")
        keep = {}
        for name, units in kept.items():
            keep[name] = torch.zeros(len(self.kept[name]), dtype=torch.bool)
            keep[name][torch.tensor(units)] = True
        remove_units(self.model, keep)
        self.kept, self.state, self.shaped = kept, WidthState(**state["widths"]), state["shaped"]
        self.steps = [ShrinkStep(**step) for step in state["steps"]]
        self.seconds = state["seconds"]

    def _left(self, parameters: int) -> int:
        """Parameters to remove until so many are left; biases that will be added count."""
        return self.parameters + self._added_biases(self._axes()) - parameters

    def _least(self, axes: list[Axis], costs: Mapping[str, int]) -> int:
        """The fewest parameters that the model can end with."""
        total = self.parameters + self._added_biases(axes)
        return min_reachable(axes, costs, total, self.config.min_units, self._floors)

    def _added_biases(self, axes: list[Axis]) -> int:
        """Numbers in the biases that `bias_repair` adds to linears that read units of these axes, if some go."""
        if not self.config.bias_repair:
            return 0
        stays = {axis.name: max(self.config.min_units, self._floors.get(axis.name, 0)) for axis in axes}
        return missing_biases(self.model, [axis for axis in axes if axis.count > stays[axis.name]])

    def _off_multiples(self) -> bool:
        multiples = {} if self.config.equal_widths else self._multiples()
        return any(axis.count % multiples.get(axis.kind, 1) for axis in self._axes())

    def _equal_widths(self, axes: list[Axis], costs: Mapping[str, int]) -> dict[str, int]:
        """Axis name -> units of the end, all of one kind as wide: no step goes below them, and the last one ends there.

        As close to the target as such widths come, and no wider than the narrowest block is. Were they only made equal
        in the end, all would have to become as narrow as the narrowest is then.
        """
        problem = WidthProblem(
            axes=axes,
            costs=costs,
            scores={axis.name: torch.zeros(axis.count) for axis in axes},  # which units go is asked later
            remove=self._left(self.target),
            min_units=self.config.min_units,
        )
        chosen = WIDTH_ALLOCATORS["uniform"](problem, self.state)
        equal = round_widths(problem, chosen, self._multiples(), equal=True)
        return {name: int(keep.sum()) for name, keep in equal.keep.items()}

    # -- one step --------------------------------------------------------------------------------------------

    def _remove(self, parameters: int, finish: bool, optimizer: Optimizer | None) -> bool:
        axes, weights = self._axes(), dict(self.model.named_parameters())
        stats = unit_statistics(self.model, self.windows, axes, self._needs(), batch_size=self.batch_size)
        importance = layer_importance(stats.cosines) if stats.cosines is not None else None
        problem = WidthProblem(
            axes=axes,
            costs=unit_costs(axes, self._shapes()),
            scores={axis.name: UNIT_SCORES[self.config.score](axis, weights, stats) for axis in axes},
            remove=parameters,
            limit=max(parameters, self._left(self.target) - (0 if finish else self._reserve)),
            importance={} if importance is None else axis_importance(axes, importance),
            amplitude=self.config.amplitude,
            min_units=self.config.min_units,
            floors=self._floors,
        )
        chosen = WIDTH_ALLOCATORS[self.config.allocator](problem, self.state)
        if finish and self._multiples() and not self.config.equal_widths:
            chosen = round_widths(problem, chosen, self._multiples())
        self.state = chosen.state
        if all(keep.all() for keep in chosen.keep.values()):
            return False
        biases = reader_biases(axes, weights, stats, chosen.keep) if self.config.bias_repair else {}
        if self.config.repair:
            repair_readers(axes, weights, stats, chosen.keep)
        remove_units(self.model, {name: keep.cpu() for name, keep in chosen.keep.items()}, optimizer)
        add_biases(self.model, biases)
        for name, keep in chosen.keep.items():
            self.kept[name] = [unit for unit, stays in zip(self.kept[name], keep.tolist(), strict=True) if stays]
        self.steps.append(
            ShrinkStep(
                parameters=self.parameters,
                loss=stats.loss or 0.0,
                importance=[] if importance is None else importance.tolist(),
                widths=block_widths(self.model),
            )
        )
        return True

    def _axes(self) -> list[Axis]:
        return find_axes(self.model, KINDS)

    def _shapes(self) -> dict[str, torch.Size]:
        return {name: parameter.shape for name, parameter in self.model.named_parameters()}

    def _needs(self) -> set[str]:
        needs = set(NEEDS[self.config.score])
        if self.config.allocator == "adaptive":
            needs.add("cosines")
        if self.config.bias_repair:
            needs.add("inputs")
        if self.config.repair:
            needs.add("grams")
        return needs

    def _multiples(self) -> dict[str, int]:
        return {"mlp_channel": self.config.multiple_of} if self.config.multiple_of > 1 else {}


def shrink(
    model: nn.Module,
    windows: WindowDataset | Tensor,
    config: ShrinkConfig | None = None,
    *,
    batch_size: int = 4,
    on_step: Callable[[ShrinkStep], None] | None = None,
) -> ShrinkReport:
    """Remove heads and MLP channels from a model in place, in small steps and without training.

    Source: Adapt-Pruner (arXiv 2502.03460), section 3: importance and scores are measured anew for every step. To train
    in between, see `ShrinkTrainer`. Save the result with `export_shrunk`: where blocks differ, `save_pretrained` writes
    a config that cannot say so.

    Args:
        model: a causal language model of transformers, without adapters.
        windows: [windows, length] calibration tokens, all of which are read at every step.
        config: how; default `ShrinkConfig()`.
        batch_size: windows in a pass.
        on_step: called after every step.
    Raises:
        ConfigError, TargetError, CalibrationError, DataError: before the first unit is removed, if it can be known.
    """
    shrinker = Shrinker(model, windows, config or ShrinkConfig(), batch_size=batch_size)
    shrinker.check_target()
    shrinker.shrink_to(shrinker.target, on_step=on_step)
    return shrinker.report()


def kv_values(model: nn.Module) -> int:
    """Numbers that the KV cache holds for one token, over all blocks."""
    structure, stack = find_structure(model)
    parts = [block_parts(structure, stack, index) for index in range(len(stack.blocks))]
    return sum(2 * block.kv_heads * block.head_dim for block in parts)
