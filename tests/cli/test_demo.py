"""`demo` goes the whole path with what is in the package: no network, no other file."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM

from hf_adaptive_sparse.demo import MODEL_FOLDER, PROMPTS
from tests.cli.runs import read_report

SMALL = ("--train-tokens", "6k", "--window", "64", "--batch-size", "4", "--mask-interval", "5", "--eval-windows", "4")


def test_the_whole_path_ends_in_a_packed_model_that_loads(command, tmp_path):
    output = tmp_path / "out"
    outcome = command("demo", "--output-dir", output, *SMALL)
    assert outcome.code == 0, outcome.err
    report = read_report(output)
    dense, pruned, trained = report["models"]
    # So few steps win nothing back; that the default does is shown by `make demo`.
    assert dense["perplexity"] < min(trained["perplexity"], pruned["perplexity"])
    assert trained["tokens"] == 5888
    assert [generation["prompt"] for generation in report["generations"]] == list(PROMPTS)
    assert report["generations"][0]["texts"].keys() == {row["name"] for row in report["models"]}
    assert all(row["two_four"] and row["dtype"] == "bfloat16" for row in report["matrices"])
    # 16-bit values: every packed matrix takes 0.5625 of its dense bytes.
    assert all(16 * row["stored_bytes"] == 9 * 2 * row["shape"][0] * row["shape"][1] for row in report["matrices"])
    assert report["sizes"]["dense model"] == (MODEL_FOLDER / "model.safetensors").stat().st_size
    assert len(report["data"]["train sha256"]) == len(report["data"]["heldout sha256"]) == 64
    ids = torch.arange(40)[None]
    packed, stored = (AutoModelForCausalLM.from_pretrained(output / name).eval() for name in ("packed", "dense"))
    assert packed.dtype == torch.bfloat16
    assert torch.equal(packed(ids).logits, stored(ids).logits)
    for text in ("dense", "one-shot magnitude 2:4", "trained 2:4 (adaptive)", "report.html"):
        assert text in outcome.out + outcome.err


@pytest.mark.slow
def test_retraining_wins_back_most_of_what_pruning_lost(command, tmp_path):
    outcome = command("demo", "--output-dir", tmp_path / "out")
    assert outcome.code == 0, outcome.err
    dense, pruned, trained = (row["perplexity"] for row in read_report(tmp_path / "out")["models"])
    assert dense < trained < dense + 0.5 * (pruned - dense)


def test_the_results_of_another_demo_are_replaced_only_when_asked_to(command, refused, tmp_path):
    (tmp_path / "report.html").write_text("old")
    assert refused("demo", "--output-dir", tmp_path) == (
        f"{tmp_path}: the output folder is not empty. Choose another one, or replace its results with --overwrite."
    )
    assert (tmp_path / "report.html").read_text() == "old"


def test_a_dry_run_needs_no_argument_and_writes_nothing(command, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    outcome = command("demo", "--dry-run")
    assert outcome.code == 0, outcome.err
    assert "hf-adaptive-sparse-demo: packed, dense, report.json, report.html" in outcome.out
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("arguments, message", [
    (["--train-tokens", "1000"],
     "train_tokens is 1000, and one optimizer step takes 1024 (4 x 1 windows of 256). Train on more tokens, or "
     "lower batch_size or window."),
    (["--output-dir", ""], "--output-dir is missing. See hf-adaptive-sparse demo --help."),
])  # fmt: skip
def test_settings_that_cannot_work_are_refused(refused, arguments, message):
    assert refused("demo", *arguments) == message
