"""From JSON back to the records that it was made of, so that a report can be read by its own program."""

from __future__ import annotations

import dataclasses
import types
import typing
from typing import Any, TypeVar

from ..errors import FormatError

Record = TypeVar("Record")
_WORDS = {"nan": float("nan"), "inf": float("inf"), "-inf": float("-inf")}


def decode(kind: type[Record], value: Any, where: str = "report") -> Record:
    """A dataclass from the JSON of its `dataclasses.asdict`; fields that the JSON lacks take their defaults.

    Args:
        where: what to call it in messages.
    Raises:
        FormatError: a field of another type, one that is missing and has no default, or one that is not known.
    """
    return _decode(kind, value, where)


def _decode(kind: Any, value: Any, where: str) -> Any:
    if kind is Any:
        return value
    if dataclasses.is_dataclass(kind):
        return _record(kind, value, where)
    origin, inside = typing.get_origin(kind), typing.get_args(kind)
    if origin in (typing.Union, types.UnionType):
        if value is None:
            return None
        return _decode(next(each for each in inside if each is not type(None)), value, where)
    if origin in (list, tuple):
        _check(isinstance(value, list), where, "a list", value)
        kinds = [inside[0]] * len(value) if origin is list or inside[-1] is Ellipsis else list(inside)
        _check(len(kinds) == len(value), where, f"a list of {len(kinds)}", value)
        pairs = enumerate(zip(kinds, value, strict=True))
        return origin([_decode(each, entry, f"{where}[{number}]") for number, (each, entry) in pairs])
    if origin is dict:
        _check(isinstance(value, dict), where, "an object", value)
        return {inside[0](key): _decode(inside[1], entry, f"{where}.{key}") for key, entry in value.items()}
    if kind is float:
        if isinstance(value, str) and value in _WORDS:
            return _WORDS[value]
        _check(isinstance(value, (int, float)) and not isinstance(value, bool), where, "a number", value)
        return float(value)
    names = {int: "a whole number", str: "a text", bool: "true or false"}
    _check(type(value) is kind, where, names[kind], value)
    return value


def _record(kind: type, value: Any, where: str) -> Any:
    _check(isinstance(value, dict), where, "an object", value)
    hints, fields = typing.get_type_hints(kind), {entry.name: entry for entry in dataclasses.fields(kind)}
    unknown = sorted(value.keys() - fields.keys())
    if unknown:
        raise FormatError(f"{where}: {unknown[0]} is not known here. The report is of another version.")
    for name, entry in fields.items():
        required = entry.default is dataclasses.MISSING and entry.default_factory is dataclasses.MISSING
        if required and name not in value:
            raise FormatError(f"{where}: {name} is missing. The report is of another version, or damaged.")
    return kind(**{name: _decode(hints[name], entry, f"{where}.{name}") for name, entry in value.items()})


def _check(right: bool, where: str, expected: str, value: Any) -> None:
    if not right:
        raise FormatError(f"{where}: must be {expected}, got {value!r}. The report is of another version, or damaged.")
