"""What a Hub knows: users and their tokens, repositories and who sees them, contents of large files."""

from __future__ import annotations

import hashlib
import hmac
import os
import secrets
import shutil
import threading
import uuid
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from .repository import Repository


class Refusal(Exception):
    """An answer that is an error.

    Args:
        code: for X-Error-Code, by which the client tells its exceptions apart.
    """

    def __init__(self, status: int, message: str, code: str | None = None, **body: object) -> None:
        super().__init__(message)
        self.status, self.message, self.code, self.body = status, message, code, body


@dataclass
class Repo:
    """A repository and its settings."""

    id: str
    git: Repository
    private: bool = False
    gated: bool = False
    lock: threading.RLock = field(default_factory=threading.RLock)
    pull_requests: int = 0

    @property
    def owner(self) -> str:
        return self.id.partition("/")[0]


@dataclass
class State:
    """All of it, below `folder`.

    Args:
        tokens: secret -> (user, role), role one of "read" and "write".
        free_bytes: what all large files together may still take; None: as much as the disk has.
    """

    folder: Path
    tokens: Mapping[str, tuple[str, str]]
    free_bytes: int | None = None
    repos: dict[str, Repo] = field(default_factory=dict)
    lock: threading.RLock = field(default_factory=threading.RLock)
    key: bytes = field(default_factory=lambda: secrets.token_bytes(32))

    def user_of(self, authorization: str | None) -> tuple[str, str] | None:
        """(user, role) of a request; None without a token. A wrong one is refused wherever it is shown."""
        if authorization is None:
            return None
        kind, _, secret = authorization.partition(" ")
        if kind != "Bearer" or secret not in self.tokens:
            raise Refusal(401, "Invalid credentials in Authorization header")
        return self.tokens[secret]

    def repo(self, id: str, user: tuple[str, str] | None, write: bool = False, files: bool = False) -> Repo:
        """A repository that this user may see; one that may not be seen is not there.

        Args:
            files: its files are asked for, which a gated one shows to its owner alone.
        """
        repo = self.repos.get(id)
        if repo is None or (repo.private and (user is None or user[0] != repo.owner)):
            if user is None:
                raise Refusal(401, "Invalid username or password.", "RepoNotFound")
            raise Refusal(404, "Repository not found", "RepoNotFound")
        if files and repo.gated and (user is None or user[0] != repo.owner):
            raise Refusal(401 if user is None else 403, f"Access to model {id} is restricted.", "GatedRepo")
        if write:
            self.check_write(repo.owner, user)
        return repo

    def check_write(self, owner: str, user: tuple[str, str] | None, proposes: bool = False) -> None:
        """Whether a user may write to what belongs to `owner`; everybody may propose a change."""
        if user is None:
            raise Refusal(401, "Invalid username or password.")
        if user[1] != "write":
            raise Refusal(403, "Forbidden: this token has the role read, and role write is needed")
        if user[0] != owner and not proposes:
            raise Refusal(403, f"Forbidden: you don't have the rights to write in the namespace {owner!r}")

    def create(self, id: str, private: bool) -> Repo:
        """A new repository with a first commit."""
        with self.lock:
            if id in self.repos:
                raise Refusal(409, "You already created this model repo")
            self.repos[id] = Repo(id, Repository(self.folder / "repos" / f"{id}.git"), private)
            return self.repos[id]

    def delete(self, id: str) -> None:
        """Remove a repository and all of its commits."""
        with self.lock:
            shutil.rmtree(self.repos.pop(id).git.folder)

    # -- contents of large files, by their sha256 ---------------------------------------------------------------

    def object_path(self, oid: str) -> Path:
        return self.folder / "lfs" / oid

    def receive(self, oid: str, size: int, chunks) -> None:
        """Store a large file, if it is what it was said to be.

        Raises:
            Refusal: it is not, or the disk is full. Nothing is kept of it then.
        """
        temporary = self.folder / "lfs" / f".{uuid.uuid4().hex}"
        temporary.parent.mkdir(parents=True, exist_ok=True)
        digest, found = hashlib.sha256(), 0
        try:
            with open(temporary, "wb") as file:
                for chunk in chunks:
                    found += len(chunk)
                    if self.free_bytes is not None and found > self.free_bytes:
                        raise Refusal(507, "No space left on the server")
                    digest.update(chunk)
                    file.write(chunk)
            if found != size:
                raise Refusal(400, f"The upload has {found} bytes, and {size} were announced")
            if digest.hexdigest() != oid:
                raise Refusal(400, f"The upload has the sha256 {digest.hexdigest()}, and {oid} was announced")
            with self.lock:
                os.replace(temporary, self.object_path(oid))
                if self.free_bytes is not None:
                    self.free_bytes -= size
        finally:
            temporary.unlink(missing_ok=True)

    # -- addresses that carry their permission, since the client sends no token to the store of large files ------

    def sign(self, *parts: object) -> str:
        return hmac.new(self.key, "\n".join(map(str, parts)).encode(), hashlib.sha256).hexdigest()

    def check_signature(self, found: str | None, *parts: object) -> None:
        if not hmac.compare_digest(found or "", self.sign(*parts)):
            raise Refusal(403, "The signature of this address is wrong")
