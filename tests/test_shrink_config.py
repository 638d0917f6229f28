"""When training is interrupted to prune, to how many parameters, and what a config of it refuses."""

from __future__ import annotations

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_adaptive_sparse.errors import ConfigError
from hf_adaptive_sparse.methods.adaptive_width import WIDTH_ALLOCATORS
from hf_adaptive_sparse.methods.adaptive_width.config import ALLOCATORS, AUTO, ShrinkConfig, plan_stages


@given(
    steps=st.integers(1, 5000),
    stages=st.integers(1, 40),
    dense=st.integers(1000, 10**9),
    part=st.floats(0.05, 0.95),
    shares=st.sampled_from(["linear", "constant"]),
    fraction=st.floats(0.01, 1.0),
)
@settings(max_examples=60, deadline=None)
def test_stages_begin_at_once_go_down_to_the_target_and_each_trains(steps, stages, dense, part, shares, fraction):
    config = ShrinkConfig(stages=stages, shares=shares, prune_fraction=fraction)
    target = round(part * dense)
    if steps < stages:
        with pytest.raises(ConfigError):
            plan_stages(steps, dense, target, config)
        return
    found = plan_stages(steps, dense, target, config)
    starts = [stage.step for stage in found]
    assert len(found) == stages
    assert starts[0] == 0
    assert all(later > earlier for earlier, later in zip(starts, starts[1:], strict=False))
    assert starts[-1] < steps
    assert starts[-1] <= max(fraction * steps + 1, stages - 1)
    parameters = [dense, *(stage.parameters for stage in found)]
    falls = [before - after for before, after in zip(parameters, parameters[1:], strict=False)]
    assert parameters[-1] == target
    assert max(falls) - min(falls) <= 1


def test_later_stages_get_more_of_the_data_by_the_papers_share():
    stages = plan_stages(1000, 100, 50, ShrinkConfig(stages=4, prune_fraction=1.0))
    # 2 s / (N (N + 1)) = 0.1, 0.2, 0.3, 0.4 of all steps
    assert [stage.step for stage in stages] == [0, 100, 300, 600]
    constant = ShrinkConfig(stages=4, shares="constant", prune_fraction=1.0)
    assert [stage.step for stage in plan_stages(1000, 100, 50, constant)] == [0, 250, 500, 750]
    early = ShrinkConfig(stages=4, prune_fraction=0.5)
    assert [stage.step for stage in plan_stages(1000, 100, 50, early)] == [0, 50, 150, 300]


def test_by_default_all_goes_before_training():
    assert [(stage.step, stage.parameters) for stage in plan_stages(1000, 100, 50, ShrinkConfig())] == [(0, 50)]


def test_too_few_steps_for_the_stages_are_refused():
    with pytest.raises(ConfigError) as error:
        plan_stages(9, 100, 50, ShrinkConfig(stages=10))
    assert str(error.value) == "10 stages need at least as many optimizer steps, got 9. Train on more tokens."


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"target": "0.8"}, "target is a number, got '0.8'. Write 0.8."),
        ({"stages": 2.5}, "stages is a whole number, got 2.5. Write 2 or 3."),
        ({"target": 1.0}, "target is the part of the parameters that stays, in (0, 1), got 1.0. For 80 % write 0.8."),
        ({"target": 80.0}, "target is the part of the parameters that stays, in (0, 1), got 80.0. For 80 % write 0.8."),
        ({"step": 0.0}, "step is a part of the removable parameters in (0, 1], got 0.0."),
        ({"stages": 0}, "stages is at least 1, got 0."),
        ({"min_units": 0}, "min_units is at least 1, got 0."),
        ({"multiple_of": 0}, "multiple_of is at least 1, got 0."),
        ({"amplitude": -1.0}, "amplitude is a finite number >= 0, got -1.0. 0 prunes all blocks alike."),
        *(
            case
            for value in (math.nan, math.inf)
            for case in (
                (
                    {"target": value},
                    f"target is the part of the parameters that stays, in (0, 1), got {value}. For 80 % write 0.8.",
                ),
                ({"step": value}, f"step is a part of the removable parameters in (0, 1], got {value}."),
                ({"prune_fraction": value}, f"prune_fraction is a part of the run in (0, 1], got {value}."),
                ({"amplitude": value}, f"amplitude is a finite number >= 0, got {value}. 0 prunes all blocks alike."),
            )
        ),
        (
            {"allocation": "even"},
            "unknown allocation 'even'; known: auto, adaptive, uniform, global_threshold, saap.",
        ),
        ({"prune_fraction": 0.0}, "prune_fraction is a part of the run in (0, 1], got 0.0."),
        (
            {"repair": True, "bias_repair": True},
            "repair and bias_repair make up for the same loss. Choose one of them.",
        ),
        ({"shares": "cosine"}, "unknown shares 'cosine'; known: linear, constant."),
    ],
)
def test_a_config_says_what_is_wrong_with_it(changes, message):
    with pytest.raises(ConfigError) as error:
        ShrinkConfig(**changes)
    assert str(error.value) == message


def test_the_names_of_allocators_are_those_that_there_are():
    assert set(ALLOCATORS) == {AUTO, *WIDTH_ALLOCATORS}


def test_auto_is_what_was_measured_best_with_training_and_without():
    assert ShrinkConfig().settled(trains=True) == ShrinkConfig(allocation="uniform", equal_widths=True)
    assert ShrinkConfig().settled(trains=False).allocator == "adaptive"
    named = ShrinkConfig(allocation="saap")
    assert named.settled(trains=True) is named
