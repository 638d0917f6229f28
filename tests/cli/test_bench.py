"""`bench` measures, reports, keeps the times, and refuses what it cannot measure; processes are injected."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from transformers import AutoConfig, AutoModelForCausalLM

from hf_adaptive_sparse import use_measured_backends
from hf_adaptive_sparse.cli import benching
from hf_adaptive_sparse.hf.backend_times import load_times
from hf_adaptive_sparse.hf.bench_worker import WorkerResult, measure
from hf_adaptive_sparse.reports import Report
from tests.cli.runs import read_report

QUICK = ("--rows", "1", "8", "--repetitions", "2", "--device", "cpu")


@pytest.fixture
def times(tmp_path, monkeypatch) -> Path:
    path = tmp_path / "kept" / "times.json"
    monkeypatch.setenv("HF_ADAPTIVE_SPARSE_TIMES", str(path))
    return path


@pytest.fixture
def processes(monkeypatch) -> list:
    """The tasks that processes were given; a packed model is twice as fast and half as large."""
    seen = []

    def fake(task, environment):
        seen.append((task.backend, Path(task.folder).name, sorted(environment)))
        factor = 1.0 if task.backend == "dense" else 2.0
        return WorkerResult(
            load_seconds=1.0 / factor, peak_bytes=int(10**9 / factor), prefill=100.0 * factor, decode=factor
        )

    monkeypatch.setattr(benching, "measure_in_process", fake)
    return seen


@pytest.mark.parametrize("fresh", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["here", "in processes"])
def test_a_packed_model_is_measured_from_end_to_end_and_its_times_are_used(
    command, trained, tmp_path, times, monkeypatch, fresh
):
    out = tmp_path / "out"
    if not fresh:
        monkeypatch.setattr(benching, "measure_in_process", lambda task, environment: measure(task))
    outcome = command(
        "bench", trained / "packed", *QUICK, "--rounds", "1", "--backends", "packed", "--new-tokens", "2", "--prompt",
        "4", "--save", "--output-dir", out, "--json",
    )  # fmt: skip
    assert outcome.code == 0, outcome.err
    report = read_report(out)
    assert json.loads(outcome.out) == report and Report.from_json(report).as_json() == report
    dense, packed = report["backends"]
    assert (dense["backend"], packed["backend"], dense["disk_ratio"]) == ("dense", "packed", 1.0)
    assert packed["disk_ratio"] < 1.0 and packed["decode"]["median"] > 0
    assert dense["decode_ratio"] == {"median": 1.0, "low": 1.0, "high": 1.0}
    shapes = {tuple(row["shape"]) for row in report["shapes"]}
    assert shapes == {(16, 32), (32, 32), (64, 32), (32, 64)}
    assert sum(row["layers"] for row in report["shapes"] if row["backend"] == "dense" and row["rows"] == 1) == 14
    for row in report["shapes"]:
        if row["chosen"]:
            assert row["ratio"]["median"] <= 1.0  # never slower than dense by choice
    kept = load_times(times)
    assert {key.shape for key in kept} == shapes and all(set(each) == {"dense", "packed"} for each in kept.values())
    model = AutoModelForCausalLM.from_pretrained(trained / "packed")
    assert all(set(use.choices) == {1, 8} for use in use_measured_backends(model))
    page = (out / "report.html").read_text(encoding="utf-8")
    for words in ("The whole model", "Every shape", "A backend is chosen where"):
        assert words in page


def test_a_dense_stored_model_is_packed_for_the_time_of_the_run(command, trained, times, processes):
    outcome = command("bench", trained / "dense", *QUICK, "--rounds", "2")
    assert outcome.code == 0, outcome.err
    assert [backend for backend, _, _ in processes] == [
        "dense", "expanded", "packed", "chosen", "expanded", "packed", "chosen", "dense"
    ]  # fmt: skip
    assert {(backend, folder) for backend, folder, _ in processes} == {
        ("dense", "dense"), ("expanded", "packed"), ("packed", "packed"), ("chosen", "packed")
    }  # fmt: skip
    assert all(environment == ["HF_ADAPTIVE_SPARSE_TIMES"] for _, _, environment in processes)
    assert not times.exists()  # without --save
    assert "\npacked: 0." in outcome.out and "\nchosen: 0." in outcome.out
    assert "0.50 of its time to load, 0.50 of its peak memory, 2.00 times its speed on prompts" in outcome.out


def test_the_dense_twin_is_used_where_it_is_given(command, trained, processes):
    outcome = command(
        "bench", trained / "packed", "--dense", trained / "dense", *QUICK, "--backends", "packed", "--rounds", "1"
    )
    assert outcome.code == 0, outcome.err
    assert [entry[:2] for entry in processes] == [("dense", "dense"), ("packed", "packed")]
    assert "making a copy" not in outcome.err


def test_a_model_that_is_not_sparse_is_measured_as_a_pruned_copy(command, tiny_llama_folder, processes):
    before = {file.name: file.read_bytes() for file in tiny_llama_folder.iterdir()}
    outcome = command("bench", tiny_llama_folder, "--one-shot", "magnitude", *QUICK, "--rounds", "1")
    assert outcome.code == 0, outcome.err
    assert before == {file.name: file.read_bytes() for file in tiny_llama_folder.iterdir()}


def test_a_config_alone_gets_the_table_of_shapes(command, tmp_path):
    options = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4}
    AutoConfig.for_model("llama", **options, vocab_size=64, dtype="bfloat16").save_pretrained(tmp_path)
    outcome = command("bench", tmp_path, *QUICK, "--layer-backends", "packed")
    assert outcome.code == 0, outcome.err
    assert "without weights" in outcome.err and "not measured" in outcome.err
    lines = [line.split()[:5] for line in outcome.out.splitlines()]
    assert ["32x64", "bfloat16", "3", "1", "packed"] in lines and ["64x32", "bfloat16", "6", "8", "dense"] in lines


def test_a_dry_run_measures_nothing(command, trained, tmp_path, monkeypatch):
    monkeypatch.setattr(benching, "time_shape", None)
    outcome = command("bench", trained / "packed", "--dry-run", "--save", "--output-dir", tmp_path / "out")
    assert outcome.code == 0, outcome.err
    assert "dense, expanded, packed, chosen: 3 rounds, a process each" in outcome.out
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("arguments, message", [
    (("--rows", "0"), "rows are numbers of at least 1, got 0."),
    (("--repetitions", "0"), "repetitions is at least 1, got 0."),
    (("--rounds", "-1"), "rounds is at least 0, got -1."),
    (("--backends", "fast"), "unknown backend 'fast'; known: dense, expanded, packed, chosen."),
    (("--layer-backends", "chosen"),
     "unknown backend 'chosen'; known: dense, expanded, packed, cusparselt, cusparselt-searched."),
    (("--one-shot", "wanda"), "unknown one_shot 'wanda'; known: magnitude."),
    (("--device", "cpu", "--rows", "1", "--layer-backends", "cusparselt"),
     "backend 'cusparselt' needs a CUDA device, and the layer is on cpu. Known: dense, expanded, packed, cusparselt, "
     "cusparselt-searched."),
    ((*QUICK, "--rounds", "1"),
     "PATH {folder}: is not 2:4, so it cannot be packed and measured. Prune it first, or measure a copy with "
     "--one-shot magnitude: times do not depend on the values."),
])  # fmt: skip
def test_a_mistake_is_told_in_one_sentence(refused, tiny_llama_folder, arguments, message):
    assert refused("bench", tiny_llama_folder, *arguments) == message.replace("{folder}", str(tiny_llama_folder))


def test_what_is_no_local_model_is_refused(refused, trained):
    checkpoint = sorted((trained / "checkpoints").iterdir())[-1]
    end = (
        "and bench measures local models. Fetch it first (hf download NAME --local-dir FOLDER), or make a model of the "
        "adapter: hf-adaptive-sparse export ADAPTER FOLDER."
    )
    assert refused("bench", checkpoint) == f"PATH {checkpoint}: is an adapter, {end}"
    assert refused("bench", "org/name") == f"PATH org/name: is no local folder, {end}"
    assert refused("bench", trained / "packed", "--dense", trained / "packed") == (
        f"--dense {trained / 'packed'}: must be a dense-stored model, and is packed."
    )
