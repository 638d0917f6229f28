"""How the values of every packed module are stored.

In config.json of a folder of format version 1.1:

    value_bits        8 or 4, of the codes
    group_size        inputs that share a scale; null: all inputs of a row
    value_dtype       to which code * scale is rounded
    value_exceptions  {module: these three} of modules that differ; {"value_bits": null} of one without codes
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from ..errors import FormatError
from ..formats.two_four import VALUE_DTYPES, dtype_name
from ..formats.value_codes import CODE_DTYPES

_DTYPES = {dtype_name(dtype): dtype for dtype in VALUE_DTYPES}


@dataclass(frozen=True)
class StoredValues:
    """How the values of one packed module are stored.

    Args:
        bits: of the codes; None: as they are, in which case the tensor itself says the rest.
        group_size: inputs that share a scale; None: all inputs of a row.
        dtype: of the values for which the codes stand.
    """

    bits: int | None = None
    group_size: int | None = None
    dtype: torch.dtype | None = None


def to_json(modules: Mapping[str, StoredValues], value_dtype: torch.dtype) -> dict[str, Any]:
    """The entries of config.json, nothing if no module is quantised.

    Args:
        value_dtype: of the model; modules of another dtype are exceptions.
    """
    kinds = Counter(stored for stored in modules.values() if stored.bits is not None)
    if not kinds:
        return {}
    [(common, _)] = kinds.most_common(1)
    common = StoredValues(common.bits, common.group_size, value_dtype)
    exceptions = {name: _entry(stored) for name, stored in modules.items() if stored != common}
    entries = {"value_bits": common.bits, "group_size": common.group_size}
    return entries | ({"value_exceptions": exceptions} if exceptions else {})


def from_json(
    modules: Iterable[str], value_bits: Any, group_size: Any, value_dtype: Any, value_exceptions: Any
) -> dict[str, StoredValues]:
    """What config.json says of every module; FormatError if it cannot be."""
    if value_bits is None:
        return dict.fromkeys(modules, StoredValues())
    common = {"value_bits": value_bits, "group_size": group_size, "value_dtype": value_dtype}
    found = dict.fromkeys(modules, _read("", common))
    exceptions = {} if value_exceptions is None else value_exceptions
    if not isinstance(exceptions, dict) or not all(isinstance(entry, dict) for entry in exceptions.values()):
        raise FormatError("config.json: value_exceptions must be a table of tables. The file is damaged.")
    for name, entry in exceptions.items():
        if name not in found:
            raise FormatError(f"config.json: value_exceptions names {name}, which modules does not. It is damaged.")
        found[name] = _read(f" of {name}", entry)
    return found


def _entry(stored: StoredValues) -> dict[str, Any]:
    if stored.bits is None or stored.dtype is None:
        return {"value_bits": None}
    return {"value_bits": stored.bits, "group_size": stored.group_size, "value_dtype": dtype_name(stored.dtype)}


def _read(whose: str, entry: Mapping[str, Any]) -> StoredValues:
    if whose and entry == {"value_bits": None}:
        return StoredValues()
    bits, group_size, dtype = (entry.get(key) for key in ("value_bits", "group_size", "value_dtype"))
    is_size = group_size is None or (type(group_size) is int and group_size > 0 and group_size % 4 == 0)
    for key, found, is_known, known in (
        ("value_bits", bits, type(bits) is int and bits in CODE_DTYPES, "8 or 4"),
        ("group_size", group_size, is_size, "null or a multiple of 4"),
        ("value_dtype", dtype, isinstance(dtype, str) and dtype in _DTYPES, " or ".join(_DTYPES)),
    ):
        if not is_known:
            raise FormatError(
                f"config.json: {key}{whose} is {found!r}, this hf_adaptive_sparse reads {known}. Update "
                f"hf_adaptive_sparse; if that does not help, the file is damaged."
            )
    return StoredValues(bits, group_size, _DTYPES[dtype])
