"""`eval` gives the perplexity that the protocol defines, next to a baseline, as a table or as JSON."""

from __future__ import annotations

import json

import pytest
import torch
from torch.nn import functional
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_adaptive_sparse.cli import eval as eval_command
from tests.cli.runs import read_report


def slow_perplexity(folder, text_file, window: int, count: int) -> float:
    """One window at a time, one loss over all predictions."""
    tokenizer, ids = AutoTokenizer.from_pretrained(folder), []
    for story in text_file.read_text().split("<|endoftext|>"):
        ids += tokenizer(story.strip())["input_ids"]
    model, losses = AutoModelForCausalLM.from_pretrained(folder).eval(), []
    for start in range(0, count * window, window):
        batch = torch.tensor([ids[start : start + window]])
        with torch.no_grad():
            logits = model(batch).logits[0, :-1]
        losses.append(functional.cross_entropy(logits, batch[0, 1:], reduction="sum"))
    return float(torch.exp(sum(losses) / (count * (window - 1))))


def test_perplexity_is_that_of_a_slow_loop_and_stands_next_to_the_baseline(
    command, trained, tiny_llama_folder, tiny_text_file, tmp_path
):
    arguments = (
        "--data",
        tiny_text_file,
        "--window",
        "16",
        "--windows",
        "12",
        "--baseline",
        tiny_llama_folder,
    )
    outcome = command("eval", trained / "packed", *arguments, "--output-dir", tmp_path / "out")
    assert outcome.code == 0, outcome.err
    report = read_report(tmp_path / "out")
    assert [row["name"] for row in report["models"]] == [str(trained / "packed"), str(tiny_llama_folder)]
    for row, folder in zip(report["models"], (trained / "packed", tiny_llama_folder), strict=True):
        assert row["perplexity"] == pytest.approx(slow_perplexity(folder, tiny_text_file, 16, 12), rel=1e-5)
        assert row["bytes_on_disk"] == next(folder.glob("*.safetensors")).stat().st_size
    assert report["data"]["windows"] == 12
    assert len(report["data"]["sha256"]) == 64
    assert "perplexity" in outcome.out and str(trained / "packed") in outcome.out


def test_json_is_all_that_stdout_gets(command, tiny_llama_folder, tiny_text_file):
    outcome = command("eval", tiny_llama_folder, "--data", tiny_text_file, "--window", "16", "--windows", "2", "--json")
    assert outcome.code == 0, outcome.err
    assert json.loads(outcome.out)["models"][0]["perplexity"] > 1.0


def test_an_adapter_and_its_packed_export_have_the_same_perplexity(command, trained, tiny_text_file):
    found = []
    checkpoint = max((trained / "checkpoints").iterdir(), key=lambda folder: int(folder.name.split("-")[1]))
    for folder in (checkpoint, trained / "packed"):
        outcome = command("eval", folder, "--data", tiny_text_file, "--window", "16", "--windows", "9", "--json")
        assert outcome.code == 0, outcome.err
        found.append(json.loads(outcome.out)["models"][0]["perplexity"])
    assert found[0] == found[1]


def test_the_protocol_of_the_model_is_used(command, tiny_llama_folder, tiny_text_file, tmp_path):
    for file in tiny_llama_folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / "eval_protocol.json").write_text(json.dumps({"window": 24, "windows": 3, "prefix": "x"}))
    outcome = command("eval", tmp_path, "--data", tiny_text_file, "--json")
    assert outcome.code == 0, outcome.err
    assert json.loads(outcome.out)["data"]["windows"] == 3
    assert json.loads(outcome.out)["data"]["tokens in a window"] == 24


def test_tasks_are_reported_by_model(command, monkeypatch, tiny_llama_folder):
    asked = {}

    def tasks(model, tokenizer, names, **options):
        asked.update(names=list(names), **options)
        return {"cloze": {"alias": "cloze", "acc,none": 0.25, "acc_norm,none": 0.5, "samples": 4}}

    monkeypatch.setattr(eval_command, "lm_eval_tasks", tasks)
    outcome = command("eval", tiny_llama_folder, "--tasks", "cloze", "--limit", "4", "--json")
    assert outcome.code == 0, outcome.err
    assert asked == {"names": ["cloze"], "batch_size": 8, "limit": 4}
    assert json.loads(outcome.out)["tasks"] == {f"cloze, {tiny_llama_folder}": {"acc": 0.25, "acc_norm": 0.5}}
    assert "0.2500" in command("eval", tiny_llama_folder, "--tasks", "cloze").out


def test_a_dry_run_measures_and_writes_nothing(command, tiny_llama_folder, tiny_text_file, tmp_path):
    outcome = command(
        "eval", tiny_llama_folder, "--data", tiny_text_file, "--dry-run", "--output-dir", tmp_path / "out"
    )
    assert outcome.code == 0
    assert "200 documents, windows of 256 tokens, at most 400, without overlap" in outcome.out
    assert list(tmp_path.iterdir()) == []


def test_nothing_to_measure_is_an_error(refused, tiny_llama_folder):
    assert refused("eval", tiny_llama_folder) == (
        "nothing to measure: give --data, --tasks, or both. See hf-adaptive-sparse eval --help."
    )


@pytest.mark.parametrize("name", ["window", "windows", "stride", "batch_size", "limit"])
def test_counts_are_at_least_one(refused, tiny_llama_folder, tiny_text_file, name):
    arguments = ("--data", tiny_text_file, f"--{name.replace('_', '-')}", "0")
    assert refused("eval", tiny_llama_folder, *arguments) == f"{name} is at least 1, got 0."


def test_a_text_shorter_than_a_window_is_named(refused, tiny_llama_folder, tmp_path):
    (tmp_path / "short.txt").write_text("A story.")
    assert refused("eval", tiny_llama_folder, "--data", tmp_path / "short.txt", "--window", "16") == (
        f"{tmp_path}/short.txt: the text holds 9 tokens, fewer than one window of 16. Give more text, or a "
        "shorter window."
    )


def test_broken_weights_are_refused_by_name(refused, broken_folder, tiny_text_file):
    assert refused("eval", broken_folder, "--data", tiny_text_file) == (
        f"{broken_folder}: model.layers.1.mlp.up_proj.weight holds 1 NaN or infinite values of 2048. It is "
        "damaged: take an intact copy."
    )


def test_a_baseline_that_is_not_there_is_named_as_such(refused, tiny_llama_folder, tiny_text_file):
    absent = tiny_llama_folder.with_name("tiny-lama")
    assert refused("eval", tiny_llama_folder, "--data", tiny_text_file, "--baseline", absent) == (
        f"--baseline {absent}: no such folder. In {tiny_llama_folder.parent} there are: tiny-llama."
    )
