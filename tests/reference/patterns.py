"""Patterns, slow and obvious: Python lists, loops, one sort a unit."""

from __future__ import annotations

import math


def best_positions(scores: list[float], count: int) -> set[int]:
    """The `count` largest scores; NaN counts as infinite, of equal scores the lower index wins."""
    values = [math.inf if math.isnan(score) else score for score in scores]
    chosen: set[int] = set()
    for _ in range(count):
        best = None
        for position, value in enumerate(values):
            if position not in chosen and (best is None or value > values[best]):
                best = position
        assert best is not None
        chosen.add(best)
    return chosen


def keep_n_of_m(scores: list[list[float]], n: int, m: int) -> list[list[bool]]:
    """For every m consecutive scores of a row, True at the n best of them."""
    keep = []
    for row in scores:
        kept_row: list[bool] = []
        for start in range(0, len(row), m):
            chosen = best_positions(row[start : start + m], n)
            kept_row += [position in chosen for position in range(m)]
        keep.append(kept_row)
    return keep


def keep_best_of_matrix(scores: list[list[float]], zeros: int) -> list[list[bool]]:
    """True at all but the `zeros` worst scores of the whole matrix."""
    flat = [score for row in scores for score in row]
    chosen = best_positions(flat, len(flat) - zeros)
    width = len(scores[0])
    return [[row * width + column in chosen for column in range(width)] for row in range(len(scores))]


def first_group_with_more_than(n: int, m: int, weight: list[list[float]]) -> tuple[int, int] | None:
    """(row, group) of the first m consecutive weights of which more than n are not zero."""
    for row, values in enumerate(weight):
        for group in range(len(values) // m):
            if sum(value != 0 for value in values[group * m : group * m + m]) > n:
                return row, group
    return None
