"""`hf-adaptive-sparse shrink`: remove heads and MLP channels, before or between steps of training."""

import copy
import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

import torch
from transformers import PreTrainedModel

from ..errors import ConfigError, DataError
from ..hf.shapes import parse_shape, units_of_shape
from ..hf.shrink import Shrinker
from ..hf.shrunk_forms import FORMS, choose_form
from ..hf.shrunk_source import read_source
from ..hf.surgery import remove_units
from ..hf.units import find_axes
from ..methods.adaptive_width.config import KINDS, ShrinkConfig, plan_stages
from ..methods.hard_concrete import HardConcreteConfig
from ..methods.policy_gradient import PolicyGradientConfig
from . import PROGRAM
from .arguments import TokenCount, borrowed
from .budget import BudgetArguments
from .console import print_plan
from .models import pick_device
from .opening import Opening, RunArguments, open_run
from .shrink_run import ShrinkRun
from .shrinking import RESULTS, SHRUNK, run_shrinking
from .text import run_text

LEARNERS = ("policy", "gates")
# What is read by one way of choosing units alone, or with a teacher alone.
_OF_STAGES = (
    "stages", "shares", "prune_fraction", "allocation", "step", "amplitude", "min_units", "multiple_of", "equal_widths",
    "repair", "bias_repair", "reset_moments",
)  # fmt: skip
_OF_SEVERAL_STAGES = ("shares", "prune_fraction", "reset_moments")
_OF_GATES = ("gate_steps", "gate_lr")
_OF_POLICY = ("policy_steps", "policy_lr")
_OF_DISTILLATION = ("kd_weight", "ce_weight", "temperature", "hidden_weight", "kind")
_OF_TRAINING = (
    "stages", "gradient_accumulation", "learning_rate", "schedule", "warmup_fraction", "weight_decay", "max_grad_norm",
    "save_steps", "gradient_checkpointing", *_OF_DISTILLATION,
)  # fmt: skip


