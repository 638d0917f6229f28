"""Pruning that was stopped between two blocks goes on from there, and ends with the same weights bit by bit."""

from __future__ import annotations

import contextlib
import copy
import shutil
import sys

import pytest
import torch
from safetensors.torch import save_file

from hf_adaptive_sparse.errors import ConfigError, DataError, FormatError
from hf_adaptive_sparse.hf.one_shot import one_shot
from hf_adaptive_sparse.hf.walk_progress import PruningProgress
from hf_adaptive_sparse.hf.walk_state import windows_digest
from hf_adaptive_sparse.methods.one_shot import OneShotConfig
from tests.tiny_models import tiny_model, tokens

WINDOWS = tokens(8, 16)
BLOCKS = 3


def small_model():
    return tiny_model(num_hidden_layers=BLOCKS)


class Stopped(Exception):
    """Raised between two blocks."""


def stop_after(folder, blocks: int, config: OneShotConfig, **options) -> None:
    def stop(done: int, total: int) -> None:
        if done == blocks:
            raise Stopped

    with pytest.raises(Stopped):
        one_shot(small_model(), WINDOWS, config, progress=PruningProgress(folder), on_block=stop, **options)


def facts(report) -> list[tuple]:
    return [tuple(value for name, value in vars(row).items() if name != "seconds") for row in report.matrices]


@pytest.mark.parametrize("settings", [
    {},
    {"method": "fast", "pattern": "unstructured", "allocation": "owl"},
    {"method": "taylor", "pattern": "unstructured", "sparsity": 0.6, "allocation": "ranked"},
    {"method": "sparsegpt", "pattern": "mixed"},
    {"bits": 4, "group_size": 8},
], ids=str)  # fmt: skip
@pytest.mark.parametrize("blocks", [1, 2])
def test_a_stopped_run_ends_as_if_it_had_not_been(tmp_path, settings, blocks):
    config = OneShotConfig(**settings)
    straight = small_model()
    expected = one_shot(straight, WINDOWS, config)
    stop_after(tmp_path, blocks, config)
    model, calls = small_model(), []
    found = one_shot(
        model, WINDOWS, config, progress=PruningProgress(tmp_path), on_block=lambda done, total: calls.append(done)
    )
    assert calls == list(range(blocks + 1, BLOCKS + 1))
    for name, weight in straight.state_dict().items():
        assert torch.equal(model.state_dict()[name], weight), name
    assert facts(found) == facts(expected)
    assert found.realised == expected.realised
    assert found.quantized.keys() == expected.quantized.keys()
    for name, matrix in expected.quantized.items():
        other = found.quantized[name]
        assert torch.equal(other.codes, matrix.codes) and torch.equal(other.scales, matrix.scales)
        assert (other.bits, other.group) == (matrix.bits, matrix.group)


def test_goals_are_settled_once(tmp_path, monkeypatch):
    config = OneShotConfig(method="fast", pattern="unstructured", allocation="ranked")
    stop_after(tmp_path, 1, config)
    monkeypatch.setattr("hf_adaptive_sparse.hf.one_shot.choose_goals", None)
    report = one_shot(small_model(), WINDOWS, config, progress=PruningProgress(tmp_path))
    assert len({row.sparsity for row in report.matrices}) > 1


def test_no_pickle_is_written_and_nothing_is_left_after_remove(tmp_path):
    folder = tmp_path / "progress"
    stop_after(folder, 2, OneShotConfig(bits=8))
    assert sorted(path.name for path in folder.iterdir()) == [
        "block-0.codes.safetensors", "block-0.json", "block-0.safetensors",
        "block-1.codes.safetensors", "block-1.json", "block-1.safetensors", "goals.json", "state.safetensors",
    ]  # fmt: skip
    PruningProgress(folder).remove()
    assert list(tmp_path.iterdir()) == []


def test_a_run_with_other_settings_is_refused_and_each_is_named(tmp_path):
    stop_after(tmp_path, 1, OneShotConfig(method="fast"))
    with pytest.raises(ConfigError) as caught:
        other = {"seed": 1, "batch_size": 4, "progress": PruningProgress(tmp_path)}
        one_shot(small_model(), WINDOWS, OneShotConfig(method="fast"), **other)
    assert str(caught.value) == (
        f"{tmp_path}: cannot go on with other settings: batch_size was 8 and is 4; seed was 0 and is 1. Use the old "
        "ones, or another folder."
    )


