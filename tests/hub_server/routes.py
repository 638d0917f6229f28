"""Which request does what: the part of the Hub's API that its client uses for models."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote

from . import commits
from .metadata import card_data, complaints
from .repository import Conflict
from .state import Refusal, Repo

if TYPE_CHECKING:
    from .server import Request

_ID = r"(?P<id>[\w.-]+/[\w.-]+)"
_REVISION = r"(?P<revision>[^/]+)"
_NAME = re.compile(r"[\w](?:[\w.-]{0,94}[\w])?")


def answer(request: Request) -> Any:
    """Do what the first route that fits says."""
    for method, pattern, does in ROUTES:
        match = re.fullmatch(pattern, request.path)
        if match is not None and request.method in method.split():
            found = {name: unquote(value) if value is not None else "" for name, value in match.groupdict().items()}
            return does(request, **found)
    request.hub.unknown.append(f"{request.method} {request.path}")
    raise Refusal(404, "Sorry, we can't find the page you are looking for.")


def commit_of(repo: Repo, revision: str) -> str:
    """The commit that a revision names.

    Raises:
        Refusal: there is none.
    """
    commit = repo.git.find(revision)
    if commit is None:
        raise Refusal(404, f"Invalid rev id: {revision}", "RevisionNotFound")
    return commit


def _reply(body: Any, status: int = 200, **headers: str) -> Any:
    from .server import Answer

    return Answer(body, status, {name.replace("_", "-"): value for name, value in headers.items()})


def _whoami(request: Request) -> Any:
    if request.user is None:
        raise Refusal(401, "Invalid username or password.")
    name, role = request.user
    token = {"displayName": "token", "role": role}
    return _reply({"type": "user", "name": name, "orgs": [], "auth": {"type": "access_token", "accessToken": token}})


def _create(request: Request) -> Any:
    asked = request.json()
    if asked.get("type") not in (None, "model"):
        raise Refusal(400, "This Hub keeps models only")
    if request.user is None:
        raise Refusal(401, "Invalid username or password.")
    owner, name = asked.get("organization") or request.user[0], str(asked.get("name"))
    request.state.check_write(owner, request.user)
    if _NAME.fullmatch(name) is None or "--" in name or ".." in name:
        raise Refusal(400, f"Invalid repo name: {owner}/{name}")
    id = f"{owner}/{name}"
    url = f"{request.url}/{id}"
    try:
        request.state.create(id, asked.get("visibility") == "private" or asked.get("private") is True)
    except Refusal as refusal:
        refusal.body["url"] = url
        raise
    return _reply({"url": url, "name": id})


def _delete(request: Request) -> Any:
    asked = request.json()
    if request.user is None:
        raise Refusal(401, "Invalid username or password.")
    repo = request.state.repo(f"{asked.get('organization') or request.user[0]}/{asked['name']}", request.user, True)
    request.state.delete(repo.id)
    return _reply({})


def _settings(request: Request, id: str) -> Any:
    repo, asked = request.state.repo(id, request.user, write=True), request.json()
    repo.gated = bool(asked.get("gated", repo.gated))
    repo.private = asked.get("private", asked.get("visibility", "private" if repo.private else "") == "private")
    return _reply({"private": repo.private, "gated": repo.gated})


def _info(request: Request, id: str, revision: str = "main") -> Any:
    repo = request.state.repo(id, request.user)
    commit = commit_of(repo, revision)
    entries = repo.git.entries(commit)
    siblings: list[dict[str, Any]] = [{"rfilename": path} for path in entries]
    if request.query.get("blobs"):
        for sibling, entry in zip(siblings, entries.values(), strict=True):
            sibling |= {"size": entry.size, "blobId": entry.blob}
            if entry.lfs is not None:
                sibling["lfs"] = {"sha256": entry.lfs[0], "size": entry.lfs[1], "pointerSize": 130}
    card = repo.git.read(entries["README.md"].blob).decode() if "README.md" in entries else ""
    data = card_data(card)
    return _reply(
        {
            "_id": repo.id, "id": repo.id, "modelId": repo.id, "author": repo.owner, "sha": commit,
            "private": repo.private, "gated": "auto" if repo.gated else False, "disabled": False, "downloads": 0,
            "likes": 0, "tags": data.get("tags", []), "cardData": data, "siblings": siblings,
        },
        X_Repo_Commit=commit,
    )  # fmt: skip


def _listed(entry: Any) -> dict[str, Any]:
    found = {"type": "file", "path": entry.path, "size": entry.size, "oid": entry.blob}
    if entry.lfs is not None:
        found["lfs"] = {"oid": entry.lfs[0], "size": entry.lfs[1], "pointerSize": 130}
    return found


def _tree(request: Request, id: str, revision: str, path: str = "") -> Any:
    repo = request.state.repo(id, request.user, files=True)
    commit = commit_of(repo, revision)
    inside = f"{path.strip('/')}/" if path.strip("/") else ""
    entries = [entry for name, entry in repo.git.entries(commit).items() if name.startswith(inside)]
    if inside and not entries:
        raise Refusal(404, f"{path} does not exist on {revision}", "EntryNotFound")
    if request.query.get("recursive") in ("True", "true", "1"):
        return _reply([_listed(entry) for entry in entries], X_Repo_Commit=commit)
    here = [_listed(entry) for entry in entries if "/" not in entry.path[len(inside) :]]
    folders = {inside + entry.path[len(inside) :].partition("/")[0] for entry in entries} - {e["path"] for e in here}
    here += [{"type": "directory", "path": folder, "size": 0, "oid": "0" * 40} for folder in sorted(folders)]
    return _reply(here, X_Repo_Commit=commit)


def _paths_info(request: Request, id: str, revision: str) -> Any:
    from urllib.parse import parse_qs

    repo = request.state.repo(id, request.user, files=True)
    entries = repo.git.entries(commit_of(repo, revision))
    paths = parse_qs(request.body().decode()).get("paths", [])
    return _reply([_listed(entries[path]) for path in paths if path in entries])


def _refs(request: Request, id: str) -> Any:
    refs = request.state.repo(id, request.user).git.refs()
    parts: dict[str, list[dict[str, str]]] = {"branches": [], "tags": [], "converts": [], "pullRequests": []}
    kinds = {"heads": "branches", "tags": "tags", "pr": "pullRequests"}
    for ref, commit in refs.items():
        _, kind, name = ref.split("/", 2)
        parts[kinds[kind]].append({"name": name, "ref": ref, "targetCommit": commit})
    return _reply(parts)


def _commits(request: Request, id: str, revision: str) -> Any:
    repo = request.state.repo(id, request.user)
    return _reply(
        [
            {"id": commit, "title": title, "message": "", "authors": [], "date": "2026-01-01T00:00:00.000Z"}
            for commit, title in repo.git.history(commit_of(repo, revision))
        ]
    )


def _branch(request: Request, id: str, revision: str) -> Any:
    repo = request.state.repo(id, request.user, write=True)
    if request.method == "DELETE":
        commit_of(repo, revision)
        repo.git.delete(f"refs/heads/{revision}")
        return _reply({})
    start = request.json().get("startingPoint", "main")
    if f"refs/heads/{revision}" in repo.git.refs():
        raise Refusal(409, f"Reference already exists: {revision}")
    try:
        repo.git.move(f"refs/heads/{revision}", commit_of(repo, start), None)
    except Conflict as problem:
        raise Refusal(400, f"Invalid branch name: {revision}") from problem
    return _reply({})


def _validate(request: Request) -> Any:
    errors, warnings = complaints(str(request.json().get("content", "")))
    body = {"errors": [{"message": each} for each in errors], "warnings": [{"message": each} for each in warnings]}
    return _reply(body, 400 if errors else 200)


def _resolve(request: Request, id: str, revision: str, path: str) -> Any:
    repo = request.state.repo(id, request.user, files=True)
    commit = commit_of(repo, revision)
    entry = repo.git.entries(commit).get(path)
    if entry is None:
        refusal = _reply({"error": "Entry not found"}, 404, X_Error_Code="EntryNotFound", X_Repo_Commit=commit)
        refusal.headers["X-Error-Message"] = "Entry not found"
        return refusal
    if entry.lfs is None:
        return _part(request, repo.git.read(entry.blob), ETag=f'"{entry.blob}"', X_Repo_Commit=commit)
    # A large file is kept elsewhere; the address tells who may read it, for no token goes there.
    oid, size = entry.lfs
    location = f"{request.hub.storage}/{oid}?signature={request.state.sign('get', oid)}"
    return _reply(
        b"", 302, Location=location, X_Repo_Commit=commit, X_Linked_ETag=f'"{oid}"', X_Linked_Size=str(size),
        ETag=f'"{entry.blob}"',
    )  # fmt: skip


def _stored(request: Request, oid: str) -> Any:
    request.state.check_signature(request.query.get("signature"), "get", oid)
    return _part(request, request.state.object_path(oid).read_bytes(), ETag=f'"{oid}"')


def _part(request: Request, content: bytes, **headers: str) -> Any:
    """All of a file, or the range that was asked for."""
    headers["Accept_Ranges"] = "bytes"
    match = re.fullmatch(r"bytes=(\d*)-(\d*)", request.headers.get("Range", ""))
    if match is None or not content:
        return _reply(content, **headers)
    if match[1]:
        first, last = int(match[1]), min(int(match[2] or len(content)), len(content) - 1)
    else:
        first, last = max(0, len(content) - int(match[2] or 0)), len(content) - 1
    if first > last:
        return _reply(b"", 416, Content_Range=f"bytes */{len(content)}")
    headers["Content_Range"] = f"bytes {first}-{last}/{len(content)}"
    return _reply(content[first : last + 1], 206, **headers)


ROUTES: tuple[tuple[str, str, Callable[..., Any]], ...] = (
    ("GET", "/api/whoami-v2", _whoami),
    ("POST", "/api/repos/create", _create),
    ("DELETE", "/api/repos/delete", _delete),
    ("POST", "/api/validate-yaml", _validate),
    ("PUT", f"/api/models/{_ID}/settings", _settings),
    ("GET", f"/api/models/{_ID}", _info),
    ("GET", f"/api/models/{_ID}/revision/{_REVISION}", _info),
    ("GET", f"/api/models/{_ID}/tree/{_REVISION}(?:/(?P<path>.*))?", _tree),
    ("POST", f"/api/models/{_ID}/paths-info/{_REVISION}", _paths_info),
    ("GET", f"/api/models/{_ID}/refs", _refs),
    ("GET", f"/api/models/{_ID}/commits/{_REVISION}", _commits),
    ("POST DELETE", f"/api/models/{_ID}/branch/{_REVISION}", _branch),
    ("POST", f"/api/models/{_ID}/preupload/{_REVISION}", commits.preupload),
    ("POST", f"/{_ID}\\.git/info/lfs/objects/batch", commits.batch),
    ("PUT", "/storage/(?P<oid>[0-9a-f]{64})", commits.store),
    ("POST", f"/api/models/{_ID}/commit/{_REVISION}", commits.commit),
    ("GET HEAD", "/storage/(?P<oid>[0-9a-f]{64})", _stored),
    ("GET HEAD", f"/{_ID}/resolve/{_REVISION}/(?P<path>.+)", _resolve),
)
