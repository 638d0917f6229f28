"""Folders of compressed-tensors and llm-compressor with a `sparsity_config`; read without that package.

Its version 0.14 was the last to write or read `sparse-24-bitmask` and `sparse-bitmask`. Weights may also be quantised:
int8 or fp8 values with scales per tensor, channel or group. Of these the weight is scale * value, rounded as
compressed-tensors rounds it; integer codes are kept, so that our packed format stores them in 8 bits again.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...errors import FormatError
from ...formats import sparse_bitmask
from ...formats.two_four import dtype_name
from ...formats.value_codes import StoredGrid
from .foreign import ForeignModel, ForeignTensor
from .weight_files import config_of, open_weights, read_json

SPARSE_FORMATS = ("sparse-24-bitmask", "sparse-bitmask", "dense")
_QUANTIZED_FORMATS = ("int-quantized", "float-quantized", "naive-quantized", "dense", None)
_KEYS = ("quantization_config", "compression_config")
_PARTS = ("compressed", "bitmask", "shape", "row_offsets")
_SCALE = "weight_scale"
# Of a quantised layer: of its activations, and the zero points, which must be 0.
_DROPPED = ("input_scale", "input_zero_point", "output_scale", "output_zero_point", "k_scale", "v_scale", "q_scale")
_ZERO_POINT = "weight_zero_point"
_FLOATS = (torch.float32, torch.float16, torch.bfloat16)
_CODES = (torch.int8, torch.float8_e4m3fn)


class _Quantized(NamedTuple):
    """A weight of codes and its scales."""

    weight: ForeignTensor
    scale: ForeignTensor
    dtype: torch.dtype
    """In which the weight is wanted."""


def recognises(source: Path) -> bool:
    """A folder whose config.json has a compression of compressed-tensors with a `sparsity_config`."""
    if not source.is_dir() or not (source / "config.json").is_file():
        return False
    config = read_json(source / "config.json")
    return is_sparse_config(config)


def is_sparse_config(config: Mapping[str, Any]) -> bool:
    """The same of the content of config.json."""
    settings = _settings(config)
    return bool(settings.get("sparsity_config")) or settings.get("format") == "marlin-24"


def read(source: Path, base: str | None = None) -> ForeignModel:
    """What such a folder holds.

    Raises:
        FormatError: a format that is not read (names those that are), or a tensor that is damaged or missing.
    """
    config = config_of(source, base)
    settings = _settings(config)
    name = _check_formats(source, settings)
    stored = open_weights(source)
    whole = _without_bitmasks(source, stored)
    tensors: dict[str, ForeignTensor] = {}
    grids: dict[str, Callable[[], StoredGrid]] = {}
    for each, tensor in whole.items():
        layer, _, last = each.rpartition(".")
        if last == "weight_g_idx":
            raise FormatError(
                f"{source}: {each}: groups in the order of activations are not read. Quantise without `actorder`."
            )
        if last in (_SCALE, _ZERO_POINT, *_DROPPED):
            continue
        if last == "weight" and tensor.dtype in _CODES:
            quantized = _quantized(source, layer, whole, _model_dtype(config))
            nbytes = tensor.nbytes + quantized.scale.nbytes
            tensor = ForeignTensor(quantized.dtype, tensor.shape, nbytes, partial(_dequantize, quantized))
            if _keeps_codes(quantized):
                grids[layer] = partial(_grid, quantized)
        tensors[each] = tensor
    plain = {key: value for key, value in config.items() if key not in _KEYS}
    return ForeignModel(
        source=source, format=f"compressed-tensors {name}", tensors=tensors, config=lambda: plain,
        tokenizer_from=str(source), grids=grids, notes=_notes(settings, whole, bool(grids)),
    )  # fmt: skip


def _settings(config: Mapping[str, Any]) -> dict[str, Any]:
    for key in _KEYS:
        settings = config.get(key)
        if isinstance(settings, dict) and settings.get("quant_method", "compressed-tensors") == "compressed-tensors":
            return settings
    return {}


def _check_formats(source: Path, settings: Mapping[str, Any]) -> str:
    sparsity = settings.get("sparsity_config") or {}
    sparse, quantized = sparsity.get("format", "dense"), settings.get("format")
    transforms = (settings.get("transform_config") or {}).get("config_groups")
    problem = None
    if sparse not in SPARSE_FORMATS:
        problem = f"the sparse format {sparse!r}; read are {', '.join(SPARSE_FORMATS)}"
    elif quantized not in _QUANTIZED_FORMATS:
        known = ", ".join(str(each) for each in _QUANTIZED_FORMATS if each)
        problem = f"the quantised format {quantized!r}; read are {known}"
    elif transforms:
        problem = f"rotations ({', '.join(map(str, transforms))}) that the model must apply when it runs; none are read"
    if problem is not None:
        raise FormatError(
            f"{source / 'config.json'}: has {problem}. Export the model without it, with the version of "
            f"compressed-tensors that wrote it ({settings.get('version', 'unknown')})."
        )
    return sparse if quantized in ("dense", None) else f"{sparse}, {quantized}"


def _without_bitmasks(source: Path, stored: Mapping[str, ForeignTensor]) -> dict[str, ForeignTensor]:
    """All tensors by the names of an ordinary model, zeros put back where there is a bitmask."""
    whole = {name: tensor for name, tensor in stored.items() if name.rpartition(".")[2] not in _PARTS}
    for prefix in sorted({name.rpartition(".")[0] for name in stored.keys() - whole.keys()}):
        # Versions before 0.9 named the parts after the tensor, and not after the layer.
        is_old = prefix.rpartition(".")[2] in ("weight", "bias", _SCALE, _ZERO_POINT, *_DROPPED)
        whole[prefix if is_old else f"{prefix}.weight"] = _expanded(source, prefix, stored)
    return whole


def _expanded(source: Path, prefix: str, stored: Mapping[str, ForeignTensor]) -> ForeignTensor:
    parts = {part: stored[f"{prefix}.{part}"] for part in _PARTS if f"{prefix}.{part}" in stored}
    for part in _PARTS[:3]:
        if part not in parts:
            raise FormatError(f"{source}: {prefix}.{part} is missing, the rest of it is there. Fetch the folder again.")
    values, bits, where = parts["compressed"], parts["bitmask"], f"{source}: {prefix}"
    shape = sparse_bitmask.read_shape(parts["shape"].load(), where)
    sparse_bitmask.validate_shapes(values.shape, bits.shape, bits.dtype, shape, where)

    def load() -> Tensor:
        offsets = parts["row_offsets"].load() if "row_offsets" in parts else None
        return sparse_bitmask.unpack(values.load(), bits.load(), shape, offsets, where)

    return ForeignTensor(values.dtype, shape, sum(part.nbytes for part in parts.values()), load)


def _quantized(source: Path, layer: str, whole: Mapping[str, ForeignTensor], dtype: torch.dtype | None) -> _Quantized:
    weight, scale, zero_point = (whole.get(f"{layer}.{last}") for last in ("weight", _SCALE, _ZERO_POINT))
    assert weight is not None, "only asked of layers that are there"
    if scale is None:
        raise FormatError(
            f"{source}: {layer}.{_SCALE} is missing; the weight is {dtype_name(weight.dtype)}. Fetch the folder again."
        )
    if zero_point is not None and zero_point.load().float().ne(0).any():
        raise FormatError(
            f"{source}: {layer}.{_ZERO_POINT} is not 0: pruned weights would not be 0 either. Quantise symmetrically."
        )
    rows, columns = weight.shape
    groups = math.prod(scale.shape) // rows if scale.shape[:1] == (rows,) else 0
    fits = math.prod(scale.shape) == 1 or (groups > 0 and columns % groups == 0 and len(scale.shape) <= 2)
    if scale.dtype not in _FLOATS or not fits:
        raise FormatError(
            f"{source}: {layer}.{_SCALE}: one scale for all, for a row or for a group of a row of int8 or "
            f"float8_e4m3fn values is read, found {dtype_name(scale.dtype)} {list(scale.shape)} beside "
            f"{dtype_name(weight.dtype)} {list(weight.shape)}."
        )
    return _Quantized(weight, scale, dtype or scale.dtype)


def _scales(quantized: _Quantized) -> Tensor:
    """[out, groups], or [1, 1] of one for all."""
    scale = quantized.scale.load()
    return scale.reshape(1, 1) if scale.numel() == 1 else scale.reshape(quantized.weight.shape[0], -1)


def _dequantize(quantized: _Quantized) -> Tensor:
    weight, scale = quantized.weight.load(), _scales(quantized)
    # In the dtype of the scale, as compressed-tensors multiplies. A code has 8 bits, so bfloat16 holds it too.
    product = weight.to(scale.dtype).unflatten(1, (scale.shape[1], -1)) * scale.unsqueeze(-1)
    return product.flatten(1).to(quantized.dtype)


def _keeps_codes(quantized: _Quantized) -> bool:
    """Whether code * scale, multiplied in float32 and rounded once, is the same weight."""
    columns, groups = quantized.weight.shape[1], max(1, math.prod(quantized.scale.shape) // quantized.weight.shape[0])
    exact = quantized.scale.dtype in (torch.float32, quantized.dtype)
    return quantized.weight.dtype == torch.int8 and exact and columns // groups % 4 == 0


def _grid(quantized: _Quantized) -> StoredGrid:
    scale = _scales(quantized)
    scale = scale if scale.dtype == torch.bfloat16 else scale.float()
    return StoredGrid(scale.expand(quantized.weight.shape[0], -1).contiguous(), 8)


def _model_dtype(config: Mapping[str, Any]) -> torch.dtype | None:
    dtype = getattr(torch, str(config.get("dtype") or config.get("torch_dtype")), None)
    return dtype if dtype in _FLOATS else None


def _notes(settings: Mapping[str, Any], whole: Mapping[str, ForeignTensor], has_codes: bool) -> tuple[str, ...]:
    groups = (settings.get("config_groups") or {}).values()
    notes = []
    if any(group.get("input_activations") for group in groups if isinstance(group, dict)):
        notes.append("activations are not quantised any more when the model runs; the weights are as they were")
    if any(name.endswith((".k_scale", ".v_scale")) for name in whole) or settings.get("kv_cache_scheme"):
        notes.append("the scales of the key and value cache are dropped, which is not quantised any more")
    if has_codes:
        notes.append("integer codes and their scales stay in a packed folder; a dense-stored one holds their products")
    return tuple(notes)
