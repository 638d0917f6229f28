"""`import_checkpoint`: a checkpoint of another tool becomes one of ours, packed or dense-stored."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
from transformers.utils import logging

from ..errors import ConfigError, FormatError, PatternError
from ..formats import value_codes
from ..formats.two_four import dtype_name
from ..formats.value_codes import StoredGrid
from .files import atomic_folder
from .imports import Branch, ForeignModel, read_foreign
from .packable import packable_modules
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

    The model is `folder`. If it has a SLoRB branch that is kept, it is `folder/packed` or `folder/dense`, and the
    branch is a LoRA adapter in `folder/slorb`.

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
    options: dict[str, Any] = {"max_shard_size": max_shard_size, "provenance": provenance(foreign)}
    if packed:
        options["quantized"] = loaded.quantized
    save, name = (save_packed, "packed") if packed else (save_dense, "dense")
    if not loaded.factors:
        return save(loaded.model, folder, loaded.tokenizer, overwrite=overwrite, **options)
    with atomic_folder(folder, overwrite) as temporary:
        save_branch(loaded.model, loaded.factors, temporary / BRANCH_FOLDER, Path(folder) / name)
        saved = save(loaded.model, temporary / name, loaded.tokenizer, **options)
    return replace(saved, folder=Path(folder) / name)


def provenance(foreign: ForeignModel) -> dict[str, Any]:
    """What config.json of the result says about its source."""
    return {"imported_from": foreign.format}


def check_branch(foreign: ForeignModel, branch: str, packed: bool) -> None:
    """Raise ConfigError for an unknown `branch`, or a folded one that is to be packed."""
    if branch not in BRANCHES:
        raise ConfigError(f"unknown branch {branch!r}; known: {', '.join(BRANCHES)}.")
    if branch == "fold" and packed and foreign.branches:
        raise ConfigError(
            f"{foreign.source}: a folded SLoRB branch fills every zero of {len(foreign.branches)} layers, which cannot "
            "be packed then. Save dense-stored, or keep the branch."
        )


def load_foreign(foreign: ForeignModel, *, branch: str = "keep", dtype: str | torch.dtype = "auto") -> LoadedForeign:
    """Load what an importer found, by way of an ordinary folder that is removed again.

    Memory: the model once, and one tensor. Disk: the model once more, in the folder for temporary files.

    Args:
        branch: "keep" or "fold".
        dtype: of the model; "auto": as stored.
    """
    fold = foreign.branches if branch == "fold" else {}
    # Loaded weights are parts of the file. Its name goes away now, its bytes with the model; where a file in use cannot
    # be removed (Windows), it stays in the folder for temporary files.
    with tempfile.TemporaryDirectory(prefix="hf_adaptive_sparse_", ignore_cleanup_errors=True) as name:
        write_ordinary_folder(foreign, Path(name), fold)
        model, info = AutoModelForCausalLM.from_pretrained(name, dtype=dtype, output_loading_info=True)
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
    quantized, dropped = _storable_grids(foreign, model)
    if dropped:
        notes.append(f"the codes of {len(dropped)} layers are dropped, their products stay: {dropped[0]}")
    kept = {} if fold else foreign.branches
    return LoadedForeign(
        model=model.eval(), tokenizer=_tokenizer(foreign), quantized=quantized, notes=tuple(notes),
        factors={layer: (each.projection(), each.scale()) for layer, each in kept.items()},
    )  # fmt: skip


def save_branch(
    model: PreTrainedModel,
    factors: Mapping[str, tuple[Tensor, Tensor]],
    folder: Path,
    model_folder: Path,
    overwrite: bool = False,
) -> None:
    """Save branches as a LoRA adapter; `model_folder` is where its base model will be."""
    sidecar = sidecar_on(model, factors)
    for config in sidecar.peft_config.values():
        config.base_model_name_or_path = str(model_folder)
    with atomic_folder(folder, overwrite) as temporary:
        sidecar.save_pretrained(temporary, save_embedding_layers=False)  # its default looks for the base model


def write_ordinary_folder(foreign: ForeignModel, folder: Path, fold: Mapping[str, Branch]) -> None:
    """Weights and configuration as transformers reads them; one tensor at a time, the branches `fold` added to it."""
    config = dict(foreign.config())
    transposed = config.get("model_type") == "gpt2"

    def load(name: str) -> Tensor:
        tensor, layer = foreign.tensors[name].load(), name.removesuffix(".weight")
        if layer in fold and name.endswith(".weight"):
            low_rank = fold[layer].scale().float() @ fold[layer].projection().float()
            tensor = (tensor.float() + (low_rank.t() if transposed else low_rank)).to(tensor.dtype)
        return tensor

    layout = {name: (tensor.dtype, tensor.shape) for name, tensor in foreign.tensors.items()}
    write_tensors(folder / "model.safetensors", layout, load, {"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    generation = foreign.source / "generation_config.json"
    if foreign.source.is_dir() and generation.is_file():
        (folder / generation.name).write_bytes(generation.read_bytes())


def _storable_grids(foreign: ForeignModel, model: PreTrainedModel) -> tuple[dict[str, StoredGrid], list[str]]:
    """The grids that `save_packed` can take, and of every other one why not."""
    grids, dropped = {}, []
    packable = packable_modules(model)[0] if foreign.grids else {}
    for layer, load in foreign.grids.items():
        weight, grid = model.get_parameter(f"{layer}.weight"), load()
        try:
            if layer not in packable:
                raise PatternError(f"{layer}: is not packed")
            if weight.dtype != foreign.tensors[f"{layer}.weight"].dtype:
                raise PatternError(f"{layer}: is cast to {dtype_name(weight.dtype)}")
            rows, columns = weight.shape
            value_codes.check_grid(grid, (rows, columns // 2), weight.dtype, layer)
            grids[layer] = grid
        except PatternError as problem:
            dropped.append(str(problem).rstrip("."))
    return grids, dropped


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
