"""Results that appear whole or not at all: written beside their place, flushed, then renamed into it."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import uuid
from collections.abc import Iterator
from pathlib import Path

from ..errors import OutputError

# No space left, quota exceeded, larger than the file size limit of the process.
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_NOT_ALLOWED = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST)


@contextlib.contextmanager
def atomic_folder(path: str | os.PathLike, overwrite: bool = False) -> Iterator[Path]:
    """A new folder to write into, which becomes `path` when the block ends without an error.

    After an error the folder is removed and `path` is as it was. A process that is killed leaves at most the
    hidden sibling `.<name>.<8 hex digits>.tmp`, never a part of `path`.

    Args:
        path: must not exist, or be an empty folder, unless `overwrite`.
        overwrite: replace a folder that is not empty, with all that is in it.
    Raises:
        OutputError: `path` is not empty, is a file, or could not be written (disk full, no permission).
    """
    target = Path(os.path.realpath(path))
    _check_target(target, overwrite)
    with _temporary_sibling(target) as temporary:
        temporary.mkdir()
        yield temporary
        _flush_tree(temporary)
        _rename_folder(temporary, target)


def atomic_write(path: str | os.PathLike, text: str) -> None:
    """Write a text file (UTF-8) in one step: readers see the old content or the new one, never a part.

    Raises:
        OutputError: it could not be written; an existing file is as it was.
    """
    with atomic_file(path) as temporary, open(temporary, "w", encoding="utf-8", newline="") as file:
        file.write(text)


@contextlib.contextmanager
def atomic_file(path: str | os.PathLike) -> Iterator[Path]:
    """A path beside `path` to write a file to, which becomes `path` when the block ends without an error.

    Raises:
        OutputError: it could not be written; an existing file is as it was.
    """
    target = Path(os.path.realpath(path))
    if target.is_dir():
        raise OutputError(f"{target}: cannot write a file here, this is a folder.")
    with _temporary_sibling(target) as temporary:
        yield temporary
        _flush(temporary)
        os.replace(temporary, target)


def _check_target(target: Path, overwrite: bool) -> None:
    if target.exists() and not target.is_dir():
        raise OutputError(f"{target}: the output must be a folder, this is a file. Choose another path.")
    if target.is_mount():
        raise OutputError(
            f"{target}: is where a disk is mounted, which cannot be replaced. Choose a folder inside it."
        )
    if not target.is_dir() or not any(target.iterdir()):
        return
    if not overwrite:
        raise OutputError(
            f"{target}: the output folder is not empty ({_contents(target)}). Choose another folder, or "
            f"replace it and all that is in it with overwrite=True (--overwrite)."
        )
    for special, name in ((Path.cwd(), "the current folder"), (Path.home(), "the home folder")):
        if special.resolve().is_relative_to(target):
            raise OutputError(f"{target}: holds {name}, which is never replaced. Choose another folder.")


def _contents(folder: Path) -> str:
    names = sorted(entry.name for entry in folder.iterdir())
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


@contextlib.contextmanager
def _temporary_sibling(target: Path) -> Iterator[Path]:
    """A free name beside `target`, since a rename to another file system is a copy. Empty after an error."""
    temporary = _sibling(target)
    missing = [parent for parent in target.parents if not parent.exists()]
    try:
        with _readable_errors(target):
            target.parent.mkdir(parents=True, exist_ok=True)
            yield temporary
            _flush(target.parent)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        with contextlib.suppress(OSError):  # it was a folder, or was never made
            temporary.unlink()
        for parent in missing:
            with contextlib.suppress(OSError):  # somebody else has put something there
                parent.rmdir()
        raise


def _sibling(target: Path) -> Path:
    return target.with_name(f".{target.name}.{uuid.uuid4().hex[:8]}.tmp")


def _rename_folder(temporary: Path, target: Path) -> None:
    if not target.exists():
        os.rename(temporary, target)
        return
    old = _sibling(target)
    os.rename(target, old)
    try:
        os.rename(temporary, target)
    except BaseException:
        os.rename(old, target)
        raise
    shutil.rmtree(old, ignore_errors=True)


@contextlib.contextmanager
def _readable_errors(target: Path) -> Iterator[None]:
    """Turn "disk full", also of a library written in Rust, and "no permission" into OutputError."""
    try:
        yield
    except OutputError:
        raise
    except Exception as error:
        number = error.errno if isinstance(error, OSError) else None
        if number in _FULL or any(f"(os error {code})" in str(error) for code in _FULL):
            raise OutputError(
                f"{target}: no space left to write it; nothing of it was kept. Free some space, or choose a "
                f"folder on another disk."
            ) from error
        place = Path(str(getattr(error, "filename", None)))
        if number in _NOT_ALLOWED and (place.is_relative_to(target.parent) or target.is_relative_to(place)):
            raise OutputError(
                f"{target}: cannot be written ({os.strerror(number)}). Choose another path."
            ) from error
        raise


def _flush_tree(folder: Path) -> None:
    for directory, _, names in os.walk(folder):
        for name in names:
            _flush(Path(directory, name))
        _flush(Path(directory))


def _flush(path: Path) -> None:
    """Ask for `path` to be on the disk before anything that follows."""
    if os.name == "nt":  # cannot flush what it opened for reading, nor open a folder
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
