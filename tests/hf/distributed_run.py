"""A short training run on one process, under DDP or under FSDP2; started by test_distributed.py.

    python -m torch.distributed.run --nproc-per-node 2 tests/hf/distributed_run.py OUTPUT_FOLDER ddp fsdp

Each rank sees its half of every batch. Writes a safetensors file per kind and rank with the final latent weights
and masks, and a json file with what was seen on the way.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from peft import get_peft_model, get_peft_model_state_dict
from safetensors.torch import save_file
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from hf_adaptive_sparse.errors import ConfigError
from hf_adaptive_sparse.hf.adapter import AdaptiveSparseConfig, dense_teacher, sparse_layers, unload_with_sidecar
from hf_adaptive_sparse.patterns import NMPattern
from hf_adaptive_sparse.shards import gather_rows, local_rows
from tests.tiny_models import tiny_model, tokens

RANKS, STEPS = 2, 6


def new_model() -> nn.Module:
    # 37 rows do not split evenly over two ranks; down_proj would have 37 inputs, which are no groups of four.
    config = AdaptiveSparseConfig(exclude_modules=["down_proj"], modules_to_save=["norm"], slorb_k=8)
    model = get_peft_model(tiny_model(intermediate_size=37), config)
    return model.train()


def batch(step: int, rank: int) -> torch.Tensor:
    return tokens(batch=4, length=10, seed=step).chunk(RANKS)[rank]


@torch.no_grad()
def refresh(model: nn.Module) -> int:
    """Choose every mask anew from the rows at hand, in place; how many entries changed."""
    flips = 0
    for layer in sparse_layers(model):
        keep = gather_rows(NMPattern(2, 4).keep_mask(local_rows(layer.weight).abs()), layer.weight)
        flips += int((keep ^ layer.keep).sum())
        layer.keep.copy_(keep)
    return flips


def train(model: nn.Module, ranks_here: list[int]) -> dict:
    """Train on the halves of these ranks; each half counts 1 / RANKS when one process sees them all."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.01)
    flips = []
    for step in range(STEPS):
        for rank in ranks_here:
            loss = model(input_ids=batch(step, rank), labels=batch(step, rank)).loss
            (loss / len(ranks_here)).backward()
        optimizer.step()
        optimizer.zero_grad()
        if step % 2:
            flips.append(refresh(model))
    return {"flips": flips}


def result(model: nn.Module) -> dict[str, torch.Tensor]:
    tensors = {}
    for layer in sparse_layers(model):
        weight = layer.weight.detach()
        tensors[f"{layer.name}.weight"] = weight.full_tensor() if isinstance(weight, DTensor) else weight
        tensors[f"{layer.name}.keep"] = layer.keep
    return tensors


def run_ddp(facts: dict) -> nn.Module:
    model = DistributedDataParallel(new_model(), find_unused_parameters=False)
    mask = sparse_layers(model)[0].keep
    before = mask.clone()
    mask[0] = dist.get_rank() == 1  # a mask that differs between the ranks...
    model(input_ids=batch(0, 0))
    facts["mask_of_rank_1_was_left_alone"] = bool(dist.get_rank() == 0 or mask[0].all())  # ... and stays so
    mask.copy_(before)
    model.zero_grad()
    return model


def run_fsdp(facts: dict) -> nn.Module:
    model = new_model()
    for block in [module for module in model.modules() if isinstance(module, LlamaDecoderLayer)]:
        fully_shard(block)
    fully_shard(model)
    layers = sparse_layers(model)
    facts["local_rows"] = sorted({local_rows(layer.weight).shape[0] for layer in layers})
    facts["masks_are_full"] = all(layer.keep.shape == layer.weight.shape for layer in layers)
    return model


def refusals(model: nn.Module) -> list[str]:
    found = []
    for call in (model.merge_and_unload, lambda: unload_with_sidecar(model)):
        try:
            call()
        except ConfigError as error:
            found.append(str(error))
    return found


def main(folder: Path, kinds: list[str]) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    dense = tiny_model(intermediate_size=37)(batch(0, 0)).logits
    for kind in kinds:
        facts: dict = {}
        model = {"ddp": run_ddp, "fsdp": run_fsdp}[kind](facts)
        facts.update(train(model, [rank]))
        with dense_teacher(model):
            facts["teacher_is_dense"] = torch.equal(model(input_ids=batch(0, 0)).logits, dense)
        tensors = result(model)
        facts["gathered"] = sorted(adapter_state(model))
        if kind == "fsdp":
            facts["refusals"] = refusals(model)
        (folder / f"{kind}.{rank}.json").write_text(json.dumps(facts))
        save_file(tensors, folder / f"{kind}.{rank}.safetensors")
    dist.destroy_process_group()


def adapter_state(model: nn.Module) -> dict[str, torch.Tensor]:
    """What would be saved of the adapter: from the gathered state of all ranks."""
    plain = model.module if isinstance(model, DistributedDataParallel) else model
    gathered = get_model_state_dict(plain, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    if dist.is_initialized() and dist.get_rank():
        return {}
    return get_peft_model_state_dict(plain, state_dict=gathered, save_embedding_layers=False)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
