"""UnitStats: what one pass over calibration text measured, for the scores of units and the widths of blocks."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..errors import CalibrationError, TargetError
from ..stats import LayerStats
from ..units import Axis, Span


@dataclass(frozen=True, kw_only=True, eq=False)
class InputMoments:
    """Sums over calibration tokens of the input of one linear layer.

    Attributes:
        tokens: how many were seen.
        sums: [in] float64, sum over tokens of x_j.
        squares: [in] float64, sum over tokens of x_j^2.
        magnitudes: [in] float64, sum over windows of the square of the mean over their tokens of |x_j|.
    """

    tokens: int
    sums: Tensor
    squares: Tensor
    magnitudes: Tensor

    @property
    def mean(self) -> Tensor:
        """[in] float64."""
        return self.sums / self.tokens

    @property
    def variance(self) -> Tensor:
        """[in] float64, over all tokens (divided by their number)."""
        return (self.squares / self.tokens - self.mean.square()).clamp(min=0.0)

    @property
    def norm(self) -> Tensor:
        """[in] float64, L2 over tokens."""
        return self.squares.sqrt()


@dataclass(frozen=True, kw_only=True, eq=False)
class UnitStats:
    """What was measured; fields that nobody asked for are empty.

    Gradients are kept whole, not as one product per unit: |w * g| is taken of the gradient over all batches, so that
    it cannot be summed before the last of them.

    Attributes:
        gradients: name of a parameter -> gradient of the mean loss of a token, of its shape, float32.
        inputs: name of a weight that reads units -> moments of its input.
        grams: name of a weight that reads units -> Gram matrix of its input.
        losses: name of an axis -> [units], rise of the mean loss of a token when one unit alone is removed.
        cosines: [blocks] float64, mean over tokens of the cosine of what enters and what leaves each block.
        loss: mean loss of a token of the whole model; None where nothing was run.
    """

    gradients: Mapping[str, Tensor] = field(default_factory=dict)
    inputs: Mapping[str, InputMoments] = field(default_factory=dict)
    grams: Mapping[str, LayerStats] = field(default_factory=dict)
    losses: Mapping[str, Tensor] = field(default_factory=dict)
    cosines: Tensor | None = None
    loss: float | None = None

    def gradient(self, axis: Axis, tensor: str, score: str) -> Tensor:
        """Of one parameter; CalibrationError, naming the `score` that needs it, where it is missing or not finite."""
        if tensor not in self.gradients:
            raise CalibrationError(f"{axis.name}: {score} needs the gradient of {tensor}, which was not collected.")
        gradient = self.gradients[tensor]
        if not gradient.isfinite().all():
            raise CalibrationError(
                f"{axis.name}: the gradient of {tensor} holds NaN or inf. Load the model in float32 or bfloat16, and "
                "check its loss on this text."
            )
        return gradient

    def moments(self, axis: Axis, tensor: str, score: str) -> InputMoments:
        """Of the input of one weight; CalibrationError where they are missing, without tokens, or not finite."""
        if tensor not in self.inputs:
            raise CalibrationError(f"{axis.name}: {score} needs the inputs of {tensor}, which were not collected.")
        moments = self.inputs[tensor]
        if not moments.tokens:
            raise CalibrationError(f"{axis.name}: no calibration token reached {tensor}. Calibrate on more text.")
        if not moments.squares.isfinite().all():
            raise CalibrationError(
                f"{axis.name}: the inputs of {tensor} hold NaN or inf. Load the model in float32 or bfloat16, and "
                "check its loss on this text."
            )
        return moments

    def gram(self, axis: Axis, tensor: str, what: str) -> LayerStats:
        """Of the input of one weight; CalibrationError, naming `what` needs it, where it is missing."""
        if tensor not in self.grams:
            raise CalibrationError(
                f"{axis.name}: {what} needs the Gram matrix of the inputs of {tensor}, which was not collected."
            )
        return self.grams[tensor]


def unit_sums(span: Span, values: Tensor) -> Tensor:
    """[units] sums over all slices of each unit, of `values` that lie as the tensor of the span does."""
    values = values.movedim(span.dim, 0)
    return values.reshape(len(values), -1).sum(1)[span.index.to(values.device)].sum(1)


def readers(axis: Axis, weights: Mapping[str, Tensor], score: str) -> list[tuple[Span, Tensor]]:
    """The matrices that read the units, as float32 [out, in] whose columns the index of the span names.

    Raises:
        TargetError: there are none: a whole expert or layer is read by no matrix of its own.
    """
    found = [
        (span, weights[span.tensor].detach().float().movedim(span.dim, 1))
        for span in axis.spans
        if span.reads and weights[span.tensor].dim() == 2
    ]
    if not found:
        raise TargetError(
            f"{axis.name}: {score} scores a unit by the columns of the linear layer that reads it, and none reads "
            f"units of kind {axis.kind} alone. Use a score of weights, such as taylor or l2."
        )
    return found


def as_scores(total: Tensor) -> Tensor:
    """[units] float32, detached, of its own memory."""
    return total.detach().to(torch.float32)
