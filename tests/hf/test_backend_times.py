"""Times survive a round trip, belong to one machine, and decide what a packed model computes with."""

from __future__ import annotations

import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM

from hf_adaptive_sparse import save_packed, use_measured_backends
from hf_adaptive_sparse.backend_dispatch import RowDispatch
from hf_adaptive_sparse.errors import ConfigError, FormatError, TargetError
from hf_adaptive_sparse.hf.backend_times import TimesKey, device_name, load_times, save_times, times_path
from hf_adaptive_sparse.hf.packed_modules import packed_modules, set_packed_backend
from hf_adaptive_sparse.hf.quantizer import loading_options
from tests.hf.two_four_models import two_four_model
from tests.tiny_models import tiny_model, tokens

keys = st.builds(
    TimesKey, st.sampled_from(["A", "B, 2 threads"]), st.sampled_from(["2.11", "2.13.0+cpu"]),
    st.tuples(st.integers(1, 9), st.integers(8, 16)), st.sampled_from(["bfloat16", "float32"]),
    st.sampled_from([0, 4, 8]),
)  # fmt: skip
times = st.dictionaries(
    st.sampled_from(["dense", "packed"]), st.dictionaries(st.integers(1, 4096), st.floats(1e-9, 1e3), min_size=1)
)


@given(st.dictionaries(keys, times), st.dictionaries(keys, times))
def test_tables_survive_the_file_and_new_ones_take_the_place_of_old_ones(tmp_path_factory, first, second):
    path = tmp_path_factory.mktemp("times") / "deep" / "times.json"
    path.parent.mkdir()
    assert save_times(first, path) == path
    assert load_times(path) == first
    save_times(second, path)
    assert load_times(path) == first | second


def test_without_a_file_there_are_no_times_and_the_first_makes_the_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_ADAPTIVE_SPARSE_TIMES", str(tmp_path / "new" / "times.json"))
    assert load_times() == {}
    key = TimesKey("d", "t", (4, 8), "float32")
    save_times({key: {"dense": {1: 1.0}}})
    assert load_times() == {key: {"dense": {1: 1.0}}}
    monkeypatch.delenv("HF_ADAPTIVE_SPARSE_TIMES")
    assert times_path().parts[-2:] == ("hf_adaptive_sparse", "backend_times.json")


_ENTRY = {"device": "d", "torch": "t", "shape": [4, 8], "dtype": "float32", "value_bits": 0}


@pytest.mark.parametrize("content, reason", [
    ({"version": 2, "tables": []}, "version 2, expected 1"),
    ({"version": 1}, "KeyError: 'tables'"),
    ({"version": 1, "tables": [_ENTRY | {"seconds": {"dense": {"1": -1.0}}}]},
     "4x8: dense has a time of -1.0 for 1 rows"),
    ({"version": 1, "tables": [_ENTRY | {"seconds": {"dense": {"one": 1.0}}}]},
     "invalid literal for int() with base 10: 'one'"),
    ({"version": 1, "tables": [_ENTRY | {"seconds": []}]}, "'list' object has no attribute 'items'"),
    ([], "list indices must be integers or slices, not str"),
])  # fmt: skip
def test_a_damaged_file_is_an_error_and_is_not_written_over(tmp_path, content, reason):
    path = tmp_path / "times.json"
    path.write_text(json.dumps(content), encoding="utf-8")
    message = f"{path}: measured times cannot be read ({reason}). Remove the file, and measure again with bench --save."
    for call in (lambda: load_times(path), lambda: save_times({}, path)):
        with pytest.raises(FormatError) as caught:
            call()
        assert str(caught.value) == message
    assert json.loads(path.read_text(encoding="utf-8")) == content


def test_the_name_of_a_processor_holds_the_number_of_threads():
    assert device_name(torch.device("cpu")).endswith(", 1 thread")


