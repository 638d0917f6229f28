"""Outputs appear whole or not at all, also when the disk is full, and say what is wrong when they cannot."""

from __future__ import annotations

import errno
import os
import re
import resource
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from hf_adaptive_sparse.errors import OutputError
from hf_adaptive_sparse.hf import files
from hf_adaptive_sparse.hf.files import atomic_folder, atomic_write


def fill(folder: Path, content: str = "new") -> None:
    (folder / "a.txt").write_text(content)
    (folder / "deep").mkdir()
    (folder / "deep" / "b.bin").write_bytes(content.encode() * 1000)


def exactly(text: str) -> str:
    return f"^{re.escape(text)}$"


def full_disk_message(target: Path) -> str:
    return (
        f"{target}: no space left to write it; nothing of it was kept. Free some space, or choose a folder on another "
        f"disk."
    )


def test_the_folder_appears_with_all_that_was_written_and_nothing_else_remains(tmp_path):
    with atomic_folder(tmp_path / "out") as temporary:
        fill(temporary)
        assert not (tmp_path / "out").exists()
        assert temporary.parent == tmp_path
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["a.txt", "b.bin", "deep", "out"]


def test_missing_parents_are_made(tmp_path):
    with atomic_folder(tmp_path / "x" / "y" / "out") as temporary:
        fill(temporary)
    assert (tmp_path / "x" / "y" / "out" / "a.txt").read_text() == "new"


def test_an_empty_folder_is_taken(tmp_path):
    (tmp_path / "out").mkdir()
    with atomic_folder(tmp_path / "out") as temporary:
        fill(temporary)
    assert (tmp_path / "out" / "a.txt").read_text() == "new"


@pytest.mark.parametrize("error", [ValueError("mine"), KeyboardInterrupt(), SystemExit(3)])
def test_after_an_error_nothing_remains_and_the_error_is_the_same(tmp_path, error):
    with pytest.raises(type(error)) as caught, atomic_folder(tmp_path / "x" / "out") as temporary:
        fill(temporary)
        raise error
    assert caught.value is error
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("error", [ValueError("mine"), OSError(errno.ENOSPC, "No space left on device")])
def test_after_an_error_the_old_folder_is_as_it_was(tmp_path, error):
    fill_once(tmp_path / "out", "old")
    with pytest.raises((ValueError, OutputError)), atomic_folder(tmp_path / "out", overwrite=True) as temporary:
        fill(temporary)
        raise error
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert (tmp_path / "out" / "a.txt").read_text() == "old"


def fill_once(folder: Path, content: str) -> None:
    folder.mkdir()
    fill(folder, content)


def test_a_folder_that_is_not_empty_is_refused(tmp_path):
    fill_once(tmp_path / "out", "old")
    for number in range(3):
        (tmp_path / "out" / f"c{number}").touch()
    with pytest.raises(OutputError) as error, atomic_folder(tmp_path / "out"):
        raise AssertionError("the block must not run")
    assert str(error.value) == (
        f"{tmp_path / 'out'}: the output folder is not empty (a.txt, c0, c1 and 2 more). Choose another folder, or "
        f"replace it and all that is in it with overwrite=True (--overwrite)."
    )
    assert (tmp_path / "out" / "a.txt").read_text() == "old"


def test_overwrite_replaces_everything_that_was_there(tmp_path):
    fill_once(tmp_path / "out", "old")
    (tmp_path / "out" / "left_over.bin").touch()
    with atomic_folder(tmp_path / "out", overwrite=True) as temporary:
        fill(temporary)
        assert (tmp_path / "out" / "a.txt").read_text() == "old"
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["a.txt", "b.bin", "deep", "out"]
    assert (tmp_path / "out" / "a.txt").read_text() == "new"


