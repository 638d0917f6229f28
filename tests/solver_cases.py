"""Random layers whose inputs hang together, and choosers of masks that know no score of the package."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from hf_adaptive_sparse.patterns import parse_pattern
from hf_adaptive_sparse.stats import LayerStats


def random_inputs(seed: int, columns: int, tokens: int) -> Tensor:
    """[tokens, columns] float64, correlated, of different sizes."""
    generator = torch.Generator().manual_seed(seed)
    kwargs = {"generator": generator, "dtype": torch.float64}
    few = torch.randn(tokens, max(2, columns // 4), **kwargs)
    inputs = few @ torch.randn(few.shape[1], columns, **kwargs) + 0.5 * torch.randn(tokens, columns, **kwargs)
    return inputs * torch.exp(torch.randn(columns, **kwargs))


def stats_of(inputs: Tensor, damping: float = 0.01) -> LayerStats:
    """Statistics in the dtype of the inputs."""
    gram = inputs.T @ inputs
    return LayerStats(tokens=len(inputs), squares=gram.diagonal().clone(), gram=gram, damping=damping)


def random_layer(
    seed: int, rows: int = 6, columns: int = 24, tokens: int = 200, dtype: torch.dtype = torch.float64
) -> tuple[Tensor, LayerStats]:
    """A weight [rows, columns], and statistics in float64 for a float64 weight, else in float32."""
    inputs = random_inputs(seed, columns, tokens)
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed + 1), dtype=torch.float64)
    return weight.to(dtype), stats_of(inputs if dtype == torch.float64 else inputs.float())


class Chooser:
    """choose_mask of a pattern, by w^2 times a factor per input; unstructured: the same sparsity in every slice."""

    def __init__(self, pattern: str, factor: Tensor, sparsity: float = 0.5) -> None:
        self.pattern, self.factor, self.sparsity = parse_pattern(pattern), factor, sparsity
        if pattern != "unstructured":
            self.width = self.pattern.m
        self.slices: list[tuple[int, int]] = []
        self.seen: list[Tensor] = []

    def __call__(self, weight: Tensor, columns: slice) -> Tensor:
        self.slices.append(columns.indices(len(self.factor))[:2])
        self.seen.append(weight)
        scores = weight.square() * self.factor[columns].to(weight.dtype)
        sparsity = {"sparsity": self.sparsity} if self.pattern.name == "unstructured" else {}
        return self.pattern.keep_mask(scores, **sparsity)


def by_input_size(pattern: str, stats: LayerStats, sparsity: float = 0.5) -> Chooser:
    """Wanda's choice: w^2 times the mean square of the input."""
    return Chooser(pattern, stats.squares / stats.tokens, sparsity)


def by_pruning_error(pattern: str, stats: LayerStats, sparsity: float = 0.5) -> Chooser:
    """SparseGPT's choice: w^2 / U_jj^2, in the scaled basis."""
    scaled = stats.scaled
    return Chooser(pattern, (scaled.scale / scaled.upper.diagonal()).square(), sparsity)


def fixed(keep: Tensor) -> Callable[[Tensor, slice], Tensor]:
    return lambda _, columns: keep[:, columns]


def hessian(stats: LayerStats) -> Tensor:
    """[in, in] float64: what a solver minimises with, damping included, in the unscaled basis."""
    scaled = stats.scaled
    scale = scaled.scale.double()
    return scaled.matrix.double() * scale[:, None] * scale


def layer_error(weight: Tensor, dense: Tensor, stats: LayerStats) -> Tensor:
    """[out] float64: squared error of the outputs of each row, per token, damping included."""
    difference = weight.double() - dense.double()
    return ((difference @ hessian(stats)) * difference).sum(dim=1)


def is_negative_zero(weight: Tensor) -> Tensor:
    return (weight == 0) & weight.signbit()
