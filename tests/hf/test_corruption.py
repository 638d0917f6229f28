"""A damaged packed folder is an error that says what is wrong, or gives the same logits: never a different model."""

from __future__ import annotations

import copy
import random
import shutil
from collections import Counter
from pathlib import Path

import pytest
import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM

from hf_adaptive_sparse.errors import SparsityError
from hf_adaptive_sparse.hf.pretrained import save_packed

from .corruptions import CORRUPTIONS
from .two_four_models import logits_of, quantize, two_four_model

LAYOUTS = {"single": "5GB", "sharded": "6KB", "quantized": "3KB"}
CASES, MANY_CASES = 6, 23  # of every kind and layout: 270 always, 1,035 among the slow tests
# Of libraries, with their own words: not JSON, no such model type, a field of the wrong type, no such file.
LIBRARY_ERRORS = (OSError, ValueError, StrictDataclassError, SafetensorError)
WEIGHTS = "model.sparse24.safetensors"


@pytest.fixture(scope="module")
def folders(tmp_path_factory, tiny_tokenizer):
    """Per layout: a packed folder, one of other weights, and the logits of the first."""
    root, made = tmp_path_factory.mktemp("packed"), {}
    tokenizer = copy.deepcopy(tiny_tokenizer)  # of the whole session
    tokenizer.chat_template = "{{ messages }}"
    for layout, shard in LAYOUTS.items():
        models = [two_four_model(seed=seed, num_hidden_layers=1, hidden_size=16, head_dim=4) for seed in (0, 1)]
        for model, name in zip(models, ("good", "other"), strict=True):
            grids = quantize(model, 4, 8) if layout == "quantized" else None
            save_packed(model, root / layout / name, tokenizer, max_shard_size=shard, quantized=grids)
        made[layout] = (root / layout / "good", root / layout / "other", logits_of(models[0]))
    return made


def outcome(folder: Path, expected: torch.Tensor) -> str:
    try:
        model = AutoModelForCausalLM.from_pretrained(folder)
    except SparsityError as error:
        assert str(error).endswith(".") and len(str(error)) > 30, error
        return "our error"
    except LIBRARY_ERRORS as error:
        assert str(error).strip(), f"{type(error).__name__} without a message"
        return "library error"
    return "same logits" if torch.equal(logits_of(model), expected) else "DIFFERENT LOGITS"


def damage_and_open(folders, tmp_path: Path, layout: str, kind: str, case: int) -> str:
    """The outcome of one case; the same arguments do the same damage."""
    good, other, expected = folders[layout]
    broken = tmp_path / f"{layout} {kind} {case}"
    shutil.copytree(good, broken)
    what = CORRUPTIONS[kind](broken, random.Random(f"{layout} {kind} {case}"), other)
    try:
        found = outcome(broken, expected)
    except Exception as error:
        raise AssertionError(f"{what}: {type(error).__name__}: {error}") from error
    assert found != "DIFFERENT LOGITS", what
    shutil.rmtree(broken)
    return found


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kind", CORRUPTIONS)
def test_random_damage_is_an_error_or_changes_nothing(folders, tmp_path, layout, kind):
    for case in range(CASES):
        damage_and_open(folders, tmp_path, layout, kind, case)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_of_a_thousand_random_damages_each_is_an_error_or_changes_nothing(folders, tmp_path):
    """Prints the table of docs/format.md: pytest -s."""
    found = ("our error", "library error", "same logits")
    counts = {
        kind: Counter(
            damage_and_open(folders, tmp_path, layout, kind, case) for layout in LAYOUTS for case in range(MANY_CASES)
        )
        for kind in CORRUPTIONS
    }
    total = sum(counts.values(), Counter())
    print(f"\n| damage | cases | {' | '.join(found)} |\n|---|---:|---:|---:|---:|")
    for kind, count in {**counts, "all": total}.items():
        print(f"| `{kind}` | {count.total()} | {' | '.join(str(count[name]) for name in found)} |")
    assert total.total() >= 1000
    assert total["our error"] > 9 * total["library error"]
