"""`train` ends in packed and dense-stored models that are exactly 2:4, and refuses what cannot work."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from hf_adaptive_sparse.cli import train
from hf_adaptive_sparse.cli.retraining import retrain
from hf_adaptive_sparse.errors import OutputError
from hf_adaptive_sparse.patterns import NMPattern
from tests.cli.runs import TRAIN, read_report, tree

IDS = torch.arange(12)[None]


def test_the_results_are_exactly_2_4_and_the_same_packed_and_dense(trained):
    assert sorted(entry.name for entry in trained.iterdir()) == [
        "checkpoints", "dense", "packed", "report.html", "report.json", "run.json"
    ]  # fmt: skip
    packed = AutoModelForCausalLM.from_pretrained(trained / "packed").eval()
    dense = AutoModelForCausalLM.from_pretrained(trained / "dense").eval()
    assert torch.equal(packed(IDS).logits, dense(IDS).logits)
    pruned = [name for name, module in dense.named_modules() if name.endswith("_proj")]
    assert len(pruned) == 14
    for name in pruned:
        weight = dense.get_submodule(name).weight
        assert NMPattern(2, 4).first_violation(weight) is None
        assert (weight != 0).float().mean() > 0.49


def test_the_report_holds_everything_that_was_found(trained, tiny_llama_folder, tiny_text_file):
    report = read_report(trained)
    assert [row["name"] for row in report["models"]] == [
        "dense", "one-shot magnitude 2:4", "trained 2:4 (adaptive)"
    ]  # fmt: skip
    assert [row["tokens"] for row in report["models"]] == [None, None, 1280]
    assert [row["sparsity"] for row in report["models"]] == [0.0, 0.5, pytest.approx(0.5, abs=1e-3)]
    assert all(row["perplexity"] > 1.0 for row in report["models"])
    assert list(report["sizes"]) == ["dense model", "trained, dense-stored", "trained, packed"]
    assert report["sizes"]["dense model"] == (tiny_llama_folder / "model.safetensors").stat().st_size
    assert report["sizes"]["trained, packed"] == (trained / "packed" / "model.sparse24.safetensors").stat().st_size
    assert [row["step"] for row in report["history"]] == list(range(1, 21))
    assert {"loss", "loss/kd", "loss/ce", "learning_rate"} <= report["history"][0].keys()
    assert len(report["flips"]) == 14 and all(report["flips"].values())
    assert len(report["matrices"]) == 14 and all(row["two_four"] for row in report["matrices"])
    assert len(report["generations"]) == 3
    assert all(len(generation["texts"]) == 3 for generation in report["generations"])
    assert report["data"]["training text"] == str(tiny_text_file)
    assert len(report["data"]["training text sha256"]) == 64
    assert report["settings"]["train_tokens"] == 1280 and report["settings"]["learning_rate"] > 0
    assert {"python", "torch", "transformers", "peft"} <= report["versions"].keys()
    assert list(report["seconds"]) == [
        "measuring the dense model and one-shot magnitude pruning", "training", "saving",
        "loading back and measuring",
    ]  # fmt: skip


@pytest.fixture
def start(tiny_llama_folder, tiny_text_file, tmp_path):
    """Arguments of a run that works; later ones win."""
    data = ("--data", tiny_text_file, "--output-dir", tmp_path / "out", *TRAIN)
    return lambda *changes: ("train", tiny_llama_folder, *data, *changes)


def test_the_plan_comes_first_and_a_dry_run_stops_after_it(command, start, tmp_path):
    outcome = command(*start("--dry-run"))
    assert outcome.code == 0, outcome.err
    plan = " ".join(outcome.out.split())
    for part in (
        "hf-adaptive-sparse train: would do this, and writes nothing now",
        "(dense, 26,912 parameters)", "2:4 in 14 matrices with 18,432 weights",
        "1,280 tokens = 20 steps of 64", "the last 8 windows of the training text, not trained on",
        "the dense model itself", "dense, packed, checkpoints, report.json, report.html",
    ):  # fmt: skip
        assert part in plan, part
    assert list(tmp_path.iterdir()) == []


def test_a_recipe_file_gives_the_same_plan_as_the_command_line(command, start, tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("batch_size: 2\nlearning_rate: 5e-3\nmask-interval: 3\npattern: '1:4'\n")
    arguments = ("--train-tokens", "1280", "--window", "16", "--eval-windows", "8", "--dry-run")
    _, model, _, data, *_ = start()
    named = ("--batch-size", "2", "--learning-rate", "5e-3", "--mask-interval", "3", "--pattern", "1:4")
    first = ("train", model, "--data", data, "--output-dir", tmp_path / "out", *arguments)
    by_line, by_file = command(*first, *named), command(*first, "--config", recipe)
    assert by_line.code == by_file.code == 0
    assert by_line.out == by_file.out != command(*first).out
    assert "1:4 in 14 matrices" in by_file.out


def test_save_chooses_what_is_saved_and_frozen_masks_keep_their_zeros(command, start, trained, tmp_path):
    _, _, *rest = start("--save", "packed", "--mask-policy", "frozen", "--teacher", trained / "dense")
    outcome = command("train", trained / "packed", *rest)
    assert outcome.code == 0, outcome.err
    assert not (tmp_path / "out" / "dense").exists()
    before = AutoModelForCausalLM.from_pretrained(trained / "dense").state_dict()
    after = AutoModelForCausalLM.from_pretrained(tmp_path / "out" / "packed").dequantize().state_dict()
    for name in (name for name in before if "_proj" in name):
        assert not after[name][before[name] == 0].any()
        assert not torch.equal(after[name], before[name])


@pytest.mark.parametrize("kind", ["method", "folder"])
def test_training_can_start_from_a_pruned_model(command, start, trained, tmp_path, kind):
    init = "sparsegpt" if kind == "method" else trained / "packed"
    outcome = command(*start("--init", init, "--learning-rate", "1e-12", "--save", "dense"))
    assert outcome.code == 0, outcome.err
    rows = [row["name"] for row in read_report(tmp_path / "out")["models"]]
    name = "one-shot sparsegpt 2:4" if kind == "method" else "start: packed"
    assert rows == ["dense", "one-shot magnitude 2:4", name, "trained 2:4 (adaptive)"]
    after = AutoModelForCausalLM.from_pretrained(tmp_path / "out" / "dense").state_dict()
    if kind == "folder":  # at a learning rate of almost nothing what comes out is what went in
        before = AutoModelForCausalLM.from_pretrained(init).dequantize().state_dict()
        for name, weight in before.items():
            torch.testing.assert_close(after[name], weight, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            ("--init", "bset"),
            "init 'bset' is neither the folder of a model nor one of magnitude, fast, balanced, best, wanda, ria, "
            "taylor, sparsegpt, isc, mixed_sparsity, alps, fista, thanos.",
        ),
        (
            ("--init", "best", "--mask-policy", "frozen"),
            "mask_policy 'frozen' keeps the zeros that MODEL has, and init 'best' starts from others. Prune the model "
            "first and train that, or fix the masks from the start with freeze_fraction 1.",
        ),
    ],
)
def test_a_start_that_cannot_be_is_refused(refused, start, changes, message):
    assert refused(*start(*changes)) == message


def test_an_output_folder_with_something_in_it_is_left_alone(command, refused, start, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("mine")
    assert refused(*start()) == (
        f"{tmp_path}/out: the output folder is not empty. Choose another one, or replace its results with --overwrite."
    )
    assert tree(tmp_path) == {"out/mine.txt": b"mine"}
    assert refused(*start("--resume")) == (
        f"{tmp_path}/out: nothing to resume, it holds no run.json. Start the run without --resume."
    )
    assert command(*start("--overwrite")).code == 0  # replaces results, and nothing else
    assert (tmp_path / "out" / "mine.txt").read_text() == "mine"


def test_nan_weights_are_refused_before_anything_is_written(refused, start, broken_folder, tmp_path):
    _, _, *rest = start()
    assert refused("train", broken_folder, *rest) == (
        f"{broken_folder}: model.layers.1.mlp.up_proj.weight holds 1 NaN or infinite values of 2048. It is "
        "damaged: take an intact copy."
    )
    assert not (tmp_path / "out" / "packed").exists()


def test_a_loss_that_becomes_nan_stops_the_run_and_keeps_the_last_checkpoint(refused, start, tmp_path):
    message = refused(*start("--learning-rate", "1e18", "--warmup-fraction", "0", "--max-grad-norm", "0"))
    assert message.startswith("step ")
    assert "NaN or infinite" in message or "is nan" in message
    assert not (tmp_path / "out" / "packed").exists()


@pytest.fixture(scope="session")
def other_vocabulary(tmp_path_factory, tiny_llama_folder):
    folder = tmp_path_factory.mktemp("models") / "other"
    config = LlamaConfig.from_pretrained(tiny_llama_folder)
    config.vocab_size = 300
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def test_a_teacher_with_another_vocabulary_is_refused_by_name_and_size(
    refused, start, other_vocabulary, tiny_llama_folder, tmp_path
):
    assert refused(*start("--teacher", other_vocabulary)) == (
        f"--teacher {other_vocabulary} has a vocabulary of 300 tokens, MODEL {tiny_llama_folder} one of 260. "
        "Distillation compares them token by token: take a teacher with the same tokenizer."
    )
    assert list(tmp_path.iterdir()) == []


def test_a_model_that_is_not_there_is_said_and_its_neighbours_are_named(refused, start, tiny_llama_folder):
    _, _, *rest = start()
    absent = tiny_llama_folder.with_name("tiny-lama")
    assert refused("train", absent, *rest) == (
        f"MODEL {absent}: no such folder. In {tiny_llama_folder.parent} there are: tiny-llama."
    )
    assert refused("train", tiny_llama_folder / "deeper" / "still", *rest) == (
        f"MODEL {tiny_llama_folder}/deeper/still: no such folder. {tiny_llama_folder} holds no folders."
    )


def test_data_that_is_not_there_is_said_and_its_neighbours_are_named(refused, start, tiny_text_file):
    absent = tiny_text_file.with_name("storys.txt")
    assert refused(*start("--data", absent)) == (
        f"{absent}: no such file or folder; nearest names in {absent.parent}: stories.txt."
    )


@pytest.mark.parametrize("text, arguments, message", [
    ("", [], "{file}: the file is empty (0 bytes)."),
    ("\n \n", [], "{file}: the file holds no text, only blanks."),
    ("A story.", [],
     "{file}: the text holds 9 tokens, fewer than one window of 16. Give more text, or a shorter window."),
    ("A story that fills one window.", [],
     "cannot hold out 1 of 1 windows: each part needs at least one. Give more text, shorter windows, or hold "
     "out fewer."),
    ("A story that fills three windows, and not so many as one batch takes.", [],
     "the training text fills 3 windows of 16 tokens, and one batch takes 4. Give more text, or lower "
     "--batch-size or --window."),
])  # fmt: skip
def test_too_little_text_is_refused(refused, start, tmp_path, text, arguments, message):
    file = tmp_path / "text.txt"
    file.write_text(text)
    assert refused(*start("--data", file, *arguments)) == message.replace("{file}", str(file))
    assert [entry.name for entry in tmp_path.iterdir()] == ["text.txt"]


@pytest.mark.parametrize("arguments, message", [
    (["--pattern", "2:3:4"],
     "unknown pattern '2:3:4'; known: 2:4, 1:4, 4:8, unstructured, or any n:m such as '2:8'."),
    (["--pattern", "4:8"], "the packed format holds 2:4 weights, and pattern is 4:8. Use train with --save dense."),
    (["--save", "zip"], "unknown save 'zip'; known: packed, dense, both."),
    (["--eval-windows", "0"], "eval_windows is at least 1, got 0."),
    (["--batch-size", "0"], "batch_size is at least 1, got 0."),
    (["--window", "1"], "window is at least 2 tokens, to predict one from the other, got 1."),
    (["--learning-rate", "-1"], "learning_rate is a positive number, got -1.0."),
    (["--schedule", "zigzag"], "unknown schedule 'zigzag'; known: linear, cosine, constant, wsd."),
    (["--warmup-fraction", "1"], "warmup_fraction is a part of the run in [0, 1), got 1.0."),
    (["--max-grad-norm", "-1"], "max_grad_norm is a number >= 0, got -1.0."),
    (["--train-tokens", "63"],
     "train_tokens is 63, and one optimizer step takes 64 (4 x 1 windows of 16). Train on more tokens, or lower "
     "batch_size or window."),
    (["--temperature", "0"], "temperature is a number > 0, got 0.0. A plain KL has 1.0."),
    (["--device", "warp"], "unknown device 'warp'. Write cpu, cuda or cuda:1."),
])  # fmt: skip
def test_settings_that_cannot_work_are_refused_before_anything_is_written(refused, start, tmp_path, arguments, message):
    assert refused(*start(*arguments)) == message
    assert list(tmp_path.iterdir()) == []


def test_targets_that_do_not_exist_name_the_closest(refused, start, tmp_path):
    message = refused(*start("--target-modules", "q_porj"))
    assert message.startswith("target_modules: no module of the model matches 'q_porj'. Closest names: ")
    assert "q_proj" in message
    assert list(tmp_path.iterdir()) == []


def test_a_linear_whose_inputs_are_no_multiple_of_4_is_named_in_the_dry_run_already(
    refused, start, tiny_llama_folder, tmp_path
):
    config = LlamaConfig.from_pretrained(tiny_llama_folder)
    config.intermediate_size = 66
    LlamaForCausalLM(config).save_pretrained(tmp_path / "odd")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(tiny_llama_folder / name, tmp_path / "odd")
    _, _, *rest = start("--dry-run")
    assert refused("train", tmp_path / "odd", *rest) == (
        "model.layers.0.mlp.down_proj: 2:4 needs the input features to be a multiple of 4, got 66 in a [32, 66] "
        "weight. Add the layer to `exclude_modules`, or pad it."
    )


def test_an_adapter_is_not_trained_further_by_mistake(refused, start, trained, tmp_path):
    _, _, *rest = start()
    checkpoint = next((trained / "checkpoints").iterdir())
    assert refused("train", checkpoint, *rest) == (
        f"MODEL {checkpoint}: is an adapter. Make a model of it first: hf-adaptive-sparse export {checkpoint} OUT "
        "--format dense. If it is a checkpoint of an interrupted run, go on with that run by train --resume."
    )


def test_a_disk_that_fills_up_during_a_checkpoint_is_said_in_our_words(refused, start, monkeypatch, tmp_path):
    def full(*arguments, **options):
        raise RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 64 vs 0")

    monkeypatch.setattr(torch, "save", full)
    monkeypatch.setattr("shutil.disk_usage", lambda _: shutil._ntuple_diskusage(10**9, 10**9, 0))
    assert refused(*start()) == (
        f"{tmp_path}/out/checkpoints: the disk is full, and the run stopped while it wrote a checkpoint. The last "
        "complete one is kept: free some space, then run the same command with --resume."
    )


def test_a_disk_that_fills_up_while_saving_leaves_the_checkpoints(command, refused, start, monkeypatch, tmp_path):
    def full(run):
        monkeypatch.setattr("hf_adaptive_sparse.cli.results.save_dense", fail)
        return retrain(run)

    def fail(model, folder, **options):
        raise OutputError(f"{folder}: no space left to write it; nothing of it was kept.")

    monkeypatch.setattr(train, "retrain", full)
    assert refused(*start()) == f"{tmp_path}/out/dense: no space left to write it; nothing of it was kept."
    assert (tmp_path / "out" / "checkpoints" / "checkpoint-20").is_dir()
    assert not (tmp_path / "out" / "packed").exists()
    monkeypatch.undo()
    assert command(*start("--resume")).code == 0
    assert read_report(tmp_path / "out")["models"][2]["tokens"] == 1280


def test_the_run_file_says_what_the_run_was(trained, tiny_llama_folder):
    found = json.loads((trained / "run.json").read_text())
    assert found["model"] == str(tiny_llama_folder)
    assert found["text"]["training windows to draw from"] > 100
    assert not {"output_dir", "resume", "overwrite", "debug"} & found.keys()
