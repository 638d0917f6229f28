"""Where masks come from: our own folders, local or on the Hub, and files of other tools.

    folder          masks.json and masks.safetensors, as `save_masks` writes them
    MaskLLM         an .npz archive (or a folder or Hub id with mask_compressed.npz): by the name of a weight and
                    ".mask", all its entries in one row of bits, the first in the highest bit of a byte
    mask tensors    a .safetensors or .pt file: by the name of a weight, with or without ".mask", its shape, 0 and 1

No code in these files is run: archives are read without pickled objects, torch files with `weights_only`.
"""

from __future__ import annotations

import math
import os
import zipfile
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from torch import Tensor

from ..errors import ConfigError, FormatError
from ..formats.two_four import dtype_name
from .imports.weight_files import TORCH_SUFFIXES, read_torch_file, state_tensors
from .mask_folder import BITS_NAME, MANIFEST_NAME, MaskFolder, is_mask_folder, open_mask_folder
from .tensor_files import read_header

ARCHIVE_NAME = "mask_compressed.npz"

_SUFFIX = ".mask"
_KNOWN = "a folder of save_masks, an .npz archive of MaskLLM, or a .safetensors or .pt file of 0 and 1"
_DAMAGED = "The file is damaged, or of another model."


@dataclass(frozen=True, kw_only=True)
class MaskSource:
    """Masks that are read one at a time.

    Args:
        names: of the weights that they are for.
        shapes: of those whose shape is stored.
        load: (name, shape of the weight) -> bool tensor of this shape.
        folder: if they are one of ours.
    """

    path: Path
    format: str
    names: tuple[str, ...]
    load: Callable[[str, tuple[int, ...]], Tensor]
    shapes: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    folder: MaskFolder | None = None


def open_masks(masks: str | os.PathLike, revision: str | None = None) -> MaskSource:
    """The masks in a folder or file, or in a repository on the Hub.

    Raises:
        FormatError: damaged, or nothing of the above.
        ConfigError: no such folder, and nothing of this name on the Hub.
    """
    path = Path(masks).expanduser()
    path = path if path.exists() else _fetch(str(masks), revision)
    if path.is_dir() and not (path / MANIFEST_NAME).is_file() and (path / ARCHIVE_NAME).is_file():
        path = path / ARCHIVE_NAME
    if path.is_dir():
        if not is_mask_folder(path) and not (path / MANIFEST_NAME).is_file():
            raise FormatError(f"{path}: holds no masks ({MANIFEST_NAME}). What is read: {_KNOWN}.")
        folder = open_mask_folder(path)
        shapes = {name: entry.shape for name, entry in folder.manifest.masks.items()}
        return MaskSource(
            path=path, format="masks of hf_adaptive_sparse", names=tuple(shapes), shapes=shapes, folder=folder,
            load=lambda name, shape: folder.keep(name),
        )  # fmt: skip
    if path.suffix == ".npz":
        return _archive(path)
    if path.suffix == ".safetensors" or path.suffix in TORCH_SUFFIXES:
        return _mask_tensors(path)
    raise FormatError(f"{path}: is not a file of masks that is read: {_KNOWN}.")


def _fetch(name: str, revision: str | None) -> Path:
    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=[MANIFEST_NAME, BITS_NAME, ARCHIVE_NAME]))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError, ValueError) as problem:
        reason = (str(problem).strip() or type(problem).__name__).splitlines()[0]
        raise ConfigError(f"{name}: no such folder or file, and the Hub does not give it: {reason}") from problem


def _archive(path: Path) -> MaskSource:
    def bits_of(key: str) -> np.ndarray:
        try:
            with np.load(path, allow_pickle=False) as archive:
                return archive[key]
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, zlib.error) as error:
            raise FormatError(f"{path}: {key}: cannot be read ({error}). The file is damaged.") from error

    def load(name: str, shape: tuple[int, ...]) -> Tensor:
        bits, count = bits_of(keys[name]), math.prod(shape)
        if bits.dtype != np.uint8 or bits.shape != (-(-count // 8),):
            raise FormatError(
                f"{path}: {keys[name]}: a mask of {list(shape)} takes {-(-count // 8)} bytes, found {bits.dtype} "
                f"{list(bits.shape)}. {_DAMAGED}"
            )
        entries = np.unpackbits(bits)
        if entries[count:].any():
            raise FormatError(f"{path}: {keys[name]}: has bits behind the last weight of {list(shape)}. {_DAMAGED}")
        return torch.from_numpy(entries[:count]).bool().view(shape)

    try:
        with np.load(path, allow_pickle=False) as archive:
            keys = {_weight_name(key): key for key in archive.files}
    except (OSError, ValueError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise FormatError(f"{path}: is no .npz archive that can be read ({error}). Fetch it again.") from error
    return MaskSource(path=path, format="MaskLLM archive", names=tuple(keys), load=load)


def _mask_tensors(path: Path) -> MaskSource:
    if path.suffix == ".safetensors":
        stored = {name: (each.dtype, each.shape, each.load) for name, each in read_header(path)[0].items()}
    else:
        content = read_torch_file(path)
        if not isinstance(content, Mapping):
            raise FormatError(f"{path}: holds a {type(content).__name__}, expected a table of masks.")
        stored = {name: (each.dtype, each.shape, each.load) for name, each in state_tensors(content).items()}
    tensors = {_weight_name(name): (name, *about) for name, about in stored.items()}

    def load(name: str, shape: tuple[int, ...]) -> Tensor:
        key, dtype, _, load_one = tensors[name]
        mask = load_one()
        if not ((mask == 0) | (mask == 1)).all():
            raise FormatError(f"{path}: {key}: a mask is 0 and 1, found other {dtype_name(dtype)} values. {_DAMAGED}")
        return mask.bool()

    shapes = {name: tuple(shape) for name, (_, _, shape, _) in tensors.items()}
    return MaskSource(path=path, format="mask tensors", names=tuple(tensors), shapes=shapes, load=load)


def _weight_name(key: str) -> str:
    name = key.removesuffix(_SUFFIX)
    return name if name.endswith(".weight") or name == key else f"{name}.weight"
