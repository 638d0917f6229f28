"""When masks change, by what, and what is counted."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_adaptive_sparse.errors import ConfigError
from hf_adaptive_sparse.layers import straight_through
from hf_adaptive_sparse.methods.learned_masks import (
    LearnedMasksConfig,
    MaskTrack,
    add_masked_decay,
    magnitude_one_shot,
    refresh_masks,
)
from hf_adaptive_sparse.patterns import NMPattern

seeds = st.integers(0, 2**31 - 1)


def track(seed: int, name: str = "layer") -> MaskTrack:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(6, 8, generator=generator)
    masks = [NMPattern().keep_mask(torch.rand(6, 8, generator=generator)) for _ in range(3)]
    return MaskTrack(name, weight, *masks)


@settings(deadline=None, max_examples=25)
@given(seed=seeds)
def test_a_refresh_keeps_the_largest_latent_weights_and_counts_every_flip(seed):
    one = track(seed)
    old, start, previous = one.keep.tolist(), one.start.tolist(), one.previous.tolist()
    change = refresh_masks([one], LearnedMasksConfig())["layer"]
    expected = NMPattern().keep_mask(one.weight.abs())
    assert torch.equal(one.keep, expected)
    flipped = returned = from_start = 0
    for i, row in enumerate(expected.tolist()):
        for j, kept in enumerate(row):
            flipped += kept != old[i][j]
            returned += kept != old[i][j] and kept == previous[i][j]
            from_start += kept != start[i][j]
    assert (change.flipped, change.returned, change.from_start) == (flipped, returned, from_start)
    assert one.previous.tolist() == old
    magnitude = one.weight.abs()
    assert change.ratio == pytest.approx((magnitude[~expected].mean() / magnitude[expected].mean()).item())


def test_a_refresh_writes_masks_in_place():
    one = track(0)
    address = one.keep.data_ptr()
    refresh_masks([one], LearnedMasksConfig())
    assert one.keep.data_ptr() == address


def test_a_masked_weight_that_grew_comes_back():
    weight = torch.tensor([[4.0, 3.0, 2.0, 1.0]])
    keep = NMPattern().keep_mask(weight)
    one = MaskTrack("layer", weight, keep, keep.clone(), keep.clone())
    weight[0, 3] = 5.0
    refresh_masks([one], LearnedMasksConfig())
    assert one.keep.tolist() == [[True, False, False, True]]


@settings(deadline=None)
@given(
    interval=st.integers(1, 30), total=st.integers(1, 300), start=st.floats(0.0, 1.0), freeze=st.floats(0.0, 1.0)
)
def test_masks_change_on_their_interval_and_neither_in_the_first_nor_in_the_last_part(interval, total, start, freeze):
    config = LearnedMasksConfig(mask_interval=interval, start_fraction=start, freeze_fraction=freeze)
    steps = [step for step in range(1, total + 1) if config.is_refresh(step, total)]
    due = range(interval, total + 1, interval)
    assert steps == [step for step in due if start * total <= step <= (1 - freeze) * total]


def test_frozen_masks_never_change():
    config = LearnedMasksConfig(mask_policy="frozen", mask_interval=1, start_fraction=0.0, freeze_fraction=0.0)
    assert not any(config.is_refresh(step, 100) for step in range(1, 101))


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"pattern": "unstructured"}, "masks are learned for n:m patterns such as '2:4', got 'unstructured'."),
        ({"pattern": "half"}, "unknown pattern 'half'; known: 2:4, 1:4, 4:8, unstructured, or any n:m such as '2:8'."),
        ({"mask_policy": "free"}, "unknown mask_policy 'free'; known: adaptive, frozen."),
        ({"mask_interval": 0}, "mask_interval is a number of optimizer steps >= 1, got 0."),
        ({"decay": -0.1}, "decay is >= 0, got -0.1. 0 switches it off."),
        ({"decay_norm": "l2"}, "unknown decay_norm 'l2'; known: relative, absolute."),
        (
            {"freeze_fraction": 50.0},
            "freeze_fraction is a fraction of the run in [0, 1], got 50.0. For half the run write 0.5.",
        ),
    ],
)
def test_a_config_out_of_range_is_refused(wrong, message):
    with pytest.raises(ConfigError) as error:
        LearnedMasksConfig(**wrong)
    assert str(error.value) == message


@pytest.mark.parametrize("decay_norm", ["absolute", "relative"])
def test_masked_decay_on_a_gradient_leaves_kept_entries_alone(decay_norm):
    one = track(1)
    gradient = torch.randn(6, 8, generator=torch.Generator().manual_seed(2))
    before = gradient.clone()
    add_masked_decay(gradient, one.weight, one.keep, 0.5, decay_norm)
    scale = 0.5 * (before.norm() / one.weight.norm() if decay_norm == "relative" else 1.0)
    assert torch.equal(gradient[one.keep], before[one.keep])
    torch.testing.assert_close(gradient[~one.keep], (before + scale * one.weight)[~one.keep])


@settings(deadline=None, max_examples=25)
@given(seed=seeds)
def test_the_straight_through_gradient_of_masked_entries_is_that_of_the_dense_product(seed):
    one = track(seed)
    x = torch.randn(5, 8, generator=torch.Generator().manual_seed(seed))
    weight = one.weight.clone().requires_grad_()
    masked = straight_through(weight, one.keep)
    (x @ masked.T).square().sum().backward()
    plain = masked.detach().clone().requires_grad_()
    (x @ plain.T).square().sum().backward()
    assert torch.equal(weight.grad, plain.grad)
    assert weight.grad[~one.keep].abs().max() > 0
    assert not torch.signbit(masked[~one.keep]).any()


def test_one_shot_magnitude_keeps_the_two_largest_of_four_and_writes_plus_zero():
    weight = torch.tensor([[-4.0, 3.0, -2.0, 1.0]])
    pruned = magnitude_one_shot(weight, NMPattern())
    assert pruned.tolist() == [[-4.0, 3.0, 0.0, 0.0]]
    assert not torch.signbit(pruned[0, 2:]).any()
    assert weight.tolist() == [[-4.0, 3.0, -2.0, 1.0]]
