"""n:m and unstructured patterns against slow, obvious versions, and the messages of their errors."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_adaptive_sparse.errors import ConfigError, PatternError
from hf_adaptive_sparse.patterns import PATTERNS, NMPattern, Unstructured, parse_pattern
from tests.reference import patterns as reference

# Few distinct values, so that ties are the rule, and everything a float can be.
awkward = st.sampled_from(
    [0.0, -0.0, 1.0, 1.0, 2.0, -3.0, 2.0**-149, torch.finfo(torch.float32).max, math.inf, -math.inf, math.nan]
)
ordinary = st.floats(allow_nan=False, allow_infinity=False, width=32)


@st.composite
def matrices(draw, column_multiple: int = 1):
    rows, units = draw(st.integers(1, 3)), draw(st.integers(1, 4))
    row = st.lists(st.one_of(awkward, ordinary), min_size=units * column_multiple, max_size=units * column_multiple)
    return draw(st.lists(row, min_size=rows, max_size=rows))


@st.composite
def n_m_cases(draw, widest: int):
    m = draw(st.integers(1, widest))
    return draw(st.integers(1, m)), m, draw(matrices(column_multiple=m))


@given(case=n_m_cases(widest=8))
def test_up_to_eight_the_kept_positions_are_those_of_the_reference(case):
    n, m, scores = case
    assert NMPattern(n, m).keep_mask(torch.tensor(scores)).tolist() == reference.keep_n_of_m(scores, n, m)


@settings(max_examples=50)
@given(n=st.integers(1, 9), scores=matrices(column_multiple=9))
def test_beyond_eight_the_kept_positions_are_those_of_the_reference(n, scores):
    assert NMPattern(n, 9).keep_mask(torch.tensor(scores)).tolist() == reference.keep_n_of_m(scores, n, 9)


@settings(max_examples=50)
@given(scores=matrices(column_multiple=8))
def test_both_ways_to_rank_a_group_agree(scores):
    """Groups of 16 whose second half cannot win are groups of 8, ranked by a sort."""
    halves = torch.tensor(scores).unflatten(1, (-1, 8))
    padded = torch.cat([halves, torch.full_like(halves, -math.inf)], dim=-1).flatten(1)
    by_sort = NMPattern(4, 16).keep_mask(padded).unflatten(1, (-1, 16))
    assert not by_sort[..., 8:].any()
    assert by_sort[..., :8].flatten(1).tolist() == NMPattern(4, 8).keep_mask(torch.tensor(scores)).tolist()


@given(scores=matrices(), sparsity=st.floats(0.0, 1.0, exclude_max=True))
def test_unstructured_zeros_the_exact_count_and_keeps_the_positions_of_the_reference(scores, sparsity):
    zeros = round(sparsity * len(scores) * len(scores[0]))
    keep = Unstructured().keep_mask(torch.tensor(scores), sparsity)
    assert int((~keep).sum()) == zeros
    assert keep.tolist() == reference.keep_best_of_matrix(scores, zeros)


@pytest.mark.parametrize("sparsity", [0.0, 0.1, 1 / 3, 0.5, 0.7, 0.999])
def test_unstructured_count_is_exact_in_a_matrix_full_of_ties(sparsity):
    keep = Unstructured().keep_mask(torch.ones(37, 41), sparsity)
    zeros = round(sparsity * 37 * 41)
    assert keep.flatten().tolist() == [True] * (37 * 41 - zeros) + [False] * zeros


def test_ties_go_to_the_lower_index():
    keep = NMPattern(2, 4).keep_mask(torch.tensor([[1.0, 1.0, 1.0, 1.0, 0.0, 2.0, 0.0, 0.0]]))
    assert keep.tolist() == [[True, True, False, False, True, True, False, False]]


def test_all_zero_groups_still_keep_exactly_n_positions():
    assert NMPattern(2, 4).keep_mask(torch.zeros(1, 8)).tolist() == [[True, True, False, False] * 2]


def test_nan_is_kept_first_and_ties_with_infinity():
    scores = torch.tensor([[math.inf, 3e38, math.nan, 0.0], [1.0, math.nan, 2.0, math.nan]])
    assert NMPattern(2, 4).keep_mask(scores).tolist() == [
        [True, False, True, False],
        [False, True, False, True],
    ]
    assert NMPattern(1, 4).keep_mask(scores).tolist() == [
        [True, False, False, False],
        [False, True, False, False],
    ]


def test_infinity_beats_the_largest_finite_score():
    largest = torch.finfo(torch.float32).max
    assert NMPattern(1, 2).keep_mask(torch.tensor([[largest, math.inf]])).tolist() == [[False, True]]
    assert NMPattern(1, 2).keep_mask(torch.tensor([[-math.inf, -largest]])).tolist() == [[False, True]]
    assert Unstructured().keep_mask(torch.tensor([[largest, math.inf]]), 0.5).tolist() == [[False, True]]


def test_a_weight_without_rows_has_a_mask_without_rows():
    assert NMPattern(2, 4).keep_mask(torch.zeros(0, 8)).shape == (0, 8)
    assert NMPattern(2, 4).first_violation(torch.zeros(0, 8)) is None
    assert Unstructured().keep_mask(torch.zeros(0, 8), 0.5).shape == (0, 8)


@given(case=n_m_cases(widest=6))
def test_first_violation_is_that_of_the_reference(case):
    n, m, weight = case
    expected = reference.first_group_with_more_than(n, m, weight)
    assert NMPattern(n, m).first_violation(torch.tensor(weight)) == expected


def test_first_violation_names_the_first_row_and_group():
    weight = torch.zeros(3, 12)
    weight[1, 8:11] = 1.0
    weight[2, 0:4] = 1.0
    assert NMPattern(2, 4).first_violation(weight) == (1, 2)
    assert NMPattern(3, 4).first_violation(weight) == (2, 0)
    assert NMPattern(4, 4).first_violation(weight) is None


def test_first_violation_counts_in_groups_of_any_size():
    weight = torch.zeros(2, 1024)
    weight[1, 512:] = 1.0
    assert NMPattern(511, 512).first_violation(weight) == (1, 1)
    weight[1, 600] = 0.0
    assert NMPattern(511, 512).first_violation(weight) is None


def test_first_violation_counts_nan_as_a_stored_value():
    assert NMPattern(2, 4).first_violation(torch.tensor([[math.nan, 0.0, 1.0, 1.0]])) == (0, 0)


@pytest.mark.parametrize(
    "pattern, name, sparsity",
    [
        (NMPattern(), "2:4", 0.5),
        (NMPattern(1, 4), "1:4", 0.75),
        (NMPattern(4, 8), "4:8", 0.5),
        (NMPattern(3, 3), "3:3", 0.0),
    ],
)
def test_name_and_sparsity_follow_from_n_and_m(pattern, name, sparsity):
    assert (pattern.name, pattern.sparsity) == (name, sparsity)


def test_any_n_of_m_can_be_asked_for_by_name():
    assert parse_pattern("2:4") is PATTERNS["2:4"]
    assert parse_pattern("3:16") == NMPattern(3, 16)
    assert parse_pattern("unstructured") == Unstructured()


@pytest.mark.parametrize("name", ["2-4", "", "2:4 ", "-2:4", "2:4:8", "half"])
def test_an_unknown_name_lists_the_known_ones(name):
    with pytest.raises(ConfigError) as raised:
        parse_pattern(name)
    assert str(raised.value) == (
        f"unknown pattern {name!r}; known: 2:4, 1:4, 4:8, unstructured, or any n:m such as '2:8'."
    )


@pytest.mark.parametrize("n, m", [(0, 4), (5, 4), (-1, 4), (0, 0)])
def test_n_must_be_between_one_and_m(n, m):
    with pytest.raises(ConfigError) as raised:
        NMPattern(n, m)
    assert str(raised.value) == f"an n:m pattern keeps n of m weights with 0 < n <= m, got {n}:{m}."


def test_input_features_must_fill_whole_groups():
    with pytest.raises(PatternError) as raised:
        NMPattern(2, 4).check_in_features((4096, 4098), "model.layers.3.mlp.down_proj")
    assert str(raised.value) == (
        "model.layers.3.mlp.down_proj: 2:4 needs the input features to be a multiple of 4, got 4098 in a "
        "[4096, 4098] weight. Add the layer to `exclude_modules`, or pad it."
    )


@pytest.mark.parametrize(
    "use",
    [
        lambda pattern, tensor: pattern.keep_mask(tensor),
        lambda pattern, tensor: pattern.first_violation(tensor),
    ],
)
@pytest.mark.parametrize("shape", [(2, 6), (8,), (2, 4, 4)])
def test_no_group_is_ever_cut_short(use, shape):
    with pytest.raises(PatternError, match="2:4 needs the input features to be a multiple of 4, got "):
        use(NMPattern(2, 4), torch.zeros(shape))


def test_the_sparsity_of_an_n_m_pattern_cannot_be_chosen():
    assert NMPattern(2, 4).keep_mask(torch.ones(1, 4), sparsity=0.5).sum() == 2
    with pytest.raises(ConfigError) as raised:
        NMPattern(2, 4).keep_mask(torch.ones(1, 4), sparsity=0.75)
    assert str(raised.value) == "pattern 2:4 has a sparsity of 0.5, asked for 0.75."


@pytest.mark.parametrize("sparsity", [1.0, -0.1, 50.0, math.nan])
def test_the_sparsity_of_an_unstructured_pattern_is_a_fraction(sparsity):
    with pytest.raises(ConfigError) as raised:
        Unstructured().keep_mask(torch.ones(1, 4), sparsity)
    assert str(raised.value) == (f"sparsity is a fraction of zeros in [0, 1), got {sparsity}. For 50 % write 0.5.")
