"""Unstructured sparsity: any weight of a matrix may be zero, with an exact count."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import ConfigError

SCOPES = ("matrix", "row")


@dataclass(frozen=True)
class Unstructured:
    """Keep the best weights, wherever they are.

    Args:
        scope: "matrix" compares all weights of a matrix; "row" only those of one output, as Wanda does, so that
            every row gets the same number of zeros (one more or less, to make the count of the matrix exact).
    Raises:
        ConfigError: no such scope.
    """

    scope: str = "matrix"

    def __post_init__(self) -> None:
        if self.scope not in SCOPES:
            raise ConfigError(f"unknown scope {self.scope!r}; known: {', '.join(SCOPES)}.")

    @property
    def name(self) -> str:
        return "unstructured"

    def keep_mask(self, scores: Tensor, sparsity: float) -> Tensor:
        """Zero exactly round(sparsity * numel) weights: those with the smallest scores.

        Args:
            scores: [out, in], any real dtype, larger = keep; NaN counts as infinite. Of equal scores the
                lower index is kept.
            sparsity: fraction of zeros, in [0, 1).
        Returns:
            [out, in] bool.
        Raises:
            ConfigError: sparsity is not in [0, 1).
        """
        if not 0.0 <= sparsity < 1.0:
            raise ConfigError(
                f"sparsity is a fraction of zeros in [0, 1), got {sparsity}. For 50 % write 0.5."
            )
        zeros = round(sparsity * scores.numel())
        if self.scope == "matrix":
            return zero_smallest(scores.reshape(1, -1), torch.tensor([zeros], device=scores.device)).view(scores.shape)
        rows = max(scores.shape[0], 1)
        extra = torch.arange(scores.shape[0], device=scores.device) < zeros % rows
        return zero_smallest(scores, zeros // rows + extra.long())

    def keep_as_many(self, scores: Tensor, like: Tensor) -> Tensor:
        """As many weights as `like` keeps, in all or, where the scope is a row, in each row: the best by `scores`.

        Args:
            scores: [out, k], any real dtype.
            like: [out, k] bool.
        """
        zeros = like.logical_not().sum(dim=1)
        if self.scope == "row":
            return zero_smallest(scores, zeros)
        return zero_smallest(scores.reshape(1, -1), zeros.sum().view(1)).view(scores.shape)


def zero_smallest(scores: Tensor, zeros: Tensor) -> Tensor:
    """Keep all but the `zeros[row]` smallest scores of each row; of equal scores the lower index is kept.

    Args:
        scores: [rows, columns], any real dtype; NaN counts as infinite.
        zeros: [rows] int64.
    Returns:
        [rows, columns] bool.
    """
    if scores.is_floating_point():
        scores = scores.nan_to_num(nan=torch.inf, posinf=torch.inf, neginf=-torch.inf)
    rows, columns = scores.shape
    if not rows or not bool(zeros.any()):
        return torch.ones_like(scores, dtype=torch.bool)
    # The largest score that becomes zero, by selection where there is one row: five times faster than a stable sort.
    last = (zeros - 1).clamp(min=0)
    if rows == 1:
        threshold = scores.kthvalue(int(last) + 1, dim=1, keepdim=True).values
    else:
        threshold = scores.sort(dim=1).values.gather(1, last[:, None])
    below, tied = scores < threshold, scores == threshold
    missing = zeros - below.sum(dim=1)
    from_the_right = tied.flip(1).cumsum(1).flip(1)
    return ~(below & (zeros[:, None] > 0) | tied & (from_the_right <= missing[:, None]))
