"""Sizes and caps of known models from their configs alone, and which matrices can be 2:4."""

from __future__ import annotations

import resource

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from hf_adaptive_sparse import AdaptiveSparseConfig, OneShotConfig, save_dense, save_packed
from hf_adaptive_sparse.footprint import STORED, Stored
from hf_adaptive_sparse.hardware import HARDWARE, custom_hardware
from hf_adaptive_sparse.hf.block_shapes import block_shapes
from hf_adaptive_sparse.hf.linear_inventory import linear_inventory
from hf_adaptive_sparse.hf.machine import measured_bandwidth, measured_hardware
from hf_adaptive_sparse.hf.model_sizes import footprint, footprints, model_work
from hf_adaptive_sparse.hf.one_shot_plan import plan_one_shot
from hf_adaptive_sparse.hf.packable import packable_modules
from hf_adaptive_sparse.hf.predictions import PRESETS, caps, costs
from hf_adaptive_sparse.hf.targets import resolve_targets
from tests.hf.test_one_shot_plan import _EXPERTS
from tests.hf.two_four_models import quantize, two_four_model
from tests.tiny_models import CONFIGS, tiny_model

MODELS = {
    "Llama-2-7B": ("llama", {
        "vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32,
        "num_attention_heads": 32,
    }),
    "Llama-3.1-8B": ("llama", {
        "vocab_size": 128256, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
        "num_attention_heads": 32, "num_key_value_heads": 8,
    }),
    "Llama-3.2-1B": ("llama", {
        "vocab_size": 128256, "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16,
        "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 64, "tie_word_embeddings": True,
    }),
    "Qwen2.5-0.5B": ("qwen2", {
        "vocab_size": 151936, "hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 24,
        "num_attention_heads": 14, "num_key_value_heads": 2, "tie_word_embeddings": True,
    }),
    "Llama-3.1-70B": ("llama", {
        "vocab_size": 128256, "hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80,
        "num_attention_heads": 64, "num_key_value_heads": 8,
    }),
}  # fmt: skip


def skeleton(model_type: str, options: dict):
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **options))


@pytest.mark.parametrize("name, dense_gb, packed_gb, cap, file_ratio, int4_cap", [
    ("Llama-2-7B", 13.2, 7.6, 1.75, 0.58, 1.28), ("Llama-3.1-8B", 15.0, 8.9, 1.69, 0.62, 1.22),
    ("Llama-3.2-1B", 2.47, 1.62, 1.53, 0.66, 1.13), ("Qwen2.5-0.5B", 0.99, 0.67, 1.46, 0.68, 1.11),
])  # fmt: skip
def test_sizes_are_those_of_the_published_arithmetic(name, dense_gb, packed_gb, cap, file_ratio, int4_cap):
    """Bytes read per decoded token, what they cap decoding at, the size of the file; embeddings and head dense."""
    model = skeleton(*MODELS[name])
    sizes = footprints(linear_inventory(model), model, torch.bfloat16)
    dense, packed = sizes["dense"], sizes["2:4"]
    digits = 1 if dense_gb > 10 else 2
    assert round(dense.token_bytes / 1e9, digits) == dense_gb
    assert abs(packed.token_bytes / 1e9 - packed_gb) < 0.06 if digits == 1 else 0.006
    assert dense.token_bytes / packed.token_bytes == pytest.approx(cap, abs=0.006)
    assert round(packed.file_bytes / dense.file_bytes, 2) == file_ratio
    assert sizes["dense int4"].token_bytes / sizes["2:4 int4"].token_bytes == pytest.approx(int4_cap, abs=0.006)


