"""Saving packed and dense, opening with from_pretrained: the same logits to the last bit, everywhere."""

from __future__ import annotations

import contextlib
import json
import os
import re
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors import safe_open
from torch import nn
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer
from transformers.pytorch_utils import Conv1D
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING

from hf_adaptive_sparse.errors import ConfigError, FormatError, OutputError, PatternError, TargetError
from hf_adaptive_sparse.formats import FORMATS
from hf_adaptive_sparse.hf import quantizer, tensor_files
from hf_adaptive_sparse.hf.integrity import reseal
from hf_adaptive_sparse.hf.packed_modules import packed_modules, set_packed_backend
from hf_adaptive_sparse.hf.pretrained import save_dense, save_packed
from hf_adaptive_sparse.hf.quantizer import AdaptiveSparseQuantizationConfig, loading_options
from hf_adaptive_sparse.layers import PackedLinear

from ..tiny_models import tokens
from .test_files import full_disk_message, in_a_limited_child
from .two_four_models import logits_of, prune, two_four_model

ROOT = Path(__file__).parents[2]
every_family = pytest.mark.parametrize("family", ["llama", "gpt2", "qwen2", "opt", "gpt_neox", "mixtral"])
MISSING_WEIGHTS = "Error no file named model.safetensors, or pytorch_model.bin, found in directory {}."


def load(folder, **options):
    return AutoModelForCausalLM.from_pretrained(folder, **options)


@pytest.fixture
def out(tmp_path):
    return tmp_path / "out"


@pytest.fixture(scope="module")
def llama():
    return two_four_model("llama", torch.bfloat16)


@pytest.fixture
def packed(llama, out):
    """A packed folder of `llama`."""
    save_packed(llama, out)
    return out


# --- the promise ----------------------------------------------------------------------------------------------


@every_family
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shard", ["5GB", "8KB"])
def test_the_logits_after_reloading_are_those_of_the_saved_model_bit_by_bit(family, dtype, shard, out):
    model = two_four_model(family, dtype)
    expected = logits_of(model)
    saved = save_packed(model, out, max_shard_size=shard)
    assert torch.equal(logits_of(model), expected)  # saving changed nothing
    reloaded = load(out)
    assert reloaded.dtype == dtype
    assert torch.equal(logits_of(reloaded), expected)
    assert set(packed_modules(reloaded)) == set(saved.modules)
    set_packed_backend(reloaded, "packed")
    assert torch.equal(logits_of(reloaded), expected)


@every_family
def test_every_way_on_from_a_loaded_model_keeps_the_logits(family, tmp_path):
    model = two_four_model(family, torch.bfloat16)
    expected = logits_of(model)
    save_packed(model, tmp_path / "first")
    for backend in ("dense", "packed"):
        with loading_options(backend=backend):
            reloaded = load(tmp_path / "first")
        save_packed(reloaded, tmp_path / backend / "again")
        assert torch.equal(logits_of(load(tmp_path / backend / "again")), expected)
        first, again = (sorted((tmp_path / name).glob("*.safetensors")) for name in ("first", f"{backend}/again"))
        assert [file.read_bytes() for file in first] == [file.read_bytes() for file in again]
        save_dense(reloaded, tmp_path / backend / "dense")
        assert torch.equal(logits_of(load(tmp_path / backend / "dense")), expected)
        assert torch.equal(logits_of(reloaded), expected)
        dense = reloaded.dequantize()
        assert not packed_modules(dense) and torch.equal(logits_of(dense), expected)
        dense.save_pretrained(tmp_path / backend / "plain")
        assert torch.equal(logits_of(load(tmp_path / backend / "plain")), expected)


@pytest.mark.parametrize("dtype, ratio", [(torch.bfloat16, 0.5625), (torch.float16, 0.5625), (torch.float32, 0.53125)])
def test_every_packed_layer_takes_exactly_the_promised_part_of_its_dense_bytes(dtype, ratio, out):
    model = two_four_model("llama", dtype)
    saved = save_packed(model, out)
    assert len(saved.modules) == 14 and saved.skipped == {"lm_head": "is not 2:4: row 0, group 0 has 4 non-zeros"}
    with safe_open(out / "model.sparse24.safetensors", "pt") as file:
        stored = {name: file.get_tensor(name).nbytes for name in file.keys()}
    for name in saved.modules:
        dense_bytes = model.get_submodule(name).weight.nbytes
        assert stored[f"{name}.weight_values"] + stored[f"{name}.weight_meta"] == ratio * dense_bytes
    assert saved.module_bytes == ratio * saved.module_dense_bytes
    assert saved.total_bytes == sum(stored.values())
    assert saved.total_dense_bytes == sum(parameter.nbytes for parameter in model.parameters())


