"""The PEFT method "adaptive_sparse": a dense model whose target linears carry a sparse, trainable twin each.

The twins are the student, the frozen dense model inside is its teacher. What works on a PeftModel works here.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from torch import Tensor, nn
from transformers.utils import logging

from ..errors import ConfigError, FormatError
from ..families import FAMILIES
from .adapter_config import AdaptiveSparseConfig
from .adapter_layer import AdaptiveSparseLinear, missing_tensors_message
from .peft_registry import NAME, PREFIX, register_method
from .slorb import log_slorb_cost, slorb_cost, unload_with_sidecar
from .sparse_layers import (
    SparseLayer,
    ignore_keep_buffers_in_ddp,
    keep_buffer_names,
    learned_masks_config,
    plain_name,
    print_sparsity_report,
    sparse_layers,
    sparsity_report,
)
from .targets import check_target, resolve_targets
from .teacher import dense_teacher, forget_layers

__all__ = [
    "AdaptiveSparseConfig",
    "AdaptiveSparseLinear",
    "AdaptiveSparseModel",
    "SparseLayer",
    "dense_teacher",
    "ignore_keep_buffers_in_ddp",
    "learned_masks_config",
    "print_sparsity_report",
    "slorb_cost",
    "sparse_layers",
    "sparsity_report",
    "unload_with_sidecar",
]

logger = logging.get_logger(__name__)


class AdaptiveSparseModel(BaseTuner):
    """Injects `AdaptiveSparseLinear` into a model; `get_peft_model(model, config)` makes one."""

    prefix = PREFIX
    tuner_layer_cls = AdaptiveSparseLinear
    target_module_mapping = {name: list(family.targets) for name, family in FAMILIES.items()}

    def _layers(self) -> list[AdaptiveSparseLinear]:
        return [module for module in self.model.modules() if isinstance(module, AdaptiveSparseLinear)]

    # -- adding adapters -----------------------------------------------------------------------------------

    def _prepare_adapter_config(self, peft_config: AdaptiveSparseConfig, _: dict) -> AdaptiveSparseConfig:
        return peft_config  # _prepare_model finds the targets: it has the model

    def _prepare_model(self, peft_config: AdaptiveSparseConfig, model: nn.Module) -> None:
        # Every check runs before the first module is replaced, so that a refused model stays as it was.
        for name, module in resolve_targets(model, peft_config).items():
            check_target(module, name, peft_config)

    def _check_new_adapter_config(self, config: AdaptiveSparseConfig) -> None:
        super()._check_new_adapter_config(config)
        others = [name for name, other in self.peft_config.items() if other is not config]
        if others and any(getattr(other, "layout", "") == "inplace" for other in self.peft_config.values()):
            raise ConfigError(
                "layout='inplace' trains the weights of the model itself, so a model carries one such "
                f"adapter and no other; it has {', '.join(others)}. Use layout='copy' for all of them."
            )
        if any(isinstance(module, BaseTunerLayer) and module.merged for module in self.model.modules()):
            raise ConfigError(
                "an adapter cannot be added while another one is merged: it would start from the merged "
                "weights. Call unmerge_adapter() first."
            )

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        super().inject_adapter(model, adapter_name, *args, **kwargs)
        forget_layers()
        log_slorb_cost(model, adapter_name)

    def _create_and_replace(
        self,
        peft_config: AdaptiveSparseConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        **_: Any,
    ) -> None:
        if isinstance(target, AdaptiveSparseLinear):
            target.update_layer(adapter_name, peft_config)
            return
        check_target(target, current_key, peft_config, values=False)
        layer = AdaptiveSparseLinear(target, adapter_name, peft_config, current_key)
        if adapter_name not in self.active_adapters:
            layer.requires_grad_(False)
        self._replace_module(parent, target_name, layer, target)

    def _mark_only_adapters_as_trainable(self, model: nn.Module) -> None:
        super()._mark_only_adapters_as_trainable(model)
        # A parameter that is the weight of the model and the latent at once goes by the first of its two
        # names, and was frozen with the model.
        for layer in (module for module in model.modules() if isinstance(module, AdaptiveSparseLinear)):
            for name in layer.active_adapters:
                config = layer.adaptive_sparse_config.get(name)
                if config is not None and config.layout == "inplace" and not config.inference_mode:
                    layer.adaptive_sparse_weight[name].requires_grad_(True)

    def _cast_adapter_dtype(self, adapter_name: str, autocast_adapter_dtype: bool = True) -> None:
        super()._cast_adapter_dtype(adapter_name, autocast_adapter_dtype)
        for layer in self._layers():
            # Only a PeftModel comes here, and what it loads is checked in _remap_adapter_state_dict_for_load.
            layer.expect_no_file(adapter_name)
            if not autocast_adapter_dtype and adapter_name in layer.adaptive_sparse_weight:
                layer.cast_adapter_to_base(adapter_name)
        if not autocast_adapter_dtype:
            logger.warning_once(
                "autocast_adapter_dtype=False: latent weights have the dtype of the model. In half "
                "precision a step of the decay is below their resolution, so masked weights will not "
                "shrink in training."
            )

    # -- removing adapters ---------------------------------------------------------------------------------

    def delete_adapter(self, adapter_name: str) -> None:
        for layer in self._layers():
            layer.check_has_dense_weight("deleted")
        super().delete_adapter(adapter_name)

    def merge_adapter(self, adapter_names: list[str] | None = None, safe_merge: bool = False) -> None:
        for layer in self._layers():  # all of them before the first is written to
            layer.check_mergeable(adapter_names)
        super().merge_adapter(adapter_names, safe_merge)

    def _unload_and_optionally_merge(self, merge: bool = True, *args: Any, **kwargs: Any) -> nn.Module:
        for layer in self._layers():  # all of them before the first is replaced
            if merge:
                layer.check_mergeable(kwargs.get("adapter_names"))
            else:
                layer.check_has_dense_weight("unloaded")
        result = super()._unload_and_optionally_merge(merge, *args, **kwargs)
        forget_layers()
        return result

    # -- loading and running -------------------------------------------------------------------------------

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls,
        model: nn.Module,
        config: AdaptiveSparseConfig,
        adapter_name: str,
        state_dict: dict[str, Tensor],
    ) -> dict[str, Tensor]:
        remapped = super()._remap_adapter_state_dict_for_load(
            model=model, config=config, adapter_name=adapter_name, state_dict=state_dict
        )
        given = {plain_name(key) for key in remapped}
        missing = []
        for name, module in model.named_modules():
            if isinstance(module, AdaptiveSparseLinear) and adapter_name in module.adaptive_sparse_weight:
                module.expect_no_file(adapter_name)
                tensors = [f"{plain_name(name)}.{tensor}" for tensor in module.tensor_names(adapter_name)]
                missing += [tensor for tensor in tensors if f"{tensor}.{adapter_name}" not in given]
        if missing:
            raise FormatError(missing_tensors_message(adapter_name, missing))
        return remapped

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        if kwargs.get("adapter_names") is not None:
            raise ConfigError(
                "adapter_names: one batch cannot mix sparse adapters, each has weights of its own. Call "
                "set_adapter(...) and run one batch per adapter."
            )
        yield

    @property
    def _ddp_params_and_buffers_to_ignore(self) -> list[str]:
        # DistributedDataParallel asks the module that it wraps, and a PeftModel passes the question on to
        # here: without an answer every mask travels from rank 0 at every forward.
        return [f"base_model.{name}" for name in keep_buffer_names(self)]


register_method(NAME, AdaptiveSparseConfig, AdaptiveSparseModel)