ANOTHER_MODEL = (
    "{folder}: the model has other weights than the dense model that this run began with. It was pruned since, or is "
    "another model. Load the dense model again, or use another folder."
)


def test_another_model_is_refused_before_any_of_it_is_changed(tmp_path):
    config = OneShotConfig(method="fast")
    stop_after(tmp_path, 1, config)
    others = [small_model(), small_model(), tiny_model(num_hidden_layers=BLOCKS, intermediate_size=32)]
    with torch.no_grad():
        others[0].model.layers[2].mlp.up_proj.weight[3, 5] += 1e-3  # not of a finished block
        others[1].model.embed_tokens.weight[7, 1] += 1e-3
    for other in others:
        before = copy.deepcopy(other.state_dict())
        with pytest.raises(ConfigError) as caught:
            one_shot(other, WINDOWS, config, progress=PruningProgress(tmp_path))
        assert str(caught.value) == ANOTHER_MODEL.format(folder=tmp_path)
        assert all(torch.equal(weight, before[name]) for name, weight in other.state_dict().items())


@pytest.mark.parametrize("group", [1, 2, 7, 99])  # in the first block, in the second, after the last
def test_a_model_of_which_a_part_is_pruned_is_refused_and_the_dense_one_goes_on(tmp_path, monkeypatch, group):
    config, model, left = OneShotConfig(method="fast"), small_model(), [group]

    def interrupted(*arguments):
        if left[0] == 0:
            raise KeyboardInterrupt
        left[0] -= 1
        return real(*arguments)

    real = sys.modules["hf_adaptive_sparse.hf.one_shot"].prune_group
    monkeypatch.setattr("hf_adaptive_sparse.hf.one_shot.prune_group", interrupted)
    with pytest.raises(KeyboardInterrupt) if group < 12 else contextlib.nullcontext():
        one_shot(model, WINDOWS, config, progress=PruningProgress(tmp_path))
    left[0] = 99
    with pytest.raises(ConfigError) as caught:
        one_shot(model, WINDOWS, config, progress=PruningProgress(tmp_path))
    assert str(caught.value) == ANOTHER_MODEL.format(folder=tmp_path)
    straight, resumed = small_model(), small_model()
    one_shot(straight, WINDOWS, config)
    one_shot(resumed, WINDOWS, config, progress=PruningProgress(tmp_path))
    assert all(torch.equal(weight, straight.state_dict()[name]) for name, weight in resumed.state_dict().items())


@pytest.mark.parametrize("blocks", [0, 1])
def test_other_windows_are_refused_also_before_the_first_block(tmp_path, monkeypatch, blocks):
    config = OneShotConfig(method="fast", pattern="unstructured", allocation="ranked")
    if blocks:
        stop_after(tmp_path, blocks, config)
    else:
        with monkeypatch.context() as patch, pytest.raises(TypeError):
            patch.setattr("hf_adaptive_sparse.hf.one_shot._prune_block", None)
            one_shot(small_model(), WINDOWS, config, progress=PruningProgress(tmp_path))
        assert [path.name for path in tmp_path.iterdir()] == ["goals.json"]
    other = tokens(8, 16, seed=1)
    with pytest.raises(ConfigError) as caught:
        one_shot(small_model(), other, config, progress=PruningProgress(tmp_path))
    assert str(caught.value) == (
        f'{tmp_path}: cannot go on with other settings: digest of the windows was "{windows_digest(WINDOWS)}" and is '
        f'"{windows_digest(other)}". Use the old ones, or another folder.'
    )


@pytest.mark.parametrize("windows, message", [
    ([[1, 2], [3, 4]], "calibration needs a [windows, length] tensor of tokens, got list."),
    (WINDOWS.float(), "calibration needs the whole numbers that a tokenizer returns, got torch.float32."),
], ids=["list", "float"])  # fmt: skip
def test_windows_that_are_none_are_refused_before_anything_is_written(tmp_path, windows, message):
    with pytest.raises(DataError) as caught:
        one_shot(small_model(), windows, OneShotConfig(method="fast"), progress=PruningProgress(tmp_path / "p"))
    assert str(caught.value) == message
    assert list(tmp_path.iterdir()) == []


def test_the_dtype_of_the_model_is_a_setting(tmp_path):
    config = OneShotConfig(method="fast")
    stop_after(tmp_path, 1, config)
    with pytest.raises(ConfigError) as caught:
        one_shot(small_model().to(torch.bfloat16), WINDOWS, config, progress=PruningProgress(tmp_path))
    assert str(caught.value) == (
        f'{tmp_path}: cannot go on with other settings: dtype was "float32" and is "bfloat16". Use the old ones, or '
        "another folder."
    )


