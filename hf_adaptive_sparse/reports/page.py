"""`report.html`: one file that needs no other, with every plot inside."""

from __future__ import annotations

from html import escape

from . import plots
from .data import Report
from .html import columns_table as _columns
from .html import facts as _facts
from .html import figure as _figure
from .html import folded as _folded
from .html import table as _table
from .text import DASH, human_bytes, human_count, human_seconds, number, percent
from .verdict_page import verdict_sections

_STYLE = """
:root { color-scheme: light; }
* { box-sizing: border-box; }
body { font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "DejaVu Sans", sans-serif; color: #1c1c1c;
       background: #fff; margin: 0 auto; padding: 2rem 1.5rem 4rem; max-width: 62rem; }
h1 { font-size: 1.7rem; line-height: 1.25; margin: 0 0 .4rem; }
h2 { font-size: 1.15rem; margin: 2.4rem 0 .6rem; padding-bottom: .25rem; border-bottom: 1px solid #ddd; }
td + td.name, th + th.name { padding-left: .9rem; }
h3 { font-size: 1rem; margin: 1.4rem 0 .3rem; }
p { margin: .4rem 0; } p.note { color: #555; font-size: .92em; }
code, pre { font-family: ui-monospace, SFMono-Regular, "DejaVu Sans Mono", monospace; font-size: .88em; }
pre { background: #f6f6f6; padding: .6rem .8rem; border-radius: 6px; white-space: pre-wrap;
      overflow-wrap: anywhere; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th, td { text-align: left; vertical-align: top; padding: .32rem .7rem .32rem 0;
         border-bottom: 1px solid #eaeaea; }
th { font-weight: 600; border-bottom: 2px solid #ccc; }
th.right, td.right { text-align: right; padding: .32rem 0 .32rem .9rem; white-space: nowrap; }
table.facts { width: auto; } table.facts td:first-child { padding-right: 2.5rem; white-space: nowrap; }
td.name { overflow-wrap: break-word; min-width: 9rem; } td.bad { color: #b00020; font-weight: 600; }
figure { margin: .8rem 0 1.2rem; } figure img { width: 100%; height: auto; display: block; }
figcaption { color: #555; font-size: .92em; }
.texts { display: grid; grid-template-columns: repeat(auto-fit, minmax(15rem, 1fr)); gap: .8rem;
         margin: .5rem 0 1.4rem; }
.texts div { border: 1px solid #ddd; border-radius: 6px; padding: .5rem .7rem; min-width: 0; }
.texts b { display: block; margin-bottom: .25rem; font-size: .9em; }
.texts pre { background: none; padding: 0; margin: 0; border-radius: 0; }
details > summary { cursor: pointer; margin: .5rem 0; }
"""


def render_page(report: Report) -> str:
    """The whole page; parts without data are left out."""
    body = [f"<h1>{escape(report.title)}</h1>"]
    body += [f"<p>{escape(line)}</p>" for line in report.summary]
    if report.command:
        body.append(f"<pre>{escape(report.command)}</pre>")
    body += verdict_sections(report)
    body += _comparison(report)
    body += _pruning(report)
    body += _shrinking(report)
    body += _training(report)
    body += _generations(report)
    body += _matrices(report)
    body += _facts("Data", report.data)
    body += _facts("Time", {phase: human_seconds(seconds) for phase, seconds in report.seconds.items()})
    body += _facts("Settings", report.settings)
    body += _facts("Versions", report.versions)
    # The empty icon keeps a browser from asking a server for one.
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f'<link rel="icon" href="data:,">\n<title>{escape(report.title)}</title>\n<style>{_STYLE}</style>\n'
        "</head>\n<body>\n" + "\n".join(body) + "\n</body>\n</html>\n"
    )


def _comparison(report: Report) -> list[str]:
    parts = []
    if report.models:
        columns = {
            "model": lambda row: row.name,
            "perplexity": lambda row: number(row.perplexity),
            "bits per byte": lambda row: number(row.bits_per_byte),
            "zeros in target layers": lambda row: percent(row.sparsity),
            "parameters": lambda row: DASH if row.parameters is None else f"{row.parameters:,}",
            "weights on disk": lambda row: human_bytes(row.bytes_on_disk),
            "tokens trained": lambda row: human_count(row.tokens),
        }
        parts += ["<h2>Models</h2>", _columns(columns, report.models)]
        parts += _figure(plots.perplexity_bars(report.models), "Perplexity on the same held-out text.")
    if report.tasks:
        found = [(task, metric) for task, metrics in report.tasks.items() for metric in metrics]
        metrics = [(task, metric, number(report.tasks[task][metric])) for task, metric in found]
        parts += ["<h2>Tasks</h2>", _table(["task", "metric", "value"], metrics)]
    if report.sizes:
        parts += ["<h2>Sizes on disk</h2>"]
        parts += _figure(plots.size_bars(report.sizes), "Bytes of the weight files, next to the largest.")
    return parts


