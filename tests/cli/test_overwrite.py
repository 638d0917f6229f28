"""--overwrite makes room for results, and never at the cost of what the run reads or of a run that cannot start."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tests.cli.runs import PRUNE, SHRINK, TRAIN, tree

COMMANDS = {"prune": PRUNE, "train": TRAIN, "shrink": SHRINK}
CLEARED = [("prune", "dense"), ("prune", "progress"), ("train", "checkpoints"), ("shrink", "shrunk")]


@pytest.fixture
def out(tiny_llama_folder, tiny_text_file, tmp_path) -> Path:
    """An output folder: whatever a run has left in it, here it is the model and the text that another run reads."""
    folder = tmp_path / "out"
    for name in ("dense", "packed", "progress", "checkpoints/deep", "shrunk"):
        shutil.copytree(tiny_llama_folder, folder / name)
        shutil.copy(tiny_text_file, folder / name / "text.txt")
    (folder / "report.html").write_text("old")
    return folder


def lost(argument: str, given: Path, removed: Path) -> str:
    return (
        f"{argument} {given}: would be lost, since this run removes {removed} to make room for its results. Choose "
        "another output folder, or move it first."
    )


@pytest.mark.parametrize("name", COMMANDS)
def test_the_folder_of_a_model_is_no_output_folder(refused, out, tiny_text_file, name):
    """Beside its weights the report would be of others, and `push` would publish the wrong ones."""
    model, before = out / "dense", tree(out)
    arguments = ("--data", tiny_text_file, "--output-dir", model, *COMMANDS[name], "--overwrite")
    assert refused(name, model, *arguments) == (
        f"{model}: is the folder of a model, whose files would be taken for the results of this run. Choose another "
        "output folder."
    )
    assert tree(out) == before


@pytest.mark.parametrize("dry", [(), ("--dry-run",)], ids=["run", "dry-run"])
@pytest.mark.parametrize("name, folder", CLEARED)
def test_a_model_among_old_results_is_not_removed(refused, out, tiny_text_file, name, folder, dry):
    model = out / "checkpoints" / "deep" if folder == "checkpoints" else out / folder
    before = tree(out)
    arguments = ("--data", tiny_text_file, "--output-dir", out, *COMMANDS[name], "--overwrite", *dry)
    assert refused(name, model, *arguments) == lost("MODEL", model, out / folder)
    assert tree(out) == before


@pytest.mark.parametrize("argument", ["--data", "--eval-data", "--config"])
@pytest.mark.parametrize("name, folder", CLEARED)
def test_text_and_recipe_among_old_results_are_not_removed(
    refused, out, tiny_llama_folder, tiny_text_file, name, folder, argument
):
    inside = out / folder / ("deep/text.txt" if folder == "checkpoints" else "text.txt")
    if argument == "--config":
        inside = inside.with_name("recipe.yaml")
        inside.write_text("seed: 3\n")
    before = tree(out)
    arguments = ("--data", tiny_text_file, "--output-dir", out, *COMMANDS[name], "--overwrite", argument, inside)
    assert refused(name, tiny_llama_folder, *arguments) == lost(argument, inside, out / folder)
    assert tree(out) == before


@pytest.mark.parametrize("argument", ["--teacher", "--init"])
def test_teacher_and_start_among_old_results_are_not_removed(
    refused, out, tiny_llama_folder, tiny_text_file, argument
):
    before = tree(out)
    arguments = ("--data", tiny_text_file, "--output-dir", out, *TRAIN, "--overwrite", argument, out / "packed")
    assert refused("train", tiny_llama_folder, *arguments) == lost(argument, out / "packed", out / "packed")
    assert tree(out) == before


def test_links_are_followed(refused, out, tiny_text_file, tmp_path):
    (tmp_path / "model").symlink_to(out / "dense")
    (tmp_path / "results").symlink_to(out)
    before = tree(out)
    for output in (out, tmp_path / "results"):
        arguments = ("--data", tiny_text_file, "--output-dir", output, *PRUNE, "--overwrite")
        assert refused("prune", tmp_path / "model", *arguments) == lost("MODEL", tmp_path / "model", output / "dense")
    assert tree(out) == before


def test_an_export_does_not_replace_what_it_reads(refused, out, tiny_llama_folder, tmp_path):
    before = tree(tmp_path)
    model, pruned = out / "dense", ("--one-shot", "magnitude", "--overwrite")
    assert refused("export", model, out, *pruned) == lost("MODEL", model, out)
    assert refused("export", model, model, *pruned) == lost("MODEL", model, model)
    assert refused("export", model, out, "--format", "both", *pruned) == lost("MODEL", model, model)
    assert refused("export", tiny_llama_folder, out, "--apply-masks", model, "--overwrite") == (
        lost("--apply-masks", model, out)
    )
    masks = ("--format", "masks", "--base", model, "--overwrite")
    assert refused("export", tiny_llama_folder, out, *masks) == lost("--base", model, out)
    assert tree(tmp_path) == before


@pytest.mark.parametrize("name", COMMANDS)
def test_a_model_that_cannot_be_loaded_costs_no_old_results(
    refused, out, broken_folder, tiny_llama_folder, tiny_text_file, tmp_path, name
):
    before = tree(out)
    arguments = ("--data", tiny_text_file, "--output-dir", out, *COMMANDS[name], "--overwrite")
    damaged = tmp_path / "damaged"
    shutil.copytree(tiny_llama_folder, damaged)
    weights = damaged / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-8])
    assert refused(name, damaged, *arguments) == (
        f"{damaged}: cannot load the model: Error while deserializing header: incomplete metadata, file not fully "
        "covered"
    )
    assert refused(name, broken_folder, *arguments) == (
        f"{broken_folder}: model.layers.1.mlp.up_proj.weight holds 1 NaN or infinite values of 2048. It is damaged: "
        "take an intact copy."
    )
    assert tree(out) == before


@pytest.mark.parametrize("argument", ["--teacher", "--init"])
def test_neither_does_a_teacher_or_a_start(refused, out, broken_folder, tiny_llama_folder, tiny_text_file, argument):
    before = tree(out)
    arguments = ("--data", tiny_text_file, "--output-dir", out, *TRAIN, "--overwrite", argument, broken_folder)
    assert refused("train", tiny_llama_folder, *arguments) == (
        f"{broken_folder}: model.layers.1.mlp.up_proj.weight holds 1 NaN or infinite values of 2048. It is damaged: "
        "take an intact copy."
    )
    assert tree(out) == before


def test_the_demo_is_no_exception(refused, out, broken_folder):
    before = tree(out)
    arguments = ("--output-dir", out, "--overwrite", "--init")
    assert refused("demo", *arguments, out / "packed") == lost("--init", out / "packed", out / "packed")
    assert refused("demo", *arguments, broken_folder) == (
        f"{broken_folder}: model.layers.1.mlp.up_proj.weight holds 1 NaN or infinite values of 2048. It is damaged: "
        "take an intact copy."
    )
    assert tree(out) == before
