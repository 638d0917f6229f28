"""The phase of a shrinking run in which a learner chooses the units, instead of scores and stages."""

from __future__ import annotations

from ..hf.learning_progress import LearningProgress
from ..hf.shrink import Shrinker
from ..hf.unit_learning import LearnedUnits, learn_by_policy, learn_to_shape
from ..hf.unit_statistics import unit_statistics
from ..hf.units import find_axes
from ..methods.adaptive_width import unit_costs
from ..methods.adaptive_width.config import KINDS
from ..unit_scores import NEEDS, UNIT_SCORES
from .console import Progress
from .retraining import CHECKPOINTS
from .shrink_run import ShrinkRun

_SAVED = 10  # states in a run


def progress_of(run: ShrinkRun, steps: int) -> LearningProgress:
    """Where the learner saves how far it is."""
    return LearningProgress(run.output / CHECKPOINTS / "learning.safetensors", every=max(1, steps // _SAVED))


def learn_units(run: ShrinkRun, shrinker: Shrinker) -> None:
    """A learner says which units stay; those that do not are removed. It goes on where it was killed."""
    shrinker.remove_learned((_by_gates(run) if run.shape is not None else _by_policy(run, shrinker)).keep)


def _by_gates(run: ShrinkRun) -> LearnedUnits:
    assert run.shape is not None
    assert run.gates is not None
    axes = find_axes(run.model, tuple(run.shape))
    with Progress("learning gates", run.gates.steps) as progress:
        return learn_to_shape(
            run.model, axes, run.shape, run.text.train, config=run.gates, batch_size=run.batch_size,
            seed=run.budget.seed, progress=progress_of(run, run.gates.steps),
            on_step=lambda entry: progress.update(
                int(entry["step"]), f"loss {entry['loss']:.3g}, penalty {entry['penalty']:.3g}"
            ),
        )  # fmt: skip


def _by_policy(run: ShrinkRun, shrinker: Shrinker) -> LearnedUnits:
    assert run.policy is not None
    axes, weights = find_axes(run.model, KINDS), dict(run.model.named_parameters())
    costs = unit_costs(axes, {name: weight.shape for name, weight in weights.items()})
    removable = sum(axis.count * costs[axis.name] for axis in axes)
    score = run.config.score
    stats = unit_statistics(run.model, run.calibration, axes, NEEDS[score], batch_size=run.calibration_batch)
    with Progress("learning which units stay", run.policy.steps) as progress:
        return learn_by_policy(
            run.model, axes, run.text.train, 1.0 - (shrinker.parameters - shrinker.target) / removable,
            config=run.policy, scores={axis.name: UNIT_SCORES[score](axis, weights, stats) for axis in axes},
            batch_size=run.batch_size, seed=run.budget.seed, progress=progress_of(run, run.policy.steps),
            on_step=lambda entry: progress.update(
                int(entry["step"]), f"loss {entry['loss']:.3g}, undecided {entry['undecided']:.1%}"
            ),
        )  # fmt: skip
