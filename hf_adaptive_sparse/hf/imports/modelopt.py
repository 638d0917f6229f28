"""Checkpoints of NVIDIA ModelOpt's weight sparsity: ordinary weights, and a mask beside each that is pruned.

ModelOpt multiplies at run time: `P._weight_mask` (bool) times `P.weight`, which still holds all weights. Its
`save_pretrained` writes both, and `modelopt_state.pth`; `mto.save` writes one torch file with both. After `mts.export`
the zeros are in the weights and there are no masks.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch

from ...errors import FormatError
from ...formats.two_four import dtype_name
from .foreign import ForeignModel, ForeignTensor
from .weight_files import config_of, open_weights, read_torch_file, safetensors_headers, state_tensors

STATE_FILE = "modelopt_state.pth"
_MASK = "._weight_mask"
_MODES = ("sparse_magnitude", "sparsegpt", "export_sparse", "kd_loss")


def recognises(source: Path) -> bool:
    """A folder with `modelopt_state.pth` or masks under ModelOpt's names, or a torch file of `mto.save`."""
    if source.is_dir():
        return (source / STATE_FILE).is_file() or any(name.endswith(_MASK) for name in safetensors_headers(source))
    if source.suffix not in (".pt", ".pth"):
        return False
    content = read_torch_file(source, checksums=False)
    return isinstance(content, Mapping) and {"modelopt_state", "model_state_dict"} <= content.keys()


def read(source: Path, base: str | None = None) -> ForeignModel:
    """What such a folder or file holds; `base` gives the configuration that a file of `mto.save` lacks.

    Raises:
        FormatError: the model is quantised or pruned in a way that is not read, or a mask does not fit its weight.
    """
    notes: list[str] = []
    if source.is_dir():
        stored = open_weights(source)
        modes = list(_modes_of_folder(source, notes))
    else:
        content = read_torch_file(source)
        stored, modes = state_tensors(content["model_state_dict"]), list(_modes(content["modelopt_state"]))
    for mode, about in modes:
        if mode not in _MODES:
            raise FormatError(
                f"{source}: was changed by ModelOpt's {mode!r}; read are {', '.join(_MODES)}. Export it with ModelOpt."
            )
        _check_masks(source, mode, about, stored, {each for each, _ in modes})
    for name in stored:
        if "_quantizer." in name:
            raise FormatError(f"{source}: {name} is of a quantised model, which is not read. Export it with ModelOpt.")
    tensors = {name: tensor for name, tensor in stored.items() if not name.endswith(_MASK)}
    masks = [name for name in stored if name.endswith(_MASK)]
    for name in masks:
        weight = f"{name.removesuffix(_MASK)}.weight"
        tensors[weight] = _masked(source, weight, stored.get(weight), name, stored[name])
    if masks:
        notes.append("weights under the masks, which ModelOpt keeps, are dropped")
    return ForeignModel(
        source=source, format="NVIDIA ModelOpt weight sparsity", tensors=tensors,
        config=partial(config_of, source, base),
        tokenizer_from=str(source) if source.is_dir() else base, notes=tuple(notes),
    )  # fmt: skip


def _masked(
    source: Path, name: str, weight: ForeignTensor | None, mask_name: str, mask: ForeignTensor
) -> ForeignTensor:
    if weight is None:
        raise FormatError(f"{source}: {name} is missing; its mask {mask_name} is there. Fetch the folder again.")
    if mask.dtype != torch.bool or mask.shape != weight.shape:
        raise FormatError(
            f"{source}: {mask_name}: must be bool {list(weight.shape)} as its weight, found {dtype_name(mask.dtype)} "
            f"{list(mask.shape)}. The file is damaged."
        )
    return weight._replace(
        nbytes=weight.nbytes + mask.nbytes, load=lambda: weight.load().masked_fill(~mask.load(), 0.0)
    )


def _modes_of_folder(source: Path, notes: list[str]) -> Iterator[tuple[str, Any]]:
    path = source / STATE_FILE
    if not path.is_file():
        return
    try:
        content = read_torch_file(path)
    except FormatError:
        # Only what it says about modes is lost: the masks are in the weight files.
        notes.append(f"{STATE_FILE} holds Python objects and was not read; masks were taken from the weight files")
        return
    yield from _modes(content)


def _modes(content: Any) -> Iterator[tuple[str, Any]]:
    listed = content.get("modelopt_state_dict", ()) if isinstance(content, Mapping) else ()
    for entry in listed:
        if isinstance(entry, (tuple, list)) and len(entry) == 2 and isinstance(entry[1], Mapping):
            yield str(entry[0]), entry[1]


def _check_masks(source: Path, mode: str, about: Any, stored: Mapping[str, ForeignTensor], modes: set[str]) -> None:
    """A layer that ModelOpt calls sparse has a mask, until the masks were put into the weights."""
    if "export_sparse" in modes:
        return
    sparse = (about.get("metadata") or {}).get("subnet_config") or {}
    for name, active in sparse.items():
        module = name.removesuffix(".is_sparse")
        if name.endswith(".is_sparse") and active == -1 and f"{module}{_MASK}" not in stored:
            raise FormatError(
                f"{source}: {module}{_MASK} is missing; by {STATE_FILE} the layer is sparse ({mode}). The masks were "
                "lost when the model was saved; save it again with ModelOpt."
            )
