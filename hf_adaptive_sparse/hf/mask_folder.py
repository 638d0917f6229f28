"""A folder that holds masks alone: `masks.safetensors` with their bits, `masks.json` with what they are masks of.

    masks.json  adaptive_sparse_masks  1, the version of the folder
                base                   name (of a local folder without its path), whether it is local, revision, and
                                       configuration of the model that they are for
                kept_weights           "equal" to those of the base, "trained" (other ones), or "unknown"
                masks                  {name of a weight: what `MaskEntry` holds}
                producer               package and version
                tensor_digest          digest of all bits

`masks.safetensors` has `<name>.bits` and, for few, `<name>.cleared` (see `formats/mask_bits.py`), and in its header the
digests of `integrity.py`: of every tensor, and of masks.json.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import FormatError
from ..formats import mask_bits
from ..formats.mask_bits import EncodedMask
from ..formats.two_four import VALUE_DTYPES, dtype_name
from .integrity import metadata_of, placeholder_metadata, verify
from .tensor_files import StoredTensor, digest_of_digests, digest_of_file, rewrite_metadata, write_tensors

FOLDER_VERSION = 1
MANIFEST_NAME, BITS_NAME = "masks.json", "masks.safetensors"
KEPT_WEIGHTS = ("equal", "trained", "unknown")

_VERSION = "adaptive_sparse_masks"
_DTYPES = tuple(dtype_name(dtype) for dtype in (*VALUE_DTYPES, torch.float64))


@dataclass(frozen=True, kw_only=True)
class MaskEntry:
    """One mask of a folder.

    Args:
        shape: of the weight as it is stored.
        transposed: the weight is stored [in, out], and the bits are those of [out, in].
        encoding: one of `mask_bits.ENCODINGS`.
        kept: number of kept entries.
        dtype: of the weight of the sparse model.
        result_digest: of the weight of the sparse model.
        base_dtype, base_digest: of the weight of the base model; None if no base was there to be compared.
    """

    shape: tuple[int, ...]
    transposed: bool
    encoding: str
    kept: int
    dtype: str
    result_digest: str
    base_dtype: str | None
    base_digest: str | None

    @property
    def matrix(self) -> tuple[int, int]:
        """Rows and columns of the bits: of [out, in]; of more dimensions, all but the last are rows."""
        if self.transposed:
            return self.shape[1], self.shape[0]
        rows = 1
        for length in self.shape[:-1]:
            rows *= length
        return rows, self.shape[-1]


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """What masks.json says."""

    base: Mapping[str, Any]
    kept_weights: str
    masks: Mapping[str, MaskEntry]


@dataclass(frozen=True)
class MaskFolder:
    """A folder that was checked: every byte of it is as it was saved."""

    path: Path
    manifest: Manifest
    tensors: Mapping[str, StoredTensor]

    def keep(self, name: str) -> Tensor:
        """The mask of a weight, bool, in the shape in which that is stored."""
        entry = self.manifest.masks[name]
        cleared = self.tensors.get(f"{name}.cleared")
        encoded = EncodedMask(
            entry.encoding, self.tensors[f"{name}.bits"].load(), None if cleared is None else cleared.load()
        )
        keep = mask_bits.decode(encoded, entry.matrix, f"{self.path / BITS_NAME}: {name}.bits")
        if int(keep.count_nonzero()) != entry.kept:
            raise FormatError(
                f"{self.path / BITS_NAME}: {name}.bits: keeps {int(keep.count_nonzero())} entries, {MANIFEST_NAME} "
                f"says {entry.kept}. The folder is damaged; fetch it again."
            )
        return keep.t() if entry.transposed else keep.view(entry.shape)


def is_mask_folder(path: str | Path) -> bool:
    """Whether a local folder holds masks alone, as `save_masks` writes them; it is not checked."""
    try:
        content = json.loads((Path(path) / MANIFEST_NAME).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(content, dict) and _VERSION in content


def write_mask_folder(
    folder: Path, manifest: Manifest, encoded: Mapping[str, EncodedMask], producer: Mapping[str, str]
) -> int:
    """Write both files into an existing folder. Returns the bytes of the bits."""
    tensors: dict[str, Tensor] = {}
    for name, mask in encoded.items():
        tensors[f"{name}.bits"] = mask.bits
        if mask.cleared is not None:
            tensors[f"{name}.cleared"] = mask.cleared
    layout = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}
    digests = write_tensors(
        folder / BITS_NAME, layout, tensors.__getitem__, placeholder_metadata(tensors, [MANIFEST_NAME])
    )
    whole = digest_of_digests(digests)
    content = {
        _VERSION: FOLDER_VERSION,
        "base": dict(manifest.base),
        "kept_weights": manifest.kept_weights,
        "masks": {name: asdict(entry) for name, entry in manifest.masks.items()},
        "producer": dict(producer),
        "tensor_digest": whole,
    }
    (folder / MANIFEST_NAME).write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    files = {MANIFEST_NAME: digest_of_file(folder / MANIFEST_NAME)}
    rewrite_metadata(folder / BITS_NAME, metadata_of(digests, whole, files))
    return sum(tensor.nbytes for tensor in tensors.values())


def open_mask_folder(folder: Path) -> MaskFolder:
    """Check all of a folder, and read its manifest.

    Raises:
        FormatError: a file is missing, damaged, edited or of another folder, or of a later version.
    """
    path = folder / MANIFEST_NAME
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(content, dict):
            raise ValueError("it is no object")
    except (OSError, ValueError, RecursionError) as error:
        raise FormatError(f"{path}: cannot be read ({error}). Fetch the whole folder again.") from error
    if content.get(_VERSION) != FOLDER_VERSION or isinstance(content.get(_VERSION), bool):
        raise FormatError(
            f"{path}: is of version {content.get(_VERSION)!r} of mask folders, this hf_adaptive_sparse reads "
            f"{FOLDER_VERSION}. Update hf_adaptive_sparse; if that does not help, the file is damaged."
        )
    digest = content.get("tensor_digest")
    tensors = verify(
        [folder / BITS_NAME], {}, digest if isinstance(digest, str) else None, described_by=MANIFEST_NAME
    )
    manifest = _read_manifest(path, content)
    _check_tensors(folder, manifest, tensors)
    return MaskFolder(folder, manifest, tensors)


def _read_manifest(path: Path, content: Mapping[str, Any]) -> Manifest:
    try:
        listed = content["masks"].items()
        masks = {name: MaskEntry(**{**entry, "shape": tuple(entry["shape"])}) for name, entry in listed}
        for name, entry in masks.items():
            if not all(type(length) is int and length > 0 for length in entry.shape) or len(entry.shape) < 2:
                raise ValueError(f"{name} has the shape {list(entry.shape)}")
            if type(entry.transposed) is not bool or (entry.transposed and len(entry.shape) != 2):
                raise ValueError(f"{name} is transposed: {entry.transposed!r}, with {len(entry.shape)} dimensions")
            if entry.dtype not in _DTYPES or entry.base_dtype not in (None, *_DTYPES):
                raise ValueError(f"{name} has the dtype {entry.dtype!r}, of {entry.base_dtype!r}")
        base, kept = content["base"], content["kept_weights"]
        if not isinstance(base, dict) or not isinstance(base.get("config"), dict) or kept not in KEPT_WEIGHTS:
            raise ValueError("base or kept_weights is not what it must be")
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise FormatError(f"{path}: is no manifest of masks ({error}). Fetch the whole folder again.") from error
    return Manifest(base=base, kept_weights=kept, masks=masks)


def _check_tensors(folder: Path, manifest: Manifest, tensors: Mapping[str, StoredTensor]) -> None:
    for name, entry in manifest.masks.items():
        bits = tensors.get(f"{name}.bits")
        if bits is None:
            raise FormatError(f"{folder / BITS_NAME}: {name}.bits is missing; {MANIFEST_NAME} lists {name}.")
        where = f"{folder / BITS_NAME}: {name}.bits"
        mask_bits.check_shape(entry.encoding, bits.shape, bits.dtype, entry.matrix, where)
    listed = {f"{name}.{suffix}" for name in manifest.masks for suffix in ("bits", "cleared")}
    for name in sorted(tensors.keys() - listed):
        raise FormatError(f"{folder / BITS_NAME}: holds {name}, which {MANIFEST_NAME} does not list.")
