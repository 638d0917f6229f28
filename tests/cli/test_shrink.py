"""`shrink` ends in a smaller model that loads back, whatever its form, and goes on after an interruption."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from transformers import AutoModelForCausalLM

from hf_adaptive_sparse.cli.main import main
from hf_adaptive_sparse.hf.shrunk_manifest import shrunk_manifest
from tests.cli.runs import read_report, tree

IDS = torch.arange(12)[None]
SHRINK = (
    "--window", "16", "--batch-size", "4", "--train-tokens", "1280", "--stages", "3", "--step", "0.2",
    "--calibration-windows", "4", "--eval-windows", "8", "--save-steps", "5", "--device", "cpu",
)  # fmt: skip
RESULTS = ["checkpoints", "report.html", "report.json", "run.json", "shrunk"]


@pytest.fixture(scope="module")
def shrunk(tiny_llama_folder, tiny_text_file, tmp_path_factory):
    """The output folder of one run."""
    output = tmp_path_factory.mktemp("shrink") / "out"
    arguments = ["shrink", tiny_llama_folder, "--data", tiny_text_file, "--output-dir", output, *SHRINK]
    assert main([str(argument) for argument in arguments]) == 0
    return output


@pytest.fixture
def start(tiny_llama_folder, tiny_text_file, tmp_path):
    """Arguments of a run that works; later ones win."""
    data = ("--data", tiny_text_file, "--output-dir", tmp_path / "out", *SHRINK)
    return lambda *changes: ("shrink", tiny_llama_folder, *data, *changes)


def count(folder) -> int:
    return AutoModelForCausalLM.from_pretrained(folder).num_parameters()


def test_the_model_has_as_many_parameters_as_asked_for_and_its_config_says_how(shrunk, tiny_llama_folder):
    assert sorted(entry.name for entry in shrunk.iterdir()) == RESULTS
    dense = count(tiny_llama_folder)
    assert 0 <= round(0.8 * dense) - count(shrunk / "shrunk") < 1000
    config = json.loads((shrunk / "shrunk" / "config.json").read_text())
    manifest = shrunk_manifest(config)
    assert manifest["dense_parameters"] == dense
    assert manifest["method"]["allocation"] == "adaptive"
    assert set(manifest["kept"]) >= {"model.layers.0.self_attn", "model.layers.1.mlp"}
    assert (shrunk / "shrunk" / "tokenizer.json").is_file()


def test_the_report_says_what_each_stage_did(shrunk):
    report = read_report(shrunk)
    assert [row["name"][:9] for row in report["models"]] == ["dense", "shrunk to"]
    dense, smaller = (row["parameters"] for row in report["models"])
    assert smaller < dense
    assert len(report["stages"]) == 3
    assert all(row["recovered"] is not None for row in report["stages"])
    assert len(report["widths"]) == 2
    assert len(report["importance"][0]) == 2
    assert report["widths"][0]["dense_channels"] >= report["widths"][0]["channels"]
    page = (shrunk / "report.html").read_text(encoding="utf-8")
    assert "What is left of each block" in page
    assert "Perplexity before and after every pruning" in page


def test_a_killed_run_goes_on_from_its_checkpoint_to_the_same_weights(shrunk, tmp_path, start, command):
    again = tmp_path / "out"
    shutil.copytree(shrunk, again)
    for name in ("shrunk", "checkpoints/checkpoint-20"):
        shutil.rmtree(again / name)
    for name in ("report.html", "report.json"):
        (again / name).unlink()
    outcome = command(*start("--resume"))
    assert outcome.code == 0, outcome.err
    first, second = (AutoModelForCausalLM.from_pretrained(folder / "shrunk") for folder in (shrunk, again))
    for (name, expected), (_, found) in zip(first.named_parameters(), second.named_parameters(), strict=True):
        assert torch.equal(expected, found), name


def test_without_training_equal_widths_give_a_stock_checkpoint(start, command, tmp_path):
    outcome = command(*start("--train-tokens", "0", "--equal-widths", "--form", "stock", "--multiple-of", "2"))
    assert outcome.code == 0, outcome.err
    config = json.loads((tmp_path / "out" / "shrunk" / "config.json").read_text())
    assert config["model_type"] in ("llama", "mistral")
    assert "per_layer_config" not in config
    assert config["intermediate_size"] % 2 == 0


def test_gates_learn_a_shape_that_training_then_repairs(start, command, tmp_path):
    shape = ("--shape", "layers=1,ffn=24", "--gate-steps", "6", "--train-tokens", "640", "--save-steps", "5")
    outcome = command(*start(*shape))
    assert outcome.code == 0, outcome.err
    folder = tmp_path / "out" / "shrunk"
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert (model.config.num_hidden_layers, model.config.intermediate_size) == (1, 24)
    assert "per_layer_config" not in json.loads((folder / "config.json").read_text())
    report = read_report(tmp_path / "out")
    assert sorted(row["channels"] for row in report["widths"]) == [0, 24]
    for name in ("shrunk", "checkpoints/checkpoint-10"):
        shutil.rmtree(tmp_path / "out" / name)
    outcome = command(*start(*shape, "--resume"))
    assert outcome.code == 0, outcome.err
    again = AutoModelForCausalLM.from_pretrained(folder)
    for (name, expected), (_, found) in zip(model.named_parameters(), again.named_parameters(), strict=True):
        assert torch.equal(expected, found), name


def test_a_dry_run_says_what_would_be_done_and_writes_nothing(start, command, tmp_path):
    outcome = command(*start("--dry-run", "--distill"))
    assert outcome.code == 0, outcome.err
    assert "3, before steps 0, 3, 10" in outcome.err + outcome.out
    assert "the dense model" in outcome.err + outcome.out
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (("--target", "80"), "target is the part of the parameters that stays, in (0, 1), got 80.0."),
        (("--bias-repair",), "bias_repair stands in for training. Use it with --train-tokens 0."),
        (("--form", "stock"), "form 'stock' has blocks of the same width. Add --equal-widths, or give --shape."),
        (("--form", "flat"), "unknown form 'flat'; known: auto, stock, per_layer, padded."),
        (
            ("--shape", "layers=2,layers=1"),
            "shape is written layers=4,heads=6,ffn=512 (each once, any of them), got 'layers=1' in "
            "'layers=2,layers=1'.",
        ),
        (("--shape", "layers=1", "--gate-steps", "0"), "gate_steps is at least 1 and gate_lr above 0, got 0 and 0.1."),
        (("--shape", "ffn=9999"), "shape ffn=9999: the model has 64. Ask for at most that many."),
        (("--compile",), "compile keeps the shapes that weights had at the start, and stages change them."),
        (
            ("--score", "tailor"),
            "unknown score 'tailor'; known: activation, flap, fused, l1, l2, perturbation, taylor, wanda_sp.",
        ),
    ],
)
def test_mistakes_are_said_before_anything_is_written(start, refused, tmp_path, changes, message):
    assert refused(*start(*changes)) == message
    assert not (tmp_path / "out").exists()


def test_a_target_that_cannot_be_reached_is_said_before_anything_is_written(start, refused, tmp_path):
    assert refused(*start("--target", "0.01")).startswith("a target of ")
    assert not (tmp_path / "out").exists()


def test_a_folder_with_results_is_not_overwritten(shrunk, tiny_llama_folder, tiny_text_file, refused):
    before = tree(shrunk)
    refused("shrink", tiny_llama_folder, "--data", tiny_text_file, "--output-dir", shrunk, *SHRINK)
    assert tree(shrunk) == before