def test_when_the_last_rename_fails_the_old_folder_comes_back(tmp_path, monkeypatch):
    fill_once(tmp_path / "out", "old")
    rename = os.rename

    def fail_second(source, target):
        if ".tmp" in str(source) and Path(target).name == "out" and not hasattr(fail_second, "done"):
            fail_second.done = True
            raise OSError(errno.EIO, "Input/output error")
        rename(source, target)

    monkeypatch.setattr(os, "rename", fail_second)
    with pytest.raises(OSError, match="Input/output error"), atomic_folder(tmp_path / "out", overwrite=True) as new:
        fill(new)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert (tmp_path / "out" / "a.txt").read_text() == "old"


def test_a_file_in_its_place_is_refused(tmp_path):
    (tmp_path / "out").write_text("mine")
    with pytest.raises(OutputError) as error, atomic_folder(tmp_path / "out", overwrite=True):
        pass
    assert str(error.value) == f"{tmp_path / 'out'}: the output must be a folder, this is a file. Choose another path."


def test_a_file_among_its_parents_is_refused(tmp_path):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(OutputError) as error, atomic_folder(tmp_path / "file" / "out"):
        pass
    reason = f"cannot be written ({os.strerror(errno.EEXIST)})"
    assert str(error.value) == f"{tmp_path / 'file' / 'out'}: {reason}. Choose another path."
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.parametrize("special, name", [("cwd", "the current folder"), ("home", "the home folder")])
def test_folders_that_hold_the_current_or_the_home_folder_are_never_replaced(tmp_path, monkeypatch, special, name):
    inside = tmp_path / "precious" / "inside"
    inside.mkdir(parents=True)
    monkeypatch.setattr(Path, special, classmethod(lambda cls: inside))
    for target in (inside.parent, inside):
        (target / "file").touch()
        with pytest.raises(OutputError) as error, atomic_folder(target, overwrite=True):
            pass
        assert str(error.value) == f"{target}: holds {name}, which is never replaced. Choose another folder."


def test_the_root_of_a_disk_is_refused():
    with pytest.raises(OutputError) as error, atomic_folder("/", overwrite=True):
        pass
    assert str(error.value) == "/: is where a disk is mounted, which cannot be replaced. Choose a folder inside it."


def test_a_link_to_a_folder_stays_a_link(tmp_path):
    (tmp_path / "disk").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "disk")
    with atomic_folder(tmp_path / "link") as temporary:
        fill(temporary)
    assert (tmp_path / "link").is_symlink() and (tmp_path / "disk" / "a.txt").read_text() == "new"


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG])
def test_a_full_disk_is_said_and_leaves_nothing(tmp_path, number):
    with pytest.raises(OutputError) as error, atomic_folder(tmp_path / "out") as temporary:
        fill(temporary)
        raise OSError(number, os.strerror(number), str(temporary / "a.txt"))
    assert str(error.value) == full_disk_message(tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_is_recognised_when_a_rust_library_meets_it(tmp_path):
    with pytest.raises(OutputError, match=exactly(full_disk_message(tmp_path / "out"))):
        with atomic_folder(tmp_path / "out"):
            raise Exception("Error while serializing: I/O error: No space left on device (os error 28)")
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_at_the_last_flush_is_said_too(tmp_path, monkeypatch):
    def fail(descriptor):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OutputError, match=exactly(full_disk_message(tmp_path / "out"))):
        with atomic_folder(tmp_path / "out") as temporary:
            fill(temporary)
    with pytest.raises(OutputError, match=exactly(full_disk_message(tmp_path / "file"))):
        atomic_write(tmp_path / "file", "text")
    assert list(tmp_path.iterdir()) == []


def test_an_error_of_reading_something_else_keeps_its_own_words(tmp_path):
    elsewhere = tmp_path / "elsewhere"
    (tmp_path / "in").mkdir()
    with pytest.raises(PermissionError, match="not yours"), atomic_folder(tmp_path / "in" / "out"):
        raise PermissionError(errno.EACCES, "not yours", str(elsewhere))


def test_no_permission_is_said(tmp_path):
    with pytest.raises(OutputError) as error, atomic_folder(tmp_path / "out") as temporary:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(temporary / "a"))
    assert str(error.value) == f"{tmp_path / 'out'}: cannot be written (Permission denied). Choose another path."


