"""Readers of removed units are solved for what they returned before."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_adaptive_sparse.errors import CalibrationError
from hf_adaptive_sparse.methods.adaptive_width import repaired_readers
from hf_adaptive_sparse.stats import LayerStats
from hf_adaptive_sparse.unit_scores import UnitStats
from tests.layers import seeded
from tests.unit_axes import KINDS, hand_made_axis, random_inputs

seeds = st.integers(0, 2**31)


def case(kind: str, seed: int, damping: float = 1e-6, length: int = 20):
    """(axis, weights, inputs [tokens, in] by reader, statistics, keep) with at least one unit gone and one left."""
    axis, shapes = hand_made_axis(kind)
    generator = seeded(seed)
    weights = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    inputs = {name: x.flatten(0, 1) for name, x in random_inputs(axis, seed, length=length).items()}
    grams = {}
    for name, x in inputs.items():
        gram = (x.T @ x).float()
        grams[name] = LayerStats(
            tokens=len(x), squares=gram.diagonal().clone(), gram=gram, damping=damping, where=name
        )  # fmt: skip
    keep = torch.rand(axis.count, generator=generator) < 0.6
    keep[int(torch.randint(axis.count, (), generator=generator))] = False
    if not keep.any():
        keep[int((~keep).nonzero()[seed % int((~keep).sum())])] = True
    return axis, weights, inputs, UnitStats(grams=grams), keep


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=20)
@given(seed=seeds)
def test_readers_become_the_least_squares_solution_on_the_columns_that_stay(kind, seed):
    axis, weights, inputs, stats, keep = case(kind, seed)
    before = {name: weight.clone() for name, weight in weights.items()}
    found = repaired_readers(axis, weights, stats, keep)
    assert found.keys() == inputs.keys()
    for span in axis.spans:
        if not span.reads:
            continue
        x, dense = inputs[span.tensor], weights[span.tensor].movedim(span.dim, 1).double()
        solved = found[span.tensor].movedim(span.dim, 1).double()
        kept = span.index[keep].flatten()
        gone = span.index[~keep].flatten()
        expected = torch.linalg.lstsq(x[:, kept], x @ dense.T).solution.T
        torch.testing.assert_close(solved[:, kept], expected, rtol=1e-3, atol=1e-3)
        assert not solved[:, gone].any()
        dropped = dense.clone()
        dropped[:, gone] = 0.0
        assert (x @ (solved - dense).T).norm() <= (x @ (dropped - dense).T).norm() * (1 + 1e-4)
    assert all(torch.equal(weight, before[name]) for name, weight in weights.items())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_dtype_stays_and_more_columns_than_tokens_are_no_obstacle(dtype):
    axis, weights, _, stats, keep = case("kv_head", 1, damping=0.01, length=2)
    weights = {name: weight.to(dtype) for name, weight in weights.items()}
    (solved,) = repaired_readers(axis, weights, stats, keep).values()
    assert solved.dtype == dtype and solved.isfinite().all()


def test_a_gram_matrix_that_was_not_collected_is_named():
    axis, weights, _, _, keep = case("mlp_channel", 0)
    with pytest.raises(CalibrationError) as error:
        repaired_readers(axis, weights, UnitStats(), keep)
    assert str(error.value) == (
        "mlp: repair needs the Gram matrix of the inputs of mlp.down_proj.weight, which was not collected."
    )
