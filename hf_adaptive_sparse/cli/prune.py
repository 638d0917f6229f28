"""`hf-adaptive-sparse prune`: make a model sparse in one shot, without training, then save it."""

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from ..errors import ConfigError, TargetError
from ..hf.blocks import find_blocks
from ..hf.calibration import check_tokens
from ..hf.offload import OFFLOADS
from ..hf.one_shot import check_shapes, prunable_members
from ..hf.one_shot_plan import plan_one_shot
from ..methods.one_shot import MIXED, OneShotConfig
from ..reports import Report, write_report
from . import PROGRAM
from .arguments import CommonArguments, borrowed, check_given
from .console import print_plan, print_report, say
from .models import (
    ModelSource,
    find_model,
    has_tokenizer,
    load_config,
    load_dense,
    load_tokenizer,
    pick_device,
    size_on_disk,
    stored_dtype,
)
from .output import begun, check_output, clear, command_line, record_run, remove_leftovers, versions
from .pruning import PROGRESS, RESULTS, PruneRun, cost_lines, described, prune
from .results import PACKED, SAVE
from .text import RunText, calibration_text, opening_words

_PACKABLE = ("dense", "2:4", "1:4")
_NOT_OF_THE_RUN = (
    "config", "dry_run", "overwrite", "resume", "debug", "output_dir", "save", "prompts", "device", "offload"
)  # fmt: skip


@dataclass(kw_only=True)
class PruneArguments(CommonArguments):
    """Make a model sparse in one pass over it, block by block, from a little text and without training.

    OUTPUT_DIR gets packed/ and dense/ (models), report.json and report.html. With --dry-run neither data nor weights
    are needed, and the cost of the run is predicted.
    """

    POSITIONAL: ClassVar[tuple[str, ...]] = ("model",)
    REQUIRED: ClassVar[tuple[str, ...]] = ("model",)

    model: str = field(default="", metadata={"help": "Folder or Hub id of the dense model."})
    data: str = field(
        default="",
        metadata={"help": "Calibration text: .txt, .jsonl, .parquet, a folder of these, or a Hub dataset."},
    )
    output_dir: str = field(default="", metadata={"help": "Folder of the results."})
    split: str = field(default="train", metadata={"help": "Split of a Hub dataset or folder to calibrate on."})
    column: str | None = field(default=None, metadata={"help": "Column that holds the text (text if not given)."})
    calibration_windows: int = field(default=128, metadata={"help": "The first so many windows of the text."})
    window: int = field(default=256, metadata={"help": "Tokens in one window of text."})
    batch_size: int = field(default=8, metadata={"help": "Windows that are computed at the same time."})
    eval_data: str | None = field(
        default=None,
        metadata={"help": "Text to judge by; if not given, what follows the calibration text."},
    )
    eval_split: str = field(default="validation", metadata={"help": "Split of --eval-data."})
    eval_windows: int = field(default=400, metadata={"help": "At most so many windows of it."})

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
    resume: bool = field(default=False, metadata={"help": "Go on where an interrupted run stopped."})
    prompts: list[str] | None = field(
        default=None,
        metadata={"help": "Texts that each model continues in the report (from the evaluation text)."},
    )
    dtype: str = field(default="auto", metadata={"help": "Of the dense model: auto, float32, bfloat16, float16."})
    device: str = field(default="auto", metadata={"help": "auto, cpu, cuda, ..."})
    trust_remote_code: bool = field(default=False, metadata={"help": "Run code that comes with the model."})

    def __post_init__(self) -> None:
        for name in ("calibration_windows", "batch_size", "eval_windows"):
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

    def settings(self) -> dict[str, Any]:
        """What decides the weights of the run."""
        settings = dataclasses.asdict(self)
        return {name: value for name, value in settings.items() if name not in _NOT_OF_THE_RUN}


ARGUMENTS = PruneArguments