def in_a_limited_child(work: Callable[[], object], longest_file: int) -> tuple[int, str]:
    """Run `work` in a copy of this process that cannot write longer files.

    Returns:
        Its exit status as `os.wait` gives it, and the OutputError that it met, or whatever else happened.
    """
    receive, send = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            resource.setrlimit(resource.RLIMIT_FSIZE, (longest_file, resource.RLIM_INFINITY))
            work()
            message = "no error"
        except OutputError as error:
            message = str(error)
        except BaseException as error:
            message = f"unexpected {error!r}"
        os.write(send, message.encode())
        os._exit(0)
    os.close(send)
    with os.fdopen(receive, "rb") as pipe:
        message = pipe.read().decode()
    return os.waitpid(child, 0)[1], message


def write_a_large_folder(target: Path) -> None:
    with atomic_folder(target) as temporary:
        (temporary / "a").write_bytes(bytes(100_000))


def test_a_real_limit_on_the_size_of_files_is_met_with_the_same_message(tmp_path):
    for work in (write_a_large_folder, lambda target: atomic_write(target, "x" * 100_000)):
        found = in_a_limited_child(lambda work=work: work(tmp_path / "x" / "out"), 50_000)
        assert found == (0, full_disk_message(tmp_path / "x" / "out"))
        assert list(tmp_path.iterdir()) == []
    write_a_large_folder(tmp_path / "out")  # the limit was the child's alone


def test_the_file_has_the_text_and_nothing_else_remains(tmp_path):
    atomic_write(tmp_path / "new" / "report.json", "größer\n")
    assert (tmp_path / "new" / "report.json").read_bytes() == "größer\n".encode()
    atomic_write(tmp_path / "new" / "report.json", "2")
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["report.json"]
    assert (tmp_path / "new" / "report.json").read_text() == "2"


def test_a_file_that_cannot_be_written_leaves_the_old_one(tmp_path, monkeypatch):
    atomic_write(tmp_path / "a", "old")
    monkeypatch.setattr(os, "replace", raise_full)
    with pytest.raises(OutputError, match=exactly(full_disk_message(tmp_path / "a"))):
        atomic_write(tmp_path / "a", "new")
    assert [path.name for path in tmp_path.iterdir()] == ["a"] and (tmp_path / "a").read_text() == "old"


def raise_full(*arguments):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_a_file_is_not_written_over_a_folder(tmp_path):
    with pytest.raises(OutputError) as error:
        atomic_write(tmp_path, "text")
    assert str(error.value) == f"{tmp_path}: cannot write a file here, this is a folder."


def test_a_killed_process_leaves_no_part_of_the_folder(tmp_path):
    def be_killed_half_way():
        with atomic_folder(tmp_path / "out") as temporary:
            (temporary / "a").write_text("half")
            os.kill(os.getpid(), signal.SIGKILL)

    status, _ = in_a_limited_child(be_killed_half_way, 50_000)
    assert os.WTERMSIG(status) == signal.SIGKILL
    [left] = tmp_path.iterdir()
    assert re.fullmatch(r"\.out\.[0-9a-f]{8}\.tmp", left.name)
    with atomic_folder(tmp_path / "out") as temporary:
        fill(temporary)
    assert (tmp_path / "out" / "a.txt").read_text() == "new"


def test_everything_written_is_flushed_before_it_gets_its_name(tmp_path, monkeypatch):
    order = []
    flush, rename = files._flush, os.rename
    monkeypatch.setattr(files, "_flush", lambda path: (order.append(Path(path).name), flush(path)))
    monkeypatch.setattr(os, "rename", lambda a, b: (order.append("rename"), rename(a, b)))
    with atomic_folder(tmp_path / "out") as temporary:
        fill(temporary)
        torch.save(torch.zeros(2), temporary / "t.pt")
    before = order[: order.index("rename")]
    assert {"a.txt", "b.bin", "t.pt", "deep"} <= set(before)
    assert order[-1] == tmp_path.name
