"""Pruning interleaved with training (Adapt-Accel): a callback for the stages, and a Trainer that can resume them."""

from __future__ import annotations

import json
import os
import re
import tempfile
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_model, save_model
from torch import Tensor, nn
from torch.optim import Optimizer
from transformers import PreTrainedModel, Trainer, TrainerCallback, TrainerState
from transformers.trainer import TRAINING_ARGS_NAME

from ..errors import ConfigError, FormatError
from ..methods.adaptive_width.config import ShrinkConfig, Stage, plan_stages
from .data import WindowDataset
from .evaluation import perplexity
from .files import atomic_write
from .mask_state import mark_complete, mark_incomplete
from .optimizer_state import forget_moments, tried_state, uncut
from .shrink import Shrinker, ShrinkReport
from .shrunk_export import export_shrunk
from .trainer import DistillationConfig, DistillationMixin

WEIGHTS_FILE = "model.safetensors"
STATE_FILE = "shrink_state.json"
# What an earlier `save_model` into the same folder may have left there.
_WEIGHTS_FILES = re.compile(r"model(-\d+-of-\d+)?\.safetensors(\.index\.json)?")


class ShrinkCallback(TrainerCallback):
    """Prunes the model a Trainer trains, at the steps that `plan_stages` says, and cuts the optimizer's state alike.

    Add it to a stock Trainer of one process, or use ShrinkTrainer, which can also resume: a stock Trainer saves a
    checkpoint with the config of a model whose blocks may differ, and would load it into the dense model. What it has
    trained is saved with `export_shrunk`.

    Every stage forgets which checkpoint was the best so far, for smaller models are worse: `load_best_model_at_end`
    takes the best since the last stage, and `save_total_limit` does not spare an earlier one.

    Args:
        model: the dense model that the Trainer gets.
        windows: [windows, length] calibration tokens.
        config: how.
        judge: windows of other text; the perplexity on them is measured before and after every stage.
        batch_size: windows in a calibration pass.
    Attributes:
        shrinker: what it prunes with; `shrinker.report()` says what happened.
        history: one entry per stage that was done: optimizer `step`, `parameters`, and with `judge` the perplexities
            `before` and `after` it.
    Raises:
        ConfigError: a config of `bias_repair`, whose biases nothing would train; when training begins, a target that
            cannot be reached, or an optimizer whose state cannot be cut at a stage after the first step.
    """

    def __init__(
        self,
        model: nn.Module,
        windows: WindowDataset | Tensor,
        config: ShrinkConfig | None = None,
        *,
        judge: WindowDataset | None = None,
        batch_size: int = 4,
    ) -> None:
        self.config = (config or ShrinkConfig()).settled(trains=True)
        if self.config.bias_repair:
            raise ConfigError(
                "bias_repair puts what removed units had on average into a bias, and training repairs that by itself. "
                "Leave it out, or prune without training with `shrink`."
            )
        self.shrinker = Shrinker(model, windows, self.config, batch_size=batch_size)
        self.judge = judge
        self.history: list[dict[str, float]] = []
        self._stages: list[Stage] = []

    def report(self) -> ShrinkReport:
        """What was removed so far."""
        return self.shrinker.report()

    def on_train_begin(self, args, state, control, optimizer=None, **kwargs) -> None:
        for setting, wrong in (
            ("a run of several processes", args.world_size > 1),
            ("torch_compile", args.torch_compile),
            ("DeepSpeed", bool(getattr(args, "deepspeed", None))),
        ):
            if wrong:
                raise ConfigError(
                    f"{setting} keeps the shapes that parameters had at the start, and stages change them. Train on "
                    "one device without it."
                )
        shrinker = self.shrinker
        if not shrinker.shaped:  # a learner has chosen already what goes
            shrinker.check_target()
            self._stages = plan_stages(state.max_steps, shrinker.dense_parameters, shrinker.target, self.config)
        if optimizer is not None and not self.config.reset_moments:
            self._check_optimizer(_inner(optimizer))
        # Of a checkpoint that was written before stages forgot it.
        if self.history and (state.best_global_step or 0) <= self.history[-1]["step"]:
            _forget_best(state)

    def on_step_begin(self, args, state, control, optimizer=None, **kwargs) -> None:
        while len(self.history) < len(self._stages) and self._stages[len(self.history)].step <= state.global_step:
            stage = self._stages[len(self.history)]
            entry: dict[str, float] = {"step": stage.step}
            if self.judge is not None:
                entry["before"] = self._perplexity(args)
            inner = _inner(optimizer)
            if self.config.reset_moments and inner is not None:
                forget_moments(inner)  # first, for some of them could not be cut
            self.shrinker.shrink_to(stage.parameters, inner)
            _forget_best(state)
            entry["parameters"] = self.shrinker.parameters
            if self.judge is not None:
                entry["after"] = self._perplexity(args)
            self.history.append(entry)

    def state_dict(self) -> dict[str, Any]:
        """Plain JSON."""
        return {
            "config": asdict(self.config),
            "history": self.history,
            "shrinker": self.shrinker.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Make the dense model as small as it was; its weights are to be loaded afterwards.

        Raises:
            ConfigError: the config was another one; each setting that differs is named.
        """
        now, then = asdict(self.config), state["config"]
        if differing := [
            f"{name} was {then.get(name)!r} and is {now.get(name)!r}"
            for name in sorted(now.keys() | then.keys())
            if now.get(name) != then.get(name)
        ]:
            raise ConfigError(f"cannot resume with other settings: {'; '.join(differing)}. Use the old ones.")
        self.shrinker.load_state_dict(state["shrinker"])
        self.history = [dict(entry) for entry in state["history"]]

    def _check_optimizer(self, optimizer: Optimizer) -> None:
        late = [stage for stage in self._stages[len(self.history) :] if stage.step > 0]
        if not late:  # there is no state before the first step
            return
        for weight, state in tried_state(optimizer).items():
            for key, value in uncut(weight, state).items():
                raise ConfigError(
                    f"optimizer: for a weight of {list(weight.shape)} {type(optimizer).__name__} keeps {key} of "
                    f"{list(value.shape)}, which cannot be cut with the weight at the stage after step {late[0].step}. "
                    "Train with optim='adamw_torch'; or set reset_moments=True in the ShrinkConfig, which forgets it "
                    "at every stage, or stages=1, which prunes before the first step."
                )

    def _perplexity(self, args) -> float:
        return perplexity(self.shrinker.model, self.judge, batch_size=args.per_device_train_batch_size).perplexity


class ShrinkTrainer(DistillationMixin, Trainer):
    """Trainer of a model that shrinks while it is trained, with checkpoints that say how small it was.

    Everything else is as in transformers.Trainer, `load_best_model_at_end` as ShrinkCallback says. `save_model` writes
    what `from_pretrained` opens, with `export_shrunk` (form "auto": stock, or per layer where blocks differ); the
    checkpoints from which training is resumed have no config, and are for this class alone.

    With a `distillation` that has a `kd_weight` or a `hidden_weight` a `teacher` model is needed, for example a copy of
    the dense model; without, it is plain training.

    Args:
        shrink: the ShrinkCallback, made for the same model.
        distillation, teacher: see DistillationMixin; default: cross-entropy alone.
    Raises:
        ConfigError: distillation without a teacher model, or a callback of another model.
    """

    def __init__(
        self,
        model: nn.Module,
        args=None,
        *,
        shrink: ShrinkCallback,
        distillation: DistillationConfig | None = None,
        **kwargs: Any,
    ) -> None:
        plain = DistillationConfig(kd_weight=0.0, hidden_weight=0.0, ce_weight=1.0)
        if shrink.shrinker.model is not model:
            raise ConfigError("the ShrinkCallback was made for another model than the Trainer gets.")
        if distillation is not None and not isinstance(kwargs.get("teacher", "self"), nn.Module):
            raise ConfigError(
                "distillation of a model that shrinks needs a teacher that does not: pass teacher=a copy of the dense "
                "model."
            )
        super().__init__(model, args, distillation=distillation or plain, **kwargs)
        self.shrink_callback = shrink
        self.add_callback(shrink)
        self._saves_checkpoint = False

    def _states(self, outputs: Any, taught: Any) -> dict[str, Any]:
        """Each layer that is left is compared with the last of the dense layers that it stands for."""
        states = super()._states(outputs, taught)
        if states:
            layers = self.shrink_callback.shrinker.replaced_layers
            states["teacher_states"] = tuple(states["teacher_states"][layer] for layer in layers)
        return states

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        folder = Path(output_dir or self.args.output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        mark_incomplete(folder)
        model = self.accelerator.unwrap_model(self.model)
        if self._saves_checkpoint:
            save_model(model, str(folder / WEIGHTS_FILE), metadata={"format": "pt"})
            atomic_write(folder / STATE_FILE, json.dumps(self.shrink_callback.state_dict()) + "\n")
            return
        self._export(model, folder)
        tokenizer = self.processing_class or getattr(self.data_collator, "tokenizer", None)
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)
        torch.save(self.args, folder / TRAINING_ARGS_NAME)

    def _export(self, model: PreTrainedModel, folder: Path) -> None:
        """Into a folder that may hold other things, the checkpoints of this run among them."""
        shrinker = self.shrink_callback.shrinker
        manifest = {"kept": shrinker.kept, "dense_parameters": shrinker.dense_parameters}
        if not shrinker.shaped:
            manifest["method"] = asdict(self.shrink_callback.config)
        with tempfile.TemporaryDirectory(prefix=".", dir=folder) as temporary:
            saved = export_shrunk(model, Path(temporary) / "model", manifest=manifest)
            for file in folder.iterdir():
                if _WEIGHTS_FILES.fullmatch(file.name) or file.name == STATE_FILE:
                    file.unlink()
            for file in saved.folder.iterdir():
                os.replace(file, folder / file.name)

    def _save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        self._saves_checkpoint = True
        try:
            super()._save_checkpoint(*args, **kwargs)
        finally:
            self._saves_checkpoint = False
        mark_complete(Path(self.args.output_dir) / f"checkpoint-{self.state.global_step}", self.state.global_step)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        folder = Path(os.fspath(resume_from_checkpoint))
        for name in (STATE_FILE, WEIGHTS_FILE):
            if not (folder / name).is_file():
                raise FormatError(
                    f"{folder}: has no {name}, so it is no checkpoint of a shrinking run, or an incomplete one. Resume "
                    "from another checkpoint."
                )
        self.shrink_callback.load_state_dict(json.loads((folder / STATE_FILE).read_text()))
        load_model(model or self.model, str(folder / WEIGHTS_FILE))

    def _load_best_model(self) -> None:
        # As it was saved: transformers' own way warns that tied weights, which are there once, were missing.
        load_model(self.model, str(Path(self.state.best_model_checkpoint) / WEIGHTS_FILE))


def _inner(optimizer: Any) -> Any:
    return getattr(optimizer, "optimizer", optimizer)  # of an AcceleratedOptimizer


def _forget_best(state: TrainerState) -> None:
    state.best_metric = state.best_global_step = state.best_model_checkpoint = None
