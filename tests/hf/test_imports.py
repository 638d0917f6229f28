"""Checkpoints of other tools become ours with the same weights and logits, and what is wrong with one is named."""

from __future__ import annotations

import json
import re
import weakref
from dataclasses import replace

import pytest
import torch
from peft import PeftModel
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from hf_adaptive_sparse.errors import ConfigError, FormatError, PatternError
from hf_adaptive_sparse.hf.import_checkpoint import import_checkpoint, write_ordinary_folder
from hf_adaptive_sparse.hf.imports import IMPORTERS, known_formats, read_foreign, recognise
from hf_adaptive_sparse.hf.inspection import inspect_folder
from hf_adaptive_sparse.hf.pretrained import save_dense, save_packed

from ..reference import ast_release as reference
from ..tiny_models import tiny_model, tokens
from . import foreign_folders as foreign
from .two_four_models import logits_of, two_four_model

INT8 = {"format": "int-quantized", "config_groups": {"group_0": {"input_activations": {"num_bits": 8}}}}


def converted(source, folder, packed: bool, **options):
    """The saved folder, and the model in it."""
    saved = import_checkpoint(source, folder, packed=packed, **options)
    return saved, AutoModelForCausalLM.from_pretrained(saved.folder).eval()


def same_weights(model, expected: dict) -> bool:
    if hasattr(model, "hf_quantizer"):
        model.dequantize()
    state = model.state_dict()
    return set(state) == set(expected) and all(torch.equal(state[name], expected[name]) for name in expected)


packed_or_dense = pytest.mark.parametrize("packed", [True, False], ids=["packed", "dense"])


@packed_or_dense
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("sparse, shards", [("sparse-24-bitmask", 1), ("sparse-24-bitmask", 3), ("sparse-bitmask", 1)])
def test_a_bitmask_folder_becomes_ours_bit_by_bit(tmp_path, sparse, shards, dtype, packed):
    model = two_four_model(dtype=dtype)
    expected = foreign.compressed_tensors_folder(tmp_path / "in", model, sparse, shards=shards)
    assert recognise(tmp_path / "in") == "compressed-tensors"
    saved, found = converted(tmp_path / "in", tmp_path / "out", packed)
    assert len(saved.modules) == 14 and saved.quantized == ()
    assert torch.equal(logits_of(found), logits_of(model))
    assert same_weights(found, expected)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["adaptive_sparse"]["imported_from"] == f"compressed-tensors {sparse}"
    assert ("quantization_config" in config) == packed


def test_the_names_of_versions_before_0_9_are_read(tmp_path):
    model = two_four_model()
    expected = foreign.compressed_tensors_folder(tmp_path / "in", model, "sparse-bitmask", old_names=True)
    assert "model.norm.weight.bitmask" in load_file(tmp_path / "in" / "model.safetensors")
    saved, found = converted(tmp_path / "in", tmp_path / "out", True)
    assert same_weights(found, expected)


@packed_or_dense
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("strategy", ["tensor", "channel", "group"])
def test_integer_codes_stay_codes_in_a_packed_folder(tmp_path, strategy, dtype, packed):
    model, quantize = two_four_model(dtype=dtype, num_hidden_layers=1), foreign.int8(strategy)
    expected = foreign.compressed_tensors_folder(tmp_path / "in", model, quantize=quantize, **INT8)
    saved, found = converted(tmp_path / "in", tmp_path / "out", packed)
    assert len(saved.modules) == 7 and len(saved.quantized) == (7 if packed else 0)
    if packed:
        with safe_open(tmp_path / "out" / "model.sparse24.safetensors", "pt") as file:
            assert file.get_tensor("model.layers.0.mlp.up_proj.weight_values").dtype == torch.int8
    assert same_weights(found, expected)


@packed_or_dense
@pytest.mark.parametrize("sparse", ["sparse-24-bitmask", "dense"])
@pytest.mark.parametrize("strategy", ["tensor", "channel"])
def test_fp8_values_are_multiplied_by_their_scales(tmp_path, strategy, sparse, packed):
    model, quantize = two_four_model(dtype=torch.bfloat16, num_hidden_layers=1), foreign.fp8(strategy)
    settings = INT8 | {"format": "float-quantized"}
    expected = foreign.compressed_tensors_folder(tmp_path / "in", model, sparse, quantize, **settings)
    saved, found = converted(tmp_path / "in", tmp_path / "out", packed)
    assert len(saved.modules) == 7 and saved.quantized == ()
    assert same_weights(found, expected)


