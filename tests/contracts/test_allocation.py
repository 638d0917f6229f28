"""What every entry of ALLOCATORS must obey."""

from __future__ import annotations

import math

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from hf_adaptive_sparse.allocation import ALLOCATORS, number_of_zeros
from hf_adaptive_sparse.errors import ConfigError

every_allocator = pytest.mark.parametrize("name", ALLOCATORS)
every_sensitive_allocator = pytest.mark.parametrize("name", [name for name in ALLOCATORS if name != "uniform"])
some_examples = settings(max_examples=20)

targets = st.floats(0.05, 0.95)


@st.composite
def units(draw, fewest: int = 1):
    """Sensitivities and sizes of up to 12 units; every second example has ties.

    Below 0, as the tail heaviness is; the others read any number.
    """
    count = draw(st.integers(fewest, 12))
    value = st.one_of(st.floats(-1e6, -1e-3), st.sampled_from([-3.0, -2.0]))
    names = [f"block.{index}" for index in range(count)]
    size = st.one_of(st.integers(20, 5000), st.sampled_from([4096, 11008]))
    return (
        dict(zip(names, draw(st.lists(value, min_size=count, max_size=count)), strict=True)),
        dict(zip(names, draw(st.lists(size, min_size=count, max_size=count)), strict=True)),
    )


def allocate(name: str, sensitivity: dict[str, float], numel: dict[str, int], target: float) -> dict[str, float]:
    return ALLOCATORS[name](sensitivity, numel, target)


def zeros(sparsity: dict[str, float], numel: dict[str, int]) -> dict[str, int]:
    return {unit: round(sparsity[unit] * count) for unit, count in numel.items()}


@every_allocator
@some_examples
@given(given=units(), target=targets)
def test_the_number_of_zeros_is_exact_and_every_unit_keeps_some(name, given, target):
    sensitivity, numel = given
    sparsity = allocate(name, sensitivity, numel, target)
    assert list(sparsity) == list(numel)
    assert all(0.0 <= value < 1.0 for value in sparsity.values())
    assert sum(zeros(sparsity, numel).values()) == number_of_zeros(numel, target) == round(target * sum(numel.values()))
    assert all(value * numel[unit] == pytest.approx(round(value * numel[unit])) for unit, value in sparsity.items())


@every_allocator
@pytest.mark.parametrize("percent", range(1, 100))
def test_no_target_is_refused_with_the_spread_that_it_has_by_default(name, percent):
    numel = {"a": 1000, "b": 300, "c": 5000}
    sparsity = allocate(name, {"a": -2.5, "b": -3.0, "c": -2.0}, numel, percent / 100)
    assert sum(zeros(sparsity, numel).values()) == 63 * percent


# Two units that keep one weight each, and so leave more to the others than the rounding may take.
FULL = {f"block.{block}": -2.0 if block in (7, 9) else -1.0 for block in range(10)}
FULL_NUMEL = {unit: {"block.8": 1898, "block.9": 30}.get(unit, 20) for unit in FULL}


@every_allocator
@some_examples
@given(given=units(fewest=2), target=targets)
@example(given=(FULL, FULL_NUMEL), target=0.75)
def test_a_more_sensitive_unit_is_never_sparser(name, given, target):
    sensitivity, numel = given
    sparsity = allocate(name, sensitivity, numel, target)
    for one in numel:
        for other in numel:
            if sensitivity[one] >= sensitivity[other]:  # and equally sensitive ones are equally sparse
                assert sparsity[one] <= sparsity[other] + 1 / numel[one] + 1 / numel[other]


@every_allocator
@some_examples
@given(given=units(), target=targets, factor=st.sampled_from([2.0**-10, 2.0**7]))
def test_the_unit_of_the_sensitivity_does_not_matter(name, given, target, factor):
    sensitivity, numel = given
    other = {unit: factor * value for unit, value in sensitivity.items()}
    assert allocate(name, other, numel, target) == allocate(name, sensitivity, numel, target)


@every_allocator
@some_examples
@given(given=units(), target=targets, data=st.data())
def test_the_order_of_the_units_does_not_matter_but_for_the_last_weight(name, given, target, data):
    sensitivity, numel = given
    order = data.draw(st.permutations(list(numel)))
    sparsity = allocate(name, sensitivity, numel, target)
    other = allocate(name, sensitivity, {unit: numel[unit] for unit in order}, target)
    for unit, count in zeros(sparsity, numel).items():
        assert abs(count - zeros(other, numel)[unit]) <= 1


@every_allocator
@some_examples
@given(given=units(), target=targets)
def test_equally_sensitive_units_have_the_target(name, given, target):
    sensitivity, numel = given
    sparsity = allocate(name, dict.fromkeys(sensitivity, -2.0), numel, target)
    assert all(abs(sparsity[unit] - target) <= 1.001 / numel[unit] for unit in numel)


