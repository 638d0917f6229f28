"""The Hub of the tests is strict: what the real one refuses is refused here, and nothing is lost."""

from __future__ import annotations

import hashlib
import json
import subprocess
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor

import pytest
from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi
from huggingface_hub.errors import (
    BadRequestError,
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

LARGE = b"\0\1" * 5000
OID = hashlib.sha256(LARGE).hexdigest()


def ask(place, method, path, body=b"", token=None, **headers):
    """(status, headers, body) of a request that the client would not make."""
    headers = {name.replace("_", "-"): value for name, value in headers.items()}
    if token is not None:
        headers["Authorization"] = f"Bearer {token}"
    url = path if "://" in path else place.url + path
    request = urllib.request.Request(url, data=body or None, method=method, headers=headers)
    try:
        with _OPENER.open(request) as answer:
            return answer.status, answer.headers, answer.read()
    except urllib.error.HTTPError as answer:
        return answer.code, answer.headers, answer.read()


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, *arguments):
        return None


_OPENER = urllib.request.build_opener(urllib.request.ProxyHandler({}), _NoRedirect)


def add(place, repo, files, **options):
    operations = [CommitOperationAdd(name, content) for name, content in files.items()]
    return place.api.create_commit(repo, operations, commit_message="add", **options)


def commit_lines(*items, header=None):
    lines = [{"key": "header", "value": header or {"summary": "x", "description": ""}}]
    lines += [{"key": key, "value": value} for key, value in items]
    return b"".join(json.dumps(line).encode() + b"\n" for line in lines)


@pytest.fixture
def repo(place):
    name = place.new()
    place.api.create_repo(name)
    return name


def test_files_come_back_as_they_were_from_every_revision(place, repo, tmp_path):
    first = add(place, repo, {"a/model.safetensors": LARGE, "text.md": b"one"}).oid
    second = add(place, repo, {"text.md": b"two"}).oid
    for revision, text in ((first, b"one"), (second, b"two"), ("main", b"two")):
        for name, content in (("text.md", text), ("a/model.safetensors", LARGE)):
            path = place.api.hf_hub_download(repo, name, revision=revision, cache_dir=tmp_path / "cache")
            assert open(path, "rb").read() == content
    assert place.api.model_info(repo).sha == second
    assert [file.path for file in place.api.list_repo_tree(repo, "a")] == ["a/model.safetensors"]
    (large,) = place.api.get_paths_info(repo, ["a/model.safetensors"])
    assert (large.lfs.sha256, large.size) == (OID, len(LARGE))


def test_commits_are_those_of_a_real_git_repository(hub, place, repo):
    made = add(place, repo, {"model.safetensors": LARGE, "text.md": b"one"}).oid
    git = hub.state.repos[repo].git
    assert git.is_sound()
    folder = git.folder
    log = subprocess.run(["git", "log", "--format=%H"], cwd=folder, capture_output=True, text=True, check=True)
    assert log.stdout.splitlines()[0] == made
    show = ["git", "show", f"{made}:model.safetensors"]
    pointer = subprocess.run(show, cwd=folder, capture_output=True, text=True, check=True).stdout
    assert pointer == f"version https://git-lfs.github.com/spec/v1\noid sha256:{OID}\nsize {len(LARGE)}\n"


def test_a_download_goes_on_where_it_was_cut(place, repo, tmp_path):
    add(place, repo, {"model.safetensors": LARGE})
    status, headers, _ = ask(place, "HEAD", f"/{repo}/resolve/main/model.safetensors", token=place.token)
    assert status == 302 and headers["X-Linked-ETag"] == f'"{OID}"' and headers["X-Linked-Size"] == str(len(LARGE))
    assert headers["X-Repo-Commit"] == place.api.model_info(repo).sha
    where = headers["Location"]
    for asked, part in (("bytes=100-199", LARGE[100:200]), ("bytes=9990-", LARGE[9990:]), ("bytes=-5", LARGE[-5:])):
        status, headers, body = ask(place, "GET", where, Range=asked)
        assert (status, body) == (206, part)
        assert headers["Content-Range"].endswith(f"/{len(LARGE)}")
    assert ask(place, "GET", where, Range=f"bytes={len(LARGE)}-")[0] == 416
    assert ask(place, "GET", where)[2] == LARGE


