"""AdaptiveSparseCallback: masks, schedules, counters and their checkpoint state, in any Trainer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import TrainerCallback
from transformers.trainer_callback import ExportableState
from transformers.utils import logging

from ..errors import ConfigError, TrainingError
from ..methods.learned_masks import MaskChange, MaskTrack, add_masked_decay, refresh_masks
from ..optim import SparseAdamW
from ..shards import local_rows
from .mask_state import (
    COMPLETE_FILE,
    STATE_FILE,
    last_complete_checkpoint,
    load_masks,
    mark_complete,
    mark_incomplete,
    save_masks,
)
from .sparse_layers import ignore_keep_buffers_in_ddp, learned_masks_config, plain_name, sparse_layers

__all__ = ["COMPLETE_FILE", "STATE_FILE", "AdaptiveSparseCallback", "last_complete_checkpoint"]

logger = logging.get_logger(__name__)

HISTORY_LENGTH = 511  # refreshes; odd, so that it is an even number that is joined two by two
DECAY_MODES = ("auto", "optimizer", "gradient", "backward")
_SAVED = ("flips_total", "refreshes", "history", "metrics")


class AdaptiveSparseCallback(TrainerCallback, ExportableState):
    """Chooses masks anew while any Trainer trains a model wrapped with AdaptiveSparseConfig.

    Add it to a stock Trainer: `Trainer(model=model, args=args, callbacks=[AdaptiveSparseCallback()])`;
    AdaptiveSparseTrainer adds it by itself. All schedules are functions of `global_step`, masks live in the
    adapter's buffers and the rest in `adaptive_sparse_state.safetensors` of each checkpoint, so a resumed run
    is bit-equal to an uninterrupted one.

    Args:
        decay_mode: where the pull on masked weights acts. "optimizer": inside SparseAdamW. "gradient":
            added to the gradient by a hook before the optimizer's step, for any other optimizer.
            "backward": added in autograd, for DeepSpeed, whose optimizer shows hooks flat partitions
            without gradients; it then acts once per micro-batch (scaled for accumulation), passes through
            gradient clipping and is absolute. "auto": the first of these that fits.
        log_layers: also log the flip rate of every layer.
    Attributes:
        flips_total: entries of all masks that have changed, summed over all refreshes.
        refreshes: how often masks were chosen anew.
        history: per refresh its step and the flip rate of every layer. In a long run refreshes are joined
            two by two: rates are then means, and the step is that of the later one.
        metrics: what the next log gets.
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
        self._layers: list[Any] = []

    def state(self) -> dict:
        return {
            "args": {"decay_mode": self.decay_mode, "log_layers": self.log_layers},
            "attributes": {name: getattr(self, name) for name in _SAVED},
        }

    # -- the events, in the order in which the Trainer fires them --------------------------------------------

    def on_init_end(self, args, state, control, model=None, **kwargs) -> None:
        ignore_keep_buffers_in_ddp(model)  # before anything wraps it

    def on_train_begin(self, args, state, control, model=None, optimizer=None, **kwargs) -> None:
        # Only now: before, FSDP2 has not replaced the parameters, DeepSpeed not the optimizer, and the
        # Trainer has not loaded the checkpoint.
        self._stop_decay()  # that of a run that ended in an error
        self.config = learned_masks_config(model)
        self.total_steps = state.max_steps
        self._check_run(args)
        handles = sparse_layers(model)
        several = len({handle.adapter for handle in handles}) > 1
        named = {f"{each.name}.{each.adapter}" if several else each.name: each for each in handles}
        previous, start = self._earlier_masks(args, state, {name: each.keep for name, each in named.items()})
        self._tracks = [
            MaskTrack(name, each.weight, each.keep, start[name], previous[name]) for name, each in named.items()
        ]
        self._layers = [each.layer for each in handles]
        self._trained = {plain_name(name): each for name, each in model.named_parameters() if each.requires_grad}
        self._step = state.global_step + 1
        self._start_decay(args, optimizer)

    def on_step_begin(self, args, state, control, **kwargs) -> None:
        self._step = state.global_step + 1
        if self._mode == "backward":
            # One part per micro-batch, so that a step gets the whole pull.
            decay = self._decay_at(self._step) / args.gradient_accumulation_steps
            for layer in self._layers:
                layer.adaptive_sparse_backward_decay = decay

    def on_pre_optimizer_step(self, args, state, control, **kwargs) -> None:
        if args.fp16 or self._is_deepspeed:
            return  # the loss scaler skips steps with infinite gradients; DeepSpeed has stepped already
        self._require_gradients()
        # Of all parameters: clipping turns one infinite gradient into zeros everywhere else.
        grads = {name: each.grad for name, each in self._trained.items() if each.grad is not None}
        broken = _not_finite(grads)
        if broken:
            raise TrainingError(
                f"step {self._step}: {len(broken)} of {len(grads)} gradients are NaN or infinite, the "
                f"first that of {broken[0]}. The weights are as after step {state.global_step}; the last "
                f"complete checkpoint in {args.output_dir} is untouched. Lower the learning rate, or look "
                "at the data of this step."
            )

    def on_step_end(self, args, state, control, **kwargs) -> None:
        self.metrics["sparse/decay"] = self._decay_at(state.global_step)
        if self.config.is_refresh(state.global_step, self.total_steps):
            self._count(state.global_step, refresh_masks(self._tracks, self.config))
        if control.should_save or control.should_training_stop:
            self._check_weights(args, state, control)

    def on_epoch_end(self, args, state, control, **kwargs) -> None:
        if control.should_save:
            self._check_weights(args, state, control)

    def on_log(self, args, state, control, logs=None, **kwargs) -> None:
        # Reaches the history and the console of any Trainer; reporters come before us and see it only from
        # AdaptiveSparseTrainer, which logs it itself.
        if logs is not None and "loss" in logs:
            logs.update(self.metrics)
            if state.log_history:
                state.log_history[-1].update(self.metrics)

    def on_save(self, args, state, control, **kwargs) -> None:
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.barrier()  # every process has files of its own in a checkpoint
        folder = _folder(args, state)
        if state.is_world_process_zero and folder.is_dir():
            save_masks(folder, self._tracks, self._identity(state))
            mark_complete(folder, state.global_step)

    def on_train_end(self, args, state, control, **kwargs) -> None:
        self._stop_decay()

    # -- the pull on masked weights --------------------------------------------------------------------------

    def _decay_at(self, step: int) -> float:
        """lambda before it is scaled to a layer."""
        ramp = self.config.decay_steps(self.total_steps)
        return self.config.decay * (min(1.0, step / ramp) if ramp else 1.0)

    def _start_decay(self, args, optimizer) -> None:
        optimizer = getattr(optimizer, "optimizer", optimizer)  # AcceleratedOptimizer has no hooks of its own
        self._is_deepspeed = bool(
            getattr(args, "deepspeed", None) or type(optimizer).__module__.startswith("deepspeed")
        )
        is_ours = isinstance(optimizer, SparseAdamW)
        self._mode = self.decay_mode
        if self._mode == "auto":
            self._mode = "backward" if self._is_deepspeed else "optimizer" if is_ours else "gradient"
        if self._mode == "optimizer":
            if not is_ours:
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
            if args.fp16 and not args.max_grad_norm and getattr(optimizer, "_step_supports_amp_scaling", False):
                raise ConfigError(
                    f"fp16 with a fused {type(optimizer).__name__} and max_grad_norm=0: gradients still "
                    "carry the loss scale when the pull on masked weights is added to them. Set "
                    "max_grad_norm, use bf16, or take an optimizer that is not fused."
                )
            self._hooks.append(optimizer.register_step_pre_hook(self._decay_gradients))
        elif self.config.decay and self.config.decay_norm == "relative":
            raise ConfigError(
                "decay_norm='relative' needs the gradients of whole steps, which decay_mode='backward' "
                "(and so DeepSpeed) does not see. Set decay_norm='absolute', and decay to the paper's "
                "number, such as 6e-5."
            )

    def _stop_decay(self) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks = []
        for layer in self._layers:
            layer.adaptive_sparse_backward_decay = 0.0

    def _decay_gradients(self, optimizer, args, kwargs) -> None:
        self._require_gradients()
        decay = self._decay_at(self._step)
        for track in self._tracks:
            add_masked_decay(track.weight.grad, track.weight, track.keep, decay, self.config.decay_norm)

    def _require_gradients(self) -> None:
        for track in self._tracks:
            if track.weight.grad is None:
                raise TrainingError(
                    f"{track.name}: the latent weight has no gradient at the optimizer's step, so its masked "
                    "weights would not decay. Under DeepSpeed use decay_mode='backward'."
                )

    # -- checks, counters and what a checkpoint keeps of them ------------------------------------------------

    def _check_run(self, args) -> None:
        if args.n_gpu > 1:
            raise ConfigError(
                f"{args.n_gpu} devices in one process would be nn.DataParallel, which cannot copy sparse "
                "layers. Start one process per device (torchrun, accelerate launch), or show one of them "
                "with CUDA_VISIBLE_DEVICES."
            )
        config, total = self.config, self.total_steps
        may_change = config.mask_policy == "adaptive" and config.freeze_fraction < 1.0
        due = range(config.mask_interval, total + 1, config.mask_interval)
        if may_change and not any(config.is_refresh(step, total) for step in due):
            raise TrainingError(
                f"masks are chosen anew every {config.mask_interval} optimizer steps, and none of these "
                f"falls between the first {config.start_fraction:.0%} (start_fraction) and the last "
                f"{config.freeze_fraction:.0%} (freeze_fraction) of this run's {total}: they never would "
                "change. Train longer, set a smaller mask_interval, or freeze_fraction=1.0 to keep the "
                "first masks."
            )
        if args.save_total_limit == 1 and args.save_strategy != "no":
            logger.warning(
                "save_total_limit=1: the Trainer deletes a checkpoint before the next one is complete, "
                "so a run that is killed in between starts again. Use 2."
            )

    def _check_weights(self, args, state, control) -> None:
        broken = _not_finite(self._trained)
        if broken:
            raise TrainingError(
                f"step {state.global_step}: {len(broken)} of {len(self._trained)} trained tensors hold "
                f"NaN or infinite values, the first {broken[0]}. They are not saved; the last complete "
                f"checkpoint in {args.output_dir} is untouched. Lower the learning rate."
            )
        if control.should_save and state.is_world_process_zero:
            mark_incomplete(_folder(args, state))

    def _count(self, step: int, changes: dict[str, MaskChange]) -> None:
        total = sum(change.numel for change in changes.values())
        flipped = sum(change.flipped for change in changes.values())
        ratios = sum(change.ratio * change.numel for change in changes.values())
        self.flips_total += flipped
        self.refreshes += 1
        self.metrics.update(
            {
                "sparse/flip_rate": flipped / total,
                "sparse/oscillation": sum(change.returned for change in changes.values()) / total,
                "sparse/from_start": sum(change.from_start for change in changes.values()) / total,
                "sparse/masked_over_kept": ratios / total,
                "sparse/flips_total": self.flips_total,
            }
        )
        rates = {name: change.flipped / change.numel for name, change in changes.items()}
        if self.log_layers:
            self.metrics.update({f"sparse/flip_rate/{name}": rate for name, rate in rates.items()})
        self.history.append({"step": step, "flip_rates": rates})
        if len(self.history) > HISTORY_LENGTH:  # it is written into every checkpoint
            pairs = zip(self.history[::2], self.history[1::2], strict=True)
            self.history = [_joined(*pair) for pair in pairs]

    def _identity(self, state) -> dict[str, str]:
        """Tells the masks of one checkpoint from those of another."""
        return {"global_step": str(state.global_step), "flips_total": str(self.flips_total)}

    def _earlier_masks(self, args, state, keeps: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """(previous, start) masks of every layer: of the checkpoint resumed from, or the present ones."""
        present = (
            {name: keep.clone() for name, keep in keeps.items()},
            {name: keep.clone() for name, keep in keeps.items()},
        )
        if state.global_step == 0:
            self.flips_total, self.refreshes, self.history, self.metrics = 0, 0, [], {}
            return present
        # The Trainer restores callbacks only on request, as new objects; the counters are in its state
        # anyway.
        saved = state.stateful_callbacks.get(type(self).__name__)
        if isinstance(saved, dict):
            for name, value in saved["attributes"].items():
                setattr(self, name, value)
        folders = [_folder(args, state)]
        if isinstance(args.resume_from_checkpoint, str):
            folders.insert(0, Path(args.resume_from_checkpoint))
        for folder in folders:
            found = load_masks(folder, keeps, self._identity(state))
            if found is not None:
                return found
        logger.warning(
            f"no {STATE_FILE} of step {state.global_step} was found: sparse/from_start and "
            "sparse/oscillation count from here. Weights, masks and all else are those of the "
            "checkpoint. If it was moved, name its folder in "
            "TrainingArguments(resume_from_checkpoint=...) as well."
        )
        return present


def _folder(args, state) -> Path:
    return Path(args.output_dir) / f"checkpoint-{state.global_step}"


def _joined(earlier: dict, later: dict) -> dict:
    rates = {name: (earlier["flip_rates"][name] + rate) / 2 for name, rate in later["flip_rates"].items()}
    return {"step": later["step"], "flip_rates": rates}


@torch.no_grad()
def _not_finite(tensors: dict[str, Tensor]) -> list[str]:
    """The names of the tensors with NaN or an infinity in what this process holds of them."""
    held = {name: local_rows(tensor.detach()) for name, tensor in tensors.items()}
    held = {name: local for name, local in held.items() if local.numel()}
    if not held:
        return []
    # The infinity norm is the largest magnitude: no sum that could overflow, and NaN stays NaN.
    norms = torch._foreach_norm(list(held.values()), float("inf"))
    finite = torch.stack([norm.float().to(norms[0].device) for norm in norms]).isfinite()
    return [name for name, good in zip(held, finite.tolist(), strict=True) if not good]
