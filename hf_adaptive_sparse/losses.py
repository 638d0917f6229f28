"""Distillation and cross-entropy together, over chunks of tokens, with gradients made in the forward pass.

    loss = ce_weight * ce + kd_weight * kd + hidden_weight * hidden

    ce      cross-entropy of the student with the labels, at temperature 1
    kd      T^2 * KL between softmax(teacher / T) and softmax(student / T)
    hidden  squared distance of hidden states, relative to the teacher's mean square, summed over layers

each summed over the tokens whose label counts and divided by their number, or by `num_items`.

Sources: Hinton et al., "Distilling the Knowledge in a Neural Network", 2015 (temperature, T^2); AST (arXiv
2407.20584) for forward KL to the dense model and the mix (T = 2; 0.33 ce + 0.67 kd on GPT-2); SquareHead
(arXiv 2310.06927) for the hidden term.

Done naively, cross-entropy and KL hold five to seven float32 copies of [tokens, vocab]. Here a chunk of
tokens goes from logits to loss to dloss/dlogits in four small buffers (`divergences`), and `fused` goes on to
the gradients of hidden states and head (`logits`), so that [tokens, vocab] never exists.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, overload

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .divergences import ce_in_place, kd_in_place
from .errors import ConfigError, DataError, TrainingError
from .logits import GivenLogits, LogitsFromHidden

KINDS = ("forward_kl", "reverse_kl")

# Elements of one chunk buffer. On a CPU the four of them stay in the last-level cache (16 MiB); a GPU needs
# chunks large enough to fill it, and 512 MiB a buffer is small there.
_CPU_CHUNK = 2**20
_GPU_CHUNK = 2**27
# Every chunk reads the whole head, which pays from about this many tokens.
_FEWEST_TOKENS = 64

_TWICE = (
    "backward ran twice through one distillation loss, whose gradients are made once and handed over. Add up what "
    "is to be differentiated and call backward once, or compute the loss again."
)


class DistillationResult(NamedTuple):
    """A differentiable `loss`, and its parts: detached, left on their device."""

    loss: Tensor
    ce: Tensor
    kd: Tensor  # with its T^2; 0, and not computed, when kd_weight is 0
    hidden: Tensor  # 0, and not computed, when hidden_weight is 0


@dataclass(frozen=True, kw_only=True)
class DistillationLoss:
    """Cross-entropy and KL to a teacher. Call it with logits, or call `fused` with hidden states and heads.

    It is also a `compute_loss_func` for transformers' Trainer: called as
    `loss(outputs, labels, num_items_in_batch=n)` it reads `outputs.logits` and `outputs.teacher_logits`,
    which the model's forward must have added, and returns the loss alone.
    """

    temperature: float = field(default=2.0, metadata={"help": "Divides the logits of both models in the KL."})
    kd_weight: float = field(default=0.67, metadata={"help": "Weight of the KL; 0 trains without a teacher."})
    ce_weight: float = field(default=0.33, metadata={"help": "Weight of the cross-entropy with the labels."})
    kind: str = field(default="forward_kl", metadata={"help": f"One of {', '.join(KINDS)}."})
    hidden_weight: float = field(default=0.0, metadata={"help": "Weight of the hidden-state term."})
    chunk_tokens: int | None = field(default=None, metadata={"help": "Tokens in a chunk (default: chosen)."})
    ignore_index: int = field(default=-100, metadata={"help": "Label of tokens that do not count."})

    def __post_init__(self) -> None:
        if not 0.0 < self.temperature < float("inf"):
            raise ConfigError(f"temperature is a number > 0, got {self.temperature}. A plain KL has 1.0.")
        for name in ("kd_weight", "ce_weight", "hidden_weight"):
            weight = getattr(self, name)
            if not 0.0 <= weight < float("inf"):
                raise ConfigError(f"{name} is a number >= 0, got {weight}. To leave the term out write 0.")
        if self.kd_weight == self.ce_weight == self.hidden_weight == 0.0:
            raise ConfigError("kd_weight, ce_weight and hidden_weight are all 0. Set at least one of them.")
        if self.kind not in KINDS:
            raise ConfigError(f"unknown kind of distillation {self.kind!r}; known: {', '.join(KINDS)}.")
        if self.chunk_tokens is not None and self.chunk_tokens < 1:
            raise ConfigError(f"chunk_tokens is at least 1, got {self.chunk_tokens}. Or leave it out.")

    @overload
    def __call__(
        self,
        student_logits: Tensor,
        teacher_logits: Tensor | None,
        labels: Tensor,
        num_items: int | Tensor | None = ...,
        *,
        labels_are_shifted: bool = ...,
        student_states: Sequence[Tensor] = ...,
        teacher_states: Sequence[Tensor] = ...,
    ) -> DistillationResult: ...

    @overload
    def __call__(self, outputs: Any, labels: Tensor | None, *, num_items_in_batch: Any) -> Tensor: ...

    def __call__(self, *args: Any, **kwargs: Any) -> DistillationResult | Tensor:
        """The loss from logits (or, as a `compute_loss_func`, from outputs: see the class).

        Args:
            student_logits: [..., vocab] float16, bfloat16 or float32; the arithmetic is float32.
            teacher_logits: the same shape, gets no gradient. None when kd_weight is 0.
            labels: [...] int64. As in transformers, position i predicts labels[..., i + 1].
            num_items: divides the sums over tokens (default: the labels that count in this call).
                Under gradient accumulation: the labels that count in all its batches; divide no further.
            labels_are_shifted: position i predicts labels[..., i].
            student_states, teacher_states: hidden states [..., width], one per layer, for the hidden term.
        Raises:
            ConfigError: student and teacher differ in vocabulary or positions; a term lacks its inputs.
            DataError: labels of another shape, or (checked on a CPU only) outside the vocabulary.
        """
        if "num_items_in_batch" in kwargs:
            return self._of_outputs(*args, **kwargs)
        return self._of_logits(*args, **kwargs)

    def fused(
        self,
        student_hidden: Tensor,
        student_head_weight: Tensor,
        teacher_hidden: Tensor | None,
        teacher_head_weight: Tensor | None,
        labels: Tensor,
        num_items: int | Tensor | None = None,
        student_head_bias: Tensor | None = None,
        teacher_head_bias: Tensor | None = None,
        *,
        softcap: float | None = None,
        logit_scale: float | None = None,
        labels_are_shifted: bool = False,
        student_states: Sequence[Tensor] = (),
        teacher_states: Sequence[Tensor] = (),
    ) -> DistillationResult:
        """The loss from last hidden states and heads, without ever holding [tokens, vocab].

        logits = softcap * tanh(logit_scale * (hidden @ weight.T + bias) / softcap), for student and teacher;
        the products run in the dtype of the hidden states, or of autocast where it is on.

        Args:
            student_hidden: [..., width], after the final norm.
            student_head_weight: [vocab, width]. Its gradient, if it wants one, is summed in float32.
            teacher_hidden, teacher_head_weight: of any width, get no gradient. None when kd_weight is 0.
            student_head_bias, teacher_head_bias: [vocab].
            softcap, logit_scale: None where the models have none.
            labels, num_items, labels_are_shifted, student_states, teacher_states: as in `__call__`.
        Raises:
            ConfigError: as in `__call__`, or a head does not fit its hidden states.
            DataError: as in `__call__`.
        """
        head = (student_head_weight, student_head_bias, softcap, logit_scale)
        student = LogitsFromHidden(student_hidden, *head)
        teacher = None
        if teacher_hidden is not None and teacher_head_weight is not None:
            head = (teacher_head_weight, teacher_head_bias, softcap, logit_scale)
            cast = student.cast if teacher_head_weight is student_head_weight else None
            teacher = LogitsFromHidden(teacher_hidden, *head, cast=cast)
        labels = self._targets(labels, student_hidden.shape[:-1], labels_are_shifted)
        return self._loss(student, teacher, labels, num_items, student_states, teacher_states)

    def _of_logits(
        self,
        student_logits: Tensor,
        teacher_logits: Tensor | None,
        labels: Tensor,
        num_items: int | Tensor | None = None,
        *,
        labels_are_shifted: bool = False,
        student_states: Sequence[Tensor] = (),
        teacher_states: Sequence[Tensor] = (),
    ) -> DistillationResult:
        student = GivenLogits(student_logits)
        teacher = None if teacher_logits is None else GivenLogits(teacher_logits)
        labels = self._targets(labels, student_logits.shape[:-1], labels_are_shifted)
        return self._loss(student, teacher, labels, num_items, student_states, teacher_states)

    def _of_outputs(self, outputs: Any, labels: Tensor | None, *, num_items_in_batch: Any) -> Tensor:
        teacher_logits = getattr(outputs, "teacher_logits", None)
        if self.kd_weight and teacher_logits is None:
            raise ConfigError(
                f"kd_weight is {self.kd_weight}, and the outputs have no `teacher_logits`, although a "
                "compute_loss_func sees nothing else. Add them in the model's forward, use "
                "AdaptiveSparseTrainer, or set kd_weight=0."
            )
        teacher = None if teacher_logits is None else GivenLogits(teacher_logits)
        labels = self._targets(labels, outputs.logits.shape[:-1], labels_are_shifted=False)
        return self._loss(GivenLogits(outputs.logits), teacher, labels, num_items_in_batch, (), ()).loss

    def _targets(self, labels: Tensor | None, shape: torch.Size, labels_are_shifted: bool) -> Tensor:
        """[tokens]: the label that each position predicts."""
        if labels is None or labels.shape != shape:
            found = "none" if labels is None else f"labels of shape {list(labels.shape)}"
            raise DataError(f"the loss needs labels of shape {list(shape)}, one per position, got {found}.")
        if not labels_are_shifted:
            labels = torch.nn.functional.pad(labels[..., 1:], (0, 1), value=self.ignore_index)
        return labels.flatten()

    @torch.compiler.disable(reason="gradients made in the forward pass are nothing to trace")
    def _loss(
        self,
        student: GivenLogits | LogitsFromHidden,
        teacher: GivenLogits | LogitsFromHidden | None,
        labels: Tensor,
        num_items: int | Tensor | None,
        student_states: Sequence[Tensor],
        teacher_states: Sequence[Tensor],
    ) -> DistillationResult:
        teacher = teacher if self.kd_weight else None
        self._check(student, teacher, labels)
        labels = labels.to(student.device)
        counts = labels != self.ignore_index
        divisor = counts.sum() if num_items is None else torch.as_tensor(num_items, device=labels.device)
        # Where no label counts the sums are 0, and the loss is 0, not 0 / 0.
        scale = 1.0 / divisor.clamp(min=1).to(student.arithmetic)
        student.want_gradients()
        plan = (self, student, teacher, labels, counts, scale)
        loss, ce, kd = _GradientsInForward.apply(*plan, *student.inputs)
        hidden = torch.zeros_like(ce)
        if self.hidden_weight:
            hidden = _relative_distance(student_states, teacher_states, counts, scale)
            loss = loss + self.hidden_weight * hidden
        return DistillationResult(loss, ce, kd, hidden.detach())

    def _check(
        self,
        student: GivenLogits | LogitsFromHidden,
        teacher: GivenLogits | LogitsFromHidden | None,
        labels: Tensor,
    ) -> None:
        if self.kd_weight and teacher is None:
            raise ConfigError(f"kd_weight is {self.kd_weight}, without a teacher. Give one, or set it to 0.")
        if teacher is not None and student.vocab != teacher.vocab:
            raise ConfigError(
                f"the student's vocabulary has {student.vocab} entries and the teacher's {teacher.vocab}, "
                "which cannot be compared one by one. Take a teacher with the student's tokenizer, or set "
                "kd_weight=0."
            )
        if teacher is not None and student.tokens != teacher.tokens:
            raise ConfigError(
                f"the student has {student.tokens} positions and the teacher {teacher.tokens}. Give both the "
                "same batch."
            )
        if labels.device.type == "cpu":  # elsewhere this would wait for the device, which does assert it
            outside = labels[(labels != self.ignore_index) & ((labels < 0) | (labels >= student.vocab))]
            if len(outside):
                raise DataError(
                    f"labels hold {int(outside[0])}, and the vocabulary has {student.vocab} entries. Take "
                    f"the model's own tokenizer, and {self.ignore_index} for tokens that do not count."
                )

    def _sums(
        self,
        student: GivenLogits | LogitsFromHidden,
        teacher: GivenLogits | LogitsFromHidden | None,
        labels: Tensor,
        counts: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """Sums of ce and kd over the tokens that count; the gradients of the mix are left with `student`."""
        limit = _CPU_CHUNK if labels.device.type == "cpu" else _GPU_CHUNK
        size = self.chunk_tokens or max(_FEWEST_TOKENS, limit // student.vocab)
        size = min(size, max(1, student.tokens))
        zero = torch.zeros((), dtype=student.arithmetic, device=labels.device)
        buffers = [zero.new_empty(size, student.vocab) for _ in range(2 if teacher is None else 4)]
        ce_sum, kd_sum = zero.clone(), zero.clone()
        for start in range(0, student.tokens, size):
            rows = slice(start, min(start + size, student.tokens))
            counted = counts[rows]
            ignored = ~counted[:, None]
            chunk_labels = labels[rows].masked_fill(~counted, 0)
            logits, spare, *of_teacher = (buffer[: len(counted)] for buffer in buffers)
            if teacher is None:
                student.fill(rows, ignored, 1.0, logits)
                ce, gradient = ce_in_place(chunk_labels, logits, spare, self.ce_weight)
            else:
                student.fill(rows, ignored, 1.0 / self.temperature, logits)
                teacher.fill(rows, ignored, 1.0 / self.temperature, of_teacher[0])
                ce, kd, gradient = kd_in_place(
                    chunk_labels,
                    (logits, spare),
                    (of_teacher[0], of_teacher[1]),
                    temperature=self.temperature,
                    ce_weight=self.ce_weight,
                    kd_weight=self.kd_weight,
                    reverse=self.kind == "reverse_kl",
                )
                kd_sum += torch.where(counted, kd, 0.0).sum()
            # where, and not a product with the mask: a token that does not count may give NaN.
            ce_sum += torch.where(counted, ce, 0.0).sum()
            student.add_gradient(rows, ignored, gradient)
        return ce_sum, kd_sum


def _relative_distance(students: Sequence[Tensor], teachers: Sequence[Tensor], counts: Tensor, scale: Tensor) -> Tensor:
    """Sum over layers of mean((student - teacher)^2) / mean(teacher^2); tokens are summed, and scaled."""
    if not students or [x.shape for x in students] != [x.shape for x in teachers]:
        raise ConfigError(
            "the hidden term compares `student_states` with `teacher_states` of the same shapes, got "
            f"{[list(x.shape) for x in students]} and {[list(x.shape) for x in teachers]}. Give both, or set "
            "hidden_weight=0."
        )
    return _DistanceInForward.apply(teachers, counts, scale, *students)


class _DistanceInForward(torch.autograd.Function):
    """The distance of `_relative_distance`, which keeps student - teacher for the backward pass and nothing else."""

    @staticmethod
    def forward(ctx, teachers, counts, scale, *students):
        total, number = scale.new_zeros(()), counts.sum().clamp(min=1)
        ctx.differences, ctx.slopes = [], []
        for student, teacher in zip(students, teachers, strict=True):
            target = teacher.flatten(0, -2).to(scale.dtype)
            # Filled, and not multiplied by the mask: a token that does not count may hold NaN.
            difference = (student.flatten(0, -2).to(scale.dtype) - target).masked_fill_(~counts[:, None], 0.0)
            squares = torch.where(counts, torch.linalg.vector_norm(target, dim=-1).square(), 0.0)
            size = (squares.sum() / number).clamp(min=torch.finfo(scale.dtype).tiny)
            total += torch.linalg.vector_norm(difference, dim=-1).square().sum() * (scale / size)
            ctx.differences.append(difference.view(student.shape).to(student.dtype))
            ctx.slopes.append(2.0 * scale / size)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx, upstream):
        if ctx.differences is None:
            raise TrainingError(_TWICE)
        differences, ctx.differences = ctx.differences, None
        slopes = (upstream * slope for slope in ctx.slopes)
        return None, None, None, *(x.mul_(slope) for x, slope in zip(differences, slopes, strict=True))


class _GradientsInForward(torch.autograd.Function):
    """(loss, ce, kd) of a chunked loss; the backward pass only scales what the forward pass has made."""

    @staticmethod
    def forward(ctx, loss, student, teacher, labels, counts, scale, *inputs):
        with torch.autocast(labels.device.type, enabled=False):
            ce, kd = loss._sums(student, teacher, labels, counts)
        ctx.gradients, student.gradients = student.gradients, [None] * len(inputs)
        ctx.dtypes = [None if x is None else x.dtype for x in inputs]
        ctx.scale = scale * student.factor
        ce, kd = ce * scale, kd * scale
        ctx.mark_non_differentiable(ce, kd)
        return loss.ce_weight * ce + loss.kd_weight * kd, ce, kd

    @staticmethod
    @once_differentiable
    def backward(ctx, upstream, *_):
        if ctx.gradients is None:
            raise TrainingError(_TWICE)
        gradients, ctx.gradients = ctx.gradients, None
        # In place, because these can be the largest tensors of a step.
        scaled = [None if x is None else x.mul_(upstream * ctx.scale) for x in gradients]
        converted = [None if x is None else x.to(dtype) for x, dtype in zip(scaled, ctx.dtypes, strict=True)]
        return None, None, None, None, None, None, *converted
