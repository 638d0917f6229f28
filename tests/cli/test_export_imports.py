"""`export` converts checkpoints of other tools, and writes and applies masks; `inspect` says what they are."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import huggingface_hub.constants
import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_adaptive_sparse.hf.mask_application import apply_masks, load_with_masks
from tests.cli.runs import read_report
from tests.hf import foreign_folders as foreign
from tests.hf.two_four_models import logits_of, two_four_model
from tests.reference import ast_release as reference
from tests.tiny_models import tiny_model, tokens


def loaded(folder):
    return AutoModelForCausalLM.from_pretrained(folder).eval()


@pytest.fixture(scope="module")
def sources(tmp_path_factory, tiny_tokenizer):
    """A checkpoint of every tool, the model that it stands for, and the dense base."""
    root = tmp_path_factory.mktemp("sources")
    sparse, dense = two_four_model(vocab_size=260), tiny_model(vocab_size=260)
    foreign.compressed_tensors_folder(root / "bits", sparse, shards=2)
    foreign.modelopt_folder(root / "modelopt", sparse, dense)
    foreign.maskllm_archive(root / "masks.npz", sparse)
    dense.save_pretrained(root / "base")
    sparse.save_pretrained(root / "sparse")
    for name in ("bits", "base", "sparse"):
        tiny_tokenizer.save_pretrained(root / name)
    return root, sparse


@pytest.fixture
def on_the_hub(monkeypatch):
    """`on_the_hub(folder, "user/name")`: the folder is in the cache of the Hub client, which is offline."""

    def put(folder: Path, name: str) -> str:
        repository = Path(huggingface_hub.constants.HF_HUB_CACHE) / f"models--{name.replace('/', '--')}"
        snapshot = repository / "snapshots" / ("0" * 40)
        shutil.copytree(folder, snapshot)
        (repository / "refs").mkdir()
        (repository / "refs" / "main").write_text("0" * 40)
        return name

    return put


def test_every_recognised_checkpoint_becomes_packed_and_dense(command, sources, tmp_path):
    root, sparse = sources
    for name, kind in (
        ("bits", "compressed-tensors sparse-24-bitmask"), ("modelopt", "NVIDIA ModelOpt weight sparsity"),
    ):  # fmt: skip
        outcome = command("export", root / name, tmp_path / name, "--format", "both")
        assert outcome.code == 0, outcome.err
        assert f"{root / name} ({kind})" in outcome.err
        assert "14 matrices are 2:4, and take " in outcome.out
        for form in ("packed", "dense"):
            assert torch.equal(logits_of(loaded(tmp_path / name / form)), logits_of(sparse))
        assert read_report(tmp_path / name)["settings"]["format"] == "both"
    assert AutoTokenizer.from_pretrained(tmp_path / "bits" / "packed").decode([10, 11, 12])
    assert not (tmp_path / "modelopt" / "packed" / "tokenizer.json").exists()
    assert "ModelOpt weight sparsity): weights under the masks, which ModelOpt keeps, are dropped." in outcome.out


def test_a_branch_of_the_ast_release_is_kept_as_an_adapter_or_folded(command, refused, tmp_path):
    state = foreign.ast_gpt2(tiny_model("gpt2"), 8)
    tiny_model("gpt2").config.save_pretrained(tmp_path / "base")
    file = tmp_path / "31.1_ckpt.pt"
    torch.save({"model": state, "iter_num": 1}, file)
    expected = reference.gpt2_logits(state, tokens(), heads=4)
    base = ("--base", tmp_path / "base")
    assert command("export", file, tmp_path / "kept", *base).code == 0
    model = PeftModel.from_pretrained(loaded(tmp_path / "kept" / "packed"), tmp_path / "kept" / "slorb")
    torch.testing.assert_close(logits_of(model.eval()), expected, rtol=0, atol=1e-5)
    outcome = command("export", file, tmp_path / "folded", *base, "--format", "dense", "--branch", "fold")
    assert outcome.code == 0
    torch.testing.assert_close(logits_of(loaded(tmp_path / "folded")), expected, rtol=0, atol=1e-5)
    assert "are folded into their weights, which are no longer 2:4." in outcome.out
    again = ("export", file, tmp_path / "x", *base)
    assert "a folded SLoRB branch fills every zero" in refused(*again, "--branch", "fold")
    assert "has a SLoRB branch, which masks do not hold" in refused(*again, "--format", "masks")
    assert not (tmp_path / "x").exists()


def test_masks_are_written_and_give_the_sparse_model_back(command, refused, sources, tmp_path):
    root, sparse = sources
    outcome = command("export", root / "sparse", tmp_path / "masks", "--format", "masks", "--base", root / "base")
    assert outcome.code == 0, outcome.err
    assert "the masks of 14 matrices, 50.00 % zeros on average, take 1.73 kB." in outcome.out
    assert "the base model and these masks give this model back, to the last bit." in outcome.out
    outcome = command("export", root / "base", tmp_path / "packed", "--apply-masks", tmp_path / "masks")
    assert outcome.code == 0, outcome.err
    assert "14 masks applied. The weights are those of the sparse model, to the last bit." in outcome.out
    assert torch.equal(logits_of(loaded(tmp_path / "packed")), logits_of(sparse))
    assert torch.equal(logits_of(load_with_masks(tmp_path / "masks", root / "base")), logits_of(sparse))
    # Another base: refused, unless it is asked for.
    tiny_model(seed=1, vocab_size=260).save_pretrained(tmp_path / "other")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(root / "base" / name, tmp_path / "other" / name)
    arguments = ("export", tmp_path / "other", tmp_path / "wrong", "--apply-masks", tmp_path / "masks")
    assert f"{tmp_path / 'masks'}: the masks are for base, whose " in refused(*arguments)
    assert not (tmp_path / "wrong").exists()
    outcome = command(*arguments, "--check-base=false")
    assert outcome.code == 0 and "The kept weights are not those of the sparse model" in outcome.out


def test_trained_masks_are_warned_about(command, sources, tmp_path):
    root, _ = sources
    outcome = command("export", root / "sparse", tmp_path / "a", "--format", "masks")
    assert "the masks were not compared with a base model: " in outcome.out
    tiny_model(seed=3, vocab_size=260).save_pretrained(tmp_path / "other")
    outcome = command("export", root / "sparse", tmp_path / "b", "--format", "masks", "--base", tmp_path / "other")
    assert outcome.code == 0
    assert "masks alone do not give this model back: " in outcome.out


def test_an_archive_of_maskllm_is_applied_to_a_base(command, sources, tmp_path):
    root, sparse = sources
    outcome = command("export", root / "base", tmp_path / "out", "--apply-masks", root / "masks.npz")
    assert outcome.code == 0, outcome.err
    assert "(MaskLLM archive): 14 masks applied. Whether the weights are those of the sparse model" in outcome.out
    assert torch.equal(logits_of(loaded(tmp_path / "out")), logits_of(sparse))


def test_a_repository_of_another_tool_is_converted_and_not_loaded_with_random_weights(
    command, sources, on_the_hub, tmp_path
):
    root, sparse = sources
    name = on_the_hub(root / "bits", "somebody/old-2of4")
    outcome = command("export", name, tmp_path / "out")
    assert outcome.code == 0, outcome.err
    assert "somebody/old-2of4 (compressed-tensors sparse-24-bitmask)" in outcome.err
    assert torch.equal(logits_of(loaded(tmp_path / "out")), logits_of(sparse))


def test_masks_on_the_hub_are_fetched(command, sources, on_the_hub, tmp_path):
    root, sparse = sources
    base = on_the_hub(root / "base", "somebody/base")
    command("export", root / "sparse", tmp_path / "masks", "--format", "masks", "--base", base)
    name = on_the_hub(tmp_path / "masks", "somebody/masks")
    model = loaded(root / "base")
    assert apply_masks(model, name, revision="main").exact is True
    assert torch.equal(logits_of(model), logits_of(sparse))
    assert torch.equal(logits_of(load_with_masks(name)), logits_of(sparse))


def test_inspect_names_the_tool_and_counts_the_matrices(command, sources, tmp_path):
    root, _ = sources
    outcome = command("inspect", root / "bits")
    assert outcome.code == 0, outcome.err
    assert "compressed-tensors sparse-24-bitmask: " in outcome.out and "14 of 16 matrices are 2:4" in outcome.out
    found = json.loads(command("inspect", root / "modelopt", "--json").out)
    assert (found["kind"], len(found["notes"])) == ("NVIDIA ModelOpt weight sparsity", 1)
    command("export", root / "sparse", tmp_path / "masks", "--format", "masks", "--base", root / "base")
    outcome = command("inspect", tmp_path / "masks")
    assert "masks: 18,432 parameters, 14 of 14 matrices are 2:4" in outcome.out
    assert "masks for base; kept weights of the sparse model: equal." in outcome.out


def test_no_other_subcommand_takes_a_foreign_checkpoint_or_masks_for_a_model(command, refused, sources, tmp_path):
    root, _ = sources
    assert refused("eval", root / "bits", "--data", root / "bits" / "config.json") == (
        f"MODEL {root / 'bits'}: is a checkpoint of another tool (compressed-tensors), which transformers does not "
        f"load as what it is. Convert it first: hf-adaptive-sparse export {root / 'bits'} OUT."
    )
    command("export", root / "sparse", tmp_path / "masks", "--format", "masks")
    assert refused("export", tmp_path / "masks", tmp_path / "out").startswith(
        f"MODEL {tmp_path / 'masks'}: holds masks and no weights. Apply them to their base model first: "
        f"hf-adaptive-sparse export BASE OUT --apply-masks {tmp_path / 'masks'}."
    )


@pytest.mark.parametrize("arguments, message", [
    (["--branch", "drop"], "unknown branch 'drop'; known: keep, fold."),
    (["--apply-masks", "x", "--one-shot", "magnitude"],
     "apply_masks and one_shot both say what is pruned. Set one of them."),
    (["--base", "x"], "base is for --format masks, and for checkpoints of other tools. Leave it out."),
])  # fmt: skip
def test_wrong_arguments_are_refused(refused, sources, tmp_path, arguments, message):
    root, _ = sources
    assert refused("export", root / "sparse", tmp_path / "out", *arguments) == message


def test_a_dry_run_says_what_it_recognised(command, sources, tmp_path):
    root, _ = sources
    outcome = command("export", root / "bits", tmp_path / "out", "--dry-run")
    assert outcome.code == 0 and "convert it" in outcome.out and "(compressed-tensors sparse-24-bitmask)" in outcome.out
    assert not (tmp_path / "out").exists()
