"""The layer that takes the place of a target linear: the dense one inside, a sparse weight per adapter."""

from __future__ import annotations

import warnings
import weakref
from typing import Any

import torch
from peft.tuners._buffer_dict import BufferDict
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge
from peft.utils.integrations import gather_params_ctx
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn import functional
from transformers.pytorch_utils import Conv1D

from ..errors import ConfigError, FormatError
from ..layers import straight_through, straight_through_with_decay
from ..methods.slorb import block_sum_projection, initial_scale
from ..patterns import parse_pattern
from ..saliency import SALIENCY
from .adapter_config import AdaptiveSparseConfig

_HALF = (torch.float16, torch.bfloat16)
_KEEP = "adaptive_sparse_keep"


def dense_weight(module: nn.Module) -> Tensor:
    """The weight of a linear as [out, in]; `Conv1D` stores it [in, out]. Shares memory with the module."""
    weight = module.weight.detach()
    return weight.T if isinstance(module, Conv1D) else weight


def features(module: nn.Module) -> tuple[int, int]:
    """(out, in) of a linear, also where DeepSpeed has emptied its weight."""
    if isinstance(module, Conv1D):
        return module.nf, module.nx
    return module.out_features, module.in_features


def missing_tensors_message(adapter_name: str, missing: list[str]) -> str:
    """What to say of a file that does not have all tensors of an adapter."""
    return (
        f"the file of adapter {adapter_name!r} lacks {len(missing)} tensors, the first {missing[0]}. A "
        "mask cannot be recomputed from the weights. Save the adapter again with save_pretrained; to "
        "start a new one instead, build a new AdaptiveSparseConfig."
    )


