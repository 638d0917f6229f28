"""Two processes, over gloo on the loopback device, train the same model as one process does."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import get_peft_model_state_dict
from safetensors.torch import load_file

from tests.hf import distributed_run

# Two more Pythons import torch and transformers: 20 s on a free core, several times that on a busy machine.
pytestmark = pytest.mark.timeout(600)

ROOT = Path(__file__).parents[2]
REFUSAL = (
    "cannot merge the adapter 'default': its weights are sharded over processes. Save the adapter and "
    "merge it in one process: PeftModel.from_pretrained(model, folder).merge_and_unload()."
)


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory) -> Path:
    if not torch.distributed.is_available():
        pytest.skip("this torch has no torch.distributed")
    folder = tmp_path_factory.mktemp("distributed")
    environment = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
        "GLOO_SOCKET_IFNAME": "lo",
        "MASTER_ADDR": "127.0.0.1",
    }
    command = [
        sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--rdzv-backend", "c10d",
        "--rdzv-endpoint", "127.0.0.1:0", "--local-addr", "127.0.0.1",
        str(Path(distributed_run.__file__)), str(folder), "ddp", "fsdp",
    ]  # fmt: skip
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr[-4000:]
    return folder


@pytest.fixture(scope="module")
def one_process():
    model = distributed_run.new_model()
    facts = distributed_run.train(model, list(range(distributed_run.RANKS)))
    return model, facts, distributed_run.result(model)


def facts_of(folder: Path, kind: str) -> list[dict]:
    return [json.loads((folder / f"{kind}.{rank}.json").read_text()) for rank in range(2)]


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
@pytest.mark.parametrize("rank", [0, 1])
def test_masks_are_bit_equal_to_those_of_one_process(kind, rank, two_processes, one_process):
    _, facts, expected = one_process
    assert sum(facts["flips"]) > 100  # masks did change
    assert facts_of(two_processes, kind)[rank]["flips"] == facts["flips"]
    found = load_file(two_processes / f"{kind}.{rank}.safetensors")
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        if name.endswith(".keep"):
            assert torch.equal(found[name], tensor), name
        else:
            torch.testing.assert_close(found[name], tensor, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_the_teacher_inside_a_wrapped_model_is_dense(kind, two_processes):
    assert [facts["teacher_is_dense"] for facts in facts_of(two_processes, kind)] == [True, True]


def test_ddp_does_not_send_masks_around(two_processes):
    assert [facts["mask_of_rank_1_was_left_alone"] for facts in facts_of(two_processes, "ddp")] == [
        True,
        True,
    ]


def test_shards_are_whole_rows_and_masks_are_full(two_processes):
    first, second = facts_of(two_processes, "fsdp")
    assert first["masks_are_full"] and second["masks_are_full"]
    assert (first["local_rows"], second["local_rows"]) == ([8, 16, 19], [8, 16, 18])


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_a_gathered_adapter_has_the_tensors_of_an_ordinary_one(kind, two_processes, one_process):
    model = one_process[0]
    expected = sorted(get_peft_model_state_dict(model, save_embedding_layers=False))
    assert facts_of(two_processes, kind)[0]["gathered"] == expected


def test_a_sharded_adapter_is_not_merged(two_processes):
    for facts in facts_of(two_processes, "fsdp"):
        assert facts["refusals"] == [REFUSAL, REFUSAL]  # to merge, and to unload with a sidecar