def test_the_file_holds_what_the_format_says_and_the_library_reads_it(llama, packed):
    name = "model.layers.1.mlp.down_proj"
    with safe_open(packed / "model.sparse24.safetensors", "pt") as file:
        values, meta = file.get_tensor(f"{name}.weight_values"), file.get_tensor(f"{name}.weight_meta")
        assert file.metadata()["adaptive_sparse_format"] == "1" and file.metadata()["format"] == "pt"
    expected = FORMATS["2:4"].pack(llama.get_submodule(name).weight)
    assert torch.equal(values, expected[0]) and torch.equal(meta, expected[1])


def test_the_configuration_says_what_is_packed(llama, packed):
    block = json.loads((packed / "config.json").read_text())["quantization_config"]
    digest = block.pop("tensor_digest")
    assert re.fullmatch("[0-9a-f]{32}", digest)
    assert block.pop("producer")["package"] == "hf_adaptive_sparse"
    layers = ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"]
    layers += ["mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"]
    assert block == {
        "quant_method": "adaptive_sparse",
        "format_version": 1,
        "pattern": "2:4",
        "axis": "in",
        "group": 4,
        "index_encoding": "nibble2x2",
        "value_dtype": "bfloat16",
        "weights_file": "model.sparse24.safetensors",
        "modules": [f"model.layers.{index}.{layer}" for index in range(2) for layer in layers],
    }


@pytest.mark.parametrize("shard", ["5GB", "8KB"])
def test_no_file_has_a_name_that_transformers_looks_for(llama, out, shard):
    save_packed(llama, out, max_shard_size=shard)
    names = {path.name for path in out.iterdir()}
    assert not [name for name in names if name.startswith(("model.safetensors", "model-", "pytorch_model"))]
    assert {"config.json", "generation_config.json"} < names
    weights = [name for name in names if "safetensors" in name]
    if shard == "5GB":
        assert weights == ["model.sparse24.safetensors"]
    else:
        assert "model.sparse24.safetensors.index.json" in weights and len(weights) > 3
        assert all(re.fullmatch(r"model\.sparse24(-\d{5}-of-\d{5})?\.safetensors(\.index\.json)?", n) for n in weights)


def test_the_size_of_a_shard_is_respected(llama, out):
    save_packed(llama, out, max_shard_size="8KB")
    for file in out.glob("*.safetensors"):
        tensors, _ = tensor_files.read_header(file)
        assert sum(tensor.nbytes for tensor in tensors.values()) <= 8000 or len(tensors) == 1


def test_without_the_package_transformers_fails_loudly_and_with_it_the_folder_opens(llama, tmp_path):
    save_packed(llama, tmp_path / "single")
    save_packed(llama, tmp_path / "sharded", max_shard_size="8KB")
    save_dense(llama, tmp_path / "dense")
    torch.save(tokens(), tmp_path / "tokens.pt")
    code = """
        import sys, torch, transformers
        load, found = transformers.AutoModelForCausalLM.from_pretrained, {}
        for name in ("single", "sharded"):
            try:
                load(name)
            except OSError as error:
                print("OSError:", error)
        ids = torch.load("tokens.pt")
        with torch.no_grad():
            found["dense"] = load("dense")(ids).logits
            assert "hf_adaptive_sparse" not in sys.modules
            import hf_adaptive_sparse
            for name in ("single", "sharded"):
                found[name] = load(name)(ids).logits
        torch.save(found, "found.pt")
    """
    run = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        env={**os.environ, "PYTHONPATH": str(ROOT), "PYTHONSAFEPATH": "1"},
        capture_output=True,
        text=True,
        cwd=tmp_path,
    )
    assert run.returncode == 0, run.stderr
    assert run.stdout.splitlines() == [f"OSError: {MISSING_WEIGHTS.format(name)}" for name in ("single", "sharded")]
    for logits in torch.load(tmp_path / "found.pt").values():
        assert torch.equal(logits, logits_of(llama))


def test_registering_again_is_harmless_and_the_last_one_counts():
    for _ in range(2):
        quantizer.register()
    assert AUTO_QUANTIZER_MAPPING["adaptive_sparse"] is quantizer.AdaptiveSparseQuantizer
    assert AUTO_QUANTIZATION_CONFIG_MAPPING["adaptive_sparse"] is AdaptiveSparseQuantizationConfig


# --- which layers ---------------------------------------------------------------------------------------------


