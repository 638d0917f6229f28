"""One run of `bench`: the shapes of a model, then the whole model, into one report."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from ..backend_choice import DENSE, Times, choose, crossing_points
from ..backend_forwards import competes
from ..backend_timing import Measured, Spread, cautious_seconds, device_clock
from ..errors import ConfigError, PatternError
from ..formats.two_four import dtype_name
from ..hf.adapter_config import AdaptiveSparseConfig
from ..hf.backend_times import PATH_VARIABLE, TimesKey, save_times
from ..hf.bench_rounds import Measure, measure_in_process, measure_rounds, ratio_of, spread_of
from ..hf.bench_shapes import LayerShape, key_of, shapes_of_folder, shapes_of_kinds, time_shape
from ..hf.bench_worker import WorkerTask
from ..hf.linear_inventory import linear_inventory
from ..hf.pretrained import save_dense, save_packed
from ..hf.targets import resolve_targets
from ..patterns import NMPattern, parse_pattern
from ..reports import BackendRow, CrossingRow, MeasuredSpread, Report, ShapeRow
from .bench_arguments import BenchArguments
from .console import Progress, say
from .measure import prune_by_magnitude
from .models import ModelSource, load_config, load_model, skeleton_of
from .output import weight_bytes

Shapes = dict[LayerShape, int]
ShapeTimes = dict[LayerShape, dict[str, dict[int, Measured]]]


@dataclass(kw_only=True)
class BenchRun:
    """What a run works on, and its report."""

    source: ModelSource
    twin: ModelSource | None  # the same model, dense-stored
    arguments: BenchArguments
    device: torch.device
    rows: list[int]
    backends: list[str]  # of the whole model; empty: not measured
    report: Report
    dtype: torch.dtype | None


def find_shapes(run: BenchRun) -> Shapes:
    """The shapes of the layers that are packed, or that would be."""
    if run.source.kind == "packed":
        asked = None if run.arguments.dtype == "auto" else run.arguments.dtype
        return shapes_of_folder(Path(run.source.name), asked)
    config = load_config(run.source, run.arguments.trust_remote_code)
    kinds = linear_inventory(skeleton_of(config, run.arguments.trust_remote_code))
    found = shapes_of_kinds(kinds, dtype_name(run.dtype or torch.float32))
    if not found:
        raise PatternError(
            f"{run.source.name}: none of its matrices can be packed. See hf-adaptive-sparse analyze for the reasons."
        )
    return found


def measure_shapes(run: BenchRun, shapes: Shapes) -> ShapeTimes:
    """Time every shape, and fill the tables of the report."""
    clock, found = device_clock(run.device), {}
    with Progress("timing layers", len(shapes) * len(run.rows)) as progress:
        for number, shape in enumerate(shapes):
            before = number * len(run.rows)
            found[shape] = time_shape(
                shape, run.rows, run.device, backends=run.arguments.layer_backends,
                repetitions=run.arguments.repetitions, clock=clock, seed=run.arguments.seed,
                on_rows=lambda done, before=before: progress.update(before + done),
            )  # fmt: skip
    for shape, times in found.items():
        _add_shape(run.report, shape, shapes[shape], times)
    return found


def times_to_choose_from(measured: Mapping[str, Mapping[int, Measured]]) -> Times:
    """Without what is dense by another name."""
    return cautious_seconds({name: by_rows for name, by_rows in measured.items() if competes(name)})


def tables(measured: ShapeTimes, device: torch.device) -> dict[TimesKey, Times]:
    """As they are kept in a file."""
    return {key_of(shape, device): times_to_choose_from(times) for shape, times in measured.items()}


def measure_models(run: BenchRun, measured: ShapeTimes, folder: str, measure: Measure | None = None) -> None:
    """Load and run the whole model with every backend, in rounds, and fill the table of the report.

    Args:
        folder: for copies of the model, and for the times that the chosen backends go by.
        measure: in the place of a process, for tests.
    """
    places = _model_folders(run, Path(folder))
    times = save_times(tables(measured, run.device), Path(folder) / "times.json")
    tasks = {
        name: WorkerTask(
            folder=str(places[DENSE if name == DENSE else "packed"]), backend=name, prompt=run.arguments.prompt,
            sequences=run.arguments.sequences, new_tokens=run.arguments.new_tokens, passes=3,
            dtype=run.arguments.dtype, device=str(run.device), threads=torch.get_num_threads(),
            trust_remote_code=run.arguments.trust_remote_code,
        )
        for name in run.backends
    }  # fmt: skip
    with Progress("loading and running models", len(tasks) * run.arguments.rounds) as progress:
        results = measure_rounds(
            tasks, run.arguments.rounds,
            measure or (lambda task: measure_in_process(task, {PATH_VARIABLE: str(times)})),
            lambda done: progress.update(done),
        )  # fmt: skip
    dense_bytes = weight_bytes(places[DENSE])
    for name in tasks:
        size = weight_bytes(tasks[name].folder)
        numbers = {
            key: _record(spread)
            for what, ratio in (
                ("load_seconds", "load_ratio"), ("peak_bytes", "peak_ratio"), ("prefill", "prefill_ratio"),
                ("decode", "decode_ratio"),
            )
            for key, spread in ((what, spread_of(results[name], what)), (ratio, ratio_of(results, name, what)))
        }  # fmt: skip
        run.report.backends.append(
            BackendRow(backend=name, bytes_on_disk=size, disk_ratio=size / dense_bytes, **numbers)
        )


def summarize(run: BenchRun, measured: ShapeTimes) -> list[str]:
    """The verdict in a few lines."""
    lines = []
    for row in run.report.backends[1:]:
        lines.append(
            f"{row.backend}: {row.disk_ratio:.3f} of dense's bytes on disk, {row.load_ratio.median:.2f} of its time to "
            f"load, {row.peak_ratio.median:.2f} of its peak memory, {row.prefill_ratio.median:.2f} times its speed on "
            f"prompts, {row.decode_ratio.median:.2f} times while decoding."
        )
    choices = [choice for times in measured.values() for choice in choose(times_to_choose_from(times)).values()]
    dense = sum(choice.backend == DENSE for choice in choices)
    lines.append(f"Dense is chosen in {dense} of {len(choices)} pairs of shape and rows.")
    best = max(choices, key=lambda choice: choice.speedup)
    if best.backend != DENSE:
        lines.append(f"The largest gain of a layer: {best.speedup:.2f} times dense's speed, by {best.backend}.")
    return lines


def _add_shape(report: Report, shape: LayerShape, layers: int, times: Mapping[str, Mapping[int, Measured]]) -> None:
    known = times_to_choose_from(times)
    chosen = choose(known)
    for rows in sorted(times[DENSE]):
        for name, by_rows in times.items():
            report.shapes.append(
                ShapeRow(
                    shape=shape.shape, dtype=shape.stored_dtype, layers=layers, rows=rows, backend=name,
                    seconds=_record(Spread.of(list(by_rows[rows].seconds))),
                    ratio=_record(by_rows[rows].ratio_to(times[DENSE][rows])), chosen=chosen[rows].backend == name,
                )
            )  # fmt: skip
    for name in times:
        report.crossings += [
            CrossingRow(
                shape=shape.shape, dtype=shape.stored_dtype, backend=name, rows=first, next_rows=second, faster=faster
            )
            for first, second, faster in (crossing_points(known, name) if name != DENSE and name in known else ())
        ]


def _record(spread: Spread) -> MeasuredSpread:
    return MeasuredSpread(median=spread.median, low=spread.low, high=spread.high)


def _model_folders(run: BenchRun, folder: Path) -> dict[str, Path]:
    """The model dense-stored and packed; what is not there is made."""
    given = Path(run.source.name)
    if run.source.kind == "packed" and run.twin is not None:
        return {DENSE: Path(run.twin.name), "packed": given}
    say("making a copy to compare with ...")
    model = load_model(run.source, "auto", "cpu", run.arguments.trust_remote_code)
    if run.source.kind == "packed":
        save_dense(model, folder / "dense")
        return {DENSE: folder / "dense", "packed": given}
    dense = given
    if run.arguments.one_shot is not None:
        pattern = parse_pattern("2:4")
        assert isinstance(pattern, NMPattern)
        prune_by_magnitude(resolve_targets(model, AdaptiveSparseConfig()), pattern)
        save_dense(model, folder / "dense")
        dense = folder / "dense"
    try:
        save_packed(model, folder / "packed")
    except PatternError as problem:
        raise ConfigError(
            f"PATH {run.source.name}: is not 2:4, so it cannot be packed and measured. Prune it first, or measure a "
            "copy with --one-shot magnitude: times do not depend on the values."
        ) from problem
    return {DENSE: dense, "packed": folder / "packed"}
