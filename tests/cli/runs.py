"""Running subcommands as a user does: in this process, or in one of their own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

# A run of 20 steps with 10 checkpoints, a second long.
TRAIN = (
    "--window", "16", "--batch-size", "4", "--train-tokens", "1280", "--mask-interval", "4",
    "--save-steps", "2", "--eval-windows", "8", "--device", "cpu",
)  # fmt: skip


SHRINK_ONCE = (
    "--window", "16", "--batch-size", "4", "--train-tokens", "1280", "--calibration-windows", "4",
    "--eval-windows", "8", "--save-steps", "5", "--device", "cpu",
)  # fmt: skip
# Without training: no argument that only training reads.
SHRINK_ONLY = (
    "--window", "16", "--train-tokens", "0", "--calibration-windows", "4", "--eval-windows", "8", "--device", "cpu",
)  # fmt: skip
SHRINK = (*SHRINK_ONCE, "--allocation", "adaptive", "--stages", "3", "--prune-fraction", "1", "--step", "0.2")


# Half a second of pruning.
PRUNE = (
    "--window", "16", "--batch-size", "4", "--calibration-windows", "8", "--eval-windows", "8", "--device", "cpu",
)  # fmt: skip


@dataclass(frozen=True)
class Outcome:
    """How a process ended, and what it printed."""

    code: int
    out: str
    err: str

    @property
    def message(self) -> str:
        """The last line on stderr: what an error says."""
        return self.err.rstrip("\n").rpartition("\n")[2]


def run_process(*arguments: object, module: str = "hf_adaptive_sparse", **environment: str) -> Outcome:
    """`python -m hf_adaptive_sparse ARGUMENTS` in a process of its own."""
    process = start_process(*arguments, module=module, **environment)
    out, err = process.communicate(timeout=280)
    return Outcome(process.returncode, out, err)


def start_process(*arguments: object, module: str = "hf_adaptive_sparse", **environment: str) -> subprocess.Popen[str]:
    """The same, without waiting for its end."""
    root = Path(__file__).parents[2]
    path = os.pathsep.join([str(root), os.environ.get("PYTHONPATH", "")])
    return subprocess.Popen(
        [sys.executable, "-m", module, *map(str, arguments)], stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        text=True, env=os.environ | {"PYTHONPATH": path} | environment,
    )  # fmt: skip


def read_report(folder: Path) -> dict:
    """report.json, after a look at the page beside it."""
    assert (folder / "report.html").read_text(encoding="utf-8").endswith("</html>\n")
    return json.loads((folder / "report.json").read_text(encoding="utf-8"))


def tree(folder: Path) -> dict[str, bytes]:
    """Every file under a folder, and what is in it."""
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}
