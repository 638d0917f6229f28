"""`report.json` and `report.html`, with their plots."""

from __future__ import annotations

import contextlib
import json
import os
from pathlib import Path

from ..errors import OutputError
from .data import REPORT_VERSION, Generation, MatrixRow, ModelRow, PruningRow, Report, StageRow, WidthRow
from .reading import read_report
from .verdict import (
    BackendRow,
    CapRow,
    CostRow,
    CrossingRow,
    FindingRow,
    LinearRow,
    MeasuredSpread,
    SensitivityRow,
    ShapeRow,
    SizeRow,
)

__all__ = [
    "REPORT_VERSION",
    "BackendRow",
    "CapRow",
    "CostRow",
    "CrossingRow",
    "FindingRow",
    "Generation",
    "LinearRow",
    "MatrixRow",
    "MeasuredSpread",
    "ModelRow",
    "PruningRow",
    "Report",
    "SensitivityRow",
    "ShapeRow",
    "SizeRow",
    "StageRow",
    "WidthRow",
    "read_report",
    "write_report",
]


def write_report(report: Report, folder: str | Path) -> Path:
    """Write `report.json` and `report.html` into `folder` (created if absent); returns the path of the page.

    Each file is written beside its place and renamed, so that a reader never sees half of one.

    Raises:
        OutputError: the folder cannot be written to.
    """
    from .page import (
        render_page,  # here, since it imports matplotlib: seconds that who only loads a model need not wait
    )

    folder = Path(folder)
    files = {
        "report.json": json.dumps(report.as_json(), indent=2, ensure_ascii=False, allow_nan=False) + "\n",
        "report.html": render_page(report),
    }
    for name, text in files.items():
        partial = folder / f".{name}.partial"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            partial.write_text(text, encoding="utf-8")
            os.replace(partial, folder / name)
        except OSError as problem:
            with contextlib.suppress(OSError):
                partial.unlink()
            reason = problem.strerror or str(problem)
            raise OutputError(
                f"{folder / name}: cannot write the report: {reason}. Choose another folder."
            ) from problem
    return folder / "report.html"
