"""Saving packed and dense, opening with from_pretrained: the same logits to the last bit, everywhere."""

from __future__ import annotations

import json
import re

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors import safe_open
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.pytorch_utils import Conv1D

from hf_adaptive_sparse.errors import ConfigError, OutputError, PatternError, TargetError
from hf_adaptive_sparse.formats import FORMATS
from hf_adaptive_sparse.hf import tensor_files
from hf_adaptive_sparse.hf.packed_modules import packed_modules, set_packed_backend
from hf_adaptive_sparse.hf.pretrained import save_dense, save_packed
from hf_adaptive_sparse.hf.quantizer import loading_options

from .test_files import full_disk_message, in_a_limited_child
from .two_four_models import logits_of, prune, two_four_model

every_family = pytest.mark.parametrize("family", ["llama", "gpt2", "qwen2", "opt", "gpt_neox", "mixtral"])


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
        "0, group 0 has 4 non-zeros. Train or prune the model to 2:4 first, or save it dense (save_dense, "
        "--format dense)."
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


def test_the_tokenizer_is_saved_beside_the_model(llama, tiny_tokenizer, tmp_path):
    for save in (save_packed, save_dense):
        save(llama, tmp_path / save.__name__, tokenizer=tiny_tokenizer)
        tokenizer = AutoTokenizer.from_pretrained(tmp_path / save.__name__)
        assert tokenizer("hello").input_ids == tiny_tokenizer("hello").input_ids
        load(tmp_path / save.__name__)


def test_a_layer_that_was_written_to_is_no_longer_packed_when_saved(packed, tmp_path):
    model = load(packed)
    model.model.layers[0].mlp.up_proj.weight.data += 1
    saved = save_packed(model, tmp_path / "again")
    assert saved.skipped["model.layers.0.mlp.up_proj"] == "is not 2:4: row 0, group 0 has 4 non-zeros"
    assert torch.equal(logits_of(load(tmp_path / "again")), logits_of(model))
    with pytest.raises(PatternError, match="^model.layers.0.mlp.up_proj: row 0, group 0 "):
        set_packed_backend(model, "packed")