OLDER = "it is damaged, or of an older version of hf_adaptive_sparse. Remove the folder and start again."


@pytest.mark.parametrize("content, message", [
    ("{}", f"has no 'settings': {OLDER}"),
    ('{"settings": {}, "goals": {}, "sensitivity": {}}', f"has no 'weights': {OLDER}"),
    ('{"settings": {}, "weights": "", "sensitivity": {}, "goals": {"a": ["9:8:7", null, 0.5]}}',
     "cannot be read (unknown pattern '9:8:7'; known: 2:4, 1:4, 4:8, unstructured, or any n:m such as '2:8'). Remove "
     "the folder and start again."),
    ("[]", "cannot be read (list indices must be integers or slices, not str). Remove the folder and start again."),
])  # fmt: skip
def test_goals_that_were_not_written_by_this_version_are_refused(tmp_path, content, message):
    (tmp_path / "goals.json").write_text(content)
    with pytest.raises(FormatError) as caught:
        one_shot(small_model(), WINDOWS, OneShotConfig(method="fast"), progress=PruningProgress(tmp_path))
    assert str(caught.value) == f"{tmp_path}/goals.json: {message}"


def test_rows_and_hidden_states_that_lack_something_are_refused(tmp_path):
    config = OneShotConfig(method="fast")
    stop_after(tmp_path, 1, config)
    rows, state = tmp_path / "block-0.json", tmp_path / "state.safetensors"
    written = rows.read_text()
    rows.write_text("[{}]")
    with pytest.raises(FormatError) as caught:
        one_shot(small_model(), WINDOWS, config, progress=PruningProgress(tmp_path))
    assert str(caught.value) == f"{rows}: has no 'shape': {OLDER}"
    rows.write_text(written)
    for tensors, metadata, message in (
        ({"hidden": torch.ones(1)}, None, "has no windows, note, next_block in its metadata."),
        ({"other": torch.ones(1)}, {"progress": '{"windows": "", "note": "", "next_block": 1}'},
         "holds no hidden states."),
    ):  # fmt: skip
        save_file(tensors, state, metadata)
        with pytest.raises(FormatError) as caught:
            one_shot(small_model(), WINDOWS, config, progress=PruningProgress(tmp_path))
        assert str(caught.value) == f"{state}: {message} Remove the folder and start again."


@pytest.mark.parametrize("name", ["goals.json", "block-0.json", "block-0.safetensors", "state.safetensors"])
def test_a_damaged_file_is_named(tmp_path, name):
    config = OneShotConfig(method="fast")
    stop_after(tmp_path, 1, config)
    content = (tmp_path / name).read_bytes()
    (tmp_path / name).write_bytes(content[: len(content) // 2])
    with pytest.raises(FormatError) as caught:
        one_shot(small_model(), WINDOWS, config, progress=PruningProgress(tmp_path))
    message = str(caught.value)
    assert message.startswith(f"{tmp_path / name}: cannot be read (")
    assert message.endswith("). Remove the folder and start again.")


def test_a_missing_block_is_named(tmp_path):
    config = OneShotConfig(method="fast")
    stop_after(tmp_path, 2, config)
    (tmp_path / "block-0.safetensors").unlink()
    with pytest.raises(FormatError, match=r"block-0\.safetensors: cannot be read"):
        one_shot(small_model(), WINDOWS, config, progress=PruningProgress(tmp_path))


def test_leftovers_of_a_killed_run_are_removed(tmp_path):
    config = OneShotConfig(method="fast")
    stop_after(tmp_path, 1, config)
    (tmp_path / ".block-1.safetensors.0a1b2c3d.tmp").write_text("half")
    one_shot(small_model(), WINDOWS, config, progress=PruningProgress(tmp_path))
    assert not list(tmp_path.glob(".*"))


def test_a_copy_of_the_folder_goes_on_as_well(tmp_path):
    config = OneShotConfig(method="fast")
    stop_after(tmp_path / "a", 2, config)
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    models = [small_model(), small_model()]
    for model, name in zip(models, "ab", strict=True):
        one_shot(model, WINDOWS, config, progress=PruningProgress(tmp_path / name))
    assert torch.equal(models[0](WINDOWS).logits, models[1](WINDOWS).logits)
