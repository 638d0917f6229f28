"""`hf-adaptive-sparse bench`: size, loading, memory and speed of a sparse model next to dense, on this machine."""

import dataclasses
import json
import tempfile
from dataclasses import dataclass, field
from typing import ClassVar

from ..backend_choice import DENSE, MARGIN
from ..backend_forwards import BACKENDS
from ..errors import ConfigError
from ..hf.backend_times import save_times, times_path
from ..hf.bench_shapes import ROWS
from ..hf.bench_worker import MODEL_BACKENDS
from ..reports import Report, write_report
from . import PROGRAM
from .arguments import CommonArguments
from .benching import BenchRun, find_shapes, measure_models, measure_shapes, summarize, tables
from .console import print_plan, say
from .export import ONE_SHOT
from .models import DTYPES, find_model, load_config, pick_device, stored_dtype
from .output import check_output, clear, command_line, versions, weight_bytes
from .verdict import print_verdict


@dataclass(kw_only=True)
class BenchArguments(CommonArguments):
    """Measure a 2:4 model on this machine, next to the same model dense: every shape of its layers, then the whole.

    Whole models are loaded in processes of their own, in turns. With --save the times of the shapes are kept, and
    use_measured_backends(model) sets up models by them. A folder with config.json alone gets the table of shapes.
    """

    POSITIONAL: ClassVar[tuple[str, ...]] = ("path",)
    REQUIRED: ClassVar[tuple[str, ...]] = ("path",)

    path: str = field(
        default="", metadata={"help": "Folder of a 2:4 model, packed or dense-stored; or a folder with config.json."}
    )
    dense: str | None = field(
        default=None, metadata={"help": "Folder of the same model dense-stored (made for the time of the run)."}
    )
    one_shot: str | None = field(
        default=None,
        metadata={
            "help": f"Measure a copy that is pruned first, where the model is not 2:4: {', '.join(ONE_SHOT)}. Times do "
            "not depend on the values."
        },
    )
    backends: list[str] = field(
        default_factory=lambda: list(MODEL_BACKENDS),
        metadata={"help": f"Of the whole model, besides dense: {', '.join(MODEL_BACKENDS)}."},
    )
    layer_backends: list[str] | None = field(
        default=None,
        metadata={"help": f"Of every shape, besides dense: {', '.join(BACKENDS)} (all that run on the device)."},
    )
    rows: list[int] | None = field(
        default=None,
        metadata={
            "help": "Tokens that go through a layer together "
            f"({', '.join(map(str, ROWS['cpu']))}; on CUDA {', '.join(map(str, ROWS['cuda']))})."
        },
    )
    repetitions: int = field(default=5, metadata={"help": "How often every shape is measured."})
    rounds: int = field(default=3, metadata={"help": "How often every whole model is loaded and run; 0: not at all."})
    prompt: int = field(default=128, metadata={"help": "Tokens of a prompt."})
    sequences: int = field(default=1, metadata={"help": "Prompts that are run together."})
    new_tokens: int = field(default=16, metadata={"help": "Tokens that are decoded after it."})
    save: bool = field(
        default=False, metadata={"help": "Keep the times of the shapes, for use_measured_backends(model)."}
    )
    json: bool = field(default=False, metadata={"help": "Print the report as JSON instead of tables."})
    output_dir: str | None = field(default=None, metadata={"help": "Folder for report.json and report.html."})
    dtype: str = field(default="auto", metadata={"help": f"To load in: {', '.join(DTYPES)} (as stored)."})
    device: str = field(default="auto", metadata={"help": "auto, cpu, cuda, ..."})
    trust_remote_code: bool = field(default=False, metadata={"help": "Run code that comes with the model."})

    def __post_init__(self) -> None:
        for name in ("repetitions", "prompt", "sequences", "new_tokens"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} is at least 1, got {getattr(self, name)}.")
        if self.rounds < 0:
            raise ConfigError(f"rounds is at least 0, got {self.rounds}.")
        if self.rows is not None and (not self.rows or min(self.rows) < 1):
            raise ConfigError(f"rows are numbers of at least 1, got {', '.join(map(str, self.rows)) or 'none'}.")
        if self.dtype not in DTYPES:
            raise ConfigError(f"unknown dtype {self.dtype!r}; known: {', '.join(DTYPES)}.")
        if self.one_shot is not None and self.one_shot not in ONE_SHOT:
            raise ConfigError(f"unknown one_shot {self.one_shot!r}; known: {', '.join(ONE_SHOT)}.")
        for names, known in ((self.backends, MODEL_BACKENDS), (self.layer_backends or (), BACKENDS)):
            for name in names:
                if name not in known:
                    raise ConfigError(f"unknown backend {name!r}; known: {', '.join(known)}.")


