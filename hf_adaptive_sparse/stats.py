"""LayerStats: what calibration measured about the input of one linear layer, or of several that share it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from .errors import CalibrationError

DAMPING = 0.01

# Of the largest eigenvalue: what the last rung of the ladder lifts smaller ones to.
_EIGENVALUE_FLOOR = 1e-6
# Columns of a factor or an inverse computed together; of a factor twice as many where it is wider than _WIDE.
_TILE, _WIDE = 256, 4096


@dataclass(frozen=True, kw_only=True, eq=False)
class LayerStats:
    """Sums over calibration tokens, so that two of them merge by addition.

    Attributes:
        tokens: how many were seen.
        squares: [in] float32, sum over tokens of x_j^2.
        gram: [in, in] float32, sum of x x^T, or None where no score or solver asked for it. Its diagonal is `squares`.
        cross: [in, in] float32, sum of x_dense x^T, where the dense model's inputs were kept as well; else None.
        gradient: [out, in] float32, root mean square over sequences of dLoss/dWeight of the dense model; else None.
        damping: added to the unit diagonal of the scaled Gram matrix before it is factored.
        where: name of the layer, for messages.
    """

    tokens: int
    squares: Tensor
    gram: Tensor | None = None
    cross: Tensor | None = None
    gradient: Tensor | None = None
    damping: float = DAMPING
    where: str = "layer"

    def __add__(self, other: LayerStats) -> LayerStats:
        """The statistics of both sets of tokens. `gradient` must be that of the same dense model in both."""
        return replace(
            self,
            tokens=self.tokens + other.tokens,
            squares=self.squares + other.squares,
            gram=None if self.gram is None or other.gram is None else self.gram + other.gram,
            cross=None if self.cross is None or other.cross is None else self.cross + other.cross,
        )

    def with_gradient(self, gradient: Tensor) -> LayerStats:
        """The same statistics of a layer that has its own gradient [out, in] among several that share the input."""
        return replace(self, gradient=gradient)

    def require_tokens(self, what: str) -> None:
        """Raise CalibrationError, naming `what` needs them, unless tokens were seen and all of them were finite."""
        if not self.tokens:
            raise CalibrationError(
                f"{self.where}: {what} needs calibration tokens, and none reached this layer. Calibrate on more text."
            )
        if self._first_not_finite is not None:
            raise CalibrationError(
                f"{self.where}: the calibration inputs hold NaN or inf (input feature {self._first_not_finite}). Load "
                "the model in float32 or bfloat16, and check the dense model on this text."
            )

    @cached_property
    def _first_not_finite(self) -> int | None:
        """Looked for once: solvers ask thousands of times, and a GPU has to be waited for."""
        broken = (~self.squares.isfinite()).nonzero()
        return int(broken[0]) if len(broken) else None

    def require_gram(self, what: str) -> Tensor:
        """The Gram matrix; CalibrationError, naming `what` needs it, where it was not collected."""
        self.require_tokens(what)
        if self.gram is None:
            raise CalibrationError(
                f"{self.where}: {what} needs the Gram matrix of the inputs, which was not collected."
            )
        return self.gram

    @cached_property
    def scaled(self) -> ScaledGram:
        """The Gram matrix scaled to unit diagonal, damped and factored; computed once."""
        return scale_gram(self.require_gram("a solver or score of second order"), self)


@dataclass(frozen=True, eq=False)
class ScaledGram:
    """D^-1/2 H D^-1/2 + damping I, with D the diagonal of H = gram / tokens.

    Scaled first, because inputs of massive channels are 100 to 1000 times larger than the others, and damping by a
    part of the mean diagonal would drown the small ones. A weight in this basis is W * scale.

    Attributes:
        matrix: [in, in] float32, unit diagonal plus damping; a dead input has 1 and zeros.
        scale: [in] float32, root mean square of each input; 1 for a dead input.
        dead: [in] bool, inputs that were 0 for every token.
        factor: [in, in] float32, upper M with M M^T = matrix: the Cholesky factor from the last input to the first.
        rung: what it took to factor it: "damping 0.01", ..., "eigenvalue floor 1e-06".
    """

    matrix: Tensor
    scale: Tensor
    dead: Tensor
    factor: Tensor
    rung: str

    @cached_property
    def upper(self) -> Tensor:
        """[in, in] float32, U = M^-1, with U^T U = matrix^-1 and U_jj = 1 / M_jj; computed when it is asked for."""
        return upper_inverse(self.factor)

    @cached_property
    def removal(self) -> Tensor:
        """[in] float32, |scale_j| M_jj: times |W_ij|, the root of what its removal costs; 0 for a dead input."""
        return (self.scale * self.factor.diagonal()).masked_fill_(self.dead, 0.0)


def scale_gram(gram: Tensor, stats: LayerStats) -> ScaledGram:
    """Scale, damp and factor a Gram matrix: damping, ten times more (three times), float64, an eigenvalue floor.

    Raises:
        CalibrationError: damping is 0 and the matrix has not full rank.
    """
    diagonal = gram.diagonal() / stats.tokens
    dead = diagonal <= 0
    scale = torch.where(dead, torch.ones_like(diagonal), diagonal.sqrt())
    inverse = scale.reciprocal()
    matrix = gram * (inverse / stats.tokens)[:, None]
    matrix *= inverse
    for damping in (stats.damping, *(stats.damping * 10**power for power in (1, 2, 3))):
        matrix.diagonal().fill_(1.0 + damping)
        factor = _factor(matrix)
        # A positive pivot can be a rounding error, so with nothing added only the rank says that there is an inverse.
        if damping == 0 and (rank := int(torch.linalg.matrix_rank(matrix, hermitian=True))) < len(matrix):
            raise CalibrationError(
                f"{stats.where}: cannot factor the Gram matrix: rank {rank} of {len(matrix)} ({stats.tokens} tokens, "
                f"damping=0.0). Calibrate on at least {len(matrix)} tokens, or set damping=0.01."
            )
        if factor is not None:
            return ScaledGram(matrix, scale, dead, factor, f"damping {damping:g}")
    damped = matrix.double()
    damped.diagonal().fill_(1.0 + stats.damping)
    factor = _factor(damped)
    if factor is not None:
        return ScaledGram(damped.float(), scale, dead, factor.float(), f"float64, damping {stats.damping:g}")
    values, vectors = torch.linalg.eigh(damped)
    values = values.clamp(min=_EIGENVALUE_FLOOR * values[-1].item())
    damped = (vectors * values) @ vectors.T
    factor = _factor((damped + damped.T) / 2)
    if factor is None:
        raise CalibrationError(
            f"{stats.where}: the Gram matrix cannot be factored, not even in float64 with its eigenvalues lifted. "
            f"Calibrate on more than {stats.tokens} tokens."
        )
    return ScaledGram(damped.float(), scale, dead, factor.float(), f"eigenvalue floor {_EIGENVALUE_FLOOR:g}")


def _factor(matrix: Tensor) -> Tensor | None:
    """Upper M with M M^T = matrix, or None if the matrix is not positive definite.

    Tile by tile from the last columns to the first, because the factorisation of the library then clears, and the
    update of what is left computes, only what lies on one side of the diagonal. A GPU is faster with a single tile.
    """
    factor, tile = matrix.clone(), _TILE if len(matrix) <= _WIDE else 2 * _TILE
    if matrix.is_cuda:
        tile = len(matrix)
    for end in range(len(factor), 0, -tile):
        start = max(0, end - tile)
        own = factor[start:end, start:end]
        lower, info = torch.linalg.cholesky_ex(own.flip(0, 1))
        if int(info):
            return None
        own.copy_(lower.flip(0, 1))
        factor[end:, start:end] = 0.0
        if start:
            panel = factor[:start, start:end]
            panel.copy_(panel @ upper_inverse(own).T)
            for column in range(0, start, tile):
                above = slice(0, min(column + tile, start))
                columns = slice(column, above.stop)
                factor[above, columns].addmm_(panel[above], panel[columns].T, alpha=-1)
    # The sum of all: NaN or inf anywhere makes it so, and it takes a tenth of the time of asking each.
    return factor if bool(factor.sum().isfinite()) else None


def upper_inverse(upper: Tensor) -> Tensor:
    """Of an upper triangular matrix [n, n].

    Tile by tile of columns, each only down to its diagonal: a third of the arithmetic of solving for all at once.
    """
    inverse = torch.eye(len(upper), dtype=upper.dtype, device=upper.device)
    for start in range(0, len(inverse), _TILE):
        end = start + _TILE
        columns = inverse[:end, start:end]
        columns.copy_(torch.linalg.solve_triangular(upper[:end, :end], columns, upper=True))
    return inverse
