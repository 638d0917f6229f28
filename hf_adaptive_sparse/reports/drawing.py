"""What all plots share: style, sheets, the grid of blocks and kinds of matrices, and the image in the end.

`as_png(plot, data)` gives a plot as a PNG image instead of SVG, for places that show no SVG.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from contextvars import ContextVar
from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

from .data import PruningRow
from .verdict import SensitivityRow

# Colour-blind safe (Okabe and Ito). Fonts become paths, so that a page looks the same on every machine.
COLOURS = ("#595959", "#d55e00", "#0072b2", "#009e73", "#cc79a7", "#e69f00")
STYLE = {
    "svg.fonttype": "path",
    "svg.hashsalt": "hf_adaptive_sparse",
    "font.family": "DejaVu Sans",
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e3e3e3",
    "grid.linewidth": 0.7,
}
WIDTH = 8.4
_DOTS_PER_INCH = 150
_AS_PNG: ContextVar[bool] = ContextVar("hf_adaptive_sparse_plots_as_png", default=False)


def as_png(plot: Callable[[Any], bytes | None], data: Any) -> bytes | None:
    """What a plot draws of its data, as a PNG image, 1260 dots wide. The same data give the same bytes."""
    token = _AS_PNG.set(True)
    try:
        return plot(data)
    finally:
        _AS_PNG.reset(token)


def sheet(height: float):
    """(figure, its only axes), as wide as a page; `height` in inches."""
    figure = Figure(figsize=(WIDTH, height), layout="constrained")
    return figure, figure.add_subplot()


def rendered(figure: Figure) -> bytes:
    """The finished image: SVG, or PNG inside `as_png`. The same figure gives the same bytes."""
    file = io.BytesIO()
    if _AS_PNG.get():
        figure.set_dpi(_DOTS_PER_INCH)
        FigureCanvasAgg(figure).print_png(file, metadata={"Software": "hf_adaptive_sparse"})
        return file.getvalue()
    FigureCanvasSVG(figure).print_svg(file, metadata={"Date": None, "Creator": "hf_adaptive_sparse"})
    return file.getvalue()


def grid(rows: Sequence[PruningRow | SensitivityRow]) -> tuple[list[int], list[str], list[tuple[int | None, str]]]:
    """(blocks, kinds of matrices, place of every row); matrices outside of blocks are not drawn."""
    places = [row.place for row in rows]
    blocks = sorted({block for block, _ in places if block is not None})
    kinds = list(dict.fromkeys(kind for block, kind in places if block is not None))
    return blocks, kinds, places


def fill(
    places: Sequence[tuple[int | None, str]], blocks: list[int], kinds: list[str], values: Sequence[float]
) -> np.ndarray:
    """[kinds, blocks], the mean of the values at each place; NaN where there is none."""
    total, count = np.zeros((len(kinds), len(blocks))), np.zeros((len(kinds), len(blocks)))
    for (block, kind), value in zip(places, values, strict=True):
        if block is not None and np.isfinite(value):
            total[kinds.index(kind), blocks.index(block)] += value
            count[kinds.index(kind), blocks.index(block)] += 1
    return np.divide(total, count, out=np.full_like(total, np.nan), where=count > 0)
