"""What inspect_folder says about every kind of folder."""

from __future__ import annotations

import json
import re

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file

from hf_adaptive_sparse import AdaptiveSparseConfig
from hf_adaptive_sparse.errors import FormatError
from hf_adaptive_sparse.hf import tensor_files
from hf_adaptive_sparse.hf.inspection import inspect_folder
from hf_adaptive_sparse.hf.pretrained import save_dense, save_packed

from ..tiny_models import tiny_model
from .two_four_models import two_four_model


def by_name(report):
    return {matrix.name: matrix for matrix in report.matrices}


@pytest.fixture(params=[1 << 24, 300], ids=["whole", "in-blocks"])
def chunk(request, monkeypatch):
    monkeypatch.setattr(tensor_files, "_CHUNK", request.param)


@pytest.mark.parametrize("family", ["llama", "gpt2", "mixtral"])
@pytest.mark.parametrize("shard", ["5GB", "8KB"])
def test_packed_and_dense_folders_of_one_model_hold_the_same_zeros(family, shard, tmp_path, chunk):
    model = two_four_model(family, torch.bfloat16)
    saved = save_packed(model, tmp_path / "packed", max_shard_size=shard)
    save_dense(model, tmp_path / "dense", max_shard_size=shard)
    packed, dense = inspect_folder(tmp_path / "packed"), inspect_folder(tmp_path / "dense")
    assert (packed.kind, dense.kind) == ("packed", "dense-stored")
    assert {matrix.name for matrix in packed.packed} == {f"{name}.weight" for name in saved.modules}
    assert dense.packed == ()
    parameters = sum(parameter.numel() for parameter in model.parameters())
    assert packed.parameters == dense.parameters == parameters
    assert packed.dense_nbytes == dense.dense_nbytes == dense.nbytes == 2 * parameters
    assert packed.nbytes == saved.total_bytes
    zeros = sum(int((parameter == 0).sum()) for parameter in model.parameters() if parameter.ndim >= 2)
    assert packed.zeros == dense.zeros == zeros
    for matrix in packed.packed:
        other = by_name(dense)[matrix.name]
        assert matrix.is_two_four and other.is_two_four
        assert matrix.nbytes == 0.5625 * other.nbytes and matrix.shape == other.shape
        assert matrix.sparsity == other.sparsity >= 0.5
        assert (matrix.dtype, matrix.stored, other.stored) == ("bfloat16", "packed", "dense")
        weight = model.get_submodule(matrix.name.removesuffix(".weight")).weight
        assert matrix.shape == tuple(weight.shape[::-1] if family == "gpt2" else weight.shape)


def test_a_plain_folder_is_counted_group_by_group(tmp_path, chunk):
    model = tiny_model("llama")
    weight = model.model.layers[0].mlp.up_proj.weight.data  # [64, 32]
    weight[:, 2:4] = weight[:, 6:8] = 0
    weight.view(64, 8, 4)[:, :, 2:] = 0
    weight[41, 4:8] = torch.tensor([1.0, -0.0, 2.0, 3.0])
    weight[50, 0:4] = 1
    model.model.layers[1].mlp.up_proj.weight.data[3, 5] = float("nan")
    model.save_pretrained(tmp_path)
    report = inspect_folder(tmp_path)
    assert (report.kind, report.problem, report.nbytes) == ("plain", None, report.dense_nbytes)
    matrix = by_name(report)["model.layers.0.mlp.up_proj.weight"]
    assert (matrix.shape, matrix.zeros, matrix.violations) == ((64, 32), 64 * 16 - 1 - 2, 2)
    assert (matrix.first_violation, matrix.negative_zeros, matrix.non_finite) == ((41, 1), 1, 0)
    assert not matrix.is_two_four and matrix.sparsity == matrix.zeros / 2048
    assert by_name(report)["model.layers.1.mlp.up_proj.weight"].non_finite == 1
    assert report.two_four == ()


def test_a_conv1d_is_seen_as_out_in_and_its_first_violation_is_the_first_row(tmp_path, chunk):
    model = two_four_model("gpt2")
    weight = model.transformer.h[0].mlp.c_fc.weight.data  # [in, out] = [32, 128]
    weight[28:32, 5] = 1
    weight[0:4, 9] = 1
    model.save_pretrained(tmp_path)
    matrix = by_name(inspect_folder(tmp_path))["transformer.h.0.mlp.c_fc.weight"]
    assert (matrix.shape, matrix.violations, matrix.first_violation) == ((128, 32), 2, (5, 7))


