"""Scores of units, one number at a time in float64."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from hf_adaptive_sparse.units import Axis


def slices(axis: Axis, tensors: dict[str, Tensor], unit: int) -> list[Tensor]:
    """What belongs to a unit, slice by slice, flat."""
    found = []
    for span in axis.spans:
        for position in span.index[unit].tolist():
            found.append(tensors[span.tensor].double().select(span.dim, position).flatten())
    return found


def scores(
    name: str, axis: Axis, weights: dict[str, Tensor], gradients: dict[str, Tensor], inputs: dict[str, Tensor]
) -> Tensor:
    """[units] float64.

    Args:
        inputs: reading weight -> [windows, length, in].
    """
    return torch.tensor([_one(name, axis, weights, gradients, inputs, unit) for unit in range(axis.count)]).double()


def _one(name, axis, weights, gradients, inputs, unit) -> float:
    own = slices(axis, weights, unit)
    if name == "taylor":
        return sum(
            abs(w * g)
            for ws, gs in zip(own, slices(axis, gradients, unit), strict=True)
            for w, g in zip(ws.tolist(), gs.tolist(), strict=True)
        )
    if name == "l1":
        return sum(abs(w) for ws in own for w in ws.tolist())
    if name == "l2":
        return math.sqrt(sum(w * w for ws in own for w in ws.tolist()))
    total, read = 0.0, 0
    for span in axis.spans:
        if not span.reads:
            continue
        for position in span.index[unit].tolist():
            column = weights[span.tensor].double().select(span.dim, position).tolist()
            windows = inputs[span.tensor][:, :, position].tolist()
            x = [value for window in windows for value in window]
            read += 1
            if name == "wanda_sp":
                total += sum(abs(w) for w in column) / len(column) * math.sqrt(sum(v * v for v in x))
            elif name == "flap":
                mean = sum(x) / len(x)
                total += sum((v - mean) ** 2 for v in x) / len(x) * sum(w * w for w in column)
            else:
                total += sum((sum(abs(v) for v in window) / len(window)) ** 2 for window in windows)
    if name == "flap":
        return total / read
    return math.sqrt(total) if name == "activation" else total


def fused(axis: Axis, weights: dict[str, Tensor], gradients: dict[str, Tensor]) -> Tensor:
    """Element-wise and vector-wise Taylor, each over its mean and over twice its variance."""
    fine, coarse = [], []
    for unit in range(axis.count):
        fine.append(_one("taylor", axis, weights, gradients, {}, unit))
        vectors = 0.0
        for span in axis.spans:
            index = span.index[unit]
            product = weights[span.tensor].double() * gradients[span.tensor].double()
            vectors += abs(float(product.index_select(span.dim, index).sum()))
        coarse.append(vectors)
    total = torch.zeros(axis.count, dtype=torch.float64)
    for values in (fine, coarse):
        mean = sum(values) / len(values)
        relative = [value / mean for value in values]
        variance = sum((r - 1.0) ** 2 for r in relative) / len(relative)
        total += torch.tensor([r / (2 * variance) for r in relative]).double()
    return total
