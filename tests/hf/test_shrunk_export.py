"""The forms in which a shrunk model is saved: what each can hold, that it computes the same, and what is refused."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from safetensors import safe_open
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
)

from hf_adaptive_sparse.errors import ConfigError, FormatError, OutputError
from hf_adaptive_sparse.families import STRUCTURES, Structure
from hf_adaptive_sparse.hf import shrunk_export
from hf_adaptive_sparse.hf.shrunk_export import export_shrunk
from hf_adaptive_sparse.hf.shrunk_manifest import manifest_to_json, shrunk_manifest
from hf_adaptive_sparse.hf.surgery import block_widths, remove_units
from hf_adaptive_sparse.hf.units import find_axes

from ..tiny_models import CONFIGS, tiny_model, tokens
from .shrunk_cases import FAMILIES, WITHOUT_HEAD_DIM, add_biases, assert_generates, load, logits_of, shrunk_model
from .unit_models import unit_model

every_family = pytest.mark.parametrize("family", FAMILIES)
ROOT = Path(__file__).parents[2]


@pytest.fixture
def out(tmp_path):
    return tmp_path / "out"


@pytest.fixture(scope="module")
def uneven():
    return shrunk_model("llama", even=False)


def llama_with_six_of_eight_heads():
    model = tiny_model("llama", hidden_size=64, num_attention_heads=8, num_key_value_heads=4)
    keep = torch.tensor([True, True, False, True])
    remove_units(model, {axis.name: keep for axis in find_axes(model, ("kv_head",))})
    return model


def rounding(family) -> float:
    """What of logits in float64 may differ. Gemma scales its embeddings by a root that was rounded to float32."""
    return 1e-5 if family.startswith("gemma") else 1e-12


def message(error) -> str:
    return str(error.value)


# --- stock ----------------------------------------------------------------------------------------------------


@every_family
def test_even_widths_give_a_stock_checkpoint_with_the_same_logits(family, out):
    kinds = ("mlp_channel",) if family in WITHOUT_HEAD_DIM else ("kv_head", "mlp_channel", "expert")
    model = shrunk_model(family, even=True, kinds=kinds)
    result = export_shrunk(model, out)
    assert (result.form, result.model_type, result.architecture) == ("stock", family, type(model).__name__)
    assert result.refused == {}
    assert result.parameters == model.num_parameters()
    assert list(result.widths) == block_widths(model)
    config = json.loads((out / "config.json").read_text())
    assert "per_layer_config" not in config and "auto_map" not in config
    loaded = load(out)
    assert type(loaded) is type(model)
    assert torch.equal(logits_of(loaded), logits_of(model))
    assert_generates(loaded)


def test_a_head_count_that_llama_refuses_is_saved_as_mistral_without_a_window(out):
    model = llama_with_six_of_eight_heads()
    result = export_shrunk(model, out, form="stock")
    assert (result.form, result.architecture) == ("stock", "MistralForCausalLM")
    assert result.refused == {
        "llama": "LlamaConfig refuses: The hidden size (64) is not a multiple of the number of attention heads (6)"
    }
    loaded = load(out)
    assert loaded.config.sliding_window is None and loaded.config.num_attention_heads == 6
    assert torch.equal(logits_of(loaded), logits_of(model))
    assert_generates(loaded)


def test_a_sibling_keeps_what_the_config_says_about_positions_norms_and_tokens(out):
    rope = {"rope_type": "llama3", "rope_theta": 5000.0, "factor": 8.0, "low_freq_factor": 1.0}
    rope |= {"high_freq_factor": 4.0, "original_max_position_embeddings": 16}
    model = tiny_model(
        "llama", hidden_size=64, num_attention_heads=8, num_key_value_heads=4, rope_parameters=rope,
        rms_norm_eps=0.01, tie_word_embeddings=True, eos_token_id=[2, 5],
    )  # fmt: skip
    keep = torch.tensor([True, False, True, True])
    remove_units(model, {axis.name: keep for axis in find_axes(model, ("kv_head",))})
    assert export_shrunk(model, out).architecture == "MistralForCausalLM"
    loaded = load(out)
    ids = tokens(length=40)
    assert torch.equal(logits_of(loaded, ids), logits_of(model, ids))
    assert loaded.config.eos_token_id == [2, 5] and loaded.lm_head.weight is loaded.model.embed_tokens.weight


def test_a_model_with_a_window_has_no_sibling_without_one(out):
    model = add_biases(shrunk_model("mistral", even=True, sliding_window=4), "self_attn.o_proj")
    result = export_shrunk(model, out)
    assert (result.form, list(result.refused)) == ("per_layer", ["mistral"])
    assert torch.equal(logits_of(load(out)), logits_of(model))


def test_a_reloaded_model_of_different_blocks_becomes_stock_when_its_blocks_have_become_alike(uneven, tmp_path):
    export_shrunk(uneven, tmp_path / "uneven")
    loaded = load(tmp_path / "uneven")
    narrowest = {axis.kind: axis.count for axis in find_axes(loaded)}
    keep = {axis.name: torch.arange(axis.count) < narrowest[axis.kind] for axis in find_axes(loaded)}
    remove_units(loaded, keep)
    result = export_shrunk(loaded, tmp_path / "even")
    assert (result.form, result.architecture) == ("stock", "LlamaForCausalLM")
    assert torch.equal(logits_of(load(tmp_path / "even")), logits_of(loaded))


@pytest.mark.parametrize("family", ["gemma2", "qwen2", "opt", "gpt2"])
def test_removed_layers_are_neither_in_the_weights_nor_in_the_config(family, out):
    windows = {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1}
    model = unit_model(family, **(windows if family.startswith("qwen") else {}))
    (axis,) = find_axes(model, ("layer",))
    remove_units(model, {axis.name: torch.tensor([True, False, True])})
    result = export_shrunk(model, out)
    assert (result.form, len(result.widths)) == ("stock", 2)
    loaded = load(out)
    assert loaded.config.num_hidden_layers == 2
    assert getattr(loaded.config, "layer_types", None) == getattr(model.config, "layer_types", None)
    assert torch.equal(logits_of(loaded), logits_of(model))
    assert_generates(loaded)


def test_fewer_hidden_channels_are_saved_with_their_norms(tmp_path):
    model = unit_model("llama")
    remove_units(model, {"model": torch.arange(24) < 20})  # which six heads do not divide
    for form, architecture in {"stock": "MistralForCausalLM", "per_layer": "ShrunkLlamaForCausalLM"}.items():
        assert export_shrunk(model, tmp_path / form, form=form).architecture == architecture
        assert torch.equal(logits_of(load(tmp_path / form)), logits_of(model))


# --- padded ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", [family for family in FAMILIES if family not in ("mixtral", "qwen3_moe")])
def test_padding_gives_a_stock_model_that_computes_the_same(family, out):
    model = shrunk_model(family, even=False, dtype=torch.float64)
    result = export_shrunk(model, out, form="padded")
    loaded = load(out)
    assert (result.form, type(loaded).__name__) == ("padded", result.architecture)
    assert not result.architecture.startswith("Shrunk") and len({str(widths) for widths in result.widths}) == 1
    # Zeros change no sum, but matrices of other sizes may be summed in another order.
    torch.testing.assert_close(logits_of(loaded), logits_of(model), rtol=0, atol=rounding(family))
    assert_generates(loaded)


def test_padding_takes_more_heads_where_no_class_takes_the_widest_block(out):
    model = shrunk_model("gpt2", even=True)
    result = export_shrunk(model, out, form="padded")
    assert [widths["num_attention_heads"] for widths in result.widths] == [3, 3, 3]
    assert [widths["intermediate_size"] for widths in result.widths] == [19, 19, 19]


def test_padded_weights_are_those_of_the_model_with_zeros_behind_them(uneven, out):
    export_shrunk(uneven, out, form="padded")
    narrow, wide = uneven.model.layers[2].mlp, load(out).model.layers[2].mlp
    assert torch.equal(wide.down_proj.weight[:, :14], narrow.down_proj.weight)
    assert torch.equal(wide.gate_proj.weight[:14], narrow.gate_proj.weight)
    assert wide.down_proj.weight[:, 14:].count_nonzero() == wide.gate_proj.weight[14:].count_nonzero() == 0


@pytest.mark.parametrize("family", ["llama", "phi3", "qwen3_moe", "opt", "gpt2"])
@pytest.mark.parametrize("form", ["stock", "per_layer"])
def test_channels_of_zeros_round_the_widths_up(family, form, tmp_path):
    model = shrunk_model(family, even=form == "stock", kinds=("mlp_channel",), dtype=torch.float64)
    result = export_shrunk(model, tmp_path / form, form=form, multiple_of=8)
    widths = [block["intermediate_size"] for block in block_widths(model) if "intermediate_size" in block]
    rounded = [block["intermediate_size"] for block in result.widths if "intermediate_size" in block]
    assert rounded == [-(-width // 8) * 8 for width in widths]
    torch.testing.assert_close(logits_of(load(tmp_path / form)), logits_of(model), rtol=0, atol=rounding(family))


# --- biases ---------------------------------------------------------------------------------------------------

OUTPUTS = ("self_attn.o_proj", "mlp.down_proj")


@pytest.mark.parametrize(
    "family, names, architecture",
    [
        ("llama", OUTPUTS, "LlamaForCausalLM"),
        ("llama", ("mlp.down_proj",), "LlamaForCausalLM"),
        ("mistral", OUTPUTS, "LlamaForCausalLM"),
        ("qwen2", OUTPUTS, "LlamaForCausalLM"),
        ("qwen3", ("self_attn.o_proj",), "Qwen3ForCausalLM"),
        ("qwen3", OUTPUTS, "ShrunkQwen3ForCausalLM"),
        ("gemma2", ("self_attn.o_proj",), "Gemma2ForCausalLM"),
        ("phi3", OUTPUTS, "ShrunkPhi3ForCausalLM"),
    ],
)
def test_new_biases_are_saved_where_a_config_can_ask_for_them(family, names, architecture, out):
    # Mistral and Llama compute the same only without a window.
    changes = {"sliding_window": None} if family == "mistral" else {}
    model = unit_model(family, **changes)
    remove_units(model, {axis.name: torch.arange(axis.count) < 17 for axis in find_axes(model, ["mlp_channel"])})
    add_biases(model, *names)
    assert export_shrunk(model, out).architecture == architecture
    assert torch.equal(logits_of(load(out)), logits_of(model))


def test_a_bias_that_no_stock_class_has_is_refused_with_the_form_that_has_it(out):
    model = add_biases(llama_with_six_of_eight_heads(), *OUTPUTS)
    with pytest.raises(ConfigError) as error:
        export_shrunk(model, out, form="stock")
    assert message(error) == (
        "LlamaForCausalLM: form='stock' cannot hold this model (llama: LlamaConfig refuses: The hidden size (64) is "
        "not a multiple of the number of attention heads (6); mistral: MistralForCausalLM has no place for "
        "model.layers.0.self_attn.o_proj.bias of [64]). Use form='per_layer'."
    )
    assert not out.exists()
    assert export_shrunk(model, out).form == "per_layer"
    assert torch.equal(logits_of(load(out)), logits_of(model))


# --- families that their user declared --------------------------------------------------------------------------

KNOWN = "gemma, gemma2, gpt2, llama, mistral, mixtral, opt, phi3, qwen2, qwen3, qwen3_moe"


@pytest.fixture
def gemma3(monkeypatch):
    """Makes a model of three blocks of a family that is not in the package, declared as find_axes tells."""
    monkeypatch.setitem(STRUCTURES, "gemma3_text", Structure(norm="rms_plus_one", head_norms=("q_norm", "k_norm")))
    return lambda even: shrunk_model("gemma3_text", even=even)


@pytest.mark.parametrize("multiple_of", [1, 8])
def test_even_widths_of_a_family_that_its_user_declared_give_a_stock_checkpoint(multiple_of, gemma3, out):
    model = gemma3(even=True)
    (layers,) = find_axes(model, ("layer",))
    remove_units(model, {layers.name: torch.tensor([True, False, True])})
    result = export_shrunk(model, out, multiple_of=multiple_of)
    assert (result.form, result.model_type, result.architecture) == ("stock", "gemma3_text", "Gemma3ForCausalLM")
    assert result.refused == {}
    loaded = load(out)
    assert len(result.widths) == 2 and block_widths(loaded) == list(result.widths)
    assert torch.allclose(logits_of(loaded), logits_of(model), rtol=0, atol=1e-5)
    assert_generates(loaded)


def test_uneven_widths_of_a_family_that_its_user_declared_are_padded_or_refused(gemma3, out):
    model = gemma3(even=False)
    differ = "its blocks differ in num_attention_heads, num_key_value_heads, intermediate_size"
    no_class = (
        "no class is known that builds blocks of different widths for type 'gemma3_text', as there is for " + KNOWN
    )
    for form, reasons in {
        "auto": f"stock: {differ}; per_layer: {no_class}",
        "stock": f"stock: {differ}",
        "per_layer": f"per_layer: {no_class}",
    }.items():
        with pytest.raises(ConfigError) as error:
            export_shrunk(model, out, form=form)
        assert message(error) == (
            f"Gemma3ForCausalLM: form='{form}' cannot hold this model ({reasons}). Make all blocks equally wide, or "
            "use form='padded'."
        )
    assert not out.exists()
    assert export_shrunk(model, out, form="padded").architecture == "Gemma3ForCausalLM"
    assert torch.allclose(logits_of(load(out)), logits_of(model), rtol=0, atol=1e-5)


def test_a_declared_type_that_transformers_does_not_know_is_refused(out, monkeypatch):
    class MyConfig(LlamaConfig):
        model_type = "mine"

    monkeypatch.setitem(STRUCTURES, "mine", Structure())
    with pytest.raises(ConfigError) as error:
        export_shrunk(LlamaForCausalLM(MyConfig(**CONFIGS["llama"])), out)
    assert message(error) == (
        "LlamaForCausalLM: models of type 'mine' cannot be exported, for transformers has no causal language model of "
        f"this type. Of other types, {KNOWN} take every form."
    )


@pytest.mark.parametrize(
    ("kept", "reason"),
    [
        (
            4,
            "StableLmForCausalLM has 1 query heads of 16 for each KV head in model.layers.0, and the model has 1 of 8",
        ),
        (
            6,
            "the model of StableLmConfig refuses: hidden_size must be divisible by num_heads (got `hidden_size`: 64 "
            "and `num_heads`: 6)",
        ),
    ],
)
def test_heads_that_a_declared_family_would_build_in_another_size_are_refused(kept, reason, out, monkeypatch):
    monkeypatch.setitem(STRUCTURES, "stablelm", Structure(norm="layer"))  # whose config has no size of a head
    settings = {"hidden_size": 64, "num_attention_heads": 8, "num_key_value_heads": 8, "num_hidden_layers": 2}
    config = AutoConfig.for_model("stablelm", vocab_size=64, intermediate_size=32, **settings)
    model = AutoModelForCausalLM.from_config(config).eval()
    remove_units(model, {axis.name: torch.arange(8) < kept for axis in find_axes(model, ("kv_head",))})
    with pytest.raises(ConfigError) as error:
        export_shrunk(model, out, form="stock")
    assert message(error) == (
        f"StableLmForCausalLM: form='stock' cannot hold this model (stablelm: {reason}). Remove only what the config "
        "of its family can say, or use form='padded'."
    )
    assert not out.exists()
    assert export_shrunk(model, out, form="padded").widths[0]["num_attention_heads"] == 8
    assert torch.allclose(logits_of(load(out)), logits_of(model), rtol=0, atol=1e-5)


# --- the folder -----------------------------------------------------------------------------------------------


def test_the_folder_holds_what_from_pretrained_reads_and_no_pickle(uneven, out, tiny_tokenizer):
    generation = GenerationConfig(max_new_tokens=3, do_sample=False)
    export_shrunk(uneven, out, tokenizer=tiny_tokenizer, generation_config=generation, remote_code=True)
    assert sorted(path.name for path in out.iterdir()) == [
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "shrunk_models.py",
        "tokenizer.json",
        "tokenizer_config.json",
    ]
    assert load(out).generation_config.max_new_tokens == 3
    assert AutoTokenizer.from_pretrained(out)("hi").input_ids == tiny_tokenizer("hi").input_ids
    config = json.loads((out / "config.json").read_text())
    assert config["auto_map"]["AutoModelForCausalLM"] == "shrunk_models.ShrunkLlamaForCausalLM"
    assert config["architectures"] == ["ShrunkLlamaForCausalLM"] and config["dtype"] == "float32"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_other_dtypes_stay_and_weights_are_cut_into_files(dtype, out):
    model = shrunk_model("llama", even=False)
    for parameter in model.parameters():  # alone, as from_pretrained does: rotary frequencies stay float32
        parameter.data = parameter.data.to(dtype)
    result = export_shrunk(model, out, max_shard_size="4KB")
    files = sorted(out.glob("*.safetensors"))
    assert len(files) > 2 and (out / "model.safetensors.index.json").exists()
    stored = {}
    for file in files:
        with safe_open(file, "pt") as opened:
            stored |= {name: opened.get_tensor(name) for name in opened.keys()}
    assert sum(tensor.nbytes for tensor in stored.values()) == result.total_bytes
    loaded = load(out)
    assert loaded.dtype == dtype
    assert all(torch.equal(tensor, loaded.state_dict()[name]) for name, tensor in stored.items())
    assert torch.equal(logits_of(loaded), logits_of(model))


def test_fresh_processes_open_every_form_without_this_package_but_the_one_that_needs_it(uneven, tmp_path):
    export_shrunk(llama_with_six_of_eight_heads(), tmp_path / "stock")
    export_shrunk(uneven, tmp_path / "remote", remote_code=True)
    export_shrunk(uneven, tmp_path / "per_layer")
    torch.save(tokens(length=9), tmp_path / "ids.pt")
    program = """
