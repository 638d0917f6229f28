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
CASES = 12  # of every kind and layout
# Of libraries, with their own words: not JSON, no such model type, a field of the wrong type, no such file.
LIBRARY_ERRORS = (OSError, ValueError, StrictDataclassError, SafetensorError)
WEIGHTS = "model.sparse24.safetensors"
COUNTS: Counter = Counter()


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


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kind", CORRUPTIONS)
def test_random_damage_is_an_error_or_changes_nothing(folders, tmp_path, layout, kind):
    good, other, expected = folders[layout]
    for case in range(CASES):
        broken = tmp_path / str(case)
        shutil.copytree(good, broken)
        what = CORRUPTIONS[kind](broken, random.Random(f"{layout} {kind} {case}"), other)
        try:
            found = outcome(broken, expected)
        except Exception as error:
            raise AssertionError(f"{what}: {type(error).__name__}: {error}") from error
        assert found != "DIFFERENT LOGITS", what
        COUNTS[kind, found] += 1
        shutil.rmtree(broken)


def test_at_least_four_hundred_cases_were_tried(request):
    names = [item.name for item in request.session.items]
    if len([name for name in names if name.startswith("test_random_damage")]) < len(CORRUPTIONS) * len(LAYOUTS):
        pytest.skip("counts make sense when all kinds of damage were tried")
    found = ("our error", "library error", "same logits")
    print(f"\n{'damage':24}" + "".join(f"{name:>16}" for name in found))
    for kind in CORRUPTIONS:
        print(f"{kind:24}" + "".join(f"{COUNTS[kind, name]:16}" for name in found))
    total = {name: sum(COUNTS[kind, name] for kind in CORRUPTIONS) for name in found}
    print(f"{'total':24}" + "".join(f"{total[name]:16}" for name in found))
    assert sum(COUNTS.values()) >= 400
    assert total["our error"] > total["library error"]
