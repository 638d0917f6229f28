"""`import_checkpoint`: a checkpoint of another tool becomes one of ours, packed or dense-stored, with the same logits."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
from transformers.utils import logging

from ..errors import ConfigError, FormatError
from ..formats.value_codes import StoredGrid
from .files import atomic_folder
from .imports import Branch, ForeignModel, read_foreign
from .pretrained import SavedFolder, save_dense, save_packed
from .slorb import sidecar_on
from .tensor_files import write_tensors

logger = logging.get_logger(__name__)

BRANCHES = ("keep", "fold")
BRANCH_FOLDER = "slorb"


@dataclass(frozen=True, kw_only=True)
class LoadedForeign:
    """A checkpoint of another tool, loaded.

    Args:
        model: an ordinary model of transformers, in eval mode.
        tokenizer: None if there is none.
        quantized: grids of the layers whose values are integer codes, as `save_packed` takes them.
        factors: P and S of the branches that were kept, by name of the layer.
        notes: what is not carried over or was worked out, a sentence each.
    """

    model: PreTrainedModel
    tokenizer: Any
    quantized: dict[str, StoredGrid]
    factors: dict[str, tuple[Tensor, Tensor]]
    notes: tuple[str, ...]


def import_checkpoint(
    source: str | os.PathLike,
    folder: str | os.PathLike,
    *,
    base: str | None = None,
    packed: bool = True,
    branch: str = "keep",
    max_shard_size: int | str = "5GB",
    overwrite: bool = False,
) -> SavedFolder:
    """Convert a checkpoint of compressed-tensors, ModelOpt or the AST release.

    A kept SLoRB branch is saved first, as a LoRA adapter in `folder/slorb`, and the model in `folder/model`. Without
    one the model is `folder`.

    Args:
        source: file or folder, see `docs/imports.md`.
        folder: appears whole or not at all.
        base: folder or Hub id of the model that it was made from, where the source lacks config.json or a tokenizer.
        packed: save packed, or else dense-stored.
        branch: "keep" a SLoRB branch beside the 2:4 model, or "fold" it into the weights, which are then no longer 2:4.
        max_shard_size, overwrite: as for `save_packed`.
    Raises:
        FormatError: no known format, or damaged.
        ConfigError: a base is needed and was not named, or a folded branch is to be packed.
        PatternError: nothing in it is 2:4 and it is to be packed.
        OutputError: the folder is not empty, or could not be written.
    """
    foreign = read_foreign(Path(source), base)
    check_branch(foreign, branch, packed)
    loaded = load_foreign(foreign, branch=branch)
    for note in loaded.notes:
        logger.warning(f"{source}: {note}.")
    options: dict[str, Any] = {"max_shard_size": max_shard_size}
    provenance = {"imported_from": foreign.format}

    def save(target: Path, **more: Any) -> SavedFolder:
        save_one, codes = (save_packed, {"quantized": loaded.quantized}) if packed else (save_dense, {})
        return save_one(loaded.model, target, loaded.tokenizer, provenance=provenance, **options, **codes, **more)

    if not loaded.factors:
        return save(Path(folder), overwrite=overwrite)
    with atomic_folder(folder, overwrite) as temporary:
        saved = save(temporary / "model")
        save_branch(loaded, temporary / BRANCH_FOLDER, Path(folder) / "model")
    return saved


def check_branch(foreign: ForeignModel, branch: str, packed: bool) -> None:
    """Raise ConfigError for an unknown `branch`, or a folded one that is to be packed."""
    if branch not in BRANCHES:
        raise ConfigError(f"unknown branch {branch!r}; known: {', '.join(BRANCHES)}.")
    if branch == "fold" and packed and foreign.branches:
        raise ConfigError(
            f"{foreign.source}: a folded SLoRB branch fills every zero of {len(foreign.branches)} layers, which cannot be "
            f"packed then. Save dense-stored, or keep the branch."
        )


def load_foreign(foreign: ForeignModel, *, branch: str = "keep", dtype: str | torch.dtype = "auto") -> LoadedForeign:
    """Load what an importer found, by way of an ordinary folder that is removed again.

    Memory: the model once, and one tensor. Disk: the model once more, in the folder for temporary files.

    Args:
        branch: "keep" or "fold".
        dtype: of the model; "auto": as stored.
    """
    fold = foreign.branches if branch == "fold" else {}
    with tempfile.TemporaryDirectory(prefix="hf_adaptive_sparse_") as name:
        _write_ordinary_folder(foreign, Path(name), fold)
        model, info = AutoModelForCausalLM.from_pretrained(name, dtype=dtype, output_loading_info=True)
        with torch.no_grad():  # a loaded weight may still be a part of the file, which goes away now
            for parameter in model.parameters():
                parameter.data = parameter.data.clone()
    for key in sorted(info["missing_keys"]):
        raise FormatError(
            f"{foreign.source}: has no tensor {key}, which {type(model).__name__} needs. Fetch the whole source again."
        )
    notes = list(foreign.notes)
    if info["unexpected_keys"]:
        keys = sorted(info["unexpected_keys"])
        notes.append(f"{len(keys)} tensors that {type(model).__name__} has no place for are dropped, such as {keys[0]}")
    if fold:
        notes.append(f"the SLoRB branches of {len(fold)} layers are folded into their weights, which are no longer 2:4")
    quantized = {
        layer: load() for layer, load in foreign.grids.items()
        if foreign.tensors[f"{layer}.weight"].dtype == model.get_parameter(f"{layer}.weight").dtype
    }  # fmt: skip
    if len(quantized) < len(foreign.grids):
        notes.append(f"the codes of {len(foreign.grids) - len(quantized)} layers are dropped, since the model is cast")
    kept = {} if fold else foreign.branches
    return LoadedForeign(
        model=model.eval(), tokenizer=_tokenizer(foreign), quantized=quantized, notes=tuple(notes),
        factors={layer: (each.projection(), each.scale()) for layer, each in kept.items()},
    )  # fmt: skip


def save_branch(loaded: LoadedForeign, folder: Path, model_folder: Path) -> None:
    """Save the branches as a LoRA adapter; `model_folder` is where its base model will be."""
    sidecar = sidecar_on(loaded.model, loaded.factors)
    for config in sidecar.peft_config.values():
        config.base_model_name_or_path = str(model_folder)
    sidecar.save_pretrained(folder)


def _write_ordinary_folder(foreign: ForeignModel, folder: Path, fold: Mapping[str, Branch]) -> None:
    def load(name: str) -> Tensor:
        tensor, layer = foreign.tensors[name].load(), name.removesuffix(".weight")
        if layer in fold and name.endswith(".weight"):
            low_rank = fold[layer].scale().float() @ fold[layer].projection().float()
            # GPT-2 keeps its weights [in, out].
            low_rank = low_rank if low_rank.shape == tensor.shape and not _is_transposed(foreign) else low_rank.t()
            tensor = (tensor.float() + low_rank).to(tensor.dtype)
        return tensor

    layout = {name: (tensor.dtype, tensor.shape) for name, tensor in foreign.tensors.items()}
    write_tensors(folder / "model.safetensors", layout, load, {"format": "pt"})
    (folder / "config.json").write_text(json.dumps(dict(foreign.config)), encoding="utf-8")
    generation = foreign.source / "generation_config.json"
    if foreign.source.is_dir() and generation.is_file():
        (folder / generation.name).write_bytes(generation.read_bytes())


def _is_transposed(foreign: ForeignModel) -> bool:
    return foreign.config.get("model_type") == "gpt2"


def _tokenizer(foreign: ForeignModel) -> Any:
    place = foreign.tokenizer_from
    if place is None or (Path(place).is_dir() and not has_tokenizer_files(Path(place))):
        return None
    try:
        return AutoTokenizer.from_pretrained(place)
    except (OSError, ValueError, ImportError, KeyError) as problem:
        reason = (str(problem).strip() or type(problem).__name__).splitlines()[0]
        raise ConfigError(f"{place}: cannot load its tokenizer: {reason}") from problem


def has_tokenizer_files(folder: Path) -> bool:
    """Whether there is a tokenizer to be loaded from a folder, by the names in it."""
    return any(any(folder.glob(f"{name}*")) for name in ("tokenizer", "vocab", "spiece", "sentencepiece"))
