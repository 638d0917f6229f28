"""One shrinking run, phase by phase: the dense model, pruning (between steps of training), saving, loading back."""

from __future__ import annotations

import copy
from dataclasses import asdict, replace
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PrinterCallback, set_seed

from ..hf.blocks import block_linears, find_blocks
from ..hf.evaluation import perplexity
from ..hf.shrink import Shrinker, ShrinkReport, kv_values
from ..hf.shrink_training import ShrinkCallback, ShrinkTrainer
from ..hf.shrunk_export import ExportResult, export_shrunk
from ..reports import Report, StageRow, WidthRow
from .console import Progress, say
from .learning import learn_units, progress_of
from .measure import cast_weights, logits_of
from .output import RUN_FILE, weight_bytes
from .retraining import CHECKPOINTS, ShowProgress, discard_incomplete_checkpoints, full_disk_is_said
from .shrink_run import ShrinkRun

SHRUNK = "shrunk"
RESULTS = (CHECKPOINTS, SHRUNK, RUN_FILE, "report.json", "report.html")
JUDGE_WINDOWS = 64  # of the evaluation text, for the perplexity around every stage
# Of the largest logit, in float32: the same sums, or sums that zeros make longer, which may be split differently.
TOLERANCE = {"stock": 1e-6, "per_layer": 1e-6, "padded": 1e-4}


def run_shrinking(run: ShrinkRun) -> Report:
    """Run all phases; the report is complete, and not yet written."""
    with run.phase("measuring the dense model"):
        run.measure_dense(_linears(run.model))
        run.report.models[-1] = _with_parameters(run.report.models[-1], run.model)
        cache, weights = kv_values(run.model), linear_weights(run.model)
    if run.budget.steps:
        with run.phase("pruning between steps of training" if run.config.stages > 1 else "pruning, then training"):
            found = _train(run)
    else:
        with run.phase("pruning"):
            found = _prune(run)
    model = run.model.eval()
    computed = model.dtype
    cast_weights(model, run.stored_dtype or computed)
    with run.phase("saving"):
        saved = _save(run, found)
    if run.is_learned:
        progress_of(run, 1).remove()
    with run.phase("loading back and measuring"):
        loaded = _load_back(run, saved)
        name = f"shrunk to {saved.parameters / found.dense_parameters:.1%}"
        run.measure(
            loaded.to(computed), name, _linears(loaded), bytes_on_disk=weight_bytes(saved.folder),
            **({"tokens": run.budget.tokens} if run.budget.steps else {}),
        )  # fmt: skip
        run.report.models[-1] = _with_parameters(run.report.models[-1], loaded)
    if run.report.stages:
        last = run.report.stages[-1]
        run.report.stages[-1] = replace(last, recovered=_judged(run, loaded))
    run.report.widths = _width_rows(run, found)
    run.report.importance = [step.importance for step in found.steps]
    run.report.summary += [
        f"{found.dense_parameters:,} parameters became {saved.parameters:,} "
        f"({saved.parameters / found.dense_parameters:.1%}); of the weights in the linear layers of the blocks "
        f"{linear_weights(loaded) / weights:.1%} are left, of the KV cache of a token {kv_values(loaded) / cache:.1%}.",
        *_padding(found, saved),
        f"Saved in {saved.folder} as {saved.architecture} ({_FORMS[saved.form]}).",
        *(f"Not as {name}: {reason}" for name, reason in saved.refused.items()),
    ]
    return run.finish()


_FORMS = {
    "stock": "a checkpoint that plain transformers opens",
    "per_layer": "opens after `import hf_adaptive_sparse`",
    "padded": "every block padded with zeros to the widest, which plain transformers opens",
}


def _padding(found: ShrinkReport, saved: ExportResult) -> list[str]:
    if saved.form != "padded":
        return []
    return [f"Without the units of zeros that pad it: {found.parameters:,} parameters, and the widths shown below."]


def linear_weights(model: nn.Module) -> int:
    """Weights of the linear layers of all blocks: half of the operations of a token, but for attention and head."""
    return sum(module.weight.numel() for module in _linears(model).values())


def _prune(run: ShrinkRun) -> ShrinkReport:
    shrinker = Shrinker(run.model, run.calibration, run.config, batch_size=run.calibration_batch)
    if run.is_learned:
        learn_units(run, shrinker)
        return shrinker.report()
    most = shrinker.dense_parameters - shrinker.target
    with Progress("removing parameters", most) as progress:
        shrinker.shrink_to(
            shrinker.target,
            on_step=lambda step: progress.update(min(most, shrinker.dense_parameters - step.parameters)),
        )
    return shrinker.report()


