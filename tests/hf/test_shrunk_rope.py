"""Rotary position embeddings of every type, in models that are built per layer: for short inputs and for long ones."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from hf_adaptive_sparse.hf.shrunk_export import export_shrunk
from hf_adaptive_sparse.hf.surgery import remove_units
from hf_adaptive_sparse.hf.units import find_axes

from ..tiny_models import tokens
from .shrunk_cases import load, logits_of, shrunk_model

ROOT = Path(__file__).parents[2]
ORIGINAL, MAXIMUM = 16, 64
# A type that follows the length of the input changes past ORIGINAL (longrope), or past MAXIMUM (dynamic); the short
# input behind the long ones asks it to go back.
LENGTHS = (9, 40, 80, 10)
ROPES = {
    "default": {},
    "linear": {"factor": 2.0},
    "dynamic": {"factor": 2.0},
    "yarn": {"factor": 4.0, "original_max_position_embeddings": ORIGINAL},
    "longrope": {
        "factor": 4.0,
        "original_max_position_embeddings": ORIGINAL,
        "short_factor": [1.0, 1.5],
        "long_factor": [2.0, 5.0],
    },
    "llama3": {
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": ORIGINAL,
    },
}
FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "phi3", "mixtral", "qwen3_moe")
CASES = [
    (family, rope)
    for family in FAMILIES
    for rope in ROPES
    if family != "phi3" or rope in ("default", "longrope")  # Phi3Config refuses the others
]
SOME = [("llama", rope) for rope in ROPES] + [("phi3", "longrope"), ("qwen2", "yarn"), ("qwen3", "dynamic")]
every_case = pytest.mark.parametrize(
    ("family", "rope"), [case if case in SOME else pytest.param(*case, marks=pytest.mark.slow) for case in CASES]
)


def uneven_model(family, rope):
    """Three blocks that have different numbers of heads."""
    changes = {"original_max_position_embeddings": ORIGINAL} if family == "phi3" else {}
    parameters = {"rope_type": rope, "rope_theta": 100.0, **ROPES[rope]}
    if family == "phi3":
        parameters["partial_rotary_factor"] = 1.0
    return shrunk_model(family, even=False, rope_parameters=parameters, max_position_embeddings=MAXIMUM, **changes)


def inputs():
    return {str(length): tokens(length=length) for length in LENGTHS}


def assert_same(found, model, case=None):
    """Logits of all inputs, one after the other, to 1e-6 of the largest."""
    for name, ids in inputs().items():
        expected = logits_of(model, ids)
        worst = float((found[name] - expected).abs().max() / expected.abs().max().clamp(min=1.0))
        assert worst <= 1e-6, (case, name, worst)


def all_logits(model):
    return {name: logits_of(model, ids) for name, ids in inputs().items()}


@every_case
def test_a_loaded_model_has_the_logits_of_the_saved_one_past_the_original_length(family, rope, tmp_path):
    model = uneven_model(family, rope)
    if rope != "default":  # else the test would not see that the type was lost
        longest = inputs()["80"]
        assert not torch.allclose(logits_of(uneven_model(family, "default"), longest), logits_of(model, longest))
    result = export_shrunk(model, tmp_path / "model")
    assert result.form == "per_layer"
    assert_same(all_logits(load(tmp_path / "model")), model)


@pytest.mark.parametrize("rope", ["dynamic", "yarn", "longrope"])
def test_what_was_loaded_can_lose_heads_where_all_blocks_had_as_many(rope, tmp_path):
    parameters = {"rope_type": rope, "rope_theta": 100.0, **ROPES[rope]}
    model = shrunk_model(
        "llama", even=False, kinds=("mlp_channel",), rope_parameters=parameters, max_position_embeddings=MAXIMUM
    )
    export_shrunk(model, tmp_path / "model")
    loaded = load(tmp_path / "model")
    keep = {find_axes(loaded, ("kv_head",))[1].name: torch.tensor([True, False, True])}
    for each in (loaded, model):
        remove_units(each, keep)
    assert_same(all_logits(loaded), model)
    assert_same(all_logits(copy.deepcopy(loaded)), model)
    export_shrunk(loaded, tmp_path / "again")
    assert_same(all_logits(load(tmp_path / "again")), model)


PROGRAM = """
import copy, sys, torch
from pathlib import Path
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
folder, remote = Path(sys.argv[1]), sys.argv[2] == "remote"
if not remote:
    import hf_adaptive_sparse
inputs, found = load_file(folder / "inputs.safetensors"), {}
options = {"trust_remote_code": True} if remote else {}
lengths = sorted(inputs, key=int)
lengths = [*lengths[:1], *lengths[2:], lengths[1]]
def run(case, way, model):
    model.eval()
    for length in lengths:
        with torch.no_grad():
            found[f"{case.name}/{way}/{length}"] = model(inputs[length]).logits.contiguous()
def opened(path):
    return AutoModelForCausalLM.from_pretrained(path, experts_implementation="eager", **options)
for case in map(Path, sys.argv[3:]):
    model = opened(case)
    run(case, "loaded", model)
    run(case, "copied", copy.deepcopy(model))
    built = AutoModelForCausalLM.from_config(model.config, **options)
    built.load_state_dict(model.state_dict())
    run(case, "built", built)
    model.save_pretrained(folder / "again" / case.name)
    run(case, "again", opened(folder / "again" / case.name))
assert remote == ("hf_adaptive_sparse" not in sys.modules)
save_file(found, folder / "logits.safetensors")
"""


@pytest.mark.parametrize("code", ["package", "remote"])
@pytest.mark.parametrize("cases", [SOME, pytest.param(CASES, marks=pytest.mark.slow)], ids=["some", "all"])
def test_a_fresh_process_opens_copies_builds_and_saves_it_again(cases, code, tmp_path):
    models = {f"{family}-{rope}": uneven_model(family, rope) for family, rope in cases}
    for name, model in models.items():
        export_shrunk(model, tmp_path / name, remote_code=code == "remote")
    save_file(inputs(), tmp_path / "inputs.safetensors")
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_MODULES_CACHE": str(tmp_path / "modules")}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(tmp_path), code, *(str(tmp_path / name) for name in models)],
        env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = load_file(tmp_path / "logits.safetensors")
    for name, model in models.items():
        for way in ("loaded", "copied", "built", "again"):
            assert_same({length: found[f"{name}/{way}/{length}"] for length in inputs()}, model, (name, way))
