"""Pruning the weights that share an input: masks, targets, rounding, and what a config refuses."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_adaptive_sparse.errors import ConfigError
from hf_adaptive_sparse.mask_choice import Goal, MaskChooser, Member
from hf_adaptive_sparse.methods.one_shot import METHODS, OneShotConfig, corrected_target, prune_group
from hf_adaptive_sparse.patterns import NMPattern, Unstructured
from hf_adaptive_sparse.sensitivity import output_error
from hf_adaptive_sparse.stats import LayerStats

from .layers import random_inputs, random_weight, seeded, stats_of

seeds = st.integers(0, 10_000)


def stats_with_cross(seed: int, drift: float = 0.3, **more) -> tuple[LayerStats, torch.Tensor, torch.Tensor]:
    """Statistics of pruned inputs beside dense ones, and both inputs."""
    dense = random_inputs(seed, tokens=200)
    pruned = dense + drift * torch.randn(dense.shape, generator=seeded(seed + 1)) * dense.std(0)
    return stats_of(pruned, cross=(dense.double().T @ pruned.double()).float(), **more), dense, pruned


@pytest.mark.parametrize("method", METHODS)
def test_autocast_around_it_changes_no_bit(method):
    def prune(stats):
        return prune_group([random_weight(3)], stats, [Goal(NMPattern(2, 4), 0.5)], OneShotConfig(method=method))[0]

    own, others = (stats_with_cross(3)[0].with_gradient(random_weight(4).abs()) for _ in range(2))  # factored once each
    expected = prune(own)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = prune(others)
        assert torch.is_autocast_enabled("cpu")
    assert torch.equal(found.weight, expected.weight) and found.error == expected.error


# --- masks ----------------------------------------------------------------------------------------------------


@settings(max_examples=20)
@given(
    seed=seeds,
    sparsity=st.floats(0.0, 0.95),
    block=st.sampled_from([1, 4, 5, 16]),
    scope=st.sampled_from(["matrix", "row"]),
)
def test_asked_block_by_block_on_other_weights_the_chooser_still_meets_the_budget(seed, sparsity, block, scope):
    weight, stats = random_weight(seed), stats_of(random_inputs(seed))
    chooser = MaskChooser(weight, stats, [Member(slice(0, 6), Goal(Unstructured(scope), sparsity), stats)], "wanda")
    changed = weight + torch.randn(weight.shape, generator=seeded(seed))
    parts = [slice(start, min(start + block, 16)) for start in range(0, 16, block)]
    keep = torch.cat([chooser(changed[:, part], part) for part in parts], dim=1)
    assert int((~keep).sum()) == round(sparsity * weight.numel())
    if scope == "row":
        per_row = (~keep).sum(dim=1)
        assert int(per_row.max() - per_row.min()) <= 1


@given(seed=seeds)
@settings(max_examples=10)
def test_each_stacked_matrix_gets_its_own_pattern_and_sparsity(seed):
    weights = [random_weight(seed + part, rows) for part, rows in enumerate((4, 8, 6))]
    goals = [Goal(NMPattern(2, 4), 0.5), Goal(Unstructured(), 0.25), Goal(NMPattern(1, 4), 0.75)]
    config = OneShotConfig(method="balanced", correction=0.0)
    pruned = prune_group(weights, stats_of(random_inputs(seed)), goals, config)
    assert [int((~result.keep).sum()) for result in pruned] == [32, 32, 72]
    for result, goal in zip(pruned, goals, strict=True):
        assert (result.weight[~result.keep] == 0).all()
        if isinstance(goal.pattern, NMPattern):
            assert goal.pattern.first_violation(result.weight) is None


@pytest.mark.parametrize(
    ("patterns", "width"),
    [
        ((NMPattern(2, 4), NMPattern(4, 8)), 8),
        ((NMPattern(1, 1), NMPattern(2, 4)), 4),
        ((NMPattern(1, 1), NMPattern(1, 1)), 128),
        ((NMPattern(1, 1),), 128),
        ((Unstructured(), Unstructured()), 128),
    ],
)
def test_as_many_columns_are_decided_together_as_the_widest_pattern_needs(patterns, width):
    members = [
        Member(slice(number, number + 1), Goal(pattern, getattr(pattern, "sparsity", 0.5)), stats_of(random_inputs(0)))
        for number, pattern in enumerate(patterns)
    ]
    assert MaskChooser(random_weight(0), members[0].stats, members, "wanda").width == width


@pytest.mark.parametrize("method", sorted(set(METHODS) - {"taylor"}))
def test_matrices_that_are_stacked_are_pruned_as_if_each_were_alone(method):
    weights = [random_weight(part, 4) for part in range(3)]
    stats, _, _ = stats_with_cross(0)
    config, goal = OneShotConfig(method=method), Goal(NMPattern(2, 4), 0.5)
    together = prune_group(weights, stats, [goal] * 3, config)
    for weight, result in zip(weights, together, strict=True):
        (alone,) = prune_group([weight], stats, [goal], config)
        # Solvers that stop when the whole stack has settled may stop elsewhere for a part of it.
        if METHODS[method].solver not in ("admm", "fista"):
            assert torch.equal(result.keep, alone.keep)
            torch.testing.assert_close(result.weight, alone.weight, rtol=1e-4, atol=1e-5)


def test_the_gradient_of_each_matrix_is_its_own():
    weights, stats = [torch.ones(2, 8), torch.ones(2, 8)], stats_of(random_inputs(0, features=8))
    rising = torch.arange(16.0).reshape(2, 8)
    first, second = prune_group(
        weights, stats, [Goal(NMPattern(2, 4), 0.5)] * 2, OneShotConfig(method="taylor"), [rising, -rising + 20]
    )
    assert first.keep[0].tolist() == [False, False, True, True] * 2
    assert second.keep[0].tolist() == [True, True, False, False] * 2


# --- what a layer is solved for -------------------------------------------------------------------------------


@given(seed=seeds)
@settings(max_examples=10)
def test_the_corrected_target_is_the_least_squares_solution_on_the_pruned_inputs(seed):
    stats, dense, pruned = stats_with_cross(seed, damping=1e-7)
    weight = random_weight(seed)
    found = corrected_target(weight, stats, 1.0)
    best = torch.linalg.lstsq(pruned.double(), dense.double() @ weight.double().T).solution.T
    torch.testing.assert_close(found.double(), best, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(corrected_target(weight, stats, 0.5), (found + weight) / 2, rtol=1e-4, atol=1e-5)


def test_where_inputs_did_not_drift_nothing_is_corrected():
    stats, _, _ = stats_with_cross(3, drift=0.0)
    weight = random_weight(3)
    torch.testing.assert_close(corrected_target(weight, stats, 1.0), weight, rtol=1e-4, atol=1e-5)


@given(seed=seeds)
@settings(max_examples=10)
def test_correction_brings_the_output_closer_to_that_of_the_dense_model(seed):
    stats, dense, pruned = stats_with_cross(seed)
    weight, goal = random_weight(seed), Goal(NMPattern(2, 4), 0.5)
    wanted = dense @ weight.T
    errors = []
    for amount in (0.0, 1.0):
        config = OneShotConfig(method="balanced", correction=amount, refine_iterations=100)
        (result,) = prune_group([weight], stats, [goal], config)
        errors.append((pruned @ result.weight.T - wanted).square().sum())
    assert errors[1] <= errors[0] * 1.02


def test_error_is_that_of_the_written_weight():
    weight, stats = random_weight(1, 512).bfloat16(), stats_of(random_inputs(1))
    (result,) = prune_group([weight], stats, [Goal(NMPattern(2, 4), 0.5)], OneShotConfig(method="sparsegpt"))
    assert result.weight.dtype == torch.bfloat16
    assert result.error == pytest.approx(output_error(weight, result.weight, stats), rel=1e-3)


# --- rounding -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rounding", ["rtn", "gptq"])
@pytest.mark.parametrize(("bits", "group"), [(8, 0), (4, 0), (4, 8)])
def test_rounded_weights_are_codes_times_scales_and_stay_in_the_pattern(rounding, bits, group):
    weight, stats = random_weight(2, 8), stats_of(random_inputs(2))
    config = OneShotConfig(bits=bits, group_size=group, rounding=rounding, correction=0.0)
    (result,) = prune_group([weight], stats, [Goal(NMPattern(2, 4), 0.5)], config)
    assert int(result.codes.abs().max()) <= 2 ** (bits - 1) - 1
    scales = result.scales.repeat_interleave(group or 16, dim=1)
    assert torch.equal(result.weight, result.codes * scales)
    assert NMPattern(2, 4).first_violation(result.weight) is None
    assert (result.codes[~result.keep] == 0).all()


def test_rounding_in_the_sweep_is_closer_than_rounding_each_value():
    errors = {}
    for rounding in ("rtn", "gptq"):
        total = 0.0
        for seed in range(5):
            weight, stats = random_weight(seed, 16, 32), stats_of(random_inputs(seed, 32, 400))
            config = OneShotConfig(bits=4, rounding=rounding, correction=0.0)
            (result,) = prune_group([weight], stats, [Goal(NMPattern(2, 4), 0.5)], config)
            total += result.error
        errors[rounding] = total
    assert errors["gptq"] < errors["rtn"]


# --- configs --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
def test_every_method_is_a_config(method):
    config = OneShotConfig(method=method)
    assert config.target == 0.5
    assert config.resolved.allocation == "uniform"  # 2:4 leaves nothing to allocate
    assert OneShotConfig(method=method, pattern="unstructured").resolved.allocation == METHODS[method].allocation


def test_parts_override_the_method():
    config = OneShotConfig(method="fast", saliency="magnitude", solver="obs_sweep", refine_iterations=3, order="group")
    parts = config.resolved
    assert (parts.saliency, parts.solver, parts.refine_iterations) == ("magnitude", "obs_sweep", 3)
    assert parts.order == "group"


def test_only_what_is_read_is_collected():
    assert OneShotConfig(method="magnitude").needs == frozenset()
    assert OneShotConfig(method="fast").needs == {"squares"}
    assert OneShotConfig(method="sparsegpt").needs == {"gram"}
    assert OneShotConfig(method="balanced").needs == {"gram", "cross"}
    assert OneShotConfig(method="taylor").needs == {"gradient"}
    assert OneShotConfig(method="fast", bits=4).needs == {"squares", "gram"}
    assert OneShotConfig(method="fast", bits=4, rounding="rtn").needs == {"squares"}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"method": "slow"}, f"unknown method 'slow'; known: {', '.join(METHODS)}."),
        ({"solver": "magic"}, "unknown solver 'magic'; known: admm, fista, obs_sweep, thanos, zero_fill."),
        ({"saliency": "x"}, "unknown saliency 'x'; known: isc, magnitude, obs, ria, taylor, wanda."),
        ({"sparsity": 1.0}, "sparsity is a fraction of zeros in [0, 1), got 1.0. For 50 % write 0.5."),
        (
            {"sparsity": 0.6},
            "pattern 2:4 has a sparsity of 0.5, asked for 0.6. Leave sparsity out, or use pattern 'mixed' or "
            "'unstructured'.",
        ),
        (
            {"allocation": "owl"},
            "pattern 2:4 fixes the sparsity of every matrix, so allocation 'owl' has nothing to decide. Use pattern "
            "'mixed' or 'unstructured'.",
        ),
        (
            {"pattern": "mixed", "allocation": "owl"},
            "pattern 'mixed' chooses one of dense,2:4,1:4 for every matrix by measured errors; allocation 'owl' does "
            "not. Use allocation=error_curves or evolutionary.",
        ),
        (
            {"pattern": "mixed", "levels": "2:4,4:8"},
            "levels: 2:4,4:8 has two of sparsity 0.5. Leave one out.",
        ),
        ({"correction": 2.0}, "correction is a part in [0, 1], got 2.0. 0 switches it off."),
        ({"refine_iterations": -1}, "refine_iterations is >= 0, got -1. 0 switches it off."),
        *(
            ({"damping": damping}, f"damping is a finite number >= 0, got {damping}. Papers take 0.01.")
            for damping in (-0.1, math.nan, math.inf)
        ),
        ({"saliency": ""}, "unknown saliency ''; known: isc, magnitude, obs, ria, taylor, wanda."),
        ({"solver": ""}, "unknown solver ''; known: admm, fista, obs_sweep, thanos, zero_fill."),
        ({"order": ""}, "unknown order ''; known: block, group."),
        ({"order": "groups"}, "unknown order 'groups'; known: block, group."),
        (
            {"allocation": ""},
            "unknown allocation ''; known: alpha, owl, ranked, uniform, error_curves, evolutionary.",
        ),
        ({"allocation_unit": "layer"}, "unknown allocation_unit 'layer'; known: matrix, block."),
        ({"sensitivity": "trace"}, "unknown sensitivity 'trace'; known: fisher, hutchinson."),
        ({"rounding": "nearest"}, "unknown rounding 'nearest'; known: gptq, rtn."),
        *(
            (
                {"pattern": pattern},
                f"unknown pattern {pattern!r}; known: 2:4, 1:4, 4:8, unstructured, or any n:m such as '2:8'.",
            )
            for pattern in ("2;4", "", None, 124)
        ),
        ({"pattern": "5:4"}, "an n:m pattern keeps n of m weights with 0 < n <= m, got 5:4."),
        (
            {"pattern": "mixed", "levels": "dense,unstructured"},
            "levels are 'dense' or n:m patterns such as '2:4', got 'unstructured'.",
        ),
        *(
            (
                {"pattern": "unstructured", "sparsity": sparsity},
                f"sparsity is a fraction of zeros in [0, 1), got {sparsity}. For 50 % write 0.5.",
            )
            for sparsity in (-0.1, 50, math.nan)
        ),
        ({"generations": -1}, "generations is >= 0, got -1. 0 takes what the error curves say."),
        ({"probes": 1}, "probes is at least 2, for a standard error, got 1. 32 are a good start."),
        ({"spread": 3.0}, "spread is a part in [0, 1], got 3.0. Papers take 0.08 to 0.3."),
        ({"bits": 3}, "weights are rounded to 4 or 8 bits, got bits=3."),
    ],
)
def test_a_config_that_exists_is_valid(settings, message):
    with pytest.raises(ConfigError) as error:
        OneShotConfig(**settings)
    assert str(error.value) == message


FREE = {"pattern": "unstructured"}


@pytest.mark.parametrize("settings, needed, read", [
    ({"levels": "dense,2:4"}, "pattern 'mixed'", {"pattern": "mixed"}),
    ({"allocation_unit": "block"}, "an allocation other than uniform", FREE | {"allocation": "owl"}),
    ({"spread": 0.1}, "allocation alpha or owl or ranked", FREE | {"allocation": "ranked"}),
    ({"spread": 0.1} | FREE | {"allocation": "error_curves"}, "allocation alpha or owl or ranked",
     {"allocation": "alpha"}),
    ({"sensitivity": "hutchinson"}, "allocation ranked", FREE | {"allocation": "ranked"}),
    ({"probes": 8} | FREE | {"allocation": "ranked"}, "allocation ranked and sensitivity hutchinson",
     {"sensitivity": "hutchinson"}),
    ({"generations": 3}, "allocation evolutionary", FREE | {"allocation": "evolutionary"}),
    ({"damping": 0.1, "method": "fast"}, "a method that measures Gram matrices", {"method": "balanced"}),
    ({"damping": 0.1, "method": "fast"}, "a method that measures Gram matrices", FREE | {"allocation": "error_curves"}),
    ({"group_size": 32}, "bits 8 or 4", {"bits": 4}),
    ({"rounding": "rtn"}, "bits 8 or 4", {"bits": 8}),
])  # fmt: skip
def test_what_nothing_would_read_is_refused(settings, needed, read):
    name, value = next(iter(settings.items()))
    with pytest.raises(ConfigError) as error:
        OneShotConfig(**settings)
    assert str(error.value) == (
        f"{name}={value!r} has no effect here: only with {needed}. Add that, or leave it out."
    )
    assert getattr(OneShotConfig(**settings | read), name) == value