import sys, torch
from pathlib import Path
from transformers import AutoModelForCausalLM
folder = Path(sys.argv[1])
def save(name, **options):
    model = AutoModelForCausalLM.from_pretrained(folder / name, **options).eval()
    with torch.no_grad():
        torch.save(model(torch.load(folder / "ids.pt")).logits, folder / f"{name}.pt")
    return model
save("stock")
remote = save("remote", trust_remote_code=True)
remote.save_pretrained(folder / "again")
save("again", trust_remote_code=True)
try:
    save("per_layer")
except ValueError as error:
    assert "shrunk_llama" in str(error), error
else:
    raise AssertionError("transformers alone opened it")
assert "hf_adaptive_sparse" not in sys.modules
import hf_adaptive_sparse
save("per_layer")
"""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_MODULES_CACHE": str(tmp_path / "modules")}
    done = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path)], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    expected = logits_of(uneven)
    for name in ("remote", "again", "per_layer"):
        torch.testing.assert_close(torch.load(tmp_path / f"{name}.pt"), expected, rtol=0, atol=1e-6)
    stock = logits_of(llama_with_six_of_eight_heads())
    torch.testing.assert_close(torch.load(tmp_path / "stock.pt"), stock, rtol=0, atol=1e-6)


def test_a_folder_saved_from_the_registered_class_does_not_ask_for_code_that_it_has_not(uneven, tmp_path):
    export_shrunk(uneven, tmp_path / "remote", remote_code=True)
    load(tmp_path / "remote").save_pretrained(tmp_path / "again")
    assert "auto_map" not in json.loads((tmp_path / "again" / "config.json").read_text())
    assert torch.equal(logits_of(load(tmp_path / "again")), logits_of(uneven))


# --- nothing half-written -------------------------------------------------------------------------------------


def test_a_save_that_fails_leaves_nothing(uneven, out, monkeypatch):
    def fail(path, layout, load, metadata):
        Path(path).write_bytes(b"half")
        raise RuntimeError("interrupted")

    monkeypatch.setattr(shrunk_export, "write_tensors", fail)
    with pytest.raises(RuntimeError, match="^interrupted$"):
        export_shrunk(uneven, out)
    assert list(out.parent.iterdir()) == []


def test_a_folder_that_is_not_empty_is_refused_and_replaced_only_when_asked(uneven, out):
    out.mkdir()
    (out / "mine.txt").write_text("keep")
    with pytest.raises(OutputError) as error:
        export_shrunk(uneven, out)
    assert message(error) == (
        f"{out}: the output folder is not empty (mine.txt). Choose another folder, or replace it and all that is in "
        "it with overwrite=True (--overwrite)."
    )
    assert [path.name for path in out.iterdir()] == ["mine.txt"]
    export_shrunk(uneven, out, overwrite=True)
    assert not (out / "mine.txt").exists()


def test_saving_changes_nothing_in_the_model(out):
    model = shrunk_model("llama", even=False)
    config, logits = model.config.to_dict(), logits_of(model)
    for form in ("per_layer", "padded"):
        export_shrunk(model, out, form=form, multiple_of=16, manifest={"kept": {}}, overwrite=True)
    assert model.config.to_dict() == config and torch.equal(logits_of(model), logits)


# --- the manifest ---------------------------------------------------------------------------------------------


@given(keep=st.lists(st.booleans(), max_size=70), seed=st.integers(0, 2**40))
def test_the_manifest_that_is_read_is_the_one_that_was_written(keep, seed):
    indices = [index for index, kept in enumerate(keep) if kept]
    manifest = {"kept": {"a": torch.tensor(keep, dtype=torch.bool), "b": indices}, "seed": seed, "method": "x"}
    stored = json.loads(json.dumps({"pruning_manifest": manifest_to_json(manifest)}))
    assert shrunk_manifest(stored) == {"kept": {"a": indices, "b": indices}, "seed": seed, "method": "x"}


def test_the_manifest_is_kept_in_the_config_through_loading_and_saving_again(uneven, tmp_path):
    manifest = {"kept": {"model.layers.0.mlp": [0, 1, 2, 7, 9, 10]}, "method": "taylor", "parent": "ab12", "seed": 3}
    export_shrunk(uneven, tmp_path / "first", manifest=manifest)
    config = json.loads((tmp_path / "first" / "config.json").read_text())
    assert config["pruning_manifest"]["kept"] == {"model.layers.0.mlp": "0-2,7,9-10"}
    loaded = load(tmp_path / "first")
    assert shrunk_manifest(loaded.config) == manifest
    export_shrunk(loaded, tmp_path / "again", form="padded")
    assert shrunk_manifest(load(tmp_path / "again").config) == manifest
    assert shrunk_manifest(uneven.config) is None


@pytest.mark.parametrize("even", [True, False])
def test_a_manifest_is_not_kept_where_more_units_were_removed_than_it_says(tmp_path, even):
    model = shrunk_model("llama", even=even)
    export_shrunk(model, tmp_path / "first", manifest={"kept": {"model.layers.0.mlp": range(19)}, "seed": 3})
    loaded = load(tmp_path / "first")
    remove_units(loaded, {"model.layers.0.mlp": torch.arange(block_widths(loaded)[0]["intermediate_size"]) > 1})
    export_shrunk(loaded, tmp_path / "again")
    again = load(tmp_path / "again")
    assert block_widths(again) == block_widths(loaded) != block_widths(load(tmp_path / "first"))
    assert shrunk_manifest(again.config) is None
    export_shrunk(loaded, tmp_path / "said", manifest={"kept": {}, "parent": "first"})
    assert shrunk_manifest(load(tmp_path / "said").config) == {"kept": {}, "parent": "first"}


@pytest.mark.parametrize(
    "manifest, expected",
    [
        (
            {"kept": {"model.layers.0.mlp": [3, 1]}},
            "manifest: the units kept of model.layers.0.mlp must be ascending indices from 0, got [3, 1].",
        ),
        (
            {"seed": object},
            "manifest: must be of values that JSON has, got one that it has not (Object of type type is not JSON "
            "serializable).",
        ),
    ],
)
def test_a_manifest_that_cannot_be_kept_is_refused(uneven, out, manifest, expected):
    with pytest.raises(ConfigError) as error:
        export_shrunk(uneven, out, manifest=manifest)
    assert message(error) == expected
    assert not out.exists()


def test_a_manifest_that_was_edited_is_said():
    with pytest.raises(FormatError) as error:
        shrunk_manifest({"pruning_manifest": {"kept": {"a": "0-x"}}})
    assert message(error) == (
        "config.json: pruning_manifest cannot be read (ValueError(\"invalid literal for int() with base 10: 'x'\")). "
        "The file was edited, or is of a later version."
    )


# --- refused --------------------------------------------------------------------------------------------------


def test_settings_that_make_no_sense_are_refused(uneven, out):
    expected = {
        "unknown form 'best'; known: auto, stock, per_layer, padded.": {"form": "best"},
        "multiple_of is the number that MLP widths are multiples of, at least 1, got 0.": {"multiple_of": 0},
        "remote_code: a checkpoint of form 'padded' has no code of its own; LlamaForCausalLM is part of transformers. "
        "Leave remote_code out, or use form='per_layer'.": {"form": "padded", "remote_code": True},
        "LlamaForCausalLM: form='stock' cannot hold this model (stock: its blocks differ in num_attention_heads, "
        "num_key_value_heads, intermediate_size). Use form='per_layer'.": {"form": "stock"},
    }
    for text, settings in expected.items():
        with pytest.raises(ConfigError) as error:
            export_shrunk(uneven, out, **settings)
        assert message(error) == text
    assert not out.exists()


def test_forms_that_a_family_does_not_have_are_refused_with_the_reason(out):
    with pytest.raises(ConfigError) as error:
        export_shrunk(shrunk_model("opt", even=True), out, form="stock")
    assert message(error) == (
        "OPTForCausalLM: form='stock' cannot hold this model (stock: OPTConfig cannot say that 2 heads are 8 wide "
        "each: it divides the hidden size 24 by their number). Use form='per_layer'."
    )
    with pytest.raises(ConfigError) as error:
        export_shrunk(shrunk_model("mixtral", even=False), out, form="padded")
    assert message(error) == (
        "MixtralForCausalLM: form='padded' cannot hold this model (padded: its blocks have different numbers of "
        "experts, and a router would choose one of zeros). Use form='per_layer'."
    )


def test_models_that_are_no_causal_language_models_of_a_known_family_are_refused(out):
    model = AutoModelForSequenceClassification.from_config(tiny_model("llama").config)
    with pytest.raises(ConfigError) as error:
        export_shrunk(model, out)
    assert message(error) == (
        "LlamaForSequenceClassification: only causal language models can be exported, of type 'llama' a "
        "LlamaForCausalLM."
    )
    with pytest.raises(ConfigError) as error:
        export_shrunk(get_peft_model(tiny_model("llama"), LoraConfig()), out)
    assert message(error) == (
        "export_shrunk: this PeftModel has adapters in it. Call merge_and_unload() on it first, and save what it "
        "returns."
    )


def test_layers_removed_by_hand_are_refused_where_the_config_has_a_type_for_each(out):
    model = unit_model("gemma2")
    del model.model.layers[1]
    with pytest.raises(ConfigError) as error:
        export_shrunk(model, out)
    assert message(error) == (
        "Gemma2ForCausalLM: its config has layer_types for 3 layers, and it has 2. Remove layers with remove_units, "
        "which keeps the two together."
    )
