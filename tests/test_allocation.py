"""What sets one allocator apart from another; what all share is in contracts/test_allocation.py."""

from __future__ import annotations

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_adaptive_sparse.allocation import (
    alpha_allocation,
    error_curve_allocation,
    number_of_zeros,
    owl_allocation,
    ranked_allocation,
    uniform_allocation,
    whole_weights,
)
from hf_adaptive_sparse.errors import ConfigError
from tests.reference import allocation as reference

some_examples = settings(max_examples=40)
names = [f"block.{index}" for index in range(6)]
distinct = st.lists(st.floats(-100.0, -1.0), min_size=6, max_size=6, unique=True).map(
    lambda values: dict(zip(names, values, strict=True))
)
same_size = dict.fromkeys(names, 100_000)
sizes = st.lists(st.integers(1000, 100_000), min_size=6, max_size=6).map(
    lambda values: dict(zip(names, values, strict=True))
)


def realised(sparsity: dict[str, float], numel: dict[str, int]) -> int:
    return sum(round(sparsity[name] * numel[name]) for name in numel)


def close(sparsity: dict[str, float], expected: dict[str, float], tolerance: float = 1e-4) -> bool:
    return sparsity.keys() == expected.keys() and all(
        abs(sparsity[name] - expected[name]) <= tolerance for name in expected
    )


def refused(message: str, call, *arguments, **options) -> None:
    with pytest.raises(ConfigError) as raised:
        call(*arguments, **options)
    assert str(raised.value) == message


# -- the allocators of the dict ---------------------------------------------------------------------------------------


def test_uniform_is_the_target_in_whole_weights_and_reads_no_sensitivity():
    assert uniform_allocation({}, {"a": 10, "b": 20}, 0.5) == {"a": 0.5, "b": 0.5}
    assert uniform_allocation({}, {"a": 3, "b": 3, "c": 3}, 0.5) == {"a": 2 / 3, "b": 1 / 3, "c": 1 / 3}


@some_examples
@given(sensitivity=distinct, target=st.floats(0.2, 0.8), alpha=st.floats(0.0, 0.2))
def test_ranked_with_units_of_one_size_is_the_algorithm_of_the_paper(sensitivity, target, alpha):
    sparsity = ranked_allocation(sensitivity, same_size, target, spread=alpha)
    assert close(sparsity, reference.ranked(sensitivity, target, alpha))


@some_examples
@given(sensitivity=distinct, numel=sizes, target=st.floats(0.3, 0.7))
def test_ranked_moves_every_unit_of_the_paper_by_the_same_amount_to_meet_the_budget(sensitivity, numel, target):
    sparsity, paper = ranked_allocation(sensitivity, numel, target), reference.ranked(sensitivity, target, 0.1)
    moved = [sparsity[name] - paper[name] for name in names]
    assert max(moved) - min(moved) < 2.1 / min(numel.values())


def test_the_paper_without_the_correction_misses_the_budget():
    """Sensitive matrices that are large: 50 % asked for, 42 % realised."""
    numel = {"a": 1000, "b": 9000}
    sensitivity = {"a": 0.0, "b": 1.0}
    paper = reference.ranked(sensitivity, 0.5, 0.1)
    assert sum(paper[name] * numel[name] for name in numel) == pytest.approx(0.42 * 10000)
    sparsity = ranked_allocation(sensitivity, numel, 0.5)
    assert sparsity == {"a": 0.68, "b": 0.48}


def test_ranked_knows_only_the_order():
    one = {"a": 1.0, "b": 2.0, "c": 3.0}
    other = {"a": -1e9, "b": 0.1, "c": 0.2}
    numel = {"a": 500, "b": 700, "c": 900}
    assert ranked_allocation(one, numel, 0.5) == ranked_allocation(other, numel, 0.5)


