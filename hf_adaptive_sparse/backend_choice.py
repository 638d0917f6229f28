"""Which backend is the fastest for a weight and a number of rows: a choice from times that were measured.

The rule: never slower than dense by choice. A backend takes the place of dense only where its measured time is below
that of dense by more than the margin; ties, small gains and everything that was not measured go to dense.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from .errors import ConfigError

DENSE = "dense"
MARGIN = 0.03
"""A gain under 3 % is within what two measurements of the same thing differ by."""

Times = Mapping[str, Mapping[int, float]]
"""backend -> rows (tokens that go through the layer together) -> seconds."""


@dataclass(frozen=True)
class Choice:
    """The backend for one number of rows, and how much faster than dense it was measured (1.0: dense itself)."""

    backend: str
    speedup: float


def choose(times: Times, margin: float = MARGIN) -> dict[int, Choice]:
    """The fastest backend for every number of rows of which dense was measured.

    Args:
        times: of one weight.
        margin: part of the dense time that another backend must save to be chosen, in [0, 1).
    Returns:
        rows -> choice, by rows. A backend that was not measured at these rows is not chosen there.
    Raises:
        ConfigError: dense was not measured, or a time is not a number above 0.
    """
    _check(times, margin)
    found = {}
    for rows in sorted(times[DENSE]):
        dense = times[DENSE][rows]
        best, least = DENSE, dense
        for backend in sorted(times):
            seconds = times[backend].get(rows, math.inf)
            if seconds < least and seconds <= dense * (1.0 - margin):
                best, least = backend, seconds
        found[rows] = Choice(best, dense / least)
    return found


def choose_for(times: Times, rows: int, margin: float = MARGIN) -> Choice:
    """The choice for any number of rows: that of the nearest measured one, by ratio; of two, the smaller."""
    if rows < 1:
        raise ConfigError(f"rows is at least 1, got {rows}.")
    choices = choose(times, margin)
    return choices[nearest(rows, choices)]


def nearest(rows: int, measured: Iterable[int]) -> int:
    """Of the measured numbers of rows the one with the smallest ratio to `rows`; of two, the smaller."""
    return min(measured, key=lambda other: (max(other, rows) / min(other, rows), other))


def crossing_points(times: Times, backend: str, margin: float = MARGIN) -> list[tuple[int, int, str]]:
    """Between which measured rows a backend begins to beat dense, or dense to beat it again.

    Returns:
        (last rows before, first rows after, who is the faster one after), by rows.
    """
    _check(times, margin)
    both = sorted(times[DENSE].keys() & times.get(backend, {}).keys())
    wins = [times[backend][rows] <= times[DENSE][rows] * (1.0 - margin) for rows in both]
    pairs = zip(both, both[1:], wins, wins[1:], strict=False)
    return [(first, second, backend if after else DENSE) for first, second, before, after in pairs if before != after]


def _check(times: Times, margin: float) -> None:
    if not 0.0 <= margin < 1.0:
        raise ConfigError(f"margin is a part of the dense time in [0, 1), got {margin}.")
    if not times.get(DENSE):
        raise ConfigError(f"dense was not measured, so nothing can be chosen; measured: {', '.join(times) or 'none'}.")
    for backend, by_rows in times.items():
        for rows, seconds in by_rows.items():
            if not 0.0 < seconds < math.inf:
                raise ConfigError(f"the time of {backend} for {rows} rows is {seconds}, which was not measured.")
