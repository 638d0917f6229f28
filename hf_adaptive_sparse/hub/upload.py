"""One repository gets one commit: all files, or none of them. What goes wrong is said in our words."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi
from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled, RepositoryNotFoundError, RevisionNotFoundError

from ..errors import ConfigError, OutputError
from .parents import is_of_the_network

MAIN = "main"
# What an earlier push may have left and a later one must not leave: a weight file of another form would be loaded, or
# refused, in place of the new ones. Everything else that is in the repository stays.
_OURS = (
    "*.safetensors", "*.safetensors.index.json", "pytorch_model*.bin", "pytorch_model*.bin.index.json", "config.json",
    "adapter_config.json", "masks.json", "report.json", "plots/*.png", ".eval_results/hf_adaptive_sparse.yaml",
)  # fmt: skip
_BUSY = (429, 500, 502, 503, 504)
_TRIES = 4
_LONGEST_WAIT = 60.0  # seconds


@dataclass(frozen=True, kw_only=True)
class PushedRepo:
    """What became of one repository.

    Args:
        repo_id: OWNER/NAME.
        kind: "packed", "dense", "adapter", "shrunk" or "masks".
        url: of the repository, or of the pull request.
        commit: hash of the commit that has the files; `from_pretrained(repo_id, revision=commit)` opens it for ever.
        revision: the branch, or "refs/pr/N" of a pull request.
        changed: False if all files were there already, and no commit was made.
    """

    repo_id: str
    kind: str
    url: str
    commit: str
    revision: str
    changed: bool


def upload(
    api: HfApi,
    repo_id: str,
    kind: str,
    files: Mapping[str, Path | bytes],
    *,
    message: str,
    private: bool | None = None,
    revision: str | None = None,
    create_pr: bool = False,
) -> PushedRepo:
    """Bring files into a repository by one commit; it is made if it is not there.

    The commit goes on top of the one that was found at the start, or is refused: nobody's change is lost. Weight files
    of an earlier push that are not among `files` are removed by the same commit.

    Args:
        files: content, or the path of it, by path in the repository.
        private: of a new repository; of one that is there, it must be so already.
        revision: branch, made from main if it is not there.
        create_pr: propose the commit as a pull request.
    Raises:
        ConfigError: the token, the name or the rights are wrong.
        OutputError: the connection or the Hub failed; the repository is as it was, or complete.
    """
    with hub_errors(api, repo_id):
        prepare_repo(api, repo_id, private, revision, create_pr)
        head, there = _content(api, repo_id, revision or MAIN)
        gone = [name for name in there if name not in files and any(fnmatch(name, pattern) for pattern in _OURS)]
        made = _commit(api, repo_id, files, gone, head, message, revision or MAIN, create_pr)
    changed = made.oid != head
    proposed = create_pr and changed
    return PushedRepo(
        repo_id=repo_id,
        kind=kind,
        url=made.pr_url if proposed and made.pr_url else f"{api.endpoint}/{repo_id}",
        commit=made.oid,
        revision=made.pr_revision if proposed and made.pr_revision else revision or MAIN,
        changed=changed,
    )


def prepare_repo(api: HfApi, repo_id: str, private: bool | None, revision: str | None, create_pr: bool) -> None:
    """Make the repository and the branch where they are not there.

    Raises:
        ConfigError: it is public and should be private, or the other way round; or there is nothing to propose to.
    """
    try:
        info = api.model_info(repo_id)
    except RevisionNotFoundError:  # there, and empty
        info = None
    except RepositoryNotFoundError as problem:
        if create_pr:
            raise ConfigError(
                f"{repo_id}: there is no such repository to propose a change to, or it is private and not yours."
            ) from problem
        api.create_repo(repo_id, private=bool(private), exist_ok=True)
        info = None
    if info is not None and private is not None and info.private is not None and info.private != private:
        is_now, asked = ("public", "private") if private else ("private", "public")
        raise ConfigError(
            f"{repo_id}: is {is_now}, and {asked} was asked for. Change it in the settings of the repository, or leave "
            "`private` out."
        )
    if revision not in (None, MAIN) and not str(revision).startswith("refs/pr/"):
        if not api.revision_exists(repo_id, str(revision)):
            api.create_branch(repo_id, branch=str(revision), exist_ok=True)


def _content(api: HfApi, repo_id: str, revision: str) -> tuple[str | None, list[str]]:
    """The commit on which a revision stands, and its files."""
    try:
        head = api.model_info(repo_id, revision=revision).sha
        return head, api.list_repo_files(repo_id, revision=head)
    except RevisionNotFoundError:
        return None, []


def _commit(
    api: HfApi,
    repo_id: str,
    files: Mapping[str, Path | bytes],
    gone: list[str],
    head: str | None,
    message: str,
    revision: str,
    create_pr: bool,
) -> Any:
    """The commit; tried again where the Hub is busy, which cannot make two, for it goes on top of `head` only."""
    for attempt in range(1, _TRIES + 1):
        operations = [
            CommitOperationAdd(name, str(file) if isinstance(file, Path) else file) for name, file in files.items()
        ]
        try:
            return api.create_commit(
                repo_id, [*operations, *(CommitOperationDelete(name) for name in gone)], commit_message=message,
                revision=revision, create_pr=create_pr, parent_commit=head,
            )  # fmt: skip
        except HfHubHTTPError as problem:
            if attempt == _TRIES or _status(problem) not in _BUSY:
                raise
            time.sleep(_wait(problem, attempt))
    raise AssertionError("the last try returns or raises")


def _wait(problem: HfHubHTTPError, attempt: int) -> float:
    asked = problem.response.headers.get("Retry-After", "")
    return min(float(asked) if asked.isdigit() else float(2**attempt), _LONGEST_WAIT)


def _status(problem: HfHubHTTPError) -> int:
    return int(getattr(problem.response, "status_code", 0) or 0)


@contextlib.contextmanager
def hub_errors(api: HfApi, repo_id: str) -> Iterator[None]:
    """Failures of the Hub or of the way to it, as errors that say what to do."""
    try:
        yield
    except (ConfigError, OutputError):
        raise
    except Exception as failure:
        said = _said(api, repo_id, failure)
        if said is None:
            raise
        raise said from failure


def _said(api: HfApi, repo_id: str, failure: Exception) -> ConfigError | OutputError | None:
    again = "The repository is as it was, or complete: the same command does what is left."
    if isinstance(failure, RuntimeError) and isinstance(failure.__cause__, Exception):
        failure = failure.__cause__  # the client wraps what happens while a large file is uploaded
    if isinstance(failure, OfflineModeIsEnabled):
        return ConfigError(f"{repo_id}: HF_HUB_OFFLINE is set, and a push needs the network. Unset it.")
    if isinstance(failure, HfHubHTTPError):
        status = _status(failure)
        reason = " ".join(str(failure.server_message or "").split())
        told = f" ({reason})" if reason else ""
        if isinstance(failure, RepositoryNotFoundError):
            return ConfigError(f"{repo_id}: no such repository, or your token may not see it. Check its name.")
        if status == 401:
            return ConfigError(
                f"{repo_id}: {api.endpoint} does not accept your token{told}. Make one with the role `write` in the "
                "settings of the Hub, then run `hf auth login`, or set HF_TOKEN."
            )
        if status == 403:
            return ConfigError(
                f"{repo_id}: your token may not write there{told}. Take a token with the role `write`, and an OWNER "
                "that is you or one of your organisations; or propose the change with create_pr (--create-pr)."
            )
        if status in (409, 412):
            return OutputError(
                f"{repo_id}: somebody else changed it in the meantime{told}. Nothing of this push is in it. Look at "
                "the change, then run the same command again."
            )
        if status == 429:
            return OutputError(f"{repo_id}: {api.endpoint} asks to slow down{told}. {again} Wait some minutes.")
        if status == 507 or "No space left" in reason:
            return OutputError(f"{repo_id}: there is no space left for it on {api.endpoint}{told}. {again}")
        if status >= 500:
            return OutputError(f"{repo_id}: {api.endpoint} failed with HTTP {status}{told}. {again}")
        return ConfigError(f"{repo_id}: {api.endpoint} refuses this with HTTP {status}{told}.")
    if is_of_the_network(failure) or isinstance(failure, ConnectionError):
        what = type(failure).__name__
        return OutputError(f"{repo_id}: the connection to {api.endpoint} failed ({what}). {again}")
    if isinstance(failure, ValueError) and "metadata in README.md" in str(failure):
        return ConfigError(f"{repo_id}: {api.endpoint} refuses the card: {' '.join(str(failure).split())}")
    return None
