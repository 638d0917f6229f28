"""Shapes are found from headers, timed with an injected clock, and whole models are compared round by round."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from hf_adaptive_sparse import save_packed
from hf_adaptive_sparse.backend_choice import Choice, choose
from hf_adaptive_sparse.backend_forwards import BACKENDS, Backend
from hf_adaptive_sparse.backend_timing import Spread, cautious_seconds
from hf_adaptive_sparse.errors import ConfigError
from hf_adaptive_sparse.formats import two_four
from hf_adaptive_sparse.hf import bench_rounds, bench_shapes
from hf_adaptive_sparse.hf.backend_times import TimesKey
from hf_adaptive_sparse.hf.bench_rounds import measure_in_process, measure_rounds, ratio_of, spread_of
from hf_adaptive_sparse.hf.bench_shapes import (
    LayerShape,
    key_of,
    random_layer,
    shapes_of_folder,
    shapes_of_kinds,
    time_shape,
)
from hf_adaptive_sparse.hf.bench_worker import MODEL_BACKENDS, WorkerResult, WorkerTask, measure, peak_bytes
from hf_adaptive_sparse.hf.linear_inventory import linear_inventory
from tests.hf.two_four_models import quantize, two_four_model
from tests.tiny_models import tiny_model

CPU = torch.device("cpu")


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("bits", [None, 8, 4])
def test_the_shapes_of_a_folder_are_those_of_its_layers(tmp_path, family, bits):
    model = two_four_model(family, torch.bfloat16)
    saved = save_packed(model, tmp_path, max_shard_size="8KB", quantized=quantize(model, bits) if bits else None)
    found = shapes_of_folder(tmp_path)
    assert sum(found.values()) == len(saved.modules)
    assert {shape.value_bits for shape in found} == {bits or 0} and {shape.dtype for shape in found} == {"bfloat16"}
    assert {shape.dtype for shape in shapes_of_folder(tmp_path, "float32")} == {"float32"}
    if bits is None:
        kinds = linear_inventory(model)
        names = {name for kind in kinds if kind.packed for name in kind.names}
        assert shapes_of_kinds(kinds, "bfloat16") == found or set(saved.modules) - names


@pytest.mark.parametrize("bits", [0, 8, 4])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_random_layer_is_a_valid_packed_layer(bits, dtype):
    layer = random_layer(LayerShape((16, 64), dtype, bits), CPU, torch.Generator().manual_seed(0))
    two_four.validate(layer.weight_values if not bits else layer.weight[:, :32].contiguous(), layer.weight_meta, "w")
    weight = layer.weight
    assert weight.dtype == getattr(torch, dtype) and weight.isfinite().all()
    assert two_four.first_violation(weight) is None and (weight != 0).float().mean() > 0.4
    assert key_of(LayerShape((16, 64), dtype, bits), CPU) == TimesKey.of(layer)


def test_backends_are_timed_in_turns_with_the_clock_that_is_given(monkeypatch):
    """A clock that the backends move: "slow" takes 4 seconds a row, "quick" 1 second whatever the rows."""
    now = [0.0]

    def costing(seconds):
        def build(layer):
            def forward(x):
                now[0] += seconds(len(x))
                return layer(x)

            return forward

        return build

    monkeypatch.setitem(BACKENDS, "dense", Backend(costing(lambda rows: 2.0), held_as="dense"))
    monkeypatch.setitem(BACKENDS, "slow", Backend(costing(lambda rows: 4.0 * rows)))
    monkeypatch.setitem(BACKENDS, "quick", Backend(costing(lambda rows: 1.0)))
    shape, done = LayerShape((16, 32), "float32"), []
    monkeypatch.setattr(bench_shapes, "_COLD_BYTES", 3 * shape.dense_bytes)
    found = time_shape(
        shape, [1, 8], CPU, backends=["slow", "quick"], repetitions=2, seconds=1.0, clock=lambda: now[0],
        on_rows=done.append,
    )  # fmt: skip
    assert list(found) == ["dense", "slow", "quick"] and done == [1, 2]
    assert {name: each[8].seconds for name, each in found.items()} == {
        "dense": (2.0, 2.0), "slow": (32.0, 32.0), "quick": (1.0, 1.0)
    }  # fmt: skip
    assert choose(cautious_seconds(found)) == {1: Choice("quick", 2.0), 8: Choice("quick", 2.0)}


def test_every_backend_of_this_machine_is_timed_and_what_cannot_run_is_refused():
    found = time_shape(LayerShape((16, 32), "float32"), [1], CPU, repetitions=1, seconds=0.0)
    assert list(found) == ["dense", "expanded", "packed"]
    with pytest.raises(ConfigError) as caught:
        time_shape(LayerShape((16, 32), "float32"), [1], CPU, backends=["cusparselt"])
    assert str(caught.value).startswith("backend 'cusparselt' needs a CUDA device, and the layer is on cpu.")


def task(folder: Path, backend: str, **changes) -> WorkerTask:
    known = {
        "prompt": 4, "sequences": 2, "new_tokens": 2, "passes": 1, "dtype": "auto", "device": "cpu", "threads": 1
    }  # fmt: skip
    return WorkerTask(folder=str(folder), backend=backend, **known | changes)


@pytest.fixture(scope="module")
def packed(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("bench") / "packed"
    save_packed(two_four_model("llama"), folder)
    return folder


@pytest.mark.parametrize("backend", [name for name in MODEL_BACKENDS if name != "dense"])
def test_a_model_is_loaded_and_run(packed, backend):
    found = measure(task(packed, backend))
    assert found.load_seconds > 0 and found.prefill > 0 and found.decode > 0 and found.peak_bytes >= 1


def test_a_model_runs_the_tokens_that_it_is_said_to():
    seen = []
    model = tiny_model()
    model.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(tuple(kwargs["input_ids"].shape)), with_kwargs=True
    )
    measure(task(Path("nowhere"), "dense", new_tokens=3, passes=2), load=lambda _: model)
    assert seen == [(2, 4), (2, 1), *[(2, 4), (2, 1), (2, 1), (2, 1)] * 2]


def test_the_peak_of_the_process_is_what_the_kernel_says():
    before = peak_bytes(CPU)
    block = torch.ones(2**24)  # 64 MiB
    assert peak_bytes(CPU) >= before and peak_bytes(CPU) > block.nbytes


def test_a_fresh_process_measures_the_same_task(packed):
    found = measure_in_process(task(packed, "packed"))
    assert found.load_seconds > 0 and found.prefill > 0 and 0 < found.peak_bytes < 2**30


@pytest.mark.parametrize("code, error, message", [
    (1, "Traceback\nRuntimeError: no memory\n", "failed: RuntimeError: no memory"),
    (-9, "", "failed, killed by signal 9: no message"),
])  # fmt: skip
def test_a_process_that_fails_is_named_with_its_last_line(monkeypatch, code, error, message):
    result = type("Result", (), {"returncode": code, "stderr": error, "stdout": ""})
    monkeypatch.setattr(bench_rounds.subprocess, "run", lambda *arguments, **options: result)
    with pytest.raises(ConfigError) as caught:
        measure_in_process(task(Path("folder"), "packed"))
    assert str(caught.value) == f"folder: the process that measures backend 'packed' {message}"


def test_the_task_and_the_environment_reach_the_process(monkeypatch):
    seen = {}

    def run(command, **options):
        seen.update(options, command=command)
        result = WorkerResult(load_seconds=1.0, peak_bytes=2, prefill=3.0, decode=4.0)
        return type("Result", (), {"returncode": 0, "stdout": f"noise\n{json.dumps(vars(result))}\n"})

    monkeypatch.setattr(bench_rounds.subprocess, "run", run)
    mine = task(Path("folder"), "chosen")
    assert measure_in_process(mine, {"HF_ADAPTIVE_SPARSE_TIMES": "t"}).decode == 4.0
    assert WorkerTask(**json.loads(seen["input"])) == mine
    assert seen["env"]["HF_ADAPTIVE_SPARSE_TIMES"] == "t"
    assert seen["command"][1:] == ["-m", "hf_adaptive_sparse.hf.bench_worker"]


def test_rounds_take_turns_and_ratios_are_within_a_round():
    """The machine is three times as slow in the second round."""
    order, done = [], []

    def fake(one: WorkerTask) -> WorkerResult:
        order.append(one.backend)
        slow = 1.0 if len(order) <= 2 else 3.0
        speed = {"dense": 10.0, "packed": 5.0}[one.backend] / slow
        return WorkerResult(load_seconds=slow, peak_bytes=100, prefill=speed, decode=2 * speed)

    tasks = {name: task(Path("f"), name) for name in ("dense", "packed")}
    found = measure_rounds(tasks, 2, fake, done.append)
    assert order == ["dense", "packed", "packed", "dense"] and done == [1, 2, 3, 4]
    assert ratio_of(found, "packed", "decode") == Spread(0.5, 0.5, 0.5)
    assert spread_of(found["packed"], "load_seconds") == Spread(2.0, 1.0, 3.0)
    with pytest.raises(ConfigError) as caught:
        measure_rounds(tasks, 0, fake)
    assert str(caught.value) == "rounds is at least 1, got 0."


@pytest.mark.gpu
def test_cusparselt_is_among_the_backends_of_a_card_that_has_it():
    device = torch.device("cuda")
    shape = LayerShape((4096, 4096), "bfloat16")
    found = time_shape(shape, [1, 64, 4096], device, repetitions=3)
    layer = random_layer(shape, device, torch.Generator().manual_seed(0))
    if BACKENDS["cusparselt"].refuses(layer) is None:
        assert {"cusparselt", "cusparselt-searched"} <= found.keys()
    seconds = cautious_seconds({name: each for name, each in found.items() if name != "expanded"})
    for rows, choice in choose(seconds).items():
        assert seconds[choice.backend][rows] <= seconds["dense"][rows]
