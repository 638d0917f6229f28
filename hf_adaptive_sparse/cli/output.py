"""The output folder of a subcommand, and the record of the run that a later `--resume` must match."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import re
import shlex
import shutil
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from ..errors import ConfigError, OutputError
from . import PROGRAM

RUN_FILE = "run.json"


def check_output(folder: str | Path, overwrite: bool, resume: bool = False) -> Path:
    """The folder as a path. Nothing is written.

    Raises:
        OutputError: it is a file or cannot be written, or holds something and neither `overwrite` nor `resume` was
            asked for.
    """
    path = Path(folder).expanduser()
    if path.exists() and not path.is_dir():
        raise OutputError(f"{path}: the output folder is a file. Choose another name.")
    there = next(parent for parent in (path, *path.absolute().parents) if parent.exists())
    if not there.is_dir():
        raise OutputError(f"{path}: the output folder cannot be made, {there} is a file. Choose another name.")
    if not os.access(there, os.W_OK | os.X_OK):
        raise OutputError(f"{path}: the output folder cannot be written, {there} is read-only. Choose another one.")
    if path.is_dir() and any(path.iterdir()) and not overwrite and not resume:
        raise OutputError(
            f"{path}: the output folder is not empty. Choose another one, or replace its results with --overwrite."
        )
    return path


def check_inputs(replaced: Iterable[Path], inputs: Mapping[str, str | None]) -> None:
    """Raise OutputError where something that a run reads is, or lies in, what it removes to make room for its results.

    Args:
        replaced: files and folders that the run removes; they need not exist.
        inputs: what each argument names; names of the Hub and of methods are no paths, and pass.
    """
    found = {name: Path(given).expanduser() for name, given in inputs.items() if given}
    # Links are followed: what is reached through one is as lost as what lies there.
    read = {name: Path(os.path.realpath(path)) for name, path in found.items() if path.exists()}
    for path in replaced:
        for argument, place in read.items():
            if place.is_relative_to(os.path.realpath(path)):
                raise OutputError(
                    f"{argument} {inputs[argument]}: would be lost, since this run removes {path} to make room for its "
                    "results. Choose another output folder, or move it first."
                )


def clear(folder: Path, names: tuple[str, ...]) -> None:
    """Remove what an earlier run left under these names, and nothing else."""
    for name in names:
        path = folder / name
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


def remove_leftovers(folder: Path) -> None:
    """Remove what a killed run left half-written beside the names of its results."""
    for path in folder.glob(".*"):
        if path.is_dir() and re.fullmatch(r"\.[^.]+\.[0-9a-f]{8}\.tmp", path.name):
            shutil.rmtree(path)
        elif path.name.endswith(".partial"):
            path.unlink()


def record_run(folder: Path, settings: dict[str, Any]) -> None:
    """Write down what this run is, so that `check_same_run` can tell later."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as problem:
        raise OutputError(f"{folder}: cannot be made: {problem.strerror}. Choose another folder.") from problem
    partial = folder / f".{RUN_FILE}.partial"
    partial.write_text(json.dumps(settings, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    os.replace(partial, folder / RUN_FILE)


def begun(output: Path, settings: dict[str, Any]) -> bool:
    """Whether there is a run in `output` to go on with; a run killed before its first file is started again.

    Raises:
        ConfigError: it is another run, or something else is there.
    """
    if not output.is_dir() or all(entry.name.endswith(".partial") for entry in output.iterdir()):
        return False
    check_same_run(output, settings)
    return True


def check_same_run(folder: Path, settings: dict[str, Any]) -> None:
    """A resumed run must be the run that was interrupted; with other settings it would be neither.

    Raises:
        ConfigError: the folder holds no run, or one with other settings; each that differs is named.
    """
    file = folder / RUN_FILE
    if not file.is_file():
        raise ConfigError(f"{folder}: nothing to resume, it holds no {RUN_FILE}. Start the run without --resume.")
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as problem:
        raise ConfigError(f"{file}: not JSON ({problem}). Start the run anew with --overwrite.") from problem
    asked = json.loads(json.dumps(settings))  # as it would come back from the file
    differing = [
        f"{name} was {json.dumps(found.get(name))} and is {json.dumps(asked.get(name))}"
        for name in sorted(found.keys() | asked.keys())
        if found.get(name) != asked.get(name)
    ]
    if differing:
        raise ConfigError(
            f"{folder}: cannot resume with other settings: {'; '.join(differing)}. Use the old ones, or "
            "start anew with --overwrite."
        )


def command_line(command: str) -> str:
    """What was typed, for the report; a path to this program is left out."""
    arguments = sys.argv[sys.argv.index(command) :] if command in sys.argv else [command]
    return " ".join([PROGRAM, *map(shlex.quote, arguments)])


def weight_bytes(folder: str | Path) -> int:
    """Bytes of the weight files of a saved model."""
    return sum(file.stat().st_size for file in Path(folder).glob("*.safetensors"))


def versions() -> dict[str, str]:
    """Of everything that a result depends on."""
    names = ("hf_adaptive_sparse", "torch", "transformers", "peft", "accelerate", "datasets", "safetensors")
    return {"python": platform.python_version()} | {name: version_of(name) for name in names}


def version_of(distribution: str) -> str:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"
