"""Every file in examples/ runs as it is written, offline, on the model inside the package."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import hf_adaptive_sparse
from hf_adaptive_sparse import demo
from tests.hub_server import HubServer

ROOT = Path(__file__).parents[1]
EXAMPLES = ROOT / "examples"

# The last line that each prints.
LAST_LINE = {
    "frozen_mask_finetune.py": r"zeros before \d+, after \d+, moved 0",
    "learn_masks.py": r"perplexity: dense \d+\.\d+, one-shot magnitude 2:4 \d+\.\d+, trained 2:4 \d+\.\d+",
    "one_shot.py": r"perplexity: dense \d+\.\d+, magnitude 2:4 \d+\.\d+, balanced 2:4 \d+\.\d+",
    "pack_and_load.py": r"packed layers: \d+ bytes of \d+ dense ones, ratio 0\.5625; logits bit-equal: True",
    "push_and_load.py": r"loaded from the Hub; logits bit-equal: True",
    "shrink_while_training.py": r"parameters: \d+ dense, \d+ now, in a stock (llama|mistral) checkpoint; "
    r"perplexity: dense \d+\.\d+, smaller \d+\.\d+",
    "plain_torch_loop.py": r"step 14: loss \d+\.\d+, ce \d+\.\d+, kd \d+\.\d+",
}


def example_files() -> list[str]:
    return sorted(path.name for path in EXAMPLES.glob("*.py"))


def test_every_example_is_run_here():
    assert example_files() == sorted(LAST_LINE)


@pytest.fixture
def network(tmp_path):
    """Variables of the environment that keep an example offline; `push_and_load.py` gets a Hub on loopback."""
    with HubServer(tmp_path / "hub", {"alice": "write"}) as hub:
        yield {
            "push_and_load.py": {
                "HF_ENDPOINT": hub.url, "HF_TOKEN": hub.token("alice"), "HF_HOME": str(tmp_path / "home"),
                "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1",
            }
        }  # fmt: skip


@pytest.mark.parametrize("name", example_files())
def test_an_example_runs_and_prints_its_result(name, tmp_path, network):
    # PYTHONPATH, so that it also runs where the package is not installed.
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", **network.get(name, {})}
    short = ["--steps", "14"] if "--steps" in (EXAMPLES / name).read_text(encoding="utf-8") else []
    result = subprocess.run(
        [sys.executable, str(EXAMPLES / name), *short, "--output-dir", str(tmp_path / "out")],
        cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=280,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    last = result.stdout.strip().splitlines()[-1]
    assert re.fullmatch(LAST_LINE[name], last), result.stdout


@pytest.mark.parametrize("name", example_files())
def test_an_example_uses_public_names_only(name):
    tree = ast.parse((EXAMPLES / name).read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("hf_adaptive_sparse"):
            allowed = {
                "hf_adaptive_sparse": hf_adaptive_sparse.__all__,
                "hf_adaptive_sparse.demo": demo.__all__,
            }
            assert {alias.name for alias in node.names} <= set(allowed[node.module])
        if isinstance(node, ast.Import):
            assert all(alias.name.split(".")[1:] == [] for alias in node.names if "adaptive_sparse" in alias.name)
