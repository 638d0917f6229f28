"""`hf-adaptive-sparse eval`: perplexity, and lm-eval tasks, of any model, next to a baseline."""

import dataclasses
import json
from dataclasses import dataclass, field
from typing import Any, ClassVar

from transformers import PreTrainedModel

from ..errors import ConfigError, DataError
from ..hf.data import EvalProtocol, WindowDataset, data_digest, eval_protocol, load_documents, token_windows
from ..hf.evaluation import lm_eval_tasks
from ..reports import ModelRow, Report, write_report
from . import PROGRAM
from .arguments import CommonArguments
from .console import print_models, print_plan, print_tasks, say
from .measure import measure_perplexity
from .models import ModelSource, find_model, load_model, load_tokenizer, pick_device, size_on_disk
from .output import check_output, clear, command_line, versions


@dataclass(kw_only=True)
class EvalArguments(CommonArguments):
    """Perplexity of a model on a text, and its accuracy on lm-eval tasks.

    The text is cut into windows that do not overlap, as the model's eval_protocol.json says, or else of 256
    tokens, the first 400 of them.
    """

    POSITIONAL: ClassVar[tuple[str, ...]] = ("model",)
    REQUIRED: ClassVar[tuple[str, ...]] = ("model",)

    model: str = field(default="", metadata={"help": "Folder, adapter folder or Hub id."})
    data: str | None = field(
        default=None, metadata={"help": "Text: .txt, .jsonl, .parquet, a folder of these, or a Hub dataset."}
    )
    split: str = field(default="validation", metadata={"help": "Split of a Hub dataset or folder."})
    column: str | None = field(default=None, metadata={"help": "Column that holds the text (text if not given)."})
    window: int | None = field(default=None, metadata={"help": "Tokens in a window (the model's protocol, or 256)."})
    windows: int | None = field(default=None, metadata={"help": "At most so many windows (the protocol, or 400)."})
    stride: int | None = field(default=None, metadata={"help": "Slide by so many tokens (windows do not overlap)."})
    batch_size: int = field(default=8, metadata={"help": "Windows that are computed at the same time."})
    tasks: list[str] | None = field(default=None, metadata={"help": "lm-eval tasks; needs lm-eval."})
    limit: int | None = field(default=None, metadata={"help": "At most so many items of each task."})
    baseline: str | None = field(default=None, metadata={"help": "Another model, to be measured next to it."})
    output_dir: str | None = field(default=None, metadata={"help": "Folder for report.json and report.html."})
    json: bool = field(default=False, metadata={"help": "Print the report as JSON instead of tables."})
    dtype: str = field(default="auto", metadata={"help": "auto, float32, bfloat16, float16."})
    device: str = field(default="auto", metadata={"help": "auto, cpu, cuda, ..."})
    trust_remote_code: bool = field(default=False, metadata={"help": "Run code that comes with the model."})

    def __post_init__(self) -> None:
        for name in ("window", "windows", "stride", "batch_size", "limit"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"{name} is at least 1, got {value}.")


ARGUMENTS = EvalArguments


def run(arguments: EvalArguments) -> int:
    """Measure one or two models."""
    if arguments.data is None and not arguments.tasks:
        raise ConfigError(f"nothing to measure: give --data, --tasks, or both. See {PROGRAM} eval --help.")
    sources = [find_model(arguments.model)]
    if arguments.baseline is not None:
        sources.append(find_model(arguments.baseline, "--baseline"))
    output = None if arguments.output_dir is None else check_output(arguments.output_dir, arguments.overwrite)
    protocol = protocol_of(sources[0], arguments)
    plan: dict[str, object] = {"models": ", ".join(f"{source.name} ({source.kind})" for source in sources)}
    report = Report(
        title=f"Evaluation of {arguments.model}", command=command_line("eval"),
        settings=dataclasses.asdict(arguments), versions=versions(),
    )  # fmt: skip
    documents = None
    if arguments.data is not None:
        documents = load_documents(arguments.data, split=arguments.split, column=arguments.column)
        plan["text"] = f"{arguments.data}: {len(documents):,} documents, windows of {protocol.window} tokens, "
        plan["text"] += f"at most {protocol.windows}, " + (
            "without overlap" if arguments.stride is None else f"sliding by {arguments.stride}"
        )
        report.data = {"text": arguments.data} | {
            "sha256": data_digest(arguments.data, split=arguments.split, column=arguments.column)
        }
    if arguments.tasks:
        plan["tasks"] = ", ".join(arguments.tasks)
    plan["device"] = pick_device(arguments.device)
    plan["output"] = "the screen only" if output is None else f"{output}: report.json, report.html"
    print_plan(f"{PROGRAM} eval", plan, arguments.dry_run, quiet=arguments.json)
    if arguments.dry_run:
        return 0

    for source in sources:
        _measure(source, arguments, protocol, documents, report)
    if output is not None:
        clear(output, ("report.json", "report.html"))
        say(f"report: {write_report(report, output)}")
    if arguments.json:
        print(json.dumps(report.as_json(), indent=2, ensure_ascii=False))
    else:
        print_models(report.models)
        print_tasks(report.tasks)
    return 0


def protocol_of(source: ModelSource, arguments: EvalArguments) -> EvalProtocol:
    """How the text is cut: as the model's folder says, unless the command line says otherwise."""
    asked = {"window": arguments.window, "windows": arguments.windows}
    found = eval_protocol(source.name)
    return dataclasses.replace(found, **{name: value for name, value in asked.items() if value is not None})


def _measure(
    source: ModelSource, arguments: EvalArguments, protocol: EvalProtocol, documents: Any, report: Report
) -> None:
    model = load_model(source, arguments.dtype, arguments.device, arguments.trust_remote_code)
    tokenizer = load_tokenizer(source, arguments.trust_remote_code)
    numbers: dict[str, Any] = {}
    if documents is not None:
        windows = _windows(arguments, tokenizer, protocol, documents)
        report.data.setdefault("windows", len(windows))
        report.data.setdefault("tokens in a window", protocol.window)
        found = measure_perplexity(model, windows, source.name, arguments.batch_size, arguments.stride)
        numbers = {"perplexity": found.perplexity, "bits_per_byte": found.bits_per_byte}
    report.models.append(ModelRow(name=source.name, bytes_on_disk=size_on_disk(source), **numbers))
    if arguments.tasks:
        _add_tasks(model, tokenizer, source, arguments, report)


def _windows(arguments: EvalArguments, tokenizer: Any, protocol: EvalProtocol, documents: Any) -> WindowDataset:
    try:
        return token_windows(
            documents, tokenizer, protocol.window, protocol.prefix, protocol.suffix, limit=protocol.windows
        )
    except DataError as problem:
        raise DataError(f"{arguments.data}: {problem}") from problem


def _add_tasks(
    model: PreTrainedModel, tokenizer: Any, source: ModelSource, arguments: EvalArguments, report: Report
) -> None:
    options = {} if arguments.limit is None else {"limit": arguments.limit}
    results = lm_eval_tasks(model, tokenizer, arguments.tasks or (), batch_size=arguments.batch_size, **options)
    for task, metrics in results.items():
        kept = {name.split(",")[0]: value for name, value in metrics.items() if isinstance(value, float)}
        report.tasks[f"{task}, {source.name}"] = kept
