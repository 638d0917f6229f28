"""AdaptiveSparseTrainer: a Trainer whose loss also follows a teacher, and whose optimizer knows the masks."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass, field
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel, Trainer
from transformers.utils import logging

from ..errors import ConfigError, TrainingError
from ..losses import DistillationLoss
from ..optim import SparseAdamW
from .adapter import dense_teacher, learned_masks_config
from .callbacks import AdaptiveSparseCallback

logger = logging.get_logger(__name__)


@dataclass(frozen=True, kw_only=True)
class DistillationConfig:
    """What the student is told apart from the text: the teacher's distribution over the next token."""

    kd_weight: float = field(default=0.67, metadata={"help": "Weight of T^2 KL(teacher || student); 0 = no teacher."})
    ce_weight: float = field(default=0.33, metadata={"help": "Weight of the cross-entropy with the text."})
    temperature: float = field(default=2.0, metadata={"help": "T: teacher and student logits are divided by it."})
    kind: str = field(default="forward_kl", metadata={"help": "forward_kl, or reverse_kl."})
    chunk_tokens: int = field(
        default=0, metadata={"help": "Tokens whose logits exist at the same time; 0 = chosen by vocabulary size."}
    )

    def loss(self) -> DistillationLoss:
        kwargs = {"chunk_tokens": self.chunk_tokens} if self.chunk_tokens else {}
        return DistillationLoss(
            temperature=self.temperature, kd_weight=self.kd_weight, ce_weight=self.ce_weight, kind=self.kind, **kwargs
        )


class DistillationMixin:
    """compute_loss with a teacher, for Trainer and its subclasses: `class My(DistillationMixin, SFTTrainer)`.

    The teacher is the dense model under the adapter (`teacher="self"`: no second model in memory), or another model
    with the same vocabulary. The heads of student and teacher are applied in chunks of tokens, so
    that [tokens, vocab] logits never exist; where a model does more to its logits than apply a linear head, the
    full logits are used instead, and the log says so.

    Args:
        distillation: weights, temperature and kind of the loss; None = DistillationConfig().
        teacher: "self", or a causal language model.
    Raises:
        ConfigError: no self-teacher exists (the model is not wrapped, or its adapter trains in place), or the
            vocabularies differ.
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
        # The loss divides by num_items_in_batch, which the Trainer counts only for models that take it.
        self.model_accepts_loss_kwargs = True
        self._sums: dict[str, Tensor] = {}
        self._head_is_plain: bool | None = None
        self.teacher: PreTrainedModel | None = None
        if not self.distillation.kd_weight:
            return
        if isinstance(teacher, str):
            if teacher != "self":
                raise ConfigError(f"teacher is 'self' or a model, got {teacher!r}. Load it with from_pretrained first.")
            with dense_teacher(self.accelerator.unwrap_model(self.model)):
                pass  # raises here, and not in the first step, if the model has no dense self
        else:
            self.teacher = self._adopt(teacher)

    def _adopt(self, teacher: PreTrainedModel) -> PreTrainedModel:
        student_config = _plain(self.model).config.get_text_config()
        teacher_config = teacher.config.get_text_config()
        if student_config.vocab_size != teacher_config.vocab_size:
            raise ConfigError(
                f"teacher {teacher_config._name_or_path or type(teacher).__name__} has a vocabulary of "
                f"{teacher_config.vocab_size}, student {student_config._name_or_path or type(_plain(self.model)).__name__} "
                f"one of {student_config.vocab_size}. Distillation compares them token by token: take a teacher with the "
                "same tokenizer."
            )
        return teacher.requires_grad_(False).eval().to(self.args.device)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        if not model.training:  # evaluation reports plain cross-entropy, comparable with any other run
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        inputs = dict(inputs)
        labels = inputs.pop("labels", None)
        if labels is None:
            raise TrainingError(
                f"the batch has no labels, only {', '.join(sorted(inputs))}. Give each example `labels` (a copy of "
                "input_ids; -100 where no loss is wanted), or use DataCollatorForLanguageModeling(mlm=False)."
            )
        inputs["use_cache"] = False
        student = _plain(self.accelerator.unwrap_model(model))
        teach = self.distillation.kd_weight > 0.0
        if self._use_hidden(student):
            outputs, hidden, head = _forward_hidden(model, student, inputs)
            if self._head_is_plain is None and not self._check_head(outputs, hidden, head, student):
                return self.compute_loss(model, {**inputs, "labels": labels}, return_outputs, num_items_in_batch)
            teacher_hidden = teacher_head = None
            if teach:
                with torch.no_grad(), self._teaching(model) as (teacher, teacher_plain):
                    _, teacher_hidden, teacher_head = _forward_hidden(teacher, teacher_plain, inputs)
            result = self.distillation_loss.fused(
                hidden,
                head.weight,
                teacher_hidden,
                teacher_head.weight if teacher_head is not None else None,
                labels,
                num_items=num_items_in_batch,
                student_head_bias=getattr(head, "bias", None),
                teacher_head_bias=getattr(teacher_head, "bias", None),
            )
        else:
            outputs = model(**inputs)
            teacher_logits = None
            if teach:
                with torch.no_grad(), self._teaching(model) as (teacher, _):
                    teacher_logits = teacher(**inputs).logits
            result = self.distillation_loss(outputs.logits, teacher_logits, labels, num_items=num_items_in_batch)
        self._add_to_sums({"loss/kd": result.kd, "loss/ce": result.ce})
        loss = result.loss
        if num_items_in_batch is not None and self.args.average_tokens_across_devices:
            loss = loss * self.accelerator.num_processes  # as Trainer.compute_loss: DDP averages, items are global
        return (loss, outputs) if return_outputs else loss

    @contextlib.contextmanager
    def _teaching(self, model):
        """The teacher as (module to call, plain model that owns its head)."""
        if self.teacher is not None:
            yield self.teacher, self.teacher
            return
        plain = self.accelerator.unwrap_model(model)
        with dense_teacher(plain):
            yield model, _plain(plain)

    def _use_hidden(self, student: PreTrainedModel) -> bool:
        if self._head_is_plain is not None:
            return self._head_is_plain
        head = student.get_output_embeddings()
        weight = getattr(head, "weight", None)
        # A sharded head exists in full only inside the model's own forward.
        return isinstance(weight, Tensor) and not isinstance(weight, DTensor) and not self.args.torch_compile

    def _check_head(self, outputs, hidden: Tensor, head: nn.Module, student: PreTrainedModel) -> bool:
        """Once: do the model's logits come from a linear head and nothing else?"""
        with torch.no_grad():
            expected = nn.functional.linear(hidden[:, :1], head.weight, getattr(head, "bias", None))
            self._head_is_plain = torch.allclose(outputs.logits.float(), expected.float(), rtol=1e-2, atol=1e-2)
        if not self._head_is_plain:
            logger.warning(
                f"{type(student).__name__} does more to its logits than apply a linear head (such as a soft cap): the loss "
                "is computed from the full logits, which takes more memory."
            )
        return self._head_is_plain

    # -- logging ----------------------------------------------------------------------------------------------------

    def _add_to_sums(self, values: dict[str, Tensor]) -> None:
        for name, value in values.items():
            total, count = self._sums.get(name, (0.0, 0))
            self._sums[name] = (total + value.detach(), count + 1)

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        if "loss" in logs:
            for name, (total, count) in self._sums.items():
                logs[name] = float(total) / count
            self._sums = {}
            for callback in self.callback_handler.callbacks:
                if isinstance(callback, AdaptiveSparseCallback):
                    logs.update(callback.metrics)
        super().log(logs, *args, **kwargs)


