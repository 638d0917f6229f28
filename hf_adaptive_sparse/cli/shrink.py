"""`hf-adaptive-sparse shrink`: remove heads and MLP channels, before or between steps of training."""

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from ..errors import ConfigError, DataError
from ..hf.shapes import parse_shape, units_of_shape
from ..hf.shrink import Shrinker
from ..hf.shrunk_forms import FORMS
from ..methods.adaptive_width.config import ShrinkConfig, plan_stages
from ..methods.hard_concrete import HardConcreteConfig
from ..methods.policy_gradient import PolicyGradientConfig
from ..reports import Report, write_report
from . import PROGRAM
from .arguments import TokenCount, borrowed
from .budget import BudgetArguments
from .console import print_plan, print_report, say
from .models import (
    ModelSource,
    find_model,
    load_config,
    load_dense,
    load_tokenizer,
    pick_device,
    size_on_disk,
    stored_dtype,
)
from .output import begun, check_output, clear, command_line, record_run, remove_leftovers, versions
from .shrink_run import ShrinkRun
from .shrinking import RESULTS, SHRUNK, run_shrinking
from .text import RunText, opening_words, run_text

_NOT_OF_THE_RUN = (
    "config", "dry_run", "overwrite", "resume", "debug", "output_dir", "form", "remote_code", "prompts", "device"
)  # fmt: skip
LEARNERS = ("policy", "gates")
# What is read by one way of choosing units alone, or with a teacher alone.
_OF_STAGES = (
    "stages", "shares", "prune_fraction", "allocation", "step", "amplitude", "min_units", "equal_widths", "repair",
    "bias_repair", "reset_moments",
)  # fmt: skip
_OF_GATES = ("gate_steps", "gate_lr")
_OF_POLICY = ("policy_steps", "policy_lr")
_OF_DISTILLATION = ("kd_weight", "ce_weight", "temperature", "hidden_weight", "kind")


@dataclass(kw_only=True)
class ShrinkArguments(BudgetArguments):
    """Remove attention heads and MLP channels, most where they matter least, and train what is left.

    All go before the training, or with --stages in between, or as a learner says (--shape, --learner). OUTPUT_DIR gets
    shrunk/ (an ordinary, smaller model), checkpoints/, report.json and report.html. With --train-tokens 0 the model is
    only pruned.
    """

    POSITIONAL: ClassVar[tuple[str, ...]] = ("model",)
    REQUIRED: ClassVar[tuple[str, ...]] = ("model", "data", "output_dir")
    LEAST_TOKENS: ClassVar[int] = 0

    model: str = field(default="", metadata={"help": "Folder or Hub id of the dense model."})
    data: str = field(
        default="",
        metadata={"help": "Training text: .txt, .jsonl, .parquet, a folder of these, or a Hub dataset."},
    )
    output_dir: str = field(default="", metadata={"help": "Folder of the results."})
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
    split: str = field(default="train", metadata={"help": "Split of a Hub dataset or folder to train on."})
    column: str | None = field(default=None, metadata={"help": "Column that holds the text (text if not given)."})
    eval_data: str | None = field(
        default=None,
        metadata={"help": "Text to judge by; if not given, the end of the training text is held out."},
    )
    eval_split: str = field(default="validation", metadata={"help": "Split of --eval-data."})
    eval_windows: int = field(default=400, metadata={"help": "At most so many windows of it."})
    resume: bool = field(default=False, metadata={"help": "Go on where an interrupted run stopped."})
    prompts: list[str] | None = field(
        default=None,
        metadata={"help": "Texts that each model continues in the report (from the evaluation text)."},
    )
    dtype: str = field(default="auto", metadata={"help": "Of the dense model: auto, float32, bfloat16, float16."})
    device: str = field(default="auto", metadata={"help": "auto, cpu, cuda, ..."})
    trust_remote_code: bool = field(default=False, metadata={"help": "Run code that comes with the model."})

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("calibration_windows", "calibration_batch", "eval_windows"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} is at least 1, got {getattr(self, name)}.")
        known = ("auto", *FORMS)
        if self.form not in known:
            raise ConfigError(f"unknown form {self.form!r}; known: {', '.join(known)}.")
        if self.compile:
            raise ConfigError("compile keeps the shapes that weights had at the start, and stages change them.")
        if self.bias_repair and self.train_tokens:
            raise ConfigError("bias_repair stands in for training. Use it with --train-tokens 0.")
        if self.form == "stock" and not self.equal_widths and self.shape is None:
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
        if not self.distill:
            self._refuse("with --no-distill", _OF_DISTILLATION)

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
        return ShrinkConfig(**{name: getattr(self, name) for name in names})

    def settings(self) -> dict[str, Any]:
        """What decides the weights of the run."""
        settings = dataclasses.asdict(self)
        return {name: value for name, value in settings.items() if name not in _NOT_OF_THE_RUN}


