"""Which weights may be zero. A pattern turns scores into a boolean `keep` of the same shape."""

from __future__ import annotations

import re

from ..errors import ConfigError
from .n_m import NMPattern
from .unstructured import Unstructured

PATTERNS: dict[str, NMPattern | Unstructured] = {
    "2:4": NMPattern(2, 4),
    "1:4": NMPattern(1, 4),
    "4:8": NMPattern(4, 8),
    "unstructured": Unstructured(),
}


def parse_pattern(name: str) -> NMPattern | Unstructured:
    """The pattern called `name`: one of PATTERNS, or any "n:m".

    Raises:
        ConfigError: no pattern has this name.
    """
    if isinstance(name, str) and name in PATTERNS:  # a list has no hash to look it up by
        return PATTERNS[name]
    match = re.fullmatch(r"(\d+):(\d+)", str(name))
    if match is None:
        known = ", ".join(PATTERNS)
        raise ConfigError(f"unknown pattern {name!r}; known: {known}, or any n:m such as '2:8'.")
    return NMPattern(int(match[1]), int(match[2]))


__all__ = ["PATTERNS", "NMPattern", "Unstructured", "parse_pattern"]
