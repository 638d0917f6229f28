"""Callback, optimizer and trainer on two processes; started by test_distributed_trainer.py.

    python -m torch.distributed.run --nproc-per-node 2 tests/hf/distributed_trainer_run.py OUTPUT_FOLDER

Each rank sees its half of every batch. Rank r writes `NAME.r.safetensors` with the final latent weights and masks of
each run, and `facts.r.json` with what was seen on the way.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from peft import get_peft_model
from safetensors.torch import save_file
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.nn.parallel import DistributedDataParallel
from transformers import TrainerControl, TrainerState

from hf_adaptive_sparse.errors import TrainingError
from hf_adaptive_sparse.hf.adapter import AdaptiveSparseConfig
from hf_adaptive_sparse.hf.callbacks import AdaptiveSparseCallback
from hf_adaptive_sparse.hf.sparse_layers import sparse_layers
from hf_adaptive_sparse.hf.trainer import AdaptiveSparseTrainer, DistillationConfig
from hf_adaptive_sparse.optim import SparseAdamW
from hf_adaptive_sparse.shards import gather_rows, local_rows, row_range, sums_over_shards
from tests.hf.runs import MASKS, arguments, examples, sparse_model

RANKS, STEPS = 2, 12
OPTIMIZERS = {
    "SparseAdamW": lambda parameters: SparseAdamW(parameters, lr=0.03),
    "AdamW": lambda parameters: torch.optim.AdamW(parameters, lr=0.03, weight_decay=0.0),
}


class Branches(nn.Module):
    """Layers whose rows do not split evenly over two ranks; of one of them the second rank gets none."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.uneven, self.single, self.even = nn.Linear(16, 37), nn.Linear(16, 1), nn.Linear(16, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cat([self.uneven(x), self.single(x), self.even(x)], dim=-1)


def new_model() -> nn.Module:
    config = AdaptiveSparseConfig(target_modules=["uneven", "single", "even"], **MASKS)
    return get_peft_model(Branches(), config).train()


def train(model: nn.Module, optimizer: torch.optim.Optimizer, ranks_here: list[int]) -> AdaptiveSparseCallback:
    """A loop that fires the events of a Trainer; one process that sees all halves counts each for a half."""
    callback = AdaptiveSparseCallback()
    args = SimpleNamespace(
        n_gpu=0, fp16=False, max_grad_norm=0.0, save_total_limit=None, save_strategy="no",
        gradient_accumulation_steps=1, output_dir="nowhere", resume_from_checkpoint=None,
    )  # fmt: skip
    state, control = TrainerState(max_steps=STEPS), TrainerControl()
    callback.on_train_begin(args, state, control, model=model, optimizer=optimizer)
    for step in range(STEPS):
        callback.on_step_begin(args, state, control)
        generator = torch.Generator().manual_seed(step)
        inputs = torch.randn(RANKS, 4, 16, generator=generator)
        targets = torch.randn(RANKS, 4, 46, generator=generator)
        for rank in ranks_here:
            ((model(inputs[rank]) - targets[rank]).square().mean() / len(ranks_here)).backward()
        callback.on_pre_optimizer_step(args, state, control)
        optimizer.step()
        optimizer.zero_grad()
        state.global_step += 1
        callback.on_step_end(args, state, control)
    return callback


def result(model: nn.Module) -> dict[str, torch.Tensor]:
    tensors = {}
    for layer in sparse_layers(model):
        weight = layer.weight.detach()
        tensors[f"{layer.name}.weight"] = weight.full_tensor() if isinstance(weight, DTensor) else weight
        tensors[f"{layer.name}.keep"] = layer.keep
    return tensors


def run_loop(kind: str, optimizer_name: str, ranks_here: list[int]) -> tuple[nn.Module, Any, AdaptiveSparseCallback]:
    model = new_model()
    if kind == "fsdp":
        fully_shard(model)
    elif kind == "ddp":
        model = DistributedDataParallel(model)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = OPTIMIZERS[optimizer_name](parameters)
    return model, optimizer, train(model, optimizer, ranks_here)