def test_a_width_without_groups_of_four_has_no_count_of_violations(tmp_path):
    save_file({"odd": torch.zeros(3, 6), "vector": torch.zeros(5), "ids": torch.zeros(2, 2, dtype=torch.int64)},
              tmp_path / "model.safetensors")  # fmt: skip
    [matrix] = inspect_folder(tmp_path).matrices
    assert (matrix.name, matrix.violations, matrix.is_two_four, matrix.sparsity) == ("odd", None, False, 1.0)


def test_an_adapter_is_counted_with_its_mask(tmp_path):
    model = get_peft_model(tiny_model("llama"), AdaptiveSparseConfig(init_mask="magnitude"))
    model.save_pretrained(tmp_path)
    report = inspect_folder(tmp_path)
    assert report.kind == "adapter" and len(report.matrices) == 14
    for matrix in report.matrices:
        assert (matrix.stored, matrix.is_two_four, matrix.sparsity) == ("masked", True, 0.5)


def test_another_adapter_is_listed_as_it_is(tmp_path):
    get_peft_model(tiny_model("llama"), LoraConfig(target_modules=["q_proj"], r=4)).save_pretrained(tmp_path)
    report = inspect_folder(tmp_path)
    assert report.kind == "adapter" and {matrix.shape for matrix in report.matrices} == {(4, 32), (32, 4)}


def test_eight_bit_floats_are_counted(tmp_path):
    weight = torch.tensor([[1.0, 0, 0, 2, 0, 0, 0, 0]]).to(torch.float8_e4m3fn)
    save_file({"w": weight}, tmp_path / "model.safetensors")
    [matrix] = inspect_folder(tmp_path).matrices
    assert (matrix.dtype, matrix.zeros, matrix.is_two_four) == ("float8_e4m3fn", 6, True)


def test_a_damaged_packed_folder_is_a_problem_in_the_report(tmp_path):
    save_packed(two_four_model("llama"), tmp_path / "out")
    file = tmp_path / "out" / "model.sparse24.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    report = inspect_folder(tmp_path / "out")
    assert re.fullmatch(
        rf"{re.escape(str(file))}: tensor \S+ is not as it was saved \(bytes \d+ to {len(data)} of the file\)\. The "
        r"file is damaged; fetch it again\.",
        report.problem,
    )
    assert report.kind == "packed" and report.matrices == ()
    assert inspect_folder(tmp_path / "out", digests=False).problem is None


def test_a_folder_that_is_not_there_or_has_no_weights_is_an_error(tmp_path):
    for name, message in (
        ("nowhere", "there is no such folder."),
        ("empty", "holds no weights (*.safetensors)."),
        ("pickled", "holds no weights (*.safetensors); pytorch_model.bin is a pickle, which is not opened."),
    ):
        folder = tmp_path / name
        if name != "nowhere":
            folder.mkdir()
        if name == "pickled":
            (folder / "pytorch_model.bin").touch()
        with pytest.raises(FormatError) as error:
            inspect_folder(folder)
        assert str(error.value) == f"{folder}: {message}"


def test_a_configuration_that_is_no_json_or_no_object_is_an_error(tmp_path):
    save_file({"w": torch.zeros(4, 4)}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(FormatError) as error:
        inspect_folder(tmp_path)
    assert str(error.value) == f"{tmp_path / 'config.json'}: holds a list, expected an object."
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(FormatError, match=rf"^{re.escape(str(tmp_path))}/config.json: is not JSON \(Expecting .*\)\.$"):
        inspect_folder(tmp_path)


def test_a_truncated_plain_file_is_an_error(tmp_path):
    tiny_model("llama").save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-10])
    with pytest.raises(FormatError, match=rf"^{re.escape(str(file))}: the header cannot be read \(.*\)\. The file is"):
        inspect_folder(tmp_path)


def test_it_reads_what_others_wrote(stories_folder):
    report = inspect_folder(stories_folder / "models" / "stories260K")
    weights = load_file(stories_folder / "models" / "stories260K" / "model.safetensors")
    assert report.parameters == sum(weight.numel() for weight in weights.values()) == 260_032
    assert report.kind == "plain" and len(report.matrices) == 36
    assert json.loads(json.dumps([matrix.name for matrix in report.matrices])) == sorted(
        name for name, weight in weights.items() if weight.ndim == 2
    )
