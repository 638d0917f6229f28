"""One retraining run, phase by phase: baselines, training, saving, loading back, measuring, reporting.

`train` and `demo` differ in where the model and the text come from; what happens to them is here.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from peft import PeftModel, get_peft_model
from torch import nn
from transformers import (
    PreTrainedModel,
    PrinterCallback,
    TrainerCallback,
    TrainerState,
    set_seed,
)

from ..errors import OutputError
from ..hf.callbacks import AdaptiveSparseCallback, last_complete_checkpoint
from ..hf.inspection import inspect_folder
from ..hf.targets import resolve_targets
from ..hf.trainer import AdaptiveSparseTrainer
from ..patterns import NMPattern, parse_pattern
from ..reports import Report
from .console import Progress, say
from .measure import (
    cast_weights,
    matrix_rows,
    pruned_by_magnitude,
)
from .output import RUN_FILE, weight_bytes
from .recipe import RecipeArguments
from .results import DENSE, PACKED, Results

CHECKPOINTS = "checkpoints"
RESULTS = (CHECKPOINTS, PACKED, DENSE, RUN_FILE, "report.json", "report.html")
_FULL_DISK = 16 * 2**20  # bytes


@dataclass(kw_only=True)
class Run(Results):
    """What one retraining run works on."""

    recipe: RecipeArguments
    teacher: PreTrainedModel | None = None  # None: the dense model under the adapter


def retrain(run: Run) -> Report:
    """Run all phases; the report is complete, and not yet written."""
    config = run.recipe.adapter_config()
    targets = resolve_targets(run.model, config)
    pattern = parse_pattern(run.recipe.pattern)
    assert isinstance(pattern, NMPattern)
    with run.phase("measuring the dense model and one-shot magnitude pruning"):
        _measure_baselines(run, targets, pattern)
    with run.phase("training"):
        trained = _train(run)
    # The Trainer left it on its device; the dense weights under the adapter are overwritten here.
    sparse = trained.merge_and_unload().eval()
    computed = sparse.dtype
    cast_weights(sparse, run.stored_dtype or computed)
    with run.phase("saving"):
        run.save_model(sparse, "trained")
    with run.phase("loading back and measuring"):
        _measure_trained(run, sparse, list(targets), computed)
    return run.finish()


def discard_incomplete_checkpoints(folder: Path) -> Path | None:
    """The newest complete checkpoint, after removing those that were cut short while written or deleted."""
    newest = last_complete_checkpoint(folder)
    for checkpoint in folder.glob("checkpoint-*"):
        if checkpoint != newest:
            shutil.rmtree(checkpoint)
    return newest


def _measure_baselines(run: Run, targets: dict[str, nn.Module], pattern: NMPattern) -> None:
    run.measure_dense(targets)
    with pruned_by_magnitude(targets, pattern):
        run.measure(run.model, f"one-shot magnitude {pattern.name}", targets)


def _train(run: Run) -> PeftModel:
    set_seed(run.recipe.seed)
    folder = run.output / CHECKPOINTS
    checkpoint = discard_incomplete_checkpoints(folder)
    if checkpoint is not None:
        say(f"continuing from {checkpoint}")
    model = get_peft_model(run.model, run.recipe.adapter_config())
    trainer = AdaptiveSparseTrainer(
        model=model,
        args=run.recipe.training_arguments(folder, model),
        train_dataset=run.text.train,
        distillation=run.recipe.distillation(),
        teacher="self" if run.teacher is None else run.teacher,
    )
    trainer.remove_callback(PrinterCallback)
    run.report.settings["learning_rate"] = trainer.args.learning_rate
    if checkpoint is not None and checkpoint.name == f"checkpoint-{run.recipe.steps}":
        # Nothing is left to train, and the Trainer would do one more step.
        model.load_adapter(str(checkpoint), model.active_adapter, is_trainable=True)
        state = TrainerState.load_from_json(str(checkpoint / "trainer_state.json"))
        refreshes = state.stateful_callbacks[AdaptiveSparseCallback.__name__]["attributes"]["history"]
    else:
        with Progress("training", run.recipe.steps) as progress, _full_disk_is_said(folder):
            trainer.add_callback(_ShowProgress(progress))
            trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
        state, refreshes = trainer.state, trainer.mask_callback.history
    run.report.history = [entry for entry in state.log_history if "loss" in entry]
    for refresh in refreshes:
        for layer, rate in refresh["flip_rates"].items():
            run.report.flips.setdefault(layer, []).append((refresh["step"], rate))
    return model


def _measure_trained(run: Run, sparse: PreTrainedModel, names: list[str], computed: torch.dtype) -> None:
    loaded, folder = run.load_back(sparse, "trained")
    loaded = loaded.to(computed)
    run.measure(
        loaded, f"trained {run.recipe.pattern} ({run.recipe.mask_policy})",
        {name: loaded.get_submodule(name) for name in names},
        bytes_on_disk=weight_bytes(folder), tokens=run.recipe.tokens,
    )  # fmt: skip
    run.report.matrices = matrix_rows(inspect_folder(folder), names)
    dense, pruned, trained = (row.perplexity for row in run.report.models)
    run.report.summary += [
        f"{len(names)} matrices are exactly {run.recipe.pattern} after {run.recipe.tokens:,} tokens of "
        f"retraining. Perplexity: dense {dense:.4g}, one-shot magnitude {pruned:.4g}, trained {trained:.4g}.",
        run.saved_line("trained"),
    ]


@contextmanager
def _full_disk_is_said(folder: Path) -> Iterator[None]:
    # torch and safetensors each have their own way to say that a write failed.
    try:
        yield
    except Exception as problem:
        full = folder.is_dir() and shutil.disk_usage(folder).free < _FULL_DISK
        if not full or isinstance(problem, OutputError):
            raise
        raise OutputError(
            f"{folder}: the disk is full, and the run stopped while it wrote a checkpoint. The last complete "
            "one is kept: free some space, then run the same command with --resume."
        ) from problem


class _ShowProgress(TrainerCallback):
    def __init__(self, progress: Progress) -> None:
        self.progress = progress
        self.note = ""

    def on_log(self, args, state, control, logs=None, **kwargs) -> None:
        if logs and "loss" in logs:
            parts = {"loss": "loss", "kd": "loss/kd", "lr": "learning_rate"}
            self.note = ", ".join(f"{name} {logs[key]:.3g}" for name, key in parts.items() if key in logs)

    def on_step_end(self, args, state, control, **kwargs) -> None:
        self.progress.update(state.global_step, self.note)
