"""The tables of `analyze`, `inspect` and `bench` on a terminal."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from ..reports import MeasuredSpread, Report
from ..reports.text import human_bytes, human_flops, human_seconds, number
from ..reports.verdict_page import with_spread
from .console import print_table

_FITS = {True: "yes", False: "NO", None: "?"}


def print_verdict(report: Report) -> None:
    """Every part of the report that has something in it, and the summary below."""
    for title, rows, columns in _tables(report):
        if rows:
            print(f"\n{title}")
            print_table({name: [cell(row) for row in rows] for name, cell in columns.items()})
    print("\n".join(["", *report.summary]))


def _tables(report: Report) -> list[tuple[str, Sequence[Any], dict[str, Callable[[Any], str]]]]:
    return [
        ("matrices", report.linears, {
            "name": lambda row: row.name,
            "shape": lambda row: "x".join(map(str, row.shape)),
            "count": lambda row: str(row.count),
            "2:4": lambda row: "yes" if row.sparse else "no",
            "packed": lambda row: "yes" if row.packed else "no",
            "why not": lambda row: row.reason,
        }),
        ("predicted size", report.forms, {
            "form": lambda row: row.form,
            "on disk": lambda row: human_bytes(row.file_bytes),
            "of dense": lambda row: f"{row.file_ratio:.4f}",
            "read per token": lambda row: human_bytes(row.token_bytes),
            "of dense ": lambda row: f"{row.token_ratio:.4f}",
        }),
        ("predicted caps: nothing is faster", report.caps, {
            "machine": lambda row: row.hardware,
            "form": lambda row: row.form,
            "decoding tokens/s": lambda row: number(row.decode),
            "x dense": lambda row: f"{row.decode_speedup:.2f}",
            "prompt tokens/s": lambda row: number(row.prefill),
            "x dense ": lambda row: f"{row.prefill_speedup:.2f}",
            "in memory": lambda row: human_bytes(row.memory_bytes),
            "fits": lambda row: _FITS[row.fits],
        }),
        ("predicted cost of the jobs: at least", report.costs, {
            "job": lambda row: row.job,
            "machine": lambda row: row.hardware,
            "peak of the device": lambda row: human_bytes(row.device_bytes),
            "fits": lambda row: _FITS[row.fits],
            "operations": lambda row: human_flops(row.flops),
            "time": lambda row: human_seconds(row.seconds),
        }),
        ("sensitivity to 2:4", report.sensitivity, {
            "matrix": lambda row: row.module,
            "output error": lambda row: number(row.error),
            "Fisher trace": lambda row: number(row.trace),
            "loss per token": lambda row: f"{number(row.loss)} {'measured' if row.measured else 'predicted'}",
        }),
        ("findings", report.findings, {
            "matrix": lambda row: row.module,
            "what": lambda row: row.what,
            "count": lambda row: f"{row.count:,}",
            "where": lambda row: row.where,
        }),
        ("the whole model", report.backends, {
            "backend": lambda row: row.backend,
            "on disk": lambda row: f"{human_bytes(row.bytes_on_disk)}, {row.disk_ratio:.3f}",
            "loads in s": lambda row: _measured(row.load_seconds, row.load_ratio),
            "peak MB": lambda row: f"{row.peak_bytes.median / 1e6:.0f}, {with_spread(row.peak_ratio)}",
            "prompt tokens/s": lambda row: _measured(row.prefill, row.prefill_ratio),
            "decoding tokens/s": lambda row: _measured(row.decode, row.decode_ratio),
        }),
        ("every shape: time next to dense", report.shapes, {
            "shape": lambda row: "x".join(map(str, row.shape)),
            "dtype": lambda row: row.dtype,
            "layers": lambda row: str(row.layers),
            "rows": lambda row: str(row.rows),
            "backend": lambda row: row.backend,
            "ms": lambda row: number(1000 * row.seconds.median),
            "of dense": lambda row: with_spread(row.ratio),
            "chosen": lambda row: "yes" if row.chosen else "",
        }),
        ("where the faster one changes", report.crossings, {
            "shape": lambda row: "x".join(map(str, row.shape)),
            "dtype": lambda row: row.dtype,
            "backend": lambda row: row.backend,
            "up to rows": lambda row: str(row.rows),
            "from rows": lambda row: str(row.next_rows),
            "faster from there": lambda row: row.faster,
        }),
    ]  # fmt: skip


def _measured(value: MeasuredSpread, ratio: MeasuredSpread) -> str:
    return f"{number(value.median)}, {with_spread(ratio)}"