def _train(run: ShrinkRun) -> ShrinkReport:
    set_seed(run.budget.seed)
    folder = run.output / CHECKPOINTS
    checkpoint = discard_incomplete_checkpoints(folder)
    if checkpoint is not None:
        say(f"continuing from {checkpoint}")
    teacher = copy.deepcopy(run.model) if run.distill else None
    judge = run.text.evaluation.select(slice(0, JUDGE_WINDOWS))
    callback = ShrinkCallback(
        run.model, run.calibration, run.config, judge=judge, batch_size=run.calibration_batch
    )  # fmt: skip
    weights = [module.weight for module in _linears(run.model).values()]
    use_cpu = run.model.device.type == "cpu"
    trainer = ShrinkTrainer(
        run.model,
        run.budget.training_arguments(folder, weights, use_cpu=use_cpu),
        shrink=callback,
        train_dataset=run.text.train,
        **({"distillation": run.budget.distillation(), "teacher": teacher} if teacher is not None else {}),
    )
    trainer.remove_callback(PrinterCallback)
    run.report.settings["learning_rate"] = trainer.args.learning_rate
    if checkpoint is None and run.is_learned:
        learn_units(run, callback.shrinker)
    if checkpoint is not None and checkpoint == folder / f"checkpoint-{run.budget.steps}":
        trainer._load_from_checkpoint(str(checkpoint))  # nothing is left to train
    else:
        with Progress("training", run.budget.steps) as progress, full_disk_is_said(folder):
            trainer.add_callback(ShowProgress(progress))
            trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    run.report.history = [entry for entry in trainer.state.log_history if "loss" in entry]
    run.report.stages = stage_rows(callback.history)
    return callback.report()


def stage_rows(history: list[dict[str, Any]]) -> list[StageRow]:
    """Each stage with what it was repaired to when the next came; of the last one that is not known here."""
    repaired = [*(entry["before"] for entry in history[1:]), *([None] if history else [])]
    return [
        StageRow(
            step=entry["step"], parameters=entry["parameters"], before=entry["before"], after=entry["after"],
            recovered=recovered,
        )
        for entry, recovered in zip(history, repaired, strict=True)
    ]  # fmt: skip


def _save(run: ShrinkRun, found: ShrinkReport) -> ExportResult:
    manifest = {
        "kept": found.kept,
        "method": _method(run),
        "parent": run.parent,
        "dense_parameters": found.dense_parameters,
        "seed": run.budget.seed,
        "tokens": run.budget.tokens,
    }
    saved = export_shrunk(
        run.model, run.output / SHRUNK, form=run.form, manifest=manifest, remote_code=run.remote_code,
        tokenizer=run.tokenizer, overwrite=True,
    )  # fmt: skip
    run.copy_protocol(saved.folder)
    run.report.sizes["shrunk"] = weight_bytes(saved.folder)
    return saved


def _method(run: ShrinkRun) -> dict[str, Any]:
    if run.shape is not None:
        assert run.gates is not None
        return {"shape": run.shape, "gates": asdict(run.gates)}
    if run.policy is not None:
        return {"target": run.config.target, "score": run.config.score, "policy": asdict(run.policy)}
    return asdict(run.config)


def _load_back(run: ShrinkRun, saved: ExportResult) -> Any:
    expected = logits_of(run.model, run.text.evaluation)
    loaded = AutoModelForCausalLM.from_pretrained(saved.folder).to(run.model.device).eval()
    found = logits_of(loaded, run.text.evaluation)
    worst = float((found - expected).abs().max() / expected.abs().max().clamp(min=1.0))
    limit = TOLERANCE[saved.form] if run.model.dtype == torch.float32 else 4 * torch.finfo(run.model.dtype).eps
    if not worst <= limit:
        raise AssertionError(f"{saved.folder}: the model that was loaded back has other logits, by {worst:.2g}")
    say(f"loaded back with from_pretrained: logits differ by at most {worst:.1g} of the largest")
    return loaded


def _linears(model: nn.Module) -> dict[str, nn.Module]:
    stack = find_blocks(model)
    members = [member for index in range(len(stack.blocks)) for member in block_linears(stack, index).values()]
    return {member.name: member for member in members}


def _judged(run: ShrinkRun, model: Any) -> float:
    judge = run.text.evaluation.select(slice(0, JUDGE_WINDOWS))
    return perplexity(model, judge, batch_size=run.batch_size).perplexity


def _with_parameters(row: Any, model: nn.Module) -> Any:
    return replace(row, parameters=sum(each.numel() for each in model.parameters()), sparsity=None)


def _width_rows(run: ShrinkRun, found: ShrinkReport) -> list[WidthRow]:
    layers = found.kept[find_blocks(run.model).name]
    left = dict(zip(layers, found.widths, strict=True))
    rows = []
    for block, before in enumerate(found.dense_widths):
        after = left.get(block, dict.fromkeys(before, 0))
        rows.append(
            WidthRow(
                block=block,
                dense_heads=before["num_attention_heads"],
                heads=after["num_attention_heads"],
                dense_kv_heads=before["num_key_value_heads"],
                kv_heads=after["num_key_value_heads"],
                dense_channels=before.get("intermediate_size", 0),
                channels=after.get("intermediate_size", 0),
            )
        )
    return rows
