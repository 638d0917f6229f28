"""What every entry of UNIT_SCORES must obey."""

from __future__ import annotations

from dataclasses import fields, replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_adaptive_sparse.errors import CalibrationError
from hf_adaptive_sparse.unit_scores import NEEDS, UNIT_SCORES, UnitStats
from hf_adaptive_sparse.units import Axis, Span
from tests.layers import seeded
from tests.reference import unit_scores as reference
from tests.unit_axes import KINDS, random_axis, random_inputs

# Of the weights only the shapes count, or nothing at all.
OF_NO_WEIGHT = {"activation", "perturbation"}
# Of these a unit's score depends on the other units of its axis.
RELATIVE = {"fused"}

every_score = pytest.mark.parametrize("name", UNIT_SCORES)
every_kind = pytest.mark.parametrize("kind", KINDS)
some_examples = settings(max_examples=6)
seeds = st.integers(0, 2**31)


@every_score
@every_kind
@some_examples
@given(seed=seeds)
def test_scores_are_those_of_the_reference(name, kind, seed):
    axis, weights, stats = random_axis(kind, seed)
    if name == "perturbation":
        expected = stats.losses[axis.name]
    elif name == "fused":
        expected = reference.fused(axis, weights, stats.gradients)
    else:
        expected = reference.scores(name, axis, weights, stats.gradients, random_inputs(axis, seed))
    torch.testing.assert_close(UNIT_SCORES[name](axis, weights, stats).double(), expected, rtol=1e-4, atol=1e-6)


@every_score
@every_kind
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_scores_are_one_finite_float32_number_per_unit(name, kind, dtype):
    axis, weights, stats = random_axis(kind, 0)
    scores = UNIT_SCORES[name](axis, {key: weight.to(dtype) for key, weight in weights.items()}, stats)
    assert scores.shape == (axis.count,) and scores.dtype == torch.float32
    assert scores.isfinite().all() and (name == "perturbation" or (scores > 0).all())


@pytest.mark.parametrize("name", [name for name in UNIT_SCORES if name not in OF_NO_WEIGHT | RELATIVE])
@every_kind
@some_examples
@given(seed=seeds, unit=st.integers(0, 2), factor=st.floats(1.1, 10.0))
def test_a_unit_whose_weights_are_larger_scores_more_and_the_others_as_before(name, kind, seed, unit, factor):
    axis, weights, stats = random_axis(kind, seed)
    before = UNIT_SCORES[name](axis, weights, stats)
    larger = {key: weight.clone() for key, weight in weights.items()}
    for span in axis.spans:
        moved = larger[span.tensor].movedim(span.dim, 0)
        moved[span.index[unit]] *= factor
    after = UNIT_SCORES[name](axis, larger, stats)
    others = torch.arange(axis.count) != unit
    assert after[unit] > before[unit]
    assert torch.equal(after[others], before[others])


@every_score
@every_kind
@some_examples
@given(seed=seeds)
def test_units_in_another_order_score_as_before(name, kind, seed):
    axis, weights, stats = random_axis(kind, seed)
    order = torch.randperm(axis.count, generator=seeded(seed))
    spans = tuple(Span(span.tensor, span.dim, span.index[order], span.reads) for span in axis.spans)
    reordered = replace(stats, losses={axis.name: stats.losses[axis.name][order]})
    scores = UNIT_SCORES[name](Axis(axis.name, axis.kind, 0, axis.count, spans), weights, reordered)
    # Only the mean over units of a relative score is summed in another order.
    torch.testing.assert_close(scores, UNIT_SCORES[name](axis, weights, stats)[order], rtol=1e-5, atol=0)


@every_score
@every_kind
def test_what_it_is_given_is_read_only_and_scores_carry_no_gradient(name, kind):
    axis, weights, stats = random_axis(kind, 1)
    weights = {key: weight.requires_grad_() for key, weight in weights.items()}
    given = [*weights.values(), *stats.gradients.values(), *stats.losses.values()]
    given += [tensor for moments in stats.inputs.values() for tensor in (moments.sums, moments.squares)]
    before = [tensor.detach().clone() for tensor in given]
    scores = UNIT_SCORES[name](axis, weights, stats)
    assert not scores.requires_grad
    scores.mul_(0).add_(7)
    assert all(torch.equal(one, other) for one, other in zip(before, given, strict=True))
    assert not (UNIT_SCORES[name](axis, weights, stats) == 7).all()


def test_every_score_names_what_it_reads():
    assert NEEDS.keys() == UNIT_SCORES.keys()
    assert frozenset().union(*NEEDS.values()) <= {field.name for field in fields(UnitStats)}


@every_score
@every_kind
def test_a_score_reads_the_statistics_that_it_names_and_no_others(name, kind):
    axis, weights, stats = random_axis(kind, 2)
    optional = {"gradients", "inputs", "losses"}
    bare = replace(stats, **{field: {} for field in optional - NEEDS[name]})
    assert torch.equal(UNIT_SCORES[name](axis, weights, bare), UNIT_SCORES[name](axis, weights, stats))
    if NEEDS[name]:
        with pytest.raises(CalibrationError, match=f"^{axis.name}: {name} needs .*, which w.* not .*$"):
            UNIT_SCORES[name](axis, weights, UnitStats())


@pytest.mark.parametrize("name", [name for name in UNIT_SCORES if "inputs" in NEEDS[name]])
@pytest.mark.parametrize("kind", ["mlp_channel", "transposed"])
def test_a_unit_that_always_sends_zero_scores_zero(name, kind):
    axis, weights, stats = random_axis(kind, 3)
    (reader,) = stats.inputs
    moments = stats.inputs[reader]
    dead = {field: getattr(moments, field).clone().index_fill_(0, torch.tensor([4]), 0.0)
            for field in ("sums", "squares", "magnitudes")}  # fmt: skip
    scores = UNIT_SCORES[name](axis, weights, replace(stats, inputs={reader: replace(moments, **dead)}))
    assert scores[4] == 0 and (scores[torch.arange(7) != 4] > 0).all()
