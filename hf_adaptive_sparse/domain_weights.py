"""Dynamic batch loading: how often each domain of the training data is drawn, from how far its loss is behind.

Source: Xia et al., "Sheared LLaMA", ICLR 2024 (arXiv 2310.06694), section 2.2 and algorithm 1.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from .errors import ConfigError


def checked_weights(weights: Sequence[float], where: str = "weights") -> list[float]:
    """Weights of domains, divided by their sum.

    Args:
        weights: one per domain, > 0.
        where: what they are called in messages.
    Raises:
        ConfigError: there are none, or one is not a positive number.
    """
    if not weights:
        raise ConfigError(f"{where} has no entry: give one positive number per domain.")
    for domain, weight in enumerate(weights):
        if not (math.isfinite(weight) and weight > 0.0):
            raise ConfigError(
                f"{where}: domain {domain} has {weight}. Give every domain a positive number, and leave out what is "
                "never to be drawn."
            )
    total = math.fsum(weights)
    return [weight / total for weight in weights]


def updated_weights(
    weights: Sequence[float],
    losses: Sequence[float],
    references: Sequence[float],
    *,
    rate: float = 1.0,
    floor: float = 1e-4,
    clip_gap: bool = True,
) -> list[float]:
    """w <- (1 - c) softmax(ln w + eta * gap) + c / k, with gap = max(loss - reference, 0), for k domains.

    The floor is that of the published code; the paper has none.

    Args:
        weights: of the domains until now, > 0; any sum.
        losses: mean loss per token of each domain now, in nats.
        references: the losses that the domains should reach, such as those of the dense model or of a scaling law.
        rate: eta; 1 in the paper.
        floor: c: every weight is at least c / k.
        clip_gap: a domain that is ahead of its reference counts as level with it, which is the rule of the paper. The
            published code does not clip: False is its rule.
    Returns:
        new weights, > 0 and of sum 1.
    Raises:
        ConfigError: the lists differ in length, a number is not finite, or a setting is out of range.
    """
    old = checked_weights(weights)
    for name, values in (("losses", losses), ("references", references)):
        if len(values) != len(old):
            raise ConfigError(f"{len(old)} domains have weights, but {name} has {len(values)} entries.")
        for domain, value in enumerate(values):
            if not math.isfinite(value):
                raise ConfigError(f"{name}: domain {domain} has {value}. Weights follow finite losses only.")
    if not rate >= 0.0:
        raise ConfigError(f"rate is >= 0, got {rate}. 0 keeps the weights as they are.")
    if not 0.0 < floor <= 1.0:
        raise ConfigError(f"floor is in (0, 1], got {floor}. With 0 a domain could never come back.")
    gaps = [loss - reference for loss, reference in zip(losses, references, strict=True)]
    if clip_gap:
        gaps = [max(gap, 0.0) for gap in gaps]
    logits = [math.log(weight) + rate * gap for weight, gap in zip(old, gaps, strict=True)]
    largest = max(logits)
    powers = [math.exp(logit - largest) for logit in logits]
    total = math.fsum(powers)
    return [(1.0 - floor) * power / total + floor / len(old) for power in powers]
