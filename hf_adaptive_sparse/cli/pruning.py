"""One pruning run, phase by phase: baselines, pruning, saving, loading back, measuring, reporting."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from ..errors import TrainingError
from ..hf.blocks import Member, find_blocks
from ..hf.calibration import walk_blocks
from ..hf.inspection import inspect_folder
from ..hf.one_shot import one_shot, prunable_members
from ..hf.one_shot_plan import OneShotPlan, linear_flops, measured_rate, shared_gram_flops
from ..hf.one_shot_report import MatrixResult, OneShotReport
from ..hf.walk_progress import PruningProgress
from ..methods.one_shot import MIXED, OneShotConfig
from ..patterns import Unstructured, parse_pattern
from ..reports import PruningRow, Report
from ..reports.text import human_bytes, human_flops, human_seconds, percent
from .console import Progress
from .measure import cast_weights, matrix_rows
from .output import RUN_FILE, weight_bytes
from .results import DENSE, PACKED, Results

PROGRESS = "progress"
JUDGED = ("dense", "pruned by magnitude", "pruned")
# The page first: where it is, a run is complete.
RESULTS = ("report.html", RUN_FILE, PROGRESS, PACKED, DENSE, "report.json")


@dataclass(kw_only=True)
class PruneRun(Results):
    """What one pruning run works on."""

    config: OneShotConfig
    skip: Collection[str]
    seed: int
    device: torch.device
    offload: str


def prune(run: PruneRun) -> Report:
    """Run all phases; the report is complete, and not yet written."""
    members = prunable_members(find_blocks(run.model), run.skip)
    with run.phase("measuring the dense model and one-shot magnitude pruning"):
        try:
            run.measure_dense(members)
        except TrainingError:
            _refuse_not_finite(run)
            raise
        with _pruned_by_magnitude(members, run.config) as name:
            run.measure(run.model, f"one-shot magnitude {name}", members)
    with run.phase("pruning"):
        found = _prune(run)
    computed = run.model.dtype
    cast_weights(run.model, run.stored_dtype or computed)
    with run.phase("saving"):
        _save(run, found)
    with run.phase("loading back and measuring"):
        loaded, folder = run.load_back(run.model, "pruned")
        name = f"{run.config.method} {described(run.config)}"
        run.measure(loaded.to(computed), name, members, bytes_on_disk=weight_bytes(folder))
    names = {member.partition("[")[0] for member in members}
    run.report.matrices = matrix_rows(inspect_folder(folder), names)
    run.report.pruning = [_row(matrix) for matrix in found.matrices]
    run.report.settings |= {f"{name} (in use)": part for name, part in dataclasses.asdict(run.config.resolved).items()}
    run.report.summary += _summary(run, found)
    return run.finish()


def _refuse_not_finite(run: PruneRun) -> None:
    """Raise CalibrationError, naming block and module, where activations of the evaluation text are NaN or inf."""
    settings = {"batch_size": run.batch_size, "device": run.device, "offload": run.offload, "skip": run.skip}
    for _ in walk_blocks(run.model, run.text.evaluation, needs={"squares"}, propagate="dense", **settings):
        pass


def described(config: OneShotConfig) -> str:
    """What a run makes of the weights, in a few words: "2:4", "unstructured 60 %", "2:4, 4 bits"."""
    words = config.pattern
    if config.pattern == MIXED:
        words = f"mixed ({', '.join(config.levels.split(','))}) {100 * config.target:g} %"
    elif config.pattern == "unstructured":
        words = f"unstructured {100 * config.target:g} %"
    return f"{words}, {config.bits} bits" if config.bits else words


def cost_lines(
    plan: OneShotPlan, device: torch.device, dtype: torch.dtype, judged: int, judge: torch.device
) -> dict[str, object]:
    """The predicted cost, for the plan on the screen; docs/prune_costs.md says what each number is.

    Args:
        judged: windows of the evaluation text.
        judge: where their perplexity is measured.
    """
    model_rate, float32_rate = measured_rate(device, dtype), measured_rate(device, torch.float32)
    seconds = plan.seconds(model_rate, float32_rate)
    rates = [f"{human_flops(float32_rate)}/s in float32"]
    if dtype != torch.float32:
        rates.append(f"{human_flops(model_rate)}/s in {str(dtype).removeprefix('torch.')}")
    lines: dict[str, object] = {
        "cost": f"{human_flops(sum(plan.flops.values()))} to prune, at least {human_seconds(sum(seconds.values()))}",
        "": f"operations by the rate of large products just measured on {device}, {', '.join(rates)}; small kernels "
        "and moving data come on top",
    }
    judging = len(JUDGED) * judged * plan.window_flops
    judge_rate = model_rate if judge == device else measured_rate(judge, dtype)
    for term, flops in plan.flops.items():
        lines[f"- {term}"] = f"{human_flops(flops)}, {human_seconds(seconds[term])}"
    linears = human_flops(linear_flops(plan.blocks, plan.tokens))
    lines["- forward passes"] = (
        f"{lines['- forward passes']} (a window through a block, {plan.passes:,} times; "
        f"all windows once through the linear layers: {linears})"
    )
    if "Gram matrices" in plan.flops:
        shared = human_flops(shared_gram_flops(plan.blocks, plan.tokens))
        each = human_flops(shared_gram_flops(plan.blocks, plan.tokens, per_matrix=True))
        lines["- Gram matrices"] = f"{lines['- Gram matrices']} (in full {shared}; one for each matrix: {each})"
    lines["judging"] = (
        f"{human_flops(judging)}, at least {human_seconds(judging / judge_rate)} on {judge}: perplexity of "
        f"{len(JUDGED)} models ({', '.join(JUDGED)}) on {judged} windows"
    )
    packed = "" if plan.packed_bytes is None else f", {human_bytes(plan.packed_bytes)} packed"
    lines["results"] = f"{human_bytes(plan.stored_bytes)} dense-stored{packed}"
    for offload, size in plan.device_bytes.items():
        waiting, where = plan.host_bytes[offload], f"on {device}"
        if device.type == "cpu":
            size, waiting, where = plan.memory_bytes[offload], 0, "in memory"
        elsewhere = ((waiting, "memory"), (plan.file_bytes[offload], "files"))
        beside = "".join(f", and {human_bytes(amount)} in {place}" for amount, place in elsewhere if amount)
        lines[f"peak memory, offload {offload}"] = f"about {human_bytes(size)} {where}{beside}"
    return lines


@contextmanager
def _pruned_by_magnitude(members: Mapping[str, Member], config: OneShotConfig) -> Iterator[str]:
    """The smallest weights are zero inside the block: of every group, or with no one n:m pattern of every matrix."""
    pattern = Unstructured() if config.pattern == MIXED else parse_pattern(config.pattern)
    before = {name: member.weight.clone() for name, member in members.items()}
    try:
        for name, member in members.items():
            keep = pattern.keep_mask(before[name].abs(), config.target)
            member.set_weight(torch.where(keep, before[name], 0.0))
        yield pattern.name if pattern.name == config.pattern != "unstructured" else f"{100 * config.target:g} %"
    finally:
        for name, member in members.items():
            member.set_weight(before[name])


def _prune(run: PruneRun) -> OneShotReport:
    blocks = len(find_blocks(run.model).blocks)
    with Progress("pruning block", blocks) as progress:
        found = one_shot(
            run.model, run.text.train, run.config, batch_size=run.batch_size, device=run.device, offload=run.offload,
            skip=run.skip, seed=run.seed, progress=PruningProgress(run.output / PROGRESS),
            on_block=lambda done, _: progress.update(done),
        )  # fmt: skip
    run.report.seconds |= {f"of this, {phase}": seconds for phase, seconds in found.seconds.items()}
    return found


def _save(run: PruneRun, found: OneShotReport) -> None:
    about = {"method": run.config.method, "pattern": run.config.pattern, "sparsity": found.realised}
    run.save_model(run.model, "pruned", {"one_shot": about}, quantized=found.quantized)


def _row(matrix: MatrixResult) -> PruningRow:
    values = {name: value for name, value in vars(matrix).items() if name != "name"}
    return PruningRow(module=matrix.name, **values)


def _summary(run: PruneRun, found: OneShotReport) -> list[str]:
    dense, magnitude, pruned = (row.perplexity for row in run.report.models)
    rows = found.matrices
    lines = [
        f"{len(rows)} matrices pruned by {run.config.method} to {described(run.config)}, without training: "
        f"{percent(found.realised)} zeros, {percent(found.target)} asked for"
        f"{', and what rounds to zero' * bool(run.config.bits)}. Perplexity: dense {dense:.4g}, one-shot magnitude "
        f"{magnitude:.4g}, {run.config.method} {pruned:.4g}.",
        run.saved_line("pruned"),
        f"Peak memory of the process on {run.device}: {human_bytes(found.peak_bytes)}.",
    ]
    usual = f"damping {run.config.damping:g}"
    harder = [f"{row.name} ({row.rung})" for row in rows if row.rung not in ("", usual)]
    if harder:
        lines.append(
            f"{len(harder)} matrices have inputs whose Gram matrix took more than {usual} to factor: "
            f"{', '.join(harder[:5])}{', ...' if len(harder) > 5 else ''}."
        )
    mixed = [row for row in rows if row.shrinkage]
    if mixed:
        fewest = min(mixed, key=lambda row: row.tokens)
        lines.append(
            f"{len(mixed)} matrices of experts saw few tokens of their own (the fewest: {fewest.tokens} in "
            f"{fewest.name}); statistics of all tokens of the layer were mixed into theirs."
        )
    return lines
