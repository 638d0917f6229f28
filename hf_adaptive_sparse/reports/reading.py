"""`report.json` back into a `Report`: the facts of a run, for those who come later."""

from __future__ import annotations

import dataclasses
import json
import types
import typing
from pathlib import Path
from typing import Any

from ..errors import FormatError
from .data import REPORT_VERSION, Generation, MatrixRow, ModelRow, PruningRow, Report, StageRow, WidthRow

_ROWS: dict[str, type] = {
    "models": ModelRow,
    "matrices": MatrixRow,
    "pruning": PruningRow,
    "widths": WidthRow,
    "stages": StageRow,
    "generations": Generation,
}
_NOT_FINITE = ("nan", "inf", "-inf")


def read_report(file: str | Path) -> Report:
    """The report that `write_report` wrote. Parts that this version does not know are left out.

    Raises:
        FormatError: it cannot be read, or is of another version.
    """
    try:
        found = json.loads(Path(file).read_text(encoding="utf-8"))
        version = found["report_version"]
        if version != REPORT_VERSION:
            raise FormatError(
                f"{file}: is a report of version {version}, this hf_adaptive_sparse reads {REPORT_VERSION}. Update "
                "hf_adaptive_sparse, or leave the report out."
            )
        known = {entry.name for entry in dataclasses.fields(Report)}
        parts = {name: value for name, value in found.items() if name in known}
        for name, kind in _ROWS.items():
            parts[name] = [_row(kind, entry) for entry in parts.get(name, ())]
        return Report(**parts)
    except FormatError:
        raise
    except OSError as problem:
        raise FormatError(f"{file}: cannot be read: {problem.strerror}.") from problem
    except (ValueError, TypeError, KeyError, AttributeError) as problem:
        raise FormatError(f"{file}: is no report.json of hf_adaptive_sparse ({problem!r}).") from problem


def _row(kind: type, entry: dict[str, Any]) -> Any:
    types_of = typing.get_type_hints(kind)
    return kind(**{name: _as(types_of[name], value) for name, value in entry.items() if name in types_of})


def _as(kind: Any, value: Any) -> Any:
    if isinstance(value, list) and typing.get_origin(kind) is tuple:
        return tuple(value)
    # JSON has no NaN: the report has its name.
    accepted = typing.get_args(kind) if isinstance(kind, types.UnionType) else (kind,)
    return float(value) if float in accepted and value in _NOT_FINITE else value
