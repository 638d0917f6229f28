"""A packed model with the compiled kernel, from `from_pretrained` on."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from hf_adaptive_sparse.errors import ConfigError
from hf_adaptive_sparse.hf.packed_modules import packed_modules, set_packed_backend
from hf_adaptive_sparse.hf.pretrained import save_packed
from hf_adaptive_sparse.hf.quantizer import loading_options
from hf_adaptive_sparse.kernels import compiled

from ..kernels.compilers import needs_a_compiler
from ..tiny_models import tokens
from .two_four_models import logits_of, quantize, two_four_model

pytestmark = needs_a_compiler


def load(folder, **options):
    with loading_options(backend="packed", kernel="compiled"):
        return AutoModelForCausalLM.from_pretrained(folder, **options)


@pytest.fixture(params=["llama", "gpt2", "int8"])
def saved(request, tmp_path):
    """A 2:4 model and its packed folder."""
    family = "llama" if request.param == "int8" else request.param
    model = two_four_model(family)
    grids = quantize(model, 8) if request.param == "int8" else None
    save_packed(model, tmp_path / "packed", quantized=grids)
    return model, tmp_path / "packed"


def test_logits_are_those_of_the_dense_model_but_for_rounding(saved, monkeypatch):
    model, folder = saved
    reloaded, calls = load(folder), []
    whole = compiled.multiply_stored
    monkeypatch.setattr(compiled, "multiply_stored", lambda *a: calls.append(1) or whole(*a))
    assert {(each.backend, each.kernel) for each in packed_modules(reloaded).values()} == {("packed", "compiled")}
    with torch.no_grad():
        few = tokens()[:1, :8]
        torch.testing.assert_close(reloaded(few).logits, model(few).logits, rtol=1e-4, atol=1e-5)
    assert len(calls) == len(packed_modules(reloaded))
    torch.testing.assert_close(logits_of(reloaded), logits_of(model), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("cache", [None, "static"])
def test_it_generates_what_the_dense_model_generates(saved, cache):
    model, folder = saved
    options = {"max_new_tokens": 8, "do_sample": False, "cache_implementation": cache, "disable_compile": True}
    expected = model.generate(tokens()[:2, :5], **options)
    with torch.inference_mode():
        assert torch.equal(load(folder).generate(tokens()[:2, :5], **options), expected)


def test_saving_it_again_writes_the_same_bytes(saved, tmp_path):
    _, folder = saved
    save_packed(load(folder), tmp_path / "again")
    name = "model.sparse24.safetensors"
    assert (tmp_path / "again" / name).read_bytes() == (folder / name).read_bytes()


def test_lora_trains_on_top_of_it(saved):
    _, folder = saved
    base = load(folder)
    names = sorted({name.rpartition(".")[2] for name in packed_modules(base)})
    model = get_peft_model(base, LoraConfig(target_modules=names[:2], r=4, task_type="CAUSAL_LM"))
    losses, optimizer = [], torch.optim.Adam([each for each in model.parameters() if each.requires_grad], lr=1e-2)
    for _ in range(4):
        loss = model(tokens(), labels=tokens()).loss
        losses.append(loss.item())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < losses[0]


def test_the_kernel_can_be_changed_and_unknown_ones_are_refused(saved):
    model, folder = saved
    reloaded = load(folder)
    set_packed_backend(reloaded, "packed", kernel="torch")
    assert torch.equal(logits_of(reloaded), logits_of(model))
    set_packed_backend(reloaded, "packed", kernel="auto")
    assert {each.kernel for each in packed_modules(reloaded).values()} == {"auto"}
    for change in (lambda: set_packed_backend(reloaded, "packed", kernel="x"), loading_options(kernel="x").__enter__):
        with pytest.raises(ConfigError) as error:
            change()
        assert str(error.value) == "unknown kernel 'x'; known: auto, compiled, torch."


def test_an_offloaded_model_uses_the_kernel_too(tmp_path):
    model = two_four_model()
    save_packed(model, tmp_path / "packed")
    device_map = dict.fromkeys(("model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head"), "cpu")
    device_map |= {"model.layers.0": "cpu", "model.layers.1": "disk"}
    reloaded = load(tmp_path / "packed", device_map=device_map, offload_folder=str(tmp_path / "offload"))
    assert {each.kernel for each in packed_modules(reloaded).values()} == {"compiled"}
    torch.testing.assert_close(logits_of(reloaded), logits_of(model), rtol=1e-4, atol=1e-5)
