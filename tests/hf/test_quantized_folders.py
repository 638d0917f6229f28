"""Packed folders with quantised values, format version 1.1: saved, opened, refused; and version 1 as it was."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors import safe_open
from torch import nn
from transformers import AutoModel, AutoModelForCausalLM

from hf_adaptive_sparse.errors import FormatError, PatternError, TargetError
from hf_adaptive_sparse.formats import two_four, value_codes
from hf_adaptive_sparse.formats.value_codes import StoredGrid
from hf_adaptive_sparse.hf.inspection import inspect_folder
from hf_adaptive_sparse.hf.integrity import WEIGHTS_NAME, reseal
from hf_adaptive_sparse.hf.packed_modules import packed_modules, set_packed_backend
from hf_adaptive_sparse.hf.pretrained import save_dense, save_packed
from hf_adaptive_sparse.hf.quantizer import AdaptiveSparseQuantizationConfig, loading_options
from hf_adaptive_sparse.hf.stored_values import StoredValues, from_json, to_json
from hf_adaptive_sparse.hf.tensor_files import read_header
from hf_adaptive_sparse.quantizers import RTN

from ..tiny_models import tokens
from .test_integrity import refusal, write_consistently
from .two_four_models import logits_of, prune, quantize, round_to_grid, two_four_model

VERSION_1 = Path(__file__).parent / "packed_v1"  # a folder that the first version wrote
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
LAYER = "model.layers.0.mlp.up_proj"  # [64, 32]
VALUES, SCALE = f"{LAYER}.weight_values", f"{LAYER}.weight_scale"
REMEDY = "Round the weight to its grid first, or keep it without one (of a loaded model: model.dequantize())."
DAMAGED = "The file is damaged or not format v1.1."
every_grid = pytest.mark.parametrize("bits, group", [(8, None), (4, 16)], ids=["int8", "int4-groups"])


def load(folder, backend="dense", **options):
    with loading_options(backend=backend):
        return AutoModelForCausalLM.from_pretrained(folder, **options)


def quantization_config(folder):
    return json.loads((folder / "config.json").read_text())["quantization_config"]


@pytest.fixture
def out(tmp_path):
    return tmp_path / "out"


@pytest.fixture(scope="module")
def llama():
    """A model on grids of 4 bits, and the grids."""
    model = two_four_model("llama", torch.bfloat16)
    return model, quantize(model, 4, 16)


@pytest.fixture(scope="module")
def saved(llama, tmp_path_factory):
    folder = tmp_path_factory.mktemp("quantized") / "saved"
    save_packed(llama[0], folder, quantized=llama[1])
    return folder


@pytest.fixture
def folder(saved, tmp_path):
    """A copy that may be damaged."""
    return Path(shutil.copytree(saved, tmp_path / "copy"))


# --- the promise ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("dtype", DTYPES)
@every_grid
def test_every_way_on_keeps_the_logits_bit_by_bit_and_the_codes(family, dtype, bits, group, tmp_path):
    model = two_four_model(family, dtype)
    grids = quantize(model, bits, group)
    expected = logits_of(model)
    saved = save_packed(model, tmp_path / "first", quantized=grids)
    assert saved.quantized == saved.modules == tuple(grids)
    assert torch.equal(logits_of(model), expected)  # saving changed nothing
    for backend in ("dense", "packed"):
        reloaded = load(tmp_path / "first", backend)
        assert reloaded.dtype == dtype and torch.equal(logits_of(reloaded), expected)
        assert {module.backend for module in packed_modules(reloaded).values()} == {backend}
        again = save_packed(reloaded, tmp_path / backend / "again")
        assert again.quantized == saved.quantized and again.total_bytes == saved.total_bytes
        for name in (WEIGHTS_NAME, "config.json"):
            assert (tmp_path / backend / "again" / name).read_bytes() == (tmp_path / "first" / name).read_bytes()
        save_dense(reloaded, tmp_path / backend / "dense")
        assert torch.equal(logits_of(load(tmp_path / backend / "dense")), expected)
        dense = reloaded.dequantize()
        assert not packed_modules(dense) and torch.equal(logits_of(dense), expected)
        plain = save_packed(dense, tmp_path / backend / "plain")
        assert plain.quantized == () and quantization_config(tmp_path / backend / "plain")["format_version"] == 1
        assert torch.equal(logits_of(load(tmp_path / backend / "plain")), expected)


@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen2", "mixtral"])
def test_a_sharded_folder_gives_the_same_logits(family, out):
    model = two_four_model(family, torch.bfloat16)
    saved = save_packed(model, out, max_shard_size="3KB", quantized=quantize(model, 4, 8, torch.bfloat16))
    assert len(list(out.glob("*.safetensors"))) > 3 and saved.quantized
    for backend in ("dense", "packed"):
        assert torch.equal(logits_of(load(out, backend)), logits_of(model))


@pytest.mark.parametrize("bits, ratio", [(8, 0.3125), (4, 0.1875)])
@pytest.mark.parametrize("group, scale_dtype", [(None, torch.float32), (16, torch.bfloat16)])
def test_every_layer_takes_exactly_the_promised_part_of_its_dense_bytes_and_its_scales(
    bits, ratio, group, scale_dtype, out
):
    model = two_four_model("llama", torch.bfloat16)
    saved = save_packed(model, out, quantized=quantize(model, bits, group, scale_dtype))
    with safe_open(out / WEIGHTS_NAME, "pt") as file:
        stored = {name: file.get_tensor(name) for name in file.keys()}
    scale_bytes = 0
    for name in saved.modules:
        rows, columns = model.get_submodule(name).weight.shape
        values, meta, scale = (stored[f"{name}.weight_{suffix}"] for suffix in ("values", "meta", "scale"))
        assert values.nbytes + meta.nbytes == ratio * 2 * rows * columns
        assert scale.shape == (rows, columns // (group or columns)) and scale.dtype == scale_dtype
        scale_bytes += scale.nbytes
    assert saved.scale_bytes == scale_bytes
    assert saved.module_bytes == ratio * saved.module_dense_bytes + scale_bytes
    assert saved.total_bytes == sum(tensor.nbytes for tensor in stored.values())
    assert saved.total_dense_bytes == sum(parameter.nbytes for parameter in model.parameters())


def test_the_file_holds_what_the_format_says_and_the_library_reads_it(llama, saved):
    model, grids = llama
    with safe_open(saved / WEIGHTS_NAME, "pt") as file:
        codes, meta, scale = (file.get_tensor(f"{LAYER}.weight_{suffix}") for suffix in ("values", "meta", "scale"))
        assert file.metadata()["adaptive_sparse_format"] == "1.1" and file.metadata()["format"] == "pt"
    values, expected = two_four.pack(model.get_submodule(LAYER).weight)
    assert torch.equal(meta, expected) and torch.equal(scale, grids[LAYER].scales)
    assert torch.equal(codes, value_codes.encode(values, scale, 4, (torch.bfloat16,)))


def test_the_grids_of_the_quantizers_are_taken_as_they_are(out):
    model, grids = two_four_model("llama", torch.bfloat16), {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and name != "lm_head":
            bits, group = (8, 0) if name.endswith("q_proj") else (4, 8)
            grids[name] = RTN(bits=bits, group=group).fit(module.weight)
            module.weight.data = grids[name].round(module.weight.data).to(torch.bfloat16)
    saved = save_packed(model, out, quantized=grids)
    assert saved.quantized == tuple(grids)
    reloaded = load(out, "packed")
    assert torch.equal(logits_of(reloaded), logits_of(model))
    layer = reloaded.get_submodule(LAYER)
    codes = value_codes.decode(layer.weight_values, torch.ones(64, 4), (torch.float32,))
    assert torch.equal(two_four.unpack(codes, layer.weight_meta), grids[LAYER].codes(layer.weight.data).float())


# --- what config.json says ------------------------------------------------------------------------------------


def test_the_configuration_has_the_key_facts_and_version_1_has_no_new_key(llama, saved, out):
    block = quantization_config(saved)
    assert (block["format_version"], block["value_bits"], block["group_size"]) == ("1.1", 4, 16)
    assert block["value_dtype"] == "bfloat16" and "value_exceptions" not in block
    save_packed(llama[0], out)
    plain = quantization_config(out)
    assert plain["format_version"] == 1
    assert set(block) - set(plain) == {"value_bits", "group_size"} and set(plain) < set(block)


def test_layers_may_differ_in_bits_groups_and_dtype_and_some_have_no_codes(out):
    model = two_four_model("llama", torch.bfloat16)
    model.model.layers[1].mlp.float()
    grids = quantize(model, 8)
    for name, module in model.model.layers[0].named_modules(prefix="model.layers.0"):
        if name.endswith(("q_proj", "down_proj")):
            grids[name] = round_to_grid(module, 4, 8)
    del grids["model.layers.1.self_attn.o_proj"]
    saved = save_packed(model, out, quantized=grids)
    assert set(saved.modules) - set(saved.quantized) == {"model.layers.1.self_attn.o_proj"}
    block = quantization_config(out)
    assert (block["value_bits"], block["group_size"], block["value_dtype"]) == (8, None, "bfloat16")
    wide = {"value_bits": 8, "group_size": None, "value_dtype": "float32"}
    assert block["value_exceptions"] == {
        **dict.fromkeys(
            ("model.layers.0.self_attn.q_proj", "model.layers.0.mlp.down_proj"),
            {"value_bits": 4, "group_size": 8, "value_dtype": "bfloat16"},
        ),
        **{f"model.layers.1.mlp.{name}_proj": wide for name in ("gate", "up", "down")},
        "model.layers.1.self_attn.o_proj": {"value_bits": None},
    }
    for backend in ("dense", "packed"):
        reloaded = load(out, backend)
        for name in saved.modules:
            weight = model.get_submodule(name).weight
            assert reloaded.get_submodule(name).weight.dtype == weight.dtype
            assert torch.equal(reloaded.get_submodule(name).weight, weight)
        save_packed(reloaded, out.parent / backend)
        assert (out.parent / backend / WEIGHTS_NAME).read_bytes() == (out / WEIGHTS_NAME).read_bytes()
        half = load(out, backend, dtype=torch.float16)
        assert all(half.get_submodule(name).weight.dtype == torch.float16 for name in saved.modules)


def test_the_description_survives_its_own_json():
    codes, others = StoredValues(4, 16, torch.bfloat16), StoredValues(8, None, torch.float16)
    for modules in ({"a": codes}, {"a": codes, "b": codes, "c": others, "d": StoredValues()}, {"a": others}):
        entries = json.loads(json.dumps(to_json(modules, torch.bfloat16)))
        config = AdaptiveSparseQuantizationConfig(
            modules=list(modules), value_dtype="bfloat16", format_version="1.1", **entries
        )
        assert config.stored_values() == modules
        again = AdaptiveSparseQuantizationConfig.from_dict(json.loads(config.to_json_string()))
        assert again.to_dict() == config.to_dict() and again.stored_values() == modules
    assert to_json({"a": StoredValues()}, torch.bfloat16) == {}
    assert from_json(["a"], None, None, "anything", None) == {"a": StoredValues()}


UPDATE = "Update hf_adaptive_sparse; if that does not help, the file is damaged."


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"value_bits": 3}, f"value_bits is 3, this hf_adaptive_sparse reads 8 or 4. {UPDATE}"),
        ({"value_bits": True}, f"value_bits is True, this hf_adaptive_sparse reads 8 or 4. {UPDATE}"),
        ({"group_size": 6}, f"group_size is 6, this hf_adaptive_sparse reads null or a multiple of 4. {UPDATE}"),
        ({"group_size": 0}, f"group_size is 0, this hf_adaptive_sparse reads null or a multiple of 4. {UPDATE}"),
        (
            {"value_dtype": "float8_e4m3fn"},
            "value_dtype is 'float8_e4m3fn', this hf_adaptive_sparse reads float32 or float16 or bfloat16. " + UPDATE,
        ),
        (
            {"value_exceptions": {LAYER: {"value_bits": 2, "group_size": None, "value_dtype": "bfloat16"}}},
            f"value_bits of {LAYER} is 2, this hf_adaptive_sparse reads 8 or 4. {UPDATE}",
        ),
        ({"value_exceptions": [LAYER]}, "value_exceptions must be a table of tables. The file is damaged."),
        (
            {"value_exceptions": {"lm_head": {"value_bits": None}}},
            "value_exceptions names lm_head, which modules does not. It is damaged.",
        ),
        (
            {"value_bits": None},
            "value_bits is None in format version 1.1; version 1.1 has it, 1 has not. The file is damaged.",
        ),
        (
            {"format_version": 1},
            "value_bits is 4 in format version 1; version 1.1 has it, 1 has not. The file is damaged.",
        ),
        ({"format_version": "1.2"}, f"format_version is '1.2', this hf_adaptive_sparse reads 1 and '1.1'. {UPDATE}"),
    ],
)
def test_a_configuration_that_cannot_be_read_is_refused(folder, changes, message):
    path = folder / "config.json"
    config = json.loads(path.read_text())
    config["quantization_config"].update(changes)
    path.write_text(json.dumps(config))
    for verify in (True, False):
        assert refusal(folder, verify=verify) == f"config.json: {message}"
    assert inspect_folder(folder).problem == f"config.json: {message}"


# --- version 1 ------------------------------------------------------------------------------------------------

KEPT = ((0, 1), (0, 2), (1, 2), (0, 3), (1, 3), (2, 3), (0,), ())


def version_1_weight(index: int, shape: torch.Size, is_packed: bool) -> torch.Tensor:
    """The parameter number `index` of the model in VERSION_1."""
    place = torch.arange(shape.numel())
    values = ((place * 37 + 11 * index) % 101 - 50) / 64
    if is_packed:
        keep = [[position in KEPT[group % 8] for position in range(4)] for group in range(len(place) // 4)]
        values = torch.where(torch.tensor(keep).flatten(), values, 0.0)
    return values.view(shape)


@pytest.mark.parametrize("backend", ["dense", "packed"])
def test_a_folder_of_the_first_version_opens_and_has_the_weights_it_was_written_with(backend):
    model = load(VERSION_1, backend)
    assert len(packed_modules(model)) == 7
    dense = load(VERSION_1).dequantize()
    wide = "model.layers.0.mlp.up_proj.weight"
    for index, (name, parameter) in enumerate(dense.named_parameters()):
        assert parameter.dtype == (torch.float32 if name == wide else torch.bfloat16)
        expected = version_1_weight(index, parameter.shape, "proj" in name).to(parameter.dtype)
        assert torch.equal(parameter, expected), name
        module, _, suffix = name.rpartition(".")
        assert torch.equal(getattr(model.get_submodule(module), suffix), expected), name


def test_what_is_not_quantised_is_written_as_the_first_version_wrote_it(out):
    save_packed(load(VERSION_1), out)
    assert quantization_config(out)["tensor_digest"] == quantization_config(VERSION_1)["tensor_digest"]
    old, new = (read_header(folder / WEIGHTS_NAME) for folder in (VERSION_1, out))
    for (name, before), (other, after) in zip(old[0].items(), new[0].items(), strict=True):
        assert (name, before.dtype, before.shape) == (other, after.dtype, after.shape)
        assert b"".join(before.chunks()) == b"".join(after.chunks())
    assert old[1].keys() == new[1].keys() and old[1]["adaptive_sparse_format"] == new[1]["adaptive_sparse_format"]
    assert set(quantization_config(VERSION_1)) == set(quantization_config(out))


# --- what is refused when saving ------------------------------------------------------------------------------


def refused_save(model, out, **options):
    with pytest.raises(PatternError) as error:
        save_packed(model, out, **options)
    assert not out.exists() and not list(out.parent.glob(".out*"))
    return str(error.value)


def test_a_weight_that_is_not_on_its_grid_stops_the_save_and_leaves_nothing(out):
    model = two_four_model("llama")
    grids = quantize(model, 8)
    weight = model.get_submodule(LAYER).weight.data
    row, column = weight.nonzero()[100].tolist()
    scale, before = float(grids[LAYER].scales[row, 0]), weight[row, column].item()
    weight[row, column] += 0.25 * scale
    assert refused_save(model, out, quantized=grids) == (
        f"{LAYER}: row {row}, group {column // 4} holds {weight[row, column].item():.6g}, which is not on the grid: "
        f"its nearest code, {round(before / scale)}, stands for {before:.6g}. {REMEDY}"
    )


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda grid: grid._replace(bits=2), "are for codes of 2 bits, the packed format holds codes of 8 or 4"),
        (lambda grid: grid._replace(scales=grid.scales.double()), "must be float32 or bfloat16, found float64"),
        (
            lambda grid: grid._replace(scales=grid.scales[:, 0]),
            "must be [64, 1], or [64, 32/g] for groups of g inputs, a multiple of 4, found [64]",
        ),
        (
            lambda grid: grid._replace(scales=grid.scales.index_fill(0, torch.tensor(7), float("nan"))),
            "must be finite and larger than 9.18e-41, the smallest bfloat16; row 7, group 0 is nan",
        ),
        (
            lambda grid: grid._replace(scales=grid.scales.index_fill(0, torch.tensor(7), 0.0)),
            "must be finite and larger than 9.18e-41, the smallest bfloat16; row 7, group 0 is 0",
        ),
        (
            lambda grid: grid._replace(scales=-grid.scales),
            "must be finite and larger than 9.18e-41, the smallest bfloat16; row 0, group 0 is {first:.6g}",
        ),
    ],
)
def test_a_grid_that_cannot_be_stored_is_refused_before_a_file_is_written(llama, out, change, message):
    model, grids = llama
    grids = {**grids, LAYER: change(grids[LAYER])}
    message = message.format(first=-float(llama[1][LAYER].scales[0, 0]))
    assert refused_save(model, out, quantized=grids) == f"{LAYER}: the scales {message}. {REMEDY}"


def test_codes_out_of_the_range_of_their_bits_are_refused(out):
    model = two_four_model("llama")
    grids = quantize(model, 8)
    grids[LAYER] = StoredGrid(grids[LAYER].scales, 4)
    assert "times its scale; codes of 4 bits are -8 to 7." in refused_save(model, out, quantized=grids)


def test_a_layer_that_is_not_packed_is_stored_dense_whether_it_has_a_grid_or_not(llama, tmp_path):
    model, grids = llama
    grid = {"lm_head": StoredGrid(torch.ones(64, 1), 8)}
    saved = save_packed(model, tmp_path / "head", quantized=grids | grid)
    assert saved.quantized == saved.modules == tuple(grids)
    assert saved.skipped == {"lm_head": "is not 2:4: row 0, group 0 has 4 non-zeros"}
    fewer = save_packed(model, tmp_path / "fewer", quantized=grids, modules=list(grids)[1:])
    first = "model.layers.0.self_attn.q_proj"
    assert fewer.quantized == fewer.modules == tuple(grids)[1:]
    assert fewer.skipped == dict.fromkeys((first, "lm_head"), "is not asked for in `modules`")
    for each in (saved, fewer):
        assert torch.equal(logits_of(load(each.folder)), logits_of(model))


def test_a_grid_of_no_layer_is_refused(llama, out):
    model, grids = llama
    with pytest.raises(TargetError) as error:
        save_packed(model, out, quantized={"model.layers.0.mlp.up_porj": grids[LAYER]})
    assert str(error.value) == (
        "model.layers.0.mlp.up_porj: is not a linear layer of LlamaForCausalLM; the closest are "
        "model.layers.0.mlp.up_proj, model.layers.1.mlp.up_proj, model.layers.0.mlp.gate_proj."
    )


@pytest.mark.parametrize("backend", ["dense", "packed"])
def test_a_model_that_was_cast_after_it_was_quantised_is_not_saved_with_codes(saved, llama, out, backend):
    model = load(saved, backend, dtype=torch.float32)
    assert refused_save(model, out) == (
        "model.layers.0.self_attn.q_proj: its codes stand for bfloat16 values, and it was cast to float32. Load the "
        "model in bfloat16 to keep them, or call model.dequantize() to save it without."
    )
    model.to(torch.bfloat16)  # and back, which changes no value
    save_packed(model, out)
    assert (out / WEIGHTS_NAME).read_bytes() == (saved / WEIGHTS_NAME).read_bytes()
    assert save_packed(load(saved, dtype=torch.float32).dequantize(), out, overwrite=True).quantized == ()


def test_a_loaded_layer_that_was_written_to_is_refused_or_without_its_zeros_no_longer_packed(saved, out):
    model = load(saved)
    layer = model.get_submodule(LAYER)
    layer.weight.data *= 0.95
    assert refused_save(model, out).startswith(f"{LAYER}: row 0, group ")
    with pytest.raises(PatternError, match=f"^{LAYER}: row 0, group .* not on the grid"):
        set_packed_backend(model, "packed")
    layer.weight.data += 1
    saved_again = save_packed(model, out)
    assert saved_again.skipped[LAYER] == "is not 2:4: row 0, group 0 has 4 non-zeros"
    assert LAYER not in saved_again.quantized and len(saved_again.quantized) == 13
    assert torch.equal(logits_of(load(out)), logits_of(model))


def test_another_grid_for_a_loaded_layer_takes_the_place_of_its_own(saved, out):
    model = load(saved)
    before = model.get_submodule(LAYER).grid
    finer = StoredGrid(before.scales / 2, 8)
    save_packed(model, out, quantized={LAYER: finer})
    assert quantization_config(out)["value_exceptions"] == {
        LAYER: {"value_bits": 8, "group_size": 16, "value_dtype": "bfloat16"}
    }
    assert torch.equal(logits_of(load(out)), logits_of(model))


# --- what is refused when loading -----------------------------------------------------------------------------


def set_scale(value):
    return lambda tensors: tensors[SCALE][11].__setitem__(1, value)


SMALLEST = f"{SCALE}: must be finite and larger than 9.18e-41, the smallest bfloat16; row 11, group 1 is"


@pytest.mark.parametrize("verify", [True, False])
@pytest.mark.parametrize(
    "change, message",
    [
        (lambda tensors: tensors.pop(SCALE), f"{{folder}}: {SCALE} is missing; config.json lists {LAYER}."),
        (
            lambda tensors: tensors.update({SCALE: tensors[SCALE][:, :1].contiguous()}),
            f"{{file}}: {SCALE}: must be [64, 32/16] by config.json, found [64, 1]. {DAMAGED}",
        ),
        (
            lambda tensors: tensors.update({SCALE: tensors[SCALE][:40]}),
            f"{{file}}: {SCALE}: must be [64, 1], or [64, 32/g] for groups of g inputs, a multiple of 4, found "
            f"[40, 2]. {DAMAGED}",
        ),
        (
            lambda tensors: tensors.update({SCALE: tensors[SCALE].half()}),
            f"{{file}}: {SCALE}: must be float32 or bfloat16, found float16. {DAMAGED}",
        ),
        (
            lambda tensors: tensors.update({VALUES: tensors[VALUES].view(torch.int8)}),
            f"{{file}}: {VALUES}: must be uint8 for codes of 4 bits, found int8. {DAMAGED}",
        ),
        (set_scale(float("nan")), f"{{file}}: {SMALLEST} nan. {DAMAGED}"),
        (set_scale(float("inf")), f"{{file}}: {SMALLEST} inf. {DAMAGED}"),
        (set_scale(-0.5), f"{{file}}: {SMALLEST} -0.5. {DAMAGED}"),
        (set_scale(0.0), f"{{file}}: {SMALLEST} 0. {DAMAGED}"),
        (
            lambda tensors: tensors.update(
                {f"{LAYER}.weight_{suffix}": tensors[f"{LAYER}.weight_{suffix}"][:40] for suffix in PARTS}
            ),
            f"{LAYER}: the stored values are [40, 8], LlamaForCausalLM needs [64, 8]. The files are of different "
            "models.",
        ),
    ],
)
def test_what_is_wrong_inside_a_consistent_file_is_named(folder, change, message, verify):
    write_consistently(folder, change)
    expected = message.replace("{folder}", str(folder)).replace("{file}", str(folder / WEIGHTS_NAME))
    assert refusal(folder, verify=verify) == expected


PARTS = ("values", "meta", "scale")


def test_scales_that_the_configuration_does_not_know_are_refused(folder):
    path = folder / "config.json"
    config = json.loads(path.read_text())
    config["quantization_config"]["value_exceptions"] = {LAYER: {"value_bits": None}}
    path.write_text(json.dumps(config))
    reseal(folder)
    assert refusal(folder) == f"{folder}: holds {SCALE}, but by config.json {LAYER} has no quantised values."


def test_a_changed_byte_of_codes_or_scales_is_found(saved, tmp_path):
    for name in (VALUES, SCALE):
        broken = Path(shutil.copytree(saved, tmp_path / "out", dirs_exist_ok=True)) / WEIGHTS_NAME
        tensor = read_header(broken)[0][name]
        data = bytearray(broken.read_bytes())
        data[tensor.start + 3] ^= 0x01
        broken.write_bytes(data)
        assert refusal(broken.parent) == (
            f"{broken}: tensor {name} is not as it was saved (bytes {tensor.start} to {tensor.end} of the file). The "
            f"file is damaged; fetch it again."
        )


def test_scales_that_the_loader_put_elsewhere_are_an_error_and_not_random(folder):
    with pytest.raises(FormatError) as error:
        load(folder, key_mapping={SCALE.replace(".", r"\."): SCALE.replace("up", "gate")})
    assert str(error.value) == f"{SCALE}: was not loaded, so the model would be random."


# --- using a loaded model -------------------------------------------------------------------------------------


@pytest.mark.parametrize("scale_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_another_dtype_can_be_asked_for(scale_dtype, dtype, tmp_path):
    model = two_four_model("llama", torch.bfloat16)
    save_packed(model, tmp_path / "packed", quantized=quantize(model, 8, None, scale_dtype))
    save_dense(model, tmp_path / "dense")
    expected = logits_of(load(tmp_path / "dense", dtype=dtype))
    for backend in ("dense", "packed"):
        reloaded = load(tmp_path / "packed", backend, dtype=dtype)
        assert {module.weight_scale.dtype for module in packed_modules(reloaded).values()} == {scale_dtype}
        assert torch.equal(logits_of(reloaded), expected)


@pytest.mark.parametrize("backend", ["dense", "packed"])
def test_device_maps_and_offloading_work(llama, saved, backend, tmp_path):
    expected, offload = logits_of(llama[0]), str(tmp_path / "offload")
    device_map = dict.fromkeys(("model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head"), "cpu")
    device_map |= {"model.layers.0": "cpu", "model.layers.1": "disk"}
    for buffers in (False, True):
        model = load(saved, backend, device_map=device_map, offload_folder=offload, offload_buffers=buffers)
        assert {module.backend for module in packed_modules(model.model.layers[1]).values()} == {"packed"}
        assert torch.equal(logits_of(model), expected)
        save_packed(model, tmp_path / "again", overwrite=True)
        assert (tmp_path / "again" / WEIGHTS_NAME).read_bytes() == (saved / WEIGHTS_NAME).read_bytes()
        save_dense(model, tmp_path / "dense", overwrite=True)
        assert torch.equal(logits_of(load(tmp_path / "dense")), expected)
    assert torch.equal(logits_of(load(saved, backend, device_map="auto")), expected)


def test_tied_embeddings_stay_tied_and_an_untied_head_may_have_codes(tmp_path):
    model = two_four_model("llama", torch.bfloat16, tie_word_embeddings=True)
    saved = save_packed(model, tmp_path / "tied", quantized=quantize(model, 8))
    assert saved.skipped == {"lm_head": "shares its weight with another layer"}
    reloaded = load(tmp_path / "tied")
    assert torch.equal(logits_of(reloaded), logits_of(model))
    assert reloaded.lm_head.weight is reloaded.get_input_embeddings().weight
    untied = two_four_model("llama", torch.bfloat16)
    prune(untied.lm_head)
    grids = quantize(untied, 8) | {"lm_head": round_to_grid(untied.lm_head, 4, 4)}
    assert "lm_head" in save_packed(untied, tmp_path / "untied", quantized=grids).quantized
    assert torch.equal(logits_of(load(tmp_path / "untied", "packed")), logits_of(untied))


@pytest.mark.parametrize("backend", ["dense", "packed"])
def test_it_generates_the_same_text_and_the_base_model_can_be_loaded(llama, saved, backend):
    options = dict(max_new_tokens=6, do_sample=False, min_new_tokens=6)
    assert torch.equal(load(saved, backend).generate(tokens(), **options), llama[0].generate(tokens(), **options))
    with loading_options(backend=backend), torch.no_grad():
        base = AutoModel.from_pretrained(saved)
        assert len(packed_modules(base)) == 14
        assert torch.equal(base(tokens()).last_hidden_state, llama[0].model(tokens()).last_hidden_state)


@pytest.mark.parametrize("backend", ["dense", "packed"])
def test_a_lora_adapter_trains_on_top_and_is_merged(saved, backend, out):
    model = get_peft_model(load(saved, backend), LoraConfig(target_modules=["q_proj", "down_proj"]))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(3):
        model(input_ids=tokens(), labels=tokens()).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.eval()
    expected = logits_of(model)
    assert not torch.equal(expected, logits_of(load(saved)))
    set_packed_backend(model, "dense")
    merged = model.merge_and_unload()
    torch.testing.assert_close(logits_of(merged), expected, rtol=0.1, atol=0.1)
    kept = save_packed(merged, out)  # what the adapter did not touch keeps its codes
    assert len(kept.quantized) == 10 and kept.modules == kept.quantized
    assert torch.equal(logits_of(load(out)), logits_of(merged))


def test_the_packed_backend_holds_the_codes_and_never_expands_while_loading(saved, monkeypatch):
    def fail(*arguments):
        raise AssertionError("expanded")

    monkeypatch.setattr("hf_adaptive_sparse.kernels.expanding.expand", fail)
    modules = packed_modules(load(saved, "packed")).values()
    dense = sum(2 * module.in_features * module.out_features for module in modules)
    assert sum(module.weight_values.nbytes + module.weight_meta.nbytes for module in modules) == 0.1875 * dense
    assert sum(module.weight_scale.nbytes for module in modules) == dense // 2 // 16 * 4


# --- inspection -----------------------------------------------------------------------------------------------


@every_grid
def test_inspection_shows_bits_and_bytes_and_counts_the_values_behind_the_codes(bits, group, tmp_path):
    model = two_four_model("gpt2", torch.bfloat16)
    saved = save_packed(model, tmp_path / "packed", max_shard_size="8KB", quantized=quantize(model, bits, group))
    save_dense(model, tmp_path / "dense")
    packed, dense = inspect_folder(tmp_path / "packed"), inspect_folder(tmp_path / "dense")
    others = {matrix.name: matrix for matrix in dense.matrices}
    assert [matrix.name for matrix in packed.matrices] == [matrix.name for matrix in dense.matrices]
    assert {matrix.name for matrix in packed.packed} == {f"{name}.weight" for name in saved.modules}
    assert packed.parameters == dense.parameters and packed.dense_nbytes == dense.nbytes
    assert packed.nbytes == saved.total_bytes and packed.zeros == dense.zeros
    for matrix in packed.packed:
        other = others[matrix.name]
        assert (matrix.value_bits, matrix.dtype, matrix.stored_dtype) == (bits, "bfloat16", f"int{bits}>bfloat16")
        assert (other.value_bits, other.scale_nbytes, other.stored_dtype) == (None, 0, "bfloat16")
        assert matrix.shape == other.shape and matrix.zeros == other.zeros and matrix.is_two_four
        assert matrix.scale_nbytes == matrix.shape[0] * matrix.shape[1] // (group or matrix.shape[1]) * 4
        assert matrix.nbytes == {8: 0.3125, 4: 0.1875}[bits] * other.nbytes + matrix.scale_nbytes
    assert sum(matrix.scale_nbytes for matrix in packed.packed) == saved.scale_bytes
    assert sum(matrix.nbytes for matrix in packed.packed) == saved.module_bytes


def test_inspection_counts_what_the_codes_stand_for(folder):
    write_consistently(folder, set_scale(3e38))  # times 2 or more: beyond bfloat16
    [matrix] = [matrix for matrix in inspect_folder(folder).matrices if matrix.name == f"{LAYER}.weight"]
    assert 0 < matrix.non_finite <= 8
