"""Compiling the C++ kernel at first use, and finding it again.

The library needs no header of torch or Python and holds code for every instruction set, so that what was built once
serves every version of torch and every machine of one architecture: its place in the cache is named by its source
and the command alone. `HF_ADAPTIVE_SPARSE_CACHE` names another cache folder; `CXX` another compiler.
"""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from ..errors import ConfigError

FOLDER = Path(__file__).with_name("cpu")
SOURCE = FOLDER / "two_four_linear.cpp"
CACHE_VARIABLE = "HF_ADAPTIVE_SPARSE_CACHE"
COMPILERS = ("c++", "g++", "clang++")
# No -march: the instruction sets are named in the source, function by function, and chosen when it is loaded.
FLAGS = ("-O3", "-std=c++17", "-fPIC", "-shared", "-fvisibility=hidden", "-w")

_INSTALL = "Install a C++ compiler (Debian, Ubuntu: apt install g++; macOS: xcode-select --install) or name one in CXX"


def cache_folder() -> Path:
    """Where compiled kernels are kept."""
    if CACHE_VARIABLE in os.environ:
        return Path(os.environ[CACHE_VARIABLE])
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "hf_adaptive_sparse"


def library_path() -> Path:
    """Where the library of this source is, or will be."""
    sources = [path.read_text("utf-8") for path in (SOURCE, *sorted(FOLDER.glob("*.h")))]
    about = "\0".join((*sources, *FLAGS, sys.platform, platform.machine()))
    key = hashlib.sha256(about.encode()).hexdigest()[:16]
    return cache_folder() / "kernels" / f"two_four_linear-{key}.so"


def built_library() -> ctypes.CDLL:
    """The library, compiled now if it is not in the cache.

    Several processes may do this at once: each compiles for itself and renames the result into its place.

    Raises:
        ConfigError: there is no compiler, it failed, or the cache folder cannot be written.
    """
    path = library_path()
    if path.is_file():
        with contextlib.suppress(OSError):  # no library: cut short by a full disk; made anew
            return ctypes.CDLL(str(path))
    _compile(path)
    try:
        return ctypes.CDLL(str(path))
    except OSError as error:
        raise ConfigError(
            f"the compiled kernel was built and cannot be loaded ({error}). If programs may not run from "
            f"{path.parent}, name another folder in {CACHE_VARIABLE}."
        ) from error


def find_compiler() -> list[str]:
    """The command of the C++ compiler; ConfigError if there is none."""
    asked = os.environ.get("CXX")
    for name in (asked,) if asked else COMPILERS:
        words = shlex.split(name)
        found = shutil.which(words[0]) if words else None
        if found is not None:
            return [found, *words[1:]]
    looked = f"CXX names {asked!r}, which is not there" if asked else f"none of {', '.join(COMPILERS)} is in PATH"
    raise ConfigError(f"the compiled kernel needs a C++ compiler: {looked}. {_INSTALL}.")


def _compile(path: Path) -> None:
    compiler = find_compiler()
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent, prefix=".build-") as folder:
            made = Path(folder, path.name)
            command = [*compiler, *FLAGS, str(SOURCE), "-o", str(made)]
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode:
                lines = (done.stderr or done.stdout).strip().splitlines() or [f"it returned {done.returncode}"]
                raise ConfigError(
                    f"the compiled kernel could not be built: {shlex.join(compiler)} says {lines[-1]!r}. {_INSTALL}; "
                    f"it must know C++17."
                )
            with open(made, "rb") as file:
                os.fsync(file.fileno())
            os.replace(made, path)
    except OSError as error:
        raise ConfigError(
            f"the compiled kernel could not be written to {path.parent} ({error.strerror or error}). Make the folder "
            f"writable, or name another in {CACHE_VARIABLE}."
        ) from error
