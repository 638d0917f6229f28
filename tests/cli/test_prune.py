"""`prune` ends in packed and dense-stored models of exactly the sparsity asked for, and refuses what cannot work."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
import sys
from typing import get_type_hints

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from hf_adaptive_sparse.cli.main import main
from hf_adaptive_sparse.cli.prune import PruneArguments
from hf_adaptive_sparse.errors import CalibrationError, OutputError
from hf_adaptive_sparse.hf.blocks import find_blocks
from hf_adaptive_sparse.hf.data import load_documents, token_windows
from hf_adaptive_sparse.hf.one_shot import one_shot, prunable_members
from hf_adaptive_sparse.methods.one_shot import OneShotConfig
from hf_adaptive_sparse.patterns import NMPattern
from tests.cli.runs import PRUNE, read_report, tree

IDS = torch.arange(12)[None]
RESULTS = ["dense", "packed", "report.html", "report.json", "run.json"]


@pytest.fixture(scope="module")
def pruned(tiny_llama_folder, tiny_text_file, tmp_path_factory):
    """The output folder of one run with every default."""
    output = tmp_path_factory.mktemp("prune") / "out"
    arguments = ["prune", tiny_llama_folder, "--data", tiny_text_file, "--output-dir", output, *PRUNE]
    assert main([str(argument) for argument in arguments]) == 0
    return output


@pytest.fixture
def start(tiny_llama_folder, tiny_text_file, tmp_path):
    """Arguments of a run that works; later ones win."""
    data = ("--data", tiny_text_file, "--output-dir", tmp_path / "out", *PRUNE)
    return lambda *changes: ("prune", tiny_llama_folder, *data, *changes)


def weights(folder) -> dict[str, torch.Tensor]:
    model = AutoModelForCausalLM.from_pretrained(folder)
    model = model.dequantize() if folder.name == "packed" else model
    return {name: member.weight for name, member in prunable_members(find_blocks(model)).items()}


def test_the_results_are_exactly_2_4_and_the_same_packed_and_dense(pruned):
    assert sorted(entry.name for entry in pruned.iterdir()) == RESULTS
    packed = AutoModelForCausalLM.from_pretrained(pruned / "packed").eval()
    dense = AutoModelForCausalLM.from_pretrained(pruned / "dense").eval()
    assert torch.equal(packed(IDS).logits, dense(IDS).logits)
    found = weights(pruned / "dense")
    assert len(found) == 14
    for weight in found.values():
        assert NMPattern(2, 4).first_violation(weight) is None
        assert (weight != 0).float().mean() > 0.49
    assert (pruned / "packed" / "tokenizer.json").is_file()
    about = json.loads((pruned / "packed" / "config.json").read_text())["adaptive_sparse"]
    assert about["one_shot"] == {"method": "balanced", "pattern": "2:4", "sparsity": 0.5}


def test_the_weights_are_those_of_one_shot_on_the_first_windows_of_the_text(pruned, tiny_llama_folder, tiny_text_file):
    model = AutoModelForCausalLM.from_pretrained(tiny_llama_folder)
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama_folder)
    windows = token_windows(load_documents(tiny_text_file), tokenizer, 16, limit=8)
    one_shot(model, windows, OneShotConfig(), batch_size=4)
    for name, weight in weights(pruned / "dense").items():
        assert torch.equal(weight, model.get_submodule(name).weight), name


def test_the_report_holds_everything_that_was_found(pruned, tiny_llama_folder, tiny_text_file):
    report = read_report(pruned)
    assert [row["name"] for row in report["models"]] == ["dense", "one-shot magnitude 2:4", "balanced 2:4"]
    assert [row["sparsity"] for row in report["models"]] == [0.0, 0.5, pytest.approx(0.5, abs=1e-3)]
    assert all(row["perplexity"] > 1.0 for row in report["models"])
    assert list(report["sizes"]) == ["dense model", "pruned, dense-stored", "pruned, packed"]
    assert report["sizes"]["dense model"] == (tiny_llama_folder / "model.safetensors").stat().st_size
    assert len(report["pruning"]) == len(report["matrices"]) == 14
    for row in report["pruning"]:
        assert row["pattern"] == "2:4" and row["sparsity"] == 0.5 and row["tokens"] == 128
        assert 0 < row["error"] < 1 and row["rung"] == "damping 0.01" and row["sensitivity"] is None
    assert all(row["two_four"] for row in report["matrices"])
    assert len(report["generations"]) == 3
    assert all(len(generation["texts"]) == 3 for generation in report["generations"])
    assert report["data"]["calibration text"] == str(tiny_text_file)
    assert report["data"]["calibration windows"] == "8, the first of the text"
    assert report["data"]["evaluation text"] == "the 8 windows behind those of the calibration"
    assert report["settings"]["solver"] is None and report["settings"]["solver (in use)"] == "obs_sweep"
    assert list(report["seconds"]) == [
        "measuring the dense model and one-shot magnitude pruning", "of this, sensitivity and allocation",
        "of this, pruning", "pruning", "saving", "loading back and measuring",
    ]  # fmt: skip
    assert report["summary"][0].startswith("14 matrices pruned by balanced to 2:4, without training: 50.00 % zeros")


@pytest.mark.parametrize("changes, name, sparsity", [
    (("--method", "fast", "--pattern", "unstructured", "--sparsity", "0.6", "--allocation", "ranked"),
     "fast unstructured 60 %", 0.6),
    (("--method", "sparsegpt", "--pattern", "4:8"), "sparsegpt 4:8", 0.5),
    (("--method", "fast", "--pattern", "mixed"), "fast mixed (dense, 2:4, 1:4) 50 %", 0.5),
])  # fmt: skip
def test_any_pattern_is_stored_dense_with_its_exact_sparsity(command, start, tmp_path, changes, name, sparsity):
    outcome = command(*start(*changes))
    assert outcome.code == 0, outcome.err
    assert sorted(entry.name for entry in (tmp_path / "out").iterdir()) == [n for n in RESULTS if n != "packed"]
    report = read_report(tmp_path / "out")
    magnitude = "4:8" if "4:8" in changes else f"{100 * sparsity:g} %"
    assert [row["name"] for row in report["models"]] == ["dense", f"one-shot magnitude {magnitude}", name]
    assert [row["sparsity"] for row in report["models"]] == pytest.approx([0.0, sparsity, sparsity], abs=1e-3)
    numel = sum(row["shape"][0] * row["shape"][1] for row in report["pruning"])
    zeros = sum(round(row["sparsity"] * row["shape"][0] * row["shape"][1]) for row in report["pruning"])
    assert abs(zeros / numel - sparsity) <= 1e-4
    if "4:8" not in changes:
        assert len({row["sparsity"] for row in report["pruning"]}) > 1
        assert all(row["sensitivity"] is not None for row in report["pruning"])


@pytest.mark.parametrize("bits", ["8", "4"])
def test_rounded_values_are_packed_as_codes(command, start, tmp_path, bits):
    outcome = command(*start("--bits", bits, "--group-size", "16", "--save", "packed"))
    assert outcome.code == 0, outcome.err
    settings = json.loads((tmp_path / "out" / "packed" / "config.json").read_text())["quantization_config"]
    assert (settings["value_bits"], settings["group_size"]) == (int(bits), 16)
    assert not (tmp_path / "out" / "dense").exists()
    for weight in weights(tmp_path / "out" / "packed").values():
        assert NMPattern(2, 4).first_violation(weight) is None


def test_modules_in_skip_stay_dense(command, start, tmp_path, tiny_llama_folder):
    outcome = command(*start("--skip", "down_proj", "layers.0.self_attn", "--method", "fast"))
    assert outcome.code == 0, outcome.err
    before = AutoModelForCausalLM.from_pretrained(tiny_llama_folder)
    after = AutoModelForCausalLM.from_pretrained(tmp_path / "out" / "dense")
    assert len(read_report(tmp_path / "out")["pruning"]) == 8
    for name in ("model.layers.1.mlp.down_proj", "model.layers.0.self_attn.q_proj"):
        assert torch.equal(after.get_submodule(name).weight, before.get_submodule(name).weight)


@pytest.mark.parametrize("offload", ["cpu", "disk"])
def test_where_blocks_wait_changes_nothing(command, start, pruned, tmp_path, offload):
    assert command(*start("--offload", offload)).code == 0
    for name, weight in weights(pruned / "dense").items():
        assert torch.equal(weights(tmp_path / "out" / "dense")[name], weight)


def test_every_setting_of_one_shot_can_be_given():
    ours = {entry.name: entry for entry in dataclasses.fields(PruneArguments)}
    types, our_types = get_type_hints(OneShotConfig), get_type_hints(PruneArguments)
    for setting in dataclasses.fields(OneShotConfig):
        found = ours[setting.name]
        assert (found.default, our_types[found.name], found.metadata["help"]) == (
            setting.default, types[setting.name], setting.metadata["help"]
        )  # fmt: skip


def test_the_plan_comes_first_and_a_dry_run_stops_after_it(command, start, tmp_path):
    outcome = command(*start("--dry-run", "--bits", "8", "--pattern", "2:4"))
    assert outcome.code == 0, outcome.err
    plan = " ".join(outcome.out.split())
    for part in (
        "hf-adaptive-sparse prune: would do this, and writes nothing now",
        "(dense, 26,912 parameters)", "2:4, 8 bits in 14 matrices with 18,432 weights",
        "balanced: score obs, weights by obs_sweep, 10 conjugate gradient steps, making up for 100 % of the error",
        "8 bits, one scale for output channels, rounded by gptq",
        "the first 8 windows of 16 tokens = 128 tokens", "the 8 windows behind those of the calibration",
        "dense, packed, report.json, report.html", "from the dense weights, seed 0",
        "- forward passes", "- Gram matrices", "- sweep", "- rounding", "judging", "on 8 windows",
        "just measured on cpu", "peak memory, offload disk",
    ):  # fmt: skip
        assert part in plan, part
    # One memory on a CPU, so nothing is beside it but files.
    size = r"[\d.]+ [kMG]?B"
    assert re.search(rf"offload none about {size} in memory peak memory, offload cpu about {size} in memory peak", plan)
    assert re.search(rf"offload disk about {size} in memory, and {size} in files", plan)
    assert list(tmp_path.iterdir()) == []


def test_a_plan_for_7b_needs_neither_weights_nor_text(command, tmp_path):
    LlamaConfig(
        vocab_size=32000, hidden_size=4096, intermediate_size=11008, num_hidden_layers=32, num_attention_heads=32,
        architectures=["LlamaForCausalLM"], dtype="float16",
    ).save_pretrained(tmp_path / "7b")  # fmt: skip
    arguments = ("prune", tmp_path / "7b", "--dry-run", "--window", "2048", "--method", "sparsegpt", "--device", "cpu")
    for more in ((), ("--data", tmp_path / "never-read.txt")):
        outcome = command(*arguments, *more)
        assert outcome.code == 0, outcome.err
        plan = " ".join(outcome.out.split())
        for part in (
            "6,738,415,616 parameters", "2:4 in 224 matrices with 6,476,005,376 weights", "262,144 tokens",
            # 4 inputs and the closing pass for 128 windows, one window more; the last block has no closing pass.
            "- forward passes 5.15 PFLOP", f"(a window through a block, {32 * (5 * 128 + 1) - 128:,} times; all "
            "windows once through the linear layers: 3.40 PFLOP)", "- layer errors 38.2 TFLOP", "- sweep 39.6 TFLOP",
            "(in full 2.88 PFLOP; one for each matrix: 3.72 PFLOP)", "judging 35.1 PFLOP, at least",
            "on cpu: perplexity of 3 models (dense, pruned by magnitude, pruned) on 400 windows",
            "13.5 GB dense-stored, 7.81 GB packed",
        ):  # fmt: skip
            assert part in plan, (part, plan)
    assert "not read: the folder holds no tokenizer" in plan
    assert [entry.name for entry in tmp_path.iterdir()] == ["7b"]


def test_a_recipe_file_gives_the_same_plan_as_the_command_line(command, start, tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("method: fast\npattern: '1:4'\nskip: [down_proj, o_proj]\n")
    by_line = command(*start("--dry-run", "--method", "fast", "--pattern", "1:4", "--skip", "down_proj", "o_proj"))
    by_file = command(*start("--dry-run", "--config", recipe))
    assert by_line.code == by_file.code == 0, by_line.err + by_file.err
    # Times are of a rate that is measured anew, and as wide as their digits.
    plans = [
        [line.rstrip() for line in outcome.out.splitlines() if "FLOP" not in line] for outcome in (by_line, by_file)
    ]
    assert plans[0] == plans[1]
    assert "1:4 in 10 matrices" in by_file.out


def test_a_device_that_is_not_here_is_refused_before_anything_is_written(refused, start, tmp_path):
    with pytest.raises((AssertionError, RuntimeError)) as raised:
        torch.empty(0, device="cuda:99")
    reason = str(raised.value).splitlines()[0].rstrip(".")
    assert refused(*start("--device", "cuda:99")) == (
        f"device 'cuda:99' cannot be used here: {reason}. Leave --device out."
    )
    assert list(tmp_path.iterdir()) == []


def test_a_run_that_fails_in_its_first_block_leaves_no_folder_and_in_a_later_one_what_is_finished(
    refused, start, monkeypatch, tmp_path
):
    def fail_in(block):
        def prune_block(visit, *arguments):
            if visit.index == block:
                raise CalibrationError(f"{visit.name}: its inputs hold NaN or inf.")
            return real(visit, *arguments)

        monkeypatch.setattr("hf_adaptive_sparse.hf.one_shot._prune_block", prune_block)

    real = sys.modules["hf_adaptive_sparse.hf.one_shot"]._prune_block
    fail_in(0)
    assert refused(*start()) == "model.layers.0: its inputs hold NaN or inf."
    assert list(tmp_path.iterdir()) == []
    fail_in(1)
    assert refused(*start()) == "model.layers.1: its inputs hold NaN or inf."
    assert sorted(entry.name for entry in (tmp_path / "out").iterdir()) == ["progress", "run.json"]


def test_an_output_folder_that_cannot_be_made_is_refused_before_anything_is_read(refused, start, monkeypatch, tmp_path):
    file = tmp_path / "file"
    file.touch()
    assert refused(*start("--output-dir", file / "out")) == (
        f"{file}/out: the output folder cannot be made, {file} is a file. Choose another name."
    )
    monkeypatch.setattr("hf_adaptive_sparse.cli.output.os.access", lambda path, mode: False)
    assert refused(*start()) == (
        f"{tmp_path}/out: the output folder cannot be written, {tmp_path} is read-only. Choose another one."
    )
    assert list(tmp_path.iterdir()) == [file]


@pytest.mark.parametrize("name, content, message", [
    ("empty.txt", b"", "the file is empty (0 bytes)."),
    ("blank.txt", b" \n\n", "the file holds no text, only blanks."),
    ("binary.txt", bytes(range(256)), "not UTF-8 at byte 128: invalid start byte. Convert the file."),
    ("paper.pdf", b"%PDF", "unknown extension '.pdf'; known: .txt, .jsonl, .parquet. Convert the file, or rename it if "
     "only its name is wrong."),
    ("lines.jsonl", b'{"text": 5}\n', "line 1 has a number in 'text', not text."),
    ("lines.jsonl", b"hello\n", "line 1 is not JSON: Expecting value at column 1."),
])  # fmt: skip
def test_data_that_is_no_text_is_refused(refused, start, tmp_path, name, content, message):
    file = tmp_path / name
    file.write_bytes(content)
    assert refused(*start("--data", file)) == f"{file}: {message}"
    assert list(tmp_path.iterdir()) == [file]


def test_paths_that_do_not_exist_are_refused_with_what_is_near(refused, start, tiny_llama_folder, tmp_path):
    (tmp_path / "stories.txt").touch()
    assert refused(*start("--data", tmp_path / "story.txt")) == (
        f"{tmp_path}/story.txt: no such file or folder; nearest names in {tmp_path}: stories.txt."
    )
    command, _, *rest = start()
    (tmp_path / "model").mkdir()
    assert refused(command, tmp_path / "modle", *rest) == (
        f"MODEL {tmp_path}/modle: no such folder. In {tmp_path} there are: model."
    )
    assert refused(command, tmp_path / "model", *rest) == (
        f"MODEL {tmp_path}/model: the folder holds no model: config.json is missing."
    )
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["model", "stories.txt"]


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
    assert command(*start("--overwrite", "--method", "fast")).code == 0  # replaces results, and nothing else
    assert (tmp_path / "out" / "mine.txt").read_text() == "mine"


def test_text_that_calibrates_never_judges(refused, start, tiny_text_file, tmp_path):
    assert refused(*start("--eval-data", tiny_text_file)) == (
        "8 of the 8 evaluation windows are calibration windows as well, and a model must not be judged by them. Give "
        "another --eval-data, or leave it out."
    )
    assert list(tmp_path.iterdir()) == []


def test_text_that_repeats_itself_is_refused_with_what_would_help(refused, start, tmp_path):
    file = tmp_path / "text.txt"
    file.write_text("A cat sat." * 64)  # 10 tokens, so every fifth window of 16 is the same
    assert refused(*start("--data", file)) == (
        f"{file}: the text repeats itself: 8 of the 8 evaluation windows are calibration windows as well, and a model "
        "must not be judged by them. Give --eval-data, or other text."
    )
    assert list(tmp_path.iterdir()) == [file]


def test_too_little_text_is_refused(refused, start, tmp_path):
    file = tmp_path / "text.txt"
    file.write_text("A story that fills three windows, and not so many as were asked for.")
    assert refused(*start("--data", file)) == (
        f"{file}: the text fills 4 windows of 16 tokens, and calibration takes 8, and more to judge by. Give more "
        "text, or lower --calibration-windows or --window."
    )
    assert refused(*start("--data", file, "--window", "100")) == (
        f"{file}: the text holds 69 tokens, fewer than one window of 100. Give more text, or a shorter window."
    )
    assert [entry.name for entry in tmp_path.iterdir()] == ["text.txt"]


@pytest.mark.parametrize("arguments, message", [
    (["--method", "besst"],
     "unknown method 'besst'; known: fast, balanced, best, magnitude, wanda, ria, taylor, sparsegpt, isc, "
     "mixed_sparsity, alps, fista, thanos."),
    (["--pattern", "2:3:4"],
     "unknown pattern '2:3:4'; known: 2:4, 1:4, 4:8, unstructured, or any n:m such as '2:8'."),
    (["--pattern", "4:8", "--save", "both"],
     "the packed format holds 2:4 weights, and pattern is 4:8. Use prune with --save dense."),
    (["--sparsity", "0.6"],
     "pattern 2:4 has a sparsity of 0.5, asked for 0.6. Leave sparsity out, or use pattern 'mixed' or 'unstructured'."),
    (["--save", "zip"], "unknown save 'zip'; known: packed, dense, both."),
    (["--offload", "tape"], "unknown offload 'tape'; known: none, cpu, disk."),
    (["--calibration-windows", "0"], "calibration_windows is at least 1, got 0."),
    (["--eval-windows", "0"], "eval_windows is at least 1, got 0."),
    (["--batch-size", "0"], "batch_size is at least 1, got 0."),
    (["--window", "1"], "window is at least 2 tokens, to predict one from the other, got 1."),
    (["--window", "130"], "windows of 130 tokens are longer than the 128 positions of the model."),
    (["--device", "warp"], "unknown device 'warp'. Write cpu, cuda or cuda:1."),
    (["--dtype", "int8"], "unknown dtype 'int8'; known: auto, float32, bfloat16, float16."),
    (["--damping", "nan"], "damping is a finite number >= 0, got nan. Papers take 0.01."),
    (["--saliency", ""], "unknown saliency ''; known: isc, magnitude, obs, ria, taylor, wanda."),
    (["--solver", "obs-sweep"], "unknown solver 'obs-sweep'; known: admm, fista, obs_sweep, thanos, zero_fill."),
    (["--pattern", "unstructured", "--sparsity", "1.0"],
     "sparsity is a fraction of zeros in [0, 1), got 1.0. For 50 % write 0.5."),
    (["--pattern", "mixed", "--sparsity", "0.9"],
     "a sparsity of 0.9 cannot be reached: the levels given reach from 0 to 0.75. Ask for a target in between, or add "
     "levels."),
    (["--bits", "4", "--group-size", "5"],
     "model.layers.0.self_attn.q_proj: groups of 5 inputs need the input features to be a multiple of 5, got 32 in a "
     "[32, 32] weight. Use a group that divides it, or 0."),
    (["--skip", "layers"], "skip: model.layers holds all blocks. Name modules in them, such as model.layers.0."),
    (["--skip", "down_porj"], "skip: no module of the model is called 'down_porj', and none ends with .down_porj."),
])  # fmt: skip
def test_settings_that_cannot_work_are_refused_before_anything_is_written(refused, start, tmp_path, arguments, message):
    assert refused(*start(*arguments)) == message
    assert list(tmp_path.iterdir()) == []


def test_what_is_missing_is_named(refused, tiny_llama_folder):
    assert refused("prune") == "MODEL is missing. See hf-adaptive-sparse prune --help."
    assert refused("prune", tiny_llama_folder) == "--data is missing. See hf-adaptive-sparse prune --help."


def test_a_linear_whose_inputs_are_no_multiple_of_4_is_named_in_the_dry_run_already(
    refused, start, tiny_llama_folder, tmp_path
):
    config = LlamaConfig.from_pretrained(tiny_llama_folder)
    config.intermediate_size = 66
    LlamaForCausalLM(config).save_pretrained(tmp_path / "odd")
    _, _, *rest = start("--dry-run")
    assert refused("prune", tmp_path / "odd", *rest) == (
        "model.layers.0.mlp.down_proj: 2:4 needs the input features to be a multiple of 4, got 66 in a [32, 66] "
        "weight. Add the layer to `skip`, or pad it."
    )


def test_nan_weights_are_refused_before_anything_is_pruned(refused, start, broken_folder, tmp_path):
    _, _, *rest = start()
    assert refused("prune", broken_folder, *rest) == (
        f"{broken_folder}: model.layers.1.mlp.up_proj.weight holds 1 NaN or infinite values of 2048. It is "
        "damaged: take an intact copy."
    )
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("more", [(), ("--offload", "disk")], ids=["none", "disk"])
def test_activations_that_overflow_are_refused_by_block_and_module(refused, start, tiny_llama_folder, tmp_path, more):
    model = AutoModelForCausalLM.from_pretrained(tiny_llama_folder)
    model.model.layers[1].mlp.up_proj.weight.data[3] *= 1e38
    model.model.layers[1].mlp.gate_proj.weight.data[3] *= 1e38
    model.save_pretrained(tmp_path / "large")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(tiny_llama_folder / name, tmp_path / "large")
    _, _, *rest = start(*more)
    assert refused("prune", tmp_path / "large", *rest) == (
        "model.layers.1.mlp.down_proj: its inputs hold NaN or inf (input feature 3), the first in block "
        "model.layers.1. Load the model in float32 or bfloat16, and check the dense model on this text."
    )
    assert [entry.name for entry in tmp_path.iterdir()] == ["large"]


def test_an_adapter_is_not_pruned(refused, start, trained):
    _, _, *rest = start()
    checkpoint = next((trained / "checkpoints").iterdir())
    assert refused("prune", checkpoint, *rest) == (
        f"MODEL {checkpoint}: is an adapter. Make a model of it first: hf-adaptive-sparse export {checkpoint} OUT "
        "--format dense. If it is a checkpoint of an interrupted run, go on with that run by train --resume."
    )


def test_a_packed_model_can_be_pruned_further(command, start, pruned, tmp_path):
    _, _, *rest = start("--pattern", "1:4", "--method", "fast")
    assert command("prune", pruned / "packed", *rest).code == 0
    for name, weight in weights(tmp_path / "out" / "packed").items():
        assert NMPattern(1, 4).first_violation(weight) is None
        assert not weight[weights(pruned / "packed")[name] == 0].any()


def test_a_disk_that_fills_up_while_saving_keeps_the_finished_blocks(command, refused, start, monkeypatch, tmp_path):
    def fail(model, folder, **options):
        raise OutputError(f"{folder}: no space left to write it; nothing of it was kept.")

    monkeypatch.setattr("hf_adaptive_sparse.cli.results.save_dense", fail)
    assert refused(*start()) == f"{tmp_path}/out/dense: no space left to write it; nothing of it was kept."
    assert sorted(entry.name for entry in (tmp_path / "out").iterdir()) == ["progress", "run.json"]
    monkeypatch.undo()
    assert command(*start("--resume")).code == 0
    assert sorted(entry.name for entry in (tmp_path / "out").iterdir()) == RESULTS


def test_a_complete_run_that_is_resumed_does_nothing(command, start, tmp_path):
    assert command(*start("--method", "fast")).code == 0
    before = tree(tmp_path / "out")
    outcome = command(*start("--method", "fast", "--resume"))
    assert outcome.code == 0
    assert outcome.message == f"{tmp_path}/out: this run is complete, nothing is left to do."
    assert tree(tmp_path / "out") == before


def test_a_complete_run_that_is_resumed_for_a_folder_it_has_not_names_the_command_that_makes_it(
    command, refused, start, tmp_path
):
    out = tmp_path / "out"
    once = start("--method", "fast", "--save", "dense")
    assert command(*once).code == 0
    before = tree(out)
    export = ("export", out / "dense", out / "packed", "--format", "packed")
    assert refused(*once, "--resume", "--save", "packed") == (
        f"{out}: this run is complete, and has no packed/. Make it of dense/: hf-adaptive-sparse "
        f"{' '.join(map(str, export))}."
    )
    assert tree(out) == before
    assert command(*export).code == 0
    for name, weight in weights(out / "packed").items():
        assert torch.equal(weight, weights(out / "dense")[name])
    assert command(*once, "--resume", "--save", "both").code == 0
    shutil.rmtree(out / "dense")
    assert refused(*once, "--resume", "--save", "both", "--dry-run") == (
        f"{out}: this run is complete, and has no dense/. Make it of packed/: hf-adaptive-sparse export {out}/packed "
        f"{out}/dense --format dense."
    )
    shutil.rmtree(out / "packed")
    assert refused(*once, "--resume") == (
        f"{out}: this run is complete, and has no dense/. Start anew with --overwrite."
    )


def test_codes_are_not_packed_of_dense_weights(command, refused, start, tmp_path):
    once = start("--method", "fast", "--bits", "8", "--save", "dense")
    assert command(*once).code == 0
    assert refused(*once, "--resume", "--save", "packed") == (
        f"{tmp_path}/out: this run is complete, and has no packed/. Start anew with --overwrite."
    )


@pytest.mark.parametrize("block", [0, 1])
def test_a_model_that_was_changed_is_not_resumed_with_and_nothing_is_removed(
    command, refused, start, monkeypatch, tiny_llama_folder, tmp_path, block
):
    def prune_block(visit, *arguments):
        if visit.index == block:
            raise KeyboardInterrupt
        return real(visit, *arguments)

    real = sys.modules["hf_adaptive_sparse.hf.one_shot"]._prune_block
    monkeypatch.setattr("hf_adaptive_sparse.hf.one_shot._prune_block", prune_block)
    shutil.copytree(tiny_llama_folder, tmp_path / "model")
    once = ("prune", tmp_path / "model", *start("--method", "fast")[2:])
    assert command(*once).code == 130
    monkeypatch.undo()
    before = tree(tmp_path / "out")
    model = AutoModelForCausalLM.from_pretrained(tiny_llama_folder)
    model.model.layers[1].mlp.up_proj.weight.data[3] *= 2
    model.save_pretrained(tmp_path / "model")
    assert refused(*once, "--resume") == (
        f"{tmp_path}/out/progress: the model has other weights than the dense model that this run began with. It was "
        "pruned since, or is another model. Load the dense model again, or use another folder."
    )
    assert tree(tmp_path / "out") == before
    shutil.copytree(tiny_llama_folder, tmp_path / "model", dirs_exist_ok=True)
    assert command(*once, "--resume").code == 0
    assert sorted(entry.name for entry in (tmp_path / "out").iterdir()) == RESULTS


def test_resume_with_other_settings_is_refused_and_each_is_named(refused, start, pruned, tmp_path):
    shutil.copytree(pruned, tmp_path / "out")
    before = tree(tmp_path)
    assert refused(*start("--resume", "--damping", "0.1", "--skip", "down_proj")) == (
        f"{tmp_path}/out: cannot resume with other settings: damping was 0.01 and is 0.1; skip was null and is "
        '["down_proj"]. Use the old ones, or start anew with --overwrite.'
    )
    assert tree(tmp_path) == before


def test_an_interrupted_run_says_how_to_go_on(command, start, monkeypatch):
    def interrupted(run):
        raise KeyboardInterrupt

    monkeypatch.setattr("hf_adaptive_sparse.cli.prune.prune", interrupted)
    outcome = command(*start())
    assert (outcome.code, outcome.message) == (
        130,
        "hf-adaptive-sparse prune: interrupted. Finished blocks are kept: the same command with --resume goes on.",
    )
