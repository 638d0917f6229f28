"""Sensitivities, slow and obvious: one token, one second derivative, one eigenvalue at a time, in float64."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor


def fisher_trace(weight: Tensor, inputs: Tensor, loss_of_token: Callable[[Tensor, int], Tensor]) -> float:
    """Mean over tokens of the squared norm of the gradient of that token's loss with respect to the weight."""
    total = 0.0
    for token, x in enumerate(inputs):
        leaf = weight.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(loss_of_token(leaf @ x, token), leaf)
        total += float(gradient.square().sum())
    return total / len(inputs)


def hessian_trace(loss_of: Callable[[Tensor], Tensor], parameter: Tensor) -> float:
    """Sum of the second derivatives, one entry of the parameter after the other."""
    leaf = parameter.detach().clone().requires_grad_()
    (gradient,) = torch.autograd.grad(loss_of(leaf), leaf, create_graph=True)
    total = 0.0
    for place in range(leaf.numel()):
        (second,) = torch.autograd.grad(gradient.flatten()[place], leaf, retain_graph=True)
        total += float(second.flatten()[place])
    return total


def output_error(dense_weight: Tensor, weight: Tensor, inputs: Tensor) -> tuple[float, float]:
    """Relative to the dense output, and as a mean over tokens."""
    error = sum(float(((weight - dense_weight) @ x).square().sum()) for x in inputs)
    return error / sum(float((dense_weight @ x).square().sum()) for x in inputs), error / len(inputs)


def outlier_ratio(weight: Tensor, inputs: Tensor, threshold: float) -> float:
    """How many of |W_ij| * ||X_j|| exceed `threshold` times their mean."""
    rows, columns = weight.shape
    scores = [abs(float(weight[i, j])) * float(inputs[:, j].norm()) for i in range(rows) for j in range(columns)]
    mean = sum(scores) / len(scores)
    return sum(score > threshold * mean for score in scores) / len(scores)


def hill_exponent(weight: Tensor) -> float:
    """Of the eigenvalues of the smaller of W W^T and W^T W, with the upper half as tail."""
    smaller = weight @ weight.T if weight.shape[0] <= weight.shape[1] else weight.T @ weight
    values = sorted(float(value) for value in torch.linalg.eigvalsh(smaller))
    n, k = len(values), len(values) // 2
    # The paper counts from 1: lambda_{n-i+1} is values[n-i], and lambda_{n-k} is values[n-k-1].
    return 1 + k / sum(math.log(values[n - i] / values[n - k - 1]) for i in range(1, k + 1))