def test_tied_embeddings_are_never_packed_even_if_they_are_two_four(out):
    model = two_four_model("llama", tie_word_embeddings=True)
    weight = model.get_input_embeddings().weight
    weight.data[:, 2:4] = weight.data[:, 6:8] = 0
    weight.data.view(-1, 8)[:, [2, 3, 6, 7]] = 0
    assert FORMATS["2:4"].pack(weight)
    saved = save_packed(model, out)
    assert saved.skipped == {"lm_head": "shares its weight with another layer"}
    reloaded = load(out)
    assert torch.equal(logits_of(reloaded), logits_of(model))
    assert reloaded.lm_head.weight is reloaded.get_input_embeddings().weight


def test_an_untied_head_that_is_two_four_is_packed(out):
    model = two_four_model("llama")
    prune(model.lm_head)
    assert "lm_head" in save_packed(model, out).modules
    assert torch.equal(logits_of(load(out)), logits_of(model))


def test_a_head_that_should_be_tied_and_is_not_is_saved_as_it_is(out):
    model = two_four_model("llama", tie_word_embeddings=True)
    model.lm_head.weight = nn.Parameter(torch.randn_like(model.lm_head.weight))
    prune(model.lm_head)
    expected = logits_of(model)
    assert save_packed(model, out).skipped == {"lm_head": "shares its weight with another layer"}
    assert torch.equal(logits_of(load(out)), expected)


def test_layers_that_share_one_weight_stay_dense(out):
    model = two_four_model("llama")
    first, second = model.model.layers
    second.mlp.up_proj.weight = first.mlp.up_proj.weight
    skipped = save_packed(model, out).skipped
    assert {name for name, why in skipped.items() if why == "shares its weight with another layer"} == {
        "model.layers.0.mlp.up_proj",
        "model.layers.1.mlp.up_proj",
    }
    assert torch.equal(logits_of(load(out)), logits_of(model))


def test_layers_that_do_not_fit_stay_dense_and_are_named(out):
    class Special(nn.Linear):
        pass

    model = two_four_model("llama", intermediate_size=44)
    layer = model.model.layers[0].self_attn
    layer.q_proj.weight.data[3, 4:8] = 1
    special = Special(32, 16, bias=False)
    special.weight = layer.k_proj.weight
    layer.k_proj = special
    saved = save_packed(model, out)
    assert saved.skipped == {
        "model.layers.0.self_attn.q_proj": "is not 2:4: row 3, group 1 has 4 non-zeros",
        "model.layers.0.self_attn.k_proj": "is a Special, which may compute something else",
        "model.layers.0.mlp.down_proj": "has 44 input features, which is no multiple of 8",
        "model.layers.1.mlp.down_proj": "has 44 input features, which is no multiple of 8",
        "lm_head": "is not 2:4: row 0, group 0 has 4 non-zeros",
    }
    assert torch.equal(logits_of(load(out)), logits_of(model))


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_only_the_layers_asked_for_are_packed(family, tmp_path):
    model = two_four_model(family)
    every = save_packed(model, tmp_path / "all").modules
    saved = save_packed(model, tmp_path / "some", modules=every[1:3])
    assert saved.modules == every[1:3] and saved.skipped[every[0]] == "is not asked for in `modules`"
    reloaded = load(tmp_path / "some")
    assert set(packed_modules(reloaded)) == set(every[1:3])
    assert torch.equal(logits_of(reloaded), logits_of(model))
    # and some of a model that has all packed
    with loading_options(backend="packed"):
        fewer = load(tmp_path / "all")
    save_packed(fewer, tmp_path / "fewer", modules=every[1:3])
    assert torch.equal(logits_of(load(tmp_path / "fewer")), logits_of(model))


def test_experts_that_are_no_linear_layers_stay_dense(out):
    saved = save_packed(two_four_model("mixtral"), out)
    assert not [name for name in (*saved.modules, *saved.skipped) if "expert" in name]


@pytest.mark.parametrize("negative", [-0.0, 0.0])
def test_negative_zeros_are_written_nowhere(out, tmp_path, negative):
    model = two_four_model("gpt2")
    for module in model.modules():
        if isinstance(module, Conv1D):
            module.weight.data[module.weight.data == 0] = negative
    expected = logits_of(model)
    save_packed(model, out)
    save_dense(model, tmp_path / "dense")
    for folder in (out, tmp_path / "dense"):
        reloaded = load(folder)
        assert torch.equal(logits_of(reloaded), expected)
        for name, weight in reloaded.named_parameters():
            assert not (weight.signbit() & (weight == 0)).any(), name


# --- dense ----------------------------------------------------------------------------------------------------


