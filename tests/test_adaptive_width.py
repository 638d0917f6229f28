"""Widths of blocks: importance, budgets to one unit, remainders that are carried on, and rounding to multiples."""

from __future__ import annotations

import json
from dataclasses import asdict, replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_adaptive_sparse.errors import CalibrationError, ConfigError
from hf_adaptive_sparse.methods.adaptive_width import (
    WIDTH_ALLOCATORS,
    WidthProblem,
    WidthState,
    adaptive_widths,
    axis_importance,
    global_threshold_widths,
    layer_importance,
    min_reachable,
    parameters_to_remove,
    round_widths,
    saap_widths,
    uniform_widths,
    unit_costs,
)
from hf_adaptive_sparse.units import Axis, Span
from tests.layers import seeded
from tests.reference import adaptive_width as reference
from tests.unit_axes import consecutive

every_allocator = pytest.mark.parametrize("name", WIDTH_ALLOCATORS)
some_examples = settings(max_examples=25)
seeds = st.integers(0, 2**31)


def blocks(count: int, heads: int = 4, channels: int = 30) -> list[Axis]:
    return [
        axis
        for block in range(count)
        for axis in (
            Axis(f"{block}.attn", "kv_head", block, heads, ()),
            Axis(f"{block}.mlp", "mlp_channel", block, channels, ()),
        )
    ]


def shrunk(axes: list[Axis], keep: dict[str, torch.Tensor]) -> list[Axis]:
    return [replace(axis, count=int(keep[axis.name].sum())) for axis in axes]


def problem_of(axes: list[Axis], remove: int, seed: int = 0, costs: tuple[int, int] = (24, 3), **more) -> WidthProblem:
    """Random scores, and random importance where none is given."""
    generator = seeded(seed)
    scores = {axis.name: torch.rand(axis.count, generator=generator) for axis in axes}
    more.setdefault("importance", {axis.name: float(torch.rand((), generator=generator)) * 2 - 1 for axis in axes})
    prices = {axis.name: costs[axis.kind == "mlp_channel"] for axis in axes}
    return WidthProblem(axes=axes, costs=prices, scores=scores, remove=remove, **more)


def worth(axes: list[Axis], problem: WidthProblem, keep: dict[str, torch.Tensor]) -> int:
    return sum(int((~keep[axis.name]).sum()) * problem.costs[axis.name] for axis in axes)


@some_examples
@given(st.lists(st.floats(-1, 1), min_size=1, max_size=9))
def test_importance_is_that_of_the_reference(cosines):
    found = layer_importance(torch.tensor(cosines, dtype=torch.float64))
    torch.testing.assert_close(found, torch.tensor(reference.importance(cosines)).double(), rtol=1e-6, atol=1e-6)
    assert abs(float(found.sum())) < 1e-6 and (len(set(cosines)) == 1 or found.abs().max() <= 1.0)


def test_a_block_that_turns_the_stream_most_is_most_important_and_its_axes_share_that():
    importance = layer_importance(torch.tensor([0.9, 0.5, 0.97]))
    assert importance.argmax() == 1 and importance[1] == 1.0
    shared = axis_importance([*blocks(3), Axis("model", "hidden", None, 8, ())], importance)
    assert shared["1.attn"] == shared["1.mlp"] == 1.0 and shared["2.mlp"] < shared["0.mlp"] and shared["model"] == 0.0


def test_a_cosine_that_is_not_finite_is_refused():
    with pytest.raises(CalibrationError) as raised:
        layer_importance(torch.tensor([0.9, torch.nan]))
    assert str(raised.value) == (
        "block 1: the cosine of its input and output is NaN or inf. Load the model in float32 or bfloat16, and check "
        "its loss on this text."
    )