def test_ranked_gives_equals_the_mean_of_their_ranks():
    sensitivity = {"a": 1.0, "b": 2.0, "c": 2.0, "d": 3.0}
    sparsity = ranked_allocation(sensitivity, dict.fromkeys(sensitivity, 1000), 0.5)
    assert sparsity == {"a": 0.6, "b": 0.5, "c": 0.5, "d": 0.4}


def test_one_unit_has_the_target():
    assert ranked_allocation({"a": 7.0}, {"a": 1000}, 0.6) == {"a": 0.6}
    assert owl_allocation({"a": 7.0}, {"a": 1000}, 0.6) == {"a": 0.6}
    assert alpha_allocation({"a": -7.0}, {"a": 1000}, 0.6) == {"a": 0.6}


@pytest.mark.parametrize("target, alpha, room", [(0.05, 0.1, "0.05"), (0.7, 0.4, "0.3"), (0.5, -0.1, "0.5")])
def test_ranked_refuses_a_spread_that_leaves_the_fractions(target, alpha, room):
    refused(
        f"spread of a ranked allocation is between 0 and {room} at a sparsity of {target}, got {alpha}. Sparsities "
        "would leave [0, 1]: set a smaller spread.",
        ranked_allocation, {"a": 0.0, "b": 1.0}, {"a": 100, "b": 100}, target, spread=alpha,
    )  # fmt: skip


@pytest.mark.parametrize("percent", range(1, 100))
def test_ranked_takes_the_largest_spread_that_leaves_the_fractions(percent):
    target, room = percent / 100, min(percent, 100 - percent) / 100
    numel = {"a": 1000, "b": 1000, "c": 1000}
    sparsity = ranked_allocation({"a": 1.0, "b": 2.0, "c": 3.0}, numel, target, spread=room)
    wanted = {"a": min(target + room, 0.999), "b": target, "c": max(target - room, 0.0)}
    assert all(abs(sparsity[name] - wanted[name]) < 0.0011 for name in numel)


def test_ranked_has_the_spread_of_the_paper_where_there_is_room_and_else_what_there_is():
    sensitivity, numel = {"a": 1.0, "b": 2.0}, {"a": 1000, "b": 1000}
    assert ranked_allocation(sensitivity, numel, 0.6) == {"a": 0.7, "b": 0.5}
    assert ranked_allocation(sensitivity, numel, 0.05) == {"a": 0.1, "b": 0.0}


@some_examples
@given(ratio=distinct, target=st.floats(0.3, 0.8), width=st.floats(0.0, 0.1))
def test_owl_with_units_of_one_size_is_that_of_the_authors(ratio, target, width):
    assert close(owl_allocation(ratio, same_size, target, spread=width), reference.owl(ratio, target, width))


@some_examples
@given(ratio=distinct, numel=sizes)
def test_owl_moves_every_unit_by_the_same_amount_to_meet_the_budget(ratio, numel):
    sparsity, authors = owl_allocation(ratio, numel, 0.7), reference.owl(ratio, 0.7, 0.08)
    moved = [sparsity[name] - authors[name] for name in names]
    assert max(moved) - min(moved) < 2.1 / min(numel.values())


def test_owl_refuses_a_spread_wider_than_all_fractions():
    refused(
        "spread of an OWL allocation is between 0 and 0.5, got 0.6. The paper has 0.08.",
        owl_allocation, {"a": 0.1}, {"a": 100}, 0.5, spread=0.6,
    )  # fmt: skip


@some_examples
@given(heaviness=distinct, numel=sizes, target=st.floats(0.1, 0.75), epsilon=st.floats(0.0, 0.3))
def test_alpha_is_alpha_pruning_of_the_hill_exponent(heaviness, numel, target, epsilon):
    exponent = {name: -value for name, value in heaviness.items()}
    expected = reference.alpha_pruning(exponent, numel, target, epsilon)
    if max(expected.values()) < 1.0:
        sparsity = alpha_allocation(heaviness, numel, target, spread=epsilon)
        assert close(sparsity, expected, 1.1 / min(numel.values()))


