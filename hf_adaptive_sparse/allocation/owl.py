"""OWL: a unit with more outliers keeps more of its weights.

Source: Yin et al., "Outlier Weighed Layerwise Sparsity (OWL): A Missing Secret Sauce for Pruning LLMs to High
Sparsity", ICML 2024, section 3.
"""

from __future__ import annotations

from ..errors import ConfigError
from .budget import Bounds, check_measures, check_units, fit_budget, normalised


def owl_allocation(
    sensitivity: dict[str, float],
    numel: dict[str, int],
    target: float,
    *,
    spread: float = 0.08,
    bounds: Bounds = (0.0, 1.0),
) -> dict[str, float]:
    """Density linear in the outlier ratio, 2 * spread wide, and moved until the number of zeros is exact.

    The paper moves the mean over units to the target, which is that over weights only where all units have the same
    size, as its blocks do.

    Args:
        sensitivity: unit -> outlier ratio (`sensitivity.outlier_ratio`); its unit does not matter.
        numel: unit -> number of weights.
        target: fraction of zeros over all weights, in [0, 1).
        spread: the paper's lambda, at most 0.5; it uses 0.02 to 0.08.
        bounds: lowest and highest sparsity of a unit; what leaves them is moved to the bound.
    Returns:
        unit -> sparsity: whole zeros / weights, round(target * all weights) zeros in all.
    Raises:
        ConfigError: names that do not agree, a spread out of range, or bounds that leave no room for the target.
    """
    check_units(numel, target)
    check_measures(sensitivity, numel, "outlier ratio")
    if not 0.0 <= spread <= 0.5:
        raise ConfigError(f"spread of an OWL allocation is between 0 and 0.5, got {spread}. The paper has 0.08.")
    density = {name: 2.0 * spread * value for name, value in normalised(sensitivity).items()}
    return fit_budget(lambda t: {name: t - density[name] for name in numel}, 0.0, 2.0, numel, target, bounds)
