"""`hf-adaptive-sparse train`: learn 2:4 masks while retraining with distillation, then save the model."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from ..errors import ConfigError
from ..hf.targets import resolve_targets
from ..patterns import parse_pattern
from . import PROGRAM
from .console import print_plan
from .measure import weight_of
from .models import ModelSource, find_model, load_config, pick_device
from .opening import Opening, RunArguments, open_run
from .recipe import RecipeArguments
from .results import PACKED, SAVE
from .retraining import CHECKPOINTS, RESULTS, Run, load_start, retrain
from .text import run_text


@dataclass(kw_only=True)
class TrainArguments(RunArguments, RecipeArguments):
    """Learn which two of every four weights to keep, while retraining with distillation from the dense model.

    OUTPUT_DIR gets packed/ and dense/ (models), checkpoints/, report.json and report.html.
    """

    INPUTS: ClassVar[tuple[str, ...]] = (*RunArguments.INPUTS, "teacher", "init")
    NOT_OF_THE_RUN: ClassVar[tuple[str, ...]] = (*RunArguments.NOT_OF_THE_RUN, "save")

    teacher: str = field(default="self", metadata={"help": "self, or the folder or Hub id of another model."})
    save: str = field(default="both", metadata={"help": f"What to save: {', '.join(SAVE)}."})

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.save not in SAVE:
            raise ConfigError(f"unknown save {self.save!r}; known: {', '.join(SAVE)}.")
        self.check_format(PACKED in SAVE[self.save])


ARGUMENTS = TrainArguments


def run(arguments: TrainArguments) -> int:
    """Train, save, load back, measure and report."""
    opened = open_run(arguments, "train", RESULTS)
    teacher = None if arguments.teacher == "self" else find_model(arguments.teacher, "--teacher")
    if teacher is not None:
        other = load_config(teacher, arguments.trust_remote_code)
        check_vocabularies(opened.source, opened.config, teacher, other)
    opened = opened.with_text(run_text, arguments.windows)
    arguments.check_text(len(opened.text.train))
    resumes = opened.resumes()
    print_plan(f"{PROGRAM} train", _plan(arguments, opened, resumes), arguments.dry_run)
    if arguments.dry_run:
        return 0

    model = opened.load()
    training = Run(
        **opened.shared(f"{arguments.pattern} retraining of {Path(opened.source.name).name}"),
        model=model, recipe=arguments, save=SAVE[arguments.save],
        teacher=None if teacher is None else opened.load(teacher), start=load_start(arguments, model),
    )  # fmt: skip
    opened.begin(resumes)
    return opened.finish(retrain(training))


def check_vocabularies(student: ModelSource, student_config: Any, teacher: ModelSource, teacher_config: Any) -> None:
    """Raise ConfigError unless both predict the same tokens."""
    sizes = [config.get_text_config().vocab_size for config in (student_config, teacher_config)]
    if sizes[0] != sizes[1]:
        raise ConfigError(
            f"--teacher {teacher.name} has a vocabulary of {sizes[1]} tokens, MODEL {student.name} one of "
            f"{sizes[0]}. Distillation compares them token by token: take a teacher with the same tokenizer."
        )


def _plan(arguments: TrainArguments, opened: Opening, resumes: bool) -> dict[str, object]:
    skeleton, source, text = opened.skeleton(), opened.source, opened.text
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
        "output": f"{opened.output}: {', '.join(SAVE[arguments.save])}, {CHECKPOINTS}, report.json, report.html",
    }