@every_allocator
@some_examples
@given(seed=seeds, part=st.floats(0, 1), head=st.integers(1, 60), channel=st.integers(1, 7), least=st.integers(1, 3))
def test_the_budget_is_met_to_one_unit_and_every_axis_keeps_its_least(name, seed, part, head, channel, least):
    axes = blocks(3)
    most = 3 * ((4 - least) * head + (30 - least) * channel)
    problem = problem_of(axes, round(part * most), seed, (head, channel), min_units=least)
    chosen = WIDTH_ALLOCATORS[name](problem, WidthState.start(axes))
    assert chosen.removed == worth(axes, problem, chosen.keep)
    surplus = chosen.removed - problem.remove
    assert surplus >= 0
    for axis in axes:
        keep = chosen.keep[axis.name]
        assert keep.dtype == torch.bool and keep.shape == (axis.count,) and keep.sum() >= least
        if not keep.all():  # the unit could not have stayed
            assert surplus < problem.costs[axis.name]
        scores = problem.scores[axis.name]
        assert keep.all() or scores[keep].min() >= scores[~keep].max()
    # Only where the cheaper kind can lose nothing more, or lost nothing, is a surplus of more than its unit possible.
    if surplus >= min(head, channel):
        cheap = axes[1 if channel <= head else 0 :: 2]
        left = {(int(chosen.keep[axis.name].sum()) - least) / (axis.count - least) for axis in cheap}
        assert left in ({0.0}, {1.0})


def test_heads_are_rounded_together():
    """Four blocks of two heads that should lose a fifth each lose two of their eight heads: where they score lowest."""
    axes = blocks(4, heads=2)
    problem = problem_of(axes, 64, costs=(25, 1))
    for block, score in enumerate((0.4, 0.1, 0.3, 0.2)):
        problem.scores[f"{block}.attn"][:] = torch.tensor([score, 1.0])
    chosen = uniform_widths(problem, WidthState.start(axes))
    assert [int(chosen.keep[axis.name].sum()) for axis in axes[::2]] == [2, 1, 2, 1]
    assert chosen.removed == 64


@every_allocator
def test_no_axis_goes_below_its_floor(name):
    axes = blocks(2)
    floors = {axis.name: 3 if axis.kind == "kv_head" else 20 for axis in axes}
    problem = problem_of(axes, 2 * (24 + 10 * 3), floors=floors)
    chosen = WIDTH_ALLOCATORS[name](problem, WidthState.start(axes))
    assert {axis: int(keep.sum()) for axis, keep in chosen.keep.items()} == floors
    with pytest.raises(ConfigError):
        problem_of(axes, 2 * (24 + 10 * 3) + 1, floors=floors)


@every_allocator
def test_nothing_and_everything_can_be_removed(name):
    axes = blocks(2)
    state = WidthState.start(axes)
    nothing = WIDTH_ALLOCATORS[name](problem_of(axes, 0), state)
    assert nothing.removed == 0 and all(keep.all() for keep in nothing.keep.values()) and nothing.state == state
    everything = WIDTH_ALLOCATORS[name](problem_of(axes, 2 * (3 * 24 + 29 * 3)), state)
    assert all(keep.sum() == 1 for keep in everything.keep.values())


@every_allocator
@some_examples
@given(seed=seeds, steps=st.integers(1, 6))
def test_a_run_of_steps_lands_where_it_should_and_continues_from_saved_state(name, seed, steps):
    axes = blocks(3)
    state, total = WidthState.start(axes), 3 * (4 * 24 + 30 * 3)
    left = total
    for step in range(1, steps + 1):
        target = total - total * step // (2 * steps)
        state = WidthState(**json.loads(json.dumps(asdict(state))))
        problem = problem_of(axes, max(left - target, 0), seed + step)
        chosen = WIDTH_ALLOCATORS[name](problem, state)
        axes, state, left = shrunk(axes, chosen.keep), chosen.state, left - chosen.removed
        assert target - 3 < left <= target
    assert state.units == WidthState.start(blocks(3)).units


@some_examples
@given(seed=seeds, remove=st.integers(1, 300))
def test_a_more_important_block_keeps_at_least_as_much(seed, remove):
    axes = blocks(4)
    chosen = adaptive_widths(problem_of(axes, remove, seed), WidthState.start(axes))
    importance = problem_of(axes, remove, seed).importance
    for kind in ("attn", "mlp"):
        names = sorted((f"{block}.{kind}" for block in range(4)), key=importance.get)
        widths = [int(chosen.keep[name].sum()) for name in names]
        assert widths == sorted(widths)