@every_allocator
@some_examples
@given(given=units(), target=targets)
def test_what_it_is_given_stays_as_it_was(name, given, target):
    sensitivity, numel = given
    before = dict(sensitivity), dict(numel)
    allocate(name, sensitivity, numel, target)
    assert (sensitivity, numel) == before


@every_sensitive_allocator
@some_examples
@given(given=units(), target=targets, data=st.data())
def test_bounds_hold_to_one_weight(name, given, target, data):
    sensitivity, numel = given
    bounds = data.draw(st.floats(0.0, target)), data.draw(st.floats(target, 1.0))
    sparsity = ALLOCATORS[name](sensitivity, numel, target, bounds=bounds)
    assert sum(zeros(sparsity, numel).values()) == number_of_zeros(numel, target)
    for unit, value in sparsity.items():
        assert bounds[0] - 1.001 / numel[unit] <= value <= bounds[1] + 1.001 / numel[unit]


@every_sensitive_allocator
def test_sensitivity_makes_a_difference(name):
    sensitivity = {"a": -3.0, "b": -2.5, "c": -2.0}
    sparsity = allocate(name, sensitivity, dict.fromkeys(sensitivity, 1000), 0.5)
    assert sparsity["a"] > sparsity["b"] > sparsity["c"]


def refused(message: str, name: str, sensitivity, numel, target, **options) -> None:
    with pytest.raises(ConfigError) as raised:
        ALLOCATORS[name](sensitivity, numel, target, **options)
    assert str(raised.value) == message


@every_allocator
@pytest.mark.parametrize("target", [1.0, -0.1, 50.0, math.nan])
def test_a_target_is_a_fraction(name, target):
    refused(
        f"sparsity is a fraction of zeros in [0, 1), got {target}. For 50 % write 0.5.",
        name,
        {"a": -1.0},
        {"a": 8},
        target,
    )


@every_allocator
def test_nothing_to_prune_is_refused(name):
    refused(
        "there is nothing to allocate a sparsity to: no layer is given. Check the target modules.", name, {}, {}, 0.5
    )


@every_allocator
def test_a_unit_without_weights_is_named(name):
    refused(
        "b: a layer has at least one weight, got 0. Leave it out.", name, {"a": -1.0, "b": -1.0}, {"a": 8, "b": 0}, 0.5
    )


@every_allocator
def test_a_target_that_would_empty_a_unit_says_what_is_possible(name):
    refused(
        "a sparsity of 0.9 leaves 1 of 8 weights, fewer than one for each of 2 layers. Ask for at most 0.75.",
        name, {"a": -1.0, "b": -1.0}, {"a": 4, "b": 4}, 0.9,
    )  # fmt: skip


WHAT = {"ranked": "sensitivity", "owl": "outlier ratio", "alpha": "tail heaviness"}


@every_sensitive_allocator
def test_names_that_do_not_agree_are_named(name):
    what = WHAT.get(name, "sensitivity")
    numel = {"a": 100, "b": 100}
    refused(f"b: has no {what}. Measure it, or leave the layer out.", name, {"a": -1.0}, numel, 0.5)
    refused(
        f"unknown layer 'c': it has a {what}, but no number of weights. Leave it out.",
        name, {"a": -1.0, "b": -1.0, "c": -1.0}, numel, 0.5,
    )  # fmt: skip


@every_sensitive_allocator
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_sensitivity_that_is_not_finite_is_named(name, value):
    what = WHAT.get(name, "sensitivity")
    refused(
        f"b: its {what} is {value}. Calibrate again, or leave the layer out.",
        name, {"a": -1.0, "b": value}, {"a": 100, "b": 100}, 0.5,
    )  # fmt: skip


@every_sensitive_allocator
@pytest.mark.parametrize(
    "bounds, message",
    [
        (
            (0.6, 0.9),
            "a sparsity of 0.5 cannot be reached when every layer has between 0.6 and 0.9. Ask for a target in "
            "between, or widen the bounds.",
        ),
        (
            (0.0, 0.4),
            "a sparsity of 0.5 cannot be reached when every layer has between 0.0 and 0.4. Ask for a target in "
            "between, or widen the bounds.",
        ),
        ((0.7, 0.2), "bounds of a layer's sparsity are 0 <= lowest <= highest <= 1, got 0.7 and 0.2."),
        ((-0.1, 0.6), "bounds of a layer's sparsity are 0 <= lowest <= highest <= 1, got -0.1 and 0.6."),
    ],
)
def test_bounds_without_room_for_the_target_say_so(name, bounds, message):
    refused(message, name, {"a": -1.0, "b": -2.0}, {"a": 100, "b": 100}, 0.5, bounds=bounds)


@every_sensitive_allocator
@pytest.mark.parametrize("spread", [-0.1, 1.0, 7.0, math.nan])
def test_a_spread_out_of_range_is_refused(name, spread):
    sensitivity = {"a": -1.0, "b": -2.0}
    with pytest.raises(ConfigError, match=f"^spread of .* got {spread}. "):
        ALLOCATORS[name](sensitivity, {"a": 100, "b": 100}, 0.5, spread=spread)
