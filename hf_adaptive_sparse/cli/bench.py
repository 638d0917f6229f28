"""`hf-adaptive-sparse bench`: size, loading, memory and speed of a sparse model next to dense, on this machine."""

import dataclasses
import json
import tempfile

from ..backend_choice import DENSE, MARGIN
from ..errors import ConfigError
from ..hf.backend_times import save_times, times_path
from ..hf.bench_shapes import ROWS
from ..hf.bench_worker import MODEL_BACKENDS
from ..reports import Report, write_report
from . import PROGRAM
from .bench_arguments import BenchArguments
from .benching import BenchRun, find_shapes, measure_models, measure_shapes, summarize, tables
from .console import print_plan, say
from .models import find_model, load_config, pick_device, stored_dtype
from .output import check_output, clear, command_line, versions, weight_bytes
from .verdict import print_verdict

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
