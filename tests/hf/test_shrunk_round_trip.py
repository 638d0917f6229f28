"""Every family in every form: opened by a fresh process, and then trained, adapted and made sparse like any model."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import Trainer

from hf_adaptive_sparse.families import FAMILIES as FAMILIES_OF_LINEARS
from hf_adaptive_sparse.hf.adapter import AdaptiveSparseConfig
from hf_adaptive_sparse.hf.shrunk_export import export_shrunk

from ..tiny_models import tokens
from .runs import arguments, examples
from .shrunk_cases import FAMILIES, WITHOUT_HEAD_DIM, load, logits_of, shrunk_model

ROOT = Path(__file__).parents[2]
WITH_EXPERTS = ("mixtral", "qwen3_moe")  # whose experts cannot be padded: a router would have to ask for none of them
CASES = [
    (family, form)
    for family in FAMILIES
    for form in ("stock", "per_layer", "padded")
    if not (form == "padded" and family in WITH_EXPERTS)
]
QUICK = ("llama", "gpt2")  # of the others, test_shrunk_models and test_shrunk_export try one form each
every_case = pytest.mark.parametrize(
    ("family", "form"),
    [case if case[0] in QUICK else pytest.param(*case, marks=pytest.mark.slow) for case in CASES],
)



def assert_same(found: torch.Tensor, expected: torch.Tensor, case: str = "") -> None:
    """To 1e-6 of the largest logit: sums over padded widths may be split differently."""
    worst = float((found - expected).abs().max() / expected.abs().max().clamp(min=1.0))
    assert worst <= 1e-6, (case, worst)


PROGRAM = """
import sys, torch
import hf_adaptive_sparse
from pathlib import Path
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
folder = Path(sys.argv[1])
ids, found = load_file(folder / "ids.safetensors")["ids"], {}
for case in map(Path, sys.argv[2:]):
    model = AutoModelForCausalLM.from_pretrained(case, experts_implementation="eager").eval()
    with torch.no_grad():
        found[case.name] = model(ids).logits.contiguous()
    options = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False}
    expected = model.generate(ids[:, :5], use_cache=False, **options)
    for cache in ({}, {"cache_implementation": "static"}):
        assert torch.equal(model.generate(ids[:, :5], **cache, **options), expected), (case.name, cache)
save_file(found, folder / "logits.safetensors")
"""


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """Of a family and a form: the folder of a model, and the logits of what was saved."""
    top, made = tmp_path_factory.mktemp("shrunk"), {}

    def export(family, form):
        if (family, form) not in made:
            even, folder = form == "stock", top / f"{family}-{form}"
            # Without a field for the size of a head, stock models keep all heads.
            kinds = ("mlp_channel",) if even and family in WITHOUT_HEAD_DIM else ("kv_head", "mlp_channel", "expert")
            model = shrunk_model(family, even=even, kinds=kinds)
            # Channels in fours, so that 2:4 applies to what reads them.
            export_shrunk(model, folder, form=form, multiple_of=4)
            made[family, form] = folder, logits_of(model)
        return made[family, form]

    return export


@pytest.mark.parametrize("families", [QUICK, pytest.param(FAMILIES, marks=pytest.mark.slow)], ids=["some", "all"])
def test_a_fresh_process_opens_every_form_and_generates_with_every_cache(families, exported, tmp_path):
    cases = [exported(*case) for case in CASES if case[0] in families]
    save_file({"ids": tokens(length=9)}, tmp_path / "ids.safetensors")
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(tmp_path), *(str(folder) for folder, _ in cases)],
        env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = load_file(tmp_path / "logits.safetensors")
    for folder, expected in cases:
        assert_same(found[folder.name], expected, folder.name)


@every_case
def test_a_trainer_fine_tunes_it(family, form, exported, tmp_path):
    loaded = load(exported(family, form)[0])
    before = {name: parameter.detach().clone() for name, parameter in loaded.named_parameters()}
    Trainer(loaded, arguments(tmp_path, max_steps=1, save_strategy="no"), train_dataset=examples()).train()
    still = [name for name, parameter in loaded.named_parameters() if torch.equal(before[name], parameter)]
    # An expert that no token of the batch was sent to has no gradient.
    assert not [name for name in still if "experts" not in name]


@every_case
def test_lora_runs_on_it_and_leaves_it_as_it_was(family, form, exported):
    folder, expected = exported(family, form)
    config = LoraConfig(
        init_lora_weights=False, target_modules="all-linear", fan_in_fan_out=family == "gpt2", task_type="CAUSAL_LM"
    )
    adapted = get_peft_model(load(folder), config)
    adapted(input_ids=tokens(), labels=tokens()).loss.backward()
    trained = [parameter for parameter in adapted.parameters() if parameter.requires_grad]
    assert trained and all(parameter.grad is not None for parameter in trained)
    assert not torch.equal(logits_of(adapted.eval()), expected)
    with adapted.disable_adapter():
        assert_same(logits_of(adapted), expected)


@every_case
def test_masks_are_learned_on_it(family, form, exported):
    if family not in FAMILIES_OF_LINEARS:
        pytest.skip("no linears of this family are declared for 2:4")
    folder, expected = exported(family, form)
    heads = FAMILIES_OF_LINEARS[family].targets
    adapted = get_peft_model(load(folder), AdaptiveSparseConfig())
    adapted(input_ids=tokens(), labels=tokens()).loss.backward()
    learned = [parameter for name, parameter in adapted.named_parameters() if "adaptive_sparse_weight" in name]
    assert len(learned) == 3 * len(heads) and all(parameter.grad is not None for parameter in learned)
    with adapted.disable_adapter():
        assert_same(logits_of(adapted), expected)