def run_trainer(folder: Path, batch: int) -> AdaptiveSparseTrainer:
    settings = {"per_device_train_batch_size": batch, "save_strategy": "steps", "save_steps": 3}
    trainer = AdaptiveSparseTrainer(
        model=sparse_model(modules_to_save=["norm"]),
        args=arguments(folder, ddp_find_unused_parameters=False, **settings),
        train_dataset=examples(ignore=True),
        distillation=DistillationConfig(kd_weight=0.7, ce_weight=0.2, temperature=2.0, hidden_weight=0.0),
    )
    trainer.train()
    return trainer


def optimizer_comes_back(model: nn.Module, optimizer: SparseAdamW) -> bool:
    """Whether the state of a sharded optimizer survives gathering and loading."""
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    gathered = get_optimizer_state_dict(model, optimizer, options=options)
    objects = [gathered]
    dist.broadcast_object_list(objects)  # rank 1 gets none
    again = SparseAdamW([parameter for parameter in model.parameters() if parameter.requires_grad], lr=0.03)
    set_optimizer_state_dict(model, again, objects[0], options=StateDictOptions(full_state_dict=True))
    same = len(again.state) == 3
    for parameter, state in optimizer.state.items():
        for name, value in state.items():
            other = again.state[parameter][name]
            same &= type(other) is type(value)
            same &= bool((local_rows(torch.as_tensor(value)) == local_rows(torch.as_tensor(other))).all())
    return same and all(state["decay_scale"] > 0.0 for state in again.state.values())


def shard_facts() -> dict[str, Any]:
    mesh = init_device_mesh("cpu", (RANKS,))
    facts: dict[str, Any] = {"rows": {}, "gathered": [], "sums": []}
    for rows in (37, 1, 6):
        full = torch.arange(rows * 8.0).view(rows, 8)
        parameter = distribute_tensor(full, mesh, [Shard(0)])
        local = local_rows(parameter)
        here = row_range(parameter)
        facts["rows"][str(rows)] = [here.start, here.stop]
        keep, number = gather_rows(local % 3 == 0, parameter), gather_rows(local * 2, parameter)
        facts["gathered"] += [
            torch.equal(full[here], local),
            keep.dtype == torch.bool and torch.equal(keep, full % 3 == 0),
            torch.equal(number, full * 2),
        ]
        facts["sums"].append(sums_over_shards(local.sum(), parameter).item() == full.sum().item())
    whole = distribute_tensor(torch.ones(6, 8), mesh, [Replicate()])
    facts["replicated"] = [row_range(whole).stop, sums_over_shards(torch.tensor(5.0), whole).item()]
    grid = init_device_mesh("cpu", (1, RANKS), mesh_dim_names=("replicas", "shards"))
    hybrid = distribute_tensor(torch.ones(7, 8), grid, [Replicate(), Shard(0)])
    facts["hybrid"] = [row_range(hybrid).start, row_range(hybrid).stop]
    try:
        row_range(distribute_tensor(torch.ones(6, 8), mesh, [Shard(1)]))
    except TrainingError as error:
        facts["refusal"] = str(error)
    return facts


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    facts: dict[str, Any] = {"shards": shard_facts()}
    for kind, optimizer_name in (("ddp", "SparseAdamW"), ("fsdp", "SparseAdamW"), ("fsdp", "AdamW")):
        model, optimizer, callback = run_loop(kind, optimizer_name, [rank])
        name = f"{kind}-{optimizer_name}"
        facts[name] = {"flips": callback.flips_total, "history": callback.history, "mode": callback._mode}
        if name == "fsdp-SparseAdamW":
            facts["local_rows"] = [local_rows(layer.weight).shape[0] for layer in sparse_layers(model)]
            facts["optimizer_comes_back"] = optimizer_comes_back(model, optimizer)
        save_file(result(model), folder / f"{name}.{rank}.safetensors")
    trainer = run_trainer(folder / "trainer", batch=2)
    facts["wrapped"] = type(trainer.model_wrapped).__name__
    facts["losses"] = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    facts["history"] = trainer.mask_callback.history
    save_file(result(trainer.model), folder / f"trainer.{rank}.safetensors")
    (folder / f"facts.{rank}.json").write_text(json.dumps(facts))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
