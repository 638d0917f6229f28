"""AdaptiveSparseTrainer: a Trainer whose loss also follows a teacher, and whose optimizer knows the masks."""

from __future__ import annotations

import contextlib
import inspect
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import PreTrainedModel, Trainer, TrainingArguments
from transformers.utils import logging

from ..errors import ConfigError, DataError
from ..losses import DistillationLoss, DistillationResult
from ..optim import SparseAdamW
from .callbacks import AdaptiveSparseCallback
from .heads import forward_to_head, has_plain_logits, linear_head
from .sparse_layers import learned_masks_config
from .teacher import dense_teacher

logger = logging.get_logger(__name__)


@dataclass(frozen=True, kw_only=True)
class DistillationConfig:
    """What the student is told apart from the text: the teacher's distribution over the next token."""

    kd_weight: float = field(default=0.67, metadata={"help": "Weight of T^2 KL(teacher || student)."})
    ce_weight: float = field(default=0.33, metadata={"help": "Weight of the cross-entropy with the text."})
    temperature: float = field(default=2.0, metadata={"help": "T: teacher and student logits are divided by it."})
    kind: str = field(default="forward_kl", metadata={"help": "forward_kl, or reverse_kl."})
    hidden_weight: float = field(
        default=2.0,
        metadata={"help": "Weight of the relative squared distance to the teacher's states after each block."},
    )
    chunk_tokens: int = field(
        default=0,
        metadata={"help": "Tokens whose logits exist at the same time; 0 = chosen by vocabulary size."},
    )

    def __post_init__(self) -> None:
        self.loss()  # building it checks it

    def loss(self) -> DistillationLoss:
        return DistillationLoss(
            temperature=self.temperature,
            kd_weight=self.kd_weight,
            ce_weight=self.ce_weight,
            kind=self.kind,
            hidden_weight=self.hidden_weight,
            chunk_tokens=self.chunk_tokens or None,
        )


