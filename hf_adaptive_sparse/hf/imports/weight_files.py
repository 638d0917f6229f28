"""Weight files of other tools: safetensors by their headers, and torch files without running the code in them."""

from __future__ import annotations

import contextlib
import json
import pickle
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig

from ...errors import ConfigError, FormatError
from ..tensor_files import StoredTensor, read_header
from .foreign import ForeignTensor

TORCH_SUFFIXES = (".pt", ".pth", ".bin")

_INDEXES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")
# All that torch.load raises about a file that is none of its own, is damaged, or holds more than tensors and values.
_UNREADABLE = (
    pickle.UnpicklingError, RuntimeError, OSError, EOFError, ValueError, KeyError, TypeError, AttributeError,
    IndexError, zipfile.BadZipFile,
)  # fmt: skip


def open_weights(folder: Path) -> dict[str, ForeignTensor]:
    """The tensors of a model folder: of its safetensors, or else of its torch files; one file or shards with an index.

    Raises:
        FormatError: there are none, one is damaged, or a shard or tensor that the index names is missing.
    """
    tensors: dict[str, ForeignTensor] = {}
    places: dict[str, str] = {}
    files, weight_map = _files(folder)
    for file in files:
        for name, tensor in _open_file(file).items():
            if name in tensors:
                raise FormatError(f"{file}: holds tensor {name}, which {places[name]} holds too. Remove one of them.")
            tensors[name], places[name] = tensor, file.name
    for name, file_name in weight_map.items():
        if places.get(name) != file_name:
            raise FormatError(
                f"{folder / file_name}: has no tensor {name}, which the index says is there. The files are of "
                "different checkpoints; fetch the whole folder again."
            )
    return tensors


def safetensors_headers(folder: Path) -> dict[str, StoredTensor]:
    """Headers of those safetensors of a folder that can be read, to recognise a format by the names in them."""
    headers: dict[str, StoredTensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        with contextlib.suppress(FormatError):  # whoever opens the folder, as whatever format, says what is wrong
            headers |= read_header(file)[0]
    return headers


def read_torch_file(path: Path, *, checksums: bool = True) -> Any:
    """What a file of `torch.save` holds, if that is tensors, plain values and containers of them.

    No code in the file is run (`weights_only`). Tensors stay in the file until they are used.

    Args:
        checksums: read all of it once and compare its checksums, which torch.load does not.
    Raises:
        FormatError: the file is damaged, or holds other Python objects.
    """
    try:
        is_zip = zipfile.is_zipfile(path)
        if is_zip and checksums:
            with zipfile.ZipFile(path) as archive:
                damaged = archive.testzip()
            if damaged is not None:
                raise FormatError(f"{path}: the entry {damaged} is not as it was saved. The file is damaged.")
        return torch.load(path, map_location="cpu", weights_only=True, mmap=is_zip)
    except FormatError:
        raise
    except _UNREADABLE as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise FormatError(
            f"{path}: cannot be read as tensors and plain values ({reason}). It is damaged, or holds other Python "
            "objects, which are never unpickled. With the tool that wrote it, save its state dict alone."
        ) from error


def state_tensors(state: Mapping[str, Any]) -> dict[str, ForeignTensor]:
    """The tensors of a state dict that is in memory, or mapped to a file."""

    def opened(tensor: Tensor) -> ForeignTensor:
        return ForeignTensor(tensor.dtype, tuple(tensor.shape), tensor.nbytes, lambda: tensor.detach())

    return {name: opened(tensor) for name, tensor in state.items() if isinstance(tensor, Tensor)}


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object; FormatError if it is none."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise FormatError(f"{path}: cannot be read: {error.strerror}.") from error
    except (ValueError, RecursionError) as error:
        raise FormatError(f"{path}: is not JSON ({error}).") from error
    if not isinstance(content, dict):
        raise FormatError(f"{path}: holds a {type(content).__name__}, expected an object.")
    return content


def config_of(source: Path, base: str | None) -> dict[str, Any]:
    """config.json of a folder, or else of the base model.

    Raises:
        ConfigError: neither has one.
    """
    if source.is_dir() and (source / "config.json").is_file():
        return read_json(source / "config.json")
    if base is None:
        raise ConfigError(
            f"{source}: holds weights but no config.json. Name the folder or Hub id of the model that it was made "
            "from: base=... (--base)."
        )
    try:
        return AutoConfig.from_pretrained(base).to_dict()
    except (OSError, ValueError) as error:
        raise ConfigError(f"{base}: cannot load its configuration: {str(error).splitlines()[0]}") from error


def _files(folder: Path) -> tuple[list[Path], dict[str, str]]:
    """The weight files, and which tensor is in which by the index."""
    for name in _INDEXES:
        if (folder / name).is_file():
            weight_map = read_json(folder / name).get("weight_map")
            if not isinstance(weight_map, dict) or not all(isinstance(file, str) for file in weight_map.values()):
                raise FormatError(f"{folder / name}: has no table `weight_map` of file names. It is damaged.")
            names = sorted(set(weight_map.values()))
            for file in names:
                if Path(file).name != file or not (folder / file).is_file():
                    raise FormatError(f"{folder / file}: the file is missing; {name} lists it. Fetch it again.")
            return [folder / file for file in names], weight_map
    for file in (folder / "model.safetensors", folder / "pytorch_model.bin"):
        if file.is_file():
            return [file], {}
    others = sorted(folder.glob("*.safetensors")) or [
        file for file in sorted(folder.iterdir()) if file.suffix in TORCH_SUFFIXES and file.name != "modelopt_state.pth"
    ]
    if not others:
        raise FormatError(f"{folder}: holds no weights (*.safetensors, *.bin, *.pt).")
    return others, {}


def _open_file(file: Path) -> dict[str, ForeignTensor]:
    if file.suffix in TORCH_SUFFIXES:
        content = read_torch_file(file)
        if not isinstance(content, Mapping):
            raise FormatError(f"{file}: holds a {type(content).__name__}, expected a state dict.")
        return state_tensors(content)
    return {
        name: ForeignTensor(stored.dtype, stored.shape, stored.nbytes, stored.load)
        for name, stored in read_header(file)[0].items()
    }
