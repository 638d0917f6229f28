"""Opening packed folders with from_pretrained: options, devices, dtypes, what can be done with the model, refusals."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification
from transformers.pytorch_utils import Conv1D
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING

from hf_adaptive_sparse.errors import ConfigError, FormatError, OutputError, TargetError
from hf_adaptive_sparse.formats import FORMATS
from hf_adaptive_sparse.hf import quantizer
from hf_adaptive_sparse.hf.integrity import reseal
from hf_adaptive_sparse.hf.packed_modules import packed_modules, set_packed_backend
from hf_adaptive_sparse.hf.pretrained import save_dense, save_packed
from hf_adaptive_sparse.hf.quantizer import AdaptiveSparseQuantizationConfig, loading_options
from hf_adaptive_sparse.layers import PackedLinear

from ..tiny_models import tokens
from .two_four_models import logits_of, two_four_model

ROOT = Path(__file__).parents[2]
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


# --- registration ---------------------------------------------------------------------------------------------


def test_registering_again_is_harmless_and_the_last_one_counts():
    for _ in range(2):
        quantizer.register()
    assert AUTO_QUANTIZER_MAPPING["adaptive_sparse"] is quantizer.AdaptiveSparseQuantizer
    assert AUTO_QUANTIZATION_CONFIG_MAPPING["adaptive_sparse"] is AdaptiveSparseQuantizationConfig


@pytest.mark.parametrize("backend", ["dense", "packed"])
def test_save_pretrained_of_a_packed_model_is_refused(packed, tmp_path, backend):
    with loading_options(backend=backend):
        model = load(packed)
    with pytest.raises(OutputError) as error:
        model.save_pretrained(tmp_path / "unguarded")
    assert str(error.value) == (
        "save_pretrained would write the packed model as model.safetensors, which transformers opens as random weights "
        "where hf_adaptive_sparse is not imported. Use save_packed(model, folder), save_dense(model, folder) or "
        "push_to_hub(model, repo_id) of hf_adaptive_sparse."
    )
    assert not list((tmp_path / "unguarded").glob("*"))


def test_a_dense_model_cannot_be_packed_by_loading_it(out):
    two_four_model().save_pretrained(out)
    with pytest.raises(ValueError, match="adaptive_sparse does require the model to be pre-quantized"):
        load(out, quantization_config=AdaptiveSparseQuantizationConfig(modules=["lm_head"]))


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
        monkeypatch.setattr("hf_adaptive_sparse.kernels.expanding.expand", fail)
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
            f"{first}: is offloaded, so it stays packed. Load the model with a "
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


# --- the configuration ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "key, value, known",
    [
        ("format_version", 2, "1 and '1.1'"),
        ("format_version", "1.2", "1 and '1.1'"),
        ("format_version", 1.1, "1 and '1.1'"),
        ("format_version", "1", "1 and '1.1'"),
        ("format_version", True, "1 and '1.1'"),
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


def test_a_packed_layer_can_be_looked_at_after_loading(packed, llama):
    layer = load(packed).model.layers[0].mlp.up_proj
    assert isinstance(layer, PackedLinear)
    expected = FORMATS["2:4"].pack(llama.model.layers[0].mlp.up_proj.weight)
    assert torch.equal(layer.weight_values, expected[0]) and torch.equal(layer.weight_meta, expected[1])
