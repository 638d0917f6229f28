"""What a shrinking run does, and when: its config, and the plan of its stages."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace

from ...errors import ConfigError
from ...field_types import check_field_types
from ...unit_scores import UNIT_SCORES

AUTO = "auto"
ALLOCATORS = (AUTO, "adaptive", "uniform", "global_threshold", "saap")
SHARES = ("linear", "constant")
KINDS = ("kv_head", "mlp_channel")


@dataclass(frozen=True, kw_only=True)
class ShrinkConfig:
    """How heads and MLP channels are removed from a model, and when.

    Defaults are those of Adapt-Pruner, but for two. Adapt-Accel interleaves 5 to 20 stages with training, over the
    whole run; here all go before it. Of budgets of 0.4 M tokens, those before the last stage were worth nothing
    (benchmarks/shrinking.py): 10 stages ended 2 % behind where they took the first 30 % of the run, 6 % where they took
    all of it. And where training follows, all blocks end alike: on models of five and six blocks uniform widths ended
    up to 5 % ahead of adaptive ones, which are ahead only before training. The paper's plan is
    `allocation="adaptive", stages=10, prune_fraction=1.0`.
    """

    target: float = field(default=0.8, metadata={"help": "Part of the parameters that stays, embeddings counted."})
    stages: int = field(
        default=1,
        metadata={"help": "How often training is interrupted to prune; 1 = once, before it begins (paper: 5 to 20)."},
    )
    shares: str = field(
        default="linear",
        metadata={"help": "Of the training data, to each stage: linear (later ones get more), or constant."},
    )
    prune_fraction: float = field(
        default=0.3,
        metadata={"help": "Part of the run, from its start, that is shared out to several stages (paper: 1)."},
    )
    score: str = field(
        default="taylor", metadata={"help": f"Which units go first. One of {', '.join(sorted(UNIT_SCORES))}."}
    )
    allocation: str = field(
        default=AUTO,
        metadata={
            "help": f"How many units each block loses. One of {', '.join(ALLOCATORS)}; auto is as with --equal-widths "
            "where training follows, else adaptive (Adapt-Pruner): what was measured best for each."
        },
    )
    step: float = field(
        default=0.02,
        metadata={"help": "Part of the removable parameters that goes at a time; then all is measured anew."},
    )
    amplitude: float = field(
        default=1.0,
        metadata={"help": "How far a block's importance moves its sparsity, as a part of the mean (paper: 1)."},
    )
    min_units: int = field(default=1, metadata={"help": "Heads and channels that every block keeps."})
    multiple_of: int = field(
        default=1, metadata={"help": "MLP widths end as multiples of it. Hardware likes 64 or 128."}
    )
    equal_widths: bool = field(
        default=False,
        metadata={
            "help": "All blocks are pruned alike and end with the same widths, so that any program can load the "
            "result; --allocation has no say then."
        },
    )
    repair: bool = field(
        default=False,
        metadata={
            "help": "The layers that read removed units are solved anew, by least squares on the calibration text, for "
            "what they returned before; takes 4 bytes for the square of the input of each."
        },
    )
    bias_repair: bool = field(
        default=False,
        metadata={"help": "Removed units leave their mean as a bias (FLAP); needs --train-tokens 0."},
    )
    reset_moments: bool = field(
        default=False, metadata={"help": "Forget the optimizer's state at every stage, as the paper does."}
    )

    def __post_init__(self) -> None:
        check_field_types(self)
        if not 0.0 < self.target < 1.0:
            raise ConfigError(
                f"target is the part of the parameters that stays, in (0, 1), got {self.target}. For 80 % write 0.8."
            )
        if not 0.0 < self.step <= 1.0:
            raise ConfigError(f"step is a part of the removable parameters in (0, 1], got {self.step}.")
        if self.repair and self.bias_repair:
            raise ConfigError("repair and bias_repair make up for the same loss. Choose one of them.")
        if not 0.0 < self.prune_fraction <= 1.0:
            raise ConfigError(f"prune_fraction is a part of the run in (0, 1], got {self.prune_fraction}.")
        for name in ("stages", "min_units", "multiple_of"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} is at least 1, got {getattr(self, name)}.")
        if not 0.0 <= self.amplitude < math.inf:
            raise ConfigError(f"amplitude is a finite number >= 0, got {self.amplitude}. 0 prunes all blocks alike.")
        known = {"score": tuple(sorted(UNIT_SCORES)), "allocation": ALLOCATORS, "shares": SHARES}
        for name, names in known.items():
            if getattr(self, name) not in names:
                raise ConfigError(f"unknown {name} {getattr(self, name)!r}; known: {', '.join(names)}.")

    def settled(self, trains: bool) -> ShrinkConfig:
        """The same, with what the allocation "auto" stands for where training follows, or where it does not."""
        if self.allocation != AUTO:
            return self
        if trains or self.equal_widths:
            return replace(self, allocation="uniform", equal_widths=True)
        return replace(self, allocation="adaptive")

    @property
    def allocator(self) -> str:
        """Which allocator is asked, of a config that is settled."""
        return "uniform" if self.equal_widths else self.allocation


@dataclass(frozen=True)
class Stage:
    """One interruption of training.

    Attributes:
        step: optimizer steps that were done before it.
        parameters: that the model has after it, or just fewer.
    """

    step: int
    parameters: int


def plan_stages(steps: int, dense: int, target: int, config: ShrinkConfig) -> list[Stage]:
    """When training is interrupted, and to how many parameters the model is pruned then.

    Source: Adapt-Accel (arXiv 2502.03460): linear in parameters; stage s of N is followed by the part
    2 s / (N (N + 1)) of all steps, so the later ones, after which more has to be repaired, get more. Ours: the part is
    that of the first `prune_fraction` of the steps, and the rest of them follow the last stage.

    Args:
        steps: optimizer steps of the whole run.
        dense, target: parameters before the first stage and after the last.
    Raises:
        ConfigError: more stages than steps.
    """
    count = config.stages
    if steps < count:
        raise ConfigError(f"{count} stages need at least as many optimizer steps, got {steps}. Train on more tokens.")
    weights = list(range(1, count + 1)) if config.shares == "linear" else [1] * count
    stages: list[Stage] = []
    before = 0
    for number, weight in enumerate(weights, start=1):
        # Whole steps, rounded so that each stage has one at least.
        start = max(round(config.prune_fraction * steps * before / sum(weights)), stages[-1].step + 1 if stages else 0)
        stages.append(Stage(start, dense - (dense - target) * number // count))
        before += weight
    return stages
