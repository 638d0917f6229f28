"""How `from_pretrained` opens a packed folder: our entry in the quantizer registry of transformers.

Importing `hf_adaptive_sparse` registers it. Without the import transformers would skip the unknown method and
return random weights; the names of the weight files (never `model.safetensors`) turn that into an error.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.quantizers import HfQuantizer, register_quantization_config, register_quantizer
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING
from transformers.utils.quantization_config import QuantizationConfigMixin

from ..errors import ConfigError, FormatError, OutputError
from ..formats import FORMATS
from ..kernels import check_kernel
from ..layers import BACKENDS
from .integrity import (
    FORMAT_VERSION,
    FORMAT_VERSIONS,
    INDEX_NAME,
    QUANTIZED_VERSION,
    WEIGHTS_NAME,
    verify,
    verify_other_files,
)
from .packed_modules import expand, packed_modules, replace_by_packed
from .stored_values import StoredValues, from_json

QUANT_METHOD = "adaptive_sparse"
VERIFY_VARIABLE = "HF_ADAPTIVE_SPARSE_VERIFY"


@dataclass(frozen=True)
class LoadingOptions:
    """How packed folders are opened; see `loading_options`."""

    backend: str = "dense"
    kernel: str = "auto"
    verify: bool = True


_OPTIONS: ContextVar[LoadingOptions | None] = ContextVar("hf_adaptive_sparse_loading_options", default=None)


@contextlib.contextmanager
def loading_options(*, backend: str = "dense", kernel: str = "auto", verify: bool = True) -> Iterator[None]:
    """How `from_pretrained` opens packed folders inside a `with` block.

    Args:
        backend: "dense" expands every packed layer once; "packed" keeps it packed, which saves 44 % of the
            memory of 16-bit weights. `set_packed_backend` changes it later.
        kernel: how packed layers are multiplied. "compiled": on a CPU, by a library that is built at first use, needs
            a C++ compiler then, and reads the packed bytes once; outputs differ from those of dense layers by
            rounding. "torch": anywhere, by expanding them at every call, which is slow. "auto": compiled on a CPU if
            it can be built, else torch, with a warning; HF_ADAPTIVE_SPARSE_KERNEL in the environment says otherwise.
        verify: compare every file with its digest. Without it (also with HF_ADAPTIVE_SPARSE_VERIFY=0 in the
            environment) only headers, names and positions are checked.
    """
    if backend not in BACKENDS:
        raise ConfigError(f"unknown backend {backend!r}; known: {', '.join(BACKENDS)}.")
    check_kernel(kernel)
    token = _OPTIONS.set(LoadingOptions(backend, kernel, verify))
    try:
        yield
    finally:
        _OPTIONS.reset(token)


def _current_options() -> LoadingOptions:
    return _OPTIONS.get() or LoadingOptions(verify=os.environ.get(VERIFY_VARIABLE, "1") != "0")


class AdaptiveSparseQuantizationConfig(QuantizationConfigMixin):
    """The `quantization_config` of a packed folder: what the JSON says, refused where it cannot be read.

    Args:
        modules: names of the packed modules; exactly these are replaced.
        weights_file: the weight file, or the index of a sharded checkpoint, in the same folder.
        value_dtype: dtype of the model that was saved.
        value_bits, group_size, value_exceptions: which values are quantised, and how (`stored_values.py`).
        tensor_digest: of the whole checkpoint (`integrity.py`).
        other: what a later version may have added; ignored, and kept.
    Raises:
        FormatError: it is of a version, pattern or encoding that is not known here, or is damaged.
    """

    def __init__(
        self,
        modules: list[str] | None = None,
        weights_file: str = WEIGHTS_NAME,
        value_dtype: str | None = None,
        tensor_digest: str | None = None,
        value_bits: int | None = None,
        group_size: int | None = None,
        value_exceptions: dict[str, dict[str, Any]] | None = None,
        format_version: int | str = FORMAT_VERSION,
        pattern: str = "2:4",
        axis: str = "in",
        group: int = 4,
        index_encoding: str = "nibble2x2",
        **other: Any,
    ) -> None:
        readable = (
            ("format_version", format_version, FORMAT_VERSIONS),
            ("pattern", pattern, tuple(FORMATS)),
            ("axis", axis, ("in",)),
            ("group", group, (4,)),
            ("index_encoding", index_encoding, ("nibble2x2",)),
        )
        for key, found, known in readable:
            if not any(type(found) is type(each) and found == each for each in known):
                raise FormatError(
                    f"config.json: {key} is {found!r}, this hf_adaptive_sparse reads {' and '.join(map(repr, known))}. "
                    f"Update hf_adaptive_sparse; if that does not help, the file is damaged."
                )
        if not isinstance(modules, list) or not modules or not all(isinstance(name, str) for name in modules):
            raise FormatError("config.json: modules must list the packed modules. The file is damaged.")
        if weights_file not in (WEIGHTS_NAME, INDEX_NAME):
            raise FormatError(
                f"config.json: weights_file is {weights_file!r}, must be {WEIGHTS_NAME} or {INDEX_NAME}. "
                f"The file is damaged."
            )
        if (value_bits is None) != (format_version == FORMAT_VERSION):
            raise FormatError(
                f"config.json: value_bits is {value_bits!r} in format version {format_version}; version "
                f"{QUANTIZED_VERSION} has it, {FORMAT_VERSION} has not. The file is damaged."
            )
        self.value_bits, self.group_size, self.value_exceptions = value_bits, group_size, value_exceptions
        self.quant_method = other.pop("quant_method", QUANT_METHOD)
        self.format_version, self.pattern, self.axis, self.group = format_version, pattern, axis, group
        self.index_encoding, self.value_dtype = index_encoding, value_dtype
        self.modules, self.weights_file, self.tensor_digest = list(modules), weights_file, tensor_digest
        self.other = other
        self.stored_values()

    def stored_values(self) -> dict[str, StoredValues]:
        """How the values of every packed module are stored."""
        return from_json(self.modules, self.value_bits, self.group_size, self.value_dtype, self.value_exceptions)

    def to_dict(self) -> dict[str, Any]:
        fields = dict(self.__dict__)
        if self.value_bits is None:
            del fields["value_bits"], fields["group_size"]
        if self.value_exceptions is None:
            del fields["value_exceptions"]
        return {**fields.pop("other"), **fields}


class AdaptiveSparseQuantizer(HfQuantizer):
    """Replaces the packed modules before the weights are loaded, and checks what can be checked."""

    requires_calibration = True

    def update_attn_implementation(self, config):
        # The only hook that sees the config before the weight files are looked up. The name cannot stand in
        # config.json: transformers would then find the file without this package, and fill in random weights.
        config.transformers_weights = self.quantization_config.weights_file
        weights = sorted(Path(config.name_or_path or "").glob("model.sparse24*.safetensors"))
        if weights and _current_options().verify:
            # Before a model is built from a damaged configuration. Of other places (a Hub) it is done later.
            verify_other_files(weights[0])
        return config

    def update_dtype(self, dtype: torch.dtype) -> torch.dtype:
        self._as_saved = str(dtype) == f"torch.{self.quantization_config.value_dtype}"
        return dtype

    def get_new_dtype(self, converter, param, dtype):
        # Every tensor as it was saved, also where a model mixes dtypes, unless another dtype was asked for.
        return None if self._as_saved else super().get_new_dtype(converter, param, dtype)

    def _process_model_before_weight_loading(self, model: PreTrainedModel, checkpoint_files=None, **kwargs):
        config = self.quantization_config
        if hasattr(model.config, "transformers_weights"):
            del model.config.transformers_weights
        if getattr(model.config, "distributed_config", None) is not None:
            raise ConfigError(
                "a packed folder cannot be loaded in parts (tp_plan, distributed_config). Load it on one "
                "device, or write the model with save_dense and load that."
            )
        tensors, stored_values = {}, config.stored_values()
        if checkpoint_files:
            files = [Path(file) for file in checkpoint_files]
            digests = _current_options().verify
            tensors = verify(files, stored_values, config.tensor_digest, digests=digests)
        for name, stored in stored_values.items():
            replace_by_packed(model, name, stored, tensors, as_saved=self._as_saved)
        if tensors and type(model).__name__ in (model.config.architectures or ()):
            _check_names(files[0].parent, model, set(tensors))

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **kwargs):
        options = _current_options()
        for name, module in packed_modules(model).items():
            names = ("weight_values", "weight_meta", "weight_scale")
            tensors = {suffix: getattr(module, suffix) for suffix in names if getattr(module, suffix) is not None}
            if any(tensor.is_meta for tensor in tensors.values()):
                module.kernel = options.kernel  # offloaded: stays packed
                continue
            for suffix, tensor in tensors.items():
                if not getattr(tensor, "_is_hf_initialized", False):
                    raise FormatError(f"{name}.{suffix}: was not loaded, so the model would be random.")
            module.weight_values.requires_grad_(False)
            module.set_backend(options.backend, name, kernel=options.kernel)

    def _dequantize(self, model: PreTrainedModel, dtype: torch.dtype | str | None = None) -> PreTrainedModel:
        expand(model)
        if isinstance(dtype, str):  # as transformers keeps it in a configuration that was saved
            dtype = getattr(torch, dtype)
        if dtype is not None and dtype != model.dtype:
            model.to(dtype)
        return model

    def get_state_dict_and_metadata(self, model: PreTrainedModel):
        if not getattr(model, "_hf_peft_config_loaded", False):  # else only the adapter is saved
            raise OutputError(
                "save_pretrained would write the packed model as model.safetensors, which transformers opens "
                "as random weights where hf_adaptive_sparse is not imported. Use save_packed(model, folder), "
                "save_dense(model, folder) or push_to_hub(model, repo_id) of hf_adaptive_sparse."
            )
        return None, {}

    def is_serializable(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return True  # adapters on top of it

    @property
    def is_compileable(self) -> bool:
        return True


def stored_names(model: PreTrainedModel) -> set[str]:
    """The names of the tensors that a checkpoint of this model must hold."""
    ignored = set(model._keys_to_ignore_on_save or ())
    return set(model.state_dict()) - set(model.all_tied_weights_keys) - ignored


def _check_names(folder: Path, model: PreTrainedModel, found: set[str]) -> None:
    missing = sorted(stored_names(model) - found)
    unexpected = sorted(found - set(model.state_dict()))
    for names, what in ((missing, "are missing"), (unexpected, "are not of this model")):
        if names:
            some = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
            raise FormatError(f"{folder}: tensors {what}: {some}. The files are of different models.")


def register() -> None:
    """Make the loader known to transformers. Calling it again is harmless; the last one counts."""
    for mapping in (AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING):
        mapping.pop(QUANT_METHOD, None)
    register_quantization_config(QUANT_METHOD)(AdaptiveSparseQuantizationConfig)
    register_quantizer(QUANT_METHOD)(AdaptiveSparseQuantizer)


register()
