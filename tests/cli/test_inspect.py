"""`inspect` reads what is stored: shapes, zeros, 2:4, bytes; and says when a folder is damaged."""

from __future__ import annotations

import json
import re

import pytest
import torch
from transformers import AutoModelForCausalLM

from hf_adaptive_sparse.hf.pretrained import save_dense, save_packed
from hf_adaptive_sparse.reports import Report
from tests.cli.runs import read_report, tree
from tests.hf.two_four_models import quantize, round_to_grid, two_four_model


def rows(out: str) -> dict[str, list[str]]:
    lines = [line.replace(" %", "%").split() for line in out.splitlines()]
    return {line[0]: line[1:] for line in lines if len(line) == 6 and line[0] != "matrix"}


def test_a_dense_model_is_listed_matrix_by_matrix(command, tiny_llama_folder):
    outcome = command("inspect", tiny_llama_folder)
    assert outcome.code == 0, outcome.err
    assert f"folder  {tiny_llama_folder} (dense)" in outcome.err
    found = rows(outcome.out)
    assert len(found) == 15  # 14 linears and the embedding
    assert found["model.layers.1.mlp.down_proj"] == ["32x64", "float32", "0.00%", "NO", "8,192"]


def test_the_numbers_are_those_of_the_weights(command, trained):
    outcome = command("inspect", trained / "packed", "--json")
    assert outcome.code == 0, outcome.err
    found = json.loads(outcome.out)
    assert found["kind"] == "packed"
    model = AutoModelForCausalLM.from_pretrained(trained / "dense")
    by_name = {matrix["name"]: matrix for matrix in found["matrices"]}
    assert len(by_name) == 15
    for name, module in model.named_modules():
        if not isinstance(module, torch.nn.Linear) or name == "lm_head":
            continue
        matrix = by_name[f"{name}.weight"]
        assert matrix["zeros"] == int((module.weight == 0).sum())
        assert matrix["two_four"] is True and matrix["violations"] == 0 and matrix["stored"] == "packed"
        # float32: half of the values and 4 bits for every four weights
        assert matrix["bytes"] == module.weight.numel() * 2 + module.weight.numel() // 8
    assert by_name["model.embed_tokens.weight"]["two_four"] is False
    assert found["bytes"] < found["dense_bytes"]


def test_codes_and_scales_are_shown(command, tmp_path):
    model = two_four_model("llama", torch.bfloat16)
    grids = quantize(model, 8)
    name = "model.layers.1.mlp.down_proj"  # [32, 64]
    grids[name] = round_to_grid(model.get_submodule(name), 4, 16)
    saved = save_packed(model, tmp_path / "packed", quantized=grids)
    outcome = command("inspect", tmp_path / "packed")
    assert outcome.code == 0, outcome.err
    found = rows(outcome.out)
    assert found["model.layers.1.mlp.up_proj"][1] == "int8>bfloat16"
    assert found[name] == ["32x64", "int4>bfloat16", found[name][2], "yes", f"{32 * 64 * 3 // 8 + 32 * 4 * 4:,}"]
    assert (
        f"Values of 14 matrices are stored as codes (4 bits and 8 bits); their scales take {saved.scale_bytes:,} bytes "
        f"of this." in " ".join(outcome.out.split())
    )
    outcome = command("inspect", tmp_path / "packed", "--json")
    matrices = {matrix["name"]: matrix for matrix in json.loads(outcome.out)["matrices"]}
    matrix = matrices[f"{name}.weight"]
    assert (matrix["dtype"], matrix["value_bits"], matrix["scale_bytes"]) == ("bfloat16", 4, 32 * 4 * 4)
    assert matrices["lm_head.weight"]["value_bits"] is None


def test_an_adapter_is_counted_with_its_masks(command, trained):
    checkpoint = sorted((trained / "checkpoints").iterdir())[-1]
    outcome = command("inspect", checkpoint, "--json")
    assert outcome.code == 0, outcome.err
    found = json.loads(outcome.out)
    assert found["kind"] == "adapter"
    assert [matrix["stored"] for matrix in found["matrices"]] == ["masked"] * 14
    assert all(matrix["two_four"] for matrix in found["matrices"])


def test_a_report_is_written_where_it_is_asked_for(command, trained, tmp_path):
    outcome = command("inspect", trained / "packed", "--output-dir", tmp_path / "out")
    assert outcome.code == 0, outcome.err
    report = read_report(tmp_path / "out")
    assert len(report["matrices"]) == 15
    assert report["title"] == f"Inspection of {trained / 'packed'}"
    assert re.search(r"Packed matrices take 39,168 bytes, 0\.5312 of the 73,728 ", outcome.out)
    again = command("inspect", trained / "packed", "--output-dir", tmp_path / "out")
    assert (again.code, again.message) == (
        2,
        f"hf-adaptive-sparse inspect: error: {tmp_path / 'out'}: the output folder is not empty. Choose "
        "another one, or replace its results with --overwrite.",
    )
    assert command("inspect", trained / "dense", "--output-dir", tmp_path / "out", "--overwrite").code == 0
    assert read_report(tmp_path / "out")["title"] == f"Inspection of {trained / 'dense'}"