def test_codes_that_the_packed_format_cannot_say_are_kept_as_values(tmp_path):
    # bfloat16 scales of a float32 model: compressed-tensors rounds the products to bfloat16.
    model = two_four_model(num_hidden_layers=1)
    quantize = foreign.int8("channel", torch.bfloat16)
    expected = foreign.compressed_tensors_folder(tmp_path / "in", model, quantize=quantize, **INT8)
    saved, found = converted(tmp_path / "in", tmp_path / "out", True)
    assert saved.quantized == () and same_weights(found, expected)


def test_codes_of_a_layer_that_is_not_two_four_are_kept_as_values(tmp_path, caplog):
    model = two_four_model(num_hidden_layers=1)
    model.model.layers[0].mlp.up_proj.weight.data = tiny_model(seed=5).model.layers[0].mlp.up_proj.weight.data
    quantize = foreign.int8("channel")
    expected = foreign.compressed_tensors_folder(tmp_path / "in", model, "sparse-bitmask", quantize, **INT8)
    saved, found = converted(tmp_path / "in", tmp_path / "out", True)
    assert len(saved.quantized) == 6 and "model.layers.0.mlp.up_proj" not in saved.modules
    assert same_weights(found, expected)


@packed_or_dense
@pytest.mark.parametrize("source", ["folder", "sharded", "exported", "torch folder", "mto.save"])
def test_a_modelopt_checkpoint_becomes_ours(tmp_path, source, packed):
    model, dense, place, options = two_four_model(), tiny_model(), tmp_path / "in", {}
    about = foreign.modelopt_folder(place, model, dense, shards=3 if source == "sharded" else 1)
    if source == "exported":
        mode = ("export_sparse", {"config": {}, "metadata": about["modelopt_state_dict"][0][1]["metadata"]})
        torch.save(about | {"modelopt_state_dict": [*about["modelopt_state_dict"], mode]}, place / "modelopt_state.pth")
        save_file(dict(model.state_dict()), place / "model.safetensors")
    elif source == "torch folder":
        torch.save(load_file(place / "model.safetensors"), place / "pytorch_model.bin")
        (place / "model.safetensors").unlink()
    elif source == "mto.save":
        model.config.save_pretrained(tmp_path / "base")
        state = load_file(place / "model.safetensors")
        place, options = tmp_path / "mto.pth", {"base": str(tmp_path / "base")}
        torch.save({"modelopt_state": about, "model_state_dict": state}, place)
    assert recognise(place) == "modelopt"
    _, found = converted(place, tmp_path / "out", packed, **options)
    assert torch.equal(logits_of(found), logits_of(model))
    assert same_weights(found, model.state_dict())


@packed_or_dense
@pytest.mark.parametrize("k", [8, None], ids=["branch", "no branch"])
def test_a_gpt2_of_the_ast_release_has_the_logits_of_the_release(tmp_path, k, packed):
    model = tiny_model("gpt2")
    state = foreign.ast_gpt2(model, k)
    model.config.save_pretrained(tmp_path / "base")  # 32 channels are no multiple of the heads of a real GPT-2
    file = tmp_path / "31.13_ckpt.pt"
    torch.save({"model": state, "iter_num": 200, "best_val_loss": torch.tensor(3.0), "config": {"lr": 0.1}}, file)
    assert recognise(file) == "ast-release"
    saved, found = converted(file, tmp_path / "out", packed, base=str(tmp_path / "base"))
    expected = reference.gpt2_logits(state, tokens(), heads=4)
    assert len(saved.modules) == 8
    if k is not None:
        assert saved.folder == tmp_path / "out" / ("packed" if packed else "dense")
        assert not torch.allclose(logits_of(found), expected, atol=1e-3)
        adapter = tmp_path / "out" / "slorb"
        assert json.loads((adapter / "adapter_config.json").read_text())["base_model_name_or_path"] == str(saved.folder)
        found = PeftModel.from_pretrained(found, adapter).eval()
    torch.testing.assert_close(logits_of(found), expected, rtol=0, atol=1e-5)


