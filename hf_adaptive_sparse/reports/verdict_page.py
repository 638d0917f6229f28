"""The sections of a page that `analyze`, `inspect` and `bench` fill."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from html import escape
from typing import Any

from . import verdict_plots
from .data import Report
from .html import columns_table, facts, figure, folded, shown
from .text import human_bytes, human_flops, human_seconds, number
from .verdict import MeasuredSpread

_FITS = {True: "yes", False: "NO", None: "not known"}


def verdict_sections(report: Report) -> list[str]:
    """All of them that there is something for."""
    parts = [*_backends(report), *_shapes(report), *_forms(report), *_costs(report), *_sensitivity(report)]
    parts += [*_linears(report), *_findings(report), *facts("Provenance", flat(report.provenance))]
    if report.notes:
        parts.append("<h2>What these numbers rest on</h2>")
        parts += [f'<p class="note">{escape(line)}</p>' for line in report.notes]
    return parts


def flat(value: dict, prefix: str = "") -> dict[str, str]:
    """A nested object as "outer.inner" names and values for a person."""
    found: dict[str, str] = {}
    for key, entry in value.items():
        name = f"{prefix}{key}"
        if isinstance(entry, dict):
            found |= flat(entry, f"{name}.")
        else:
            text = shown(entry)
            found[name] = text if len(text) <= 400 else f"{text[:400]} ..."
    return found


def with_spread(spread: MeasuredSpread, digits: int = 2) -> str:
    """ "1.78 (1.70 to 1.81)"; without the range where nothing varied."""
    if spread.low == spread.high:
        return f"{spread.median:.{digits}f}"
    return f"{spread.median:.{digits}f} ({spread.low:.{digits}f} to {spread.high:.{digits}f})"


def _forms(report: Report) -> list[str]:
    if not report.forms:
        return []
    sizes = {
        "form": lambda row: row.form,
        "weights on disk": lambda row: human_bytes(row.file_bytes),
        "of dense": lambda row: f"{row.file_ratio:.4f}",
        "read per decoded token": lambda row: human_bytes(row.token_bytes),
        "of dense ": lambda row: f"{row.token_ratio:.4f}",
    }
    speeds = {
        "form": lambda row: row.form,
        "decoding, tokens/s": lambda row: number(row.decode),
        "× dense": lambda row: f"{row.decode_speedup:.2f}",
        "prompt, tokens/s": lambda row: number(row.prefill),
        "× dense ": lambda row: f"{row.prefill_speedup:.2f}",
        "in memory": lambda row: human_bytes(row.memory_bytes),
        "fits": lambda row: _FITS[row.fits],
    }
    parts = ["<h2>Predicted size</h2>", columns_table(sizes, report.forms)]
    if report.caps:
        parts += ["<h2>Predicted caps on speed: at most</h2>"]
        parts += figure(verdict_plots.cap_bars(report.caps), "Speed that cannot be beaten, as a multiple of dense.")
        parts += _by_machine(report.caps, speeds)
    return parts


def _costs(report: Report) -> list[str]:
    if not report.costs:
        return []
    columns = {
        "job": lambda row: row.job,
        "peak of the device": lambda row: human_bytes(row.device_bytes),
        "fits": lambda row: _FITS[row.fits],
        "operations": lambda row: human_flops(row.flops),
        "at least": lambda row: human_seconds(row.seconds),
    }
    notes = dict.fromkeys(f"{row.job}: {row.note}." for row in report.costs)
    listed = [f'<p class="note">{escape(note)}</p>' for note in notes]
    return ["<h2>Predicted cost of the jobs</h2>", *_by_machine(report.costs, columns), *listed]


def _by_machine(rows: Sequence[Any], columns: dict[str, Callable[[Any], str]]) -> list[str]:
    """One table for every machine, under its name."""
    parts = []
    for machine in dict.fromkeys(row.hardware for row in rows):
        mine = [row for row in rows if row.hardware == machine]
        parts.append(f"<h3>{escape(machine)}</h3>{columns_table(columns, mine)}")
    return parts


def _sensitivity(report: Report) -> list[str]:
    if not report.sensitivity:
        return []
    columns = {
        "matrix": lambda row: row.module,
        "shape": lambda row: " × ".join(map(str, row.shape)),
        "output error": lambda row: number(row.error),
        "Fisher trace": lambda row: number(row.trace),
        "loss per token": lambda row: number(row.loss),
    }
    how = "was measured by running the model with it" if report.sensitivity[0].measured else (
        "is predicted to second order from the gradients; for queries and keys it can be several times too high"
    )
    parts = ["<h2>Sensitivity to 2:4</h2>", f'<p class="note">What a matrix adds to the loss {how}.</p>']
    parts += figure(
        verdict_plots.sensitivity_map(report.sensitivity),
        "What making one matrix 2:4 does, with all others dense; experts of a layer are averaged.",
    )
    return [*parts, *folded(columns_table(columns, report.sensitivity), len(report.sensitivity))]


def _linears(report: Report) -> list[str]:
    if not report.linears:
        return []
    columns = {
        "matrices": lambda row: row.name,
        "shape": lambda row: " × ".join(map(str, row.shape)),
        "count": lambda row: f"{row.count:,}",
        "2:4": lambda row: "yes" if row.sparse else "no",
        "packed": lambda row: "yes" if row.packed else "no",
        "why not": lambda row: row.reason,
    }
    return ["<h2>Which matrices qualify</h2>", columns_table(columns, report.linears)]


def _findings(report: Report) -> list[str]:
    if not report.findings:
        return []
    columns = {
        "matrix": lambda row: row.module,
        "what": lambda row: row.what,
        "count": lambda row: f"{row.count:,}",
        "where": lambda row: row.where,
    }
    return ["<h2>Findings</h2>", *folded(columns_table(columns, report.findings), len(report.findings))]


def _backends(report: Report) -> list[str]:
    if not report.backends:
        return []
    columns = {
        "backend": lambda row: row.backend,
        "on disk": lambda row: human_bytes(row.bytes_on_disk),
        "loads in, s": lambda row: with_spread(row.load_seconds),
        "peak, MB": lambda row: with_spread(
            MeasuredSpread(**{name: value / 1e6 for name, value in vars(row.peak_bytes).items()}), 0
        ),
        "prompt, tokens/s": lambda row: with_spread(row.prefill, 0),
        "decoding, tokens/s": lambda row: with_spread(row.decode, 1),
    }
    parts = ["<h2>The whole model</h2>"]
    parts += figure(verdict_plots.backend_bars(report.backends), "Median of the rounds, with the smallest and largest.")
    return [*parts, columns_table(columns, report.backends)]


def _shapes(report: Report) -> list[str]:
    if not report.shapes:
        return []
    columns = {
        "shape": lambda row: " × ".join(map(str, row.shape)),
        "dtype": lambda row: row.dtype,
        "layers": lambda row: f"{row.layers:,}",
        "rows": lambda row: f"{row.rows:,}",
        "backend": lambda row: row.backend,
        "ms": lambda row: number(1000 * row.seconds.median),
        "time next to dense": lambda row: with_spread(row.ratio),
        "chosen": lambda row: "yes" if row.chosen else "",
    }
    crossings = {
        "shape": lambda row: " × ".join(map(str, row.shape)),
        "backend": lambda row: row.backend,
        "up to": lambda row: f"{row.rows:,} rows",
        "from": lambda row: f"{row.next_rows:,} rows",
        "faster from there": lambda row: row.faster,
    }
    parts = ["<h2>Every shape</h2>"]
    parts += figure(
        verdict_plots.shape_curves(report.shapes),
        "Speed of a layer next to dense by the rows that go through it together; above 1 it is faster than dense.",
    )
    if report.crossings:
        parts += ["<p>Where the faster one changes:</p>", columns_table(crossings, report.crossings)]
    return [*parts, *folded(columns_table(columns, report.shapes), len(report.shapes))]
