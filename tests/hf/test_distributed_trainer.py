"""Callback, optimizer and trainer on two processes, over gloo on the loopback device, against one process."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from hf_adaptive_sparse.hf.callbacks import last_complete_checkpoint
from hf_adaptive_sparse.hf.mask_state import load_masks
from hf_adaptive_sparse.shards import gather_rows, row_range, sums_over_shards
from tests.hf import distributed_trainer_run as worker
from tests.hf.runs import assert_same

ROOT = Path(__file__).parents[2]
LOOPS = ["ddp-SparseAdamW", "fsdp-SparseAdamW", "fsdp-AdamW"]


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory) -> Path:
    """The folder with the results of two processes; all scenarios run in one start, which is what takes long."""
    if not torch.distributed.is_available():
        pytest.skip("this torch has no torch.distributed")
    folder = tmp_path_factory.mktemp("distributed_trainer")
    environment = {
        **os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo",
        "MASTER_ADDR": "127.0.0.1",
    }  # fmt: skip
    command = [
        sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--rdzv-backend", "c10d",
        "--rdzv-endpoint", "127.0.0.1:0", "--local-addr", "127.0.0.1", worker.__file__, str(folder),
    ]  # fmt: skip
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr[-4000:]
    return folder


def facts(folder: Path) -> list[dict]:
    return [json.loads((folder / f"facts.{rank}.json").read_text()) for rank in range(2)]


@pytest.mark.parametrize("loop", LOOPS)
def test_masks_weights_and_flips_are_those_of_one_process(loop, two_processes):
    _, optimizer = loop.split("-")
    model, _, callback = worker.run_loop("alone", optimizer, [0, 1])
    assert callback.flips_total > 100
    for rank, found in enumerate(facts(two_processes)):
        assert found[loop]["flips"] == callback.flips_total
        assert found[loop]["history"] == callback.history
        assert found[loop]["mode"] == ("optimizer" if optimizer == "SparseAdamW" else "gradient")
        tensors = load_file(two_processes / f"{loop}.{rank}.safetensors")
        assert_same(tensors, worker.result(model), tolerance=1e-5)


def test_rows_were_split_unevenly_and_one_rank_had_none_of_a_layer(two_processes):
    assert [found["local_rows"] for found in facts(two_processes)] == [[19, 1, 4], [18, 0, 4]]


def test_the_state_of_a_sharded_optimizer_is_gathered_and_loaded(two_processes):
    assert [found["optimizer_comes_back"] for found in facts(two_processes)] == [True, True]


def test_a_trainer_under_ddp_is_the_trainer_of_one_process(two_processes, tmp_path):
    alone = worker.run_trainer(tmp_path, batch=4)
    losses = [entry["loss"] for entry in alone.state.log_history if "loss" in entry]
    assert alone.mask_callback.flips_total > 50
    for rank, found in enumerate(facts(two_processes)):
        assert found["wrapped"] == "DistributedDataParallel"
        assert found["history"] == alone.mask_callback.history
        assert_same(load_file(two_processes / f"trainer.{rank}.safetensors"), worker.result(alone.model), 5e-4)
    assert facts(two_processes)[0]["losses"] == pytest.approx(losses, rel=1e-4)


def test_two_processes_leave_a_complete_checkpoint(two_processes):
    folder = two_processes / "trainer" / "checkpoint-6"
    assert last_complete_checkpoint(two_processes / "trainer") == folder
    assert {"rng_state_0.pth", "rng_state_1.pth"} <= {file.name for file in folder.iterdir()}
    tensors = load_file(two_processes / "trainer.0.safetensors")
    keeps = {name.removesuffix(".keep"): tensor for name, tensor in tensors.items() if name.endswith(".keep")}
    state = json.loads((folder / "trainer_state.json").read_text())["stateful_callbacks"]["AdaptiveSparseCallback"]
    identity = {"global_step": "6", "flips_total": str(state["attributes"]["flips_total"])}
    previous, start = load_masks(folder, keeps, identity)
    assert previous.keys() == start.keys() == keeps.keys()
    assert load_masks(folder, keeps, {**identity, "flips_total": "0"}) is None


# -- shards --------------------------------------------------------------------------------------------------


def test_every_rank_knows_its_rows(two_processes):
    first, second = (found["shards"] for found in facts(two_processes))
    assert first["rows"] == {"37": [0, 19], "1": [0, 1], "6": [0, 3]}
    assert second["rows"] == {"37": [19, 37], "1": [1, 1], "6": [3, 6]}
    assert (first["hybrid"], second["hybrid"]) == ([0, 4], [4, 7])
    assert first["replicated"] == second["replicated"] == [6, 5.0]


def test_rows_are_gathered_and_sums_are_added_on_every_rank(two_processes):
    for found in facts(two_processes):
        assert found["shards"]["gathered"] == [True] * 9
        assert found["shards"]["sums"] == [True] * 3


def test_a_weight_that_is_split_along_its_inputs_is_refused(two_processes):
    for found in facts(two_processes):
        assert found["shards"]["refusal"] == (
            "a latent weight of shape [6, 8] is sharded along dimension 1: groups of a sparsity pattern "
            "would be cut apart. Shard it along dimension 0 (the default of fully_shard)."
        )


def test_a_plain_tensor_is_its_own_only_shard():
    weight, values = torch.ones(5, 8), torch.arange(3.0)
    assert row_range(weight) == slice(0, 5)
    assert gather_rows(weight, weight) is weight
    assert sums_over_shards(values, weight) is values