class AdaptiveSparseTrainer(DistillationMixin, Trainer):
    """Trainer for models wrapped with AdaptiveSparseConfig: SparseAdamW, the mask callback and distillation are set up.

    Everything of transformers.Trainer works as it does there: checkpoints, resume, accumulation, mixed precision,
    compile, DDP, FSDP. With `args.optim` left at its default the optimizer is SparseAdamW with
    betas (0.9, 0.95) and `args.weight_decay`; an optimizer of your own is used as it is, and gets the pull on
    masked weights through a hook.

    Args:
        distillation, teacher: see DistillationMixin.
    Raises:
        ConfigError: the model is not wrapped with AdaptiveSparseConfig.
    """

    def __init__(self, model=None, args=None, *positional: Any, **kwargs: Any) -> None:
        learned_masks_config(model)  # raises if the model is not wrapped
        if kwargs.get("optimizers", (None, None))[0] is None and kwargs.get("optimizer_cls_and_kwargs") is None:
            kwargs["optimizer_cls_and_kwargs"] = (SparseAdamW, _optimizer_kwargs(args))
        super().__init__(model, args, *positional, **kwargs)
        if not any(isinstance(callback, AdaptiveSparseCallback) for callback in self.callback_handler.callbacks):
            self.add_callback(AdaptiveSparseCallback())

    @property
    def mask_callback(self) -> AdaptiveSparseCallback:
        """The callback that owns masks and counters; a resumed run may have made a new one."""
        return next(c for c in self.callback_handler.callbacks if isinstance(c, AdaptiveSparseCallback))


def _optimizer_kwargs(args) -> dict[str, Any]:
    if args is None:
        return {"lr": 5e-5}
    # TrainingArguments default to AdamW's 0.999, which forgets too slowly for masks that change.
    beta2 = 0.95 if args.adam_beta2 == 0.999 else args.adam_beta2
    return {"lr": args.learning_rate, "betas": (args.adam_beta1, beta2), "eps": args.adam_epsilon}


def _plain(model: nn.Module) -> PreTrainedModel:
    return model.get_base_model() if isinstance(model, PeftModel) else model


def _forward_hidden(model: nn.Module, plain: PreTrainedModel, inputs: dict) -> tuple[Any, Tensor, nn.Module]:
    """Run a model up to its head: (outputs with the logits of the first position only, hidden [.., hidden], head)."""
    head = plain.get_output_embeddings()
    seen: list[Tensor] = []

    def keep_one_position(module, arguments):
        seen.append(arguments[0])
        return (arguments[0][:, :1], *arguments[1:])

    hook = head.register_forward_pre_hook(keep_one_position)
    try:
        outputs = model(**inputs)
    finally:
        hook.remove()
    if len(seen) != 1:
        raise TrainingError(f"the head of {type(plain).__name__} ran {len(seen)} times in one forward, expected once.")
    return outputs, seen[0], head