@dataclass(kw_only=True)
class ShrinkArguments(RunArguments, BudgetArguments):
    """Remove the attention heads and MLP channels that matter least, and train what is left.

    All go before the training, or with --stages in between, or as a learner says (--shape, --learner). OUTPUT_DIR gets
    shrunk/ (an ordinary, smaller model), checkpoints/, report.json and report.html. With --train-tokens 0 the model is
    only pruned.
    """

    NOT_OF_THE_RUN: ClassVar[tuple[str, ...]] = (*RunArguments.NOT_OF_THE_RUN, "form", "remote_code")
    LEAST_TOKENS: ClassVar[int] = 0

    train_tokens: TokenCount = field(
        default=TokenCount("1.6M"), metadata={"help": "Tokens to train on: 0 (only prune), 410k, 1.6M, 2G."}
    )

    target: float = borrowed(ShrinkConfig, "target")
    stages: int = borrowed(ShrinkConfig, "stages")
    shares: str = borrowed(ShrinkConfig, "shares")
    prune_fraction: float = borrowed(ShrinkConfig, "prune_fraction")
    score: str = borrowed(ShrinkConfig, "score")
    allocation: str = borrowed(ShrinkConfig, "allocation")
    step: float = borrowed(ShrinkConfig, "step")
    amplitude: float = borrowed(ShrinkConfig, "amplitude")
    min_units: int = borrowed(ShrinkConfig, "min_units")
    multiple_of: int = borrowed(ShrinkConfig, "multiple_of")
    equal_widths: bool = borrowed(ShrinkConfig, "equal_widths")
    repair: bool = borrowed(ShrinkConfig, "repair")
    bias_repair: bool = borrowed(ShrinkConfig, "bias_repair")
    reset_moments: bool = borrowed(ShrinkConfig, "reset_moments")
    shape: str | None = field(
        default=None,
        metadata={
            "help": "layers=4,heads=6,ffn=512: instead of --target and stages, gates learn which of them stay (Sheared "
            "LLaMA); all blocks end alike. What is not named stays."
        },
    )
    gate_steps: int = field(default=800, metadata={"help": "With --shape: steps of training gates and weights."})
    gate_lr: float = field(default=0.1, metadata={"help": "With --shape: learning rate of the gates (paper: 1)."})
    learner: str | None = field(
        default=None,
        metadata={
            "help": "Instead of scores in stages, what chooses the units before all training: policy (--target; from "
            "the losses of masks that are drawn, without a backward pass), or gates (what --shape means)."
        },
    )
    policy_steps: int = field(
        default=2000, metadata={"help": "With --learner policy: steps, of two forward passes each (paper: 15000)."}
    )
    policy_lr: float = field(
        default=0.05, metadata={"help": "With --learner policy: learning rate of the probabilities (paper: 0.006)."}
    )
    distill: bool = field(
        default=True, metadata={"help": "Follow the dense model while training; it stays in memory."}
    )
    form: str = field(
        default="auto",
        metadata={
            "help": "How it is saved: stock (any program opens it; all blocks are as wide), per_layer (after `import "
            "hf_adaptive_sparse`), padded (stock, with zeros), or auto: stock if it can be."
        },
    )
    remote_code: bool = field(
        default=False, metadata={"help": "Put the code of a per_layer model beside it, for trust_remote_code."}
    )

    calibration_windows: int = field(
        default=32, metadata={"help": "Windows of the training text that importance is measured on."}
    )
    calibration_batch: int = field(default=4, metadata={"help": "Of them, computed at the same time."})

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("calibration_windows", "calibration_batch"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} is at least 1, got {getattr(self, name)}.")
        known = ("auto", *FORMS)
        if self.form not in known:
            raise ConfigError(f"unknown form {self.form!r}; known: {', '.join(known)}.")
        if self.compile:
            raise ConfigError("compile keeps the shapes that weights had at the start, and stages change them.")
        if self.bias_repair and self.train_tokens:
            raise ConfigError("bias_repair stands in for training. Use it with --train-tokens 0.")
        if self.form == "stock" and not self.shrink_config().equal_widths and self.shape is None:
            if self.learner == "policy":
                raise ConfigError("form 'stock' has blocks of the same width, and --learner policy learns others.")
            raise ConfigError("form 'stock' has blocks of the same width. Add --equal-widths, or give --shape.")
        if self.gate_steps < 1 or not 0.0 < self.gate_lr < float("inf"):
            raise ConfigError(
                f"gate_steps is at least 1 and gate_lr above 0, got {self.gate_steps} and {self.gate_lr}."
            )
        if self.shape is not None:
            parse_shape(self.shape)
        self._check_learner()
        self.shrink_config()  # building it checks it
        self.policy()

    def _check_learner(self) -> None:
        """Each choice of the units reads its own arguments; one that is not read was meant to do something."""
        if self.learner not in (None, *LEARNERS):
            raise ConfigError(f"unknown learner {self.learner!r}; known: {', '.join(LEARNERS)}.")
        if self.learner == "gates" and self.shape is None:
            raise ConfigError("learner gates needs a shape to learn. Add --shape, such as layers=4,heads=6,ffn=512.")
        if self.learner == "policy" and self.shape is not None:
            raise ConfigError("learner policy learns towards a number of parameters. Leave out --shape or --learner.")
        if self.shape is not None:
            self._refuse("with --shape", ("target", "score", *_OF_STAGES, *_OF_POLICY))
        elif self.learner == "policy":
            self._refuse("with --learner policy", (*_OF_STAGES, *_OF_GATES))
        else:
            self._refuse("without --shape", _OF_GATES)
            self._refuse("without --learner policy", _OF_POLICY)
            if (allocator := self.shrink_config().allocator) not in ("adaptive", "saap"):
                self._refuse(f"with {allocator} widths", ("amplitude",))
        if not self.train_tokens:
            self._refuse("with --train-tokens 0", _OF_TRAINING)
        if self.stages == 1:
            self._refuse("with one stage", _OF_SEVERAL_STAGES)
        if not self.distill:
            self._refuse("with --no-distill", _OF_DISTILLATION)
        elif self.train_tokens and not (self.kd_weight or self.hidden_weight):
            raise ConfigError("kd_weight and hidden_weight are 0: nothing follows the dense model. Use --no-distill.")

    def _refuse(self, why: str, names: tuple[str, ...]) -> None:
        """Raise ConfigError for the first of these that is not at its default."""
        defaults = {entry.name: entry.default for entry in dataclasses.fields(self)}
        for name in names:
            if getattr(self, name) != defaults[name]:
                raise ConfigError(f"--{name.replace('_', '-')} has no effect {why}. Leave out one of them.")

    def policy(self) -> PolicyGradientConfig | None:
        """Of the learner of this name; None without it. One budget over heads and channels, as for the allocators."""
        if self.learner != "policy":
            return None
        return PolicyGradientConfig(steps=self.policy_steps, learning_rate=self.policy_lr, shared_budget=True)

    def shrink_config(self) -> ShrinkConfig:
        names = [entry.name for entry in dataclasses.fields(ShrinkConfig)]
        config = ShrinkConfig(**{name: getattr(self, name) for name in names})
        learned = self.learner is not None or self.shape is not None  # then no allocator is asked
        return config.settled(trains=self.train_tokens > 0 and not learned)


ARGUMENTS = ShrinkArguments


