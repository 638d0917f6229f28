"""What is known about a folder that is to be pushed: from its files, and from the report of the run that made it."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..demo import MODEL_FOLDER
from ..hf.data import is_local
from ..hf.inspection import FolderReport, MatrixRecord, inspect_folder
from ..reports import ModelRow, Report, read_report
from .kinds import Kind, needs_package

REPORT = "report.json"
RUN_FOLDERS = ("packed", "dense", "shrunk", "masks")  # which a subcommand writes below its output folder
_TOKENIZERS = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json", "spiece.model")


@dataclass(frozen=True, kw_only=True)
class Facts:
    """All that a card can say.

    Args:
        report: of the run; None if there is none.
        stored: what the weight files hold; None for masks.
        config: the JSON file that describes the folder: config.json, adapter_config.json or masks.json.
        subcommand: that wrote the report: "train", "prune", "shrink", ...; "" without one.
    """

    folder: Path
    kind: Kind
    report: Report | None
    stored: FolderReport | None
    config: dict[str, Any]
    subcommand: str

    @property
    def settings(self) -> dict[str, Any]:
        return {} if self.report is None else self.report.settings

    @property
    def made_of(self) -> str | None:
        """Hub id or folder of the model that this one was made of."""
        if self.subcommand == "demo":
            return str(MODEL_FOLDER)
        if self.subcommand in ("train", "prune", "shrink"):
            return self.settings.get("model") or None
        found = self.kind.made_of(self.config)
        return str(found) if found else None

    @property
    def result(self) -> ModelRow | None:
        """What was measured of this model: the last row of the comparison."""
        rows = [] if self.report is None else self.report.models
        return rows[-1] if self.subcommand in ("train", "prune", "shrink", "demo") and rows else None

    @property
    def dense(self) -> ModelRow | None:
        """What was measured of the dense model in the same run."""
        return self.report.models[0] if self.report is not None and self.result is not None else None

    @property
    def pruned(self) -> tuple[MatrixRecord, ...]:
        """The matrices that are sparse: at least a tenth of them is zero."""
        return () if self.stored is None else tuple(each for each in self.stored.matrices if each.sparsity >= 0.1)

    @property
    def is_two_four(self) -> bool:
        return bool(self.pruned) and all(matrix.is_two_four for matrix in self.pruned)

    @property
    def has_tokenizer(self) -> bool:
        return any((self.folder / name).is_file() for name in _TOKENIZERS)

    @property
    def needs_import(self) -> bool:
        """Whether this package must be imported to open it."""
        if self.kind.name == "adapter":
            return self.config.get("peft_type") == "ADAPTIVE_SPARSE"
        return self.kind.name in ("packed", "masks") or (self.kind.name == "shrunk" and needs_package(self.folder))

    def hub_dataset(self, key: str) -> str | None:
        """The Hub id of a text that was read ("data", "eval_data"); None for local files."""
        spec = self.settings.get(key)
        return None if not isinstance(spec, str) or not spec or is_local(spec) else spec.partition(":")[0]


def gather(folder: Path, kind: Kind, report: str | Path | None = None) -> Facts:
    """Read everything. The weights are looked at, matrix by matrix, for what is sparse.

    Args:
        report: `report.json` of the run; default: that in the folder, or in the one above if a subcommand put both
            there.
    Raises:
        FormatError: the report or the weights cannot be read.
    """
    file = find_report(folder) if report is None else Path(report).expanduser()
    found = None if file is None else read_report(file)
    words = [] if found is None else found.command.split()
    config = folder / kind.settings
    return Facts(
        folder=folder,
        kind=kind,
        report=found,
        # Loading checks the digests; here the weights are only counted.
        stored=None if kind.name == "masks" else inspect_folder(folder, digests=False),
        config=json.loads(config.read_text(encoding="utf-8")) if config.is_file() else {},
        subcommand=words[1] if len(words) > 1 else "",
    )


def find_report(folder: Path) -> Path | None:
    """`report.json` of the run that wrote a folder."""
    places = [folder, folder.absolute().parent] if folder.absolute().name in RUN_FOLDERS else [folder]
    return next((place / REPORT for place in places if (place / REPORT).is_file()), None)