def test_a_gpt2_of_the_ast_release_needs_no_base_where_heads_have_64_channels(tmp_path):
    model = tiny_model("gpt2", n_embd=128, n_head=2, n_layer=1)
    state = foreign.ast_gpt2(model, None)
    torch.save({"model": state}, tmp_path / "30_ckpt.pt")
    _, found = converted(tmp_path, tmp_path / "out", True)  # the folder holds this file alone
    torch.testing.assert_close(logits_of(found), reference.gpt2_logits(state, tokens(), heads=2), rtol=0, atol=1e-5)
    assert found.config.activation_function == "gelu"


@pytest.mark.parametrize("wrap", [lambda state: state, lambda state: {"state": {"model": state, "seed": 3}}])
@pytest.mark.parametrize("k", [8, None], ids=["branch", "no branch"])
def test_a_llama_of_the_ast_release_keeps_its_masks_and_its_branch(tmp_path, k, wrap):
    model = tiny_model()
    state = foreign.ast_llama(model, k)
    torch.save(wrap(state), tmp_path / "latest-rank0.pt")
    model.config.save_pretrained(tmp_path / "base")
    source, base = tmp_path / "latest-rank0.pt", str(tmp_path / "base")
    saved, found = converted(source, tmp_path / "out", True, base=base)
    folded, masked = tiny_model(), tiny_model()
    for layer in foreign.linears(model):
        name = f"model.{foreign._composer_name(layer)}"
        weight = state[f"{name}.weight"] * state[f"{name}.mask"]
        masked.get_submodule(layer).weight.data = weight
        branch = state[f"{name}.SLoRA_Weight"] @ state[f"{name}.x_proj"] if k is not None else 0.0
        folded.get_submodule(layer).weight.data = weight + branch
    if k is not None:
        with_branch = PeftModel.from_pretrained(found, tmp_path / "out" / "slorb").eval()
        torch.testing.assert_close(logits_of(with_branch), logits_of(folded), rtol=0, atol=1e-5)
        found = with_branch.unload()
        _, other = converted(source, tmp_path / "folded", False, base=base, branch="fold")
        torch.testing.assert_close(logits_of(other), logits_of(folded), rtol=0, atol=1e-5)
    assert torch.equal(logits_of(found), logits_of(masked))


def test_a_folded_branch_is_not_packed_and_an_unknown_choice_is_named(tmp_path):
    model = tiny_model()
    torch.save(foreign.ast_llama(model, 8), tmp_path / "x.pt")
    model.config.save_pretrained(tmp_path / "base")
    with pytest.raises(ConfigError) as caught:
        import_checkpoint(tmp_path / "x.pt", tmp_path / "out", base=str(tmp_path / "base"), branch="fold")
    assert str(caught.value) == (
        f"{tmp_path / 'x.pt'}: a folded SLoRB branch fills every zero of 14 layers, which cannot be packed then. Save "
        "dense-stored, or keep the branch."
    )
    with pytest.raises(ConfigError, match=r"^unknown branch 'drop'; known: keep, fold\.$"):
        import_checkpoint(tmp_path / "x.pt", tmp_path / "out", base=str(tmp_path / "base"), branch="drop")
    assert not (tmp_path / "out").exists()


def test_zeros_of_an_ordinary_folder_are_found_without_provenance(tmp_path):
    model = two_four_model()
    model.save_pretrained(tmp_path / "plain")
    assert recognise(tmp_path / "plain") is None
    assert len(inspect_folder(tmp_path / "plain").two_four) == 14
    save_packed(AutoModelForCausalLM.from_pretrained(tmp_path / "plain"), tmp_path / "packed")
    assert torch.equal(logits_of(AutoModelForCausalLM.from_pretrained(tmp_path / "packed")), logits_of(model))


def test_our_own_folders_are_no_foreign_ones(tmp_path):
    model = two_four_model()
    save_packed(model, tmp_path / "packed")
    save_dense(model, tmp_path / "dense")
    assert recognise(tmp_path / "packed") is recognise(tmp_path / "dense") is recognise(tmp_path / "nothing") is None
    with pytest.raises(FormatError) as caught:
        read_foreign(tmp_path / "dense")
    assert str(caught.value) == (
        f"{tmp_path / 'dense'}: is no checkpoint of another tool that is read here: {known_formats()}."
    )
    assert all(f"{name}: {importer.about}" in known_formats() for name, importer in IMPORTERS.items())


