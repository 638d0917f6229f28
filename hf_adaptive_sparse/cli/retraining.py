"""One retraining run, phase by phase: baselines, training, saving, loading back, measuring, reporting.

`train` and `demo` differ in where the model and the text come from; what happens to them is here.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch
from peft import PeftModel, get_peft_model
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PrinterCallback,
    TrainerCallback,
    TrainerState,
    set_seed,
)

from ..errors import OutputError
from ..hf.callbacks import AdaptiveSparseCallback, last_complete_checkpoint
from ..hf.inspection import inspect_folder
from ..hf.pretrained import save_dense, save_packed
from ..hf.targets import resolve_targets
from ..hf.trainer import AdaptiveSparseTrainer
from ..patterns import NMPattern, parse_pattern
from ..reports import Generation, ModelRow, Report
from .console import Progress, say
from .measure import (
    bytes_in_memory,
    cast_weights,
    continuations,
    logits_of,
    matrix_rows,
    measure_perplexity,
    pruned_by_magnitude,
    zeros_in,
)
from .output import RUN_FILE, clear, weight_bytes
from .recipe import RecipeArguments
from .text import RunText

CHECKPOINTS, PACKED, DENSE = "checkpoints", "packed", "dense"
RESULTS = (CHECKPOINTS, PACKED, DENSE, RUN_FILE, "report.json", "report.html")
_FULL_DISK = 16 * 2**20  # bytes


@dataclass
class Run:
    """What one run works on. Its phases add to `report`."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    text: RunText
    recipe: RecipeArguments
    output: Path
    save: Sequence[str]  # of PACKED and DENSE
    prompts: Sequence[str]
    report: Report
    teacher: PreTrainedModel | None = None  # None: the dense model under the adapter
    dense_bytes: int | None = None  # of the dense model's weight files; None: computed from its weights
    stored_dtype: torch.dtype | None = None  # of the results; None: as the model is in memory
    protocol_file: Path | None = None  # the model's eval_protocol.json, which its sparse copies keep
    texts: dict[str, list[str]] = field(default_factory=dict)

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """One phase: said before it starts, timed in the report."""
        say(f"{name} ...")
        started = time.perf_counter()
        yield
        self.report.seconds[name] = time.perf_counter() - started


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
        _save(run, sparse)
    with run.phase("loading back and measuring"):
        _measure_trained(run, sparse, list(targets), computed)
    run.report.generations = [
        Generation(prompt=prompt, texts={name: texts[index] for name, texts in run.texts.items()})
        for index, prompt in enumerate(run.prompts)
    ]
    run.report.data = run.text.facts
    return run.report


def discard_incomplete_checkpoints(folder: Path) -> Path | None:
    """The newest complete checkpoint, after removing those that were cut short while written or deleted."""
    newest = last_complete_checkpoint(folder)
    for checkpoint in folder.glob("checkpoint-*"):
        if checkpoint != newest:
            shutil.rmtree(checkpoint)
    return newest


def _measure_baselines(run: Run, targets: dict[str, nn.Module], pattern: NMPattern) -> None:
    size = run.dense_bytes or bytes_in_memory(run.model, run.stored_dtype)
    run.report.sizes["dense model"] = size
    _add_row(run, run.model, "dense", targets, bytes_on_disk=size)
    with pruned_by_magnitude(targets, pattern):
        _add_row(run, run.model, f"one-shot magnitude {pattern.name}", targets)


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


def _save(run: Run, sparse: PreTrainedModel) -> None:
    for name, write in ((DENSE, save_dense), (PACKED, save_packed)):
        if name not in run.save:
            clear(run.output, (name,))
            continue
        folder = run.output / name
        write(sparse, folder, tokenizer=run.tokenizer, overwrite=True)
        if run.protocol_file is not None:
            shutil.copyfile(run.protocol_file, folder / run.protocol_file.name)
        run.report.sizes[f"trained, {'packed' if name == PACKED else 'dense-stored'}"] = weight_bytes(folder)


def _measure_trained(run: Run, sparse: PreTrainedModel, names: list[str], computed: torch.dtype) -> None:
    expected = logits_of(sparse, run.text.evaluation)
    for name in run.save:
        folder = run.output / name
        loaded = AutoModelForCausalLM.from_pretrained(folder).to(sparse.device).eval()
        if not torch.equal(logits_of(loaded, run.text.evaluation), expected):
            raise AssertionError(f"{folder}: the model that was loaded back has other logits than the trained one")
    loaded = loaded.to(computed)
    say("loaded back with from_pretrained: logits are bit-equal to those of the trained model")
    _add_row(
        run, loaded, f"trained {run.recipe.pattern} ({run.recipe.mask_policy})",
        {name: loaded.get_submodule(name) for name in names},
        bytes_on_disk=weight_bytes(folder), tokens=run.recipe.tokens,
    )  # fmt: skip
    run.report.matrices = matrix_rows(inspect_folder(folder), names)
    dense, pruned, trained = (row.perplexity for row in run.report.models)
    run.report.summary += [
        f"{len(names)} matrices are exactly {run.recipe.pattern} after {run.recipe.tokens:,} tokens of "
        f"retraining. Perplexity: dense {dense:.4g}, one-shot magnitude {pruned:.4g}, trained {trained:.4g}.",
        f"Saved in {' and '.join(str(run.output / name) for name in run.save)}; loaded back with "
        "from_pretrained, the logits are bit-equal to those of the trained model.",
    ]


def _add_row(run: Run, model: PreTrainedModel, name: str, modules: dict[str, nn.Module], **known: int) -> None:
    result = measure_perplexity(model, run.text.evaluation, name, run.recipe.batch_size)
    run.texts[name] = continuations(model, run.tokenizer, run.prompts)
    row = ModelRow(
        name=name, perplexity=result.perplexity, bits_per_byte=result.bits_per_byte,
        sparsity=zeros_in(modules), **known,
    )  # fmt: skip
    run.report.models.append(row)


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
