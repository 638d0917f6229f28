"""The sparse layers of a model, for those who refresh masks, decay weights or count zeros."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from ..errors import ConfigError, TargetError
from ..methods.learned_masks import LearnedMasksConfig
from ..patterns import parse_pattern
from .adapter_config import AdaptiveSparseConfig
from .adapter_layer import AdaptiveSparseLinear

_WRAPPERS = ("_orig_mod.", "_fsdp_wrapped_module.", "_checkpoint_wrapped_module.")


@dataclass(frozen=True)
class SparseLayer:
    """One adapter of one layer. Tensors are read from the layer, so a handle outlives sharding and loading.

    Attributes:
        name: of the layer, as in the plain model: "model.layers.0.mlp.down_proj".
        adapter: name of the adapter.
        layer: the module.
    """

    name: str
    adapter: str
    layer: AdaptiveSparseLinear

    @property
    def weight(self) -> nn.Parameter:
        """The latent weight, [out, in]; a DTensor under FSDP2."""
        return self.layer.adaptive_sparse_weight[self.adapter]

    @property
    def keep(self) -> Tensor:
        """The mask, bool [out, in], full on every rank. Change it with `copy_` only."""
        return self.layer.adaptive_sparse_keep[self.adapter]

    @property
    def config(self) -> AdaptiveSparseConfig:
        return self.layer.adaptive_sparse_config[self.adapter]


def plain_name(name: str) -> str:
    """The name that a module has in the plain model: without what peft, compile and parallel wrappers add."""
    for wrapper in _WRAPPERS:
        name = name.replace(wrapper, "")
    name = name.removeprefix("module.")
    return name.removeprefix("base_model.model.")


def sparse_layers(model: nn.Module, adapter: str | None = None) -> list[SparseLayer]:
    """Every sparse layer of a model, in the order of its modules.

    Args:
        model: with an adapter; plain, or inside DDP, FSDP or torch.compile.
        adapter: whose layers (default: the active adapters).
    Raises:
        TargetError: there is none.
    """
    found = []
    for name, module in model.named_modules():
        if isinstance(module, AdaptiveSparseLinear):
            adapters = module.active_adapters if adapter is None else [adapter]
            found += [
                SparseLayer(plain_name(name), each, module)
                for each in adapters
                if each in module.adaptive_sparse_weight
            ]
    if not found:
        whose = "" if adapter is None else f" of an adapter {adapter!r}"
        raise TargetError(
            f"the model has no sparse layers{whose}. Add an adapter first: get_peft_model(model, "
            "AdaptiveSparseConfig())."
        )
    return found


def learned_masks_config(model: nn.Module, adapter: str | None = None) -> LearnedMasksConfig:
    """When and how the masks of a model change, as its adapter (default: the active one) was configured.

    Raises:
        ConfigError: the model has no sparse layers, or several adapters are active and do not agree.
    """
    try:
        handles = sparse_layers(model, adapter)
    except TargetError as error:
        raise ConfigError(str(error)) from None
    configs = {handle.adapter: handle.config.learned_masks for handle in handles}
    first, *others = configs.values()
    if any(other != first for other in others):
        raise ConfigError(
            f"the active adapters {', '.join(configs)} differ in when their masks change. Activate one of "
            "them with set_adapter(...)."
        )
    return first


@dataclass(frozen=True)
class LayerSparsity:
    """What is zero in one layer.

    Attributes:
        weights: number of weights.
        kept: weights that are not masked.
        violations: groups with more weights kept than the pattern allows.
    """

    name: str
    pattern: str
    weights: int
    kept: int
    violations: int

    @property
    def sparsity(self) -> float:
        return 1.0 - self.kept / self.weights


@torch.no_grad()
def sparsity_report(model: nn.Module, adapter: str | None = None) -> list[LayerSparsity]:
    """What the masks of a model leave, layer by layer."""
    report = []
    for handle in sparse_layers(model, adapter):
        pattern, keep = parse_pattern(handle.config.pattern), handle.keep
        per_group = keep.reshape(keep.shape[0], -1, pattern.m).sum(dim=-1)
        report.append(
            LayerSparsity(
                name=handle.name,
                pattern=pattern.name,
                weights=keep.numel(),
                kept=int(keep.sum()),
                violations=int((per_group > pattern.n).sum()),
            )
        )
    return report


def print_sparsity_report(model: nn.Module, adapter: str | None = None, per_layer: bool = False) -> None:
    """One line in the style of `print_trainable_parameters`; `per_layer` puts a line per matrix before it."""
    report = sparsity_report(model, adapter)
    if per_layer:
        width = max(len(entry.name) for entry in report)
        for entry in report:
            print(f"{entry.name:<{width}}  {entry.pattern}  kept {entry.kept:,} of {entry.weights:,}")
    weights, kept = sum(entry.weights for entry in report), sum(entry.kept for entry in report)
    print(
        f"sparse matrices: {len(report)} || kept weights: {kept:,} || all weights: {weights:,} || "
        f"sparsity%: {100.0 * (1.0 - kept / weights):.4f} || groups that are not {report[0].pattern}: "
        f"{sum(entry.violations for entry in report):,}"
    )


def keep_buffer_names(model: nn.Module) -> list[str]:
    """The full names of all masks in a model, of every adapter."""
    return [
        f"{name}.adaptive_sparse_keep.{adapter}"
        for name, module in model.named_modules()
        if isinstance(module, AdaptiveSparseLinear)
        for adapter in module.adaptive_sparse_keep
    ]


def ignore_keep_buffers_in_ddp(model: nn.Module) -> list[str]:
    """Keep DistributedDataParallel from sending every mask from rank 0 at every forward.

    Masks are computed alike on every rank, from weights that are alike; sending them costs 1 byte per weight
    and step. A PeftModel needs no call; a model with native adapters does, before DDP wraps it.

    Returns:
        The names of the masks that DDP leaves alone from now on.
    """
    names = keep_buffer_names(model)
    ignored = getattr(model, "_ddp_params_and_buffers_to_ignore", ())
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, sorted({*ignored, *names}))
    return names
