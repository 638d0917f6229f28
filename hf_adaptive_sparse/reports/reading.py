"""`report.json` back into a `Report`: the facts of a run, for those who come later."""

from __future__ import annotations

import json
from pathlib import Path

from ..errors import FormatError
from .data import Report


def read_report(file: str | Path) -> Report:
    """The report that `write_report` wrote.

    Raises:
        FormatError: it cannot be read, is of another version, or damaged.
    """
    try:
        found = json.loads(Path(file).read_text(encoding="utf-8"))
    except OSError as problem:
        raise FormatError(f"{file}: cannot be read: {problem.strerror}.") from problem
    except ValueError as problem:
        raise FormatError(f"{file}: is not JSON ({problem}).") from problem
    try:
        return Report.from_json(found)
    except FormatError as problem:
        raise FormatError(f"{file}: {problem}") from problem
