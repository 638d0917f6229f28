"""Killed with SIGKILL at any moment and resumed, a run ends with the weights of an uninterrupted one, bit by bit."""

from __future__ import annotations

import json
import random
import shutil
import signal
import time
from pathlib import Path

import pytest
from safetensors.torch import load_file

from tests.cli.killing import kill_and_resume, run_to_end
from tests.cli.runs import TRAIN, Outcome, read_report, start_process, tree

WEIGHTS = ("dense/model.safetensors", "packed/model.sparse24.safetensors")


@pytest.fixture(scope="module")
def arguments(tiny_llama_folder, tiny_text_file):
    def of(output: Path, *more: str) -> list[str]:
        return [
            "train", str(tiny_llama_folder), "--data", str(tiny_text_file), "--output-dir", str(output), *TRAIN, *more
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
    for part in ("models", "flips", "matrices", "generations", "data"):
        assert found[part] == expected[part], part
    assert [row["step"] for row in found["history"]] == list(range(1, 21))
    assert [row["loss"] for row in found["history"]] == [row["loss"] for row in expected["history"]]
    left = {entry.name for entry in output.iterdir()}
    assert left == {"checkpoints", "dense", "packed", "report.html", "report.json", "run.json"}


def test_a_run_that_was_killed_in_the_middle_ends_as_if_it_had_not_been(arguments, straight, tmp_path):
    reference, touched = straight
    assert touched > 100
    output = tmp_path / "out"
    kill_and_resume(arguments, output, ("write", touched // 2))
    assert_same_end(output, reference)


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
@pytest.mark.parametrize("kill", [
    ("torch.save", 1), ("torch.save", 8), ("torch.save", 17), ("save_file", 1), ("save_file", 5), ("save_file", 12),
])  # fmt: skip
def test_a_checkpoint_of_which_half_was_written_is_not_resumed_from(arguments, straight, tmp_path, kill):
    output = tmp_path / "out"
    kill_and_resume(arguments, output, kill)
    assert_same_end(output, straight[0])


@pytest.mark.slow
def test_a_process_that_was_killed_by_another_one_is_resumed(arguments, straight, tmp_path):
    output = tmp_path / "out"
    process = start_process(*arguments(output, "--resume"))
    while not list(output.glob("checkpoints/checkpoint-4/*")):
        assert process.poll() is None, Outcome(process.returncode, *process.communicate())
        time.sleep(0.02)
    process.kill()
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    kill_and_resume(arguments, output)
    assert_same_end(output, straight[0])


def test_a_finished_run_that_is_resumed_again_takes_no_further_step(arguments, command, tmp_path):
    # With a learning rate that does not end at 0, a step too many would show.
    output = tmp_path / "out"
    once = arguments(output, "--schedule", "constant", "--learning-rate", "1e-2")
    assert command(*once).code == 0
    shutil.copytree(output, tmp_path / "first")
    outcome = command(*once, "--resume")
    assert outcome.code == 0, outcome.err
    assert_same_end(output, tmp_path / "first")


def test_a_finished_run_that_is_resumed_for_another_folder_makes_it(arguments, straight, command, tmp_path):
    output = tmp_path / "out"
    assert command(*arguments(output, "--save", "dense")).code == 0
    assert command(*arguments(output, "--resume", "--save", "both")).code == 0
    assert_same_end(output, straight[0])


def test_resume_with_other_settings_is_refused_and_each_is_named(arguments, straight, refused, tmp_path):
    output = tmp_path / "out"
    shutil.copytree(straight[0], output)
    before = tree(output)
    assert refused(*arguments(output, "--resume", "--seed", "1", "--temperature", "3")) == (
        f"{output}: cannot resume with other settings: seed was 0 and is 1; temperature was 2.0 and is 3.0. Use the "
        "old ones, or start anew with --overwrite."
    )
    assert tree(output) == before


def test_a_damaged_run_file_is_said(arguments, straight, refused, tmp_path):
    output = tmp_path / "out"
    shutil.copytree(straight[0], output)
    (output / "run.json").write_text("{")
    assert refused(*arguments(output, "--resume")) == (
        f"{output}/run.json: not JSON (Expecting property name enclosed in double quotes: line 1 column 2 (char 1)). "
        "Start the run anew with --overwrite."
    )


def test_resume_of_nothing_starts_the_run(arguments, command, tmp_path):
    output = tmp_path / "out"
    outcome = command(*arguments(output, "--resume", "--dry-run"))
    assert outcome.code == 0
    assert "from the dense weights, seed 0" in outcome.out
    output.mkdir()
    (output / ".run.json.partial").write_text("{")  # killed while it was written
    assert command(*arguments(output, "--resume", "--dry-run")).code == 0
    assert "where the interrupted run stopped" not in outcome.out


def test_overwrite_starts_anew_and_leaves_no_checkpoint_of_the_old_run(arguments, straight, command, tmp_path):
    output = tmp_path / "out"
    shutil.copytree(straight[0], output)
    outcome = command(*arguments(output, "--overwrite", "--seed", "1"))
    assert outcome.code == 0, outcome.err
    assert json.loads((output / "run.json").read_text())["seed"] == 1
    assert not load_file(output / WEIGHTS[0])["model.layers.0.mlp.up_proj.weight"].equal(
        load_file(straight[0] / WEIGHTS[0])["model.layers.0.mlp.up_proj.weight"]
    )
