"""What a person sees: the plan, the progress, the tables. Results go to stdout, everything else to stderr."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as RichProgress
from rich.table import Table
from rich.text import Text

from ..reports import MatrixRow, ModelRow, Report
from ..reports.text import DASH, human_bytes, human_count, number, percent

_SECONDS_BETWEEN_LINES = 5.0


def print_plan(command: str, plan: Mapping[str, object], dry_run: bool, quiet: bool = False) -> None:
    """What will be done, before it is done. The plan is the result of a dry run, and goes to stdout then.

    Args:
        quiet: stdout is for a program that reads JSON, so the plan never goes there.
    """
    console = _console(error=quiet or not dry_run)
    table = Table.grid(padding=(0, 2))
    for key, value in plan.items():
        table.add_row(Text(f"  {key}"), Text(str(value)))
    console.print(Text(f"{command}: {'would do this, and writes nothing now' if dry_run else 'doing this'}"))
    console.print(table)


def say(message: str) -> None:
    """One line about what is happening."""
    _console(error=True).print(Text(message))


def print_report(report: Report, page: Path) -> None:
    """The result of a run, and where the rest of it is."""
    print_models(report.models)
    for generation in report.generations:
        print_generations(generation.prompt, generation.texts)
    say(f"report: {page}")


def print_models(rows: Sequence[ModelRow]) -> None:
    """The comparison of models; columns that nobody filled are left out."""
    columns = {
        "model": [row.name for row in rows],
        "perplexity": [number(row.perplexity) for row in rows],
        "bits/byte": [number(row.bits_per_byte) for row in rows],
        "zeros": [percent(row.sparsity) for row in rows],
        "parameters": [DASH if row.parameters is None else f"{row.parameters:,}" for row in rows],
        "on disk": [human_bytes(row.bytes_on_disk) for row in rows],
        "tokens": [human_count(row.tokens) for row in rows],
    }
    print_table({name: cells for name, cells in columns.items() if any(cell != DASH for cell in cells)})


def print_matrices(rows: Sequence[MatrixRow]) -> None:
    """One line for every weight matrix."""
    verdict = {True: "yes", False: "NO", None: DASH}
    print_table(
        {
            "matrix": [row.module for row in rows],
            "shape": ["x".join(map(str, row.shape)) for row in rows],
            "dtype": [row.dtype for row in rows],
            "zeros": [percent(row.sparsity) for row in rows],
            "2:4": [verdict[row.two_four] for row in rows],
            "bytes": [f"{row.stored_bytes:,}" for row in rows],
        }
    )


def print_generations(prompt: str, texts: Mapping[str, str]) -> None:
    """The same prompt continued by each model, one below the other."""
    console = _console(error=False)
    console.print(Text(f"\nprompt: {prompt!r}"))
    for name, text in texts.items():
        console.print(Text(f"  {name}: {text!r}"))


def print_tasks(tasks: Mapping[str, Mapping[str, float]]) -> None:
    """Every metric of every task."""
    found = [(task, metric, number(value)) for task, metrics in tasks.items() for metric, value in metrics.items()]
    if found:
        print_table(dict(zip(("task", "metric", "value"), zip(*found, strict=True), strict=True)))


def print_table(columns: Mapping[str, Sequence[str]]) -> None:
    """A table on stdout, whole however wide it is; the first column is a name."""
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    for index, name in enumerate(columns):
        table.add_column(name, justify="left" if index == 0 else "right", no_wrap=True, overflow="ignore")
    for row in zip(*columns.values(), strict=True):
        table.add_row(*map(Text, row))
    _console(error=False).print(table, crop=False)


def _console(error: bool) -> Console:
    # Made anew each time, so that it writes to what sys.stdout is now. Without a terminal rich assumes 80
    # columns, and would cut names that a log file has room for.
    stream = sys.stderr if error else sys.stdout
    width = None if stream.isatty() else 240
    return Console(file=stream, width=width, soft_wrap=width is not None, highlight=False, emoji=False)


class Progress:
    """How far a phase is: a bar on a terminal, a line every few seconds elsewhere.

    `with Progress("training", total) as progress: progress.update(done, "loss 2.1")`
    """

    def __init__(self, phase: str, total: int) -> None:
        self.phase, self.total = phase, max(1, total)
        self.said = time.monotonic()
        console = _console(error=True)
        self.bar = None
        if console.is_terminal:
            columns = (
                TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(),
                TextColumn("{task.fields[note]}"),
            )  # fmt: skip
            self.bar = RichProgress(*columns, console=console)

    def __enter__(self) -> Progress:
        if self.bar is not None:
            self.bar.start()
            self.task = self.bar.add_task(self.phase, total=self.total, note="")
        return self

    def __exit__(self, *exception: object) -> None:
        if self.bar is not None:
            self.bar.stop()

    def update(self, done: int, note: str = "") -> None:
        if self.bar is not None:
            self.bar.update(self.task, completed=done, note=note)
        elif time.monotonic() - self.said > _SECONDS_BETWEEN_LINES:
            self.said = time.monotonic()
            say(f"{self.phase}: {done} of {self.total}{f', {note}' if note else ''}")
