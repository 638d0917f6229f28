"""What is sparse in a folder, matrix by matrix: read from the weight files, without building the model."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import FormatError
from ..formats import FORMATS, two_four, value_codes
from ..formats.two_four import dtype_name
from .imports import IMPORTERS, ForeignModel, recognise
from .imports.weight_files import read_json
from .inspection_details import RowPrints, claimed_two_four, provenance_of
from .integrity import verify
from .mask_folder import is_mask_folder, open_mask_folder
from .quantizer import QUANT_METHOD, AdaptiveSparseQuantizationConfig
from .stored_values import StoredValues
from .tensor_files import StoredTensor, read_header

# Architectures whose linear layers are `Conv1D`, stored [in, out], and the names of these layers.
_CONV1D_MODELS = ("gpt2", "openai-gpt", "imagegpt", "decision_transformer", "clvp")
_CONV1D_NAMES = ("c_attn", "c_proj", "c_fc", "q_attn")
_PACKED = tuple(f".{suffix}" for suffix in (*FORMATS["2:4"].suffixes, value_codes.SUFFIX))
_LATENT, _KEEP = ".adaptive_sparse_weight", ".adaptive_sparse_keep"


@dataclass(frozen=True, kw_only=True)
class MatrixRecord:
    """One weight matrix of a folder, seen as [out, in]; fused experts, [n, out, in], as [n * out, in].

    Args:
        stored: "packed", "dense", "masked" (latent weight and mask of an adapter, counted with the mask), "mask"
            (without a weight), or "foreign" (as another tool stores it).
        dtype: of its values, also where they are stored as codes.
        value_bits: of these codes; None if the values are stored as they are.
        nbytes: what it takes in the file, with its scales.
        scale_nbytes: what the scales of codes take.
        zeros: number of zeros.
        violations: groups of four inputs with more than two non-zeros; None if `in` is no multiple of 4.
        first_violation: (row, group) of the first of them.
        negative_zeros: how many zeros are -0.0, which some compressors take for values.
        non_finite: number of NaN and inf.
        zero_rows: rows without a value: outputs that are always 0 or the bias.
        same_rows: rows that are the same as an earlier one, rows of zeros left out.
        first_same_row: (row, the earlier row that it is the same as) of the first of them.
        same_as: an earlier matrix with the same values in the same shape and dtype.
    """

    name: str
    shape: tuple[int, int]
    dtype: str
    stored: str
    value_bits: int | None
    nbytes: int
    scale_nbytes: int
    zeros: int
    violations: int | None
    first_violation: tuple[int, int] | None
    negative_zeros: int
    non_finite: int
    zero_rows: int
    same_rows: int
    first_same_row: tuple[int, int] | None
    same_as: str | None

    @property
    def elements(self) -> int:
        return self.shape[0] * self.shape[1]

    @property
    def stored_dtype(self) -> str:
        """The dtype of its values, and before it what they are stored as if that is something else."""
        return self.dtype if self.value_bits is None else f"int{self.value_bits}>{self.dtype}"

    @property
    def sparsity(self) -> float:
        """Fraction of zeros."""
        return self.zeros / self.elements if self.elements else 0.0

    @property
    def is_two_four(self) -> bool:
        return self.violations == 0


@dataclass(frozen=True, kw_only=True)
class FolderReport:
    """A folder, and its matrices in the order of their names.

    Args:
        kind: "packed", "dense-stored" (by `save_dense`), "plain", "adapter", "masks", or the format of another tool.
        problem: what is wrong with a packed folder, in which case `matrices` is empty; else None.
        parameters: number of weights if nothing were packed, in all floating point tensors.
        nbytes: what all tensors take in the files; `dense_nbytes`, if nothing were packed.
        provenance: what the configuration says of how it was made.
        claimed: matrices that the configuration says are 2:4.
        tied: whether the configuration says that the output head is the input embedding.
    """

    path: Path
    kind: str
    problem: str | None
    matrices: tuple[MatrixRecord, ...]
    parameters: int
    nbytes: int
    dense_nbytes: int
    notes: tuple[str, ...] = ()
    """Of a checkpoint of another tool: what converting it will not carry over. Of masks: what they are masks of."""
    provenance: dict[str, Any] = field(default_factory=dict)
    claimed: frozenset[str] = frozenset()
    tied: bool = False

    @property
    def zeros(self) -> int:
        """Of all matrices."""
        return sum(matrix.zeros for matrix in self.matrices)

    @property
    def two_four(self) -> tuple[MatrixRecord, ...]:
        return tuple(matrix for matrix in self.matrices if matrix.is_two_four)

    @property
    def packed(self) -> tuple[MatrixRecord, ...]:
        return tuple(matrix for matrix in self.matrices if matrix.stored == "packed")


def inspect_folder(path: str | os.PathLike, *, digests: bool = True) -> FolderReport:
    """What a local model or adapter folder holds.

    Args:
        digests: of a packed folder, compare every file with its digest (as loading it does).
    Raises:
        FormatError: there is no such folder, or no weights in it that can be read.
    """
    folder = Path(path)
    if is_mask_folder(folder):
        return _inspect_masks(folder)
    if (name := recognise(folder)) is not None:
        return _inspect_foreign(IMPORTERS[name].read(folder, None))
    kind, files, config = _find_weights(folder)
    tensors: dict[str, StoredTensor] = {}
    stored_values: dict[str, StoredValues] = {}
    try:
        if kind == "packed":
            quantization = AdaptiveSparseQuantizationConfig(**config["quantization_config"])
            stored_values = quantization.stored_values()
            tensors = verify(files, stored_values, quantization.tensor_digest, digests=digests)
        else:
            for file in files:
                tensors |= read_header(file)[0]
    except FormatError as error:
        if kind != "packed":
            raise
        return FolderReport(
            path=folder, kind=kind, problem=str(error), matrices=(), parameters=0, nbytes=0, dense_nbytes=0
        )
    matrices = _name_equal(_matrices(tensors, config.get("model_type") in _CONV1D_MODELS, stored_values))
    packed = [matrix for matrix in matrices if matrix.stored == "packed"]
    sizes = [(matrix.elements, getattr(torch, matrix.dtype)) for matrix in packed]
    for name, tensor in tensors.items():
        if name.rpartition(".")[0] not in stored_values or not name.endswith(_PACKED):
            sizes.append((math.prod(tensor.shape), tensor.dtype))
    return FolderReport(
        path=folder,
        kind=kind,
        problem=None,
        matrices=matrices,
        parameters=sum(elements for elements, dtype in sizes if dtype.is_floating_point),
        nbytes=sum(tensor.nbytes for tensor in tensors.values()),
        dense_nbytes=sum(elements * dtype.itemsize for elements, dtype in sizes),
        provenance=provenance_of(config),
        claimed=claimed_two_four(config),
        tied=bool((config.get("text_config") or config).get("tie_word_embeddings")) and kind != "adapter",
    )


def _inspect_foreign(foreign: ForeignModel) -> FolderReport:
    """A checkpoint of another tool, matrix by matrix as the ordinary model that it becomes."""
    matrices, dense = [], 0
    for name, tensor in sorted(foreign.tensors.items()):
        dense += math.prod(tensor.shape) * tensor.dtype.itemsize
        if len(tensor.shape) >= 2 and tensor.dtype.is_floating_point:
            weight = tensor.load()
            is_transposed = name.startswith("transformer.h.") and name.split(".")[-2] in _CONV1D_NAMES
            weight = weight.t() if is_transposed else weight.flatten(0, -2)
            counts = _Counts(name, weight.shape)
            counts.add(weight, 0)
            matrices.append(counts.record(tensor.dtype, "foreign", tensor.nbytes))
    return FolderReport(
        path=foreign.source, kind=foreign.format, problem=None, matrices=_name_equal(matrices),
        parameters=sum(math.prod(each.shape) for each in foreign.tensors.values() if each.dtype.is_floating_point),
        nbytes=sum(tensor.nbytes for tensor in foreign.tensors.values()), dense_nbytes=dense, notes=foreign.notes,
    )  # fmt: skip


def _inspect_masks(path: Path) -> FolderReport:
    folder = open_mask_folder(path)
    matrices, base, parameters = [], folder.manifest.base.get("name"), 0
    for name, entry in sorted(folder.manifest.masks.items()):
        keep = folder.keep(name)
        keep = keep.t() if entry.transposed else keep.flatten(0, -2)
        counts, dtype = _Counts(name, keep.shape), getattr(torch, entry.dtype)
        counts.add(keep.float(), 0)
        parts = [folder.tensors[each] for each in (f"{name}.bits", f"{name}.cleared") if each in folder.tensors]
        nbytes = sum(part.nbytes for part in parts)
        matrices.append(counts.record(dtype, "mask", nbytes)[0])  # equal masks say nothing about weights
        parameters += keep.numel()
    kept = folder.manifest.kept_weights
    return FolderReport(
        path=path, kind="masks", problem=None, matrices=tuple(matrices), parameters=parameters,
        nbytes=sum(tensor.nbytes for tensor in folder.tensors.values()),
        dense_nbytes=sum(matrix.elements * getattr(torch, matrix.dtype).itemsize for matrix in matrices),
        notes=(f"masks for {base or 'a base model that is not named'}; kept weights of the sparse model: {kept}",),
    )  # fmt: skip


def _name_equal(matrices: Iterable[tuple[MatrixRecord, int]]) -> tuple[MatrixRecord, ...]:
    """Say of every matrix which earlier one it is the same as."""
    first: dict[tuple, str] = {}
    found = []
    for record, fingerprint in matrices:
        earlier = first.setdefault((record.shape, record.dtype, fingerprint), record.name)
        is_copy = earlier != record.name and record.zeros < record.elements
        found.append(replace(record, same_as=earlier) if is_copy else record)
    return tuple(found)


def _find_weights(folder: Path) -> tuple[str, list[Path], dict[str, Any]]:
    if not folder.is_dir():
        raise FormatError(f"{folder}: there is no such folder.")
    if (folder / "adapter_config.json").is_file():
        config = read_json(folder / "adapter_config.json")
        kind, files = "adapter", sorted(folder.glob("adapter_model*.safetensors"))
    else:
        config = read_json(folder / "config.json") if (folder / "config.json").is_file() else {}
        is_packed = (config.get("quantization_config") or {}).get("quant_method") == QUANT_METHOD
        files = sorted(folder.glob("model.sparse24*.safetensors" if is_packed else "*.safetensors"))
        kind = "packed" if is_packed else "dense-stored" if QUANT_METHOD in config else "plain"
    if not files:
        pickles = [f"; {file.name} is a pickle, which is not opened" for file in folder.glob("*.bin")]
        raise FormatError(f"{folder}: holds no weights (*.safetensors){''.join(pickles[:1])}.")
    return kind, files, config


def _matrices(
    tensors: dict[str, StoredTensor], has_conv1d: bool, stored_values: Mapping[str, StoredValues]
) -> Iterator[tuple[MatrixRecord, int]]:
    """Every matrix, with a fingerprint of its values."""
    for name in sorted(tensors):
        tensor, place = tensors[name], name.rpartition(".")[0]
        if place in stored_values and name.endswith(_PACKED):
            if name.endswith(".weight_values"):
                yield _packed_matrix(place, tensors, stored_values[place])
        elif name.endswith(_LATENT) and place + _KEEP in tensors:
            keep = tensors[place + _KEEP]
            counts = _Counts(name, tensor.shape)
            for (row, latent), (_, kept) in _together(tensor, keep):
                counts.add(latent.masked_fill(~kept, 0.0), row)
            yield counts.record(tensor.dtype, "masked", tensor.nbytes + keep.nbytes)
        elif len(tensor.shape) >= 2 and tensor.dtype.is_floating_point:
            if has_conv1d and place.rpartition(".")[2] in _CONV1D_NAMES:
                counts = _Counts(name, tensor.shape[::-1])
                for column, block in tensor.blocks():
                    counts.add(block.t(), 0, column)
            else:
                rows_per_entry = math.prod(tensor.shape[1:-1])
                counts = _Counts(name, (tensor.shape[0] * rows_per_entry, tensor.shape[-1]))
                for row, block in tensor.blocks():
                    counts.add(block.flatten(0, -2), row * rows_per_entry)
            yield counts.record(tensor.dtype, "dense", tensor.nbytes)


def _packed_matrix(
    place: str, tensors: dict[str, StoredTensor], stored: StoredValues
) -> tuple[MatrixRecord, int]:
    parts = [tensors[f"{place}{suffix}"] for suffix in _PACKED if f"{place}{suffix}" in tensors]
    rows, octets = tensors[f"{place}.weight_meta"].shape
    counts = _Counts(f"{place}.weight", (rows, 8 * octets))
    for blocks in _together(*parts):
        row, (values, positions, *scales) = blocks[0][0], (rows for _, rows in blocks)
        if stored.dtype is not None:
            values = value_codes.decode(values, *scales, (stored.dtype,))
        counts.add(two_four.unpack(values, positions), row)
    nbytes, scale_nbytes = (sum(part.nbytes for part in some) for some in (parts, parts[2:]))
    dtype = parts[0].dtype if stored.dtype is None else stored.dtype
    return counts.record(dtype, "packed", nbytes, value_bits=stored.bits, scale_nbytes=scale_nbytes)


def _together(first: StoredTensor, *others: StoredTensor) -> Iterator[tuple[tuple[int, Tensor], ...]]:
    """The same rows of some tensors."""
    step = first.rows_per_block
    return zip(first.blocks(), *(other.blocks(step) for other in others), strict=True)


class _Counts:
    """What is counted of a matrix [out, in] while parts of it pass by."""

    def __init__(self, name: str, shape: tuple[int, ...]) -> None:
        self.name, self.shape = name, tuple(shape)
        self.zeros = self.negative_zeros = self.non_finite = self.violations = 0
        self.first: tuple[int, int] | None = None
        self.prints = RowPrints(*self.shape)

    def add(self, part: Tensor, row: int, column: int = 0) -> None:
        """Count a part whose upper left corner is at (row, column)."""
        if part.dtype.itemsize == 1:  # eight-bit floats lack most operations
            part = part.float()
        zero = part == 0
        self.prints.add(part, row, column)
        self.zeros += int(zero.count_nonzero())
        self.negative_zeros += int((zero & part.signbit()).count_nonzero())
        self.non_finite += part.numel() - int(part.isfinite().count_nonzero())
        if self.shape[1] % 4:
            return
        crowded = zero.unflatten(1, (-1, 4)).sum(-1, dtype=torch.uint8) < 2
        if crowded.any():
            self.violations += int(crowded.count_nonzero())
            first = crowded.nonzero()[0].tolist()
            place = (row + first[0], column // 4 + first[1])
            self.first = place if self.first is None else min(self.first, place)

    def record(
        self, dtype: torch.dtype, stored: str, nbytes: int, *, value_bits: int | None = None, scale_nbytes: int = 0
    ) -> tuple[MatrixRecord, int]:
        """What was counted, and a fingerprint of all values."""
        same = self.prints.same_rows()
        record = MatrixRecord(
            name=self.name,
            shape=self.shape,
            dtype=dtype_name(dtype),
            stored=stored,
            value_bits=value_bits,
            scale_nbytes=scale_nbytes,
            nbytes=nbytes,
            zeros=self.zeros,
            violations=None if self.shape[1] % 4 else self.violations,
            first_violation=self.first,
            negative_zeros=self.negative_zeros,
            non_finite=self.non_finite,
            zero_rows=self.prints.zero_rows(),
            same_rows=len(same),
            first_same_row=same[0] if same else None,
            same_as=None,
        )
        return record, self.prints.whole()