@every_family
@pytest.mark.parametrize("shard", ["5GB", "8KB"])
def test_the_dense_folder_is_an_ordinary_one_with_zeros(family, shard, out, tmp_path):
    model = two_four_model(family, torch.bfloat16)
    saved = save_dense(model, out, max_shard_size=shard, provenance={"steps": 7})
    model.save_pretrained(tmp_path / "plain", max_shard_size=shard)
    names = {path.name for path in out.iterdir()}
    assert names == {path.name for path in (tmp_path / "plain").iterdir()}
    config = json.loads((out / "config.json").read_text())
    about = config.pop("adaptive_sparse")
    assert about.pop("producer")["package"] == "hf_adaptive_sparse"
    assert about == {"pattern": "2:4", "modules": list(saved.modules), "steps": 7}
    assert config == json.loads((tmp_path / "plain" / "config.json").read_text())
    assert saved.module_bytes == saved.module_dense_bytes and saved.total_bytes == saved.total_dense_bytes
    assert torch.equal(logits_of(load(out)), logits_of(model))


def test_a_dense_model_can_be_saved_dense_too(out):
    from ..tiny_models import tiny_model

    saved = save_dense(tiny_model(), out)
    assert saved.modules == () and len(saved.skipped) == 15


def test_provenance_is_kept_through_every_way_of_saving(llama, tmp_path):
    save_packed(llama, tmp_path / "packed", provenance={"base": "me/model", "steps": 7})
    model = load(tmp_path / "packed")
    assert model.config.adaptive_sparse == {"base": "me/model", "steps": 7}
    save_dense(model, tmp_path / "dense", provenance={"steps": 8})
    about = json.loads((tmp_path / "dense" / "config.json").read_text())["adaptive_sparse"]
    assert about["base"] == "me/model" and about["steps"] == 8
    assert not hasattr(llama.config, "adaptive_sparse") and model.config.adaptive_sparse["steps"] == 7


# --- refusals -------------------------------------------------------------------------------------------------


def test_a_model_without_two_four_layers_is_refused(out):
    from ..tiny_models import tiny_model

    with pytest.raises(PatternError) as error:
        save_packed(tiny_model(), out)
    assert str(error.value) == (
        "LlamaForCausalLM: none of its 15 linear layers can be packed. model.layers.0.self_attn.q_proj is not 2:4: row "
        "0, group 0 has 4 non-zeros. Train or prune the model to 2:4 first, or use save_dense."
    )
    assert not out.exists()


@pytest.mark.parametrize("save", [save_packed, save_dense])
def test_adapters_must_be_merged_first(save, out):
    model = get_peft_model(two_four_model(), LoraConfig(target_modules=["q_proj"]))
    for unmerged, name in ((model, "PeftModelForCausalLM"), (model.get_base_model(), "LlamaForCausalLM")):
        if name.startswith("Peft"):
            name = type(model).__name__
        with pytest.raises(ConfigError) as error:
            save(unmerged, out)
        assert str(error.value) == (
            f"{save.__name__}: this {name} has adapters in it. Call merge_and_unload() on it first, and save what it "
            f"returns."
        )
    save(model.merge_and_unload(), out)


@pytest.mark.parametrize("save", [save_packed, save_dense])
def test_only_models_of_transformers_are_saved(save, out):
    with pytest.raises(ConfigError) as error:
        save(nn.Linear(8, 8), out)
    assert str(error.value) == f"{save.__name__}: saves models of transformers, got a Linear."


def test_a_name_that_is_no_linear_layer_is_refused_with_the_closest(out):
    with pytest.raises(TargetError) as error:
        save_packed(two_four_model(), out, modules=["model.layers.0.mlp.up_porj"])
    assert str(error.value) == (
        "model.layers.0.mlp.up_porj: is not a linear layer of LlamaForCausalLM; the closest are "
        "model.layers.0.mlp.up_proj, model.layers.1.mlp.up_proj, model.layers.0.mlp.gate_proj."
    )


def test_a_layer_asked_for_that_is_not_two_four_is_refused(out):
    with pytest.raises(PatternError) as error:
        save_packed(two_four_model(), out, modules=["lm_head"])
    assert str(error.value) == (
        "lm_head: cannot be packed: it is not 2:4: row 0, group 0 has 4 non-zeros. Remove it from `modules`."
    )


def test_nan_in_a_layer_stops_the_save_and_leaves_nothing(out):
    model = two_four_model()
    model.model.layers[1].mlp.up_proj.weight.data[5, 8:12] = torch.tensor([0, float("inf"), 0, 0])
    with pytest.raises(PatternError) as error:
        save_packed(model, out)
    assert str(error.value) == (
        "model.layers.1.mlp.up_proj: row 5, group 2 holds inf. A checkpoint with NaN or inf is not written; go back "
        "to the last good weights."
    )
    assert list(out.parent.iterdir()) == []


