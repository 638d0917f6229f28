"""What one-shot pruning has rounded is saved packed, whatever of it can be packed, and opens as the same model."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM

from hf_adaptive_sparse.hf.one_shot import one_shot
from hf_adaptive_sparse.hf.pretrained import save_packed
from hf_adaptive_sparse.methods.one_shot import OneShotConfig

from ..tiny_models import tokens
from .walked_models import any_model

WINDOWS = tokens(8, 16)


@pytest.mark.parametrize("model_type, changes, settings, reasons", [
    ("llama", {}, {}, {}),
    ("gpt2", {}, {}, {}),
    ("llama", {"intermediate_size": 60}, {}, {"mlp.down_proj": "has 60 input features, which is no multiple of 8"}),
    # Among them one level that is not 2:4.
    ("llama", {}, {"pattern": "mixed", "levels": "dense,2:4", "sparsity": 0.25}, None),
    ("mixtral", {}, {}, {
        f"mlp.experts.{name}[{expert}]": "is one of several experts in a parameter"
        for name in ("down_proj", "gate_up_proj") for expert in range(4)
    }),
], ids=["llama", "gpt2", "odd-width", "mixed", "mixtral"])  # fmt: skip
@pytest.mark.parametrize("bits", [8, 4])
def test_what_was_rounded_is_saved_in_one_line_and_is_the_same_model(
    tmp_path, model_type, changes, settings, reasons, bits
):
    model = any_model(model_type, **changes)
    report = one_shot(model, WINDOWS, OneShotConfig(bits=bits, **settings))
    saved = save_packed(model, tmp_path / "packed", quantized=report.quantized)
    assert saved.quantized == saved.modules and set(saved.quantized) <= set(report.quantized)
    dense = report.quantized.keys() - set(saved.modules)
    if reasons is None:
        assert dense and all(saved.skipped[name].startswith("is not 2:4: row ") for name in dense)
    else:
        found = {name: saved.skipped[name] for name in dense}
        assert found == {f"model.layers.{block}.{name}": why for block in range(2) for name, why in reasons.items()}
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "packed").eval()
    with torch.no_grad():
        assert torch.equal(loaded(WINDOWS).logits, model(WINDOWS).logits)
