"""SparseAdamW, one weight at a time and in float64: slow and obvious."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def sparse_adamw(
    weight: Tensor,
    keep: Tensor,
    grads: list[Tensor],
    *,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    decay: float,
    decay_steps: int,
    decay_norm: str,
    second_moment: str,
    scale_interval: int,
) -> Tensor:
    """The weight after one step per gradient; all tensors [out, in]."""
    rows, columns = weight.shape
    w = weight.double().tolist()
    m = [[0.0] * columns for _ in range(rows)]
    v = [[0.0] * columns for _ in range(rows)]
    scale = 0.0
    for step, grad in enumerate(grads, start=1):
        g = grad.double().tolist()
        w = [[x * (1 - lr * weight_decay) for x in row] for row in w]
        if decay_norm == "relative" and (step == 2 or (step % scale_interval == 0 and step > 1)):
            mean_v = sum(map(sum, v)) / (rows * columns) / (1 - beta2 ** (step - 1))
            mean_w = sum(x * x for row in w for x in row) / (rows * columns)
            scale = math.sqrt(mean_v) / math.sqrt(mean_w)
        pull = decay * (min(1.0, step / decay_steps) if decay_steps else 1.0)
        pull *= scale if decay_norm == "relative" else 1.0
        for i in range(rows):
            for j in range(columns):
                m[i][j] = beta1 * m[i][j] + (1 - beta1) * g[i][j]
                u = m[i][j] + (0.0 if keep[i, j] else pull * w[i][j])
                x = u if second_moment == "update" else g[i][j]
                v[i][j] = beta2 * v[i][j] + (1 - beta2) * x * x
                denominator = math.sqrt(v[i][j] / (1 - beta2**step)) + eps
                w[i][j] -= lr / (1 - beta1**step) * u / denominator
    return torch.tensor(w, dtype=torch.float64)