@pytest.mark.parametrize("save", [save_packed, save_dense])
def test_a_folder_that_is_not_empty_is_kept_unless_told_otherwise(llama, save, out):
    out.mkdir()
    (out / "mine.txt").touch()
    with pytest.raises(OutputError) as error:
        save(llama, out)
    assert str(error.value) == (
        f"{out}: the output folder is not empty (mine.txt). Choose another folder, or replace it and all that is in it "
        f"with overwrite=True (--overwrite)."
    )
    save(llama, out, overwrite=True)
    assert not (out / "mine.txt").exists()
    assert torch.equal(logits_of(load(out)), logits_of(llama))


@pytest.mark.parametrize("save", [save_packed, save_dense])
def test_a_real_full_disk_is_said_and_leaves_nothing(save, llama, tmp_path):
    found = in_a_limited_child(lambda: save(llama, tmp_path / "x" / "out"), 20_000)
    assert found == (0, full_disk_message(tmp_path / "x" / "out"))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("save", [save_packed, save_dense])
def test_a_failure_in_the_middle_leaves_the_old_folder(llama, save, out, monkeypatch):
    save(llama, out)
    before = {path.name: path.read_bytes() for path in out.iterdir()}

    def fail(*arguments, **options):
        raise RuntimeError("in the middle")

    target = "hf_adaptive_sparse.hf.pretrained." + ("write_tensors" if save is save_packed else "_save_config")
    monkeypatch.setattr(target, fail)
    with pytest.raises(RuntimeError, match="in the middle"):
        save(llama, out, overwrite=True)
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before
    assert [path.name for path in out.parent.iterdir()] == ["out"]


@pytest.mark.parametrize("backend", ["dense", "packed"])
def test_save_pretrained_of_a_packed_model_is_refused(packed, tmp_path, backend):
    with loading_options(backend=backend):
        model = load(packed)
    with pytest.raises(OutputError) as error:
        model.save_pretrained(tmp_path / "unguarded")
    assert str(error.value) == (
        "save_pretrained would write the packed model as model.safetensors, which transformers opens as random weights "
        "where hf_adaptive_sparse is not imported. Use save_packed(model, folder) or save_dense(model, folder) of "
        "hf_adaptive_sparse."
    )
    assert not list((tmp_path / "unguarded").glob("*"))


def test_a_dense_model_cannot_be_packed_by_loading_it(out):
    two_four_model().save_pretrained(out)
    with pytest.raises(ValueError, match="adaptive_sparse does require the model to be pre-quantized"):
        load(out, quantization_config=AdaptiveSparseQuantizationConfig(modules=["lm_head"]))


# --- loading options ------------------------------------------------------------------------------------------


def test_the_dense_backend_is_the_default_and_takes_the_memory_of_a_dense_model(llama, packed):
    model = load(packed)
    assert {module.backend for module in packed_modules(model).values()} == {"dense"}
    assert model.get_memory_footprint() == llama.get_memory_footprint()
    assert model.num_parameters() == llama.num_parameters()
    assert set(model.state_dict()) == set(llama.state_dict())


def test_the_packed_backend_never_expands_while_loading(packed, monkeypatch):
    def fail(*arguments):
        raise AssertionError("expanded")

    with loading_options(backend="packed"):
        monkeypatch.setattr("hf_adaptive_sparse.layers._expand", fail)
        model = load(packed)
    assert {module.backend for module in packed_modules(model).values()} == {"packed"}
    modules = packed_modules(model).values()
    held = sum(module.weight_values.nbytes + module.weight_meta.nbytes for module in modules)
    assert held == 0.5625 * sum(2 * module.in_features * module.out_features for module in modules)


def test_the_backend_can_be_changed_and_unknown_ones_are_refused(packed):
    model = load(packed)
    assert set_packed_backend(model, "packed") == 14
    with pytest.raises(ConfigError) as error:
        set_packed_backend(model, "fast")
    assert str(error.value) == "unknown backend 'fast'; known: dense, packed."
    with pytest.raises(ConfigError) as error, loading_options(backend="fast"):
        pass
    assert str(error.value) == "unknown backend 'fast'; known: dense, packed."
    with pytest.raises(TargetError) as error:
        set_packed_backend(two_four_model(), "packed")
    assert str(error.value) == "LlamaForCausalLM has no packed layers; loading a packed folder makes them."


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_another_dtype_can_be_asked_for(family, dtype, tmp_path):
    model = two_four_model(family, torch.bfloat16)
    save_packed(model, tmp_path / "packed")
    save_dense(model, tmp_path / "dense")
    reloaded = load(tmp_path / "packed", dtype=dtype)
    assert {parameter.dtype for parameter in reloaded.parameters()} == {dtype}
    assert torch.equal(logits_of(reloaded), logits_of(load(tmp_path / "dense", dtype=dtype)))