def test_an_import_that_is_not_two_four_is_dense_stored_or_refused(tmp_path):
    model = tiny_model()
    expected = foreign.compressed_tensors_folder(tmp_path / "in", model, "sparse-bitmask")
    with pytest.raises(PatternError, match="none of its 15 linear layers can be packed"):
        import_checkpoint(tmp_path / "in", tmp_path / "out")
    assert not (tmp_path / "out").exists()
    _, found = converted(tmp_path / "in", tmp_path / "out", False)
    assert same_weights(found, expected)


def test_a_source_without_a_configuration_asks_for_a_base(tmp_path):
    torch.save(foreign.ast_llama(tiny_model(), None), tmp_path / "x.pt")
    with pytest.raises(ConfigError) as caught:
        import_checkpoint(tmp_path / "x.pt", tmp_path / "out")
    assert str(caught.value) == (
        f"{tmp_path / 'x.pt'}: holds weights but no config.json. Name the folder or Hub id of the model that it was "
        "made from: base=... (--base)."
    )


@pytest.mark.parametrize("settings, problem", [
    ({"sparsity_config": {"format": "marlin-24"}}, "the sparse format 'marlin-24'; read are sparse-24-bitmask, "
     "sparse-bitmask, dense"),
    ({"format": "pack-quantized"}, "the quantised format 'pack-quantized'; read are int-quantized, float-quantized, "
     "naive-quantized, dense"),
    ({"transform_config": {"config_groups": {"R1": {}}}}, "rotations (R1) that the model must apply when it runs; none "
     "are read"),
])  # fmt: skip
def test_a_compression_that_is_not_read_is_named(tmp_path, settings, problem):
    foreign.compressed_tensors_folder(tmp_path, two_four_model(num_hidden_layers=1), **settings)
    with pytest.raises(FormatError) as caught:
        read_foreign(tmp_path)
    assert str(caught.value) == (
        f"{tmp_path / 'config.json'}: has {problem}. Export the model without it, with the version of "
        "compressed-tensors that wrote it (0.14.0.1)."
    )


def edited(folder, change) -> None:
    state = load_file(folder / "model.safetensors")
    change(state)
    save_file(state, folder / "model.safetensors")


UP = "model.layers.0.mlp.up_proj"


@pytest.mark.parametrize("change, message", [
    (lambda state: state.pop(f"{UP}.bitmask"),
     f"{UP}.bitmask is missing, the rest of it is there. Fetch the folder again."),
    (lambda state: state.pop(f"{UP}.weight_scale"),
     f"{UP}.weight_scale is missing; the weight is int8. Fetch the folder again."),
    (lambda state: state.update({f"{UP}.weight_zero_point": torch.ones(64, 1, dtype=torch.int8)}),
     f"{UP}.weight_zero_point is not 0: pruned weights would not be 0 either. Quantise symmetrically."),
    (lambda state: state.update({f"{UP}.weight_g_idx": torch.zeros(32, dtype=torch.int32)}),
     f"{UP}.weight_g_idx: groups in the order of activations are not read. Quantise without `actorder`."),
    (lambda state: state.update({f"{UP}.weight_scale": torch.ones(5, 1)}),
     f"{UP}.weight_scale: one scale for all, for a row or for a group of a row of int8 or float8_e4m3fn values is "
     "read, found float32 [5, 1] beside int8 [64, 32]."),
    (lambda state: state.update({f"{UP}.shape": torch.tensor([64, 40])}),
     f"{UP}.bitmask: must be [64, 5] for a weight of [64, 40], found [64, 4]. The file is damaged; fetch it again."),
])  # fmt: skip
def test_a_damaged_bitmask_folder_names_the_tensor(tmp_path, change, message):
    model = two_four_model(num_hidden_layers=1)
    foreign.compressed_tensors_folder(tmp_path, model, quantize=foreign.int8("channel"), **INT8)
    edited(tmp_path, change)
    with pytest.raises(FormatError) as caught:
        read_foreign(tmp_path)
    assert str(caught.value) == f"{tmp_path}: {message}"


def test_a_missing_tensor_is_not_replaced_by_random_weights(tmp_path):
    foreign.compressed_tensors_folder(tmp_path / "in", two_four_model(num_hidden_layers=1))
    edited(tmp_path / "in", lambda state: state.pop("model.norm.weight"))
    with pytest.raises(FormatError) as caught:
        import_checkpoint(tmp_path / "in", tmp_path / "out")
    assert str(caught.value) == (
        f"{tmp_path / 'in'}: has no tensor model.norm.weight, which LlamaForCausalLM needs. Fetch the whole "
        "source again."
    )