def run(arguments: PruneArguments) -> int:
    """Prune, save, load back, measure and report."""
    if not arguments.dry_run:
        check_given(arguments, ("data", "output_dir"), arguments.POSITIONAL, "prune")
    source = find_model(arguments.model)
    if source.kind == "adapter":
        raise ConfigError(
            f"MODEL {arguments.model}: is an adapter. Make a model of it first: {PROGRAM} export {arguments.model} OUT "
            "--format dense."
        )
    output = None
    if arguments.output_dir:
        output = check_output(arguments.output_dir, arguments.overwrite, arguments.resume)
    config = load_config(source, arguments.trust_remote_code)
    with torch.device("meta"):
        skeleton = AutoModelForCausalLM.from_config(config, trust_remote_code=arguments.trust_remote_code)
    text, tokenizer = None, None
    if arguments.data and (has_tokenizer(source) or not arguments.dry_run):
        tokenizer = load_tokenizer(source, arguments.trust_remote_code)
        say("reading the text ...")
        text = calibration_text(
            source, tokenizer, data=arguments.data, split=arguments.split, column=arguments.column,
            eval_data=arguments.eval_data, eval_split=arguments.eval_split, eval_windows=arguments.eval_windows,
            window=arguments.window, needed=arguments.calibration_windows,
        )  # fmt: skip
        check_tokens(skeleton, text.train.tokens)
    settings = arguments.settings() | {"text": text.facts if text else {}}
    resumes = arguments.resume and output is not None and begun(output, settings)
    plan = _plan(arguments, source, skeleton, text, output, resumes)
    if arguments.dry_run:
        plan |= _cost(arguments, skeleton, stored_dtype(config, arguments.dtype))
    print_plan(f"{PROGRAM} prune", plan, arguments.dry_run)
    if arguments.dry_run:
        return 0
    assert output is not None and text is not None
    if resumes and (output / "report.html").is_file():
        clear(output, (PROGRESS,))
        say(f"{output}: this run is complete, nothing is left to do.")
        return 0

    remove_leftovers(output)
    if not resumes:
        clear(output, RESULTS)
        record_run(output, settings)
    home = None if arguments.offload == "none" else "cpu"
    model = load_dense(source, arguments.dtype, arguments.device, arguments.trust_remote_code, home)
    protocol = Path(source.name) / "eval_protocol.json"
    report = prune(
        PruneRun(
            model=model, tokenizer=tokenizer, text=text, output=output, save=arguments.saves,
            prompts=arguments.prompts or opening_words(text, tokenizer), batch_size=arguments.batch_size,
            report=Report(
                title=f"{arguments.pattern} pruning of {Path(source.name).name}", command=command_line("prune"),
                settings=dataclasses.asdict(arguments), versions=versions(),
            ),
            dense_bytes=size_on_disk(source) if source.kind == "dense" else None,
            stored_dtype=stored_dtype(config, arguments.dtype),
            protocol_file=protocol if protocol.is_file() else None,
            config=arguments.one_shot_config(), skip=arguments.skip or (), seed=arguments.seed,
            device=pick_device(arguments.device), offload=arguments.offload,
        )
    )  # fmt: skip
    print_report(report, write_report(report, output))
    clear(output, (PROGRESS,))
    return 0


def _plan(
    arguments: PruneArguments,
    source: ModelSource,
    skeleton: PreTrainedModel,
    text: RunText | None,
    output: Path | None,
    resumes: bool,
) -> dict[str, object]:
    config = arguments.one_shot_config()
    _check_skip(skeleton, arguments.skip or ())
    members = prunable_members(find_blocks(skeleton), arguments.skip or ())
    check_shapes(members, config)
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


def _check_skip(skeleton: PreTrainedModel, skip: Any) -> None:
    """Raise ConfigError for a name that no module has: a typo would prune what was to stay dense."""
    known = [name for name, _ in [*skeleton.named_modules(), *skeleton.named_parameters()]]
    for end in skip:
        if not any(f".{name.partition('[')[0]}".endswith(f".{end.partition('[')[0]}") for name in known):
            raise ConfigError(f"skip: no module of the model is called {end!r}, and none ends with .{end}.")


def _cost(arguments: PruneArguments, skeleton: PreTrainedModel, stored: torch.dtype | None) -> dict[str, object]:
    device = pick_device(arguments.device)
    dtype = torch.float32 if arguments.dtype == "auto" and device.type == "cpu" else stored or torch.float32
    try:
        plan = plan_one_shot(
            skeleton, arguments.one_shot_config(), windows=arguments.calibration_windows, window=arguments.window,
            batch_size=arguments.batch_size, skip=arguments.skip or (), dtype=dtype, stored=stored,
        )  # fmt: skip
    except TargetError as problem:
        return {"cost": f"not predicted: {problem}"}
    return cost_lines(plan, device, dtype)
