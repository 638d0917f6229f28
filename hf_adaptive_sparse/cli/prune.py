"""`hf-adaptive-sparse prune`: make a model sparse in one shot, without training, then save it."""

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

import torch
from transformers import PreTrainedModel

from ..errors import ConfigError, SparsityError, TargetError
from ..hf.blocks import find_blocks
from ..hf.calibration import check_tokens
from ..hf.offload import OFFLOADS
from ..hf.one_shot import check_shapes, check_skip, prunable_members
from ..hf.one_shot_goals import check_budget
from ..hf.one_shot_plan import plan_one_shot
from ..hf.walk_progress import has_finished_blocks
from ..methods.one_shot import MIXED, OneShotConfig
from . import PROGRAM
from .arguments import borrowed, check_given
from .console import print_plan, say
from .models import pick_device, stored_dtype
from .opening import Opening, RunArguments, open_run
from .output import clear
from .pruning import PROGRESS, RESULTS, PruneRun, cost_lines, described, prune
from .results import DENSE, PACKED, SAVE
from .text import calibration_text

_PACKABLE = ("dense", "2:4", "1:4")


@dataclass(kw_only=True)
class PruneArguments(RunArguments):
    """Make a model sparse in one pass over it, block by block, from a little text and without training.

    OUTPUT_DIR gets packed/ and dense/ (models), report.json and report.html. With --dry-run neither data nor weights
    are needed, and the cost of the run is predicted: operations (a multiplication with its addition counts 2), the
    least time that they take here, bytes on disk, and peak memory. Each number is explained in docs/prune_costs.md.
    """

    REQUIRED: ClassVar[tuple[str, ...]] = ("model",)
    NOT_OF_THE_RUN: ClassVar[tuple[str, ...]] = (*RunArguments.NOT_OF_THE_RUN, "save", "offload")

    calibration_windows: int = field(default=128, metadata={"help": "The first so many windows of the text."})
    window: int = field(default=256, metadata={"help": "Tokens in one window of text."})
    batch_size: int = field(default=8, metadata={"help": "Windows that are computed at the same time."})

    method: str = borrowed(OneShotConfig, "method")
    pattern: str = borrowed(OneShotConfig, "pattern")
    sparsity: float | None = borrowed(OneShotConfig, "sparsity")
    levels: str = borrowed(OneShotConfig, "levels")
    saliency: str | None = borrowed(OneShotConfig, "saliency")
    solver: str | None = borrowed(OneShotConfig, "solver")
    refine_iterations: int | None = borrowed(OneShotConfig, "refine_iterations")
    correction: float | None = borrowed(OneShotConfig, "correction")
    order: str | None = borrowed(OneShotConfig, "order")
    allocation: str | None = borrowed(OneShotConfig, "allocation")
    allocation_unit: str = borrowed(OneShotConfig, "allocation_unit")
    spread: float | None = borrowed(OneShotConfig, "spread")
    sensitivity: str = borrowed(OneShotConfig, "sensitivity")
    generations: int = borrowed(OneShotConfig, "generations")
    probes: int = borrowed(OneShotConfig, "probes")
    damping: float = borrowed(OneShotConfig, "damping")
    bits: int = borrowed(OneShotConfig, "bits")
    group_size: int = borrowed(OneShotConfig, "group_size")
    rounding: str = borrowed(OneShotConfig, "rounding")

    skip: list[str] | None = field(
        default=None, metadata={"help": "Names of modules that stay dense, whole or the end of them."}
    )
    offload: str = field(
        default="none",
        metadata={
            "help": f"Where blocks and activations wait: {', '.join(OFFLOADS)}. Other than none: the device holds one "
            "block, and perplexity is measured on the CPU."
        },
    )
    save: str | None = field(
        default=None, metadata={"help": f"What to save: {', '.join(SAVE)} (both for 2:4, otherwise dense)."}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("calibration_windows", "batch_size"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} is at least 1, got {getattr(self, name)}.")
        if self.window < 2:
            raise ConfigError(f"window is at least 2 tokens, to predict one from the other, got {self.window}.")
        for name, known in (("offload", OFFLOADS), ("save", SAVE)):
            value = getattr(self, name)
            if value is not None and value not in known:
                raise ConfigError(f"unknown {name} {value!r}; known: {', '.join(known)}.")
        self.one_shot_config()  # building it checks it
        if self.save is not None and PACKED in SAVE[self.save] and not self._can_be_packed:
            raise ConfigError(
                f"the packed format holds 2:4 weights, and pattern is {self.pattern}. Use prune with --save dense."
            )

    @property
    def _can_be_packed(self) -> bool:
        names = self.levels.split(",") if self.pattern == MIXED else [self.pattern]
        return {name.strip() for name in names} <= set(_PACKABLE)

    @property
    def saves(self) -> tuple[str, ...]:
        """Which folders are written."""
        return SAVE[self.save or ("both" if self.pattern in _PACKABLE else "dense")]

    def one_shot_config(self) -> OneShotConfig:
        names = [entry.name for entry in dataclasses.fields(OneShotConfig)]
        return OneShotConfig(**{name: getattr(self, name) for name in names})


ARGUMENTS = PruneArguments


def run(arguments: PruneArguments) -> int:
    """Prune, save, load back, measure and report."""
    if not arguments.dry_run:
        check_given(arguments, ("data", "output_dir"), arguments.POSITIONAL, "prune")
    opened = open_run(arguments, "prune", RESULTS).with_text(calibration_text, arguments.calibration_windows)
    skeleton = opened.skeleton()
    if opened.text is not None:
        check_tokens(skeleton, opened.text.train.tokens)
    resumes = opened.resumes()
    is_complete = resumes and opened.output is not None and (opened.output / "report.html").is_file()
    if is_complete:
        _check_saved(arguments, opened.output)
    plan = _plan(arguments, opened, skeleton, resumes)
    if arguments.dry_run:
        judged = arguments.eval_windows if opened.text is None else len(opened.text.evaluation)
        plan |= _cost(arguments, skeleton, stored_dtype(opened.config, arguments.dtype), judged)
    print_plan(f"{PROGRAM} prune", plan, arguments.dry_run)
    if arguments.dry_run:
        return 0
    output = opened.output
    assert output is not None
    if is_complete:
        clear(output, (PROGRESS,))
        say(f"{output}: this run is complete, nothing is left to do.")
        return 0

    pruning = _prune_run(arguments, opened)
    opened.begin(resumes)
    try:
        report = prune(pruning)
    except SparsityError:
        if not resumes and not has_finished_blocks(output / PROGRESS):
            opened.withdraw()
        raise
    opened.finish(report)
    clear(output, (PROGRESS,))
    return 0


def _check_saved(arguments: PruneArguments, output: Path) -> None:
    """Raise ConfigError where a run that is complete was not asked for a folder that is asked for now."""
    for name in arguments.saves:
        if (output / name).is_dir():
            continue
        other = output / (DENSE if name == PACKED else PACKED)
        how = f"Make it of {other.name}/: {PROGRAM} export {other} {output / name} --format {name}."
        # What is packed of dense weights has no codes.
        if not other.is_dir() or (name == PACKED and arguments.bits):
            how = "Start anew with --overwrite."
        raise ConfigError(f"{output}: this run is complete, and has no {name}/. {how}")


def _prune_run(arguments: PruneArguments, opened: Opening) -> PruneRun:
    return PruneRun(
        **opened.shared(f"{arguments.pattern} pruning of {Path(opened.source.name).name}"),
        model=opened.load(home=None if arguments.offload == "none" else "cpu"), save=arguments.saves,
        config=arguments.one_shot_config(), skip=arguments.skip or (), seed=arguments.seed,
        device=pick_device(arguments.device), offload=arguments.offload,
    )  # fmt: skip


def _plan(
    arguments: PruneArguments, opened: Opening, skeleton: PreTrainedModel, resumes: bool
) -> dict[str, object]:
    source, text, output = opened.source, opened.text, opened.output
    config = arguments.one_shot_config()
    stack, skip = find_blocks(skeleton), arguments.skip or ()
    check_skip(skeleton, stack, skip)
    members = prunable_members(stack, skip)
    check_shapes(members, config)
    check_budget(members, config)
    weights = sum(member.weight.numel() for member in members.values())
    window, count = arguments.window, arguments.calibration_windows
    calibration = f"the first {count} windows of {window} tokens = {count * window:,} tokens"
    if text is None:
        why = "not read: the folder holds no tokenizer" if arguments.data else "not given"
        data, judge = f"{calibration} ({why})", "not read"
    else:
        data = f"{arguments.data}: {calibration}"
        judge = f"{text.facts['evaluation text']}: {len(text.evaluation)} windows"
    device = pick_device(arguments.device)
    return {
        "model": f"{source.name} ({source.kind}, {skeleton.num_parameters():,} parameters)",
        "sparse": f"{described(config)} in {len(members)} matrices with {weights:,} weights",
        **_method(config),
        "text": data,
        "judged by": judge,
        "device": str(device) if arguments.offload == "none" else f"{device}, offload to {arguments.offload}",
        "start": "where the interrupted run stopped" if resumes else f"from the dense weights, seed {arguments.seed}",
        "output": f"{output or 'not given'}: {', '.join(arguments.saves)}, report.json, report.html",
    }


def _method(config: OneShotConfig) -> dict[str, object]:
    parts = config.resolved
    solver = f"score {parts.saliency}, weights by {parts.solver}"
    if parts.refine_iterations:
        solver += f", {parts.refine_iterations} conjugate gradient steps"
    if parts.correction:
        solver += f", making up for {100 * parts.correction:g} % of the error of the inputs"
    found: dict[str, object] = {
        "method": f"{config.method}: {solver}; measured by {parts.order}, damping {config.damping:g}"
    }
    if parts.allocation != "uniform":
        found["allocation"] = f"{parts.allocation}, by {config.allocation_unit}"
    if config.bits:
        shared = f"groups of {config.group_size}" if config.group_size else "output channels"
        found["values"] = f"{config.bits} bits, one scale for {shared}, rounded by {config.rounding}"
    return found


def _cost(
    arguments: PruneArguments, skeleton: PreTrainedModel, stored: torch.dtype | None, judged: int
) -> dict[str, object]:
    device = pick_device(arguments.device)
    dtype = torch.float32 if arguments.dtype == "auto" and device.type == "cpu" else stored or torch.float32
    try:
        plan = plan_one_shot(
            skeleton, arguments.one_shot_config(), windows=arguments.calibration_windows, window=arguments.window,
            batch_size=arguments.batch_size, skip=arguments.skip or (), dtype=dtype, stored=stored,
        )  # fmt: skip
    except TargetError as problem:
        return {"cost": f"not predicted: {problem}"}
    judge = device if arguments.offload == "none" else torch.device("cpu")
    return cost_lines(plan, device, dtype, judged, judge)
