"""Plots of `analyze` and `bench`. Each takes plain data and returns one SVG image, or None for nothing to draw."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib import rc_context
from matplotlib.colors import LogNorm, Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullFormatter

from .drawing import COLOURS, STYLE, WIDTH, fill, grid, rendered, sheet
from .verdict import BackendRow, CapRow, SensitivityRow, ShapeRow

_MARKS = ("o", "s", "^", "D", "v", "P")


def cap_bars(rows: Sequence[CapRow]) -> bytes | None:
    """Decoding and prefill of every form, as multiples of dense: a group of bars for every machine."""
    if not rows:
        return None
    machines, forms = list(dict.fromkeys(row.hardware for row in rows)), list(dict.fromkeys(row.form for row in rows))
    places, height = np.arange(len(machines)), 0.8 / len(forms)
    with rc_context(STYLE | {"axes.grid.axis": "x"}):
        figure = Figure(figsize=(WIDTH, 1.3 + 0.2 * len(rows)), layout="constrained")
        for panel, (title, speedup) in enumerate(
            (("decoding", lambda row: row.decode_speedup), ("prompt", lambda row: row.prefill_speedup))
        ):
            axes = figure.add_subplot(1, 2, panel + 1)
            for number, form in enumerate(forms):
                values = [next(speedup(r) for r in rows if (r.hardware, r.form) == (m, form)) for m in machines]
                bars = axes.barh(
                    places + height * (number - (len(forms) - 1) / 2), values, 0.9 * height,
                    color=COLOURS[number % len(COLOURS)], label=form,
                )  # fmt: skip
                axes.bar_label(bars, labels=[f"{value:.2f}" for value in values], padding=3, fontsize=7.5)
            names = [_wrapped(machine) for machine in machines]
            axes.set_yticks(places, names if panel == 0 else [""] * len(machines), fontsize=8.5)
            axes.invert_yaxis()
            axes.set_xlim(0, 1.15 * max(speedup(row) for row in rows))
            axes.set_xlabel(f"{title}: times dense, at most")
        handles, labels = axes.get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside upper center", ncols=len(forms), frameon=False, fontsize=8.5)
        return rendered(figure)


def sensitivity_map(rows: Sequence[SensitivityRow]) -> bytes | None:
    """Output error and predicted loss of every matrix: block by kind of matrix."""
    if not rows:
        return None
    blocks, kinds, places = grid(rows)
    if not blocks:
        return None
    panels = {"error of the outputs": [row.error for row in rows], "loss per token (nats)": [row.loss for row in rows]}
    with rc_context(STYLE | {"axes.grid": False}):
        figure = Figure(figsize=(WIDTH, min(1.5 + 0.28 * len(kinds), 14.0)), layout="constrained")
        for panel, (label, each) in enumerate(panels.items()):
            values = fill(places, blocks, kinds, each)
            low, high = np.nanmin(values), np.nanmax(values)
            norm = LogNorm(low, max(high, 2 * low)) if panel and low > 0 else Normalize(0.0, max(high, 1e-9))
            axes = figure.add_subplot(1, 2, panel + 1)
            image = axes.imshow(values, aspect="auto", cmap="viridis", interpolation="nearest", norm=norm)
            axes.set_yticks(range(len(kinds)), kinds if panel == 0 else [""] * len(kinds), fontsize=8.5)
            every = max(1, -(-len(blocks) // 12))
            axes.set_xticks(range(0, len(blocks), every), [str(block) for block in blocks[::every]])
            axes.set_xlabel("block")
            figure.colorbar(image, ax=axes, label=label, pad=0.02)
        return rendered(figure)


def backend_bars(rows: Sequence[BackendRow]) -> bytes | None:
    """Size, load, memory and speed of every backend next to dense, with the spread of the rounds."""
    if len(rows) < 2:
        return None
    measures = {
        "bytes on disk": lambda row: (row.disk_ratio,) * 3,
        "time to load": lambda row: (row.load_ratio.median, row.load_ratio.low, row.load_ratio.high),
        "peak memory": lambda row: (row.peak_ratio.median, row.peak_ratio.low, row.peak_ratio.high),
        "speed of prompts": lambda row: (row.prefill_ratio.median, row.prefill_ratio.low, row.prefill_ratio.high),
        "speed of decoding": lambda row: (row.decode_ratio.median, row.decode_ratio.low, row.decode_ratio.high),
    }
    places, height = np.arange(len(measures)), 0.8 / len(rows)
    with rc_context(STYLE | {"axes.grid.axis": "x"}):
        figure, axes = sheet(1.2 + 0.24 * len(rows) * len(measures))
        widest = 1.0
        for number, row in enumerate(rows):
            middle, low, high = np.array([measure(row) for measure in measures.values()]).T
            widest = max(widest, high.max())
            y = places + height * (number - (len(rows) - 1) / 2)
            axes.barh(
                y, middle, 0.88 * height, color=COLOURS[number % len(COLOURS)], label=row.backend,
                xerr=[middle - low, high - middle], error_kw={"elinewidth": 1.0, "capsize": 2.5},
            )  # fmt: skip
            for place, value, end in zip(y, middle, high, strict=True):
                axes.annotate(f"{value:.2f}", (end, place), (5, 0), textcoords="offset points", va="center", fontsize=8)
        axes.axvline(1.0, color="#888888", linewidth=0.8)
        axes.set_yticks(places, list(measures))
        axes.invert_yaxis()
        axes.set_xlim(0, 1.15 * widest)
        axes.set_xlabel("next to dense, in the same round")
        figure.legend(loc="outside upper center", ncols=len(rows), frameon=False, fontsize=9)
        return rendered(figure)


def shape_curves(rows: Sequence[ShapeRow]) -> bytes | None:
    """Speed of every backend next to dense over the number of rows: one panel for every shape, eight at most."""
    shapes = list(dict.fromkeys((row.shape, row.dtype) for row in rows if row.backend != "dense"))[:8]
    if not shapes:
        return None
    backends = list(dict.fromkeys(row.backend for row in rows if row.backend != "dense"))
    lines = -(-len(shapes) // 2)
    with rc_context(STYLE):
        figure = Figure(figsize=(WIDTH, 0.6 + 2.5 * lines), layout="constrained")
        for number, (shape, dtype) in enumerate(shapes):
            axes = figure.add_subplot(lines, min(2, len(shapes)), number + 1)
            for index, backend in enumerate(backends):
                mine = [row for row in rows if (row.shape, row.dtype, row.backend) == (shape, dtype, backend)]
                if not mine:
                    continue
                counts = [row.rows for row in mine]
                colour = COLOURS[(index + 1) % len(COLOURS)]
                axes.fill_between(
                    counts, [1 / r.ratio.high for r in mine], [1 / r.ratio.low for r in mine], color=colour, alpha=0.2,
                    linewidth=0,
                )  # fmt: skip
                axes.plot(
                    counts, [1 / row.ratio.median for row in mine], color=colour, marker=_MARKS[index % len(_MARKS)],
                    markersize=4, label=backend if number == 0 else None,
                )  # fmt: skip
            axes.axhline(1.0, color="#555555", linewidth=0.9)
            axes.set_xscale("log", base=2)
            axes.set_yscale("log", base=2)
            axes.set_xticks(counts, [str(count) for count in counts], fontsize=8)
            axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
            axes.yaxis.set_minor_formatter(NullFormatter())
            axes.xaxis.set_minor_formatter(NullFormatter())
            axes.set_title(f"{shape[0]} × {shape[1]}, {dtype}", fontsize=9, loc="left")
            if number >= len(shapes) - min(2, len(shapes)):
                axes.set_xlabel("rows (tokens together)")
            axes.set_ylabel("speed next to dense", fontsize=8.5)
        figure.legend(loc="outside upper center", ncols=len(backends), frameon=False, fontsize=9)
        return rendered(figure)


def _wrapped(name: str) -> str:
    words, lines = name.split(), [""]
    for word in words:
        if len(lines[-1]) + len(word) > 22 and lines[-1]:
            lines.append("")
        lines[-1] = f"{lines[-1]} {word}".strip()
    return "\n".join(lines)
