"""Pruning that was stopped between two blocks goes on from there, and ends with the same weights bit by bit."""

from __future__ import annotations

import shutil

import pytest
import torch

from hf_adaptive_sparse.errors import ConfigError, FormatError
from hf_adaptive_sparse.hf.one_shot import one_shot
from hf_adaptive_sparse.hf.walk_progress import PruningProgress
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


def test_a_run_with_other_windows_or_another_model_is_refused(tmp_path):
    config = OneShotConfig(method="fast")
    stop_after(tmp_path, 1, config)
    with pytest.raises(ConfigError, match="is of a run with other windows"):
        one_shot(small_model(), tokens(8, 16, seed=1), config, progress=PruningProgress(tmp_path))
    with pytest.raises(ConfigError, match="The saved run pruned another model"):
        other = tiny_model(num_hidden_layers=BLOCKS, intermediate_size=32)
        one_shot(other, WINDOWS, config, progress=PruningProgress(tmp_path))


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
