"""A Hub for every test, and small models to push. HF_ADAPTIVE_SPARSE_TEST_ENDPOINT and _TOKEN name another Hub."""

from __future__ import annotations

import os
import time
import uuid
from dataclasses import dataclass
from pathlib import Path

import pytest
from huggingface_hub import HfApi, constants

from hf_adaptive_sparse import save_dense, save_packed
from hf_adaptive_sparse.cli.main import main
from tests.cli.runs import TRAIN
from tests.hf.two_four_models import two_four_model
from tests.hub_server import HubServer

ENDPOINT, TOKEN = "HF_ADAPTIVE_SPARSE_TEST_ENDPOINT", "HF_ADAPTIVE_SPARSE_TEST_TOKEN"


@dataclass
class Place:
    """A Hub, and a repository name on it that is free.

    Args:
        hub: the server, if it is ours: to look behind the scenes, and to break something.
    """

    url: str
    token: str
    user: str
    hub: HubServer | None = None

    def __post_init__(self) -> None:
        self.api = HfApi(endpoint=self.url, token=self.token)
        self.made: list[str] = []

    @property
    def server(self) -> HubServer:
        if self.hub is None:
            pytest.skip(f"looks inside the server, which {ENDPOINT} names another one for")
        return self.hub

    def new(self, name: str = "model") -> str:
        """The id of a repository that is not there, and is removed after the test."""
        self.made.append(f"{self.user}/{name}-{uuid.uuid4().hex[:8]}")
        return self.made[-1]

    def environment(self, home: Path) -> dict[str, str]:
        """What a process needs to talk to it as its user."""
        return {
            "HF_ENDPOINT": self.url, "HF_TOKEN": self.token, "HF_HOME": str(home), "HF_HUB_OFFLINE": "0",
            **({"HF_HUB_DISABLE_XET": "1"} if self.hub is not None else {}),
        }  # fmt: skip


@pytest.fixture
def online(monkeypatch):
    """The client of this process, which conftest.py keeps from the network, may use it: there is only loopback."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.delenv("HF_TOKEN", raising=False)
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "http_proxy", "https_proxy", "all_proxy"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def place(online, monkeypatch, tmp_path):
    """A Hub with one user who may write."""
    if os.environ.get(ENDPOINT):
        found = Place(os.environ[ENDPOINT], os.environ[TOKEN], "")
        found.user = found.api.whoami()["name"]
        yield found
        for name in found.made:
            for each in (name, f"{name}-packed"):
                found.api.delete_repo(each, missing_ok=True)
        return
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    with HubServer(tmp_path / "hub", {"alice": "write", "bob": "write", "carol": "read"}) as hub:
        yield Place(hub.url, hub.token("alice"), "alice", hub)
        assert hub.unknown == []  # the client asked for nothing that this Hub does not have


@pytest.fixture
def hub(place):
    """The server behind `place`."""
    return place.server


@pytest.fixture
def naps(monkeypatch):
    """How long the client wanted to wait before it tried again; nobody waits."""
    slept: list[float] = []
    real = time.sleep

    def nap(seconds: float) -> None:
        slept.append(seconds)
        real(0.001)

    monkeypatch.setattr(time, "sleep", nap)
    return slept


@pytest.fixture(scope="session")
def trained_run(tiny_llama_folder, tiny_text_file, tmp_path_factory) -> Path:
    """The output folder of one `train` run of 20 steps on a model with a card."""
    base = tmp_path_factory.mktemp("base") / "tiny-llama"
    base.mkdir()
    for file in tiny_llama_folder.iterdir():
        (base / file.name).write_bytes(file.read_bytes())
    (base / "README.md").write_text("---\nlicense: mit\n---\n# Tiny\n", encoding="utf-8")
    output = tmp_path_factory.mktemp("train") / "out"
    files = ["--data", str(tiny_text_file), "--output-dir", str(output)]
    assert main(["train", str(base), *files, *TRAIN]) == 0
    return output


@pytest.fixture(scope="session")
def packed_folder(tmp_path_factory) -> Path:
    """A packed folder of a random model, without a report."""
    folder = tmp_path_factory.mktemp("models") / "some-packed"
    save_packed(two_four_model(), folder)
    return folder


@pytest.fixture(scope="session")
def dense_folder(tmp_path_factory) -> Path:
    """The same model, dense-stored."""
    folder = tmp_path_factory.mktemp("models") / "some-dense"
    save_dense(two_four_model(), folder)
    return folder
