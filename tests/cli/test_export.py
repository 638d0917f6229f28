"""`export` writes a sparse model packed, dense-stored or both, and never half of it."""

from __future__ import annotations

import json

import pytest
import torch
from transformers import AutoModelForCausalLM

from hf_adaptive_sparse.hf.imports import known_formats
from hf_adaptive_sparse.patterns import NMPattern
from tests.cli.runs import read_report, tree

IDS = torch.arange(12)[None]


def logits(folder) -> torch.Tensor:
    return AutoModelForCausalLM.from_pretrained(folder).eval()(IDS).logits


@pytest.fixture(scope="session")
def adapter_folder(trained):
    """The last checkpoint of a run: an adapter that names its base model."""
    return max((trained / "checkpoints").iterdir(), key=lambda folder: int(folder.name.split("-")[1]))


def test_an_adapter_is_merged_and_saved_in_both_forms(command, trained, adapter_folder, tmp_path):
    outcome = command("export", adapter_folder, tmp_path / "out", "--format", "both")
    assert outcome.code == 0, outcome.err
    report = read_report(tmp_path / "out")
    assert sorted(report["sizes"]) == ["dense", "packed"]
    assert report["sizes"]["packed"] < report["sizes"]["dense"]
    assert len(report["matrices"]) == 15
    expected = logits(trained / "packed")
    for name in ("packed", "dense"):
        assert torch.equal(logits(tmp_path / "out" / name), expected)
    assert (
        "14 matrices are 2:4, and take 39.2 kB (0.5312 of the dense bytes); linear layers that stay dense: 1."
        in outcome.out
    )


def test_a_dense_stored_model_becomes_packed_and_back_bit_by_bit(command, trained, tmp_path):
    assert command("export", trained / "dense", tmp_path / "packed").code == 0
    assert command("export", tmp_path / "packed", tmp_path / "dense", "--format", "dense").code == 0
    assert torch.equal(logits(tmp_path / "packed"), logits(trained / "dense"))
    assert torch.equal(logits(tmp_path / "dense"), logits(trained / "dense"))
    assert "quantization_config" not in json.loads((tmp_path / "dense" / "config.json").read_text())


def test_one_shot_magnitude_keeps_the_two_largest_of_every_four(command, tiny_llama_folder, tmp_path):
    outcome = command("export", tiny_llama_folder, tmp_path / "out", "--one-shot", "magnitude", "--format", "dense")
    assert outcome.code == 0, outcome.err
    before = AutoModelForCausalLM.from_pretrained(tiny_llama_folder).state_dict()
    after = AutoModelForCausalLM.from_pretrained(tmp_path / "out").state_dict()
    pruned = {name for name in before if "proj" in name}
    assert len(pruned) == 14
    for name, weight in before.items():
        keep = NMPattern(2, 4).keep_mask(weight.abs()) if name in pruned else torch.ones_like(weight, dtype=bool)
        assert torch.equal(after[name], torch.where(keep, weight, 0.0))


def test_a_packed_folder_in_bfloat16_takes_0_5625_of_the_dense_bytes(command, tiny_llama_folder, tmp_path):
    arguments = ("--one-shot", "magnitude", "--dtype", "bfloat16")
    outcome = command("export", tiny_llama_folder, tmp_path / "out", *arguments)
    assert outcome.code == 0, outcome.err
    assert "14 matrices are 2:4, and take 20.7 kB (0.5625 of the dense bytes)" in outcome.out


def test_an_existing_export_is_replaced_only_when_asked_to(command, refused, trained, tmp_path):
    out = tmp_path / "out"
    assert command("export", trained / "dense", out).code == 0
    before = tree(out)
    assert refused("export", trained / "dense", out) == (
        f"{out}: the output folder is not empty. Choose another one, or replace its results with --overwrite."
    )
    assert tree(out) == before
    assert command("export", trained / "dense", out, "--format", "dense", "--overwrite").code == 0
    assert not (out / "model.sparse24.safetensors").exists()
    assert [entry.name for entry in tmp_path.iterdir()] == ["out"]


def test_a_dry_run_writes_nothing(command, trained, tmp_path):
    outcome = command("export", trained / "dense", tmp_path / "out", "--dry-run", "--format", "both")
    assert outcome.code == 0
    assert f"{tmp_path / 'out' / 'packed'} (packed)" in outcome.out
    assert list(tmp_path.iterdir()) == []


def test_a_model_that_is_not_sparse_is_not_packed(refused, tiny_llama_folder, tmp_path):
    assert refused("export", tiny_llama_folder, tmp_path / "out") == (
        "LlamaForCausalLM: none of its 15 linear layers can be packed. model.layers.0.self_attn.q_proj is not "
        "2:4: row 0, group 0 has 4 non-zeros. Train or prune the model to 2:4 first, or save it dense (save_dense, "
        "--format dense)."
    )
    assert list(tmp_path.iterdir()) == []


def test_broken_weights_are_refused_by_name(refused, broken_folder, tmp_path):
    assert refused("export", broken_folder, tmp_path / "out", "--one-shot", "magnitude") == (
        f"{broken_folder}: model.layers.1.mlp.up_proj.weight holds 1 NaN or infinite values of 2048. It is "
        "damaged: take an intact copy."
    )
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("arguments, message", [
    (["--format", "zip"], "unknown format 'zip'; known: packed, dense, both, masks."),
    (["--one-shot", "wanda"], "unknown one_shot 'wanda'; known: magnitude."),
    (["--pattern", "unstructured"], "export writes n:m patterns such as 2:4, got 'unstructured'."),
    (["--target-modules", "q_proj"],
     "target_modules says what one_shot prunes, which is not set. Set one_shot too."),
    (["--dtype", "int8"], "unknown dtype 'int8'; known: auto, float32, bfloat16, float16."),
])  # fmt: skip
def test_wrong_arguments_are_refused(refused, tiny_llama_folder, tmp_path, arguments, message):
    assert refused("export", tiny_llama_folder, tmp_path / "out", *arguments) == message
    assert list(tmp_path.iterdir()) == []


def test_a_folder_without_a_model_names_the_ones_inside(refused, trained, tmp_path):
    assert refused("export", trained, tmp_path / "out") == (
        f"MODEL {trained}: the folder holds no model: config.json is missing. There is one in "
        f"{trained}/dense, {trained}/packed. Of other tools, export reads {known_formats()}."
    )


def test_a_file_is_no_model(refused, tiny_text_file, tmp_path):
    assert refused("export", tiny_text_file, tmp_path / "out") == (
        f"MODEL {tiny_text_file}: a model is a folder or a Hub id, and this is a file. Of other tools, export reads "
        f"{known_formats()}."
    )


def test_an_output_that_is_a_file_is_refused(refused, trained, tiny_text_file):
    assert refused("export", trained / "dense", tiny_text_file) == (
        f"{tiny_text_file}: the output folder is a file. Choose another name."
    )


def test_a_hub_id_without_a_network_says_that_it_was_looked_for_on_the_hub(refused, tmp_path):
    message = refused("export", "nobody/nothing-here", tmp_path / "out")
    assert message.startswith(
        "nobody/nothing-here: cannot load the model (no such local folder, so it was looked for on the Hub): "
    )