def _pruning(report: Report) -> list[str]:
    if not report.pruning:
        return []
    parts = ["<h2>Pruning</h2>"]
    decided = any(row.sensitivity is not None for row in report.pruning)
    parts += _figure(
        plots.sparsity_map(report.pruning),
        f"How sparse each matrix became{', and what that was decided by' * decided}; experts of a layer are averaged.",
    )
    parts += _figure(
        plots.error_curves(report.pruning),
        "Error of each matrix's outputs on the calibration text, next to the dense weight on the same inputs.",
    )
    columns = {
        "matrix": lambda row: row.module,
        "shape": lambda row: " × ".join(map(str, row.shape)),
        "pattern": lambda row: row.pattern,
        "zeros": lambda row: percent(row.sparsity),
        "output error": lambda row: number(row.error),
        "sensitivity": lambda row: number(row.sensitivity),
        "tokens": lambda row: human_count(row.tokens),
        "of all tokens": lambda row: percent(row.shrinkage) if row.shrinkage else DASH,
        "factored with": lambda row: row.rung or DASH,
        "time": lambda row: f"{row.seconds:.3g} s",
    }
    return [*parts, *_folded(_columns(columns, report.pruning), len(report.pruning))]


def _shrinking(report: Report) -> list[str]:
    if not report.widths:
        return []
    parts = ["<h2>Shrinking</h2>"]
    parts += _figure(plots.width_bars(report.widths), "What is left of each block, as a part of what it had.")
    parts += _figure(
        plots.stage_steps(report.stages),
        "Perplexity before and after every pruning, over the parameters that are left; training repairs it in between.",
    )
    parts += _figure(
        plots.importance_map(report.importance),
        "Importance of each block at every removal, from how much it turns the residual stream: larger is pruned less.",
    )
    columns = {
        "block": lambda row: str(row.block),
        "query heads": lambda row: f"{row.heads} of {row.dense_heads}",
        "KV heads": lambda row: f"{row.kv_heads} of {row.dense_kv_heads}",
        "MLP channels": lambda row: f"{row.channels:,} of {row.dense_channels:,}" if row.dense_channels else DASH,
    }
    parts += _folded(_columns(columns, report.widths), len(report.widths))
    if report.stages:
        columns = {
            "pruned before step": lambda row: f"{row.step + 1:,}",
            "parameters left": lambda row: f"{row.parameters:,}",
            "perplexity before": lambda row: number(row.before),
            "after": lambda row: number(row.after),
            "after training": lambda row: number(row.recovered),
        }
        parts += ["<p>Stages:</p>", _columns(columns, report.stages)]
    return parts


def _training(report: Report) -> list[str]:
    parts = _figure(plots.loss_curves(report.history), "Training loss over optimizer steps.")
    parts += _figure(
        plots.flip_map(report.flips),
        "Mask-flip rate: the share of each matrix's mask that changed at each refresh.",
    )
    return ["<h2>Training</h2>", *parts] if parts else []


def _generations(report: Report) -> list[str]:
    parts = []
    for generation in report.generations:
        parts.append(f"<p>Prompt:</p><pre>{escape(generation.prompt)}</pre>")
        cells = [f"<div><b>{escape(n)}</b><pre>{escape(t)}</pre></div>" for n, t in generation.texts.items()]
        parts.append(f'<div class="texts">{"".join(cells)}</div>')
    return ["<h2>The same prompt, continued by each model</h2>", *parts] if parts else []


def _matrices(report: Report) -> list[str]:
    if not report.matrices:
        return []
    verdict = {True: "yes", False: "NO", None: DASH}
    rows = [
        (
            row.module,
            " × ".join(map(str, row.shape)),
            row.dtype,
            percent(row.sparsity),
            verdict[row.two_four],
            DASH if row.first_violation is None else "row {}, group {}".format(*row.first_violation),
            f"{row.stored_bytes:,}",
        )
        for row in report.matrices
    ]
    table = _table(["matrix", "shape", "dtype", "zeros", "2:4", "first invalid", "stored bytes"], rows)
    return ["<h2>Sparsity per matrix</h2>", *_folded(table, len(rows))]
