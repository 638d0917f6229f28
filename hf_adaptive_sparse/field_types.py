"""Whether the fields of a config hold what their annotations say."""

from __future__ import annotations

import math
import numbers
import types
import typing
from collections.abc import Collection
from dataclasses import fields
from typing import Any

from .errors import ConfigError

_CALLED = {str: "a string", int: "a whole number", float: "a number", bool: "True or False"}


def check_field_types(config: Any, but: Collection[str] = ()) -> None:
    """Raise ConfigError for the first field of a dataclass with a value of another type than its annotation.

    Of `str`, `int`, `float` and `bool`, each alone or `| None`; other annotations are not looked at. A whole number is
    a float too, True is no number.

    Args:
        but: names of fields that are left out.
    """
    hints = typing.get_type_hints(type(config))
    for entry in fields(config):
        value, hint = getattr(config, entry.name), hints[entry.name]
        kinds = typing.get_args(hint) if typing.get_origin(hint) in (types.UnionType, typing.Union) else (hint,)
        kind = next((kind for kind in kinds if kind in _CALLED), None)
        if entry.name in but or kind is None or (value is None and type(None) in kinds):
            continue
        # Scalars of numpy are numbers too.
        accepted = {float: (numbers.Real,), int: (numbers.Integral,)}.get(kind, (kind,))
        if not isinstance(value, accepted) or (isinstance(value, bool) and kind is not bool):
            raise ConfigError(
                f"{entry.name} is {_CALLED[kind]}, got {value!r}. "
                f"{_instead(kind, value) or f'Leave it out for {entry.default!r}.'}"
            )


def _instead(kind: type, value: Any) -> str:
    """What was probably meant; "" where that cannot be told."""
    if kind is str and isinstance(value, (list, tuple)) and all(isinstance(item, str) for item in value):
        return f"Write {','.join(value)!r}."
    if kind not in (int, float) or isinstance(value, bool):
        return ""
    try:
        number = float(value)
    except (TypeError, ValueError):
        return ""
    if kind is float or not math.isfinite(number):
        return f"Write {number}." if math.isfinite(number) else ""
    low, high = math.floor(number), math.ceil(number)
    return f"Write {low}." if low == high else f"Write {low} or {high}."