def test_alpha_scales_the_others_up_where_one_is_full():
    heaviness = {"a": -9.0, "b": -2.0, "c": -2.0}
    numel = {"a": 1000, "b": 1000, "c": 1000}
    sparsity = alpha_allocation(heaviness, numel, 0.9, spread=0.3)
    assert sparsity == {"a": 0.999, "b": 0.851, "c": 0.85} and realised(sparsity, numel) == 2700


def test_alpha_refuses_exponents_for_their_negatives():
    refused(
        "b: its tail heaviness is 2.5, and minus a Hill exponent is negative. Give `tail_heaviness`, larger = prune "
        "less.",
        alpha_allocation, {"a": -2.0, "b": 2.5}, {"a": 100, "b": 100}, 0.5,
    )  # fmt: skip


def test_alpha_refuses_a_spread_of_one():
    refused(
        "spread of an AlphaPruning allocation is in [0, 1), got 1.0. The paper has 0.3.",
        alpha_allocation, {"a": -2.0}, {"a": 100}, 0.5, spread=1.0,
    )  # fmt: skip


# -- whole weights ----------------------------------------------------------------------------------------------------


@some_examples
@given(data=st.data(), numel=st.dictionaries(st.text("abc", min_size=1), st.integers(2, 3000), min_size=1))
def test_rounding_to_whole_weights_moves_no_unit_by_one_weight_or_more(data, numel):
    sparsity = {name: data.draw(st.floats(0.0, 0.5)) for name in numel}
    target = math.fsum(sparsity[name] * count for name, count in numel.items()) / sum(numel.values())
    rounded = whole_weights(sparsity, numel, target)
    assert realised(rounded, numel) == number_of_zeros(numel, target)
    assert all(abs(rounded[name] - sparsity[name]) * numel[name] < 1.001 for name in numel)


def test_the_largest_remainders_are_rounded_up():
    assert whole_weights({"a": 0.19, "b": 0.15, "c": 0.16}, dict.fromkeys("abc", 10), 0.5 / 3) == {
        "a": 0.2,
        "b": 0.1,
        "c": 0.2,
    }


def test_whole_weights_refuses_sparsities_that_miss_the_target():
    refused("the sparsities average 0.4 over all weights, not 0.5.", whole_weights, {"a": 0.4}, {"a": 1000}, 0.5)


# -- error curves -----------------------------------------------------------------------------------------------------


@st.composite
def tiny_curves(draw):
    """Three units of 2 to 9 weights, with three or four points each, convex or not, and a target they reach."""
    numel = {name: draw(st.integers(2, 9)) for name in "abc"}
    curves = {}
    for name in numel:
        levels = draw(st.lists(st.integers(0, numel[name] - 1), min_size=1, max_size=4, unique=True))
        curves[name] = [(level / numel[name], draw(st.integers(0, 20)) / 4) for level in levels]
    low, high = (sum(round(f(curves[name])[0] * numel[name]) for name in numel) for f in (min, max))
    return curves, numel, draw(st.integers(low, high)) / sum(numel.values())


@settings(max_examples=60)
@given(case=tiny_curves())
def test_error_curves_reach_the_least_sum_on_the_hulls(case):
    curves, numel, target = case
    sparsity = error_curve_allocation(curves, numel, target)
    assert realised(sparsity, numel) == number_of_zeros(numel, target)
    found = sum(reference.hull_error(curves[name], sparsity[name]) for name in numel)
    assert found == pytest.approx(reference.best_whole_weights(curves, numel, target), abs=1e-9)


