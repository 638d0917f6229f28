"""Processes that kill themselves with SIGKILL at a chosen moment, so that every moment can be tried again.

They are forked from a server that has imported everything, so that one costs no more than its own work. SIGKILL
cannot be caught: nothing is flushed, and no `finally` runs.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path

# Whatever changes the output folder: python's own events, see "audit events" in the manual.
_WRITES = ("open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.truncate")


def run_to_end(arguments: list[str], output: Path) -> int:
    """How many times a run that is not killed touches its output folder; it must end with exit code 0."""
    receiver, sender = multiprocessing.Pipe(duplex=False)
    assert _fork(_count, arguments, output, sender) == 0
    return receiver.recv()


def run_until_killed(arguments: list[str], output: Path, kill: tuple[str, int]) -> int:
    """The exit code of a run that is killed at a moment; -9 if it was.

    Args:
        kill: ("write", n) just before the output folder is touched for the n-th time;
            ("torch.save", n) or ("save_file", n) with half of the n-th file of this kind on the disk.
    """
    return _fork(_kill_at, arguments, output, kill)


def kill_and_resume(arguments: Callable[..., list[str]], output: Path, *kills: tuple[str, int]) -> None:
    """Kill a run at the first moment, the resumed one at the next, and so on; then let it end.

    Args:
        arguments: (output folder, more arguments) -> of the run.
    """
    for number, kill in enumerate(kills):  # a resumed run has less to do, and may end before the moment comes
        ends = (-signal.SIGKILL,) if number == 0 else (-signal.SIGKILL, 0)
        assert run_until_killed(arguments(output, "--resume"), output, kill) in ends
    assert run_until_killed(arguments(output, "--resume"), output, ("write", 10**9)) == 0


def _fork(target: Callable, *arguments: object) -> int:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([f"hf_adaptive_sparse.cli.{name}" for name in ("train", "prune", "shrink")])
    process = context.Process(target=target, args=arguments)
    process.start()
    process.join(timeout=280)
    assert process.exitcode is not None, "the run hangs"
    return process.exitcode


def _count(arguments: list[str], output: Path, sender) -> None:
    touched = 0

    def count() -> None:
        nonlocal touched
        touched += 1

    _watch(output, count)
    code = _main(arguments)
    sender.send(touched)
    os._exit(code)


def _kill_at(arguments: list[str], output: Path, kill: tuple[str, int]) -> None:
    kind, left = kill

    def count(file: str | None = None) -> None:
        nonlocal left
        left -= 1
        if left == 0:
            if file is not None:
                os.truncate(file, os.path.getsize(file) // 2)
            os.kill(os.getpid(), signal.SIGKILL)

    if kind == "write":
        _watch(output, count)
    else:
        _cut_short(kind, count)
    os._exit(_main(arguments))


def _watch(output: Path, touched: Callable[[], None]) -> None:
    def hook(event: str, arguments: tuple) -> None:
        if event not in _WRITES or not isinstance(arguments[0], str | os.PathLike):
            return
        reads = event == "open" and isinstance(arguments[1], str) and not set(arguments[1]) & set("wax+")
        # Results are written beside their place, in hidden folders.
        if not reads and Path(arguments[0]).is_relative_to(output.parent):
            touched()

    sys.addaudithook(hook)


def _cut_short(kind: str, written: Callable[[str], None]) -> None:
    """Call `written` after every file that torch.save or safetensors' save_file has written."""
    import safetensors.torch
    import torch

    module, name = (torch, "save") if kind == "torch.save" else (safetensors.torch, "save_file")
    save = getattr(module, name)

    def replacement(content, file, *arguments, **options):
        save(content, file, *arguments, **options)
        written(str(file))

    for each in list(sys.modules.values()):  # also where it was imported, under whatever name
        for alias in [alias for alias, value in list(vars(each).items()) if value is save]:
            setattr(each, alias, replacement)


def _main(arguments: list[str]) -> int:
    import torch

    from hf_adaptive_sparse.cli.main import main

    torch.set_num_threads(1)
    with open(os.devnull, "w") as nowhere:
        sys.stdout = nowhere
        return main(arguments)
