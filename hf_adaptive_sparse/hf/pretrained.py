"""Saving sparse models: `save_packed` (small, opened with this package) and `save_dense` (opened everywhere).

A packed folder holds `model.sparse24.safetensors` (or shards and their index), `config.json` with the list of
the packed layers, and what `save_pretrained` writes beside weights. After `import hf_adaptive_sparse`,
`from_pretrained` opens it and gives the same logits to the last bit.
"""

from __future__ import annotations

import contextlib
import copy
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from torch import nn
from transformers import PreTrainedModel
from transformers.dynamic_module_utils import custom_object_save

from ..errors import PatternError
from ..formats import FORMATS, value_codes
from ..formats.two_four import dtype_name
from .checkpoint import Checkpoint
from .files import atomic_folder
from .integrity import FORMAT_VERSION, INDEX_NAME, QUANTIZED_VERSION, WEIGHTS_NAME, metadata_of, placeholder_metadata
from .packable import packable_modules, refuse_adapters
from .packed_modules import loaded_grid
from .quantizer import AdaptiveSparseQuantizationConfig
from .stored_values import to_json
from .tensor_files import digest_of_digests, digest_of_file, rewrite_metadata, write_tensors


@dataclass(frozen=True, kw_only=True)
class SavedFolder:
    """What `save_packed` or `save_dense` wrote.

    Args:
        modules: names of the 2:4 linear layers; `save_packed` packed them.
        skipped: names of the other linear layers, and of experts that were given a grid, and why they were not packed.
        quantized: those of `modules` whose values were stored as codes of 8 or 4 bits.
        module_bytes: what the weights of `modules` take in the folder, with their scales.
        scale_bytes: what these scales take.
        module_dense_bytes: what they take as dense matrices.
        total_bytes: what all tensors take in the folder.
        total_dense_bytes: what they take if none is packed.
    """

    folder: Path
    modules: tuple[str, ...]
    skipped: dict[str, str]
    quantized: tuple[str, ...]
    module_bytes: int
    scale_bytes: int
    module_dense_bytes: int
    total_bytes: int
    total_dense_bytes: int


def save_packed(
    model: PreTrainedModel,
    folder: str | os.PathLike,
    tokenizer: Any = None,
    *,
    max_shard_size: int | str = "5GB",
    overwrite: bool = False,
    modules: Iterable[str] | None = None,
    quantized: Mapping[str, value_codes.StoredGrid] | None = None,
    provenance: dict[str, Any] | None = None,
) -> SavedFolder:
    """Save a model with its 2:4 linear layers packed. The model is not changed.

    Args:
        model: of transformers, with adapters merged. Packed are its `nn.Linear` and `Conv1D` (GPT-2) layers.
        folder: appears whole or not at all.
        tokenizer: or processor, saved beside the model.
        max_shard_size: of one weight file, as for `save_pretrained`.
        overwrite: replace a folder that is not empty.
        modules: names of the layers to pack. Default: all that are exactly 2:4, have input features in a
            multiple of 8, and share their weight with no other layer.
        quantized: by name of a layer, the grid to which its weight was rounded: anything with `scales` [out,
            groups] and `bits`, such as `OneShotReport.quantized`. Its values are stored as codes. The weight of a layer
            that is not packed is stored dense, as it is. A layer that was loaded with codes keeps them.
        provenance: how the model was made; kept in config.json under `adaptive_sparse`.
    Raises:
        PatternError: no layer is 2:4, or one of `modules` is not, or a 2:4 layer holds NaN or inf, or the weight
            of a packed layer in `quantized` is not on its grid. Nothing is ever rounded here.
        TargetError: a name in `modules` or `quantized` is no linear layer.
        ConfigError: the model has adapters in it.
        OutputError: the folder is not empty, or could not be written.
    """
    refuse_adapters(model, "save_packed")
    chosen, skipped = packable_modules(model, modules, quantized or ())
    if not chosen:
        examples = "".join(f" {name} {reason}." for name, reason in list(skipped.items())[:1])
        raise PatternError(
            f"{type(model).__name__}: none of its {len(skipped)} linear layers can be packed.{examples} "
            f"Train or prune the model to 2:4 first, or save it dense (save_dense, --format dense)."
        )
    checkpoint = Checkpoint(model, chosen, _grids(model, chosen, quantized or {}))
    values = to_json(checkpoint.stored_values, model.dtype)
    version = QUANTIZED_VERSION if values else FORMAT_VERSION
    split = checkpoint.split(max_shard_size)
    quantization = AdaptiveSparseQuantizationConfig(
        modules=list(chosen),
        weights_file=INDEX_NAME if split.is_sharded else WEIGHTS_NAME,
        value_dtype=dtype_name(model.dtype),
        format_version=version,
        **{**_keys_of_later_versions(model), **values, "producer": producer()},
    )
    with atomic_folder(folder, overwrite) as temporary:
        _save_config(model, temporary, quantization, provenance)
        _save_beside(model, temporary, tokenizer)
        if split.is_sharded:
            index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
            (temporary / INDEX_NAME).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", "utf-8")
        beside = [path.relative_to(temporary).as_posix() for path in temporary.rglob("*") if path.is_file()]
        digests = {}
        for file, names in split.filename_to_tensors.items():
            layout = {name: checkpoint.layout[name] for name in names}
            placeholders = placeholder_metadata(names, beside, version)
            digests[file] = write_tensors(temporary / file, layout, checkpoint.load, placeholders)
        # config.json holds the digest of all tensors, and every weight file the digest of config.json.
        whole = digest_of_digests({name: part[name] for part in digests.values() for name in part})
        quantization.tensor_digest = whole
        _save_config(model, temporary, quantization, provenance)
        files = {name: digest_of_file(temporary / name) for name in beside}
        for file, part in digests.items():
            rewrite_metadata(temporary / file, metadata_of(part, whole, files, version))
    return _summary(Path(folder), checkpoint, tuple(chosen), skipped)