@some_examples
@given(slopes=st.lists(st.floats(0.1, 100.0), min_size=4, max_size=4), target=st.floats(0.05, 0.85))
def test_quadratic_errors_are_equalled_at_the_margin(slopes, target):
    """The least sum of a_g s_g^2 has sparsities inversely proportional to a_g, up to the bound of 0.9."""
    levels = [level / 200 for level in range(181)]
    curves = {f"u{g}": [(s, a * s * s) for s in levels] for g, a in enumerate(slopes)}
    numel = dict.fromkeys(curves, 100_000)
    sparsity = error_curve_allocation(curves, numel, target)
    assert realised(sparsity, numel) == number_of_zeros(numel, target)
    inner = [2 * a * s for a, s in zip(slopes, sparsity.values(), strict=True) if 0.01 < s < 0.89]
    steps = [2 * a * 0.005 for a in slopes]
    assert not inner or max(inner) - min(inner) <= 2 * max(steps)


def test_importance_multiplies_errors_and_the_cheap_unit_is_pruned():
    curves = {name: [(0.0, 0.0), (0.5, 1.0), (0.8, 4.0)] for name in "ab"}
    numel = {"a": 1000, "b": 1000}
    assert error_curve_allocation(curves, numel, 0.5) == {"a": 0.5, "b": 0.5}
    assert error_curve_allocation(curves, numel, 0.4, importance={"a": 10.0, "b": 1.0}) == {"a": 0.0, "b": 0.8}
    assert error_curve_allocation(curves, numel, 0.45, importance={"a": 10.0, "b": 1.0}) == {"a": 0.1, "b": 0.8}


def test_a_small_unit_of_the_same_error_is_pruned_less():
    curves = {name: [(0.0, 0.0), (0.5, 1.0), (0.9, 5.0)] for name in ("small", "large")}
    sparsity = error_curve_allocation(curves, {"small": 100, "large": 900}, 0.45)
    assert sparsity == {"small": 0.0, "large": 0.5}


def test_a_point_above_the_hull_is_passed_over():
    curves = {"a": [(0.0, 0.0), (0.4, 9.0), (0.8, 1.0)], "b": [(0.0, 0.0), (0.8, 2.0)]}
    assert error_curve_allocation(curves, {"a": 100, "b": 100}, 0.4) == {"a": 0.8, "b": 0.0}


@pytest.mark.parametrize(
    "points, message",
    [
        ([], "b: its error curve has no point. Measure it, or leave the layer out."),
        (
            [(1.0, 0.0)],
            "b: its error curve has the point (1.0, 0.0). A point is a sparsity in [0, 1) and a finite error: leave it "
            "out.",
        ),
        (
            [(0.5, math.nan)],
            "b: its error curve has the point (0.5, nan). A point is a sparsity in [0, 1) and a finite error: leave it "
            "out.",
        ),
        ([(0.5, 1.0), (0.5, 2.0)], "b: its error curve has two points at sparsity 0.5. Leave one out."),
    ],
)
def test_points_that_cannot_be_used_are_named(points, message):
    curves = {"a": [(0.0, 0.0), (0.5, 1.0)], "b": points}
    refused(message, error_curve_allocation, curves, {"a": 10, "b": 10}, 0.25)


def test_a_target_beyond_the_measured_levels_says_what_they_reach():
    curves = {"a": [(0.4, 1.0), (0.6, 2.0)], "b": [(0.2, 0.0), (0.5, 1.0)]}
    refused(
        "a sparsity of 0.7 cannot be reached: the levels given reach from 0.25 to 0.525. Ask for a target in between, "
        "or add levels.",
        error_curve_allocation, curves, {"a": 100, "b": 300}, 0.7,
    )  # fmt: skip


def test_curves_and_importance_have_the_names_of_the_units():
    curves, numel = {"a": [(0.0, 0.0), (0.5, 1.0)]}, {"a": 100, "b": 100}
    refused("b: has no error curve. Measure it, or leave the layer out.", error_curve_allocation, curves, numel, 0.25)
    refused(
        "a: has no importance. Measure it, or leave the layer out.",
        error_curve_allocation, curves, {"a": 100}, 0.25, importance={},
    )  # fmt: skip
    refused(
        "a: its importance is -1.0, and an error cannot count less than nothing.",
        error_curve_allocation, curves, {"a": 100}, 0.25, importance={"a": -1.0},
    )  # fmt: skip
