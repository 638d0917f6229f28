"""How files get in: what becomes of each (preupload), large ones (LFS), and the commit that makes them visible."""

from __future__ import annotations

import base64
import binascii
import json
import re
from pathlib import PurePosixPath
from typing import TYPE_CHECKING, Any

from .metadata import complaints, wrong_eval_results
from .repository import Conflict, pointer
from .state import Refusal, Repo

if TYPE_CHECKING:
    from .server import Request

LARGE = 10 * 2**20
_ENDS = (".safetensors", ".bin", ".gguf", ".pt")
_TRIES = 5


def preupload(request: Request, id: str, revision: str) -> Any:
    """For each file: whether git takes it or the store of large files, and what is there under its name."""
    repo = request.state.repo(id, request.user)
    _check_write(request, repo)
    commit = _start(repo, revision)
    entries = repo.git.entries(commit)
    found = []
    for file in request.json()["files"]:
        path, sample = _path(file["path"]), base64.b64decode(file["sample"])
        large = _is_large(path, sample, file["size"])
        answer = {"path": path, "uploadMode": "lfs" if large else "regular", "shouldIgnore": False}
        if path in entries:
            lfs = entries[path].lfs
            answer["oid"] = entries[path].blob if lfs is None else lfs[0]
        found.append(answer)
    return _reply({"files": found, "commitOid": commit})


def batch(request: Request, id: str) -> Any:
    """Where to put the large files that are not known yet."""
    repo = request.state.repo(id, request.user)
    request.state.check_write(repo.owner, request.user, proposes=True)
    asked = request.json()
    if asked.get("operation") != "upload" or asked.get("hash_algo") != "sha256":
        raise Refusal(400, "Only uploads with sha256 are understood")
    objects = []
    for each in asked["objects"]:
        oid, size = each["oid"], each["size"]
        if re.fullmatch("[0-9a-f]{64}", oid) is None:
            raise Refusal(400, f"Not a sha256: {oid}")
        answer: dict[str, Any] = {"oid": oid, "size": size}
        if not request.state.object_path(oid).is_file():
            signature = request.state.sign("put", oid, size)
            href = f"{request.hub.storage}/{oid}?size={size}&signature={signature}"
            answer["actions"] = {"upload": {"href": href, "header": {}}}
        objects.append(answer)
    return _reply({"transfer": "basic", "objects": objects})


def store(request: Request, oid: str) -> Any:
    """Take a large file; the address was given out by `batch`."""
    size = int(request.query.get("size", -1))
    request.state.check_signature(request.query.get("signature"), "put", oid, size)
    request.state.receive(oid, size, request.chunks())
    return _reply({})


def commit(request: Request, id: str, revision: str) -> Any:
    """All files at once on top of a branch, or of a new pull request; or none of them."""
    repo = request.state.repo(id, request.user)
    proposes = request.query.get("create_pr") == "1"
    _check_write(request, repo)
    header, files, deleted = _read(request, repo, _start(repo, revision))
    with repo.lock:
        for attempt in range(_TRIES):
            parent = _start(repo, revision)
            expected = header.get("parentCommit")
            if expected is not None and expected != parent:
                raise Refusal(412, "A commit has happened since. Please refresh and try again.")
            reference = f"refs/heads/{revision}"
            if proposes:
                repo.pull_requests += 1
                reference = f"refs/pr/{repo.pull_requests}"
            elif revision.startswith("refs/pr/"):
                reference = revision
            elif reference not in repo.git.refs():
                raise Refusal(400, "A commit goes on top of a branch")
            try:
                message = "\n\n".join(text for text in (header["summary"], header.get("description")) if text)
                made = repo.git.commit(reference, parent, message, files, tuple(deleted))
                break
            except Conflict:
                if attempt + 1 == _TRIES:
                    raise Refusal(409, "Too many commits at the same time") from None
    answer = {"success": True, "commitOid": made, "commitUrl": f"{request.url}/{repo.id}/commit/{made}"}
    if proposes:
        answer["pullRequestUrl"] = f"{request.url}/{repo.id}/discussions/{repo.pull_requests}"
    return _reply(answer)


def _check_write(request: Request, repo: Repo) -> None:
    request.state.check_write(repo.owner, request.user, proposes=request.query.get("create_pr") == "1")


def _start(repo: Repo, revision: str) -> str:
    found = repo.git.find(revision)
    if found is None:
        raise Refusal(404, f"Invalid rev id: {revision}", "RevisionNotFound")
    return found


def _is_large(path: str, sample: bytes, size: int) -> bool:
    return path.endswith(_ENDS) or size > LARGE or b"\0" in sample


def _path(path: str) -> str:
    parts = PurePosixPath(path).parts
    if not parts or path.startswith("/") or ".." in parts or ".git" in parts or path != "/".join(parts):
        raise Refusal(400, f"Invalid path: {path!r}")
    return path


def _read(request: Request, repo: Repo, parent: str) -> tuple[dict[str, Any], dict[str, bytes], list[str]]:
    """The lines of a commit: its header, files by path (large ones as pointers), deleted paths."""
    header: dict[str, Any] = {}
    files: dict[str, bytes] = {}
    deleted: list[str] = []
    entries = repo.git.entries(parent)
    for number, line in enumerate(request.body().splitlines()):
        try:
            item = json.loads(line)
            key, value = item["key"], item["value"]
        except (ValueError, KeyError, TypeError) as problem:
            raise Refusal(400, f"Line {number + 1} of the commit cannot be read: {problem!r}") from problem
        if (key == "header") != (number == 0):
            raise Refusal(400, "The first line of a commit is its header, and no other")
        if key == "header":
            header = value
            if not header.get("summary"):
                raise Refusal(400, "A commit needs a summary")
        elif key == "file":
            files[_path(value["path"])] = _regular(value)
        elif key == "lfsFile":
            files[_path(value["path"])] = _large(request, value)
        elif key in ("deletedFile", "deletedFolder"):
            path = _path(value["path"].rstrip("/"))
            gone = [name for name in entries if name == path or name.startswith(f"{path}/")]
            if not gone or (key == "deletedFile" and gone != [path]):
                raise Refusal(404, f"A file with this name doesn't exist: {path}", "EntryNotFound")
            deleted += gone
        else:
            raise Refusal(400, f"Unknown operation {key!r}")
    return header, files, deleted


def _regular(value: dict[str, Any]) -> bytes:
    path = value["path"]
    try:
        content = base64.b64decode(value["content"], validate=True)
    except binascii.Error as problem:
        raise Refusal(400, f"{path}: not base64") from problem
    if content and _is_large(path, content[:512], len(content)):
        raise Refusal(400, f"{path}: is large or binary, and must be uploaded through LFS")
    wrong: list[str] = []
    if path == "README.md":
        wrong = complaints(content.decode())[0]
    elif path.startswith(".eval_results/"):
        wrong = wrong_eval_results(path, content.decode())
    if wrong:
        raise Refusal(400, f"Invalid metadata in {path}. {'; '.join(wrong)}")
    return content


def _large(request: Request, value: dict[str, Any]) -> bytes:
    oid, object_path = value["oid"], request.state.object_path(value["oid"])
    if value.get("algo") != "sha256" or re.fullmatch("[0-9a-f]{64}", oid) is None or not object_path.is_file():
        raise Refusal(400, f"{value['path']}: its content {oid} was not uploaded")
    size = object_path.stat().st_size
    if value.get("size", size) != size:
        raise Refusal(400, f"{value['path']}: has {size} bytes, and {value['size']} were announced")
    return pointer(oid, size)


def _reply(body: Any) -> Any:
    from .server import Answer

    return Answer(body)
