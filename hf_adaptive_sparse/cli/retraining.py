"""One retraining run, phase by phase: baselines, training, saving, loading back, measuring, reporting.

`train` and `demo` differ in where the model and the text come from; what happens to them is here.
"""

from __future__ import annotations

import copy
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
from ..hf.blocks import block_linears, find_blocks
from ..hf.callbacks import AdaptiveSparseCallback, last_complete_checkpoint
from ..hf.inspection import inspect_folder
from ..hf.one_shot import one_shot
from ..hf.sparse_layers import sparse_layers
from ..hf.targets import resolve_targets
from ..hf.trainer import AdaptiveSparseTrainer
from ..hf.warm_start import warm_start
from ..methods.one_shot import METHODS, OneShotConfig
from ..patterns import NMPattern, parse_pattern
from ..reports import Report
from .console import Progress, say
from .measure import (
    cast_weights,
    matrix_rows,
    pruned_by_magnitude,
)
from .models import find_model, load_model
from .output import RUN_FILE, weight_bytes
from .recipe import RecipeArguments
from .results import DENSE, PACKED, Results

CHECKPOINTS = "checkpoints"
RESULTS = (CHECKPOINTS, PACKED, DENSE, RUN_FILE, "report.json", "report.html")
CALIBRATION_WINDOWS = 128  # of the training text, for a start that was pruned in one shot
_FULL_DISK = 16 * 2**20  # bytes


@dataclass(kw_only=True)
class Run(Results):
    """What one retraining run works on."""

    recipe: RecipeArguments
    teacher: PreTrainedModel | None = None  # None: the dense model under the adapter
    start: PreTrainedModel | None = None  # the pruned copy of the model that the recipe names, if it names one


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


def load_start(recipe: RecipeArguments, model: PreTrainedModel) -> PreTrainedModel | None:
    """The pruned copy of `model` in a folder, if training starts from one, in the same dtype and on the same device."""
    if recipe.init == "magnitude" or recipe.init in METHODS:
        return None
    say(f"loading {recipe.init} ...")
    return load_model(find_model(recipe.init, "--init"), str(model.dtype).removeprefix("torch."), str(model.device))


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
    start = None if run.recipe.init == "magnitude" else _pruned_start(run)
    model = get_peft_model(run.model, run.recipe.adapter_config())
    weights = [layer.weight for layer in sparse_layers(model)]
    trainer = AdaptiveSparseTrainer(
        model=model,
        args=run.recipe.training_arguments(folder, weights, use_cpu=model.device.type == "cpu"),
        train_dataset=run.text.train,
        distillation=run.recipe.distillation(),
        teacher="self" if run.teacher is None else run.teacher,
    )
    trainer.remove_callback(PrinterCallback)
    run.report.settings["learning_rate"] = trainer.args.learning_rate
    if start is not None and checkpoint is None:  # after the learning rate was taken from the size of the dense weights
        warm_start(model, start)
    if checkpoint is not None and checkpoint.name == f"checkpoint-{run.recipe.steps}":
        # Nothing is left to train, and the Trainer would do one more step.
        model.load_adapter(str(checkpoint), model.active_adapter, is_trainable=True)
        state = TrainerState.load_from_json(str(checkpoint / "trainer_state.json"))
        refreshes = state.stateful_callbacks[AdaptiveSparseCallback.__name__]["attributes"]["history"]
    else:
        with Progress("training", run.recipe.steps) as progress, full_disk_is_said(folder):
            trainer.add_callback(ShowProgress(progress))
            trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
        state, refreshes = trainer.state, trainer.mask_callback.history
    run.report.history = [entry for entry in state.log_history if "loss" in entry]
    for refresh in refreshes:
        for layer, rate in refresh["flip_rates"].items():
            run.report.flips.setdefault(layer, []).append((refresh["step"], rate))
    return model


def _pruned_start(run: Run) -> PreTrainedModel:
    """What the model becomes in one shot, or the pruned copy of it in a folder; it gets a row in the report."""
    init, pattern = run.recipe.init, run.recipe.pattern
    targets = list(resolve_targets(run.model, run.recipe.adapter_config()))
    if init in METHODS:
        pruned = copy.deepcopy(run.model)
        with run.phase(f"one-shot pruning by {init}"):
            calibration = run.text.train.select(slice(0, CALIBRATION_WINDOWS))
            one_shot(
                pruned, calibration, OneShotConfig(method=init, pattern=pattern), batch_size=run.recipe.batch_size,
                skip=_other_linears(pruned, targets), seed=run.recipe.seed,
            )  # fmt: skip
        name = f"one-shot {init} {pattern}"
    else:
        assert run.start is not None
        pruned, name = run.start, f"start: {Path(init).name}"
    run.measure(pruned, name, {name: pruned.get_submodule(name) for name in targets})
    return pruned


def _other_linears(model: PreTrainedModel, targets: list[str]) -> list[str]:
    """Full names of the weights of the blocks that do not become sparse."""
    stack = find_blocks(model)
    every = [name for index in range(len(stack.blocks)) for name in block_linears(stack, index)]
    return [name for name in every if name not in set(targets)]


def _measure_trained(run: Run, sparse: PreTrainedModel, names: list[str], computed: torch.dtype) -> None:
    loaded, folder = run.load_back(sparse, "trained")
    loaded = loaded.to(computed)
    run.measure(
        loaded, f"trained {run.recipe.pattern} ({run.recipe.mask_policy})",
        {name: loaded.get_submodule(name) for name in names},
        bytes_on_disk=weight_bytes(folder), tokens=run.recipe.tokens,
    )  # fmt: skip
    run.report.matrices = matrix_rows(inspect_folder(folder), names)
    found = ", ".join(f"{row.name} {row.perplexity:.4g}" for row in run.report.models)
    run.report.summary += [
        f"{len(names)} matrices are exactly {run.recipe.pattern} after {run.recipe.tokens:,} tokens of "
        f"retraining. Perplexity: {found}.",
        run.saved_line("trained"),
    ]


@contextmanager
def full_disk_is_said(folder: Path) -> Iterator[None]:
    """A write that failed for want of space, in the words of a user."""
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


class ShowProgress(TrainerCallback):
    """Optimizer steps on the screen, with the last losses."""

    def __init__(self, progress: Progress) -> None:
        self.progress = progress
        self.note = ""

    def on_log(self, args, state, control, logs=None, **kwargs) -> None:
        if logs and "loss" in logs:
            parts = {"loss": "loss", "kd": "loss/kd", "lr": "learning_rate"}
            self.note = ", ".join(f"{name} {logs[key]:.3g}" for name, key in parts.items() if key in logs)

    def on_step_end(self, args, state, control, **kwargs) -> None:
        self.progress.update(state.global_step, self.note)
