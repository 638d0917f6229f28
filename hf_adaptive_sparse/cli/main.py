"""`hf-adaptive-sparse SUBCOMMAND ...`: finds the subcommand, and turns errors into messages and exit codes.

Exit codes: 0 done; 1 a failure of ours; 2 a user's mistake; 130 interrupted.
"""

from __future__ import annotations

import difflib
import errno
import importlib
import os
import sys
import traceback
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from ..errors import ConfigError, OutputError, SparsityError
from . import PROGRAM, SUBCOMMANDS
from .output import versions

# What an interrupted subcommand has on the disk.
_KEPT = {"train": "Checkpoints", "prune": "Finished blocks", "shrink": "Checkpoints"}

_DISK = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one subcommand; returns the exit code and never raises."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in arguments or os.environ.get("HF_ADAPTIVE_SPARSE_DEBUG") == "1"
    command = arguments[0] if arguments and arguments[0] in SUBCOMMANDS else ""
    try:
        code = _dispatch(arguments)
        sys.stdout.flush()  # here, where a closed pipe is caught, and not at exit
        return code
    except SystemExit as stop:  # argparse, after --help
        return stop.code if isinstance(stop.code, int) else 0
    except KeyboardInterrupt:
        kept = _KEPT.get(command)
        hint = "" if kept is None else f" {kept} are kept: the same command with --resume goes on."
        return _fail(command, f"interrupted.{hint}", 130)
    except BrokenPipeError:
        # The reader of a pipe has seen enough (`inspect ... | head`). Python would complain again at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except SparsityError as mistake:
        if debug:
            traceback.print_exc()
        return _fail(command, f"error: {mistake}", 2)
    except Exception as failure:
        if debug:
            traceback.print_exc()
        mistake = _as_mistake(failure)
        if mistake is not None:
            return _fail(command, f"error: {mistake}", 2)
        again = "Please" if debug else "Run it again with --debug to see the traceback, and"
        return _fail(
            command,
            f"failed, and this is a fault of {PROGRAM}, not yours: {type(failure).__name__}: {failure}. "
            f"{again} report it in the project's issue tracker, with the command and the output of "
            f"{PROGRAM} --version.",
            1,
        )


def _dispatch(arguments: list[str]) -> int:
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(_help())
        return 0 if arguments else 2
    if arguments[0] in ("-V", "--version"):
        print(_versions())
        return 0
    command = arguments[0]
    if command not in SUBCOMMANDS:
        close = difflib.get_close_matches(command, SUBCOMMANDS, n=1)
        hint = f" Did you mean {close[0]!r}?" if close else f" Known: {', '.join(SUBCOMMANDS)}."
        raise ConfigError(f"unknown subcommand {command!r}.{hint}")
    module = importlib.import_module(f".{command}", __package__)
    from .arguments import parse_arguments

    parsed = parse_arguments(module.ARGUMENTS, command, arguments[1:])
    with _libraries_are_quiet(parsed.debug):
        return module.run(parsed)


@contextmanager
def _libraries_are_quiet(debug: bool) -> Iterator[None]:
    """Their progress bars and their notes to developers would hide what we say."""
    from datasets.utils import logging as datasets_logging
    from transformers.utils import logging as transformers_logging

    if debug:
        yield
        return
    bars = transformers_logging.is_progress_bar_enabled(), datasets_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    datasets_logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            for category in (FutureWarning, DeprecationWarning):
                warnings.simplefilter("ignore", category)
            yield
    finally:
        if bars[0]:
            transformers_logging.enable_progress_bar()
        if bars[1]:
            datasets_logging.enable_progress_bar()


def _fail(command: str, message: str, code: int) -> int:
    paragraph = " ".join(message.split())
    print(f"{PROGRAM} {command}".strip() + f": {paragraph}", file=sys.stderr)
    return code


def _as_mistake(failure: Exception) -> SparsityError | None:
    """Failures of the machine, not of the code, said in our words."""
    text = str(failure)
    if (isinstance(failure, OSError) and failure.errno in _DISK) or "No space left on device" in text:
        number = getattr(failure, "errno", None) or errno.ENOSPC
        where = getattr(failure, "filename", None) or "the output"
        return OutputError(f"{where}: cannot be read or written: {os.strerror(number)}. What is complete is kept.")
    if type(failure).__name__ == "OutOfMemoryError":
        return ConfigError("the device ran out of memory. Lower --batch-size or --window, or take a smaller model.")
    return None


def _help() -> str:
    width = max(map(len, SUBCOMMANDS))
    lines = [f"  {name:<{width}}  {text}" for name, text in SUBCOMMANDS.items()]
    return "\n".join(
        [
            f"usage: {PROGRAM} SUBCOMMAND ...",
            "",
            "Semi-structured sparse language models: train, save, load, measure.",
            "",
            *lines,
            "",
            f"{PROGRAM} SUBCOMMAND --help lists its arguments; all take --config recipe.yaml and --dry-run.",
            f"{PROGRAM} --version prints the versions that a report of a fault should name.",
        ]
    )


def _versions() -> str:
    found = versions()
    own = found.pop("hf_adaptive_sparse")
    return f"{PROGRAM} {own} ({', '.join(f'{name} {version}' for name, version in found.items())})"


if __name__ == "__main__":
    sys.exit(main())