def test_the_store_of_large_files_needs_a_signed_address_and_takes_only_what_was_announced(hub, place, repo):
    batch = {"operation": "upload", "hash_algo": "sha256", "objects": [{"oid": OID, "size": len(LARGE)}]}
    path = f"/{repo}.git/info/lfs/objects/batch"
    assert ask(place, "POST", path, json.dumps(batch).encode())[0] == 401
    _, _, body = ask(place, "POST", path, json.dumps(batch).encode(), token=place.token)
    href = json.loads(body)["objects"][0]["actions"]["upload"]["href"]
    assert ask(place, "PUT", href.replace("signature=", "signature=0"), LARGE)[0] == 403
    assert ask(place, "PUT", href, LARGE[:-1])[0] == 400  # too short
    assert ask(place, "PUT", href, LARGE[:-1] + b"x")[0] == 400  # another sha256
    assert not hub.state.object_path(OID).exists()
    assert ask(place, "PUT", href, LARGE)[0] == 200
    _, _, body = ask(place, "POST", path, json.dumps(batch).encode(), token=place.token)
    assert "actions" not in json.loads(body)["objects"][0]  # it is known now


@pytest.mark.parametrize(
    "item",
    [
        ("lfsFile", {"path": "model.safetensors", "algo": "sha256", "oid": OID, "size": len(LARGE)}),  # not uploaded
        ("file", {"path": "model.safetensors", "content": "Z29vZA==", "encoding": "base64"}),  # must be large
        ("file", {"path": "../outside", "content": "Z29vZA==", "encoding": "base64"}),
        ("file", {"path": ".git/config", "content": "Z29vZA==", "encoding": "base64"}),
        ("file", {"path": "a.txt", "content": "no base64!", "encoding": "base64"}),
        ("file", {"path": "README.md", "content": "LS0tCmxpY2Vuc2U6IG15LW93bgotLS0K", "encoding": "base64"}),
        ("deletedFile", {"path": "absent"}),
        ("renamed", {"path": "a"}),
    ],
)
def test_a_wrong_line_refuses_the_whole_commit(item, place, repo):
    good = ("file", {"path": "good.txt", "content": "Z29vZA==", "encoding": "base64"})
    before = place.api.model_info(repo).sha
    status, _, _ = ask(place, "POST", f"/api/models/{repo}/commit/main", commit_lines(good, item), token=place.token)
    assert status in (400, 404)
    assert place.api.model_info(repo).sha == before
    # The other line alone is in order.
    assert ask(place, "POST", f"/api/models/{repo}/commit/main", commit_lines(good), token=place.token)[0] == 200
    assert place.api.model_info(repo).sha != before


def test_two_commits_on_the_same_parent_are_a_conflict_and_without_a_parent_they_are_not(hub, place, repo):
    parent = place.api.model_info(repo).sha
    add(place, repo, {"a.txt": b"a"}, parent_commit=parent)
    with pytest.raises(HfHubHTTPError) as conflict:
        add(place, repo, {"b.txt": b"b"}, parent_commit=parent)
    assert conflict.value.response.status_code == 412
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda number: add(place, repo, {f"{number}.txt": b"x"}), range(4)))
    assert {f"{number}.txt" for number in range(4)} | {"a.txt"} <= set(place.api.list_repo_files(repo))
    assert hub.state.repos[repo].git.is_sound()


