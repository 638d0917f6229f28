"""`hf-adaptive-sparse train`: learn 2:4 masks while retraining with distillation, then save the model."""

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import torch
from transformers import AutoModelForCausalLM

from ..errors import ConfigError
from ..hf.targets import resolve_targets
from ..patterns import parse_pattern
from ..reports import Report, write_report
from . import PROGRAM
from .console import print_plan, print_report, say
from .measure import weight_of
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
from .output import (
    begun,
    check_output,
    clear,
    command_line,
    record_run,
    remove_leftovers,
    versions,
)
from .recipe import RecipeArguments
from .results import PACKED, SAVE
from .retraining import CHECKPOINTS, RESULTS, Run, retrain
from .text import RunText, opening_words, run_text

_NOT_OF_THE_RUN = (
    "config",
    "dry_run",
    "overwrite",
    "resume",
    "debug",
    "output_dir",
    "save",
    "prompts",
    "device",
)


@dataclass(kw_only=True)
class TrainArguments(RecipeArguments):
    """Learn which two of every four weights to keep, while retraining with distillation from the dense model.

    OUTPUT_DIR gets packed/ and dense/ (models), checkpoints/, report.json and report.html.
    """

    POSITIONAL: ClassVar[tuple[str, ...]] = ("model",)
    REQUIRED: ClassVar[tuple[str, ...]] = ("model", "data", "output_dir")

    model: str = field(default="", metadata={"help": "Folder or Hub id of the dense model."})
    data: str = field(
        default="",
        metadata={"help": "Training text: .txt, .jsonl, .parquet, a folder of these, or a Hub dataset."},
    )
    output_dir: str = field(default="", metadata={"help": "Folder of the results."})
    split: str = field(default="train", metadata={"help": "Split of a Hub dataset or folder to train on."})
    column: str | None = field(default=None, metadata={"help": "Column that holds the text (text if not given)."})
    eval_data: str | None = field(
        default=None,
        metadata={"help": "Text to judge by; if not given, the end of the training text is held out."},
    )
    eval_split: str = field(default="validation", metadata={"help": "Split of --eval-data."})
    eval_windows: int = field(default=400, metadata={"help": "At most so many windows of it."})
    teacher: str = field(default="self", metadata={"help": "self, or the folder or Hub id of another model."})
    save: str = field(default="both", metadata={"help": f"What to save: {', '.join(SAVE)}."})
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
        if self.save not in SAVE:
            raise ConfigError(f"unknown save {self.save!r}; known: {', '.join(SAVE)}.")
        self.check_format(PACKED in SAVE[self.save])
        if self.eval_windows < 1:
            raise ConfigError(f"eval_windows is at least 1, got {self.eval_windows}.")

    def settings(self) -> dict[str, Any]:
        """What decides the weights of the run."""
        settings = dataclasses.asdict(self)
        return {name: value for name, value in settings.items() if name not in _NOT_OF_THE_RUN}


ARGUMENTS = TrainArguments


def run(arguments: TrainArguments) -> int:
    """Train, save, load back, measure and report."""
    source = find_model(arguments.model)
    if source.kind == "adapter":
        raise ConfigError(
            f"MODEL {arguments.model}: is an adapter. Go on with an interrupted run with --resume, or make a "
            f"model of the adapter first: {PROGRAM} export {arguments.model} OUT --format dense."
        )
    teacher = None if arguments.teacher == "self" else find_model(arguments.teacher, "--teacher")
    output = check_output(arguments.output_dir, arguments.overwrite, arguments.resume)
    config = load_config(source, arguments.trust_remote_code)
    if teacher is not None:
        check_vocabularies(source, config, teacher, load_config(teacher, arguments.trust_remote_code))
    tokenizer = load_tokenizer(source, arguments.trust_remote_code)
    say("reading the text ...")
    text = run_text(
        source, tokenizer, data=arguments.data, split=arguments.split, column=arguments.column,
        eval_data=arguments.eval_data, eval_split=arguments.eval_split, eval_windows=arguments.eval_windows,
        window=arguments.window, needed=arguments.windows,
    )  # fmt: skip
    arguments.check_text(len(text.train))
    settings = arguments.settings() | {"text": text.facts}
    resumes = arguments.resume and begun(output, settings)
    print_plan(f"{PROGRAM} train", _plan(arguments, source, config, text, output, resumes), arguments.dry_run)
    if arguments.dry_run:
        return 0

    remove_leftovers(output)
    if not resumes:
        clear(output, RESULTS)
        record_run(output, settings)
    model = load_dense(source, arguments.dtype, arguments.device, arguments.trust_remote_code)
    teacher_model = None
    if teacher is not None:
        teacher_model = load_dense(teacher, arguments.dtype, arguments.device, arguments.trust_remote_code)
    protocol = Path(source.name) / "eval_protocol.json"
    report = retrain(
        Run(
            model=model, tokenizer=tokenizer, text=text, recipe=arguments, output=output,
            batch_size=arguments.batch_size, save=SAVE[arguments.save],
            prompts=arguments.prompts or opening_words(text, tokenizer),
            report=Report(
                title=f"{arguments.pattern} retraining of {Path(source.name).name}",
                command=command_line("train"),
                settings=dataclasses.asdict(arguments), versions=versions(),
            ),
            dense_bytes=size_on_disk(source) if source.kind == "dense" else None,
            stored_dtype=stored_dtype(config, arguments.dtype), teacher=teacher_model,
            protocol_file=protocol if protocol.is_file() else None,
        )
    )  # fmt: skip
    print_report(report, write_report(report, output))
    return 0


def check_vocabularies(student: ModelSource, student_config: Any, teacher: ModelSource, teacher_config: Any) -> None:
    """Raise ConfigError unless both predict the same tokens."""
    sizes = [config.get_text_config().vocab_size for config in (student_config, teacher_config)]
    if sizes[0] != sizes[1]:
        raise ConfigError(
            f"--teacher {teacher.name} has a vocabulary of {sizes[1]} tokens, MODEL {student.name} one of "
            f"{sizes[0]}. Distillation compares them token by token: take a teacher with the same tokenizer."
        )


def _plan(
    arguments: TrainArguments, source: ModelSource, config: Any, text: RunText, output: Path, resumes: bool
) -> dict[str, object]:
    with torch.device("meta"):
        skeleton = AutoModelForCausalLM.from_config(config, trust_remote_code=arguments.trust_remote_code)
    targets = resolve_targets(skeleton, arguments.adapter_config())
    for name, module in targets.items():
        parse_pattern(arguments.pattern).check_in_features(weight_of(module).shape, name)
    weights = sum(module.weight.numel() for module in targets.values())
    each = arguments.windows / len(text.train)
    drawn = f"{len(text.train):,} windows of {arguments.window} tokens, each seen {each:.2f} times"
    return {
        "model": f"{source.name} ({source.kind}, {skeleton.num_parameters():,} parameters)",
        "sparse": f"{arguments.pattern} in {len(targets)} matrices with {weights:,} weights",
        "text": f"{arguments.data}: {drawn}",
        "judged by": f"{text.facts['evaluation text']}: {len(text.evaluation)} windows",
        **arguments.plan(),
        "teacher": "the dense model itself" if arguments.teacher == "self" else arguments.teacher,
        "device": str(pick_device(arguments.device)),
        "start": "where the interrupted run stopped" if resumes else f"from the dense weights, seed {arguments.seed}",
        "output": f"{output}: {', '.join(SAVE[arguments.save])}, {CHECKPOINTS}, report.json, report.html",
    }
