"""Scores, slow and obvious: one weight at a time, in float64, with a fresh inverse for every column."""

from __future__ import annotations

import torch
from torch import Tensor


def scores(name: str, weight: Tensor, inputs: Tensor, gradient: Tensor, damping: float) -> Tensor:
    """The score called `name` of every weight, [out, in] float64, from the [tokens, in] inputs themselves."""
    weight, inputs, gradient = weight.double(), inputs.double(), gradient.double()
    one = {
        "magnitude": lambda i, j: abs(weight[i, j]),
        "wanda": lambda i, j: abs(weight[i, j]) * inputs[:, j].norm(),
        "obs": lambda i, j: weight[i, j] ** 2 * rise(inputs, j, damping),
        "isc": lambda i, j: weight[i, j] ** 2 * (damped_gram(inputs, damping)[j, j] + rise(inputs, j, damping)),
        "ria": lambda i, j: (
            (abs(weight[i, j]) / weight[i].abs().sum() + abs(weight[i, j]) / weight[:, j].abs().sum())
            * inputs[:, j].norm().sqrt()
        ),
        "taylor": lambda i, j: abs(weight[i, j]) * gradient[i, j],
    }[name]
    return torch.stack([torch.stack([one(i, j) for j in range(weight.shape[1])]) for i in range(len(weight))])


def damped_gram(inputs: Tensor, damping: float) -> Tensor:
    """Mean of x x^T, with `damping` times its own diagonal added."""
    gram = inputs.T @ inputs / len(inputs)
    return gram + damping * gram.diagonal().diag()


def rise(inputs: Tensor, column: int, damping: float) -> Tensor:
    """1 / [(H_{j:,j:})^-1]_jj, in the units of the inputs."""
    rest = damped_gram(inputs, damping)[column:, column:]
    return 1 / torch.linalg.inv(rest)[0, 0]
