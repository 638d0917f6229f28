"""Killed with SIGKILL at any moment and resumed, shrinking ends with the bits of an uninterrupted run."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file

from tests.cli.killing import kill_and_resume, run_to_end
from tests.cli.runs import SHRINK, read_report

WEIGHTS = "shrunk/model.safetensors"


@pytest.fixture(scope="module")
def arguments(tiny_llama_folder, tiny_text_file):
    def of(output: Path, *more: str) -> list[str]:
        return [
            "shrink", str(tiny_llama_folder), "--data", str(tiny_text_file), "--output-dir", str(output), *SHRINK, *more
        ]  # fmt: skip

    return of


@pytest.fixture(scope="module")
def straight(arguments, tmp_path_factory) -> tuple[Path, int]:
    """An uninterrupted run, and how often it touches its output folder."""
    output = tmp_path_factory.mktemp("straight") / "out"
    return output, run_to_end(arguments(output), output)


def assert_same_end(output: Path, straight: Path) -> None:
    found, expected = load_file(output / WEIGHTS), load_file(straight / WEIGHTS)
    assert found.keys() == expected.keys()
    for key in expected:
        assert found[key].equal(expected[key]), key
    found, expected = read_report(output), read_report(straight)
    for part in ("models", "stages", "widths", "importance", "generations", "data"):
        assert found[part] == expected[part], part
    assert sorted(entry.name for entry in output.iterdir()) == sorted(entry.name for entry in straight.iterdir())


@pytest.mark.parametrize("part", [0.3, 0.6])
def test_a_run_that_was_killed_ends_as_if_it_had_not_been(arguments, straight, tmp_path, part):
    reference, touched = straight
    output = tmp_path / "out"
    kill_and_resume(arguments, output, ("write", round(part * touched)))
    assert_same_end(output, reference)


def test_a_finished_run_that_is_resumed_for_another_form_saves_it(arguments, straight, command, tmp_path):
    output = tmp_path / "out"
    shutil.copytree(straight[0], output)
    outcome = command(*arguments(output, "--resume", "--form", "padded"))
    assert outcome.code == 0, outcome.err
    settings = [json.loads((folder / "shrunk" / "config.json").read_text()) for folder in (straight[0], output)]
    assert "per_layer_config" in settings[0] and "per_layer_config" not in settings[1]
    assert read_report(output)["widths"] == read_report(straight[0])["widths"]


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(6))
def test_a_run_that_was_killed_at_random_moments_ends_as_if_it_had_not_been(arguments, straight, tmp_path, seed):
    reference, touched = straight
    draw = random.Random(seed)
    first = draw.randrange(1, touched)
    second = draw.randrange(1, touched - first + 1)  # of the run that goes on after the first
    output = tmp_path / "out"
    kill_and_resume(arguments, output, ("write", first), ("write", second))
    assert_same_end(output, reference)


@pytest.mark.slow
@pytest.mark.parametrize("kill", [("torch.save", 1), ("torch.save", 5), ("torch.save", 8)])
def test_a_checkpoint_of_which_half_was_written_is_not_resumed_from(arguments, straight, tmp_path, kill):
    output = tmp_path / "out"
    kill_and_resume(arguments, output, kill)
    assert_same_end(output, straight[0])
