"""Rows and matrices that are the same are named, -0.0 or not, in one part or in many; and where a model comes from."""

from __future__ import annotations

import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hf_adaptive_sparse import save_dense, save_packed
from hf_adaptive_sparse.hf import tensor_files
from hf_adaptive_sparse.hf.inspection import inspect_folder
from hf_adaptive_sparse.hf.inspection_details import RowPrints, claimed_two_four, provenance_of
from tests.hf.two_four_models import two_four_model
from tests.tiny_models import tiny_model

values = st.sampled_from([0.0, -0.0, 1.0, -2.5])
matrices = st.integers(1, 6).flatmap(
    lambda columns: st.lists(st.lists(values, min_size=columns, max_size=columns), min_size=1, max_size=8)
)


def prints(weight: torch.Tensor, rows: int, columns: int) -> RowPrints:
    """Of a matrix that passes by in parts of so many rows and columns."""
    found = RowPrints(*weight.shape)
    for column in range(0, weight.shape[1], columns):
        for row in range(0, weight.shape[0], rows):
            found.add(weight[row : row + rows, column : column + columns], row, column)
    return found


@given(matrices, st.integers(1, 8), st.integers(1, 6), st.sampled_from([torch.float32, torch.bfloat16]))
def test_repeated_rows_are_those_of_a_slow_comparison(matrix, rows, columns, dtype):
    found = prints(torch.tensor(matrix, dtype=dtype), rows, columns)
    expected = [
        (row, matrix.index(matrix[row])) for row in range(len(matrix))
        if any(matrix[row]) and matrix.index(matrix[row]) < row
    ]  # fmt: skip
    assert found.same_rows() == expected
    assert found.zero_rows() == sum(not any(row) for row in matrix)
    assert found.whole() == prints(torch.tensor(matrix, dtype=dtype), len(matrix), len(matrix[0])).whole()


@given(matrices, st.data())
def test_another_value_makes_another_fingerprint(matrix, data):
    weight = torch.tensor(matrix)
    changed = weight.clone()
    row = data.draw(st.integers(0, len(matrix) - 1))
    column = data.draw(st.integers(0, len(matrix[0]) - 1))
    changed[row, column] += 3.0
    assert prints(weight, 8, 6).whole() != prints(changed, 8, 6).whole()


@pytest.mark.parametrize("chunk", [1 << 24, 300])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_repeated_rows_and_copies_are_found_in_files(tmp_path, monkeypatch, chunk, family):
    monkeypatch.setattr(tensor_files, "_CHUNK", chunk)
    model = tiny_model(family)
    if family == "llama":
        first, second, name = model.model.layers[0].mlp.up_proj, model.model.layers[1].mlp.up_proj, "mlp.up_proj"
        row = first.weight.data
    else:
        first, second, name = model.transformer.h[0].mlp.c_fc, model.transformer.h[1].mlp.c_fc, "mlp.c_fc"
        row = first.weight.data.t()
    row[9] = row[40] = row[2]
    row[5] = row[6] = 0.0
    second.weight.data.copy_(first.weight.data)
    model.save_pretrained(tmp_path)
    found = {matrix.name: matrix for matrix in inspect_folder(tmp_path).matrices}
    original, copied = (next(m for n, m in found.items() if f".{block}.{name}" in n) for block in (0, 1))
    assert (original.same_rows, original.first_same_row, original.zero_rows) == (2, (9, 2), 2)
    assert (original.same_as, copied.same_as) == (None, original.name)
    others = [matrix for matrix in found.values() if matrix not in (original, copied)]
    assert all(matrix.same_rows == 0 and matrix.same_as is None for matrix in others)


def test_a_packed_and_a_dense_folder_say_how_the_model_was_made(tmp_path):
    model = two_four_model("llama", torch.bfloat16)
    about = {"one_shot": {"method": "best", "sparsity": 0.5}, "tokens": 32768}
    saved = save_packed(model, tmp_path / "packed", provenance=about)
    save_dense(model, tmp_path / "dense", provenance=about)
    packed, dense = inspect_folder(tmp_path / "packed"), inspect_folder(tmp_path / "dense")
    for report in (packed, dense):
        assert report.provenance["one_shot"] == {"method": "best", "sparsity": 0.5}
        assert report.provenance["tokens"] == 32768
        assert report.claimed == {f"{name}.weight" for name in saved.modules}
        assert report.tied == model.config.tie_word_embeddings
    assert packed.provenance["packed"]["modules"] == dense.provenance["modules"] == len(saved.modules)
    assert packed.provenance["packed"]["producer"]["package"] == "hf_adaptive_sparse"


def test_a_plain_folder_claims_nothing(tmp_path):
    tiny_model().save_pretrained(tmp_path)
    report = inspect_folder(tmp_path)
    assert (report.provenance, report.claimed) == ({}, frozenset())
    config = json.loads((tmp_path / "config.json").read_text())
    assert provenance_of(config) == {} and claimed_two_four(config) == frozenset()


def test_the_manifest_of_a_shrunk_model_is_shown_without_its_lists():
    manifest = {"kept": {"a": "0-3", "b": "1"}, "method": "cosine", "parent": "base"}
    assert provenance_of({"pruning_manifest": manifest}) == {
        "shrunk": {"kept": 2, "method": "cosine", "parent": "base"}
    }
