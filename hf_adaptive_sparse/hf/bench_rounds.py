"""Whole models measured in turns, each time in a process of its own, and compared round by round."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

from ..backend_choice import DENSE
from ..backend_timing import Spread
from ..errors import ConfigError
from .bench_worker import WorkerResult, WorkerTask

Measure = Callable[[WorkerTask], WorkerResult]


def measure_in_process(task: WorkerTask, environment: Mapping[str, str] | None = None) -> WorkerResult:
    """Measure in a fresh process, in which nothing else was loaded.

    Args:
        environment: what it has besides that of this process.
    Raises:
        ConfigError: it failed; the message ends with its last line.
    """
    package = str(Path(__file__).parents[2])
    path = os.pathsep.join(filter(None, (package, os.environ.get("PYTHONPATH"))))
    process = subprocess.run(
        [sys.executable, "-m", "hf_adaptive_sparse.hf.bench_worker"],
        input=json.dumps(dataclasses.asdict(task)), capture_output=True, text=True, check=False,
        env=os.environ | {"PYTHONPATH": path} | dict(environment or {}),
    )  # fmt: skip
    if process.returncode:
        lines = process.stderr.strip().splitlines() or ["no message"]
        killed = f", killed by signal {-process.returncode}" if process.returncode < 0 else ""
        raise ConfigError(
            f"{task.folder}: the process that measures backend {task.backend!r} failed{killed}: {lines[-1]}"
        )
    return WorkerResult(**json.loads(process.stdout.strip().splitlines()[-1]))


def measure_rounds(
    tasks: Mapping[str, WorkerTask], rounds: int, measure: Measure, on_result: Callable[[int], None] | None = None
) -> dict[str, list[WorkerResult]]:
    """Every task once in every round, so that what slows the machine down slows all of them.

    Each round begins with the next task, so that none is always the first.

    Args:
        on_result: called with the number of results so far.
    Raises:
        ConfigError: no round.
    """
    if rounds < 1:
        raise ConfigError(f"rounds is at least 1, got {rounds}.")
    found: dict[str, list[WorkerResult]] = {name: [] for name in tasks}
    names, done = list(tasks), 0
    for number in range(rounds):
        start = number % len(names)
        for name in names[start:] + names[:start]:
            found[name].append(measure(tasks[name]))
            done += 1
            if on_result is not None:
                on_result(done)
    return found


def spread_of(results: list[WorkerResult], what: str) -> Spread:
    """Of one attribute over the rounds."""
    return Spread.of([float(getattr(result, what)) for result in results])


def ratio_of(results: Mapping[str, list[WorkerResult]], name: str, what: str) -> Spread:
    """Of one attribute to that of dense, round by round."""
    pairs = zip(results[name], results[DENSE], strict=True)
    return Spread.of([getattr(mine, what) / getattr(dense, what) for mine, dense in pairs])
