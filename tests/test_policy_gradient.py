"""Policy-gradient mask learning: the estimator, its projection, and what is learned from losses alone."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from hf_adaptive_sparse.errors import ConfigError, TrainingError
from hf_adaptive_sparse.methods.policy_gradient import (
    PolicyGradientConfig,
    PolicyLearner,
    initial_probabilities,
    policy_gradient,
    project,
)
from hf_adaptive_sparse.units import Axis

unit_lists = st.integers(1, 12).flatmap(
    lambda count: st.tuples(
        st.lists(st.floats(-0.5, 1.5), min_size=count, max_size=count),
        st.lists(st.floats(0.1, 10.0), min_size=count, max_size=count),
    )
)


def axis(name: str, kind: str, count: int) -> Axis:
    return Axis(name, kind, 0, count, ())


AXES = [axis("a.attn", "kv_head", 4), axis("a.mlp", "mlp_channel", 6), axis("b.mlp", "mlp_channel", 6)]


def distance(first: torch.Tensor, second: torch.Tensor) -> float:
    return float((first - second).square().sum())


@settings(max_examples=100)
@given(unit_lists, st.floats(0.0, 1.0))
@example(([0.0, 0.75, 0.0, 0.0], [1.0, 2.9375, 1.0, 1.0]), 0.0)  # (0.75 / 2.9375) * 2.9375 < 0.75
def test_a_projection_meets_the_budget_and_stays_a_probability(units, fraction):
    values, costs = (torch.tensor(each, dtype=torch.float64) for each in units)
    budget = fraction * float(costs.sum())
    found = project(values, costs, budget)
    assert found.min() >= 0.0 and found.max() <= 1.0
    spent = float((costs * found).sum())
    assert spent <= budget
    clipped = values.clamp(0.0, 1.0)
    if float((costs * clipped).sum()) <= budget:
        assert torch.equal(found, clipped)
    else:
        assert spent == pytest.approx(budget, rel=1e-9, abs=1e-9)  # no more is taken away than must be


@settings(max_examples=50)
@given(unit_lists, st.floats(0.05, 0.95), st.integers(0, 10_000))
def test_no_allowed_point_is_nearer_than_the_projection(units, fraction, seed):
    values, costs = (torch.tensor(each, dtype=torch.float64) for each in units)
    budget = fraction * float(costs.sum())
    found = project(values, costs, budget)
    generator = torch.Generator().manual_seed(seed)
    for width in (1.0, 0.1, 0.01):
        other = (found + width * torch.randn(len(values), generator=generator, dtype=torch.float64)).clamp(0.0, 1.0)
        if float((costs * other).sum()) <= budget:
            assert distance(values, other) >= distance(values, found) - 1e-9


def quadratic(mask: torch.Tensor) -> float:
    """A loss whose units act on each other."""
    x = mask.double()
    pull = torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)
    return float((pull * x).sum() + 3.0 * x[0] * x[1] - x[1] * x[2] + 0.7)


def expectations(s: torch.Tensor, baseline) -> tuple[torch.Tensor, torch.Tensor]:
    """(E[g] over all pairs of masks, dE[L]/ds), both by enumeration; `baseline` of the two losses."""
    masks = [torch.tensor(bits, dtype=torch.bool) for bits in itertools.product((False, True), repeat=len(s))]

    def chance(mask: torch.Tensor) -> float:
        return float(torch.where(mask, s, 1 - s).prod())

    expected = torch.zeros(len(s), dtype=torch.float64)
    for first, second in itertools.product(masks, repeat=2):
        losses = torch.tensor([quadratic(first), quadratic(second)], dtype=torch.float64)
        g = policy_gradient(s, torch.stack([first, second]), losses, baseline(losses))
        expected += chance(first) * chance(second) * g
    leaf = s.clone().requires_grad_()
    mean = sum(torch.where(mask, leaf, 1 - leaf).prod() * quadratic(mask) for mask in masks)
    (gradient,) = torch.autograd.grad(mean, leaf)
    return expected, gradient


S = torch.tensor([0.3, 0.8, 0.45], dtype=torch.float64)


def test_with_the_mean_of_its_own_losses_the_estimate_is_unbiased():
    expected, gradient = expectations(S, lambda losses: float(losses.mean()))
    torch.testing.assert_close(expected, (S * (1 - S)).sqrt() * gradient, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("baseline", [0.0, 5.0])
def test_with_any_baseline_that_knows_nothing_of_the_masks_it_is_twice_that(baseline):
    expected, gradient = expectations(S, lambda losses: baseline)
    torch.testing.assert_close(expected, 2 * (S * (1 - S)).sqrt() * gradient, rtol=1e-10, atol=1e-12)


def test_a_decided_unit_has_no_gradient():
    s = torch.tensor([0.0, 1.0, 0.5], dtype=torch.float64)
    masks = torch.tensor([[False, True, True], [False, True, False]])
    found = policy_gradient(s, masks, torch.tensor([1.0, 3.0], dtype=torch.float64), 2.0)
    assert found.tolist() == [0.0, 0.0, -2.0]


def learned(value: dict[str, torch.Tensor], config: PolicyGradientConfig, seed: int = 0, **kwargs) -> PolicyLearner:
    """A toy: a unit that is there lowers the loss by its value."""
    learner = PolicyLearner(AXES, kwargs.pop("keep_fraction", 0.5), config, seed=seed, **kwargs)
    for _ in range(config.steps):
        losses = [
            float(5.0 - sum((keep * value[name]).sum() for name, keep in masks.items())) for masks in learner.sample()
        ]
        learner.update(losses)
    return learner


VALUES = {
    "a.attn": torch.tensor([1.0, 0.0, 0.0, 1.0]),
    "a.mlp": torch.tensor([0.0, 1.0, 1.0, 1.0, 0.0, 1.0]),
    "b.mlp": torch.tensor([0.0, 0.0, 0.0, 1.0, 0.0, 1.0]),
}


@pytest.mark.parametrize("baseline", ["moving", "batch"])
def test_what_is_worth_something_is_kept_across_axes(baseline):
    config = PolicyGradientConfig(steps=400, learning_rate=0.02, baseline=baseline)
    keep = learned(VALUES, config).keep()
    assert {name: each.tolist() for name, each in keep.items()} == {
        name: (each > 0).tolist() for name, each in VALUES.items()
    }


@settings(max_examples=40)
@given(st.integers(0, 10_000), st.floats(0.3, 1.0), st.booleans())
def test_the_final_mask_spends_the_budget_to_one_unit_and_empties_no_axis(seed, fraction, shared):
    generator = torch.Generator().manual_seed(seed)
    scores = {each.name: torch.randn(each.count, generator=generator) for each in AXES}
    costs = {"a.attn": 7.0, "a.mlp": 3.0, "b.mlp": 3.0}
    config = PolicyGradientConfig(steps=1, shared_budget=shared)
    of_units = {each.name: torch.full((each.count,), costs[each.name]) for each in AXES}
    keep = PolicyLearner(AXES, fraction, config, costs=of_units, scores=scores).keep()
    assert all(each.any() for each in keep.values())
    kinds = [("kv_head", "mlp_channel")] if shared else [("kv_head",), ("mlp_channel",)]
    for group in kinds:
        inside = [each for each in AXES if each.kind in group]
        spent = sum(costs[each.name] * int(keep[each.name].sum()) for each in inside)
        budget = fraction * sum(costs[each.name] * each.count for each in inside)
        assert spent <= budget * (1 + 1e-8)
        left_out = [costs[each.name] for each in inside if not keep[each.name].all()]
        assert not left_out or spent + min(left_out) > budget


def test_scores_are_standardised_and_projected_at_the_start():
    scores = {"a.attn": torch.tensor([4.0, 1.0, 2.0, 3.0]), "a.mlp": torch.arange(6.0), "b.mlp": 9 * torch.arange(6.0)}
    learner = PolicyLearner(AXES, 0.4, PolicyGradientConfig(), scores=scores)
    found = learner.probabilities
    assert found["a.attn"].argsort().tolist() == [1, 2, 3, 0]
    torch.testing.assert_close(found["a.mlp"], found["b.mlp"])
    assert float(found["a.attn"].sum()) == pytest.approx(1.6)
    z = (torch.tensor([4.0, 1.0, 2.0, 3.0], dtype=torch.float64) - 2.5) / math.sqrt(1.25)
    torch.testing.assert_close(initial_probabilities(scores["a.attn"]), torch.sigmoid(z))
    assert initial_probabilities(torch.ones(3)).tolist() == [0.5] * 3
    plain = PolicyLearner(AXES, 0.4, PolicyGradientConfig()).probabilities
    assert torch.cat(list(plain.values())).tolist() == pytest.approx([0.4] * 16)


def test_the_same_seed_learns_the_same_and_a_restored_learner_goes_on():
    config = PolicyGradientConfig(steps=30, learning_rate=0.05)
    whole = learned(VALUES, config, seed=5)
    again = learned(VALUES, config, seed=5)
    assert all(torch.equal(each, again.probabilities[name]) for name, each in whole.probabilities.items())
    other = learned(VALUES, config, seed=6)
    assert not all(torch.equal(each, other.probabilities[name]) for name, each in whole.probabilities.items())

    def go(learner: PolicyLearner, steps: int) -> None:
        for _ in range(steps):
            learner.update(
                [float(5.0 - sum((k * VALUES[n]).sum() for n, k in masks.items())) for masks in learner.sample()]
            )

    first = PolicyLearner(AXES, 0.5, config, seed=5)
    go(first, 12)
    second = PolicyLearner(AXES, 0.5, config, seed=77)
    second.load_state_dict(first.state_dict())
    go(second, 18)
    assert second.step == 30
    assert all(torch.equal(each, second.probabilities[name]) for name, each in whole.probabilities.items())


def test_the_moving_baseline_is_the_mean_of_the_last_steps():
    config = PolicyGradientConfig(steps=10, learning_rate=0.01, window=2)
    learner = PolicyLearner(AXES, 1.0, config, scores={each.name: torch.arange(float(each.count)) for each in AXES})
    for losses in ([1.0, 2.0], [2.0, 3.0], [3.0, 5.0]):
        learner.sample()
        learner.update(losses)
    before = torch.cat(list(learner.probabilities.values()))
    masks = torch.stack([torch.cat(list(each.values())) for each in learner.sample()])
    learner.update([4.0, 7.0])
    losses = torch.tensor([4.0, 7.0], dtype=torch.float64)
    g = policy_gradient(before, masks, losses, (2.5 + 4.0) / 2)
    rate = 0.01 * 0.5 * (1 + math.cos(math.pi * 3 / 10))
    found = torch.cat(list(learner.probabilities.values()))
    torch.testing.assert_close(found, (before - rate * g).clamp(0.0, 1.0), rtol=1e-12, atol=1e-12)
    assert not torch.equal(found, before)


@pytest.mark.parametrize(
    "build, message",
    [
        (lambda: PolicyLearner([], 0.5, PolicyGradientConfig()), "there are no axes, so nothing can be pruned."),
        (
            lambda: PolicyLearner(AXES, 50, PolicyGradientConfig()),
            "keep_fraction is in (0, 1], got 50. To keep half write 0.5.",
        ),
        (
            lambda: PolicyLearner(AXES, 0.1, PolicyGradientConfig()),
            "keep_fraction=0.1 of kv_head does not pay for one unit of every axis. The smallest that does is 0.25.",
        ),
        (
            lambda: PolicyLearner(AXES, 0.5, PolicyGradientConfig(), costs={"a.attn": torch.ones(4)}),
            "a.mlp: has no entry in costs.",
        ),
        (
            lambda: PolicyLearner(AXES[:1], 0.5, PolicyGradientConfig(), costs={"a.attn": torch.zeros(4)}),
            "a.attn: a unit costs 0.0; costs are positive numbers.",
        ),
        (
            lambda: PolicyLearner(AXES[:1], 0.5, PolicyGradientConfig(), scores={"a.attn": torch.ones(3)}),
            "a.attn: scores are one finite number for each of its 4 units, got [3] with 0 that are NaN or infinite.",
        ),
        (lambda: PolicyGradientConfig(masks=1), "masks is at least 2, got 1."),
        (lambda: PolicyGradientConfig(learning_rate=0.0), "learning_rate is a finite number > 0, got 0.0."),
        (lambda: PolicyGradientConfig(learning_rate=math.nan), "learning_rate is a finite number > 0, got nan."),
        (lambda: PolicyGradientConfig(learning_rate=math.inf), "learning_rate is a finite number > 0, got inf."),
        (lambda: PolicyGradientConfig(baseline="none"), "unknown baseline 'none'; known: moving, batch."),
    ],
)
def test_what_cannot_be_learned_is_refused(build, message):
    with pytest.raises(ConfigError) as error:
        build()
    assert str(error.value) == message


def test_losses_must_be_finite_and_belong_to_masks():
    learner = PolicyLearner(AXES, 0.5, PolicyGradientConfig())
    with pytest.raises(ConfigError) as error:
        learner.update([1.0, 2.0])
    assert str(error.value) == "update got 2 losses for 0 masks. Call sample() before each update."
    learner.sample()
    with pytest.raises(TrainingError) as broken:
        learner.update([1.0, math.nan])
    assert str(broken.value) == (
        "step 0: the loss under mask 1 is nan. Load the model in float32 or bfloat16, and check it."
    )


def test_a_state_of_another_budget_is_refused():
    state = PolicyLearner(AXES[:1], 0.5, PolicyGradientConfig()).state_dict()
    with pytest.raises(ConfigError) as error:
        PolicyLearner(AXES, 0.4, PolicyGradientConfig()).load_state_dict(state)
    assert str(error.value) == (
        "the saved probabilities are of 1 axes with 4 units at keep_fraction=0.5, these of 3 axes with 16 units at "
        "keep_fraction=0.4. Go on with the model and the budget that the run was started with."
    )