def test_a_model_of_mixed_dtypes_comes_back_as_it_was(out):
    model = two_four_model("llama", torch.bfloat16)
    model.model.norm.float()
    model.model.layers[0].mlp.up_proj.float()
    dtypes = {name: parameter.dtype for name, parameter in model.named_parameters()}
    save_packed(model, out)
    reloaded = load(out)
    assert {name: parameter.dtype for name, parameter in reloaded.named_parameters()} == dtypes
    assert all(torch.equal(value, reloaded.state_dict()[name]) for name, value in model.state_dict().items())
    half = load(out, dtype=torch.float16)
    assert {parameter.dtype for parameter in half.parameters()} == {torch.float16}


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("device_map", ["cpu", "auto", "mixed"])
@pytest.mark.parametrize("backend", ["dense", "packed"])
def test_device_maps_and_offloading_work(family, device_map, backend, tmp_path):
    model = two_four_model(family, torch.bfloat16)
    save_packed(model, tmp_path / "packed")
    if device_map == "mixed":
        block, rest = ("transformer.h.1", "transformer") if family == "gpt2" else ("model.layers.1", "model")
        children = {name for name, _ in model.named_modules() if name.count(".") == rest.count(".") + 1}
        stacks = {block.rpartition(".")[0]}
        device_map = dict.fromkeys(
            {name for name in children if name.startswith(rest)} - stacks | {block.replace("1", "0"), "lm_head"}, "cpu"
        )
        device_map[block] = "disk"
    with loading_options(backend=backend):
        reloaded = load(tmp_path / "packed", device_map=device_map, offload_folder=str(tmp_path / "offload"))
    torch.testing.assert_close(logits_of(reloaded), logits_of(model), rtol=0, atol=0 if family == "llama" else 1e-2)
    if isinstance(device_map, dict):
        offloaded = packed_modules(reloaded.get_submodule(block))
        assert {module.backend for module in offloaded.values()} == {"packed"}
        with pytest.raises(ConfigError) as error:
            reloaded.dequantize()
        first = next(name for name in packed_modules(reloaded) if name.startswith(block))
        assert str(error.value) == (
            f"{first}: is offloaded, so it stays packed and is expanded at every call. Load the model with a "
            f"device_map that keeps it in memory."
        )
    save_packed(reloaded, tmp_path / "again")
    assert torch.equal(logits_of(load(tmp_path / "again")), logits_of(model))


def test_it_loads_from_a_subfolder(llama, tmp_path):
    save_packed(llama, tmp_path / "repo" / "sparse24")
    model = load(tmp_path / "repo", subfolder="sparse24")
    assert torch.equal(logits_of(model), logits_of(llama))


def test_the_base_model_and_a_classifier_can_be_loaded_from_it(llama, packed):
    base = AutoModel.from_pretrained(packed)
    assert len(packed_modules(base)) == 14
    with torch.no_grad():
        expected = llama.model(tokens()).last_hidden_state
        assert torch.equal(base(tokens()).last_hidden_state, expected)
    classifier = AutoModelForSequenceClassification.from_pretrained(packed, num_labels=3)
    with torch.no_grad():
        assert torch.equal(classifier.model(tokens()).last_hidden_state, expected)


def test_the_tokenizer_is_saved_beside_the_model(llama, tiny_tokenizer, tmp_path):
    for save in (save_packed, save_dense):
        save(llama, tmp_path / save.__name__, tokenizer=tiny_tokenizer)
        tokenizer = AutoTokenizer.from_pretrained(tmp_path / save.__name__)
        assert tokenizer("hello").input_ids == tiny_tokenizer("hello").input_ids
        load(tmp_path / save.__name__)


# --- using a loaded model -------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["dense", "packed"])
def test_it_generates_the_same_text(llama, packed, backend):
    with loading_options(backend=backend):
        model = load(packed)
    options = dict(max_new_tokens=8, do_sample=False, min_new_tokens=8)
    assert torch.equal(model.generate(tokens(), **options), llama.generate(tokens(), **options))


