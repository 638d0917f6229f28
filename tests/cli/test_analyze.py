"""`analyze` needs config.json alone; what it says is in the table, in JSON and on the page."""

from __future__ import annotations

import json
import re

import pytest
from transformers import AutoConfig

from hf_adaptive_sparse.cli import analysis
from hf_adaptive_sparse.hardware import custom_hardware
from hf_adaptive_sparse.reports import Report
from tests.cli.runs import read_report
from tests.hf.test_predictions import MODELS

GIVEN = ("--hardware", "given", "--gb-per-second", "50", "--gflop-per-second", "200")


@pytest.fixture
def config_only(tmp_path):
    """A folder with the config.json of a known model, and nothing else."""

    def make(name: str):
        model_type, options = MODELS[name]
        folder = tmp_path / name
        AutoConfig.for_model(model_type, **options, dtype="bfloat16").save_pretrained(folder)
        return folder

    return make


@pytest.mark.parametrize("name, ratio, size", [
    ("Llama-2-7B", "0.5795", "7.81 GB"), ("Llama-3.1-8B", "0.6198", "9.95 GB"), ("Qwen2.5-0.5B", "0.6831", "675 MB"),
])  # fmt: skip
def test_known_models_are_analyzed_from_their_config_alone(command, config_only, name, ratio, size):
    outcome = command("analyze", config_only(name), "--hardware", "h100", "l4")
    assert outcome.code == 0, outcome.err
    assert re.search(rf"^2:4 +{size} +{ratio} ", outcome.out, flags=re.MULTILINE)
    assert "How much each matrix suffers was not measured: that takes --data and the weights." in outcome.out
    rows = {line.split()[0] for line in outcome.out.splitlines() if line.startswith("model.layers.*")}
    assert len(rows) == 7


def test_the_report_is_written_printed_and_read_back(command, config_only, tmp_path):
    folder, out = config_only("Qwen2.5-0.5B"), tmp_path / "out"
    outcome = command("analyze", folder, "--json", "--output-dir", out, "--hardware", "rtx-4090", "given", *GIVEN[2:])
    assert outcome.code == 0, outcome.err
    report = read_report(out)
    assert json.loads(outcome.out) == report
    assert Report.from_json(report).as_json() == report
    assert [row["form"] for row in report["forms"]] == [
        "dense", "2:4", "dense int8", "2:4 int8", "dense int4", "2:4 int4"
    ]  # fmt: skip
    assert {row["hardware"] for row in report["caps"]} == {"RTX 4090 24 GB", "50 GB/s, 200 GFLOP/s"}
    assert len(report["costs"]) == 10 and all(row["seconds"] > 0 for row in report["costs"])
    page = (out / "report.html").read_text(encoding="utf-8")
    for words in ("Predicted size", "Predicted caps", "Predicted cost", "Which matrices qualify", "rest on"):
        assert words in page
    again = command("analyze", folder, "--output-dir", out, *GIVEN)
    assert (again.code, again.message) == (
        2,
        f"hf-adaptive-sparse analyze: error: {out}: the output folder is not empty. Choose another one, or replace its "
        "results with --overwrite.",
    )


def test_this_machine_is_measured_when_nothing_else_is_asked_for(command, tiny_llama_folder, monkeypatch):
    monkeypatch.setattr(analysis, "measured_hardware", lambda device, dtype: custom_hardware(7, 9))
    outcome = command("analyze", tiny_llama_folder, "--json")
    assert outcome.code == 0, outcome.err
    assert {row["hardware"] for row in json.loads(outcome.out)["caps"]} == {"7 GB/s, 9 GFLOP/s"}


@pytest.mark.parametrize("measure", [False, True])
def test_sensitivity_is_measured_on_a_text(command, tiny_llama_folder, tiny_text_file, tmp_path, measure):
    outcome = command(
        "analyze", tiny_llama_folder, "--data", tiny_text_file, "--window", "16", "--sensitivity-windows", "4",
        "--output-dir", tmp_path / "out", *GIVEN, *(["--measure-loss"] if measure else []),
    )  # fmt: skip
    assert outcome.code == 0, outcome.err
    report = read_report(tmp_path / "out")
    assert [row["measured"] for row in report["sensitivity"]] == [measure] * 14
    assert report["data"]["windows"] == 4
    assert "Most sensitive to 2:4: model.layers." in outcome.out
    page = (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    assert ("was measured by running the model with it" in page) == measure
    assert ("predicted to second order" in page) == (not measure)


def test_a_dry_run_measures_and_writes_nothing(command, config_only, tmp_path, monkeypatch):
    monkeypatch.setattr(analysis, "measured_hardware", None)
    outcome = command("analyze", config_only("Llama-2-7B"), "--dry-run", "--output-dir", tmp_path / "out")
    assert outcome.code == 0, outcome.err
    assert "6,738,415,616 parameters" in outcome.out and "not measured: no --data" in outcome.out
    assert not (tmp_path / "out").exists()


def test_a_recipe_gives_the_same_arguments(command, config_only, tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("hardware: [h100]\nsequences: 64\ncontext: 4096\n", encoding="utf-8")
    outcome = command("analyze", config_only("Llama-2-7B"), "--config", recipe, "--json")
    [dense, *_] = json.loads(outcome.out)["caps"]
    assert dense["hardware"] == "H100 SXM 80 GB" and dense["fits"] is False


@pytest.mark.parametrize("arguments, message", [
    (("--hardware", "h1000"),
     "unknown hardware 'h1000'; known: this, given, a100, a100-40gb, h100, h100-pcie, h200, l4, rtx-4090."),
    (("--hardware", "given", "--gb-per-second", "50"),
     "--hardware given is described by --gb-per-second and --gflop-per-second: give all three or none."),
    (("--gb-per-second", "50", "--gflop-per-second", "50"),
     "--hardware given is described by --gb-per-second and --gflop-per-second: give all three or none."),
    (("--measure-loss",), "measure_loss runs the model on a text. Give --data."),
    (("--window", "1"), "window is at least 2, got 1."),
    (("--dtype", "int8"), "unknown dtype 'int8'; known: auto, float32, bfloat16, float16."),
    (("--hardware", "given", "--gb-per-second", "0", "--gflop-per-second", "1"),
     "0 GB/s, 1 GFLOP/s: bytes_per_second is a rate above 0, got 0.0."),
])  # fmt: skip
def test_a_mistake_is_told_in_one_sentence(refused, tiny_llama_folder, arguments, message):
    assert refused("analyze", tiny_llama_folder, *arguments) == message


def test_an_adapter_is_refused(refused, trained):
    checkpoint = sorted((trained / "checkpoints").iterdir())[-1]
    assert refused("analyze", checkpoint) == (
        f"MODEL {checkpoint}: is an adapter. Analyze its base model, or make a model of it first: hf-adaptive-sparse "
        f"export {checkpoint} OUT --format dense."
    )


def test_a_model_whose_blocks_are_not_known_says_so(refused, tmp_path):
    AutoConfig.for_model("llama", num_hidden_layers=0, hidden_size=32, num_attention_heads=4).save_pretrained(tmp_path)
    assert refused("analyze", tmp_path, *GIVEN) == (
        "LlamaForCausalLM: cannot tell where its blocks are. It has no nn.ModuleList of modules with linear layers in "
        "them. Only models that keep their blocks in one can be walked."
    )
