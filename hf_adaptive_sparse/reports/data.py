"""What a run found, as plain data: one record becomes `report.json`, `report.html` and the screen's table."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass, field
from typing import Any

from ..errors import FormatError
from .decode import decode
from .verdict import (
    BackendRow,
    CapRow,
    CostRow,
    CrossingRow,
    FindingRow,
    LinearRow,
    SensitivityRow,
    ShapeRow,
    SizeRow,
    place_of,
)

REPORT_VERSION = 1


@dataclass(frozen=True, kw_only=True)
class ModelRow:
    """One model of a comparison. A number that was not measured is None, and is shown as a dash."""

    name: str
    perplexity: float | None = None
    bits_per_byte: float | None = None
    sparsity: float | None = None  # fraction of zeros over the linear layers that were made sparse
    parameters: int | None = None  # of the whole model, where it was made smaller
    bytes_on_disk: int | None = None  # of the weight files
    tokens: int | None = None  # tokens seen while retraining


@dataclass(frozen=True, kw_only=True)
class MatrixRow:
    """One weight matrix of a saved or loaded model."""

    module: str
    shape: tuple[int, ...]
    dtype: str
    sparsity: float
    two_four: bool | None  # None: the input features are not a multiple of 4
    stored_bytes: int
    violations: int | None = None  # groups of four with more than two values
    first_violation: tuple[int, int] | None = None  # (row, group)


@dataclass(frozen=True, kw_only=True)
class PruningRow:
    """One weight matrix that was pruned in one shot. A number that was not needed is None."""

    module: str
    shape: tuple[int, ...]
    pattern: str
    sparsity: float
    error: float | None  # squared error of its outputs, as a part of the squared dense outputs
    sensitivity: float | None  # what its sparsity was chosen by
    tokens: int  # calibration tokens that reached it
    shrinkage: float  # of an expert: what part of all tokens' statistics was mixed into its own
    rung: str  # what it took to factor its Gram matrix; empty if it was not factored
    seconds: float

    @property
    def place(self) -> tuple[int | None, str]:
        """(block, name inside the block)"""
        return place_of(self.module)


@dataclass(frozen=True, kw_only=True)
class WidthRow:
    """One block of a model that lost heads and MLP channels: before and after. With experts it has no channels, 0."""

    block: int
    dense_heads: int
    heads: int
    dense_kv_heads: int
    kv_heads: int
    dense_channels: int
    channels: int


@dataclass(frozen=True, kw_only=True)
class StageRow:
    """One interruption of training to prune. `recovered` is the perplexity when the next one came, or at the end."""

    step: int
    parameters: int
    before: float
    after: float
    recovered: float | None = None


@dataclass(frozen=True, kw_only=True)
class Generation:
    """The same prompt continued by several models, greedily."""

    prompt: str
    texts: dict[str, str]  # model name -> continuation


@dataclass(kw_only=True)
class Report:
    """Everything that a subcommand has to say about its run. Empty parts are left out of the page.

    Args:
        history: one record per logged step, each with "step" and any of "loss", "loss/kd", "loss/ce", "loss/hidden",
            "learning_rate".
        flips: layer name -> [(step, fraction of its mask entries that changed at this refresh)].
        sizes: what -> bytes on disk.
        data: what was read: file names, tokens, sha256 digest.
    """

    title: str
    command: str = ""
    summary: list[str] = field(default_factory=list)
    models: list[ModelRow] = field(default_factory=list)
    sizes: dict[str, int] = field(default_factory=dict)
    history: list[dict[str, float]] = field(default_factory=list)
    flips: dict[str, list[tuple[int, float]]] = field(default_factory=dict)
    matrices: list[MatrixRow] = field(default_factory=list)
    pruning: list[PruningRow] = field(default_factory=list)
    widths: list[WidthRow] = field(default_factory=list)
    stages: list[StageRow] = field(default_factory=list)
    importance: list[list[float]] = field(default_factory=list)  # of every block, for every removal of units
    generations: list[Generation] = field(default_factory=list)
    tasks: dict[str, dict[str, float]] = field(default_factory=dict)  # task -> metric -> value
    linears: list[LinearRow] = field(default_factory=list)
    forms: list[SizeRow] = field(default_factory=list)
    caps: list[CapRow] = field(default_factory=list)
    costs: list[CostRow] = field(default_factory=list)
    sensitivity: list[SensitivityRow] = field(default_factory=list)
    findings: list[FindingRow] = field(default_factory=list)
    provenance: dict[str, Any] = field(default_factory=dict)
    backends: list[BackendRow] = field(default_factory=list)
    shapes: list[ShapeRow] = field(default_factory=list)
    crossings: list[CrossingRow] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)  # what a number above rests on
    data: dict[str, Any] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)  # phase -> wall time

    def as_json(self) -> dict[str, Any]:
        """The report as JSON types only; NaN and infinities become the strings "nan", "inf" and "-inf"."""
        return {"report_version": REPORT_VERSION} | _plain(dataclasses.asdict(self))

    @classmethod
    def from_json(cls, content: dict[str, Any]) -> Report:
        """The report that `as_json` made this of.

        Raises:
            FormatError: it is of another version, or damaged.
        """
        if not isinstance(content, dict) or content.get("report_version") != REPORT_VERSION:
            found = content.get("report_version") if isinstance(content, dict) else type(content).__name__
            raise FormatError(f"report: report_version is {found!r}, this hf_adaptive_sparse reads {REPORT_VERSION}.")
        return decode(cls, {key: value for key, value in content.items() if key != "report_version"})


def _plain(value: Any) -> Any:
    # JSON has no NaN, and a report that no other parser reads is not a report.
    if isinstance(value, dict):
        return {str(key): _plain(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(entry) for entry in value]
    if isinstance(value, (set, frozenset)):
        return sorted(_plain(entry) for entry in value)
    if isinstance(value, bool) or value is None or isinstance(value, (str, int)):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else str(value)
    return str(value)
