"""The backend that is chosen was never measured slower than dense, and ties go to dense."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hf_adaptive_sparse.backend_choice import DENSE, Choice, choose, choose_for, crossing_points, nearest
from hf_adaptive_sparse.errors import ConfigError

seconds = st.floats(1e-7, 10.0)
row_counts = st.integers(1, 5000)
tables = st.builds(
    lambda dense, others: {DENSE: dense, **others},
    st.dictionaries(row_counts, seconds, min_size=1, max_size=6),
    st.dictionaries(st.sampled_from(["packed", "cusparselt", "compiled"]), st.dictionaries(row_counts, seconds)),
)


@given(tables, st.floats(0.0, 0.9))
def test_the_chosen_is_never_slower_than_dense(times, margin):
    for rows, choice in choose(times, margin).items():
        assert times[choice.backend][rows] <= times[DENSE][rows]
        assert choice.speedup == times[DENSE][rows] / times[choice.backend][rows] >= 1.0
        if choice.backend != DENSE:
            assert times[choice.backend][rows] <= times[DENSE][rows] * (1 - margin)
            assert all(times[choice.backend][rows] <= each.get(rows, math.inf) for each in times.values())


@given(tables)
def test_every_row_count_of_dense_has_a_choice_and_no_other_has(times):
    assert list(choose(times)) == sorted(times[DENSE])


@given(st.dictionaries(row_counts, seconds, min_size=1), st.sampled_from(["aaa", "packed", "zzz"]))
def test_a_tie_goes_to_dense_whatever_the_other_is_called(dense, other):
    assert set(choose({DENSE: dense, other: dict(dense)}, margin=0.0).values()) == {Choice(DENSE, 1.0)}
    assert set(choose({other: dict(dense), DENSE: dense}).values()) == {Choice(DENSE, 1.0)}


@given(tables, row_counts)
def test_the_choice_for_any_rows_is_that_of_a_measured_number(times, rows):
    measured = nearest(rows, times[DENSE])
    assert choose_for(times, rows) == choose(times)[measured]
    ratio = max(measured, rows) / min(measured, rows)
    assert all(ratio <= max(other, rows) / min(other, rows) for other in times[DENSE])


@given(tables)
def test_the_order_of_the_table_does_not_matter(times):
    turned = {name: dict(reversed(each.items())) for name, each in reversed(times.items())}
    assert choose(turned) == choose(times)


def test_small_gains_go_to_dense_and_large_ones_to_the_fastest():
    times = {DENSE: {1: 1.0, 64: 1.0}, "packed": {1: 0.98, 64: 0.5}, "compiled": {1: 0.6}}
    assert choose(times) == {1: Choice("compiled", 1 / 0.6), 64: Choice("packed", 2.0)}
    del times["compiled"]
    assert choose(times)[1] == Choice(DENSE, 1.0)
    assert choose(times, margin=0.01)[1] == Choice("packed", 1 / 0.98)
    assert choose_for(times, 8) == choose_for(times, 1)  # as near to 64 as to 1
    assert choose_for(times, 9) == choose_for(times, 4096) == Choice("packed", 2.0)


def test_crossing_points_are_where_the_winner_changes():
    dense = dict.fromkeys((1, 4, 16, 64), 1.0)
    times = {DENSE: dense, "cusparselt": {1: 9.0, 4: 2.0, 16: 0.9, 64: 0.5}, "packed": {1: 0.5, 4: 0.5, 16: 3.0}}
    assert crossing_points(times, "cusparselt") == [(4, 16, "cusparselt")]
    assert crossing_points(times, "packed") == [(4, 16, DENSE)]
    assert crossing_points(times, "absent") == []


@pytest.mark.parametrize("times, options, message", [
    ({"packed": {1: 1.0}}, {}, "dense was not measured, so nothing can be chosen; measured: packed."),
    ({}, {}, "dense was not measured, so nothing can be chosen; measured: none."),
    ({DENSE: {1: 0.0}}, {}, "the time of dense for 1 rows is 0.0, which was not measured."),
    ({DENSE: {1: 1.0}, "packed": {4: math.nan}}, {},
     "the time of packed for 4 rows is nan, which was not measured."),
    ({DENSE: {1: 1.0}}, {"margin": 1.0}, "margin is a part of the dense time in [0, 1), got 1.0."),
])  # fmt: skip
def test_times_that_nothing_can_be_chosen_from_are_refused(times, options, message):
    with pytest.raises(ConfigError) as caught:
        choose(times, **options)
    assert str(caught.value) == message
    with pytest.raises(ConfigError) as caught:
        choose_for({DENSE: {1: 1.0}}, 0)
    assert str(caught.value) == "rows is at least 1, got 0."