def test_who_may_see_and_do_what(hub, place, repo):
    place.api.update_repo_settings(repo, private=True)
    bob, nobody = HfApi(endpoint=hub.url, token=hub.token("bob")), HfApi(endpoint=hub.url, token=False)
    for api in (bob, nobody):
        with pytest.raises(RepositoryNotFoundError):
            api.model_info(repo)
        with pytest.raises(RepositoryNotFoundError):
            api.create_commit(repo, [CommitOperationAdd("a", b"a")], commit_message="x")
    place.api.update_repo_settings(repo, private=False, gated="auto")
    assert nobody.model_info(repo).gated
    with pytest.raises(GatedRepoError):
        bob.hf_hub_download(repo, ".gitattributes", cache_dir=hub.state.folder / "cache")
    with pytest.raises(HfHubHTTPError) as refusal:
        bob.create_commit(repo, [CommitOperationAdd("a", b"a")], commit_message="x")
    assert refusal.value.response.status_code == 403
    with pytest.raises(HfHubHTTPError) as refusal:
        bob.create_repo("alice/another")
    assert refusal.value.response.status_code == 403
    assert ask(place, "GET", "/api/whoami-v2")[0] == 401
    assert ask(place, "GET", f"/api/models/{repo}", token="hf_wrong")[0] == 401


def test_what_is_not_there_is_told_apart(place, repo, tmp_path):
    with pytest.raises(EntryNotFoundError):
        place.api.hf_hub_download(repo, "absent.json", cache_dir=tmp_path)
    with pytest.raises(RevisionNotFoundError):
        place.api.model_info(repo, revision="absent")
    with pytest.raises(RepositoryNotFoundError):
        place.api.model_info(f"{place.user}/absent")
    with pytest.raises(HfHubHTTPError) as conflict:
        place.api.create_repo(repo)
    assert conflict.value.response.status_code == 409
    assert place.api.create_repo(repo, exist_ok=True).repo_id == repo


def test_branches_pull_requests_and_deletions(place, repo):
    first = add(place, repo, {"a/b.txt": b"b", "c.txt": b"c"}).oid
    place.api.create_branch(repo, branch="old")
    place.api.create_commit(repo, [CommitOperationDelete("a/", is_folder=True)], commit_message="gone")
    assert place.api.list_repo_files(repo) == [".gitattributes", "c.txt"]
    assert place.api.model_info(repo, revision="old").sha == first
    proposed = add(place, repo, {"d.txt": b"d"}, create_pr=True)
    assert proposed.pr_revision == "refs/pr/1" and "d.txt" not in place.api.list_repo_files(repo)
    assert "d.txt" in place.api.list_repo_files(repo, revision="refs/pr/1")
    refs = place.api.list_repo_refs(repo, include_pull_requests=True)
    assert {each.name for each in refs.branches} == {"main", "old"} and len(refs.pull_requests) == 1
    place.api.delete_branch(repo, branch="old")
    assert not place.api.revision_exists(repo, "old")
    place.api.delete_repo(repo)
    assert not place.api.repo_exists(repo)


def test_a_card_with_wrong_metadata_is_refused_before_anything_is_uploaded(place, repo):
    heads = "license: my-own", "base_model: a/b/c", "tags: x", "base_model_relation: child", "a: [", "model-index: 3"
    for head in heads:
        with pytest.raises(ValueError, match="Invalid metadata in README.md"):
            add(place, repo, {"README.md": f"---\n{head}\n---\n".encode(), "model.safetensors": LARGE})
    with pytest.raises(BadRequestError, match="eval_results"):
        add(place, repo, {".eval_results/x.yaml": b"- value: 3\n"})
    assert place.api.list_repo_files(repo) == [".gitattributes"]


def test_a_cut_upload_leaves_nothing_behind_and_a_lost_answer_leaves_the_commit(hub, place, repo, naps):
    hub.fault("PUT", cut_after=100)
    add(place, repo, {"model.safetensors": LARGE})
    assert [path.name for path in (hub.state.folder / "lfs").iterdir()] == [OID]
    hub.fault("commit/main", lose_answer=True)
    with pytest.raises(Exception, match="disconnected"):
        add(place, repo, {"text.md": b"x"})
    assert "text.md" in place.api.list_repo_files(repo)
