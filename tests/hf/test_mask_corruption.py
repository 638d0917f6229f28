"""A damaged folder of masks is an error that says what is wrong, or gives the same model: never another one in silence.

The one exchange that no digest can see is that of the whole folder for an intact one of another model. Masks that were
compared with their base are refused then, too; of others it is said that they do not give their sparse model back.
"""

from __future__ import annotations

import copy
import json
import random
import shutil
from collections import Counter
from pathlib import Path

import pytest
import torch

from hf_adaptive_sparse.errors import SparsityError
from hf_adaptive_sparse.hf.mask_application import apply_masks
from hf_adaptive_sparse.hf.masks import save_masks

from ..tiny_models import tiny_model
from .corruptions import CORRUPTIONS
from .two_four_models import logits_of, two_four_model

SMALL = {"num_hidden_layers": 1, "hidden_size": 48, "head_dim": 12}
LAYOUTS = ("compared", "not compared")  # with the base when they were saved, so that the manifest has its digests
CASES, MANY_CASES = 4, 34  # of every kind and layout
COUNTS: dict[str, Counter] = {"few": Counter(), "many": Counter()}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Per layout: a folder of masks, and one of other masks for a model of the same shapes."""
    root, made = tmp_path_factory.mktemp("masks"), {}
    for layout in LAYOUTS:
        for seed, name in ((0, "good"), (1, "other")):
            sparse, base = two_four_model(seed=seed, **SMALL), tiny_model(seed=seed, **SMALL)
            # A short group in every matrix, so that there are tensors of both kinds.
            for model in (sparse, base):
                model.model.layers[0].mlp.up_proj.weight.data[1, :4] = 0.0
            save_masks(sparse, root / layout / name, base=base if layout == "compared" else None)
        made[layout] = (root / layout / "good", root / layout / "other")
    return made


@pytest.fixture(scope="module")
def base():
    """The base model, and the logits with the masks applied."""
    model = tiny_model(**SMALL)
    model.model.layers[0].mlp.up_proj.weight.data[1, :4] = 0.0
    sparse = two_four_model(**SMALL)
    sparse.model.layers[0].mlp.up_proj.weight.data[1, :4] = 0.0
    return model, logits_of(sparse)


def outcome(folder: Path, model: torch.nn.Module, expected: torch.Tensor) -> str:
    model = copy.deepcopy(model)
    before = logits_of(model)
    try:
        exact = apply_masks(model, folder).exact
    except SparsityError as error:
        assert str(error).endswith(".") and len(str(error)) > 30, error
        return "our error" if torch.equal(logits_of(model), before) else "ERROR AFTER A CHANGE"
    if torch.equal(logits_of(model), expected):
        return "same logits"
    return "DIFFERENT LOGITS" if exact else "said to differ"


def damage(folders, base, tmp_path, kind: str, layout: str, cases: int, counts: Counter) -> None:
    (good, other), (model, expected) = folders[layout], base
    for case in range(cases):
        broken = tmp_path / str(case)
        shutil.copytree(good, broken)
        what = CORRUPTIONS[kind](broken, random.Random(f"{layout} {kind} {case}"), other)
        try:
            found = outcome(broken, model, expected)
        except Exception as error:
            raise AssertionError(f"{what}: {type(error).__name__}: {error}") from error
        is_exchanged = what == "masks.json, masks.safetensors of another checkpoint" and layout == "not compared"
        assert found in (("said to differ",) if is_exchanged else ("our error", "same logits")), f"{what}: {found}"
        counts[kind, found] += 1
        shutil.rmtree(broken)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kind", CORRUPTIONS)
def test_random_damage_is_an_error_or_changes_nothing(folders, base, tmp_path, kind, layout):
    damage(folders, base, tmp_path, kind, layout, CASES, COUNTS["few"])


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kind", CORRUPTIONS)
def test_much_random_damage_is_an_error_or_changes_nothing(folders, base, tmp_path, kind, layout):
    damage(folders, base, tmp_path, kind, layout, MANY_CASES, COUNTS["many"])


@pytest.mark.parametrize("amount, least, test", [
    ("few", 100, "test_random_damage"), pytest.param("many", 1000, "test_much_random_damage", marks=pytest.mark.slow),
])  # fmt: skip
def test_enough_cases_were_tried(request, amount, least, test):
    ran = [item for item in request.session.items if item.name.startswith(test)]
    if len(ran) < len(CORRUPTIONS) * len(LAYOUTS):
        pytest.skip("counts make sense when all kinds of damage were tried")
    counts, found = COUNTS[amount], ("our error", "same logits", "said to differ")
    print(f"\n{'damage':24}" + "".join(f"{name:>16}" for name in found))
    for kind in CORRUPTIONS:
        print(f"{kind:24}" + "".join(f"{counts[kind, name]:16}" for name in found))
    total = {name: sum(counts[kind, name] for kind in CORRUPTIONS) for name in found}
    print(f"{'total':24}" + "".join(f"{total[name]:16}" for name in found))
    assert sum(total.values()) >= least
    assert total["our error"] > 0.9 * sum(total.values())


def test_an_intact_folder_gives_the_model_back(folders, base):
    for good, _ in folders.values():
        assert outcome(good, *base) == "same logits"


def test_a_manifest_that_was_edited_with_its_digest_is_checked_against_the_bits(folders, base, tmp_path):
    from hf_adaptive_sparse.hf.mask_folder import BITS_NAME, MANIFEST_NAME
    from hf_adaptive_sparse.hf.tensor_files import digest_of_file, read_header, rewrite_metadata

    good, _ = folders["not compared"]
    name = "model.layers.0.mlp.up_proj.weight"
    edits = {
        "shape": [64, 24], "encoding": "bits", "transposed": True, "dtype": 3, "kept": 7, "unknown": 1,
    }  # fmt: skip
    for key, value in edits.items():
        broken = tmp_path / key
        shutil.copytree(good, broken)
        content = json.loads((broken / MANIFEST_NAME).read_text())
        content["masks"][name][key] = value
        (broken / MANIFEST_NAME).write_text(json.dumps(content))
        metadata = read_header(broken / BITS_NAME)[1]
        files = {MANIFEST_NAME: digest_of_file(broken / MANIFEST_NAME)}
        rewrite_metadata(broken / BITS_NAME, metadata | {"adaptive_sparse_files": json.dumps(files)})
        assert outcome(broken, *base) == "our error", key