def test_seventy_billion_weights_take_no_memory():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    model = skeleton(*MODELS["Llama-3.1-70B"])
    kinds = linear_inventory(model)
    assert sum(kind.count for kind in kinds if kind.packed) == 560
    shapes = block_shapes(model, 2048)
    work = model_work(model, kinds, shapes, 2048, torch.bfloat16)
    # 2 operations per weight that is multiplied with: all but the input embedding.
    numbers = sum(parameter.numel() for parameter in model.parameters() if parameter.ndim > 1) - 128256 * 8192
    assert work.dense_flops + work.sparse_flops == 2 * numbers
    assert work.kv_bytes == 2 * 80 * 8 * 128 * 2
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 500_000  # kB


@pytest.mark.parametrize("family", sorted(set(CONFIGS) - {"bloom", "falcon", "gpt_neox", "gemma3"}))
def test_what_is_said_to_be_packable_is_packed(family, tmp_path):
    model = two_four_model(family, torch.bfloat16)
    kinds = linear_inventory(model)
    expected = {name for kind in kinds if kind.packed for name in kind.names}
    assert {name for name in packable_modules(model)[0] if ".layers." in name or ".h." in name} == expected
    saved = save_packed(model, tmp_path / "packed", modules=expected)
    found = footprint(kinds, model, STORED["2:4"], torch.bfloat16)
    assert found.file_bytes == saved.total_bytes
    assert footprint(kinds, model, STORED["dense"], torch.bfloat16).file_bytes == saved.total_dense_bytes
    targets = set(resolve_targets(model, AdaptiveSparseConfig()))
    assert targets <= {name for kind in kinds if kind.sparse for name in kind.names}


@pytest.mark.parametrize("bits", [8, 4])
def test_the_size_with_codes_is_that_of_the_folder(tmp_path, bits):
    model = two_four_model("llama", torch.bfloat16)
    saved = save_packed(model, tmp_path / "packed", quantized=quantize(model, bits))
    stored = Stored(sparse=True, bits=bits, group_size=None)
    assert footprint(linear_inventory(model), model, stored, torch.bfloat16).file_bytes == saved.total_bytes


def test_reasons_name_what_stays_dense():
    model = tiny_model("llama", intermediate_size=60, tie_word_embeddings=True)  # 60 = 4 x 15
    kinds = {kind.name: kind for kind in linear_inventory(model, skip=["o_proj"])}
    assert kinds["model.layers.*.mlp.down_proj"].reason == (
        "60 inputs are no multiple of 8: becomes 2:4, and is stored dense"
    )
    assert kinds["model.layers.*.self_attn.o_proj"].reason == "is to be skipped"
    assert kinds["lm_head"].reason == "is the output head, which stays dense" and kinds["lm_head"].shared
    assert kinds["model.embed_tokens"].reason == "is an embedding: rows are looked up, and nothing is multiplied"
    assert kinds["model.layers.*.self_attn.q_proj"].reason == "" and kinds["model.layers.*.self_attn.q_proj"].packed
    odd = {kind.name: kind for kind in linear_inventory(tiny_model("llama", intermediate_size=62))}
    assert odd["model.layers.*.mlp.down_proj"].reason == "62 inputs are no multiple of 4"
    assert not odd["model.layers.*.mlp.down_proj"].sparse and odd["model.layers.*.mlp.up_proj"].packed


def test_experts_become_sparse_and_are_stored_dense():
    model = skeleton("mixtral", _EXPERTS)
    kinds = linear_inventory(model)
    experts = [kind for kind in kinds if "experts" in kind.name]
    assert experts and all(kind.sparse and not kind.packed for kind in experts)
    assert {kind.reason for kind in experts} == {"is one expert of a fused parameter: becomes 2:4, and is stored dense"}
    assert not any(kind.name.endswith((".gate", ".router")) and kind.sparse for kind in kinds)