class AdaptiveSparseLinear(nn.Module, BaseTunerLayer):
    """A linear whose weight is masked, with a gradient that passes straight through the mask.

    Attributes:
        adaptive_sparse_weight: per adapter the latent weight, [out, in] contiguous, float32 by default.
        adaptive_sparse_keep: per adapter the mask, bool [out, in]; written in place only.
        adaptive_sparse_S: per adapter with SLoRB, [out, in / k].
        adaptive_sparse_P: per adapter with SLoRB and a trained projection, [in / k, in].
        adaptive_sparse_config: per adapter its AdaptiveSparseConfig.
        adaptive_sparse_dense: True while the layer stands in for its teacher (see hf.teacher).
        adaptive_sparse_backward_decay: pull on masked weights that the backward pass adds to their gradient;
            0.0 leaves it to the optimizer.
    """

    adapter_layer_names = ("adaptive_sparse_weight", "adaptive_sparse_S", "adaptive_sparse_P")
    other_param_names = (_KEEP, "adaptive_sparse_config")

    def __init__(self, base_layer: nn.Module, adapter_name: str, config: AdaptiveSparseConfig, name: str) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.adaptive_sparse_weight = nn.ParameterDict()
        self.adaptive_sparse_S = nn.ParameterDict()
        self.adaptive_sparse_P = nn.ParameterDict()
        self.adaptive_sparse_keep = BufferDict({}, persistent=True)
        self.adaptive_sparse_config: dict[str, AdaptiveSparseConfig] = {}
        self.adaptive_sparse_dense = False
        self.adaptive_sparse_backward_decay = 0.0
        self.adaptive_sparse_name = name
        self.out_features, self.in_features = features(base_layer)
        self.merged_adapters: list[str] = []
        self._unmerged_weight: Tensor | None = None
        self._original_dtype = base_layer.weight.dtype
        self._awaited: dict[str, dict[str, tuple[weakref.ref[Tensor], int]]] = {}
        self._disable_adapters = False
        self._active_adapter = adapter_name
        self.update_layer(adapter_name, config)

    # -- adding an adapter ---------------------------------------------------------------------------------

    def update_layer(self, adapter_name: str, config: AdaptiveSparseConfig) -> None:
        """Add an adapter: its latent weight, its mask and its branch."""
        self.adaptive_sparse_config[adapter_name] = config
        with gather_params_ctx(self.base_layer.weight):
            self._add_weight(adapter_name, config)
            latent = self.adaptive_sparse_weight[adapter_name].detach()
            if latent.is_meta:  # low_cpu_mem_usage: the values follow from a file
                keep = torch.zeros(latent.shape, dtype=torch.bool, device=self.base_layer.weight.device)
            else:
                keep = self._initial_keep(latent, config)
            self.adaptive_sparse_keep[adapter_name] = keep
            if config.slorb_k is not None:
                self._add_branch(adapter_name, config, latent, keep.to(latent.device))
        self._move_adapter_to_device_of_base_layer(adapter_name)
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)
        if config.is_from_file:
            tensors = {name: getattr(self, name)[adapter_name] for name in self.tensor_names(adapter_name)}
            self._awaited[adapter_name] = {
                name: (weakref.ref(tensor), tensor._version) for name, tensor in tensors.items()
            }

    def _add_weight(self, adapter_name: str, config: AdaptiveSparseConfig) -> None:
        # float32 whatever the base is: a step of the decay is far below the resolution of bfloat16.
        dtype = torch.float32 if self._original_dtype in _HALF else self._original_dtype
        dense = dense_weight(self.base_layer)
        shared = config.layout == "inplace" and dense.dtype == dtype
        latent = dense if shared else torch.empty(dense.shape, dtype=dtype, device=dense.device).copy_(dense)
        if not config.init_weights:
            nn.init.normal_(latent)
        # Registering it moves it to the meta device under low_cpu_mem_usage.
        self.adaptive_sparse_weight[adapter_name] = self.base_layer.weight if shared else nn.Parameter(latent)
        if config.layout == "inplace":
            self._share_weight(adapter_name)

    @staticmethod
    def _initial_keep(weight: Tensor, config: AdaptiveSparseConfig) -> Tensor:
        if config.mask_policy == "frozen":
            return weight != 0
        if config.init_mask == "dense":
            return torch.ones(weight.shape, dtype=torch.bool, device=weight.device)
        return parse_pattern(config.pattern).keep_mask(SALIENCY[config.saliency](weight))

    def _add_branch(self, adapter_name: str, config: AdaptiveSparseConfig, latent: Tensor, keep: Tensor) -> None:
        scale = initial_scale(latent, keep, config.slorb_k, config.slorb_init)
        self.adaptive_sparse_S[adapter_name] = nn.Parameter(scale)
        if config.slorb_train_projection:
            projection = block_sum_projection(
                self.in_features, config.slorb_k, dtype=latent.dtype, device=latent.device
            )
            self.adaptive_sparse_P[adapter_name] = nn.Parameter(projection)

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        # peft's own casts to the dtype of the base as well, which would round a float32 latent on its way in
        # from a file.
        if adapter_name not in self.adaptive_sparse_weight:
            return
        device = self.base_layer.weight.device if device is None else device
        for name in self.tensor_names(adapter_name):
            entries = getattr(self, name)
            if not entries[adapter_name].is_meta and entries[adapter_name].device != device:
                entries[adapter_name] = entries[adapter_name].to(device)
        if self.adaptive_sparse_config[adapter_name].layout == "inplace":
            self._share_weight(adapter_name)

    def _share_weight(self, adapter_name: str) -> None:
        latent = self.adaptive_sparse_weight[adapter_name]
        if not latent.is_meta and self.base_layer.weight is not latent:
            self.base_layer.weight = latent

    def cast_adapter_to_base(self, adapter_name: str) -> None:
        """Give the trainable tensors of an adapter the dtype that the linear came with."""
        for name in self.adapter_layer_names:
            entries = getattr(self, name)
            if adapter_name in entries and entries[adapter_name].dtype != self._base_dtype(adapter_name):
                entries[adapter_name] = entries[adapter_name].to(self._base_dtype(adapter_name))
        if self.adaptive_sparse_config[adapter_name].layout == "inplace":
            self._share_weight(adapter_name)

    def _base_dtype(self, adapter_name: str) -> torch.dtype:
        if self.adaptive_sparse_config[adapter_name].layout == "inplace":
            return self._original_dtype  # the weight itself is the float32 latent
        return self.base_layer.weight.dtype

    # -- loading -------------------------------------------------------------------------------------------

    def tensor_names(self, adapter_name: str) -> list[str]:
        """The attributes that hold a tensor of this adapter, and so the tensors that its file must have."""
        return [name for name in (*self.adapter_layer_names, _KEEP) if adapter_name in getattr(self, name)]

    def expect_no_file(self, adapter_name: str) -> None:
        """The tensors of this adapter need not come from a file, or whoever loads it checks them."""
        self._awaited.pop(adapter_name, None)

    def _check_awaited(self) -> None:
        # transformers' own load_adapter only logs a tensor that the file lacks, which would leave a mask that
        # does not belong to the weights.
        for adapter_name, tensors in list(self._awaited.items()):
            missing = []
            for name, (reference, version) in tensors.items():
                tensor = getattr(self, name)[adapter_name]
                if reference() is tensor and tensor._version == version:
                    missing.append(f"{self.adaptive_sparse_name}.{name}")
            if missing:
                raise FormatError(missing_tensors_message(adapter_name, missing))
            self.expect_no_file(adapter_name)
            if self.adaptive_sparse_config[adapter_name].layout == "inplace":
                self._share_weight(adapter_name)

    def train(self, mode: bool = True) -> AdaptiveSparseLinear:
        self._check_awaited()
        return super().train(mode)

    # -- computing -----------------------------------------------------------------------------------------

    def masked_weight(self, adapter_name: str) -> Tensor:
        """The latent weight with +0.0 wherever it is masked, in its own dtype, differentiable."""
        weight, keep = self.adaptive_sparse_weight[adapter_name], self.adaptive_sparse_keep[adapter_name]
        if self.adaptive_sparse_config[adapter_name].mask_policy == "frozen":
            # Masked weights that can never come back need no gradient; it would only count in the clipped
            # norm.
            return torch.where(keep, weight, weight.new_zeros(()))
        if self.adaptive_sparse_backward_decay and torch.is_grad_enabled():
            return straight_through_with_decay(weight, keep, self.adaptive_sparse_backward_decay)
        return straight_through(weight, keep)

    def get_delta_weight(self, adapter: str) -> Tensor:
        """What an adapter adds to the dense weight: [out, in]."""
        masked = self.masked_weight(adapter)
        return masked - dense_weight(self.base_layer).to(masked.dtype)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if self._awaited:
            self._check_awaited()
        if self.adaptive_sparse_dense:
            return self.base_layer(x, *args, **kwargs)
        if self._disable_adapters:
            if self.merged_adapters:
                self.unmerge()
            return self.base_layer(x, *args, **kwargs)
        active = [name for name in self.active_adapters if name in self.adaptive_sparse_weight]
        if self.merged_adapters or not active:
            return self.base_layer(x, *args, **kwargs)
        weight = self.masked_weight(active[0])
        for name in active[1:]:
            weight = weight + self.get_delta_weight(name)
        bias = self.base_layer.bias
        # The weight follows the input, never the other way round: a float32 latent must not make every
        # activation of a bfloat16 model float32.
        result = functional.linear(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype))
        for name in active:
            if name in self.adaptive_sparse_S:
                result = result + self._branch(x, name)
        return result

    def _branch(self, x: Tensor, adapter_name: str) -> Tensor:
        if adapter_name in self.adaptive_sparse_P:
            sums = functional.linear(x, self.adaptive_sparse_P[adapter_name].to(x.dtype))
        else:
            sums = x.unflatten(-1, (-1, self.adaptive_sparse_config[adapter_name].slorb_k)).sum(dim=-1)
        return functional.linear(sums, self.adaptive_sparse_S[adapter_name].to(sums.dtype))

    # -- merging -------------------------------------------------------------------------------------------

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Write the masked weight, exact +0.0 included, over the dense one. `unmerge` takes it back.

        Args:
            safe_merge: raise, and change nothing, if the result has NaN or inf.
            adapter_names: which adapter; one, since a sum of sparse weights is not sparse. Default: active.
        Raises:
            ConfigError: more than one adapter, an adapter with a branch, or a sharded weight.
        """
        asked = check_adapters_to_merge(self, adapter_names)
        names = [name for name in asked if name in self.adaptive_sparse_weight]
        self.check_mergeable(names)
        if not names:
            return
        merged = self.masked_weight(names[0]).detach().to(self._base_dtype(names[0]))
        # A kept value that underflows in a narrower dtype may become -0.0.
        merged = merged + merged.new_zeros(())
        if safe_merge and not torch.isfinite(merged).all():
            raise ValueError(f"NaNs detected in the merged weights. The adapter {names[0]} seems to be broken")
        self._unmerged_weight = self.base_layer.weight.data
        self.base_layer.weight.data = merged.T.contiguous() if isinstance(self.base_layer, Conv1D) else merged
        self.merged_adapters.append(names[0])

    def check_mergeable(self, adapter_names: list[str] | None = None) -> None:
        """Raise ConfigError if merging these adapters (default: active ones) gives no sparse weight."""
        asked = self.active_adapters if adapter_names is None else adapter_names
        present = [name for name in asked if name in self.adaptive_sparse_weight]
        names = [name for name in present if name not in self.merged_adapters]
        if not names:
            return
        if len(names) + len(self.merged_adapters) > 1:
            raise ConfigError(
                f"cannot merge the adapters {', '.join([*self.merged_adapters, *names])} together: a sum of "
                "sparse weights is not sparse. Merge one of them, with adapter_names=[...] or after "
                "set_adapter(...)."
            )
        self.check_whole(names[0])
        if names[0] in self.adaptive_sparse_S:
            raise ConfigError(
                f"cannot merge the adapter {names[0]!r}: it has a SLoRB branch "
                f"(slorb_k={self.adaptive_sparse_config[names[0]].slorb_k}), which would fill every zero. "
                "Use unload_with_sidecar(model), which returns the sparse model and the branch as a LoRA "
                "adapter on top, or train without slorb_k."
            )

    def check_whole(self, adapter_name: str) -> None:
        """Raise ConfigError if this process holds only a part of the weight."""
        if isinstance(self.adaptive_sparse_weight[adapter_name], DTensor):
            raise ConfigError(
                f"cannot merge the adapter {adapter_name!r}: its weights are sharded over processes. Save the "
                "adapter and merge it in one process: PeftModel.from_pretrained(model, folder).merge_and_unload()."
            )

    def unmerge(self) -> None:
        """Put the dense weight back."""
        if not self.merged_adapters:
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
            return
        self.base_layer.weight.data = self._unmerged_weight
        self._unmerged_weight = None
        self.merged_adapters.clear()

    def drop_branch(self, adapter_name: str) -> None:
        """Take the branch off an adapter; its sparse part stays."""
        del self.adaptive_sparse_S[adapter_name]
        if adapter_name in self.adaptive_sparse_P:
            del self.adaptive_sparse_P[adapter_name]

    # -- switching -----------------------------------------------------------------------------------------

    def enable_adapters(self, enabled: bool) -> None:
        if not enabled:
            self.check_has_dense_weight("disabled")
        super().enable_adapters(enabled)

    def check_has_dense_weight(self, what: str) -> None:
        """Raise ConfigError if the dense weight of the model is no longer there."""
        if any(config.layout == "inplace" for config in self.adaptive_sparse_config.values()):
            raise ConfigError(
                f"an adapter with layout='inplace' cannot be {what}: it trains the weights of the model "
                "itself, and the dense ones are gone. Use layout='copy', or load the dense model a second "
                "time."
            )

    def __repr__(self) -> str:
        return "adaptive_sparse." + super().__repr__()