def test_a_missing_shard_and_a_moved_tensor_are_named(tmp_path):
    foreign.compressed_tensors_folder(tmp_path, two_four_model(num_hidden_layers=1), shards=3)
    index = tmp_path / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    content["weight_map"]["model.norm.weight"] = "model-00001-of-00003.safetensors"
    before = index.read_text()
    if before != json.dumps(content):
        index.write_text(json.dumps(content))
        message = f"{tmp_path}/model-00001-of-00003.safetensors: has no tensor model.norm.weight, which the index says "
        with pytest.raises(FormatError, match=f"^{re.escape(message)}"):
            read_foreign(tmp_path)
    index.write_text(before)
    (tmp_path / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(FormatError, match=re.escape("model-00002-of-00003.safetensors: the file is missing; ")):
        read_foreign(tmp_path)


@pytest.mark.parametrize("change, message", [
    (lambda state: state.pop(f"{UP}._weight_mask"),
     f"{UP}._weight_mask is missing; by modelopt_state.pth the layer is sparse (sparse_magnitude). The masks were lost "
     "when the model was saved; save it again with ModelOpt."),
    (lambda state: state.pop(f"{UP}.weight"),
     f"{UP}.weight is missing; its mask {UP}._weight_mask is there. Fetch the folder again."),
    (lambda state: state.update({f"{UP}._weight_mask": torch.ones(64, 8, dtype=torch.bool)}),
     f"{UP}._weight_mask: must be bool [64, 32] as its weight, found bool [64, 8]. The file is damaged."),
    (lambda state: state.update({f"{UP}.weight_quantizer._amax": torch.ones(1)}),
     f"{UP}.weight_quantizer._amax is of a quantised model, which is not read. Export it with ModelOpt."),
])  # fmt: skip
def test_a_damaged_modelopt_folder_names_the_tensor(tmp_path, change, message):
    foreign.modelopt_folder(tmp_path, two_four_model(num_hidden_layers=1), tiny_model(num_hidden_layers=1))
    edited(tmp_path, change)
    with pytest.raises(FormatError) as caught:
        read_foreign(tmp_path)
    assert str(caught.value) == f"{tmp_path}: {message}"


class Dangerous:
    """Leaves a file behind where it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


def test_code_in_a_torch_file_is_never_run(tmp_path):
    model = two_four_model(num_hidden_layers=1)
    about = foreign.modelopt_folder(tmp_path / "in", model, tiny_model(num_hidden_layers=1))
    torch.save(about | {"extra": Dangerous(tmp_path / "ran")}, tmp_path / "in" / "modelopt_state.pth")
    (note, _) = read_foreign(tmp_path / "in").notes
    assert note == "modelopt_state.pth holds Python objects and was not read; masks were taken from the weight files"
    _, found = converted(tmp_path / "in", tmp_path / "out", True)
    assert torch.equal(logits_of(found), logits_of(model))
    torch.save({"model": {"a": torch.ones(2), "b": Dangerous(tmp_path / "ran")}}, tmp_path / "x_ckpt.pt")
    with pytest.raises(FormatError, match="other Python objects, which are never unpickled. With the tool that"):
        read_foreign(tmp_path / "x_ckpt.pt")
    assert not (tmp_path / "ran").exists()


def test_a_truncated_or_changed_torch_file_is_named(tmp_path):
    file, base = tmp_path / "x.pt", str(tmp_path / "base")
    tiny_model().config.save_pretrained(base)
    torch.save(foreign.ast_llama(tiny_model(), 8), file)
    whole = file.read_bytes()
    file.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(FormatError, match=f"^{re.escape(str(file))}: cannot be read as tensors and plain values"):
        read_foreign(file, base)
    data = bytearray(whole)
    data[len(data) // 3] ^= 1
    file.write_bytes(data)
    message = f"^{re.escape(str(file))}: (the entry .* is not as it was saved|cannot be read)"
    with pytest.raises(FormatError, match=message):
        read_foreign(file, base)


def test_an_ast_branch_that_does_not_fit_is_named(tmp_path):
    state = foreign.ast_llama(tiny_model(), 8)
    name = "transformer.blocks.0.attn.wq"
    for change, message in (
        ({f"model.{name}.x_proj": torch.ones(4, 16)},
         f"{name}: a branch beside a [32, 32] weight is [4, 32] and [32, 4], found [4, 16] and [32, 4]. The file is "
         "damaged."),
        ({f"model.{name}.mask": torch.ones(32, 16, dtype=torch.bool)},
         f"{name}.mask: must be [32, 32] as its weight, of bool or integers, found bool [32, 16]. The file is "
         "damaged."),
        ({f"model.{name}.SLoRA_Weight": None},
         f"{name}.SLoRB_Weight is missing, the rest of it is there. Take an intact copy."),
    ):  # fmt: skip
        changed = {key: value for key, value in (state | change).items() if value is not None}
        torch.save(changed, tmp_path / "x.pt")
        with pytest.raises(FormatError) as caught:
            read_foreign(tmp_path / "x.pt")
        assert str(caught.value) == f"{tmp_path / 'x.pt'}: {message}"


def test_inspection_sees_a_foreign_folder_as_the_model_that_it_becomes(tmp_path):
    model = two_four_model(dtype=torch.bfloat16)
    foreign.compressed_tensors_folder(tmp_path / "bits", model)
    foreign.modelopt_folder(tmp_path / "modelopt", two_four_model(), tiny_model())
    found = inspect_folder(tmp_path / "bits")
    assert found.kind == "compressed-tensors sparse-24-bitmask"
    assert {matrix.name for matrix in found.two_four} == {f"{name}.weight" for name in foreign.linears(model)}
    [matrix] = [each for each in found.matrices if each.name == f"{UP}.weight"]
    assert (matrix.shape, matrix.stored, matrix.nbytes) == ((64, 32), "foreign", 64 * 32 + 64 * 4 + 16)
    assert found.dense_nbytes == sum(tensor.nbytes for tensor in model.state_dict().values())
    found = inspect_folder(tmp_path / "modelopt")
    assert found.kind == "NVIDIA ModelOpt weight sparsity" and len(found.two_four) == 14
    assert found.notes == ("weights under the masks, which ModelOpt keeps, are dropped",)


def test_one_tensor_at_a_time_is_in_memory_while_a_folder_is_converted(tmp_path):
    foreign.compressed_tensors_folder(tmp_path / "in", two_four_model(), quantize=foreign.int8("channel"), **INT8)
    checkpoint, alive, most = read_foreign(tmp_path / "in"), weakref.WeakSet(), []

    def watched(tensor):
        def load():
            loaded = tensor.load()
            most.append(1 + len(alive))
            alive.add(loaded)
            return loaded

        return tensor._replace(load=load)

    tensors = {name: watched(tensor) for name, tensor in checkpoint.tensors.items()}
    write_ordinary_folder(replace(checkpoint, tensors=tensors), tmp_path, {})
    # The last one is still there while the next is read, and no other.
    assert len(most) == len(tensors) and max(most) <= 2


def test_a_branch_in_a_folder_with_names_of_transformers_is_read(tmp_path):
    sparse, state = two_four_model(), {}
    for name, tensor in sparse.state_dict().items():
        layer = name.removesuffix(".weight")
        state[name] = tensor
        if layer in foreign.linears(sparse):
            state |= foreign._branch(layer, tensor, 8, "SLoRB_Weight", torch.Generator().manual_seed(1))
    foreign.save_state(tmp_path / "in", state, sparse.config.to_dict(), shards=2)
    assert recognise(tmp_path / "in") == "ast-release"
    _, found = converted(tmp_path / "in", tmp_path / "out", True)
    assert torch.equal(logits_of(found), logits_of(sparse))  # weights that are 2:4 need no mask
    for layer in foreign.linears(sparse):
        branch = state[f"{layer}.SLoRB_Weight"] @ state[f"{layer}.x_proj"]
        sparse.get_submodule(layer).weight.data += branch
    found = PeftModel.from_pretrained(found, tmp_path / "out" / "slorb").eval()
    torch.testing.assert_close(logits_of(found), logits_of(sparse), rtol=0, atol=1e-5)


def test_inspection_turns_the_weights_of_a_gpt2_checkpoint(tmp_path):
    torch.save({"model": foreign.ast_gpt2(tiny_model("gpt2", n_embd=64, n_head=1), 8)}, tmp_path / "1_ckpt.pt")
    found = inspect_folder(tmp_path / "1_ckpt.pt")
    assert found.kind == "AST release with SLoRB" and len(found.two_four) == 8
    shapes = {matrix.name: matrix.shape for matrix in found.matrices}
    assert shapes["transformer.h.0.attn.c_attn.weight"] == (192, 64)
