"""Times of several functions that compute the same, measured in turns so that a busy machine is busy for all."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

from .backend_choice import DENSE
from .errors import ConfigError

Clock = Callable[[], float]


@dataclass(frozen=True)
class Measured:
    """Seconds of one call in every repetition, in the order in which they were measured."""

    seconds: tuple[float, ...]

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    def ratio_to(self, other: Measured) -> Spread:
        """This time divided by the other, repetition by repetition: what was measured next to each other."""
        return Spread.of([mine / theirs for mine, theirs in zip(self.seconds, other.seconds, strict=True)])


@dataclass(frozen=True)
class Spread:
    """The middle of some measurements, and the smallest and the largest of them."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: list[float]) -> Spread:
        return cls(statistics.median(values), min(values), max(values))


def cautious_seconds(measured: Mapping[str, Mapping[int, Measured]]) -> dict[str, dict[int, float]]:
    """Times to choose from: a gain over dense counts only as far as it was there in every repetition.

    Args:
        measured: backend -> rows -> times; dense among them.
    Returns:
        Of dense its median, of every other backend that median times the largest ratio that was seen next to it.
    """
    dense = measured[DENSE]
    return {
        name: {
            rows: dense[rows].median * (1.0 if name == DENSE else each.ratio_to(dense[rows]).high)
            for rows, each in by_rows.items()
        }
        for name, by_rows in measured.items()
    }


def time_in_turns(
    calls: Mapping[str, Callable[[], object]],
    *,
    repetitions: int = 5,
    seconds: float = 0.02,
    clock: Clock = time.perf_counter,
) -> dict[str, Measured]:
    """Seconds of one call of each function: in every repetition each is called in turn.

    Args:
        calls: name -> what to time. Each is called once before, so that nothing is measured that happens only once.
        repetitions: how often all take their turn.
        seconds: how long one turn of one function lasts at least, in as many calls as that takes; the number of calls
            is found out before and stays the same.
        clock: seconds now; of a device that computes behind our back, one that waits for it (`device_clock`).
    Raises:
        ConfigError: nothing to time, or no repetition.
    """
    if not calls or repetitions < 1:
        raise ConfigError(f"timing needs functions and at least 1 repetition, got {len(calls)} and {repetitions}.")
    count = {}
    for name, call in calls.items():
        call()
        started = clock()
        call()
        count[name] = max(1, round(seconds / max(clock() - started, 1e-9)))
    found: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(repetitions):
        for name, call in calls.items():
            started = clock()
            for _ in range(count[name]):
                call()
            found[name].append((clock() - started) / count[name])
    return {name: Measured(tuple(each)) for name, each in found.items()}


def device_clock(device: torch.device) -> Clock:
    """Seconds now; on an accelerator, when all that was asked of it is done."""
    if device.type == "cpu":
        return time.perf_counter

    def waiting() -> float:
        torch.accelerator.synchronize(device)
        return time.perf_counter()

    return waiting