def test_caps_are_bytes_by_bandwidth_and_operations_by_rate():
    model = skeleton(*MODELS["Llama-2-7B"])
    kinds = linear_inventory(model)
    sizes = footprints(kinds, model, torch.bfloat16)
    work = model_work(model, kinds, block_shapes(model, 2048), 2048, torch.bfloat16)
    found = {cap.form: cap for cap in caps(sizes, work, HARDWARE["h100"], "bfloat16", batch=1, context=0)}
    assert found["dense"].decode == pytest.approx(3350e9 / sizes["dense"].token_bytes)
    assert found["2:4"].decode / found["dense"].decode == pytest.approx(1.75, abs=0.006)
    flops = 2048 * (work.dense_flops + work.sparse_flops) + work.prompt_attention_flops
    assert found["dense"].prefill == pytest.approx(2048 * 989.4e12 / flops)
    assert 1.7 < found["2:4"].prefill / found["dense"].prefill < 2.0
    # Without units for 2:4 a prompt is no faster; a long context and many sequences eat the gain of decoding.
    plain = {cap.form: cap for cap in caps(sizes, work, custom_hardware(50, 200), "float32", batch=1, context=0)}
    assert plain["2:4"].prefill == plain["dense"].prefill
    many = {cap.form: cap for cap in caps(sizes, work, HARDWARE["h100"], "bfloat16", batch=64, context=4096)}
    assert many["2:4"].decode / many["dense"].decode < 1.1
    assert many["dense"].fits is False and found["dense"].fits is True


def test_costs_are_those_of_the_plan_and_of_the_copies_that_are_kept():
    model = skeleton(*MODELS["Qwen2.5-0.5B"])
    kinds, shapes = linear_inventory(model), block_shapes(model, 256)
    work = model_work(model, kinds, shapes, 256, torch.bfloat16)
    machine = HARDWARE["l4"]
    options = {"calibration_windows": 128, "window": 256, "train_tokens": 10**6, "batch_size": 8}
    found = {cost.job: cost for cost in costs(model, kinds, shapes, work, machine, torch.bfloat16, **options)}
    assert list(found) == [*(f"prune --method {method}" for method in PRESETS), "train", "shrink"]
    plan = plan_one_shot(model, OneShotConfig(method="fast"), windows=128, window=256, dtype=torch.bfloat16)
    assert found["prune --method fast"].device_bytes == plan.device_bytes["disk"]
    assert found["prune --method fast"].flops == sum(plan.flops.values())
    sparse = sum(kind.numel for kind in kinds if kind.sparse)
    numbers = sum(parameter.numel() for parameter in model.parameters())
    host = costs(model, kinds, shapes, work, machine, torch.bfloat16, in_host_memory=True, **options)[0]
    assert host.device_bytes == max(plan.device_bytes["none"] + 2 * sparse, 4 * numbers)
    assert found["train"].device_bytes > 2 * numbers + 17 * sparse
    assert found["shrink"].device_bytes > 8 * numbers
    per_token = work.dense_flops + work.sparse_flops + work.prompt_attention_flops / 256
    assert found["train"].flops == pytest.approx(4e6 * per_token)
    assert found["train"].seconds == pytest.approx(4e6 * per_token / machine.rate("bfloat16"))
    assert found["shrink"].flops == pytest.approx(0.75 * found["train"].flops)


def test_this_machine_is_measured(monkeypatch):
    monkeypatch.setitem(measured_bandwidth.__globals__["_READ_BYTES"], "cpu", 2**22)
    device = torch.device("cpu")
    assert 1e7 < measured_bandwidth(device, torch.float32, seconds=0.0) < 1e13
    found = measured_hardware(device, torch.bfloat16)
    assert found.rate("bfloat16") >= found.rate("float32") > 1e7 and found.sparse_factor == 1.0
    assert found.memory_bytes and found.memory_bytes > 2**28 and found.name.startswith("this machine (")


def test_a_dense_stored_folder_is_predicted_as_well(tmp_path):
    model = two_four_model("gpt2", torch.float32)
    saved = save_dense(model, tmp_path)
    assert footprint(linear_inventory(model), model, STORED["dense"], torch.float32).file_bytes == saved.total_bytes
