"""Hard-concrete gates: the distribution, the constraints that drive them, and what is kept at the end."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_adaptive_sparse.errors import ConfigError
from hf_adaptive_sparse.methods.hard_concrete import (
    CLAMP,
    HardConcreteConfig,
    HardConcreteGates,
    hard_concrete,
    lagrangian,
    open_probability,
    soft_value,
)
from hf_adaptive_sparse.units import Axis


def axis(name: str, kind: str, count: int) -> Axis:
    return Axis(name, kind, 0, count, ())


AXES = [axis("a.attn", "kv_head", 4), axis("a.mlp", "mlp_channel", 10), axis("b.mlp", "mlp_channel", 8)]


@settings(max_examples=50)
@given(st.floats(-6.0, 6.0), st.floats(1e-6, 1 - 1e-6))
def test_a_gate_is_the_stretched_and_clipped_sigmoid(a, u):
    s = 1 / (1 + math.exp(-(math.log(u) - math.log(1 - u) + a) / (2 / 3)))
    expected = min(1.0, max(0.0, 1.2 * s - 0.1))
    found = hard_concrete(torch.tensor([a], dtype=torch.float64), torch.tensor([u], dtype=torch.float64))
    assert found.item() == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize("a", [-3.0, -1.6, 0.0, 2.0])
def test_the_open_probability_is_how_often_a_gate_is_open(a):
    uniform = (torch.arange(200_000) + 0.5) / 200_000  # every quantile once
    found = hard_concrete(torch.full_like(uniform, a), uniform)
    assert float((found > 0).float().mean()) == pytest.approx(float(open_probability(torch.tensor(a))), abs=1e-4)
    assert float(open_probability(torch.tensor(a))) == pytest.approx(1 / (1 + math.exp(-a - 1.5986)), abs=1e-4)


def test_the_penalty_is_the_lagrangian_of_every_kind_written_out():
    gates = HardConcreteGates(AXES, {"kv_head": 2, "mlp_channel": 4})
    with torch.no_grad():
        for number, each in enumerate(gates.log_alpha.values()):
            each.copy_(torch.linspace(-2, 3 + number, len(each)))
        gates.multipliers["kv_head"].copy_(torch.tensor([0.3, 2.0]))
        gates.multipliers["mlp_channel"].copy_(torch.tensor([-0.5, 1.0]))
    e = {name: 1 - torch.sigmoid(each + 1.598597).mean().item() for name, each in gates.log_alpha.items()}
    gaps = {"a.attn": e["a.attn"] - 0.5 * 0.5, "a.mlp": e["a.mlp"] - 0.5 * 0.6, "b.mlp": e["b.mlp"] - 0.5 * 0.5}
    expected = 0.3 * gaps["a.attn"] + 2.0 * gaps["a.attn"] ** 2
    expected += sum(-0.5 * gaps[name] + gaps[name] ** 2 for name in ("a.mlp", "b.mlp")) / 2
    assert gates.penalty(ramp=0.5).item() == pytest.approx(expected, abs=1e-6)


def test_the_lagrangian_is_a_mean_over_axes():
    found = lagrangian(torch.tensor([0.5, 0.1]), torch.tensor([0.3, 0.3]), torch.tensor([1.0, 10.0]))
    assert found.item() == pytest.approx((0.2 + 0.4 - 0.2 + 0.4) / 2)


def test_the_target_grows_linearly_and_then_stays():
    config = HardConcreteConfig(steps=100, ramp_fraction=0.2)
    assert [config.ramp(step) for step in (0, 5, 20, 99)] == [0.0, 0.25, 1.0, 1.0]
    assert HardConcreteConfig(steps=100, ramp_fraction=0.0).ramp(0) == 1.0


@settings(max_examples=30)
@given(st.integers(0, 10_000), st.integers(1, 4), st.integers(1, 8))
def test_the_largest_gates_of_every_axis_stay_as_many_as_the_shape_says(seed, heads, channels):
    gates = HardConcreteGates(AXES, {"kv_head": heads, "mlp_channel": channels})
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for each in gates.log_alpha.values():
            each.copy_(torch.randint(-3, 3, each.shape, generator=generator))  # with ties
    final = gates.final_gates()
    for name, keep in gates.keep().items():
        a = gates.log_alpha[name].detach()
        assert keep.dtype == torch.bool and int(keep.sum()) == (heads if name == "a.attn" else channels)
        assert a[keep].min() >= a.masked_fill(keep, -math.inf).max()
        torch.testing.assert_close(final[name], torch.where(keep, torch.sigmoid(0.8 * a * 1.5), 0.0))
        assert (final[name] > 0).equal(keep)


def test_of_equal_gates_the_first_stay():
    gates = HardConcreteGates(AXES, {"mlp_channel": 3})
    assert list(gates.keep()) == ["a.mlp", "b.mlp"]
    assert gates.keep()["a.mlp"].tolist() == [True] * 3 + [False] * 7


def learn(gates: HardConcreteGates, value: torch.Tensor, steps: int) -> None:
    """A toy: unit i of a.mlp lowers the loss by value_i, those of b.mlp by nothing."""
    config = HardConcreteConfig(steps=steps)
    down = torch.optim.Adam(gates.log_alpha.values(), lr=0.3)
    up = torch.optim.Adam(gates.multipliers.values(), lr=0.3, maximize=True)
    for step in range(steps):
        gates.clamp_()
        z = gates.sample()
        (-(value * z["a.mlp"]).sum() + gates.penalty(config.ramp(step))).backward()
        for optimizer in (down, up):
            optimizer.step()
            optimizer.zero_grad()


def test_gates_reach_the_shape_and_keep_what_is_worth_most():
    gates = HardConcreteGates(AXES, {"mlp_channel": 4})
    value = torch.tensor([0.0, 0.5, 0.01, 0.6, 0.02, 0.0, 0.7, 0.03, 0.8, 0.0])
    learn(gates, value, 300)
    assert gates.keep()["a.mlp"].nonzero().flatten().tolist() == [1, 3, 6, 8]
    sparsity = gates.sparsity()["mlp_channel"].tolist()
    assert sparsity == pytest.approx([0.6, 0.5], abs=0.08)


def test_the_clamp_holds_every_gate_where_it_can_come_back():
    gates = HardConcreteGates(AXES, {"kv_head": 2})
    assert gates.log_alpha["a.attn"].tolist() == [5.0] * 4
    gates.clamp_()
    assert gates.log_alpha["a.attn"].tolist() == pytest.approx([math.log(100)] * 4)
    with torch.no_grad():
        gates.log_alpha["a.attn"].fill_(-9.0)
    gates.clamp_()
    assert gates.log_alpha["a.attn"].tolist() == pytest.approx([CLAMP[0]] * 4)


def test_a_restored_learner_goes_on_with_the_same_numbers():
    first = HardConcreteGates(AXES, {"mlp_channel": 4}, seed=3)
    value = torch.linspace(0, 1, 10)
    learn(first, value, 5)
    state = first.state_dict()
    learn(first, value, 5)
    second = HardConcreteGates(AXES, {"mlp_channel": 4}, seed=99)
    second.load_state_dict(state)
    learn(second, value, 5)
    for name, each in first.log_alpha.items():
        assert torch.equal(each, second.log_alpha[name])
    assert torch.equal(first.multipliers["mlp_channel"], second.multipliers["mlp_channel"])


def test_soft_values_are_those_of_the_published_code():
    assert soft_value(torch.tensor([0.0, 2.0])).tolist() == pytest.approx([0.5, 1 / (1 + math.exp(-2.4))])


def test_a_state_of_another_shape_is_refused():
    state = HardConcreteGates(AXES, {"kv_head": 2}).state_dict()
    with pytest.raises(ConfigError) as error:
        HardConcreteGates(AXES, {"mlp_channel": 4}).load_state_dict(state)
    assert str(error.value) == (
        "the saved gates are of 1 axes with 4 units towards {'kv_head': 2}, these of 2 axes with 18 units towards "
        "{'mlp_channel': 4}. Go on with the model and the shape that the run was started with."
    )


@pytest.mark.parametrize(
    "shape, message",
    [
        ({}, "the shape is empty. Say how many units to keep of kv_head, mlp_channel."),
        ({"layer": 1}, "the shape names layer, and the axes are of kv_head, mlp_channel."),
        ({"mlp_channel": 9}, "b.mlp: the shape keeps 9 units of kind mlp_channel, and there are 8. Keep 1 to 8."),
        ({"kv_head": 0}, "a.attn: the shape keeps 0 units of kind kv_head, and there are 4. Keep 1 to 4."),
    ],
)
def test_a_shape_that_the_axes_cannot_have_is_refused(shape, message):
    with pytest.raises(ConfigError) as error:
        HardConcreteGates(AXES, shape)
    assert str(error.value) == message


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"steps": 0}, "steps is a number of optimizer steps >= 1, got 0."),
        (
            {"ramp_fraction": 2.0},
            "ramp_fraction is a fraction of the run in [0, 1], got 2.0. For half the run write 0.5.",
        ),
        ({"weight_lr": -1.0}, "weight_lr is a finite number >= 0, got -1.0. 0 leaves the weights as they are."),
        ({"gate_lr": 0.0}, "gate_lr is a finite number > 0, got 0.0."),
        *(
            case
            for value in (math.nan, math.inf)
            for case in (
                (
                    {"ramp_fraction": value},
                    f"ramp_fraction is a fraction of the run in [0, 1], got {value}. For half the run write 0.5.",
                ),
                (
                    {"weight_lr": value},
                    f"weight_lr is a finite number >= 0, got {value}. 0 leaves the weights as they are.",
                ),
                ({"gate_lr": value}, f"gate_lr is a finite number > 0, got {value}."),
                ({"multiplier_lr": value}, f"multiplier_lr is a finite number > 0, got {value}."),
            )
        ),
    ],
)
def test_a_config_that_exists_is_valid(changes, message):
    with pytest.raises(ConfigError) as error:
        HardConcreteConfig(**changes)
    assert str(error.value) == message