def save_dense(
    model: PreTrainedModel,
    folder: str | os.PathLike,
    tokenizer: Any = None,
    *,
    max_shard_size: int | str = "5GB",
    overwrite: bool = False,
    provenance: dict[str, Any] | None = None,
) -> SavedFolder:
    """Save a model with its zeros as ordinary dense weights, which every engine opens. It is not changed.

    `config.json` has no `quantization_config`, which many engines refuse when they do not know it; what the
    folder is stands under `adaptive_sparse`, which all ignore. In 2:4 layers every zero is written as +0.0.

    Args:
        model, folder, tokenizer, max_shard_size, overwrite, provenance: as for `save_packed`. Packed layers
            are expanded, all at once.
    Raises:
        ConfigError: the model has adapters in it.
        OutputError: the folder is not empty, or could not be written.
    """
    refuse_adapters(model, "save_dense")
    chosen, skipped = packable_modules(model)
    checkpoint = Checkpoint(model, {})
    state = {name: checkpoint.load(name) for name in checkpoint.layout}
    for name in (f"{module}.weight" for module in chosen):
        if ((state[name] == 0) & state[name].signbit()).any():
            state[name] = state[name].masked_fill(state[name] == 0, 0.0)
    about = {"pattern": "2:4", "modules": list(chosen), "producer": producer(), **(provenance or {})}
    with atomic_folder(folder, overwrite) as temporary:
        with _without_quantizer(model):
            model.save_pretrained(temporary, state_dict=state, max_shard_size=max_shard_size)
        _save_config(model, temporary, None, about)
        if tokenizer is not None:
            tokenizer.save_pretrained(temporary)
    return _summary(Path(folder), checkpoint, tuple(chosen), skipped)


def _grids(
    model: PreTrainedModel, modules: Mapping[str, nn.Module], quantized: Mapping[str, value_codes.StoredGrid]
) -> dict[str, value_codes.StoredGrid]:
    """Of every layer whose values are stored as codes: the grid that was given, or with which it was loaded."""
    grids = {
        name: value_codes.StoredGrid(grid.scales, grid.bits) for name, grid in quantized.items() if name in modules
    }
    loaded = {name: loaded_grid(model, name, module) for name, module in modules.items() if name not in grids}
    return grids | {name: grid for name, grid in loaded.items() if grid is not None}


def _summary(folder: Path, checkpoint: Checkpoint, modules: tuple[str, ...], skipped: dict[str, str]) -> SavedFolder:
    stored, dense = checkpoint.stored_bytes, checkpoint.dense_bytes
    suffixes = ("weight", *FORMATS["2:4"].suffixes, value_codes.SUFFIX)
    weights = {f"{module}.{suffix}" for module in modules for suffix in suffixes}
    return SavedFolder(
        folder=folder,
        modules=modules,
        skipped=skipped,
        quantized=tuple(name for name, values in checkpoint.stored_values.items() if values.bits is not None),
        module_bytes=sum(nbytes for name, nbytes in stored.items() if name in weights),
        scale_bytes=sum(stored.get(f"{module}.{value_codes.SUFFIX}", 0) for module in modules),
        module_dense_bytes=sum(nbytes for name, nbytes in dense.items() if name in weights),
        total_bytes=sum(stored.values()),
        total_dense_bytes=sum(dense.values()),
    )


def _save_config(
    model: PreTrainedModel,
    folder: Path,
    quantization: AdaptiveSparseQuantizationConfig | None,
    provenance: dict[str, Any] | None,
) -> None:
    config = copy.deepcopy(model.config)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    if quantization is not None:
        config.quantization_config = quantization
    if provenance:
        config.adaptive_sparse = {**(getattr(config, "adaptive_sparse", None) or {}), **provenance}
    config.dtype = dtype_name(model.dtype)
    config.architectures = [type(model).__name__]
    config.save_pretrained(folder)


def _save_beside(model: PreTrainedModel, folder: Path, tokenizer: Any) -> None:
    """What `save_pretrained` writes besides weights and configuration."""
    if model.is_remote_code():
        custom_object_save(model, folder, config=model.config)
    if model.can_generate():
        model.generation_config.save_pretrained(folder)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)


@contextlib.contextmanager
def _without_quantizer(model: PreTrainedModel) -> Iterator[None]:
    """Let `save_pretrained` take the model for an ordinary one, and undo what it does to the configuration."""
    quantizer, config = model.__dict__.pop("hf_quantizer", None), model.config
    before = dict(config.__dict__)
    config.__dict__.pop("quantization_config", None)
    try:
        yield
    finally:
        if quantizer is not None:
            model.hf_quantizer = quantizer
        config.__dict__.clear()
        config.__dict__.update(before)


def _keys_of_later_versions(model: PreTrainedModel) -> dict[str, Any]:
    return getattr(getattr(model.config, "quantization_config", None), "other", {})


def producer() -> dict[str, str]:
    """Name and version of this package, for what it writes."""
    try:
        return {"package": "hf_adaptive_sparse", "version": version("hf_adaptive_sparse")}
    except PackageNotFoundError:
        return {"package": "hf_adaptive_sparse", "version": "not installed"}