def test_a_dry_run_writes_nothing_and_prints_the_plan(command, tiny_llama_folder, tmp_path):
    outcome = command("inspect", tiny_llama_folder, "--dry-run", "--output-dir", tmp_path / "out")
    assert outcome.code == 0
    assert "would do this" in outcome.out and "report.html" in outcome.out
    assert list(tmp_path.iterdir()) == []


def test_a_damaged_packed_folder_is_an_error(refused, trained, tmp_path):
    for name, content in tree(trained / "packed").items():
        (tmp_path / name).write_bytes(content)
    weights = tmp_path / "model.sparse24.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    assert re.fullmatch(rf"{re.escape(str(weights))}: tensor [\w.]+ .* damaged.*", refused("inspect", tmp_path))


def test_findings_name_the_first_invalid_group_copies_and_repeated_rows(command, tmp_path):
    model = two_four_model("llama")
    up, down = model.model.layers[0].mlp.up_proj.weight.data, model.model.layers[1].mlp.down_proj.weight.data
    save_dense(model, tmp_path / "dense", provenance={"one_shot": {"method": "best"}})
    up[41, 4:8] = torch.tensor([1.0, 2.0, -3.0, 0.0])
    up[50, 8:12] = 1.0
    up[7] = up[3]
    up[11] = 0.0
    down[0, :4] = torch.tensor([-0.0, 1.0, -0.0, 1.0])
    down[2, 0] = float("inf")
    model.model.layers[1].self_attn.q_proj.weight.data.copy_(model.model.layers[0].self_attn.q_proj.weight.data)
    model.save_pretrained(tmp_path / "edited")
    config = (tmp_path / "dense" / "config.json").read_text()
    (tmp_path / "edited" / "config.json").write_text(config)
    outcome = command("inspect", tmp_path / "edited", "--output-dir", tmp_path / "out", "--json")
    assert outcome.code == 0, outcome.err
    report = read_report(tmp_path / "out")
    up_name, down_name = "model.layers.0.mlp.up_proj", "model.layers.1.mlp.down_proj"
    found = {(row["module"], row["what"]): (row["count"], row["where"]) for row in report["findings"]}
    assert found[up_name, "groups with more than two values"] == (
        2, "the first is row 41, group 1 (inputs 4 to 7); the configuration says it is 2:4"
    )
    assert found[up_name, "rows that repeat an earlier one"] == (1, "the first is row 7, the same as row 3")
    assert found[up_name, "rows of zeros"][0] == 1
    assert found[down_name, "NaN or infinite values"][0] == 1
    assert found[down_name, "zeros stored as -0.0"][0] == 2
    assert found["model.layers.1.self_attn.q_proj", "is a copy"] == (1, "the same as model.layers.0.self_attn.q_proj")
    assert report["provenance"]["one_shot"] == {"method": "best"}
    page = (tmp_path / "out" / "report.html").read_text(encoding="utf-8").replace("<wbr>", "")
    assert "row 41, group 1" in page and "one_shot.method" in page
    by_name = {matrix["name"]: matrix for matrix in json.loads(outcome.out)["matrices"]}
    assert by_name[f"{up_name}.weight"]["first_same_row"] == [7, 3]
    assert by_name["model.layers.1.self_attn.q_proj.weight"]["same_as"] == "model.layers.0.self_attn.q_proj.weight"
    assert Report.from_json(report).as_json() == report
    shown = command("inspect", tmp_path / "edited").out
    assert "the first is row 41, group 1 (inputs 4 to 7); the configuration says it is 2:4" in shown


def test_a_matrix_that_the_configuration_names_and_that_is_not_there_is_a_finding(command, tmp_path):
    save_dense(two_four_model("llama"), tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["adaptive_sparse"]["modules"].append("model.layers.7.mlp.up_proj")
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert re.search(r"^model.layers.7.mlp.up_proj +is missing +1 ", command("inspect", tmp_path).out, re.MULTILINE)


@pytest.mark.parametrize("name, message", [
    ("org/name",
     "PATH org/name: no such folder, and inspect reads local ones. Fetch a model from the Hub first: "
     "hf download org/name --local-dir FOLDER."),
    ("./org/name", "PATH ./org/name: no such folder. In . there are: {names}."),
])  # fmt: skip
def test_a_model_that_is_not_local_is_refused(refused, monkeypatch, tmp_path, name, message):
    for folder in ("ogr", "zebra"):
        (tmp_path / folder).mkdir()
    monkeypatch.chdir(tmp_path)
    assert refused("inspect", name) == message.replace("{names}", "ogr")
