"""SparseAdamW against AdamW, against a slow reference, and against what it promises."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import Parameter

from hf_adaptive_sparse.errors import ConfigError, TrainingError
from hf_adaptive_sparse.optim import SparseAdamW
from hf_adaptive_sparse.patterns import NMPattern
from tests.reference.sparse_adamw import sparse_adamw

seeds = st.integers(0, 2**31 - 1)


def problem(seed: int, shape=(6, 8), steps: int = 12, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)
    grads = [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for _ in range(steps)]
    return weight, NMPattern().keep_mask(weight.abs()), grads


def run(optimizer, parameter: Parameter, grads) -> None:
    for grad in grads:
        parameter.grad = grad.clone()
        optimizer.step()


@settings(deadline=None, max_examples=25)
@given(seed=seeds, decay=st.sampled_from([0.0, 0.3, 2.0]), weight_decay=st.sampled_from([0.0, 0.1]))
def test_kept_weights_and_their_state_are_exactly_those_of_adamw(seed, decay, weight_decay):
    weight, keep, grads = problem(seed)
    ours, theirs = Parameter(weight.clone()), Parameter(weight.clone())
    sparse = SparseAdamW([ours], lr=1e-2, weight_decay=weight_decay, decay=decay, decay_steps=5)
    sparse.bind([(ours, keep)])
    adamw = torch.optim.AdamW([theirs], lr=1e-2, betas=(0.9, 0.95), weight_decay=weight_decay, foreach=True)
    run(sparse, ours, grads)
    run(adamw, theirs, grads)
    assert torch.equal(ours[keep], theirs[keep])
    for name in ("exp_avg", "exp_avg_sq"):
        assert torch.equal(sparse.state[ours][name], adamw.state[theirs][name])


@settings(deadline=None, max_examples=20)
@given(
    seed=seeds,
    decay_norm=st.sampled_from(["relative", "absolute"]),
    second_moment=st.sampled_from(["gradient", "update"]),
    decay_steps=st.integers(0, 20),
    scale_interval=st.integers(1, 5),
)
def test_steps_match_the_slow_reference(seed, decay_norm, second_moment, decay_steps, scale_interval):
    weight, keep, grads = problem(seed, shape=(3, 8), dtype=torch.float64)
    parameter = Parameter(weight.clone())
    settings_ = {
        "decay": 0.4,
        "decay_norm": decay_norm,
        "second_moment": second_moment,
        "decay_steps": decay_steps,
        "scale_interval": scale_interval,
        "weight_decay": 0.1,
        "lr": 1e-2,
        "eps": 1e-8,
    }
    optimizer = SparseAdamW([parameter], betas=(0.9, 0.95), **settings_)
    optimizer.bind([(parameter, keep)])
    run(optimizer, parameter, grads)
    expected = sparse_adamw(weight, keep, grads, beta1=0.9, beta2=0.95, **settings_)
    torch.testing.assert_close(parameter.detach(), expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("second_moment", ["gradient", "update"])
def test_without_a_gradient_only_masked_weights_move_and_towards_zero(second_moment):
    weight, keep, grads = problem(0)
    parameter = Parameter(weight.clone())
    optimizer = SparseAdamW([parameter], lr=1e-3, decay=0.5, decay_norm="absolute", second_moment=second_moment)
    optimizer.bind([(parameter, keep)])
    # V is not 0 after one ordinary step; then momentum is emptied, so that the pull alone is left.
    run(optimizer, parameter, grads[:1])
    optimizer.state[parameter]["exp_avg"].zero_()
    before = parameter.detach().clone()
    run(optimizer, parameter, [torch.zeros_like(weight)])
    assert torch.equal(parameter[keep], before[keep])
    moved = parameter.detach()[~keep] - before[~keep]
    assert (moved.sign() == -before[~keep].sign()).all()
    assert (moved.abs() < before[~keep].abs()).all()


def test_ordinary_parameters_beside_sparse_ones_follow_adamw():
    weight, keep, grads = problem(1)
    ours, theirs = (
        [Parameter(weight.clone()), Parameter(torch.ones(5)), Parameter(torch.ones(3, 4))] for _ in range(2)
    )
    sparse, adamw = SparseAdamW(ours, lr=1e-2, decay=1.0), torch.optim.AdamW(theirs, lr=1e-2, betas=(0.9, 0.95))
    adamw.param_groups[0]["weight_decay"] = 0.0
    sparse.bind([(ours[0], keep)])
    generator = torch.Generator().manual_seed(2)
    for grad in grads:
        for group in (ours, theirs):
            group[0].grad = grad.clone()
        for mine, other in zip(ours[1:], theirs[1:], strict=True):
            mine.grad = torch.randn(mine.shape, generator=generator)
            other.grad = mine.grad.clone()
        sparse.step()
        adamw.step()
    assert all(torch.equal(mine, other) for mine, other in zip(ours[1:], theirs[1:], strict=True))
    assert not torch.equal(ours[0], theirs[0])


def test_a_run_continued_from_a_state_dict_is_bit_equal():
    weight, keep, grads = problem(3, steps=30)
    straight = Parameter(weight.clone())
    whole = SparseAdamW([straight], lr=1e-2, decay=0.7, decay_steps=20, scale_interval=7)
    whole.bind([(straight, keep)])
    run(whole, straight, grads)

    first = Parameter(weight.clone())
    one = SparseAdamW([first], lr=1e-2, decay=0.7, decay_steps=20, scale_interval=7)
    one.bind([(first, keep)])
    run(one, first, grads[:17])
    second = Parameter(first.detach().clone())
    two = SparseAdamW([second], lr=1e-2, decay=0.7, decay_steps=20, scale_interval=7)
    two.bind([(second, keep)])
    two.load_state_dict(copy.deepcopy(one.state_dict()))
    run(two, second, grads[17:])
    assert torch.equal(second, straight)


def test_a_mask_changed_in_place_takes_effect_at_the_next_step():
    weight, keep, grads = problem(4)
    parameter = Parameter(weight.clone())
    optimizer = SparseAdamW([parameter], lr=1e-3, decay=0.5, decay_norm="absolute")
    optimizer.bind([(parameter, keep)])
    run(optimizer, parameter, grads[:1])
    keep.logical_not_()
    optimizer.state[parameter]["exp_avg"].zero_()
    before = parameter.detach().clone()
    run(optimizer, parameter, [torch.zeros_like(weight)])
    assert torch.equal(parameter[keep], before[keep])
    assert not torch.equal(parameter[~keep], before[~keep])


def test_relative_decay_does_not_depend_on_the_scale_of_weights_and_gradients():
    weight, keep, grads = problem(5)
    results = []
    for size in (1.0, 1000.0):
        # Weights and learning rate grow together, gradients freely: every weight keeps its relative path.
        parameter = Parameter(weight.double() * size)
        optimizer = SparseAdamW([parameter], lr=1e-2 * size, decay=0.5, eps=0.0)
        optimizer.bind([(parameter, keep)])
        run(optimizer, parameter, [grad.double() * 1e-6 * size**2 for grad in grads])
        results.append(parameter.detach() / size)
    torch.testing.assert_close(results[0], results[1], rtol=1e-9, atol=0.0)


def test_a_bound_weight_without_a_gradient_is_an_error():
    weight, keep, _ = problem(6)
    parameter = Parameter(weight)
    optimizer = SparseAdamW([parameter], decay=0.1)
    optimizer.bind([(parameter, keep)])
    with pytest.raises(TrainingError) as error:
        optimizer.step()
    assert str(error.value) == (
        "a sparse weight of shape [6, 8] has no gradient. Call backward() before step(); under DeepSpeed use "
        "decay_mode='backward', whose partitions hide gradients."
    )


def test_binding_a_weight_that_is_not_trained_here_is_an_error():
    weight, keep, _ = problem(7)
    optimizer = SparseAdamW([Parameter(torch.ones(2))])
    with pytest.raises(ConfigError) as error:
        optimizer.bind([(Parameter(weight), keep)])
    assert str(error.value) == (
        "a parameter of shape [6, 8] was bound to a mask, and this optimizer does not train it. Make the optimizer "
        "after the model was wrapped and prepared, or bind again."
    )


def test_a_mask_of_another_type_is_an_error():
    weight, keep, _ = problem(8)
    parameter = Parameter(weight)
    with pytest.raises(ConfigError) as error:
        SparseAdamW([parameter]).bind([(parameter, keep.int())])
    assert str(error.value) == (
        "keep is a bool tensor of the shape of its parameter [6, 8], got torch.int32 [6, 8]."
    )


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (
            {"lr": -1.0},
            "lr, eps, weight_decay, decay and decay_steps are >= 0, got lr=-1.0, eps=1e-08, weight_decay=0.0, "
            "decay=0.0, decay_steps=0.",
        ),
        ({"betas": (0.9, 1.0)}, "betas are in [0, 1), got (0.9, 1.0)."),
        ({"decay_norm": "l2"}, "unknown decay_norm 'l2'; known: relative, absolute."),
        ({"second_moment": "both"}, "unknown second_moment 'both'; known: gradient, update."),
        ({"scale_interval": 0}, "scale_interval is a number of steps >= 1, got 0."),
    ],
)
def test_a_setting_out_of_range_is_refused(wrong, message):
    with pytest.raises(ConfigError) as error:
        SparseAdamW([Parameter(torch.ones(2))], **wrong)
    assert str(error.value) == message


def test_many_weights_in_chunks_take_the_same_steps_as_in_one(monkeypatch):
    generator = torch.Generator().manual_seed(9)
    weights = [torch.randn(4, 8, generator=generator) for _ in range(5)]
    grads = [[torch.randn(4, 8, generator=generator) for _ in weights] for _ in range(4)]
    results = []
    for limit in (2**26, 40):
        monkeypatch.setattr("hf_adaptive_sparse.optim._FOREACH_NUMEL_CPU", limit)
        parameters = [Parameter(weight.clone()) for weight in weights]
        optimizer = SparseAdamW(parameters, decay=0.5)
        optimizer.bind((p, NMPattern().keep_mask(p.detach().abs())) for p in parameters)
        for step in grads:
            for parameter, grad in zip(parameters, step, strict=True):
                parameter.grad = grad.clone()
            optimizer.step()
        results.append([parameter.detach() for parameter in parameters])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