ARGUMENTS = BenchArguments


def run(arguments: BenchArguments) -> int:
    """Measure, print, report, and keep the times if asked to."""
    source = find_model(arguments.path, "PATH")
    if source.kind in ("hub", "adapter"):
        what = "is no local folder" if source.kind == "hub" else "is an adapter"
        raise ConfigError(
            f"PATH {arguments.path}: {what}, and bench measures local models. Fetch it first (hf download NAME "
            f"--local-dir FOLDER), or make a model of the adapter: {PROGRAM} export ADAPTER FOLDER."
        )
    twin = None if arguments.dense is None else find_model(arguments.dense, "--dense")
    if twin is not None and twin.kind != "dense":
        raise ConfigError(f"--dense {arguments.dense}: must be a dense-stored model, and is {twin.kind}.")
    output = None if arguments.output_dir is None else check_output(arguments.output_dir, arguments.overwrite)
    device = pick_device(arguments.device)
    rows = arguments.rows or list(ROWS["cuda" if device.type == "cuda" else "cpu"])
    has_weights = weight_bytes(source.name) > 0
    whole = [*dict.fromkeys((DENSE, *arguments.backends))] if arguments.rounds and has_weights else []
    plan = {
        "model": f"{source.name} ({source.kind}{'' if has_weights else ', without weights'})",
        "shapes": f"{', '.join(map(str, rows))} rows, {arguments.repetitions} repetitions on {device}",
        "whole model": f"{', '.join(whole)}: {arguments.rounds} rounds, a process each" if whole else "not measured",
        "times": f"kept in {times_path()}" if arguments.save else "not kept: no --save",
        "output": "the screen only" if output is None else f"{output}: report.json, report.html",
    }
    print_plan(f"{PROGRAM} bench", plan, arguments.dry_run, quiet=arguments.json)
    if arguments.dry_run:
        return 0

    report = Report(
        title=f"Speed of {arguments.path}", command=command_line("bench"),
        settings=dataclasses.asdict(arguments), versions=versions(),
    )  # fmt: skip
    dtype = stored_dtype(load_config(source, arguments.trust_remote_code), arguments.dtype)
    bench = BenchRun(
        source=source, twin=twin, arguments=arguments, device=device, rows=sorted(set(rows)), backends=whole,
        report=report, dtype=dtype,
    )  # fmt: skip
    shapes = find_shapes(bench)
    measured = measure_shapes(bench, shapes)
    if whole:
        with tempfile.TemporaryDirectory(prefix="hf_adaptive_sparse_bench_") as folder:
            measure_models(bench, measured, folder)
    if arguments.save:
        say(f"times: {save_times(tables(measured, device))}")
    report.summary = summarize(bench, measured)
    report.notes = [
        f"A backend is chosen where it saved more than {MARGIN:.0%} of dense's time in every repetition; otherwise "
        "dense is. `expanded` is dense by another name: the same product, by the class of packed layers.",
        "Layers are measured with random weights, as many copies of each as no cache holds, in turns with dense: "
        "ratios compare what was measured next to each other.",
        "Whole models: " + "; ".join(f"{name}, {MODEL_BACKENDS[name]}" for name in whole) + "." if whole
        else "Whole models were not measured.",
        "Memory is the largest of the process on top of Python and the libraries (on CUDA: what was allocated there).",
    ]  # fmt: skip
    if output is not None:
        clear(output, ("report.json", "report.html"))
        say(f"report: {write_report(report, output)}")
    if arguments.json:
        print(json.dumps(report.as_json(), indent=2, ensure_ascii=False))
    else:
        print_verdict(report)
    return 0
