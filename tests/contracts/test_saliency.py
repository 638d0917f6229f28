"""What every entry of SALIENCY must obey."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_adaptive_sparse.errors import CalibrationError
from hf_adaptive_sparse.patterns import PATTERNS
from hf_adaptive_sparse.saliency import NEEDS, SALIENCY
from hf_adaptive_sparse.stats import LayerStats
from tests.layers import random_inputs, random_weight, seeded, stats_of
from tests.reference import saliency as reference

# Of these a weight's score depends on the other weights of its row, so that some columns alone score otherwise.
RELATIVE = {"ria"}

every_score = pytest.mark.parametrize("name", SALIENCY)
every_score_of_columns = pytest.mark.parametrize("name", [name for name in SALIENCY if name not in RELATIVE])
some_examples = settings(max_examples=20)
seeds = st.integers(0, 2**31)


def random_gradient(seed: int, rows: int = 6, features: int = 16) -> torch.Tensor:
    return torch.rand(rows, features, generator=seeded(seed + 2)) + 0.1


def random_layer(seed: int) -> tuple[torch.Tensor, LayerStats]:
    """A weight with some exact zeros, and statistics that serve every score."""
    return random_weight(seed), stats_of(random_inputs(seed), gradient=random_gradient(seed))


@every_score
@some_examples
@given(seed=seeds, damping=st.sampled_from([0.01, 0.1]))
def test_scores_are_those_of_the_reference(name, seed, damping):
    weight, inputs, gradient = random_weight(seed), random_inputs(seed), random_gradient(seed)
    scores = SALIENCY[name](weight, stats_of(inputs, gradient=gradient, damping=damping))
    expected = reference.scores(name, weight, inputs, gradient, damping)
    torch.testing.assert_close(scores.double(), expected.nan_to_num(), rtol=2e-4, atol=1e-12)


@every_score
@some_examples
@given(seed=seeds)
def test_scores_are_finite_not_negative_and_zero_for_a_zero_weight(name, seed):
    weight, stats = random_layer(seed)
    weight[2], weight[:, 5] = 0.0, 0.0
    scores = SALIENCY[name](weight, stats)
    assert scores.shape == weight.shape
    assert scores.isfinite().all() and (scores >= 0).all()
    assert (scores[weight == 0] == 0).all() and (scores[weight != 0] > 0).all()


@every_score
@some_examples
@given(seed=seeds, row=st.integers(0, 5), column=st.integers(0, 15), factor=st.floats(1.01, 100.0))
def test_a_larger_weight_never_scores_less_and_its_sign_does_not_count(name, seed, row, column, factor):
    weight, stats = random_layer(seed)
    scores = SALIENCY[name](weight, stats)
    assert torch.equal(scores, SALIENCY[name](-weight, stats))
    larger = weight.clone()
    larger[row, column] *= factor
    assert SALIENCY[name](larger, stats)[row, column] >= scores[row, column]


@every_score_of_columns
@some_examples
@given(seed=seeds, start=st.integers(0, 15), length=st.integers(1, 16))
def test_some_columns_score_as_they_do_in_the_whole_layer(name, seed, start, length):
    weight, stats = random_layer(seed)
    columns = slice(start, min(start + length, 16))
    some = SALIENCY[name](weight[:, columns], stats, columns)
    assert torch.equal(some, SALIENCY[name](weight, stats)[:, columns])


@every_score
@some_examples
@given(seed=seeds)
def test_reordered_rows_have_reordered_scores(name, seed):
    weight, stats = random_layer(seed)
    order = torch.randperm(len(weight), generator=seeded(seed))
    reordered = replace(stats, gradient=stats.gradient[order])
    torch.testing.assert_close(SALIENCY[name](weight[order], reordered), SALIENCY[name](weight, stats)[order])


@every_score
@pytest.mark.parametrize("pattern", ["2:4", "unstructured"])
@some_examples
@given(seed=seeds, exponent=st.integers(-12, 12))
def test_the_unit_of_the_inputs_does_not_change_the_mask(name, pattern, seed, exponent):
    weight, stats = random_layer(seed)
    scores = SALIENCY[name](weight, stats)
    factor = 4.0**exponent  # of x^2; a power of two, so that rounding is the same
    other = replace(stats, squares=stats.squares * factor, gram=stats.gram * factor)
    masks = [PATTERNS[pattern].keep_mask(each, 0.5) for each in (scores, SALIENCY[name](weight, other))]
    # The square and fourth roots of RIA and Wanda round anew: only near ties may turn over.
    assert torch.equal(*masks) or scores.sort().values.diff().abs().min() < 1e-6 * scores.max()


@every_score
def test_more_tokens_of_the_same_kind_do_not_change_the_order(name):
    weight, stats = random_layer(3)
    doubled = replace(stats + stats + stats + stats)
    once, often = SALIENCY[name](weight, stats).flatten(), SALIENCY[name](weight, doubled).flatten()
    assert torch.equal(once.argsort(stable=True), often.argsort(stable=True))


@every_score
@pytest.mark.parametrize(
    "dtype, expected",
    [
        (torch.float16, torch.float32),
        (torch.bfloat16, torch.float32),
        (torch.float32, torch.float32),
        (torch.float64, torch.float64),
    ],
)
def test_scores_have_at_least_the_precision_of_float32(name, dtype, expected):
    weight, stats = random_layer(0)
    assert SALIENCY[name](weight.to(dtype), stats).dtype == expected


@every_score
@some_examples
@given(seed=seeds)
def test_what_it_is_given_is_read_only_and_scores_carry_no_gradient(name, seed):
    weight, stats = random_layer(seed)
    given = (weight, stats.squares, stats.gram, stats.gradient)
    before = [each.clone() for each in given]
    scores = SALIENCY[name](weight.requires_grad_(), stats)
    scores.mul_(0).add_(7)  # scores of their own memory: writing to them reaches nothing else
    again = SALIENCY[name](weight, stats)
    assert all(torch.equal(one, other) for one, other in zip(before, given, strict=True))
    assert not scores.requires_grad and not (again == 7).all()


def test_every_score_says_what_it_needs():
    assert NEEDS.keys() == SALIENCY.keys()
    assert set().union(*NEEDS.values()) <= {"squares", "gram", "gradient"}


@every_score
def test_a_score_needs_no_statistics_but_those_it_names(name):
    weight, stats = random_layer(1)
    optional = {"gram", "gradient"}
    bare = replace(stats, **{field: None for field in optional - NEEDS[name]})
    assert torch.equal(SALIENCY[name](weight, bare), SALIENCY[name](weight, stats))
    for field in optional & NEEDS[name]:
        with pytest.raises(CalibrationError, match=f"^block.3: {name}_score needs the .*, which was not collected.$"):
            SALIENCY[name](weight, replace(stats, where="block.3", **{field: None}))


@pytest.mark.parametrize("name", [name for name in SALIENCY if NEEDS[name]])
def test_a_score_that_reads_statistics_needs_tokens(name):
    weight, stats = random_layer(1)
    with pytest.raises(CalibrationError) as raised:
        SALIENCY[name](weight, replace(stats, tokens=0, where="block.3"))
    assert str(raised.value) == (
        f"block.3: {name}_score needs calibration tokens, and none reached this layer. Calibrate on more text."
    )


@pytest.mark.parametrize("name", [name for name in SALIENCY if NEEDS[name] & {"squares", "gram"}])
def test_a_weight_of_an_input_that_was_always_zero_scores_zero(name):
    inputs = random_inputs(4)
    inputs[:, 7] = 0.0
    weight, stats = random_weight(4).add(3.0), stats_of(inputs)
    scores = SALIENCY[name](weight, stats)
    assert (scores[:, 7] == 0).all() and (scores[:, torch.arange(16) != 7] > 0).all()
