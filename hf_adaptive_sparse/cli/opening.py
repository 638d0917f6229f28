"""What `train`, `prune` and `shrink` do before and after their own work: their arguments, and what these name."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..errors import ConfigError, OutputError
from ..reports import Report, write_report
from . import PROGRAM
from .arguments import CommonArguments, shown
from .console import print_report, say
from .models import (
    ModelSource,
    check_dtype,
    find_model,
    has_tokenizer,
    load_config,
    load_dense,
    load_tokenizer,
    size_on_disk,
    skeleton_of,
    stored_dtype,
)
from .output import (
    begun,
    check_inputs,
    check_output,
    clear,
    command_line,
    record_run,
    remove_leftovers,
    versions,
)
from .text import RunText, opening_words


@dataclass(kw_only=True)
class RunArguments(CommonArguments):
    """The model, the text and the output folder of a run that makes a new model."""

    POSITIONAL: ClassVar[tuple[str, ...]] = ("model",)
    REQUIRED: ClassVar[tuple[str, ...]] = ("model", "data", "output_dir")
    # What may name a file or a folder that is read; the results must not take its place.
    INPUTS: ClassVar[tuple[str, ...]] = ("config", "model", "data", "eval_data")
    # What the weights of the results do not depend on; a resumed run may change it.
    NOT_OF_THE_RUN: ClassVar[tuple[str, ...]] = (
        "config", "dry_run", "overwrite", "resume", "debug", "output_dir", "prompts", "device"
    )  # fmt: skip

    model: str = field(default="", metadata={"help": "Folder or Hub id of the dense model."})
    data: str = field(
        default="",
        metadata={"help": "Text to learn from: .txt, .jsonl, .parquet, a folder of these, or a Hub dataset."},
    )
    output_dir: str = field(default="", metadata={"help": "Folder of the results."})
    split: str = field(default="train", metadata={"help": "Split of --data, if it is a Hub dataset or a folder."})
    column: str | None = field(default=None, metadata={"help": "Column that holds the text (text if not given)."})
    eval_data: str | None = field(
        default=None,
        metadata={"help": "Text to judge by; if not given, a part of --data that serves for nothing else."},
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
        check_dtype(self.dtype)
        if self.eval_windows < 1:
            raise ConfigError(f"eval_windows is at least 1, got {self.eval_windows}.")

    def settings(self) -> dict[str, Any]:
        """What decides the weights of the run."""
        settings = dataclasses.asdict(self)
        return {name: value for name, value in settings.items() if name not in self.NOT_OF_THE_RUN}


@dataclass(frozen=True)
class Opening:
    """What the arguments of a run name, found and checked. Nothing is written before `begin`."""

    arguments: Any  # RunArguments with a `window` and a `batch_size`
    command: str
    source: ModelSource
    config: Any
    output: Path | None  # None: a dry run that was given none
    results: tuple[str, ...]  # names in `output` that are of the run
    tokenizer: PreTrainedTokenizerBase | None = None
    text: RunText | None = None

    def with_text(self, read: Callable[..., RunText], needed: int) -> Opening:
        """The same with its tokenizer and text; without them in a dry run that was given none and needs none.

        Args:
            read: `run_text` or `calibration_text`.
            needed: windows that the run will learn from.
        """
        arguments, source = self.arguments, self.source
        if not arguments.data or (
            arguments.dry_run and "data" not in arguments.REQUIRED and not has_tokenizer(source)
        ):
            return self
        tokenizer = load_tokenizer(source, arguments.trust_remote_code)
        say("reading the text ...")
        text = read(
            source, tokenizer, data=arguments.data, split=arguments.split, column=arguments.column,
            eval_data=arguments.eval_data, eval_split=arguments.eval_split, eval_windows=arguments.eval_windows,
            window=arguments.window, needed=needed,
        )  # fmt: skip
        return dataclasses.replace(self, tokenizer=tokenizer, text=text)

    def skeleton(self) -> PreTrainedModel:
        """The model without its weights, on the meta device."""
        return skeleton_of(self.config, self.arguments.trust_remote_code)

    @property
    def settings(self) -> dict[str, Any]:
        """What a resumed run must have in common with the one that was interrupted."""
        return self.arguments.settings() | {"text": self.text.facts if self.text else {}}

    def resumes(self) -> bool:
        """Whether there is an interrupted run to go on with.

        Raises:
            ConfigError: it was another run; each setting that differs is named.
        """
        return self.arguments.resume and self.output is not None and begun(self.output, self.settings)

    def begin(self, resumes: bool) -> None:
        """Make room in the output folder: for a new run, without the results of an earlier one.

        Last of all: a model that cannot be loaded must not cost them.
        """
        assert self.output is not None
        remove_leftovers(self.output)
        if not resumes:
            clear(self.output, self.results)
            record_run(self.output, self.settings)

    def withdraw(self) -> None:
        """Undo `begin` after a run that came to nothing; a folder with nothing else in it goes too."""
        assert self.output is not None
        remove_leftovers(self.output)
        clear(self.output, self.results)
        if not any(self.output.iterdir()):
            self.output.rmdir()

    def load(self, source: ModelSource | None = None, home: str | None = None) -> PreTrainedModel:
        """The dense model, or that of another `source`, as the arguments say; `home`: see `load_dense`."""
        arguments = self.arguments
        return load_dense(
            source or self.source, arguments.dtype, arguments.device, arguments.trust_remote_code, home
        )

    def shared(self, title: str) -> dict[str, Any]:
        """The fields of `Results` that follow from the arguments alone, with an empty report."""
        arguments, source = self.arguments, self.source
        protocol = Path(source.name) / "eval_protocol.json"
        assert self.text is not None
        return {
            "tokenizer": self.tokenizer,
            "text": self.text,
            "output": self.output,
            "prompts": arguments.prompts or opening_words(self.text, self.tokenizer),
            "batch_size": arguments.batch_size,
            "report": Report(
                title=title, command=command_line(self.command), settings=dataclasses.asdict(arguments),
                versions=versions(),
            ),
            "dense_bytes": size_on_disk(source) if source.kind == "dense" else None,
            "stored_dtype": stored_dtype(self.config, arguments.dtype),
            "protocol_file": protocol if protocol.is_file() else None,
        }  # fmt: skip

    def finish(self, report: Report) -> int:
        """Write the report and show what is in it; the exit code."""
        assert self.output is not None
        print_report(report, write_report(report, self.output))
        return 0


def open_run(arguments: RunArguments, command: str, results: tuple[str, ...]) -> Opening:
    """Find MODEL and the output folder, and read the configuration.

    Args:
        results: names in the output folder that the run writes, and removes where an earlier one has left them.
    Raises:
        ConfigError: no such model, or an adapter, which is no model by itself.
        OutputError: the output folder is in use, or what the run reads is among the results that it removes.
    """
    source = find_model(arguments.model)
    if source.kind == "adapter":
        raise ConfigError(
            f"MODEL {arguments.model}: is an adapter. Make a model of it first: {PROGRAM} export {arguments.model} OUT "
            "--format dense. If it is a checkpoint of an interrupted run, go on with that run by train --resume."
        )
    output = None
    if arguments.output_dir:
        output = check_output(arguments.output_dir, arguments.overwrite, arguments.resume)
        if (output / "config.json").is_file():
            raise OutputError(
                f"{output}: is the folder of a model, whose files would be taken for the results of this run. Choose "
                "another output folder."
            )
        check_inputs(
            [output / name for name in results],
            {shown(name, arguments.POSITIONAL): getattr(arguments, name) for name in arguments.INPUTS},
        )
    return Opening(arguments, command, source, load_config(source, arguments.trust_remote_code), output, results)
