"""Functions are timed in turns, with as many calls as a turn takes; the clock is injected."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hf_adaptive_sparse.backend_choice import Choice, choose
from hf_adaptive_sparse.backend_timing import Measured, Spread, cautious_seconds, device_clock, time_in_turns
from hf_adaptive_sparse.errors import ConfigError


class Bench:
    """A clock that functions move: each call takes the seconds of its list, the last of them for ever."""

    def __init__(self, **costs: list[float]) -> None:
        self.now, self.log, self.costs = 0.0, [], costs

    def clock(self) -> float:
        return self.now

    def calls(self):
        return {name: (lambda name=name: self._call(name)) for name in self.costs}

    def _call(self, name: str) -> None:
        self.log.append(name)
        costs = self.costs[name]
        self.now += costs[0] if len(costs) == 1 else costs.pop(0)


def test_times_are_those_of_the_clock_and_the_first_call_does_not_count():
    bench = Bench(slow=[100.0, 2.0], fast=[50.0, 0.5])
    found = time_in_turns(bench.calls(), repetitions=3, seconds=1.0, clock=bench.clock)
    assert found == {"slow": Measured((2.0, 2.0, 2.0)), "fast": Measured((0.5, 0.5, 0.5))}
    # Two calls before; then one call of a slow function and two of a fast one in every turn.
    assert bench.log == ["slow", "slow", "fast", "fast", *["slow", "fast", "fast"] * 3]
    assert found["fast"].ratio_to(found["slow"]) == Spread(0.25, 0.25, 0.25)


def test_a_ratio_compares_what_was_measured_next_to_each_other():
    """The machine becomes twice as slow in the second repetition, for both."""
    bench = Bench(dense=[1.0, 1.0, 1.0, 2.0], packed=[3.0, 3.0, 3.0, 6.0])
    found = time_in_turns(bench.calls(), repetitions=2, seconds=1.0, clock=bench.clock)
    assert found["packed"].ratio_to(found["dense"]) == Spread(3.0, 3.0, 3.0)
    assert found["dense"].median == 1.5
    assert Spread.of([3.0, 1.0, 2.0]) == Spread(2.0, 1.0, 3.0)


def test_a_clock_that_stands_still_does_not_call_for_ever():
    bench = Bench(idle=[0.0])
    assert time_in_turns(bench.calls(), repetitions=1, seconds=1e-6, clock=bench.clock)["idle"].median == 0.0


def test_a_gain_counts_as_far_as_it_was_there_in_every_repetition():
    measured = {
        "dense": {1: Measured((1.0, 2.0, 3.0)), 64: Measured((1.0, 1.0, 1.0))},
        "steady": {1: Measured((0.5, 1.0, 1.5)), 64: Measured((0.5, 0.6, 0.4))},
        "lucky": {1: Measured((0.1, 0.2, 3.3)), 64: Measured((0.1, 0.1, 1.0))},
    }
    seconds = cautious_seconds(measured)
    assert seconds["dense"] == {1: 2.0, 64: 1.0}
    assert seconds["steady"] == {1: 1.0, 64: 0.6}
    assert seconds["lucky"] == {1: pytest.approx(2.2), 64: 1.0}
    assert choose(seconds) == {1: Choice("steady", 2.0), 64: Choice("steady", 1.0 / 0.6)}
    del seconds["steady"]
    assert {choice.backend for choice in choose(seconds).values()} == {"dense"}


@given(st.lists(st.tuples(*[st.floats(1e-6, 1e3)] * 2), min_size=1, max_size=5))
def test_what_is_chosen_was_faster_in_every_repetition(pairs):
    dense, other = (Measured(times) for times in zip(*pairs, strict=True))
    chosen = choose(cautious_seconds({"dense": {1: dense}, "other": {1: other}}))[1]
    if chosen.backend == "other":
        assert all(mine < theirs for theirs, mine in pairs)


@pytest.mark.parametrize("calls, repetitions, found", [({}, 3, "0 and 3"), ({"a": int}, 0, "1 and 0")])
def test_nothing_to_time_is_refused(calls, repetitions, found):
    with pytest.raises(ConfigError) as caught:
        time_in_turns(calls, repetitions=repetitions)
    assert str(caught.value) == f"timing needs functions and at least 1 repetition, got {found}."


def test_the_real_clock_goes_forward():
    clock = device_clock(torch.device("cpu"))
    assert clock() <= clock()


@pytest.mark.gpu
def test_the_clock_of_a_device_waits_for_it():
    device = torch.device("cuda")
    clock, weight = device_clock(device), torch.randn(4096, 4096, device=device)
    started = clock()
    for _ in range(20):
        weight @ weight
    assert clock() - started > 20 * 2 * 4096**3 / 2e15  # no device does 2 PFLOP/s in float32
