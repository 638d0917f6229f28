"""AdaptiveSparseCallback: masks, schedules, counters and their checkpoint state, in any Trainer."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import TrainerCallback
from transformers.trainer_callback import ExportableState
from transformers.utils import logging

from ..errors import ConfigError, TrainingError
from ..methods.learned_masks import MaskChange, MaskTrack, add_masked_decay, refresh_masks
from ..optim import SparseAdamW
from ..shards import local_rows
from .adapter import ignore_keep_buffers_in_ddp, learned_masks_config, sparse_layers

logger = logging.get_logger(__name__)

STATE_FILE = "adaptive_sparse_state.safetensors"
COMPLETE_FILE = "adaptive_sparse_complete.json"
HISTORY_LENGTH = 511  # refreshes; odd, so that it is an even number that is joined two by two
DECAY_MODES = ("auto", "optimizer", "gradient", "backward")


class AdaptiveSparseCallback(TrainerCallback, ExportableState):
    """Chooses masks anew while any Trainer trains a model wrapped with AdaptiveSparseConfig.

    Add it to a stock Trainer: `Trainer(model=model, args=args, callbacks=[AdaptiveSparseCallback()])`;
    AdaptiveSparseTrainer adds it by itself. All schedules are functions of `global_step`, masks live in the
    adapter's buffers and the rest in `adaptive_sparse_state.safetensors` of each checkpoint, so a resumed run is
    bit-equal to an uninterrupted one.

    Args:
        decay_mode: where the pull on masked weights acts. "optimizer": inside SparseAdamW. "gradient": added to the
            gradient by a hook before the optimizer's step, for any other optimizer. "backward": added in autograd, for
            DeepSpeed, whose optimizer shows hooks flat partitions without gradients; it then acts once per
            micro-batch (scaled for accumulation) and passes through gradient clipping. "auto": the first of these
            that fits.
        log_layers: also log the flip rate of every layer.
    Raises:
        ConfigError: unknown decay_mode.
    """

    def __init__(self, decay_mode: str = "auto", log_layers: bool = False) -> None:
        if decay_mode not in DECAY_MODES:
            raise ConfigError(f"unknown decay_mode {decay_mode!r}; known: {', '.join(DECAY_MODES)}.")
        self.decay_mode = decay_mode
        self.log_layers = log_layers
        self.flips_total = 0
        self.refreshes = 0
        self.history: list[dict[str, Any]] = []
        self.metrics: dict[str, float] = {}
        self._hooks: list[Any] = []
        self._tracks: list[MaskTrack] = []

    def state(self) -> dict:
        return {
            "args": {"decay_mode": self.decay_mode, "log_layers": self.log_layers},
            "attributes": {"flips_total": self.flips_total, "refreshes": self.refreshes, "history": self.history},
        }

    # -- the events, in the order in which the Trainer fires them ---------------------------------------------------

    def on_train_begin(self, args, state, control, model=None, optimizer=None, **kwargs) -> None:
        # Only now: before, FSDP2 has not replaced the parameters, nor DeepSpeed the optimizer, nor the Trainer
        # loaded the checkpoint.
        self.config = learned_masks_config(model)
        self.total_steps = state.max_steps
        if self.config.mask_policy == "adaptive" and self.config.mask_interval > self.total_steps:
            raise TrainingError(
                f"masks are chosen anew every {self.config.mask_interval} optimizer steps, and this run has only "
                f"{self.total_steps}. Train longer, set a smaller mask_interval, or mask_policy='frozen'."
            )
        layers = sparse_layers(model)
        previous, start = self._load_masks(args, state, {layer.name: layer.keep for layer in layers})
        self._tracks = [
            MaskTrack(layer.name, layer.weight, layer.keep, start[layer.name], previous[layer.name]) for layer in layers
        ]
        self._layers = [layer.layer for layer in layers]
        ignore_keep_buffers_in_ddp(model)
        self._start_decay(args, optimizer)

    def on_step_begin(self, args, state, control, **kwargs) -> None:
        if self._mode == "backward":
            # One part per micro-batch, so that a step gets the whole pull.
            decay = self._decay_at(state.global_step + 1) / args.gradient_accumulation_steps
            for layer in self._layers:
                layer.adaptive_sparse_backward_decay = decay

    def on_pre_optimizer_step(self, args, state, control, **kwargs) -> None:
        if args.fp16:
            return  # the loss scaler skips steps with infinite gradients by itself
        grads = [track.weight.grad for track in self._tracks if track.weight.grad is not None]
        if not grads:
            return  # DeepSpeed has stepped already; other optimizers raise by themselves
        total = torch.stack(torch._foreach_norm([local_rows(grad) for grad in grads], 1)).sum()
        if not torch.isfinite(total):
            raise TrainingError(
                f"step {state.global_step + 1}: the gradient of the sparse weights is {total.item()}. The weights are as "
                f"after step {state.global_step}; the last complete checkpoint in {args.output_dir} is untouched. Lower "
                "the learning rate, or look at the data of this step."
            )

    def on_step_end(self, args, state, control, **kwargs) -> None:
        self.metrics["sparse/decay"] = self._decay_at(state.global_step)
        if not self.config.is_refresh(state.global_step, self.total_steps):
            return
        changes = refresh_masks(self._tracks, self.config)
        self._count(state.global_step, changes)

    def on_log(self, args, state, control, logs=None, **kwargs) -> None:
        # Reaches the history and the console of any Trainer; reporters come before us and see it only from
        # AdaptiveSparseTrainer, which logs it itself.
        if logs is not None and "loss" in logs:
            logs.update(self.metrics)
            if state.log_history:
                state.log_history[-1].update(self.metrics)

    def on_save(self, args, state, control, **kwargs) -> None:
        folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        if not state.is_world_process_zero or not folder.is_dir():
            return
        tensors = {}
        for track in self._tracks:
            tensors[f"{track.name}.start"] = _to_bits(track.start)
            tensors[f"{track.name}.previous"] = _to_bits(track.previous)
        save_file(tensors, folder / STATE_FILE)
        # The last file of a checkpoint: one without it was cut short and is not resumed from.
        (folder / COMPLETE_FILE).write_text(json.dumps({"global_step": state.global_step}))

    def on_train_end(self, args, state, control, **kwargs) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks = []
        for layer in self._layers:
            layer.adaptive_sparse_backward_decay = 0.0

    # -- parts ------------------------------------------------------------------------------------------------------

    def _decay_at(self, step: int) -> float:
        """lambda before it is scaled to a layer."""
        ramp = self.config.decay_steps(self.total_steps)
        return self.config.decay * (min(1.0, step / ramp) if ramp else 1.0)

    def _start_decay(self, args, optimizer) -> None:
        optimizer = getattr(optimizer, "optimizer", optimizer)  # AcceleratedOptimizer has no hooks of its own
        self._mode = self.decay_mode
        if self._mode == "auto":
            deepspeed = getattr(args, "deepspeed", None) or type(optimizer).__module__.startswith("deepspeed")
            self._mode = "backward" if deepspeed else "optimizer" if isinstance(optimizer, SparseAdamW) else "gradient"
        if self._mode == "optimizer":
            if not isinstance(optimizer, SparseAdamW):
                raise ConfigError(
                    f"decay_mode='optimizer' needs SparseAdamW, got {type(optimizer).__name__}. Pass "
                    "optimizer_cls_and_kwargs=(SparseAdamW, {...}) to the Trainer, or use decay_mode='auto'."
                )
            for group in optimizer.param_groups:
                group["decay"] = self.config.decay
                group["decay_norm"] = self.config.decay_norm
                group["decay_steps"] = self.config.decay_steps(self.total_steps)
            optimizer.bind((track.weight, track.keep) for track in self._tracks)
        elif self._mode == "gradient":
            self._steps_done = 0
            self._hooks.append(optimizer.register_step_pre_hook(self._decay_gradients))

    def _decay_gradients(self, optimizer, args, kwargs) -> None:
        self._steps_done += 1
        decay = self._decay_at(self._resumed_at + self._steps_done)
        for track in self._tracks:
            if track.weight.grad is None:
                raise TrainingError(
                    f"{track.name}: the latent weight has no gradient at the optimizer's step, so its masked weights "
                    "would not decay. Under DeepSpeed use decay_mode='backward'."
                )
            add_masked_decay(track.weight.grad, track.weight, track.keep, decay, self.config.decay_norm)

    def _load_masks(self, args, state, keeps: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """(previous, start) masks of every layer: those of the checkpoint resumed from, or the present ones."""
        self._resumed_at = state.global_step
        present = {name: keep.clone() for name, keep in keeps.items()}
        if state.global_step == 0:
            return present, {name: keep.clone() for name, keep in keeps.items()}
        folder = _checkpoint_folder(args, state)
        if folder is None:
            logger.warning(
                f"no {STATE_FILE} was found for step {state.global_step}: flips are counted from here, not from the start "
                "of the run. Weights and masks are those of the checkpoint."
            )
            return present, {name: keep.clone() for name, keep in keeps.items()}
        # The Trainer restores callbacks only on request (and then as new objects); the counters are in its state anyway.
        saved = state.stateful_callbacks.get(type(self).__name__)
        if isinstance(saved, dict):
            for name, value in saved["attributes"].items():
                setattr(self, name, value)
        tensors = load_file(folder / STATE_FILE)
        return tuple(  # type: ignore[return-value]
            {name: _from_bits(tensors[f"{name}.{kind}"], keep.shape).to(keep.device) for name, keep in keeps.items()}
            for kind in ("previous", "start")
        )

    def _count(self, step: int, changes: dict[str, MaskChange]) -> None:
        total = sum(change.numel for change in changes.values())
        flipped = sum(change.flipped for change in changes.values())
        self.flips_total += flipped
        self.refreshes += 1
        self.metrics.update(
            {
                "sparse/flip_rate": flipped / total,
                "sparse/oscillation": sum(change.returned for change in changes.values()) / total,
                "sparse/from_start": sum(change.from_start for change in changes.values()) / total,
                "sparse/masked_over_kept": sum(change.ratio * change.numel for change in changes.values()) / total,
                "sparse/flips_total": self.flips_total,
            }
        )
        if self.log_layers:
            for name, change in changes.items():
                self.metrics[f"sparse/flip_rate/{name}"] = change.flipped / change.numel
        rates = {name: change.flipped / change.numel for name, change in changes.items()}
        self.history.append({"step": step, "flip_rates": rates})
        if len(self.history) > HISTORY_LENGTH:  # it is written into every checkpoint
            self.history = [_joined(pair) for pair in zip(self.history[::2], self.history[1::2], strict=False)]


def _joined(pair: tuple[dict, dict]) -> dict:
    rates = {name: pair[0]["flip_rates"][name] + rate for name, rate in pair[1]["flip_rates"].items()}
    return {"step": pair[1]["step"], "flip_rates": rates}


def last_complete_checkpoint(output_dir: str | Path) -> Path | None:
    """The newest checkpoint under `output_dir` that was written to its end, or None."""
    complete = [marker.parent for marker in Path(output_dir).glob(f"checkpoint-*/{COMPLETE_FILE}")]
    return max(complete, key=lambda folder: int(folder.name.rpartition("-")[2]), default=None)


def _checkpoint_folder(args, state) -> Path | None:
    candidates = [Path(args.output_dir) / f"checkpoint-{state.global_step}"]
    if isinstance(args.resume_from_checkpoint, str):
        candidates.insert(0, Path(args.resume_from_checkpoint))
    return next((folder for folder in candidates if (folder / STATE_FILE).is_file()), None)


def _to_bits(keep: Tensor) -> Tensor:
    flat = keep.detach().cpu().reshape(-1)
    padded = torch.cat([flat, flat.new_zeros(-len(flat) % 8)]).view(-1, 8)
    return (padded.to(torch.uint8) << torch.arange(8, dtype=torch.uint8)).sum(dim=1, dtype=torch.uint8)


def _from_bits(bits: Tensor, shape: torch.Size) -> Tensor:
    unpacked = (bits[:, None] >> torch.arange(8, dtype=torch.uint8)) & 1
    return unpacked.bool().reshape(-1)[: shape.numel()].view(shape)
