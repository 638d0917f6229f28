"""One repository: a bare git repository, written by git's plumbing commands. Commits are immutable."""

from __future__ import annotations

import os
import re
import subprocess
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

ATTRIBUTES = "".join(f"*.{end} filter=lfs diff=lfs merge=lfs -text\n" for end in ("bin", "safetensors", "gguf", "pt"))
_POINTER = re.compile(
    rb"version https://git-lfs\.github\.com/spec/v1\noid sha256:(?P<oid>[0-9a-f]{64})\nsize (?P<size>\d+)\n"
)
_REVISION = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_./-]*")
_DATE = "1767225600 +0000"
_ENVIRONMENT = {
    f"GIT_{who}_{what}": value
    for who in ("AUTHOR", "COMMITTER")
    for what, value in (("NAME", "hub"), ("EMAIL", "hub@localhost"), ("DATE", _DATE))
} | {"GIT_CONFIG_NOSYSTEM": "1", "GIT_CONFIG_GLOBAL": os.devnull}


class Conflict(Exception):
    """The branch is not where the commit expects it."""


@dataclass(frozen=True)
class Entry:
    """A file of a commit. `lfs` is (sha256, size) of a large file, which git knows by a pointer."""

    path: str
    blob: str
    size: int
    lfs: tuple[str, int] | None = None


class Repository:
    """A bare git repository at `folder`, made if it is not there."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._entries: dict[str, dict[str, Entry]] = {}  # by commit, which never changes
        if not folder.is_dir():
            folder.mkdir(parents=True)
            self._git("init", "--bare", "--quiet", "--initial-branch=main", "--template=")
            self.commit("refs/heads/main", None, "initial commit", {".gitattributes": ATTRIBUTES.encode()}, ())

    def find(self, revision: str) -> str | None:
        """The commit that a branch, a pull request ("refs/pr/1") or a hash names."""
        if not _REVISION.fullmatch(revision) or ".." in revision:
            return None
        names = [f"refs/heads/{revision}", f"refs/tags/{revision}"]
        if revision.startswith("refs/"):
            names = [revision]
        elif re.fullmatch("[0-9a-f]{40}", revision):
            names = [revision]
        for name in names:
            found = self._git("rev-parse", "--verify", "--quiet", f"{name}^{{commit}}", check=False)
            if found:
                return found.decode().strip()
        return None

    def entries(self, commit: str) -> dict[str, Entry]:
        """Every file of a commit by its path."""
        if commit in self._entries:
            return self._entries[commit]
        found = {}
        for line in self._git("ls-tree", "-r", "-z", "--long", commit).split(b"\0")[:-1]:
            about, _, path = line.partition(b"\t")
            _, _, blob, size = about.split()
            entry = Entry(path.decode(), blob.decode(), int(size))
            if 100 < entry.size < 200:
                pointer = _POINTER.fullmatch(self.read(entry.blob))
                if pointer is not None:
                    lfs = pointer["oid"].decode(), int(pointer["size"])
                    entry = Entry(entry.path, entry.blob, lfs[1], lfs)
            found[entry.path] = entry
        self._entries[commit] = found
        return found

    def read(self, blob: str) -> bytes:
        """The content of a blob."""
        return self._git("cat-file", "blob", blob)

    def refs(self) -> dict[str, str]:
        """Every reference and its commit."""
        lines = self._git("for-each-ref", "--format=%(objectname) %(refname)").decode().splitlines()
        return {name: commit for commit, _, name in (line.partition(" ") for line in lines)}

    def history(self, commit: str) -> list[tuple[str, str]]:
        """(hash, title) of a commit and those before it, the newest first."""
        lines = self._git("log", "--format=%H %s", commit).decode().splitlines()
        return [(line[:40], line[41:]) for line in lines]

    def commit(
        self, reference: str, parent: str | None, message: str, files: Mapping[str, bytes], deleted: tuple[str, ...]
    ) -> str:
        """Put files on top of a commit, and move a reference from it to the result in one step.

        Args:
            reference: "refs/heads/main"; must be at `parent` when the commit is complete, or must not be there if it
                is a new one.
        Raises:
            Conflict: it is somewhere else.
        """
        new = self._write(parent, message, files, deleted)
        # A new reference must not be there: git's word for that is the hash of zeros.
        before = self._git("rev-parse", "--verify", "--quiet", reference, check=False).decode().strip()
        expected = parent if before else "0" * 40
        self.move(reference, new, expected)
        return new

    def move(self, reference: str, commit: str, expected: str | None) -> None:
        """Set a reference; `expected` is where it must be before."""
        done = subprocess.run(
            ["git", "update-ref", reference, commit, expected or "0" * 40],
            cwd=self.folder, capture_output=True, env=os.environ | _ENVIRONMENT,
        )  # fmt: skip
        if done.returncode != 0:
            raise Conflict(reference)

    def delete(self, reference: str) -> None:
        """Remove a reference."""
        self._git("update-ref", "-d", reference)

    def is_sound(self) -> bool:
        """Whether git finds every object whole and every link leading somewhere."""
        return b"" == self._git("fsck", "--full", "--strict", "--no-dangling", "--no-progress")

    def _write(
        self, parent: str | None, message: str, files: Mapping[str, bytes], deleted: tuple[str, ...]
    ) -> str:
        with tempfile.TemporaryDirectory(dir=self.folder) as temporary:
            index = {"GIT_INDEX_FILE": str(Path(temporary) / "index")}
            if parent is not None:
                self._git("read-tree", parent, environment=index)
            lines = [f"0 {'0' * 40}\t{path}" for path in deleted]
            for path, content in files.items():
                blob = self._git("hash-object", "-w", "--stdin", content=content).decode().strip()
                lines.append(f"100644 {blob}\t{path}")
            text = "".join(f"{line}\0" for line in lines).encode()
            self._git("update-index", "-z", "--add", "--index-info", content=text, environment=index)
            tree = self._git("write-tree", environment=index).decode().strip()
        parents = [] if parent is None else ["-p", parent]
        return self._git("commit-tree", tree, *parents, content=message.encode()).decode().strip()

    def _git(
        self, *arguments: str, content: bytes = b"", environment: Mapping[str, str] | None = None, check: bool = True
    ) -> bytes:
        done = subprocess.run(
            ["git", *arguments], cwd=self.folder, input=content, capture_output=True,
            env=os.environ | _ENVIRONMENT | (environment or {}),
        )  # fmt: skip
        if check and done.returncode != 0:
            raise RuntimeError(f"git {' '.join(arguments)}: {done.stderr.decode()}")
        return done.stdout if done.returncode == 0 else b""


def pointer(oid: str, size: int) -> bytes:
    """What git holds instead of a large file."""
    return f"version https://git-lfs.github.com/spec/v1\noid sha256:{oid}\nsize {size}\n".encode()
