"""The SLoRB branch at the edge: what it costs, and how it leaves as a standard LoRA adapter."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Mapping

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D
from transformers.utils import logging

from ..errors import ConfigError
from ..methods.slorb import BranchCost, block_sum_projection, branch_cost
from ..patterns import parse_pattern
from .sparse_layers import SparseLayer, sparse_layers

logger = logging.get_logger(__name__)


def slorb_cost(model: nn.Module, adapter: str | None = None) -> BranchCost | None:
    """Extra weights and operations of the branches of a model, beside its kept weights; None without any."""
    handles = [handle for handle in sparse_layers(model, adapter) if handle.config.slorb_k is not None]
    if not handles:
        return None
    costs = []
    for handle in handles:
        pattern, config = parse_pattern(handle.config.pattern), handle.config
        costs.append(
            branch_cost(
                handle.layer.out_features,
                handle.layer.in_features,
                config.slorb_k,
                1.0 - pattern.sparsity,
                config.slorb_train_projection,
            )
        )
    return sum(costs[1:], costs[0])


def log_slorb_cost(model: nn.Module, adapter: str) -> None:
    """One line of information about the branches of an adapter, if it has any."""
    cost = slorb_cost(model, adapter)
    if cost is not None:
        logger.info(
            f"SLoRB adds {cost.extra_weights:,} weights to {cost.kept_weights:,} kept ones "
            f"({cost.weights_percent:.1f} %) and {cost.operations_percent:.1f} % to their operations per "
            "token. It cannot be merged into a sparse matrix."
        )


def unload_with_sidecar(model: PeftModel, adapter: str | None = None) -> tuple[nn.Module, PeftModel]:
    """The sparse part as a plain model, and its SLoRB branch as a LoRA adapter on top.

    The two share their weights and are separate models otherwise: save each with its own `save_pretrained`.
    The model that is passed in is used up, as by `merge_and_unload`.

    Args:
        model: with an adapter that has a branch.
        adapter: which one (default: the active one).
    Returns:
        (plain model, every target exactly sparse; PeftModel with the logits of `model`)
    Raises:
        ConfigError: the adapter has no branch, or several are active, or the weights are sharded.
    """
    handles = sparse_layers(model, adapter)
    names = sorted({handle.adapter for handle in handles})
    if len(names) > 1:
        raise ConfigError(
            f"unload_with_sidecar: the adapters {', '.join(names)} are active. Say which one: adapter=..."
        )
    if any(handle.config.slorb_k is None for handle in handles):
        raise ConfigError(
            f"unload_with_sidecar: the adapter {names[0]!r} has no SLoRB branch (slorb_k is None). Use "
            "merge_and_unload(), which loses nothing."
        )
    for handle in handles:
        handle.layer.check_whole(handle.adapter)
    factors = {handle.name: _factors(handle) for handle in handles}
    for handle in handles:
        handle.layer.drop_branch(handle.adapter)
    plain = model.merge_and_unload(adapter_names=names)
    return plain, sidecar_on(plain, factors)


def sidecar_on(plain: nn.Module, factors: Mapping[str, tuple[Tensor, Tensor]]) -> PeftModel:
    """A LoRA adapter that is a low-rank branch, on a model whose weights it shares and which is not changed.

    Args:
        factors: by name of a linear layer of `plain`: P [rank, in] and S [out, rank] of y = x W^T + (x P^T) S^T.
    """
    is_conv = any(isinstance(plain.get_submodule(name), Conv1D) for name in factors)
    # A second tree of modules over the same tensors: LoRA replaces modules, and must not replace those of
    # `plain`.
    tensors = [*plain.parameters(), *plain.buffers()]
    twin = copy.deepcopy(plain, {id(tensor): tensor for tensor in tensors})
    sidecar = get_peft_model(twin, _lora_config(factors, is_conv))
    with torch.no_grad():
        for name, (projection, scale) in factors.items():
            lora = twin.get_submodule(name)
            lora.lora_A["default"].weight.copy_(projection)
            lora.lora_B["default"].weight.copy_(scale)
    return sidecar


def _factors(handle: SparseLayer) -> tuple[Tensor, Tensor]:
    scale = handle.layer.adaptive_sparse_S[handle.adapter].detach()
    if handle.adapter in handle.layer.adaptive_sparse_P:
        return handle.layer.adaptive_sparse_P[handle.adapter].detach(), scale
    projection = block_sum_projection(
        handle.layer.in_features, handle.config.slorb_k, dtype=scale.dtype, device=scale.device
    )
    return projection, scale


def _lora_config(factors: Mapping[str, tuple[Tensor, Tensor]], is_conv: bool) -> LoraConfig:
    ranks = {name: scale.shape[1] for name, (_, scale) in factors.items()}
    rank, _ = Counter(ranks.values()).most_common(1)[0]
    others = {name: own for name, own in ranks.items() if own != rank}
    return LoraConfig(
        r=rank,
        lora_alpha=rank,
        rank_pattern=others,
        alpha_pattern=others,
        target_modules=list(ranks),
        lora_dropout=0.0,
        bias="none",
        fan_in_fan_out=is_conv,
        task_type="CAUSAL_LM",
    )
