"""A push that goes wrong leaves the old revision or the new one, a rerun does what is left, and no token leaks."""

from __future__ import annotations

import errno
import logging
import os
import tempfile
from pathlib import Path

import pytest
from huggingface_hub import CommitOperationAdd, HfApi

from hf_adaptive_sparse import ConfigError, OutputError, push_to_hub, save_packed
from hf_adaptive_sparse.hub import upload
from tests.hf.two_four_models import two_four_model

STORAGE, COMMIT = "PUT /storage/", "POST .*/commit/main"
# Every kind of request that a push makes to a repository that is there.
REQUESTS = ("GET /api/models/[^?]*$", "/validate-yaml", "/preupload/", "objects/batch", STORAGE, COMMIT, "/tree/")


@pytest.fixture(autouse=True)
def no_token_leaks(place, tmp_path, caplog, capfd):
    """After every test: no secret in anything that was printed, logged or written, on either side."""
    caplog.set_level(logging.DEBUG)
    yield
    printed = capfd.readouterr()
    secrets = [place.server.token(user) for user in ("alice", "bob", "carol")]
    written = {str(path): path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    written |= {"stdout": printed.out.encode(), "stderr": printed.err.encode(), "log": caplog.text.encode()}
    assert [name for name, content in written.items() if any(secret.encode() in content for secret in secrets)] == []


@pytest.fixture(scope="module")
def versions(tmp_path_factory) -> list[Path]:
    """The same model before and after some more training, packed."""
    folders = [tmp_path_factory.mktemp("versions") / f"version{seed}" for seed in (0, 1)]
    for seed, folder in enumerate(folders):
        save_packed(two_four_model(seed=seed), folder)
    return folders


class Repository:
    """A repository that has the first version, to which the second is pushed."""

    def __init__(self, place, versions: list[Path]) -> None:
        self.place, self.versions = place, versions
        (self.old,) = self._push(versions[0], place.new())
        self.id = self.old.repo_id

    def _push(self, folder: Path, repo: str, **options):
        return push_to_hub(folder, repo, **{"token": self.place.token, "endpoint": self.place.url, **options})

    def push(self, **options):
        (found,) = self._push(self.versions[1], self.id, **options)
        return found

    def weights(self, revision: str = "main") -> str:
        """sha256 of the weight file."""
        (file,) = (
            entry for entry in self.place.api.list_repo_tree(self.id, revision=revision, recursive=True)
            if entry.path == "model.sparse24.safetensors"
        )  # fmt: skip
        return file.lfs.sha256

    def check_old_or_new(self) -> str:
        """main is one of the two versions, whole; git finds nothing missing. Returns which."""
        history = self.place.api.list_repo_commits(self.id)
        assert len(history) in (2, 3)
        assert history[-2].commit_id == self.old.commit
        git = self.place.server.state.repos[self.id].git
        assert git.is_sound()
        for entry in git.entries(history[0].commit_id).values():
            if entry.lfs is not None:
                assert self.place.server.state.object_path(entry.lfs[0]).stat().st_size == entry.lfs[1]
        return "new" if len(history) == 3 else "old"

    def finish(self) -> None:
        """The rerun does what is left: nothing is broken any more."""
        before = self.weights(self.old.commit)
        self.place.server.faults.clear()
        found = self.push()
        assert self.check_old_or_new() == "new"
        assert self.weights() != before == self.weights(self.old.commit)
        assert found.commit == self.place.api.model_info(self.id).sha
        assert not self.push().changed


@pytest.fixture
def repository(place, versions):
    return Repository(place, versions)


def test_a_connection_that_is_cut_once_in_the_middle_of_an_upload_is_made_again(hub, repository, naps):
    fault = hub.fault(STORAGE, cut_after=1000)
    assert repository.push().changed and fault.hits == 1
    assert repository.check_old_or_new() == "new"
    assert naps  # the client waited before it tried again


@pytest.mark.parametrize("cut_after", [0, 1000])
def test_a_connection_that_is_cut_every_time_leaves_the_old_revision(cut_after, hub, repository, naps):
    hub.fault(STORAGE, cut_after=cut_after, times=100)
    with pytest.raises(OutputError) as failure:
        repository.push()
    assert str(failure.value).startswith(f"{repository.id}: the connection to {hub.url} failed (")
    assert str(failure.value).endswith(
        "The repository is as it was, or complete: the same command does what is left."
    )
    assert repository.check_old_or_new() == "old"
    assert not list((hub.state.folder / "lfs").glob(".*"))  # nothing half is kept
    repository.finish()


@pytest.mark.parametrize("pattern", REQUESTS)
def test_a_hub_that_fails_at_any_request_leaves_the_old_revision(pattern, hub, repository, naps):
    fault = hub.fault(pattern, status=500, times=100, message="sorry")
    with pytest.raises(OutputError, match=f"{repository.id}: {hub.url} failed with HTTP 500"):
        repository.push()
    assert fault.hits
    hub.faults.clear()
    assert repository.check_old_or_new() == "old"
    repository.finish()


def test_a_hub_that_is_busy_is_asked_again_after_the_time_that_it_names(hub, repository, naps):
    hub.fault(COMMIT, status=429, headers={"Retry-After": "7"}, times=2)
    assert repository.push().changed
    assert [nap for nap in naps if nap >= 7] == [7.0, 7.0]
    hub.fault(COMMIT, status=429, headers={"Retry-After": "100000"}, times=100)
    with pytest.raises(OutputError, match=f"{repository.id}: {hub.url} asks to slow down"):
        repository._push(repository.versions[0], repository.id)
    assert max(naps) <= 60.0
    assert repository.check_old_or_new() == "new"


@pytest.mark.parametrize("pattern", ["POST /api/repos/create", COMMIT])
def test_a_new_repository_is_complete_or_empty(pattern, hub, place, versions, naps):
    repo = place.new()
    hub.fault(pattern, status=500, times=100)
    with pytest.raises(OutputError):
        push_to_hub(versions[0], repo, token=place.token, endpoint=place.url)
    assert not place.api.repo_exists(repo) or place.api.list_repo_files(repo) == [".gitattributes"]
    hub.faults.clear()
    (found,) = push_to_hub(versions[0], repo, token=place.token, endpoint=place.url)
    assert found.changed and "model.sparse24.safetensors" in place.api.list_repo_files(repo)


def test_a_commit_whose_answer_is_lost_is_there_and_is_not_made_twice(hub, repository, naps):
    hub.fault(COMMIT, lose_answer=True)
    with pytest.raises(OutputError, match="the connection to"):
        repository.push()
    assert repository.check_old_or_new() == "new"
    assert not repository.push().changed
    assert len(repository.place.api.list_repo_commits(repository.id)) == 3


def test_of_two_repositories_the_first_is_complete_when_the_second_fails(hub, place, versions, naps):
    repo = place.new()
    hub.fault("POST .*-packed/commit/", status=500, times=100)
    with pytest.raises(OutputError, match=f"{repo}-packed: {hub.url} failed with HTTP 500"):
        push_to_hub(versions[0], repo, packed="both", token=place.token, endpoint=place.url)
    assert "model.safetensors" in place.api.list_repo_files(repo)
    hub.faults.clear()
    first, second = push_to_hub(versions[0], repo, packed="both", token=place.token, endpoint=place.url)
    assert (first.changed, second.changed) == (False, True)


def test_a_wrong_token_changes_nothing_and_is_not_shown(repository):
    wrong = "hf_" + "w" * 34
    with pytest.raises(ConfigError) as refusal:
        repository.push(token=wrong)
    assert str(refusal.value) == (
        f"{repository.id}: {repository.place.url} does not accept your token (Invalid credentials in Authorization "
        "header). Make one with the role `write` in the settings of the Hub, then run `hf auth login`, or set HF_TOKEN."
    )
    assert repository.check_old_or_new() == "old"


def test_a_token_that_may_only_read_writes_nothing(hub, place, versions):
    with pytest.raises(ConfigError, match="this token has the role read, and role write is needed"):
        push_to_hub(versions[0], "carol/model", token=hub.token("carol"), endpoint=place.url)
    assert "carol/model" not in hub.state.repos


def test_a_change_by_somebody_else_in_the_meantime_is_not_lost(repository, monkeypatch):
    api, real = repository.place.api, upload._content

    def content(*arguments):
        found = real(*arguments)
        api.create_commit(repository.id, [CommitOperationAdd("LICENSE", b"mine")], commit_message="in the meantime")
        return found

    monkeypatch.setattr(upload, "_content", content)
    with pytest.raises(OutputError) as failure:
        repository.push()
    assert str(failure.value) == (
        f"{repository.id}: somebody else changed it in the meantime (A commit has happened since. Please refresh and "
        "try again.). Nothing of this push is in it. Look at the change, then run the same command again."
    )
    assert api.list_repo_commits(repository.id)[0].title == "in the meantime"
    monkeypatch.undo()
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", True)
    assert repository.push().changed
    assert "LICENSE" in api.list_repo_files(repository.id)


def test_a_full_disk_of_the_server_leaves_the_old_revision(hub, repository, naps):
    hub.state.free_bytes = 2000
    with pytest.raises(OutputError, match=f"{repository.id}: there is no space left for it on {hub.url}"):
        repository.push()
    assert repository.check_old_or_new() == "old"
    assert not list((hub.state.folder / "lfs").glob(".*"))
    hub.state.free_bytes = None
    repository.finish()


def test_a_full_disk_of_the_client_touches_nothing_and_leaves_nothing(hub, place, repository, monkeypatch, tmp_path):
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))

    def full(*arguments, **options):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "model.sparse24.safetensors")

    monkeypatch.setattr("hf_adaptive_sparse.hf.pretrained.write_tensors", full)
    seen = len(hub.requests)
    with pytest.raises(OutputError, match="no space left to write it; nothing of it was kept"):
        push_to_hub(two_four_model(seed=1), repository.id, token=place.token, endpoint=place.url)
    assert len(hub.requests) == seen
    assert list((tmp_path / "temporary").iterdir()) == []


def test_a_hub_that_is_not_there_is_said(place, versions, naps):
    with pytest.raises(OutputError, match="a/b: the connection to http://127.0.0.1:9 failed"):
        push_to_hub(versions[0], "a/b", token=place.token, endpoint="http://127.0.0.1:9")


def test_offline_mode_is_said(place, versions, monkeypatch):
    with monkeypatch.context() as offline:
        offline.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
        with pytest.raises(ConfigError, match="HF_HUB_OFFLINE is set, and a push needs the network"):
            push_to_hub(versions[0], "a/b", token=place.token, endpoint=place.url)


def test_anybody_reads_a_public_repository_without_a_token(place, repository):
    assert HfApi(endpoint=place.url, token=False).model_info(repository.id).sha == repository.old.commit
