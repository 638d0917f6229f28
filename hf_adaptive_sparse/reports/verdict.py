"""What `analyze`, `inspect` and `bench` say about a model, as plain data. A number that is not known is None."""

from __future__ import annotations

import re
from dataclasses import dataclass


def place_of(module: str) -> tuple[int | None, str]:
    """(block, name inside the block): "model.layers.3.mlp.up_proj" -> (3, "mlp.up_proj"); experts share a name."""
    name = re.sub(r"\[\d+\]$", "", module)
    match = re.match(r"(?:.*?\.)?(\d+)\.(.+)$", name)
    if match is None:
        return None, name
    return int(match[1]), re.sub(r"(?<=experts\.)\d+\.", "", match[2])


@dataclass(frozen=True, kw_only=True)
class LinearRow:
    """Matrices of one name and shape, "model.layers.*.mlp.up_proj", and whether they can be 2:4 and packed."""

    name: str
    shape: tuple[int, ...]
    count: int
    sparse: bool
    packed: bool
    reason: str  # why not; empty where they can be both


@dataclass(frozen=True, kw_only=True)
class SizeRow:
    """A whole model in one form: in a file, and as a decoding step reads it. Ratios are to the dense model."""

    form: str
    file_bytes: int
    file_ratio: float
    token_bytes: int
    token_ratio: float


@dataclass(frozen=True, kw_only=True)
class CapRow:
    """What a machine cannot be faster than, in tokens per second; speedups are to the dense model's."""

    hardware: str
    form: str
    decode: float
    decode_speedup: float
    prefill: float
    prefill_speedup: float
    memory_bytes: int  # weights and the cache of keys and values
    fits: bool | None


@dataclass(frozen=True, kw_only=True)
class CostRow:
    """What one job is predicted to take on one machine: peak memory of the device, and the least time."""

    hardware: str
    job: str
    device_bytes: int
    fits: bool | None
    flops: float
    seconds: float
    note: str


@dataclass(frozen=True, kw_only=True)
class SensitivityRow:
    """How much one matrix suffers from 2:4: error of its outputs, its Fisher trace, what it adds to the loss.

    `loss` is in nats per token, predicted from gradients or measured.
    """

    module: str
    shape: tuple[int, ...]
    error: float
    trace: float
    loss: float
    measured: bool

    @property
    def place(self) -> tuple[int | None, str]:
        return place_of(self.module)


@dataclass(frozen=True, kw_only=True)
class FindingRow:
    """Something in a saved model that a person should look at."""

    module: str
    what: str
    where: str
    count: int


@dataclass(frozen=True, kw_only=True)
class MeasuredSpread:
    """Median, smallest and largest of some measurements."""

    median: float
    low: float
    high: float


@dataclass(frozen=True, kw_only=True)
class BackendRow:
    """A whole model as one backend loads and runs it; each ratio is to the dense model of the same round.

    Attributes:
        load_seconds, prefill, decode: seconds to load, tokens per second.
        load_ratio: time next to dense; prefill_ratio, decode_ratio: speed next to dense.
        peak_bytes: of the process, or of the accelerator's memory.
    """

    backend: str
    bytes_on_disk: int
    disk_ratio: float
    load_seconds: MeasuredSpread
    load_ratio: MeasuredSpread
    peak_bytes: MeasuredSpread
    peak_ratio: MeasuredSpread
    prefill: MeasuredSpread
    prefill_ratio: MeasuredSpread
    decode: MeasuredSpread
    decode_ratio: MeasuredSpread


@dataclass(frozen=True, kw_only=True)
class ShapeRow:
    """One backend for one shape and number of rows; the ratio is its time next to dense's of the same repetition."""

    shape: tuple[int, ...]
    dtype: str
    layers: int  # of the model that have this shape
    rows: int
    backend: str
    seconds: MeasuredSpread
    ratio: MeasuredSpread
    chosen: bool


@dataclass(frozen=True, kw_only=True)
class CrossingRow:
    """Between which numbers of rows the faster one of dense and a backend changes."""

    shape: tuple[int, ...]
    dtype: str
    backend: str
    rows: int
    next_rows: int
    faster: str  # from next_rows on