def test_with_equal_importance_adaptive_widths_are_uniform_and_amplitude_moves_them_apart():
    axes, state = blocks(3), WidthState.start(blocks(3))
    importance = axis_importance(axes, torch.tensor([1.0, 0.0, -1.0]))

    def widths(**more) -> list[int]:
        chosen = adaptive_widths(problem_of(axes, 81, costs=(24, 3), **more), state)
        return [int(chosen.keep[f"{block}.mlp"].sum()) for block in range(3)]

    uniform = uniform_widths(problem_of(axes, 81), state)
    assert widths(importance=axis_importance(axes, torch.zeros(3))) == [
        int(uniform.keep[f"{block}.mlp"].sum()) for block in range(3)
    ]
    assert widths(importance=importance, amplitude=0.0) == widths(importance=axis_importance(axes, torch.zeros(3)))
    # A share of 81 / 558 = 0.145 per step: the most important block loses nothing, the least important twice that.
    assert adaptive_widths(problem_of(axes, 81, importance=importance), state).state.sparsity == pytest.approx(
        {"0.attn": 0, "0.mlp": 0, "1.attn": 81 / 558, "1.mlp": 81 / 558, "2.attn": 162 / 558, "2.mlp": 162 / 558}
    )


@some_examples
@given(seed=seeds, remove=st.integers(1, 400), amplitude=st.floats(0, 3))
def test_sparsities_average_the_budget_over_parameters_also_where_they_are_clipped(seed, remove, amplitude):
    axes = blocks(3)
    problem = problem_of(axes, remove, seed, amplitude=amplitude)
    state = adaptive_widths(problem, WidthState.start(axes)).state
    removed = sum(state.sparsity[axis.name] * axis.count * problem.costs[axis.name] for axis in axes)
    assert removed == pytest.approx(remove, abs=1e-6)
    assert all(0.0 <= state.sparsity[axis.name] <= (axis.count - 1) / axis.count for axis in axes)


# MobileLLM-350M to 125M as published: 32 blocks, hidden 960, five KV heads of 64 with three query heads, 2560 channels.
BLOCKS, HEAD, CHANNEL, BEFORE, AFTER, STAGES = 32, 8 * 64 * 960, 3 * 960, 376_100_000, 143_100_000, 20


def test_heads_and_channels_of_a_block_shrink_in_proportion_over_the_stages_of_a_run():
    position = torch.linspace(-1, 1, BLOCKS, dtype=torch.float64)
    importance = layer_importance(-position.square())
    # The published rounding: no head goes in the first 11 stages, and channels pay for it.
    heads, channels = [5] * BLOCKS, [2560] * BLOCKS
    axes = blocks(BLOCKS, 5, 2560)
    state, left = WidthState.start(axes), BEFORE
    for stage in range(1, STAGES + 1):
        target = BEFORE - (BEFORE - AFTER) * stage // STAGES
        excess = BEFORE - target - (160 - sum(heads)) * HEAD - (2560 * BLOCKS - sum(channels)) * CHANNEL
        heads, channels = reference.published_stage(
            heads, channels, (HEAD, CHANNEL), excess, importance.tolist(), 0.02, 64
        )
        shared = axis_importance(axes, importance)
        problem = problem_of(axes, left - target, costs=(HEAD, CHANNEL), importance=shared)
        chosen = adaptive_widths(problem, state)
        axes, state, left = shrunk(axes, chosen.keep), chosen.state, left - chosen.removed
        assert target - CHANNEL < left <= target
        for attention, mlp in zip(axes[::2], axes[1::2], strict=True):
            # One head of five always stays, however few channels do.
            assert abs(attention.count / 5 - max(mlp.count / 2560, 0.2)) < 0.2
        if stage == 11:
            assert sum(heads) == 160
            assert sum(axis.count for axis in axes[::2]) / 160 == pytest.approx(
                sum(axis.count for axis in axes[1::2]) / (2560 * BLOCKS), abs=0.01
            )
    assert sum(heads) / 160 > 0.53 and sum(channels) / (2560 * BLOCKS) < 0.16
    assert sum(axis.count for axis in axes[::2]) / 160 < 0.35
    assert sum(axis.count for axis in axes[1::2]) / (2560 * BLOCKS) > 0.23