@pytest.mark.parametrize("backend", ["dense", "packed"])
def test_it_compiles_without_breaks(llama, packed, backend):
    with loading_options(backend=backend):
        model = load(packed)
    torch.compiler.reset()
    compiled = torch.compile(lambda ids: model(ids, use_cache=False).logits, fullgraph=True, backend="eager")
    with torch.no_grad():
        assert torch.equal(compiled(tokens()), llama(tokens(), use_cache=False).logits)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("backend", ["dense", "packed"])
def test_a_lora_adapter_trains_saves_and_loads_on_top(family, backend, tmp_path):
    save_packed(two_four_model(family), tmp_path / "packed")
    targets = ["c_attn", "c_fc"] if family == "gpt2" else ["q_proj", "down_proj"]

    def base():
        with loading_options(backend=backend):
            return load(tmp_path / "packed")

    model = get_peft_model(base(), LoraConfig(target_modules=targets, task_type="CAUSAL_LM"))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(3):
        model(tokens(), labels=tokens()).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.eval()
    expected = logits_of(model)
    assert not torch.equal(expected, logits_of(base()))
    model.save_pretrained(tmp_path / "adapter")
    assert torch.equal(logits_of(PeftModel.from_pretrained(base(), tmp_path / "adapter")), expected)
    if backend == "packed":
        with pytest.raises(ConfigError, match="^the weight of a packed layer is read-only"):
            model.merge_and_unload()
        set_packed_backend(model, "dense")
    merged = model.merge_and_unload()
    torch.testing.assert_close(logits_of(merged), expected, rtol=1e-3, atol=1e-3)
    save_dense(merged, tmp_path / "merged")
    assert torch.equal(logits_of(load(tmp_path / "merged")), logits_of(merged))
    saved = save_packed(merged, tmp_path / "partly")  # what the adapter did not touch is still 2:4
    assert not [name for name in saved.modules if name.endswith(tuple(targets))]
    assert torch.equal(logits_of(load(tmp_path / "partly")), logits_of(merged))


def test_the_trainer_accepts_adapters_on_a_packed_base(packed, tmp_path):
    from transformers import Trainer, TrainingArguments

    model = get_peft_model(load(packed), LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM"))
    data = [{"input_ids": ids, "labels": ids} for ids in tokens(batch=4)]
    arguments = TrainingArguments(tmp_path / "run", max_steps=2, use_cpu=True, report_to="none", save_steps=1)
    Trainer(model, arguments, train_dataset=data).train()
    assert not list((tmp_path / "run").rglob("model*.safetensors"))  # checkpoints hold the adapter alone


def test_a_native_adapter_is_saved_without_the_base(packed, tmp_path):
    model = load(packed)
    model.add_adapter(LoraConfig(target_modules=["q_proj"]))
    model.save_pretrained(tmp_path / "adapter")
    assert sorted(path.name for path in (tmp_path / "adapter").glob("*.safetensors")) == ["adapter_model.safetensors"]


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_gradients_reach_the_embeddings_through_packed_layers(family, tmp_path):
    model = two_four_model(family)
    save_packed(model, tmp_path / "packed")
    gradients = []
    for backend in ("dense", "packed"):
        with loading_options(backend=backend):
            reloaded = load(tmp_path / "packed")
        reloaded(tokens(), labels=tokens()).loss.backward()
        gradients.append(reloaded.get_input_embeddings().weight.grad)
    model(tokens(), labels=tokens()).loss.backward()
    assert torch.equal(gradients[0], model.get_input_embeddings().weight.grad)
    assert torch.equal(gradients[1], model.get_input_embeddings().weight.grad)


def test_dequantize_gives_back_the_classes_of_the_architecture_and_takes_a_dtype(tmp_path):
    for family, kind in (("llama", nn.Linear), ("gpt2", Conv1D)):
        model = two_four_model(family, torch.bfloat16)
        saved = save_packed(model, tmp_path / family)
        dense = load(tmp_path / family).dequantize(dtype=torch.float32)
        assert {type(dense.get_submodule(name)) for name in saved.modules} == {kind}
        assert {parameter.dtype for parameter in dense.parameters()} == {torch.float32}
        assert all(parameter.requires_grad for parameter in dense.parameters())
        assert not hasattr(dense.config, "quantization_config")
        weights = {name: value.float() for name, value in model.state_dict().items()}
        assert all(torch.equal(value, weights[name]) for name, value in dense.state_dict().items())


def test_a_layer_that_was_written_to_is_no_longer_packed_when_saved(packed, tmp_path):
    model = load(packed)
    model.model.layers[0].mlp.up_proj.weight.data += 1
    saved = save_packed(model, tmp_path / "again")
    assert saved.skipped["model.layers.0.mlp.up_proj"] == "is not 2:4: row 0, group 0 has 4 non-zeros"
    assert torch.equal(logits_of(load(tmp_path / "again")), logits_of(model))
    with pytest.raises(PatternError, match="^model.layers.0.mlp.up_proj: row 0, group 0 "):
        set_packed_backend(model, "packed")


# --- the configuration ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "key, value, known",
    [
        ("format_version", 2, "1"),
        ("format_version", "1", "1"),
        ("format_version", True, "1"),
        ("pattern", "4:8", "'2:4'"),
        ("axis", "out", "'in'"),
        ("group", 8, "4"),
        ("index_encoding", "base6", "'nibble2x2'"),
    ],
)
def test_what_this_version_cannot_read_is_refused(packed, key, value, known):
    edit_config(packed, **{key: value})
    with pytest.raises(FormatError) as error:
        load(packed)
    assert str(error.value) == (
        f"config.json: {key} is {value!r}, this hf_adaptive_sparse reads {known}. Update hf_adaptive_sparse; if that "
        f"does not help, the file is damaged."
    )


