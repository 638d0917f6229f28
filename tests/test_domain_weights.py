"""Dynamic batch loading: the weights of domains follow their losses."""

from __future__ import annotations

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_adaptive_sparse.domain_weights import checked_weights, updated_weights
from hf_adaptive_sparse.errors import ConfigError

domains = st.integers(1, 6).flatmap(
    lambda count: st.tuples(
        st.lists(st.floats(1e-3, 1e3), min_size=count, max_size=count),
        st.lists(st.floats(0.0, 20.0), min_size=count, max_size=count),
        st.lists(st.floats(0.0, 20.0), min_size=count, max_size=count),
    )
)


@settings(max_examples=60)
@given(domains, st.floats(1e-6, 1.0), st.floats(0.0, 50.0), st.booleans())
def test_weights_are_a_distribution_with_a_floor(case, floor, rate, clip_gap):
    weights, losses, references = case
    new = updated_weights(weights, losses, references, rate=rate, floor=floor, clip_gap=clip_gap)
    assert math.isclose(math.fsum(new), 1.0, rel_tol=1e-12)
    assert min(new) >= floor / len(new) * (1 - 1e-12)


@settings(max_examples=60)
@given(domains, st.booleans())
def test_it_is_the_rule_of_the_paper_step_by_step(case, clip_gap):
    weights, losses, references = case
    alpha = []
    for weight, loss, reference in zip(weights, losses, references, strict=True):
        gap = loss - reference
        if clip_gap and gap < 0:
            gap = 0.0
        alpha.append(weight * math.exp(0.5 * gap))
    expected = [0.99 * each / sum(alpha) + 0.01 / len(alpha) for each in alpha]
    found = updated_weights(weights, losses, references, rate=0.5, floor=0.01, clip_gap=clip_gap)
    assert found == pytest.approx(expected, rel=1e-9)


def test_the_defaults_are_those_of_the_paper_and_the_floor_of_its_code():
    e = math.e
    found = updated_weights([0.5, 0.25, 0.25], [3.0, 1.0, 2.0], [2.0, 2.0, 2.0])
    total = 0.5 * e + 0.5
    expected = [0.5 * e / total, 0.25 / total, 0.25 / total]  # the second is ahead of its reference: level with it
    assert found == pytest.approx([(1 - 1e-4) * each + 1e-4 / 3 for each in expected])
    unclipped = updated_weights([0.5, 0.25, 0.25], [3.0, 1.0, 2.0], [2.0, 2.0, 2.0], clip_gap=False)
    assert unclipped[1] < found[1] / 2


def test_a_domain_far_behind_does_not_overflow():
    found = updated_weights([1.0, 1.0], [1e4, 0.0], [0.0, 0.0], floor=0.1)
    assert found == pytest.approx([0.95, 0.05])


def test_weights_are_divided_by_their_sum():
    assert checked_weights([2, 6]) == [0.25, 0.75]


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"weights": []}, "weights has no entry: give one positive number per domain."),
        (
            {"weights": [1.0, 0.0]},
            "weights: domain 1 has 0.0. Give every domain a positive number, and leave out what is never to be drawn.",
        ),
        ({"losses": [1.0]}, "2 domains have weights, but losses has 1 entries."),
        ({"references": [1.0] * 3}, "2 domains have weights, but references has 3 entries."),
        ({"losses": [1.0, math.nan]}, "losses: domain 1 has nan. Weights follow finite losses only."),
        ({"rate": -1.0}, "rate is >= 0, got -1.0. 0 keeps the weights as they are."),
        ({"floor": 0.0}, "floor is in (0, 1], got 0.0. With 0 a domain could never come back."),
    ],
)
def test_what_cannot_be_a_mixture_is_refused(changes, message):
    arguments = {"weights": [1.0, 1.0], "losses": [1.0, 1.0], "references": [1.0, 1.0], **changes}
    with pytest.raises(ConfigError) as error:
        updated_weights(**arguments)
    assert str(error.value) == message