@pytest.mark.parametrize("ahead, heads", [(False, 8), (True, 4)])
def test_steps_smaller_than_a_head_remove_heads_where_the_rest_of_the_run_pays_for_them(ahead, heads):
    axes, total = blocks(2, 4, 200), 2 * (4 * 96 + 200 * 3)
    state, left, target = WidthState.start(axes), total, total // 2
    for step in range(1, 21):
        remove = max(left - total + (total - target) * step // 20, 0)
        assert remove < 96
        problem = problem_of(axes, remove, costs=(96, 3), limit=left - target if ahead else None)
        chosen = uniform_widths(problem, state)
        axes, state, left = shrunk(axes, chosen.keep), chosen.state, left - chosen.removed
    assert sum(axis.count for axis in axes[::2]) == heads
    assert target - 3 < left <= target


def test_a_global_threshold_removes_the_lowest_standardised_scores():
    axes = [Axis("a", "mlp_channel", 0, 4, ()), Axis("b", "mlp_channel", 1, 4, ())]
    scores = {"a": torch.tensor([1.0, 2.0, 3.0, 10.0]), "b": torch.tensor([100.0, 900.0, 1000.0, 1100.0])}
    problem = WidthProblem(axes=axes, costs={"a": 5, "b": 5}, scores=scores, remove=15)
    chosen = global_threshold_widths(problem, WidthState.start(axes))
    # (x - mean) / deviation: a -0.85 -0.57 -0.28 1.70; b -1.71 0.32 0.57 0.83
    assert chosen.keep["a"].tolist() == [False, False, True, True]
    assert chosen.keep["b"].tolist() == [False, True, True, True]
    assert chosen.state.sparsity == {"a": 0.5, "b": 0.25}


def test_a_unit_that_does_not_fit_the_rest_of_a_global_budget_is_passed_over():
    axes = [Axis("a", "kv_head", 0, 3, ()), Axis("b", "mlp_channel", 0, 5, ())]
    scores = {"a": torch.tensor([0.0, 5.0, 6.0]), "b": torch.tensor([4.0, 5.0, 6.0, 7.0, 8.0])}
    problem = WidthProblem(axes=axes, costs={"a": 50, "b": 4}, scores=scores, remove=10)
    chosen = global_threshold_widths(problem, WidthState.start(axes))
    assert chosen.keep["a"].all() and chosen.keep["b"].tolist() == [False, False, False, True, True]
    assert chosen.removed == 12


def test_saap_removes_most_where_scores_fluctuate_most_within_each_kind():
    axes, flat, steep = blocks(2), torch.linspace(0.9, 1.1, 30), torch.linspace(0.01, 2.0, 30)
    scores = {"0.attn": torch.ones(4), "1.attn": torch.ones(4), "0.mlp": flat * 1e6, "1.mlp": steep}
    problem = replace(problem_of(axes, 60), scores=scores)
    chosen = saap_widths(problem, WidthState.start(axes))
    sparsity = chosen.state.sparsity
    assert sparsity["0.mlp"] < sparsity["0.attn"] == sparsity["1.attn"] < sparsity["1.mlp"]


def test_costs_of_units_that_cut_one_tensor_along_two_dimensions_do_not_add_up():
    shapes = {"up": torch.Size((6, 10)), "down": torch.Size((10, 6))}
    channels = Axis("mlp", "mlp_channel", 0, 6, (Span("up", 0, consecutive(6, 1)), Span("down", 1, consecutive(6, 1))))
    hidden = Axis("model", "hidden", None, 10, (Span("up", 1, consecutive(10, 1)),))
    assert unit_costs([channels], shapes) == {"mlp": 20}
    with pytest.raises(ConfigError) as raised:
        unit_costs([channels, hidden], shapes)
    assert str(raised.value) == (
        "model: cuts up along dimension 1, and mlp along 0, so that the parameters of their units do not add up. "
        "Remove one kind of unit after the other."
    )


def test_a_target_that_cannot_be_reached_names_the_smallest_that_can():
    axes = blocks(2)
    costs = problem_of(axes, 0).costs
    assert min_reachable(axes, costs, 1000) == 1000 - 2 * (3 * 24 + 29 * 3) == 682
    assert parameters_to_remove(axes, costs, 1000, 700) == 300
    assert parameters_to_remove(axes, costs, 1000, 1200) == 0
    with pytest.raises(ConfigError) as raised:
        parameters_to_remove(axes, costs, 1000, 681)
    assert str(raised.value) == (
        "a target of 681 parameters cannot be reached: without any kv_head and mlp_channel unit but 1 per block the "
        "model still has 682 of its 1000. Ask for at least 682 (0.6820 of them)."
    )
    floors = {"0.mlp": 10}
    assert min_reachable(axes, costs, 1000, 1, floors) == 682 + 9 * 3
    with pytest.raises(ConfigError) as raised:
        parameters_to_remove(axes, costs, 1000, 708, 1, floors)
    assert str(raised.value) == (
        "a target of 708 parameters cannot be reached: without any kv_head and mlp_channel unit but 1 or 10 per block "
        "the model still has 709 of its 1000. Ask for at least 709 (0.7090 of them)."
    )


@pytest.mark.parametrize(
    "change, message",
    [
        (
            {"remove": 319},
            "cannot remove 319 parameters: the kv_head and mlp_channel units of 4 axes that may go hold 318. Remove at "
            "most that many.",
        ),
        ({"min_units": 0}, "min_units is at least 1, got 0: a block without a unit cannot run."),
        ({"amplitude": -0.5}, "amplitude of importance is at least 0, got -0.5. The paper has 1."),
        ({"costs": {}}, "0.attn: has no cost. Give one for every axis."),
        ({"scores": {}}, "0.attn: has no score. Give one for every axis."),
    ],
)
def test_a_problem_that_cannot_be_solved_is_refused(change, message):
    with pytest.raises(ConfigError) as raised:
        replace(problem_of(blocks(2), 10), **change)
    assert str(raised.value) == message


def test_scores_and_states_of_another_model_are_refused():
    axes = blocks(2)
    problem = problem_of(axes, 10)
    with pytest.raises(ConfigError, match=r"^0.attn: has 4 units, got scores of shape \[3\].$"):
        replace(problem, scores={**problem.scores, "0.attn": torch.ones(3)})
    with pytest.raises(CalibrationError, match=r"^1.mlp: the score of unit 2 is NaN.$"):
        problem.scores["1.mlp"][2] = torch.nan
        replace(problem, remove=11)
    for name, allocator in WIDTH_ALLOCATORS.items():
        with pytest.raises(ConfigError) as raised:
            allocator(problem_of(axes, 10), WidthState.start(shrunk(axes, {n: torch.ones(3) for n in problem.costs})))
        assert str(raised.value) == (
            "0.attn: has 4 units, and the run began with 3. The state is of another model; start without it."
        ), name


def test_adaptive_widths_without_importance_are_refused():
    axes = blocks(1)
    with pytest.raises(ConfigError) as raised:
        adaptive_widths(problem_of(axes, 10, importance={"0.attn": 1.0}), WidthState.start(axes))
    assert str(raised.value) == (
        "0.mlp: its importance is None, and adaptive widths need a number for every axis. Measure the cosines of the "
        "blocks."
    )


@some_examples
@given(seed=seeds, remove=st.integers(0, 800), multiple=st.sampled_from([2, 8, 12]), equal=st.booleans())
def test_rounded_widths_are_multiples_as_close_to_the_budget_as_one_multiple(seed, remove, multiple, equal):
    axes = blocks(3, 4, 96)
    problem = problem_of(axes, remove, seed)
    chosen = adaptive_widths(problem, WidthState.start(axes))
    rounded = round_widths(problem, chosen, {"mlp_channel": multiple}, equal)
    widths = {name: int(keep.sum()) for name, keep in rounded.keep.items()}
    assert rounded.removed == worth(axes, problem, rounded.keep) and rounded.state == chosen.state
    assert all(widths[axis.name] % multiple == 0 and widths[axis.name] >= 1 for axis in axes[1::2])
    if equal:
        assert len({widths[axis.name] for axis in axes[::2]}) == len({widths[axis.name] for axis in axes[1::2]}) == 1
    else:
        assert all(widths[axis.name] == chosen.keep[axis.name].sum() for axis in axes[::2])
    largest = max(3 * multiple, 24) * (3 if equal else 1)
    full = all(widths[axis.name] in (multiple, 96) for axis in axes[1::2])
    assert abs(rounded.removed - remove) <= largest or full


def test_a_width_below_one_multiple_stays_as_it_is_and_a_multiple_of_nothing_is_refused():
    axes = blocks(2)
    problem = problem_of(axes, 60)
    chosen = uniform_widths(problem, WidthState.start(axes))
    rounded = round_widths(problem, chosen, {"mlp_channel": 64})
    assert rounded.keep["0.mlp"].all() and rounded.keep["1.mlp"].all()
    with pytest.raises(ConfigError) as raised:
        round_widths(problem, chosen, {"mlp_channel": 0})
    assert str(raised.value) == "widths of mlp_channel are multiples of a number of at least 1, got 0."