@pytest.mark.parametrize("modules", [None, [], "lm_head", [3], {}])
def test_a_configuration_without_modules_is_refused(packed, modules):
    edit_config(packed, modules=modules)
    with pytest.raises(FormatError) as error:
        load(packed)
    assert str(error.value) == "config.json: modules must list the packed modules. The file is damaged."


@pytest.mark.parametrize("name", ["model.safetensors", "../secret.safetensors", None, 3])
def test_only_the_files_of_a_packed_folder_can_be_named_as_weights(packed, name):
    edit_config(packed, weights_file=name)
    with pytest.raises(FormatError) as error:
        load(packed)
    assert str(error.value) == (
        f"config.json: weights_file is {name!r}, must be model.sparse24.safetensors or "
        f"model.sparse24.safetensors.index.json. The file is damaged."
    )


def edit_config(folder: Path, **changes) -> None:
    path = folder / "config.json"
    config = json.loads(path.read_text())
    config["quantization_config"].update(changes)
    path.write_text(json.dumps(config))


def test_unknown_keys_are_ignored_and_kept(packed, tmp_path):
    edit_config(packed, of_the_future={"a": 1})
    reseal(packed)
    save_packed(load(packed), tmp_path / "again")
    block = json.loads((tmp_path / "again" / "config.json").read_text())["quantization_config"]
    assert block["of_the_future"] == {"a": 1}
    config = AutoConfig.from_pretrained(packed)
    assert config.quantization_config["of_the_future"] == {"a": 1}


def test_a_configuration_survives_its_own_json():
    config = AdaptiveSparseQuantizationConfig(modules=["a"], tensor_digest="x", value_dtype="bfloat16", later=[1])
    again = AdaptiveSparseQuantizationConfig.from_dict(json.loads(config.to_json_string()))
    assert again.to_dict() == config.to_dict() and again.to_dict()["later"] == [1]


def test_a_tensor_parallel_load_is_refused(packed):
    config = AutoConfig.from_pretrained(packed)
    config.distributed_config = {"tp_size": 2}
    with pytest.raises(ConfigError) as error, contextlib.suppress(AttributeError):
        load(packed, config=config)
    assert str(error.value) == (
        "a packed folder cannot be loaded in parts (tp_plan, distributed_config). Load it on one device, or write the "
        "model with save_dense and load that."
    )


def test_saving_holds_one_layer_at_a_time(llama, out, monkeypatch):
    """Every tensor is in the file before the next is packed."""
    sizes, pack = [], FORMATS["2:4"].pack

    def watch(weight, where):
        [folder] = out.parent.glob(".out.*.tmp")
        sizes.append((folder / "model.sparse24.safetensors").stat().st_size)
        return pack(weight, where)

    monkeypatch.setattr("hf_adaptive_sparse.hf.checkpoint._FORMAT", FORMATS["2:4"]._replace(pack=watch))
    monkeypatch.setattr(tensor_files, "open", lambda *a, **k: open(*a, **{**k, "buffering": 0}), raising=False)
    save_packed(llama, out)
    assert len(sizes) == 14 and all(a < b for a, b in zip(sizes, sizes[1:], strict=False))


def test_a_packed_layer_can_be_looked_at_after_loading(packed, llama):
    layer = load(packed).model.layers[0].mlp.up_proj
    assert isinstance(layer, PackedLinear)
    expected = FORMATS["2:4"].pack(llama.model.layers[0].mlp.up_proj.weight)
    assert torch.equal(layer.weight_values, expected[0]) and torch.equal(layer.weight_meta, expected[1])
