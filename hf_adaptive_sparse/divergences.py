"""Cross-entropy and KL of a few tokens with their gradient, in the memory of the logits they are given.

With p = softmax(student / T), q = softmax(teacher / T) and d = log p - log q, a token's dloss/dlogits is

    ce_weight * (softmax(student) - onehot(label)) + kd_weight * T * (p - q)            of KL(q || p)
                                                   + kd_weight * T * p * (d - <p, d>)   of KL(p || q), reverse

Each softmax costs one pass of exp; the rest is a handful of elementwise passes over memory that is in cache.
"""

from __future__ import annotations

import torch
from torch import Tensor


def ce_in_place(labels: Tensor, logits: Tensor, spare: Tensor, weight: float) -> tuple[Tensor, Tensor]:
    """Cross-entropy, and `weight` times its gradient.

    Args:
        labels: [n] int64, all inside the vocabulary.
        logits, spare: [n, vocab], float32 or wider; both are overwritten.
    Returns:
        cross-entropy [n], gradient [n, vocab].
    """
    log_sum = _softmax(logits, out=spare)
    ce = log_sum - logits.gather(1, labels[:, None])[:, 0]
    return ce, _subtract_at(spare.mul_(weight), labels, weight)


def kd_in_place(
    labels: Tensor,
    student: tuple[Tensor, Tensor],
    teacher: tuple[Tensor, Tensor],
    *,
    temperature: float,
    ce_weight: float,
    kd_weight: float,
    reverse: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Cross-entropy at temperature 1, T^2 times the KL at temperature T, and the gradient of their mix.

    Args:
        labels: [n] int64, all inside the vocabulary.
        student, teacher: logits / T and spare memory, [n, vocab], float32 or wider; all four are overwritten.
        reverse: KL(student || teacher), and not KL(teacher || student).
    Returns:
        cross-entropy [n], divergence [n], gradient [n, vocab] for the student's logits (not for logits / T).
    """
    (logits, p), (teacher_logits, q) = student, teacher
    of_label = logits.gather(1, labels[:, None])[:, 0]
    log_sum, teacher_log_sum = _softmax(logits, out=p), _softmax(teacher_logits, out=q)
    slope = kd_weight * temperature
    if reverse:
        d = torch.sub(logits, teacher_logits, out=teacher_logits)
        p_dot_d = torch.mul(p, d, out=q).sum(-1)
        kd = p_dot_d + teacher_log_sum - log_sum
        # d still lacks its constants, which cancel in d - <p, d>.
        p_slope, rest, rest_slope = 0.0, d.sub_(p_dot_d[:, None]).mul_(p), slope
    else:
        kd = teacher_logits.sub_(logits).mul_(q).sum(-1) + log_sum - teacher_log_sum
        p_slope, rest, rest_slope = slope, q, -slope

    if temperature == 1.0:  # both terms share one softmax
        ce = log_sum - of_label
        gradient = p.mul_(ce_weight + p_slope)
    else:
        # exp(logits) up to a constant, over the logits, which nothing needs any more.
        if temperature == 2.0:
            shift, hard = log_sum, torch.square(p, out=logits)  # far cheaper than another exp
        else:
            shift = logits.amax(-1)
            hard = logits.sub_(shift[:, None]).mul_(temperature).exp_()
        total = hard.sum(-1)
        ce = temperature * (shift - of_label) + total.log()
        gradient = hard.mul_((ce_weight / total)[:, None])
        if p_slope:
            gradient.add_(p, alpha=p_slope)
    gradient.add_(rest, alpha=rest_slope)
    return ce, kd * temperature**2, _subtract_at(gradient, labels, ce_weight)


def _softmax(logits: Tensor, out: Tensor) -> Tensor:
    """Write softmax(logits) to `out`; returns the log of the sum of exp(logits), [n]."""
    torch.softmax(logits, -1, out=out)
    # The largest probability is at least 1 / vocab, so its log holds the sum: no second pass of exp.
    return logits.amax(-1) - out.amax(-1).log()


def _subtract_at(rows: Tensor, columns: Tensor, value: float) -> Tensor:
    """Subtract `value` at one column of each row, in place."""
    return rows.scatter_add_(1, columns[:, None], rows.new_full((1, 1), -value).expand(len(rows), 1))
