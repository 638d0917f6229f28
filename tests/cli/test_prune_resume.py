"""Killed with SIGKILL at any moment and resumed, pruning ends with the weights of an uninterrupted run, bit by bit."""

from __future__ import annotations

import random
import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file

from tests.cli.killing import kill_and_resume, run_to_end
from tests.cli.runs import PRUNE, read_report

WEIGHTS = ("dense/model.safetensors", "packed/model.sparse24.safetensors")


@pytest.fixture(scope="module")
def arguments(tiny_llama_folder, tiny_text_file):
    def of(output: Path, *more: str) -> list[str]:
        return [
            "prune", str(tiny_llama_folder), "--data", str(tiny_text_file), "--output-dir", str(output), *PRUNE,
            "--bits", "8", *more,
        ]  # fmt: skip

    return of


@pytest.fixture(scope="module")
def straight(arguments, tmp_path_factory) -> tuple[Path, int]:
    """An uninterrupted run, and how often it touches its output folder."""
    output = tmp_path_factory.mktemp("straight") / "out"
    return output, run_to_end(arguments(output), output)


def assert_same_end(output: Path, straight: Path) -> None:
    for name in WEIGHTS:
        found, expected = load_file(output / name), load_file(straight / name)
        assert found.keys() == expected.keys()
        for key in expected:
            assert found[key].equal(expected[key]), f"{name}: {key}"
    found, expected = read_report(output), read_report(straight)
    for part in ("models", "matrices", "generations", "data"):
        assert found[part] == expected[part], part
    for row, other in zip(found["pruning"], expected["pruning"], strict=True):
        assert row | {"seconds": 0} == other | {"seconds": 0}
    assert sorted(entry.name for entry in output.iterdir()) == sorted(entry.name for entry in straight.iterdir())


@pytest.mark.parametrize("part", [0.2, 0.5])
def test_a_run_that_was_killed_ends_as_if_it_had_not_been(arguments, straight, tmp_path, part):
    reference, touched = straight
    assert touched > 30
    kill_and_resume(arguments, tmp_path / "out", ("write", round(part * touched)))
    assert_same_end(tmp_path / "out", reference)


def test_a_block_of_which_half_was_written_is_not_resumed_from(arguments, straight, tmp_path):
    kill_and_resume(arguments, tmp_path / "out", ("save_file", 4))  # codes, weights and state of the first block, codes
    assert_same_end(tmp_path / "out", straight[0])


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(8))
def test_a_run_that_was_killed_at_random_moments_ends_as_if_it_had_not_been(arguments, straight, tmp_path, seed):
    reference, touched = straight
    draw = random.Random(seed)
    first = draw.randrange(1, touched)
    second = draw.randrange(1, touched - first + 1)  # of the run that goes on after the first
    kill_and_resume(arguments, tmp_path / "out", ("write", first), ("write", second))
    assert_same_end(tmp_path / "out", reference)


@pytest.mark.slow
@pytest.mark.parametrize("count", range(1, 7))
def test_a_file_of_which_half_was_written_is_not_resumed_from(arguments, straight, tmp_path, count):
    kill_and_resume(arguments, tmp_path / "out", ("save_file", count))
    assert_same_end(tmp_path / "out", straight[0])


@pytest.mark.slow
def test_overwrite_starts_anew(arguments, straight, command, tmp_path):
    output = tmp_path / "out"
    shutil.copytree(straight[0], output)
    outcome = command(*arguments(output, "--overwrite", "--method", "fast"))
    assert outcome.code == 0, outcome.err
    assert read_report(output)["models"][2]["name"] == "fast 2:4"
