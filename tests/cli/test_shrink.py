"""`shrink` ends in a smaller model that loads back, whatever its form, and goes on after an interruption."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from hf_adaptive_sparse.cli.main import main
from hf_adaptive_sparse.families import STRUCTURES
from hf_adaptive_sparse.hf.shrink import Shrinker
from hf_adaptive_sparse.hf.shrunk_manifest import shrunk_manifest
from hf_adaptive_sparse.methods.policy_gradient import PolicyLearner
from tests.cli.runs import SHRINK, SHRINK_ONCE, SHRINK_ONLY, read_report, tree
from tests.hf.walked_models import any_model

IDS = torch.arange(12)[None]
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


@pytest.fixture
def learn(tiny_llama_folder, tiny_text_file, tmp_path):
    """The same without stages, for learners."""
    data = ("--data", tiny_text_file, "--output-dir", tmp_path / "out", *SHRINK_ONCE)
    return lambda *changes, model=tiny_llama_folder: ("shrink", model, *data, *changes)


@pytest.fixture
def prune(tiny_llama_folder, tiny_text_file, tmp_path):
    """The same without training."""
    data = ("--data", tiny_text_file, "--output-dir", tmp_path / "out", *SHRINK_ONLY)
    return lambda *changes, model=tiny_llama_folder: ("shrink", model, *data, *changes)


def saved_as(folder, model_type: str, tokenizer):
    """A folder with a small model of this type, and the tokenizer of another."""
    model = any_model(model_type)
    model.resize_token_embeddings(AutoConfig.from_pretrained(tokenizer).vocab_size)
    model.save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(tokenizer / name, folder)
    return folder


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


def test_where_training_follows_widths_are_equal_and_without_it_adaptive(prune, learn, command):
    plans = [command(*arguments("--dry-run")).out for arguments in (prune, learn)]
    assert "widths by block (adaptive)" in plans[0]
    assert "widths equal in all blocks" in plans[1]


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


def test_without_training_equal_widths_give_a_stock_checkpoint(prune, command, tmp_path):
    outcome = command(*prune("--equal-widths", "--form", "stock", "--multiple-of", "2"))
    assert outcome.code == 0, outcome.err
    config = json.loads((tmp_path / "out" / "shrunk" / "config.json").read_text())
    assert config["model_type"] in ("llama", "mistral")
    assert "per_layer_config" not in config
    assert config["intermediate_size"] % 2 == 0


def test_a_padded_model_is_reported_as_large_as_it_is_saved(prune, command, tmp_path):
    outcome = command(*prune("--form", "padded", "--target", "0.9"))
    assert outcome.code == 0, outcome.err
    report, saved = read_report(tmp_path / "out"), count(tmp_path / "out" / "shrunk")
    dense, padded = (row["parameters"] for row in report["models"])
    assert padded == saved
    assert f"{dense:,} parameters became {saved:,} ({saved / dense:.1%})" in report["summary"][0]
    assert report["summary"][1].startswith("Without the units of zeros that pad it: ")


@pytest.mark.parametrize("model_type", ["mixtral", "qwen3_moe"])
def test_of_a_model_with_experts_heads_go_and_the_report_has_no_channels(
    prune, learn, command, tmp_path, tiny_llama_folder, model_type
):
    model = saved_as(tmp_path / "moe", model_type, tiny_llama_folder)
    outcome = command(*prune("--target", "0.97", model=model))
    assert outcome.code == 0, outcome.err
    assert command(*learn("--target", "0.97", "--dry-run", model=model)).code in (0, 2)  # equal ones may be as now
    rows = read_report(tmp_path / "out")["widths"]
    assert all(row["dense_channels"] == row["channels"] == 0 for row in rows)
    assert any(row["kv_heads"] < row["dense_kv_heads"] for row in rows)


def test_a_form_that_cannot_hold_the_result_is_said_before_anything_is_written(
    learn, prune, refused, tmp_path, tiny_llama_folder
):
    gpt2 = saved_as(tmp_path / "gpt2", "gpt2", tiny_llama_folder)
    assert refused("shrink", gpt2, *learn("--target", "0.8", "--form", "stock")[2:]) == (
        "GPT2LMHeadModel: form='stock' cannot hold this model (stock: GPT2Config cannot say that 3 heads are 8 wide "
        "each: it divides the hidden size 32 by their number). Use form='per_layer'."
    )
    assert refused(*learn("--remote-code")) == (
        "remote_code: a checkpoint of form 'stock' has no code of its own; LlamaForCausalLM is part of transformers. "
        "Leave remote_code out, or use form='per_layer'."
    )
    assert not (tmp_path / "out").exists()


def test_blocks_that_differ_are_made_equal_or_that_is_refused(prune, learn, command, refused, tmp_path):
    assert command(*prune("--target", "0.8")).code == 0
    shrunk = tmp_path / "differing"
    (tmp_path / "out" / "shrunk").rename(shrunk)
    shutil.rmtree(tmp_path / "out")
    message = refused("shrink", shrunk, *learn("--target", "0.99")[2:])
    assert message.startswith("equal widths: the blocks of this model differ, and with all as narrow as the narrowest")
    assert message.endswith("of them, or use allocation='uniform'.")
    outcome = command("shrink", shrunk, *learn("--target", "0.6", "--form", "stock")[2:])
    assert outcome.code == 0, outcome.err
    assert "per_layer_config" not in json.loads((tmp_path / "out" / "shrunk" / "config.json").read_text())


def test_gates_learn_a_shape_that_training_then_repairs(learn, command, tmp_path):
    # The teacher has two layers, and its states after the second are those the one that is left follows.
    shape = ("--shape", "layers=1,ffn=24", "--gate-steps", "6", "--train-tokens", "640", "--save-steps", "5")
    outcome = command(*learn(*shape))
    assert outcome.code == 0, outcome.err
    folder = tmp_path / "out" / "shrunk"
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert (model.config.num_hidden_layers, model.config.intermediate_size) == (1, 24)
    assert "per_layer_config" not in json.loads((folder / "config.json").read_text())
    report = read_report(tmp_path / "out")
    assert sorted(row["channels"] for row in report["widths"]) == [0, 24]
    assert report["title"].endswith("shrunk to layers=1,ffn=24")
    assert not (tmp_path / "out" / "checkpoints" / "learning.safetensors").exists()
    for name in ("shrunk", "checkpoints/checkpoint-10"):
        shutil.rmtree(tmp_path / "out" / name)
    outcome = command(*learn(*shape, "--resume"))
    assert outcome.code == 0, outcome.err
    again = AutoModelForCausalLM.from_pretrained(folder)
    for (name, expected), (_, found) in zip(model.named_parameters(), again.named_parameters(), strict=True):
        assert torch.equal(expected, found), name


def test_a_dry_run_says_what_would_be_done_and_writes_nothing(start, command, tmp_path):
    outcome = command(*start("--dry-run"))
    assert outcome.code == 0, outcome.err
    assert "3, before steps 0, 3, 10" in outcome.err + outcome.out
    assert "the dense model" in outcome.err + outcome.out
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            ("--target", "80"),
            "target is the part of the parameters that stays, in (0, 1), got 80.0. For 80 % write 0.8.",
        ),
        (("--bias-repair",), "bias_repair stands in for training. Use it with --train-tokens 0."),
        (("--form", "stock"), "form 'stock' has blocks of the same width. Add --equal-widths, or give --shape."),
        (("--form", "flat"), "unknown form 'flat'; known: auto, stock, per_layer, padded."),
        (("--kd-weight", "0.5", "--no-distill"), "--kd-weight has no effect with --no-distill. Leave out one of them."),
        (
            ("--allocation", "auto", "--amplitude", "0.5"),
            "--amplitude has no effect with uniform widths. Leave out one of them.",
        ),
        (
            ("--allocation", "auto", "--stages", "1"),
            "--prune-fraction has no effect with one stage. Leave out one of them.",
        ),
        (("--train-tokens", "0"), "--stages has no effect with --train-tokens 0. Leave out one of them."),
        (
            ("--train-tokens", "0", "--stages", "1", "--learning-rate", "1"),
            "--learning-rate has no effect with --train-tokens 0. Leave out one of them.",
        ),
        (
            ("--kd-weight", "0", "--hidden-weight", "0"),
            "kd_weight and hidden_weight are 0: nothing follows the dense model. Use --no-distill.",
        ),
        (("--gate-steps", "9"), "--gate-steps has no effect without --shape. Leave out one of them."),
        (("--policy-lr", "1"), "--policy-lr has no effect without --learner policy. Leave out one of them."),
        (("--learner", "agent"), "unknown learner 'agent'; known: policy, gates."),
        (
            ("--learner", "gates"),
            "learner gates needs a shape to learn. Add --shape, such as layers=4,heads=6,ffn=512.",
        ),
        (
            ("--learner", "policy", "--shape", "layers=1"),
            "learner policy learns towards a number of parameters. Leave out --shape or --learner.",
        ),
        (("--learner", "policy"), "--stages has no effect with --learner policy. Leave out one of them."),
        (
            ("--shape", "layers=2,layers=1"),
            "shape is written layers=4,heads=6,ffn=512 (each once, any of them), got 'layers=1' in "
            "'layers=2,layers=1'.",
        ),
        (("--shape", "layers=1", "--gate-steps", "0"), "gate_steps is at least 1 and gate_lr above 0, got 0 and 0.1."),
        (("--shape", "layers=1"), "--stages has no effect with --shape. Leave out one of them."),
        (("--shape", "layers=1", "--multiple-of", "8", "--stages", "1", "--prune-fraction", "0.3"),
         "--allocation has no effect with --shape. Leave out one of them."),
        (("--shape", "layers=1", "--target", "0.5"), "--target has no effect with --shape. Leave out one of them."),
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


def test_a_target_or_shape_that_cannot_be_reached_is_said_before_anything_is_written(
    start, learn, refused, tmp_path, tiny_llama_folder
):
    dense = count(tiny_llama_folder)
    config = AutoConfig.from_pretrained(tiny_llama_folder)
    kv_heads, size = config.num_key_value_heads, config.head_dim
    head = (2 * config.num_attention_heads // kv_heads + 2) * size * config.hidden_size
    channels = 3 * (config.intermediate_size - 1) * config.hidden_size
    least = dense - config.num_hidden_layers * ((kv_heads - 1) * head + channels)
    assert refused(*start("--target", "0.01")) == (
        f"a target of {round(0.01 * dense)} parameters cannot be reached: without any kv_head and mlp_channel unit but "
        f"1 per block the model still has {least} of its {dense}. Ask for at least {least} ({least / dense:.4f} of "
        "them)."
    )
    assert refused(*learn("--multiple-of", "128")) == (
        "model.layers.0.mlp: is 64 wide, and multiple_of is 128. Ask for multiples of at most the narrowest MLP, which "
        "can only become narrower."
    )
    assert refused(*learn("--target", "0.999")) == (
        "target 0.999: the equal widths closest to it are those of the model, and nothing would go. Ask for less, or "
        "for widths by block with allocation='adaptive'."
    )
    assert refused(*learn("--learner", "policy", "--form", "stock")) == (
        "form 'stock' has blocks of the same width, and --learner policy learns others."
    )
    assert refused(*learn("--learner", "policy", "--multiple-of", "8")) == (
        "--multiple-of has no effect with --learner policy. Leave out one of them."
    )
    group = config.num_attention_heads // kv_heads
    for shape, message in (
        ("ffn=9999", "shape ffn=9999: the model has 64. Ask for at most that many."),
        (
            "heads=3",
            f"shape heads=3: {group} query heads read each KV head and go with it. Ask for a multiple of {group}.",
        ),
    ):
        assert refused(*learn("--shape", shape)) == message
    assert not (tmp_path / "out").exists()


def test_a_policy_learns_which_units_stay_and_goes_on_where_it_was_killed(
    learn, command, tmp_path, monkeypatch, tiny_llama_folder
):
    policy = ("--learner", "policy", "--target", "0.85", "--policy-steps", "12", "--train-tokens", "320")
    outcome = command(*learn(*policy))
    assert outcome.code == 0, outcome.err
    folder, dense = tmp_path / "out" / "shrunk", count(tiny_llama_folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert 0 <= round(0.85 * dense) - model.num_parameters() < 1000
    manifest = shrunk_manifest(json.loads((folder / "config.json").read_text()))
    assert manifest["method"]["policy"]["steps"] == 12
    assert manifest["method"]["score"] == "taylor"
    shutil.rmtree(tmp_path / "out")

    def killed(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(Shrinker, "remove_learned", killed)  # when all has been learned, and nothing removed
    assert command(*learn(*policy)).code == 130
    monkeypatch.undo()
    assert (tmp_path / "out" / "checkpoints" / "learning.safetensors").is_file()
    drawn = []
    monkeypatch.setattr(PolicyLearner, "sample", lambda self: drawn.append(self))
    outcome = command(*learn(*policy, "--resume"))
    assert outcome.code == 0, outcome.err
    assert not drawn
    again = AutoModelForCausalLM.from_pretrained(folder)
    for (name, expected), (_, found) in zip(model.named_parameters(), again.named_parameters(), strict=True):
        assert torch.equal(expected, found), name


def test_resuming_with_another_config_names_what_differs(shrunk, tmp_path, start, refused):
    shutil.copytree(shrunk, tmp_path / "out")
    assert refused(*start("--resume", "--target", "0.7")) == (
        f"{tmp_path / 'out'}: cannot resume with other settings: target was 0.8 and is 0.7. Use the old ones, or "
        "start anew with --overwrite."
    )


def test_a_family_without_declared_units_is_told_its_linears_and_how_to_declare_them(
    start, refused, tmp_path, tiny_llama_folder
):
    folder = saved_as(tmp_path / "other", "bloom", tiny_llama_folder)
    assert refused("shrink", folder, *start()[2:]) == (
        "BloomForCausalLM: no structure is declared for models of type 'bloom', so it is not known which weights make "
        f"and read a head or a channel; known: {', '.join(sorted(STRUCTURES))}. The linears of transformer.h.0 are "
        "self_attention.query_key_value [96, 32], self_attention.dense [32, 32], mlp.dense_h_to_4h [128, 32], "
        "mlp.dense_4h_to_h [32, 128]. Declare them with hf_adaptive_sparse.families.STRUCTURES['bloom'] = "
        "Structure(heads=..., heads_out=..., channels=..., channels_out=...)."
    )
    assert not (tmp_path / "out").exists()


def test_a_folder_with_results_is_not_overwritten(shrunk, tiny_llama_folder, tiny_text_file, refused):
    before = tree(shrunk)
    refused("shrink", tiny_llama_folder, "--data", tiny_text_file, "--output-dir", shrunk, *SHRINK)
    assert tree(shrunk) == before