class DistillationMixin:
    """compute_loss with a teacher, for Trainer and its subclasses: `class My(DistillationMixin, SFTTrainer)`.

    The teacher is the dense model under the adapter (`teacher="self"`: no second model in memory), or another
    model with the same vocabulary; it never drops out. The heads of student and teacher are applied in chunks
    of tokens, so that [tokens, vocab] logits never exist; where that cannot be (a model does more to its
    logits than apply a linear head, a sharded head, torch.compile), the full logits are used, and the log says
    so.

    Evaluation reports plain cross-entropy. `loss/ce`, `loss/kd` and `loss/hidden` in the log are means per token
    of this process since the last log. With `return_outputs=True` the outputs of a training batch hold logits
    of one position.

    Args:
        distillation: weights, temperature and kind of the loss; None = DistillationConfig().
        teacher: "self", or a causal language model. That model is frozen, and moved to the Trainer's device.
    Raises:
        ConfigError: no self-teacher exists (its adapter trains in place or trains biases), the vocabularies
            differ, or another loss is asked for as well (compute_loss_func, label smoothing).
        TargetError: no self-teacher exists, because the model has no sparse layers.
    """

    loss_is_scaled_for_ga = True

    def __init__(
        self,
        *args: Any,
        distillation: DistillationConfig | None = None,
        teacher: str | PreTrainedModel = "self",
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        self.distillation = distillation or DistillationConfig()
        self.distillation_loss = self.distillation.loss()
        self._check_single_loss()
        # The loss divides by num_items_in_batch, which the Trainer counts only for models that take it.
        self._model_takes_items, self.model_accepts_loss_kwargs = self.model_accepts_loss_kwargs, True
        # It knows by the name of a class whether the first label of a row counts; in our loss it never does.
        self._loss_shifts_labels = True
        self._sums: dict[str, Tensor] = {}
        self._is_fused: bool | None = None
        self._modules_of: tuple[nn.Module, list[nn.Module]] | None = None
        self.teacher: PreTrainedModel | None = None
        if not self._is_taught():
            return
        if isinstance(teacher, str):
            if teacher != "self":
                raise ConfigError(f"teacher is 'self' or a model, got {teacher!r}. Load it with from_pretrained first.")
            with dense_teacher(self._unwrapped(self.model)):
                pass  # raises here, and not in the first step, if the model has no dense self
        else:
            self.teacher = self._adopt(teacher)

    def _check_single_loss(self) -> None:
        others = {
            "compute_loss_func": self.compute_loss_func is not None,
            "label_smoothing_factor": self.label_smoother is not None,
        }
        for name, given in others.items():
            if given:
                raise ConfigError(
                    f"{name} has no effect on a loss that follows a teacher. Leave it out, or use a "
                    "Trainer with AdaptiveSparseCallback and without distillation."
                )

    def _adopt(self, teacher: PreTrainedModel) -> PreTrainedModel:
        if any(module is teacher for module in self.model.modules()):
            raise ConfigError("the teacher is a part of the student. For the dense model in it write teacher='self'.")
        student = _plain(self._unwrapped(self.model))
        student_config, teacher_config = student.config.get_text_config(), teacher.config.get_text_config()
        if student_config.vocab_size != teacher_config.vocab_size:
            raise ConfigError(
                f"teacher {teacher_config._name_or_path or type(teacher).__name__} has a vocabulary of "
                f"{teacher_config.vocab_size}, student "
                f"{student_config._name_or_path or type(student).__name__} one of "
                f"{student_config.vocab_size}. Distillation compares them token by token: take a teacher "
                "with the same tokenizer."
            )
        shapes = [(each.num_hidden_layers, each.hidden_size) for each in (student_config, teacher_config)]
        if self.distillation.hidden_weight and shapes[0] != shapes[1]:
            raise ConfigError(
                f"hidden_weight={self.distillation.hidden_weight} compares states block by block, and the "
                f"student has {shapes[0][0]} blocks of width {shapes[0][1]}, the teacher {shapes[1][0]} "
                f"of width {shapes[1][1]}. Set hidden_weight=0, or take a teacher of the same shape."
            )
        teacher.requires_grad_(False).eval()
        # One that is spread over devices stays where it is.
        return teacher if getattr(teacher, "hf_device_map", None) else teacher.to(self.args.device)

    # -- the loss --------------------------------------------------------------------------------------------

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """Cross-entropy and distillation of one batch; while evaluating, the Trainer's own loss."""
        if not model.training:
            return self._plain_loss(model, inputs, return_outputs, num_items_in_batch)
        inputs = dict(inputs)
        labels = inputs.pop("labels", None)
        if labels is None:
            raise DataError(
                f"the batch has no labels, only {', '.join(sorted(inputs))}. Give each example `labels` "
                "(a copy of input_ids; -100 where no loss is wanted), or use "
                "DataCollatorForLanguageModeling(mlm=False)."
            )
        inputs["use_cache"] = False
        if self.distillation.hidden_weight:
            inputs["output_hidden_states"] = True
        if self._is_fused is None:
            self._is_fused = self._can_be_fused(model, inputs)
        compute = self._fused_loss if self._is_fused else self._logits_loss
        outputs, result = compute(model, inputs, labels, num_items_in_batch)
        self._add_to_sums(result, labels, num_items_in_batch)
        loss = result.loss
        if num_items_in_batch is not None and self.args.average_tokens_across_devices:
            # As Trainer.compute_loss: DDP averages over processes, and items are counted over all of them.
            loss = loss * (self.accelerator.num_processes // self.get_tp_size())
        return (loss, outputs) if return_outputs else loss

    def _plain_loss(self, model, inputs, return_outputs, num_items_in_batch):
        """Cross-entropy, comparable with any other run."""
        self.model_accepts_loss_kwargs = self._model_takes_items
        try:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        finally:
            self.model_accepts_loss_kwargs = True

    def _fused_loss(self, model, inputs, labels, num_items) -> tuple[Any, DistillationResult]:
        student = _plain(self._unwrapped(model))
        outputs, hidden, head = forward_to_head(model, student, inputs)
        taught = teacher_hidden = teacher_weight = teacher_bias = None
        if self._is_taught():
            with self._teaching(model) as (teacher, plain):
                taught, teacher_hidden, teacher_head = forward_to_head(teacher, plain, inputs)
                # Read in here: a head that peft trains as a whole is the original one only while it teaches.
                teacher_weight, teacher_bias = teacher_head.weight, teacher_head.bias
        result = self.distillation_loss.fused(
            hidden,
            head.weight,
            teacher_hidden,
            teacher_weight,
            labels,
            num_items=num_items,
            student_head_bias=head.bias,
            teacher_head_bias=teacher_bias,
            **self._states(outputs, taught),
        )
        return outputs, result

    def _logits_loss(self, model, inputs, labels, num_items) -> tuple[Any, DistillationResult]:
        outputs = model(**inputs)
        taught = None
        if self._is_taught():
            with self._teaching(model) as (teacher, _):
                taught = teacher(**inputs)
        return outputs, self.distillation_loss(
            outputs.logits,
            None if taught is None else taught.logits,
            labels,
            num_items=num_items,
            **self._states(outputs, taught),
        )

    def _is_taught(self) -> bool:
        return bool(self.distillation.kd_weight or self.distillation.hidden_weight)

    def _states(self, outputs: Any, taught: Any) -> dict[str, Any]:
        """What the hidden term compares: the states after every block."""
        if not self.distillation.hidden_weight:
            return {}
        # The first are the embeddings, which are the same.
        return {"student_states": outputs.hidden_states[1:], "teacher_states": taught.hidden_states[1:]}

    @contextlib.contextmanager
    def _teaching(self, model: nn.Module) -> Iterator[tuple[nn.Module, PreTrainedModel]]:
        """The teacher as (module to call, plain model that owns its head)."""
        with torch.no_grad():
            if self.teacher is not None:
                yield self.teacher, _plain(self.teacher)
                return
            unwrapped = self._unwrapped(model)
            if self._modules_of is None or self._modules_of[0] is not model:
                self._modules_of = model, list(model.modules())  # kept: a walk over a large model takes ms
            with dense_teacher(unwrapped), _in_eval_mode(self._modules_of[1]):
                yield model, _plain(unwrapped)

    def _can_be_fused(self, model: nn.Module, inputs: dict[str, Any]) -> bool:
        """Whether logits may be made from hidden states, outside of the models; asked at the first batch."""
        unwrapped = self._unwrapped(model)
        models = [(unwrapped, _plain(unwrapped))]
        if self.teacher is not None:
            models.append((self.teacher, _plain(self.teacher)))
        reason = None
        if self.args.torch_compile:
            reason = "torch_compile takes whole models"
        for called, plain in models:
            if reason is None and linear_head(plain) is None:
                reason = f"the head of {type(plain).__name__} is not a plain linear layer"
            if reason is None:
                with _in_eval_mode(called.modules()):  # draws no random numbers
                    if not has_plain_logits(called, plain, inputs):
                        reason = (
                            f"{type(plain).__name__} does more to its logits than apply a linear head "
                            "(such as a soft cap)"
                        )
        if reason is not None:
            logger.warning(f"{reason}: the loss is computed from full logits, which takes more memory.")
        return reason is None

    def _unwrapped(self, model: nn.Module) -> nn.Module:
        return self.accelerator.unwrap_model(model, keep_torch_compile=False)

    # -- logging ---------------------------------------------------------------------------------------------

    def _add_to_sums(self, result: DistillationResult, labels: Tensor, num_items: Tensor | int | None) -> None:
        tokens = (labels[..., 1:] != self.distillation_loss.ignore_index).sum()
        # Each is a share of the accumulated batch: this undoes the division by all of its tokens.
        divisor = tokens if num_items is None else num_items
        values = {"tokens": tokens, "loss/ce": result.ce * divisor}
        if self.distillation.kd_weight:
            values["loss/kd"] = result.kd * divisor
        if self.distillation.hidden_weight:
            values["loss/hidden"] = result.hidden * divisor
        for name, value in values.items():
            self._sums[name] = self._sums.get(name, 0.0) + value

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Add the parts of the loss and the counters of the masks to what the Trainer logs."""
        if "loss" in logs:
            tokens = max(1.0, float(self._sums.pop("tokens", 0.0)))
            logs.update({name: float(total) / tokens for name, total in self._sums.items()})
            self._sums = {}
            for callback in self.callback_handler.callbacks:
                if isinstance(callback, AdaptiveSparseCallback):
                    logs.update(callback.metrics)
        super().log(logs, *args, **kwargs)


class AdaptiveSparseTrainer(DistillationMixin, Trainer):
    """Trainer for models wrapped with AdaptiveSparseConfig, with SparseAdamW, mask callback and distillation.

    Everything of transformers.Trainer works as it does there: checkpoints, resume, accumulation, mixed
    precision, compile, DDP, FSDP. With `args.optim` left at its default the optimizer is SparseAdamW with
    betas (0.9, 0.95) and `args.weight_decay`; an optimizer of your own is used as it is, and gets the pull on
    masked weights through a hook.

    Args:
        distillation, teacher: see DistillationMixin.
    Raises:
        ConfigError: the model is not wrapped with AdaptiveSparseConfig.
    """

    def __init__(self, model=None, args=None, *positional: Any, **kwargs: Any) -> None:
        if model is not None:
            learned_masks_config(model)  # raises if the model is not wrapped
        if not _has_optimizer(model, args, positional, kwargs):
            kwargs["optimizer_cls_and_kwargs"] = (SparseAdamW, _optimizer_kwargs(args))
        super().__init__(model, args, *positional, **kwargs)
        callbacks = self.callback_handler.callbacks
        if not any(isinstance(callback, AdaptiveSparseCallback) for callback in callbacks):
            callback = AdaptiveSparseCallback()
            self.add_callback(callback)
            callback.on_init_end(self.args, self.state, self.control, model=self.model)  # missed by now

    @property
    def mask_callback(self) -> AdaptiveSparseCallback:
        """The callback that owns masks and counters; a resumed run may have made a new one."""
        callbacks = self.callback_handler.callbacks
        return next(each for each in callbacks if isinstance(each, AdaptiveSparseCallback))

    def train(self, resume_from_checkpoint=None, *args: Any, **kwargs: Any):
        if isinstance(resume_from_checkpoint, str | os.PathLike):
            # Where callbacks can see it.
            self.args.resume_from_checkpoint = os.fspath(resume_from_checkpoint)
        return super().train(resume_from_checkpoint, *args, **kwargs)


def _has_optimizer(model, args, positional: tuple, kwargs: dict[str, Any]) -> bool:
    """Whether the arguments of a Trainer name an optimizer."""
    ours = ("distillation", "teacher")
    named = {name: value for name, value in kwargs.items() if name not in ours}
    signature = inspect.signature(Trainer.__init__)
    given = signature.bind_partial(None, model, args, *positional, **named).arguments
    optimizers = given.get("optimizers") or (None, None)
    default = TrainingArguments.__dataclass_fields__["optim"].default
    return (
        optimizers[0] is not None
        or given.get("optimizer_cls_and_kwargs") is not None
        or (args is not None and args.optim != default)
    )


def _optimizer_kwargs(args) -> dict[str, Any]:
    if args is None:
        return {"lr": 5e-5}
    # TrainingArguments default to AdamW's 0.999, which forgets too slowly for masks that change.
    beta2 = 0.95 if args.adam_beta2 == 0.999 else args.adam_beta2
    return {"lr": args.learning_rate, "betas": (args.adam_beta1, beta2), "eps": args.adam_epsilon}


def _plain(model: nn.Module) -> PreTrainedModel:
    return model.get_base_model() if isinstance(model, PeftModel) else model


@contextlib.contextmanager
def _in_eval_mode(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Dropout off, and then each module back to what it was."""
    training = [module for module in modules if module.training]
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True
