"""The plots of a run. Each takes plain data and returns one SVG image (`drawing.as_png`: PNG), or None for no data."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib import rc_context
from matplotlib.colors import LogNorm, Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

from .data import ModelRow, PruningRow, StageRow, WidthRow
from .drawing import COLOURS, STYLE, WIDTH, fill, grid, rendered, sheet
from .text import human_bytes, human_count, number

_CURVES = {
    "loss": ("loss (mix of all)", COLOURS[2]),
    "loss/ce": ("cross-entropy", COLOURS[3]),
    "loss/kd": ("distillation (KL)", COLOURS[1]),
    "loss/hidden": ("hidden states", COLOURS[4]),
}


def loss_curves(history: Sequence[dict[str, float]]) -> bytes | None:
    """Loss over optimizer steps: the mix and its cross-entropy on the left, distillation on the right.

    They have axes of their own, because the two parts of the loss may differ a hundredfold.
    """
    logged = [row for row in history if "step" in row]
    panels = []
    for keys in (("loss", "loss/ce"), ("loss/kd", "loss/hidden")):
        found = {key: [(row["step"], row[key]) for row in logged if key in row] for key in keys}
        if any(found.values()):
            panels.append({key: points for key, points in found.items() if points})
    if not panels:
        return None
    with rc_context(STYLE):
        figure = Figure(figsize=(WIDTH, 3.2), layout="constrained")
        for axes, series in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
            for key, points in series.items():
                label, colour = _CURVES[key]
                steps, values = zip(*points, strict=True)
                marker = "o" if len(points) < 12 else None
                axes.plot(steps, values, color=colour, label=label, marker=marker, markersize=3)
            axes.set_xlabel("optimizer step")
            axes.set_ylabel("loss per token" if series.keys() & {"loss", "loss/hidden"} else "nats per token")
            axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
            # Above the axes, where no curve can run through it.
            axes.legend(
                frameon=False, ncols=len(series), loc="lower left", bbox_to_anchor=(0.0, 1.0),
                fontsize=9, handlelength=1.4, columnspacing=1.2, borderaxespad=0.2,
            )  # fmt: skip
        return rendered(figure)


def flip_map(flips: dict[str, list[tuple[int, float]]]) -> bytes | None:
    """Mask-flip rate of every layer (rows) at every refresh (columns)."""
    steps = sorted({step for points in flips.values() for step, _ in points})
    if not steps:
        return None
    layers = list(flips)
    rates = np.full((len(layers), len(steps)), np.nan)
    for row, layer in enumerate(layers):
        for step, rate in flips[layer]:
            rates[row, steps.index(step)] = 100 * rate
    with rc_context(STYLE | {"axes.grid": False}):
        figure, axes = sheet(min(1.5 + 0.19 * len(layers), 14.0))
        image = axes.imshow(rates, aspect="auto", cmap="viridis", interpolation="nearest", vmin=0.0)
        every = max(1, -(-len(layers) // 64))
        axes.set_yticks(range(0, len(layers), every), _short_names(layers)[::every], fontsize=7.5)
        every = max(1, -(-len(steps) // 12))
        axes.set_xticks(range(0, len(steps), every), [str(step) for step in steps[::every]])
        axes.set_xlabel("optimizer step of the mask refresh")
        figure.colorbar(image, ax=axes, label="mask entries changed (%)", pad=0.02)
        return rendered(figure)


def sparsity_map(rows: Sequence[PruningRow]) -> bytes | None:
    """Sparsity, and beside it the sensitivity where one was measured, of every matrix: block by kind of matrix."""
    blocks, kinds, places = grid(rows)
    if not blocks:
        return None
    zeros = fill(places, blocks, kinds, [100 * row.sparsity for row in rows])
    panels = [("zeros (%)", zeros, Normalize(max(0.0, np.nanmin(zeros) - 5), min(100.0, np.nanmax(zeros) + 5)))]
    values = fill(places, blocks, kinds, [np.nan if row.sensitivity is None else row.sensitivity for row in rows])
    if np.isfinite(values).any():
        low, high = np.nanmin(values), np.nanmax(values)
        if low > 0:
            panels.append(("sensitivity (log scale)", values, LogNorm(low, high if high > low else 2 * low)))
        else:
            panels.append(("sensitivity", values, Normalize(low, high)))
    with rc_context(STYLE | {"axes.grid": False}):
        figure = Figure(figsize=(WIDTH, min(1.5 + 0.28 * len(kinds), 14.0)), layout="constrained")
        for place, (label, values, norm) in enumerate(panels):
            axes = figure.add_subplot(1, len(panels), place + 1)
            image = axes.imshow(values, aspect="auto", cmap="viridis", interpolation="nearest", norm=norm)
            axes.set_yticks(range(len(kinds)), kinds if place == 0 else [""] * len(kinds), fontsize=8.5)
            every = max(1, -(-len(blocks) // 12))
            axes.set_xticks(range(0, len(blocks), every), [str(block) for block in blocks[::every]])
            axes.set_xlabel("block")
            if place == 0 and len(blocks) <= 8:
                for row, column in np.argwhere(np.isfinite(values)):
                    colour = "white" if norm(values[row, column]) < 0.6 else "black"
                    text = f"{values[row, column]:.3g}"
                    axes.text(column, row, text, ha="center", va="center", fontsize=8, color=colour)
            figure.colorbar(image, ax=axes, label=label, pad=0.02)
        return rendered(figure)


def width_bars(rows: Sequence[WidthRow]) -> bytes | None:
    """KV heads and MLP channels that are left in every block, in percent."""
    if not rows:
        return None
    places = np.arange(len(rows))
    series = {"KV heads": [100 * row.kv_heads / row.dense_kv_heads for row in rows]}
    if all(row.dense_channels for row in rows):
        series["MLP channels"] = [100 * row.channels / row.dense_channels for row in rows]
    with rc_context(STYLE):
        figure, axes = sheet(3.2)
        for number_, (label, values) in enumerate(series.items()):
            axes.bar(places + 0.4 * (number_ - 0.5), values, 0.38, label=label, color=COLOURS[2 - number_])
        every = max(1, -(-len(rows) // 24))
        axes.set_xticks(places[::every], [str(row.block) for row in rows[::every]])
        axes.xaxis.grid(False)
        axes.set_ylim(0, 105)
        axes.set_xlabel("block")
        axes.set_ylabel("left (%)")
        axes.legend(
            frameon=False, ncols=2, loc="lower left", bbox_to_anchor=(0.0, 1.0), fontsize=9, borderaxespad=0.2
        )  # fmt: skip
        return rendered(figure)


def stage_steps(rows: Sequence[StageRow]) -> bytes | None:
    """Perplexity over parameters: up where units go, down where training repairs it."""
    rows = [row for row in rows if np.isfinite(row.before) and np.isfinite(row.after)]
    if not rows:
        return None
    with rc_context(STYLE):
        figure, axes = sheet(3.2)
        path = [(row.parameters, value) for row in rows for value in (row.after, row.recovered) if value is not None]
        axes.plot(*zip(*path, strict=True), color="#bbbbbb", linewidth=1, zorder=1)
        parameters = [row.parameters for row in rows]
        axes.scatter(parameters, [row.after for row in rows], s=22, color=COLOURS[1], label="pruned", zorder=2)
        trained = [(row.parameters, row.recovered) for row in rows if row.recovered is not None]
        if trained:
            axes.scatter(*zip(*trained, strict=True), s=22, color=COLOURS[3], label="after training", zorder=2)
        axes.invert_xaxis()
        axes.xaxis.set_major_locator(MaxNLocator(6))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: human_count(round(value))))
        axes.set_xlabel("parameters left")
        axes.set_ylabel("perplexity")
        axes.legend(
            frameon=False, ncols=2, loc="lower left", bbox_to_anchor=(0.0, 1.0), fontsize=9, borderaxespad=0.2
        )  # fmt: skip
        return rendered(figure)


def importance_map(importance: Sequence[Sequence[float]]) -> bytes | None:
    """Importance of every block (rows) at every removal (columns)."""
    found = [row for row in importance if row]
    if not found:
        return None
    values = np.array(found).T
    with rc_context(STYLE | {"axes.grid": False}):
        figure, axes = sheet(min(1.6 + 0.22 * len(values), 9.0))
        image = axes.imshow(values, aspect="auto", cmap="RdBu_r", interpolation="nearest", norm=Normalize(-1, 1))
        every = max(1, -(-len(values) // 24))
        axes.set_yticks(range(0, len(values), every), [str(block) for block in range(0, len(values), every)])
        axes.xaxis.set_major_locator(MaxNLocator(10, integer=True))
        axes.set_xlabel("removal")
        axes.set_ylabel("block")
        figure.colorbar(image, ax=axes, label="importance", pad=0.02)
        return rendered(figure)


def error_curves(rows: Sequence[PruningRow]) -> bytes | None:
    """Relative output error over the blocks, one curve for each kind of matrix."""
    measured = [row for row in rows if row.error is not None and np.isfinite(row.error)]
    blocks, kinds, places = grid(measured)
    if not blocks:
        return None
    values = fill(places, blocks, kinds, [row.error for row in measured])
    with rc_context(STYLE):
        figure, axes = sheet(3.6 + 0.2 * (len(kinds) // 4))
        for index, kind in enumerate(kinds):
            style = ("-", "--", ":", "-.")[index // len(COLOURS) % 4]
            colour = COLOURS[index % len(COLOURS)]
            axes.plot(blocks, values[index], style, color=colour, label=kind, marker="o", markersize=3)
        positive = values[values > 0]
        if positive.size and positive.max() > 8 * positive.min():
            axes.set_yscale("log")
            axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
            axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.2g}"))
            axes.yaxis.set_minor_formatter(NullFormatter())
        axes.set_xlabel("block")
        axes.set_ylabel("squared error of the outputs,\npart of the dense outputs")
        axes.xaxis.set_major_locator(MaxNLocator(12, integer=True))
        axes.legend(
            frameon=False, ncols=4, loc="lower left", bbox_to_anchor=(0.0, 1.0), fontsize=9, handlelength=1.8,
            columnspacing=1.2, borderaxespad=0.2,
        )  # fmt: skip
        return rendered(figure)


def perplexity_bars(models: Sequence[ModelRow]) -> bytes | None:
    """Perplexity of each model, lower is better; a logarithmic axis where one would dwarf the others."""
    rows = [row for row in models if row.perplexity is not None and np.isfinite(row.perplexity)]
    if not rows:
        return None
    values = [float(row.perplexity or 0.0) for row in rows]
    logarithmic = max(values) > 8 * min(values)
    return _bars(
        [row.name for row in rows],
        values,
        labels=[number(value) for value in values],
        caption="perplexity, lower is better" + (" (log scale)" if logarithmic else ""),
        logarithmic=logarithmic,
    )


def size_bars(sizes: dict[str, int]) -> bytes | None:
    """Bytes on disk."""
    if not sizes:
        return None
    largest = max(sizes.values()) or 1
    labels = [f"{human_bytes(size)}  ({100 * size / largest:.0f} %)" for size in sizes.values()]
    units = ((10**9, "GB"), (10**6, "MB"), (10**3, "kB"), (1, "bytes"))
    unit, name = next((unit, name) for unit, name in units if largest >= unit)
    values = [size / unit for size in sizes.values()]
    return _bars(list(sizes), values, labels=labels, caption=f"{name} on disk", colours=COLOURS[2:3])


def _bars(
    names: Sequence[str],
    values: Sequence[float],
    *,
    labels: Sequence[str],
    caption: str,
    colours: Sequence[str] = COLOURS,
    logarithmic: bool = False,
) -> bytes:
    with rc_context(STYLE | {"axes.grid.axis": "x"}):
        figure, axes = sheet(0.9 + 0.42 * len(values))
        fill = [colours[index % len(colours)] for index in range(len(values))]
        bars = axes.barh(range(len(values)), values, color=fill, height=0.62)
        axes.bar_label(bars, labels=labels, padding=5)
        axes.set_yticks(range(len(values)), names)
        axes.invert_yaxis()
        if logarithmic:
            axes.set_xscale("log")
            low, high = min(values), max(values)
            axes.set_xlim(low / 2, high * (high / low) ** 0.22)
            # Minor ticks have names of their own where few decades are shown, which then overlap.
            axes.xaxis.set_major_locator(LogLocator(subs=(1.0, 3.0)))
            axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.15g}"))
            axes.xaxis.set_minor_formatter(NullFormatter())
        else:
            axes.set_xlim(0, (max(values) or 1.0) * 1.28)  # room for the labels at the ends of the bars
        axes.set_xlabel(caption)
        return rendered(figure)


def _short_names(layers: Sequence[str]) -> list[str]:
    # "model.layers.3.mlp.up_proj" -> "3.mlp.up_proj": drop the words that every name starts with.
    parts = [layer.split(".") for layer in layers]
    shared = 0
    while all(len(part) > shared + 2 for part in parts) and len({part[shared] for part in parts}) == 1:
        shared += 1
    return [".".join(part[shared:]) for part in parts]
