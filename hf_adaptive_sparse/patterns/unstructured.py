"""Unstructured sparsity: any weight of a matrix may be zero, with an exact count."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import ConfigError


@dataclass(frozen=True)
class Unstructured:
    """Keep the best weights of a whole matrix, wherever they are."""

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
        kept = scores.numel() - round(sparsity * scores.numel())
        # A stable sort and not topk: topk does not say which of several equal scores it returns.
        flat = scores.reshape(-1)
        if flat.is_floating_point():
            flat = flat.nan_to_num(nan=torch.inf, posinf=torch.inf, neginf=-torch.inf)
        order = flat.argsort(descending=True, stable=True)
        keep = torch.zeros(scores.numel(), dtype=torch.bool, device=scores.device)
        keep[order[:kept]] = True
        return keep.view(scores.shape)
