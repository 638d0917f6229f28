"""The sparsities of units become whole zeros of matrices, with the budget exact and no matrix empty."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hf_adaptive_sparse.allocation import ALLOCATORS, number_of_zeros
from hf_adaptive_sparse.errors import ConfigError
from hf_adaptive_sparse.hf.one_shot import one_shot
from hf_adaptive_sparse.hf.one_shot_goals import whole_zeros
from hf_adaptive_sparse.methods.one_shot import OneShotConfig

from ..tiny_models import tokens
from .walked_models import any_model


@st.composite
def blocks(draw):
    """The sizes of the matrices of some blocks, and which block each is of."""
    sizes = draw(st.lists(st.lists(st.integers(1, 60), min_size=1, max_size=5), min_size=1, max_size=4))
    numel = {f"{block}.{index}": size for block, part in enumerate(sizes) for index, size in enumerate(part)}
    return numel, {name: name.partition(".")[0] for name in numel}


def total(numel: dict[str, int], units: dict[str, str]) -> dict[str, int]:
    found: dict[str, int] = {}
    for name, unit in units.items():
        found[unit] = found.get(unit, 0) + numel[name]
    return found


@given(given=blocks(), allocation=st.sampled_from(sorted(ALLOCATORS)), data=st.data())
def test_every_matrix_keeps_a_weight_and_the_zeros_are_those_of_the_budget(given, allocation, data):
    numel, units = given
    count = sum(numel.values())
    # As many zeros as leave one weight to every matrix are possible, however the blocks share them.
    target = data.draw(st.integers(0, count - len(numel))) / count
    per_block = total(numel, units)
    sensitivity = {unit: data.draw(st.floats(-9.0, -1.0)) for unit in per_block}
    options = {"spread": 0.0} if allocation == "ranked" else {}
    sparsity = ALLOCATORS[allocation](sensitivity, per_block, target, **options)
    zeros = whole_zeros(sparsity, units, numel, target)
    assert list(zeros) == list(numel) and all(0 <= zeros[name] < numel[name] for name in numel)
    assert sum(zeros.values()) == number_of_zeros(numel, target)
    for unit, size in per_block.items():
        in_unit = [name for name in units if units[name] == unit]
        missing = round(sparsity[unit] * size) - (size - len(in_unit))
        if missing >= 0:  # the block is full; what it has no room for is elsewhere
            assert all(zeros[name] == numel[name] - 1 for name in in_unit)
        else:
            assert sum(zeros[name] for name in in_unit) >= round(sparsity[unit] * size)


def test_fewer_weights_than_matrices_are_refused():
    numel = {"0.a": 30, "0.b": 10, "1.a": 20}
    with pytest.raises(ConfigError) as error:
        whole_zeros({"0": 39 / 40, "1": 19 / 20}, {name: name[0] for name in numel}, numel, 0.96)
    assert str(error.value) == (
        "a sparsity of 0.96 leaves 2 of 60 weights, fewer than one for each of 3 matrices. Ask for at most 0.95."
    )


@pytest.mark.parametrize("sparsity", [0.78, 0.8, 0.9, 0.99])
def test_blocks_of_alpha_pruning_can_be_as_sparse_as_asked(sparsity):
    config = OneShotConfig(
        method="sparsegpt", pattern="unstructured", sparsity=sparsity, allocation="alpha", allocation_unit="block"
    )
    model = any_model("llama", num_hidden_layers=4)
    report = one_shot(model, tokens(8, 16), config)
    weights = sum(row.shape[0] * row.shape[1] for row in report.matrices)
    assert round(report.realised * weights) == round(sparsity * weights)
    assert max(row.sparsity for row in report.matrices) < 1.0
