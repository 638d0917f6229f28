"""AlphaPruning: a unit whose spectrum has a heavy tail, the mark of good training, keeps more of its weights.

Source: Lu et al., "AlphaPruning: Using Heavy-Tailed Self Regularization Theory for Improved Layer-wise Pruning of
Large Language Models", NeurIPS 2024, eq. 2.
"""

from __future__ import annotations

from ..errors import ConfigError
from .budget import Bounds, check_measures, check_units, fit_budget, normalised


def alpha_allocation(
    sensitivity: dict[str, float],
    numel: dict[str, int],
    target: float,
    *,
    spread: float = 0.3,
    bounds: Bounds = (0.0, 1.0),
) -> dict[str, float]:
    """Sparsity proportional to a ratio in [1 - spread, 1 + spread], linear in the Hill exponent.

    The common factor makes the number of zeros exact, as in the paper; here also where units reach a bound.

    Args:
        sensitivity: unit -> tail heaviness (`sensitivity.tail_heaviness`), minus the Hill exponent; of a block, the
            mean over its matrices, as in the paper.
        numel: unit -> number of weights.
        target: fraction of zeros over all weights, in [0, 1).
        spread: the paper's epsilon, in [0, 1); 0.3 at a sparsity of 0.7.
        bounds: lowest and highest sparsity of a unit; what leaves them is moved to the bound.
    Returns:
        unit -> sparsity: whole zeros / weights, round(target * all weights) zeros in all.
    Raises:
        ConfigError: names that do not agree, a spread out of range, a positive tail heaviness, or bounds that leave
            no room for the target.
    """
    check_units(numel, target)
    check_measures(sensitivity, numel, "tail heaviness")
    if not 0.0 <= spread < 1.0:
        raise ConfigError(f"spread of an AlphaPruning allocation is in [0, 1), got {spread}. The paper has 0.3.")
    for name, value in sensitivity.items():
        if value > 0:
            raise ConfigError(
                f"{name}: its tail heaviness is {value}, and minus a Hill exponent is negative. Give "
                "`tail_heaviness`, larger = prune less."
            )
    ratio = {name: 1.0 + spread * (1.0 - 2.0 * value) for name, value in normalised(sensitivity).items()}
    end = 1.0 / min(ratio.values())
    return fit_budget(lambda t: {name: t * ratio[name] for name in numel}, 0.0, end, numel, target, bounds)
