"""Floating point operations of what is done with the Gram matrix of one input, by the sizes of the matrices.

Products count 2 for a multiplication with its addition, with the tiles that are really computed. Factorisations,
inverses and spectra count as textbooks have them (Golub and Van Loan, "Matrix Computations"), and stand apart.
"""

from __future__ import annotations

from ..methods.one_shot import OneShotConfig
from ..solvers.obs_sweep import TILE

ADMM_STEPS = 45
"""Assumed: the support rests after 30 to 60."""

FACTORISATIONS = "factorisations"

_TILE = 256  # columns of a Gram matrix that are computed together
_ADMM_INTERVAL = 3  # steps with the same penalty
_FISTA_PRODUCTS = 12 * (20 + 2) + 2 + 11  # rounds x (steps, errors), the start, conjugate gradients
_THANOS_BLOCK = 128


def half_square(features: int) -> int:
    """Per row, of a product with a symmetric [features, features] matrix: its tiles on and below the diagonal."""
    return sum(2 * (features - start) * min(_TILE, features - start) for start in range(0, features, _TILE))


def product_flops(rows: int, features: int) -> int:
    """Of one product of a weight with a Gram matrix: an iteration of conjugate gradients or of ADMM."""
    return 2 * rows * features**2


def factor_flops(features: int) -> float:
    """Of a Cholesky factorisation, or of the inverse of its factor."""
    return features**3 / 3


def sweep_flops(rows: int, features: int) -> int:
    """Of an OBS sweep: every column changes every later one, and tiles take in what all before them ask."""
    later_tiles = [min(TILE, features - start) for start in range(TILE, features, TILE)]
    return rows * (features**2 + sum(2 * tile**2 for tile in later_tiles))


def spectrum_flops(rows: int, features: int) -> float:
    """Of the singular values of a matrix."""
    long, short = max(rows, features), min(rows, features)
    return 4 * long * short**2 - 4 / 3 * short**3


def curve_flops(rows: int, features: int) -> float:
    """Of measuring one point of the error curves of matrices with `rows` outputs: a sweep, and its error."""
    return sweep_flops(rows, features) + 2 * rows * half_square(features)


def solving_flops(rows: int, features: int, config: OneShotConfig) -> dict[str, float]:
    """Term -> operations of pruning matrices with `rows` outputs together, once their Gram matrix is known."""
    parts, product = config.resolved, product_flops(rows, features)
    by_sweep = parts.solver == "obs_sweep" and not (parts.correction or parts.refine_iterations or config.bits)
    flops = {
        FACTORISATIONS: _factorisation_flops(rows, features, config),
        "layer errors": (1 if by_sweep else 2) * rows * half_square(features),
    }
    if parts.correction:
        flops["correction of the targets"] = 3 * product
    if parts.solver == "obs_sweep":
        flops["sweep"] = sweep_flops(rows, features)
    elif parts.solver == "thanos":
        flops["sweep"] = (rows + _THANOS_BLOCK) * (features**2 + _THANOS_BLOCK * features)
    elif parts.solver == "admm":
        flops["ADMM"] = (ADMM_STEPS + 1 + 11) * product  # the steps, their target, conjugate gradients
    elif parts.solver == "fista":
        flops["FISTA"] = _FISTA_PRODUCTS * product
    if parts.refine_iterations:
        flops["conjugate gradients"] = (parts.refine_iterations + 2) * product
    if config.bits and config.rounding == "gptq":
        flops["rounding"] = sweep_flops(rows, features)
    return flops


def _factorisation_flops(rows: int, features: int, config: OneShotConfig) -> float:
    parts, flops = config.resolved, factor_flops(features)
    if parts.correction or parts.solver == "thanos":
        flops += factor_flops(features)  # the inverse of the factor
    if parts.solver == "thanos":
        pruned = config.target * _THANOS_BLOCK  # of every row, in every block
        flops += rows * features / _THANOS_BLOCK * pruned**3 / 3
    elif parts.solver == "admm":
        flops += ADMM_STEPS / _ADMM_INTERVAL * features**3  # factor and inverse, for every penalty
    elif parts.solver == "fista":
        flops += 4 / 3 * features**3  # the largest eigenvalue
    return flops
