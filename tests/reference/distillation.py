"""Distillation as written on paper: all logits at once, in float64, gradients by autograd."""

from __future__ import annotations

import torch
from torch import Tensor


def next_token_labels(labels: Tensor) -> Tensor:
    """The label that each position predicts: the next one of its row, none (-100) at the end."""
    shifted = torch.full_like(labels, -100)
    shifted[..., :-1] = labels[..., 1:]
    return shifted


def logits_of(hidden: Tensor, weight: Tensor, bias=None, softcap=None, logit_scale=None) -> Tensor:
    logits = hidden @ weight.T
    if bias is not None:
        logits = logits + bias
    if logit_scale is not None:
        logits = logits * logit_scale
    return logits if softcap is None else softcap * torch.tanh(logits / softcap)


def kl(first: Tensor, second: Tensor) -> Tensor:
    """KL(first || second) of two log-probability vectors."""
    return (first.exp() * (first - second)).sum()


def distillation(
    student_logits: Tensor,
    teacher_logits: Tensor | None,
    shifted_labels: Tensor,
    *,
    temperature: float,
    ce_weight: float,
    kd_weight: float,
    kind: str = "forward_kl",
    num_items: int | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """(loss, ce, kd), one token after the other.

    Args:
        student_logits, teacher_logits: [tokens, vocab] float64.
        shifted_labels: [tokens]; a position with -100 counts in neither term.
        num_items: divides the sums; default: the labels that are not -100.
    """
    zero = student_logits.sum() * 0.0
    ce_sum, kd_sum, count = zero, zero, 0
    for position, label in enumerate(shifted_labels.tolist()):
        if label == -100:
            continue
        count += 1
        ce_sum = ce_sum - torch.log_softmax(student_logits[position], -1)[label]
        if teacher_logits is not None:
            student = torch.log_softmax(student_logits[position] / temperature, -1)
            teacher = torch.log_softmax(teacher_logits[position] / temperature, -1)
            pair = (teacher, student) if kind == "forward_kl" else (student, teacher)
            kd_sum = kd_sum + temperature**2 * kl(*pair)
    divisor = max(1, count) if num_items is None else num_items
    ce, kd = ce_sum / divisor, kd_sum / divisor
    return ce_weight * ce + kd_weight * kd, ce, kd


def hidden_distance(students: list[Tensor], teachers: list[Tensor], counts: Tensor, divisor: int) -> Tensor:
    """Sum over layers of mean((student - teacher)^2) / mean(teacher^2), for [tokens, width] states."""
    total = 0.0
    for student, teacher in zip(students, teachers, strict=True):
        student, teacher = student[counts], teacher[counts]
        total = total + (student - teacher).square().mean(-1).sum() / divisor / teacher.square().mean()
    return total