def run(arguments: ShrinkArguments) -> int:
    """Prune and train, save, load back, measure and report."""
    opened = open_run(arguments, "shrink", RESULTS)
    opened = opened.with_text(run_text, max(arguments.windows, arguments.calibration_windows))
    skeleton, text = opened.skeleton(), opened.text
    arguments.check_text(len(text.train))
    if len(text.train) < arguments.calibration_windows:
        raise DataError(
            f"{arguments.data}: the text fills {len(text.train)} windows of {arguments.window} tokens, and importance "
            f"is measured on {arguments.calibration_windows}. Give more text, or lower --calibration-windows."
        )
    resumes = opened.resumes()
    print_plan(f"{PROGRAM} shrink", _plan(arguments, opened, skeleton, resumes), arguments.dry_run)
    if arguments.dry_run:
        return 0

    goal = arguments.shape or f"{100 * arguments.target:g} %"
    shrinking = ShrinkRun(
        **opened.shared(f"{Path(opened.source.name).name}, shrunk to {goal}"),
        model=opened.load(), save=(), config=arguments.shrink_config(), budget=arguments,
        calibration=text.train.select(slice(0, arguments.calibration_windows)),
        calibration_batch=arguments.calibration_batch, distill=arguments.distill,
        form=arguments.form, remote_code=arguments.remote_code, parent=opened.source.name,
        shape=None if arguments.shape is None else units_of_shape(skeleton, parse_shape(arguments.shape)),
        gates=HardConcreteConfig(steps=arguments.gate_steps, gate_lr=arguments.gate_lr),
        policy=arguments.policy(),
    )  # fmt: skip
    opened.begin(resumes)
    return opened.finish(run_shrinking(shrinking))


def _cut(skeleton: PreTrainedModel, widths: Mapping[str, int]) -> PreTrainedModel:
    """A copy without data whose blocks are those of the end: `widths` by the name of an axis, or by its kind."""
    smaller = copy.deepcopy(skeleton)
    keep = {}
    for axis in find_axes(smaller, KINDS):
        stays = widths.get(axis.name, widths.get(axis.kind, axis.count))
        keep[axis.name] = torch.arange(axis.count) < stays
    remove_units(smaller, keep)
    return smaller


def _plan(
    arguments: ShrinkArguments, opened: Opening, skeleton: PreTrainedModel, resumes: bool
) -> dict[str, object]:
    source, text = opened.source, opened.text
    config = arguments.shrink_config()
    units = None if arguments.shape is None else units_of_shape(skeleton, parse_shape(arguments.shape))
    shrinker = Shrinker(skeleton, text.train.tokens[:1], config)
    if units is None:
        shrinker.check_target()
    if (final := shrinker.final_widths if units is None else units) is not None:
        choose_form(read_source(_cut(skeleton, final)), arguments.form, remote_code=arguments.remote_code)
    widths = "equal in all blocks" if config.equal_widths else f"by block ({config.allocator})"
    if config.multiple_of > 1:
        widths += f", MLP widths in multiples of {config.multiple_of}"
    part = shrinker.target / shrinker.dense_parameters
    plan: dict[str, object] = {
        "model": f"{source.name} ({source.kind}, {shrinker.dense_parameters:,} parameters)",
        "target": f"{shrinker.target:,} parameters ({part:.1%}), fewer heads and MLP channels",
        "units": f"go by {config.score}; widths {widths}; measured anew after every {config.step:.0%} of what can go",
        "text": f"{arguments.data}: {len(text.train):,} windows of {arguments.window} tokens",
        "judged by": f"{text.facts['evaluation text']}: {len(text.evaluation)} windows",
    }
    if units is not None:
        plan["target"] = f"{arguments.shape}: all other layers, heads and MLP channels go"
        plan["units"] = f"are chosen by gates that are trained with the weights for {arguments.gate_steps:,} steps"
    elif arguments.learner == "policy":
        masks = 2 * arguments.policy_steps
        plan["units"] = f"are chosen by the losses of {masks:,} masks, whose probabilities start from {config.score}"
    if arguments.steps and (units is not None or arguments.learner is not None):
        plan["budget"] = f"then {arguments.tokens:,} tokens = {arguments.steps} steps of {arguments.tokens_per_step:,}"
    elif arguments.steps:
        stages = plan_stages(arguments.steps, shrinker.dense_parameters, shrinker.target, config)
        first = ", ".join(str(stage.step) for stage in stages[:4])
        plan |= {
            "budget": f"{arguments.tokens:,} tokens = {arguments.steps} steps of {arguments.tokens_per_step:,}",
            "stages": f"{len(stages)}, before steps {first}{' ...' if len(stages) > 4 else ''}",
        }
    else:
        plan["budget"] = "no training"
    return plan | {
        "teacher": "the dense model" if arguments.distill and arguments.steps else "none",
        "device": str(pick_device(arguments.device)),
        "start": "where the interrupted run stopped" if resumes else f"from the dense weights, seed {arguments.seed}",
        "output": f"{opened.output}: {SHRUNK} ({arguments.form}), report.json, report.html",
    }