ARGUMENTS = ShrinkArguments


def run(arguments: ShrinkArguments) -> int:
    """Prune and train, save, load back, measure and report."""
    source = find_model(arguments.model)
    if source.kind == "adapter":
        raise ConfigError(
            f"MODEL {arguments.model}: is an adapter. Make a model of it first: {PROGRAM} export {arguments.model} OUT "
            "--format dense."
        )
    output = check_output(arguments.output_dir, arguments.overwrite, arguments.resume)
    config = load_config(source, arguments.trust_remote_code)
    with torch.device("meta"):
        skeleton = AutoModelForCausalLM.from_config(config, trust_remote_code=arguments.trust_remote_code)
    tokenizer = load_tokenizer(source, arguments.trust_remote_code)
    say("reading the text ...")
    needed = max(arguments.windows, arguments.calibration_windows)
    text = run_text(
        source, tokenizer, data=arguments.data, split=arguments.split, column=arguments.column,
        eval_data=arguments.eval_data, eval_split=arguments.eval_split, eval_windows=arguments.eval_windows,
        window=arguments.window, needed=needed,
    )  # fmt: skip
    arguments.check_text(len(text.train))
    if len(text.train) < arguments.calibration_windows:
        raise DataError(
            f"{arguments.data}: the text fills {len(text.train)} windows of {arguments.window} tokens, and importance "
            f"is measured on {arguments.calibration_windows}. Give more text, or lower --calibration-windows."
        )
    settings = arguments.settings() | {"text": text.facts}
    resumes = arguments.resume and begun(output, settings)
    plan = _plan(arguments, source, skeleton, text, output, resumes)
    print_plan(f"{PROGRAM} shrink", plan, arguments.dry_run)
    if arguments.dry_run:
        return 0

    remove_leftovers(output)
    if not resumes:
        clear(output, RESULTS)
        record_run(output, settings)
    model = load_dense(source, arguments.dtype, arguments.device, arguments.trust_remote_code)
    protocol = Path(source.name) / "eval_protocol.json"
    report = run_shrinking(
        ShrinkRun(
            model=model, tokenizer=tokenizer, text=text, output=output, save=(),
            prompts=arguments.prompts or opening_words(text, tokenizer), batch_size=arguments.batch_size,
            report=Report(
                title=f"{Path(source.name).name}, shrunk to {arguments.shape or f'{100 * arguments.target:g} %'}",
                command=command_line("shrink"), settings=dataclasses.asdict(arguments), versions=versions(),
            ),
            dense_bytes=size_on_disk(source) if source.kind == "dense" else None,
            stored_dtype=stored_dtype(config, arguments.dtype),
            protocol_file=protocol if protocol.is_file() else None,
            config=arguments.shrink_config(), budget=arguments,
            calibration=text.train.select(slice(0, arguments.calibration_windows)),
            calibration_batch=arguments.calibration_batch, distill=arguments.distill,
            form=arguments.form, remote_code=arguments.remote_code, parent=source.name,
            shape=None if arguments.shape is None else units_of_shape(skeleton, parse_shape(arguments.shape)),
            gates=HardConcreteConfig(steps=arguments.gate_steps, gate_lr=arguments.gate_lr),
            policy=arguments.policy(),
        )
    )  # fmt: skip
    print_report(report, write_report(report, output))
    return 0


def _plan(
    arguments: ShrinkArguments,
    source: ModelSource,
    skeleton: PreTrainedModel,
    text: RunText,
    output: Path,
    resumes: bool,
) -> dict[str, object]:
    config = arguments.shrink_config()
    units = None if arguments.shape is None else units_of_shape(skeleton, parse_shape(arguments.shape))
    shrinker = Shrinker(skeleton, text.train.tokens[:1], config)  # raises where the target cannot be reached
    widths = "equal in all blocks" if config.equal_widths else f"by block ({config.allocator})"
    if config.multiple_of > 1:
        widths += f", MLP widths in multiples of {config.multiple_of}"
    plan: dict[str, object] = {
        "model": f"{source.name} ({source.kind}, {shrinker.dense_parameters:,} parameters)",
        "target": f"{shrinker.target:,} parameters ({config.target:.0%}), fewer heads and MLP channels",
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
        "output": f"{output}: {SHRUNK} ({arguments.form}), report.json, report.html",
    }
