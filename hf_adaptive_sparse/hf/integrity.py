"""What a packed folder says about itself, and the checks that it is still so.

The header of every weight file carries, as metadata:

    adaptive_sparse_format      "1"; "1.1" if the values of a layer are quantised
    adaptive_sparse_tensors     digest of every tensor of this file, as JSON
    adaptive_sparse_checkpoint  digest of the digests of all files; config.json has it too
    adaptive_sparse_files       digest of every other file that was saved: configuration, tokenizer, index

so that a changed byte anywhere, a file of another checkpoint, or two files that traded places are found
before a single weight is loaded. The digests (xxh3) find accidents, not attackers.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path

from ..errors import FormatError
from ..formats import FORMATS, two_four, value_codes
from .stored_values import StoredValues
from .tensor_files import StoredTensor, digest_of_digests, digest_of_file, read_header, rewrite_metadata

FORMAT_VERSION, QUANTIZED_VERSION = 1, "1.1"
FORMAT_VERSIONS = (FORMAT_VERSION, QUANTIZED_VERSION)
WEIGHTS_NAME = "model.sparse24.safetensors"
INDEX_NAME = f"{WEIGHTS_NAME}.index.json"
CONFIG_NAME = "config.json"

_FORMAT, _TENSORS = "adaptive_sparse_format", "adaptive_sparse_tensors"
_CHECKPOINT, _FILES = "adaptive_sparse_checkpoint", "adaptive_sparse_files"
_NO_DIGEST = "0" * 32


def metadata_of(
    tensors: Mapping[str, str], checkpoint: str, files: Mapping[str, str], version: int | str = FORMAT_VERSION
) -> dict[str, str]:
    """The metadata of a weight file with tensors and beside files of these digests."""
    return {
        "format": "pt",
        _FORMAT: str(version),
        _TENSORS: json.dumps(dict(tensors)),
        _CHECKPOINT: checkpoint,
        _FILES: json.dumps(dict(files)),
    }


def placeholder_metadata(
    tensors: Iterable[str], files: Iterable[str], version: int | str = FORMAT_VERSION
) -> dict[str, str]:
    """Metadata as long as those of the same names will be when all digests are known."""
    return metadata_of(dict.fromkeys(tensors, _NO_DIGEST), _NO_DIGEST, dict.fromkeys(files, _NO_DIGEST), version)


def verify(
    files: list[Path],
    modules: Mapping[str, StoredValues],
    tensor_digest: str | None,
    *,
    digests: bool = True,
    described_by: str = CONFIG_NAME,
) -> dict[str, StoredTensor]:
    """Check the weight files of one packed checkpoint, and the files beside them.

    Args:
        files: all weight files, of one folder.
        modules: the packed modules and how their values are stored, by config.json.
        tensor_digest: digest of the whole checkpoint, by config.json.
        digests: read everything and compare digests; else only headers and positions are checked.
        described_by: the file that says what the others are, if that is not config.json.
    Returns:
        Every tensor of the checkpoint, by name.
    Raises:
        FormatError: naming the file and, where it applies, tensor, row, group and byte.
    """
    folder, tensors, listed, beside = files[0].parent, {}, {}, {}
    for file in files:
        found, metadata = read_header(file)
        listed_here = _check_header(file, found, metadata, tensor_digest if digests else None, described_by)
        for name in found.keys() & tensors.keys():
            raise FormatError(f"{file}: holds tensor {name}, which {tensors[name].file.name} holds too.")
        tensors |= found
        listed |= listed_here
        beside[file] = metadata.get(_FILES)
    _check_index(folder, files, tensors)
    _check_modules(folder, tensors, modules)
    if digests:
        if digest_of_digests(listed) != tensor_digest:
            raise FormatError(f"{folder}: is not the whole checkpoint. Fetch the whole folder again.")
        _check_tensors(tensors.values(), listed)
        verify_other_files(files[0], described_by)
        for file in files:
            if beside[file] != beside[files[0]]:
                raise FormatError(f"{file}: has other digests of {described_by} and the rest than {files[0].name} has.")
    return tensors


def verify_other_files(weights: Path, described_by: str = CONFIG_NAME) -> None:
    """Check the files that were saved beside a weight file: all of them, or those fetched from a Hub.

    Raises:
        FormatError: one is missing or has changed.
    """
    folder, listed = weights.parent, _digests(weights, read_header(weights)[1], _FILES)
    if described_by not in listed:
        raise FormatError(f"{weights}: has no digest of {described_by} in its metadata. It is damaged.")
    for name, digest in listed.items():
        path = folder / name
        if not path.is_file():
            # A download has only the files that were asked for, and its own checks.
            if _is_hub_snapshot(folder):
                continue
            raise FormatError(f"{path}: the file is missing; it was saved with the model.")
        if digest_of_file(path) != digest:
            reseal_it = "; if it was changed on purpose, call hf_adaptive_sparse.hf.integrity.reseal on the folder"
            raise FormatError(
                f"{path}: is not as it was saved with the model. Restore it"
                f"{reseal_it if described_by == CONFIG_NAME else ', or save it again'}."
            )


def reseal(folder: str | Path) -> list[str]:
    """Accept configuration and tokenizer files of a packed folder that were changed on purpose.

    Returns:
        The names of the files whose digest was renewed.
    Raises:
        FormatError: the folder has no packed weights, or they are not as they were saved.
    """
    folder, changed = Path(folder), set()
    weights = sorted(folder.glob("model.sparse24*.safetensors"))
    if not weights:
        raise FormatError(f"{folder}: holds no packed weights (model.sparse24*.safetensors).")
    for file in weights:
        tensors, metadata = read_header(file)
        _check_tensors(tensors.values(), _check_header(file, tensors, metadata, None))
        before = _digests(file, metadata, _FILES)
        now = {name: digest_of_file(folder / name) for name in before}
        changed |= {name for name in before if now[name] != before[name]}
        rewrite_metadata(file, metadata | {_FILES: json.dumps(now)})
    return sorted(changed)


def _check_header(
    file: Path,
    found: Mapping[str, StoredTensor],
    metadata: Mapping[str, str],
    tensor_digest: str | None,
    described_by: str = CONFIG_NAME,
) -> dict[str, str]:
    version = metadata.get(_FORMAT)
    if version not in map(str, FORMAT_VERSIONS):
        raise FormatError(
            f"{file}: is of format version {version}, this hf_adaptive_sparse reads "
            f"{' and '.join(map(str, FORMAT_VERSIONS))}. Update hf_adaptive_sparse; if that does not help, the file is "
            f"damaged."
        )
    listed = _digests(file, metadata, _TENSORS)
    for name in sorted(listed.keys() ^ found.keys()):
        what = "is missing" if name in listed else "has no digest"
        raise FormatError(f"{file}: tensor {name} {what}. The file is damaged.")
    if tensor_digest is not None and metadata.get(_CHECKPOINT) != tensor_digest:
        raise FormatError(
            f"{file}: is not of the checkpoint that {described_by} describes (digest "
            f"{metadata.get(_CHECKPOINT)}, expected {tensor_digest}). Fetch the whole folder again."
        )
    return listed


def _digests(file: Path, metadata: Mapping[str, str], key: str) -> dict[str, str]:
    try:
        digests = json.loads(metadata[key])
        if not isinstance(digests, dict) or not all(isinstance(digest, str) for digest in digests.values()):
            raise ValueError("not a table of digests")
    except (KeyError, ValueError, RecursionError) as error:
        raise FormatError(f"{file}: cannot read the metadata {key} ({error}). It is damaged.") from error
    return digests


def _check_index(folder: Path, files: list[Path], tensors: Mapping[str, StoredTensor]) -> None:
    path = folder / INDEX_NAME
    if "-of-" not in files[0].name:  # not sharded: an index is not in use
        return
    try:
        weight_map = dict(json.loads(path.read_text(encoding="utf-8"))["weight_map"])
    except (OSError, KeyError, TypeError, ValueError, RecursionError) as error:
        raise FormatError(f"{path}: cannot be read ({error}).") from error
    for name in sorted(weight_map.keys() | tensors.keys()):
        place = tensors[name].file.name if name in tensors else None
        if weight_map.get(name) != place:
            raise FormatError(
                f"{path}: says that tensor {name} is in {weight_map.get(name)}, it is in {place}. Files were "
                f"renamed, or are of different checkpoints; fetch the whole folder again."
            )


def _check_modules(folder: Path, tensors: Mapping[str, StoredTensor], modules: Mapping[str, StoredValues]) -> None:
    suffixes = FORMATS["2:4"].suffixes
    packed = {name.rpartition(".")[0] for name in tensors if name.endswith(tuple(f".{each}" for each in suffixes))}
    for module in sorted(packed - modules.keys()):
        raise FormatError(f"{folder}: {module} is packed, but config.json does not list it.")
    for module, stored in sorted(modules.items()):
        is_quantized, scale_name = stored.bits is not None, f"{module}.{value_codes.SUFFIX}"
        for suffix in (*suffixes, value_codes.SUFFIX) if is_quantized else suffixes:
            if f"{module}.{suffix}" not in tensors:
                raise FormatError(f"{folder}: {module}.{suffix} is missing; config.json lists {module}.")
        if scale_name in tensors and not is_quantized:
            raise FormatError(f"{folder}: holds {scale_name}, but by config.json {module} has no quantised values.")
        values, meta = (tensors[f"{module}.{suffix}"] for suffix in suffixes)
        where, shape, dtype = f"{meta.file}: {module}", values.shape, values.dtype
        if is_quantized:
            shape, dtype = _check_codes(module, values, tensors[scale_name], stored), stored.dtype
        two_four.validate_shapes(shape, dtype, meta.shape, meta.dtype, where)
        for first_row, block in meta.blocks():
            two_four.validate_meta(block, where, first_row)


def _check_codes(module: str, values: StoredTensor, scale: StoredTensor, stored: StoredValues) -> tuple[int, ...]:
    """The shape of the values for which the codes of a module stand."""
    where, about = f"{scale.file}: {module}", (values.shape, values.dtype, scale.shape, scale.dtype)
    shape = value_codes.validate_shapes(*about, stored.bits, stored.group_size, where)
    for first_row, block in scale.blocks():
        value_codes.validate_scale(block, stored.dtype, where, first_row)
    return shape


def _check_tensors(tensors: Iterable[StoredTensor], digests: Mapping[str, str]) -> None:
    for tensor in tensors:
        if tensor.digest() != digests[tensor.name]:
            raise FormatError(
                f"{tensor.file}: tensor {tensor.name} is not as it was saved (bytes {tensor.start} to "
                f"{tensor.end} of the file). The file is damaged; fetch it again."
            )


def _is_hub_snapshot(folder: Path) -> bool:
    parts = folder.absolute().parts
    return any(
        name == "snapshots" and before.startswith("models--") for before, name in zip(parts, parts[1:], strict=False)
    )