@pytest.fixture
def packed(tmp_path):
    save_packed(two_four_model("llama"), tmp_path / "packed")
    return AutoModelForCausalLM.from_pretrained(tmp_path / "packed")


def table(packed, dense: dict[int, float], other: dict[int, float]):
    keys = {TimesKey.of(module) for module in packed_modules(packed).values()}
    return {key: {"dense": dense, "packed": other} for key in keys}


def test_layers_take_what_was_measured_fastest_for_these_rows(packed):
    expected = packed(tokens()).logits
    tables = table(packed, {1: 1.0, 64: 1.0}, {1: 0.5, 64: 2.0})
    for rows, backend in ((1, "packed"), (64, "dense")):
        found = use_measured_backends(packed, rows, tables=tables)
        assert {module.backend for module in packed_modules(packed).values()} == {backend}
        assert len(found) == 14 and {tuple(use.choices.items()) for use in found} == {((rows, backend),)}
        torch.testing.assert_close(packed(tokens()).logits, expected)


def test_every_call_takes_the_backend_of_its_rows_until_one_is_forced(packed):
    expected = packed(tokens()).logits
    tables = table(packed, {1: 1.0, 64: 1.0}, {1: 0.5, 64: 2.0})
    found = use_measured_backends(packed, tables=tables)
    assert found[0].choices == {1: "packed", 64: "dense"}
    modules = packed_modules(packed).values()
    assert all(isinstance(module.forward, RowDispatch) and module.backend == "packed" for module in modules)
    torch.testing.assert_close(packed(tokens()).logits, expected)
    set_packed_backend(packed, "packed")
    assert all("forward" not in vars(module) for module in modules)
    use_measured_backends(packed, tables=tables)
    set_packed_backend(packed, "dense")
    assert all("forward" not in vars(module) and module.backend == "dense" for module in modules)


def test_shapes_and_machines_that_were_not_measured_are_dense(packed):
    tables = {
        TimesKey("another card", key.torch, key.shape, key.dtype): each
        for key, each in table(packed, {1: 1.0}, {1: 0.1}).items()
    }
    set_packed_backend(packed, "packed")
    found = use_measured_backends(packed, tables=tables)
    assert {module.backend for module in packed_modules(packed).values()} == {"dense"}
    assert all(use.choices == {} for use in found)


def test_a_saved_table_is_used_without_being_named(packed, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_ADAPTIVE_SPARSE_TIMES", str(tmp_path / "times.json"))
    save_times(table(packed, {1: 1.0}, {1: 0.1}))
    use_measured_backends(packed)
    assert {module.backend for module in packed_modules(packed).values()} == {"packed"}


def test_a_backend_that_is_not_known_here_is_not_chosen(packed):
    tables = {key: each | {"of the future": {1: 0.01}} for key, each in table(packed, {1: 1.0}, {1: 2.0}).items()}
    assert use_measured_backends(packed, tables=tables)[0].choices == {1: "dense"}


def test_models_whose_backends_cannot_be_chosen_are_refused(packed, tmp_path):
    with pytest.raises(TargetError) as caught:
        use_measured_backends(tiny_model())
    assert str(caught.value) == "LlamaForCausalLM has no packed layers; loading a packed folder makes them."
    with pytest.raises(ConfigError) as caught:
        use_measured_backends(packed, 0, tables=table(packed, {1: 1.0}, {1: 2.0}))
    assert str(caught.value) == "rows is at least 1, got 0."
    with loading_options(backend="packed"):
        moved = AutoModelForCausalLM.from_pretrained(
            tmp_path / "packed", device_map={"model": "disk", "lm_head": "cpu"}, offload_folder=tmp_path / "offload"
        )
    with pytest.raises(ConfigError) as caught:
        use_measured_backends(moved)
    assert str(caught.value) == (
        "model.layers.0.self_attn.q_proj: is moved between devices by accelerate (device_map), so its backend cannot "
        "be chosen. Load the model without device_map."
    )
