"""dense_teacher: the dense model for the time of a block, whatever is wrapped around it."""

from __future__ import annotations

import copy
import gc
import re
import weakref

import pytest
import torch
from torch import nn

from hf_adaptive_sparse.errors import ConfigError, TargetError
from hf_adaptive_sparse.families import FAMILIES
from hf_adaptive_sparse.hf.adapter import AdaptiveSparseConfig, dense_teacher, sparse_layers
from tests.hf import adapted_models
from tests.hf.adapted_models import INPUT, logits, shake
from tests.tiny_models import tiny_model


def adapted(model_type: str = "llama", **settings):
    """A model whose every trainable part has moved away from the dense one."""
    return shake(adapted_models.adapted(model_type, **settings))


@pytest.mark.parametrize("family", FAMILIES)
def test_the_teacher_is_the_dense_model_to_the_last_bit(family):
    dense, model = logits(tiny_model(family)), adapted(family)
    student = logits(model)
    with dense_teacher(model):
        assert torch.equal(logits(model), dense)
    assert torch.equal(logits(model), student) and not torch.equal(student, dense)


@pytest.mark.parametrize(
    "settings",
    [
        {"modules_to_save": ["norm"]},
        {"modules_to_save": ["norm", "embed_tokens"]},
        {"trainable_token_indices": [3, 5]},
        {"slorb_k": 8},
    ],
    ids=str,
)
def test_the_teacher_uses_the_original_norms_embeddings_and_no_branch(settings):
    model = adapted(**settings)
    with dense_teacher(model):
        assert torch.equal(logits(model), logits(tiny_model()))


def test_the_teacher_of_several_adapters_is_the_dense_model_too():
    model = adapted()
    with dense_teacher(model):
        pass
    model.add_adapter("second", AdaptiveSparseConfig(target_modules=["lm_head"]))  # a layer seen for the first time
    model.base_model.set_adapter(["default", "second"])
    with dense_teacher(model):
        assert torch.equal(logits(model), logits(tiny_model()))


def test_the_teacher_of_a_native_adapter_is_the_dense_model():
    model = tiny_model()
    model.add_adapter(AdaptiveSparseConfig(modules_to_save=["norm"]))
    student = logits(model)
    with dense_teacher(model):
        assert torch.equal(logits(model), logits(tiny_model()))
    assert torch.equal(logits(model), student)


def test_a_copy_of_a_model_has_a_teacher_of_its_own():
    model = adapted()
    with dense_teacher(model):
        pass
    other = copy.deepcopy(model)
    student = logits(other)
    with dense_teacher(model):
        assert torch.equal(logits(other), student)
    with dense_teacher(other):
        assert torch.equal(logits(other), logits(tiny_model()))
        assert torch.equal(logits(model), student)


def test_blocks_may_be_nested_and_an_error_ends_them():
    dense, model = logits(tiny_model()), adapted(modules_to_save=["norm"])
    student = logits(model)
    with dense_teacher(model):
        with dense_teacher(model):
            assert torch.equal(logits(model), dense)
        assert torch.equal(logits(model), dense)
    assert torch.equal(logits(model), student)
    with pytest.raises(KeyError, match="^'stop'$"), dense_teacher(model), dense_teacher(model):
        raise KeyError("stop")
    assert torch.equal(logits(model), student)


def test_a_block_within_disable_adapter_leaves_it_disabled():
    dense, model = logits(tiny_model()), adapted(modules_to_save=["norm"])
    with model.disable_adapter():
        with dense_teacher(model):
            assert torch.equal(logits(model), dense)
        assert torch.equal(logits(model), dense)
    assert not torch.equal(logits(model), dense)


def test_nothing_is_recorded_for_a_gradient_and_nothing_is_written_to():
    model = adapted(modules_to_save=["norm"]).train()
    model.enable_input_require_grads()  # otherwise nothing in a frozen model asks for a gradient anyway
    before = {name: (p.requires_grad, p._version) for name, p in model.named_parameters()}
    with dense_teacher(model):
        output = model(INPUT).logits
        assert {name: (p.requires_grad, p._version) for name, p in model.named_parameters()} == before
    assert not output.requires_grad and model.training and torch.is_grad_enabled()
    model(INPUT, labels=INPUT).loss.backward()
    assert all(layer.weight.grad is not None for layer in sparse_layers(model))


def test_only_the_first_block_walks_over_the_modules(monkeypatch):
    model = adapted(modules_to_save=["norm"])
    with dense_teacher(model):
        pass
    monkeypatch.setattr(nn.Module, "named_modules", lambda *_, **__: pytest.fail("walked over the modules"))
    with dense_teacher(model):
        pass


def test_a_model_that_is_gone_is_not_kept_alive():
    model = adapted()
    with dense_teacher(model):
        pass
    layer = weakref.ref(sparse_layers(model)[0].layer)
    del model
    gc.collect()
    assert layer() is None


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_teacher_between_forward_and_recomputed_forward_changes_no_gradient(reentrant):
    gradients = []
    for checkpointing in (False, True):
        model = adapted(modules_to_save=["norm"]).train()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
            model.enable_input_require_grads()
        loss = model(INPUT, labels=INPUT).loss
        with dense_teacher(model):
            model(INPUT)
        loss.backward()
        gradients.append([p.grad for p in model.parameters() if p.requires_grad])
    assert len(gradients[0]) > 14
    for plain, recomputed in zip(*gradients, strict=True):
        torch.testing.assert_close(recomputed, plain)


def test_compiled_models_have_one_graph_for_the_student_and_one_for_the_teacher():
    graphs = []

    def backend(graph, _):
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    model = adapted(modules_to_save=["norm"])
    dense, student = logits(tiny_model()), logits(model)
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    torch.testing.assert_close(logits(compiled), student)
    with dense_teacher(compiled):
        torch.testing.assert_close(logits(compiled), dense)
    assert len(graphs) == 2
    for layer in sparse_layers(compiled):  # refreshed masks and moved weights: still the same two graphs
        layer.keep.copy_(layer.keep.roll(1, dims=0))
        layer.weight.data.mul_(1.5)
    changed = logits(model)
    torch.testing.assert_close(logits(compiled), changed)
    with dense_teacher(model):
        torch.testing.assert_close(logits(compiled), dense)
    assert len(graphs) == 2 and not torch.allclose(changed, student)


@pytest.mark.parametrize(
    "model, message",
    [
        (
            lambda: tiny_model(),
            "dense_teacher: the model has no sparse layers. Add an adapter first: get_peft_model(model, "
            "AdaptiveSparseConfig()).",
        ),
        (
            lambda: adapted(layout="inplace"),
            "dense_teacher: layout='inplace' trains the weights of the model itself, so there is no dense "
            "model to learn from. Use layout='copy', or give another model as the teacher.",
        ),
        (
            lambda: adapted("opt", bias="all"),
            "dense_teacher: bias='all' trains the biases of the dense model in place, so that it is not "
            "the dense model any more. Use bias='none', or give another model as the teacher.",
        ),
    ],
    ids=["plain", "inplace", "bias"],
)
def test_a_model_without_a_dense_self_is_refused(model, message):
    kind = TargetError if "no sparse layers" in message else ConfigError
    with pytest.raises(kind, match=f"^{re.escape(message)}$"), dense_teacher(model()):
        pytest.fail("entered the block")


def test_merged_weights_are_no_teacher():
    model = adapted()
    with dense_teacher(model):
        pass
    model.merge_adapter()
    message = (
        "dense_teacher: an adapter is merged, so the weights of the model are not the dense ones. Call "
        "unmerge_adapter() first."
    )
    with pytest.raises(ConfigError, match=f"^{re.escape(message)}$"), dense_teacher(model):
        pytest.fail("entered the block")
    model.unmerge_adapter()
    with dense_teacher(model):
        assert torch.equal(logits(model), logits(tiny_model()))


def test_after_unloading_there_is_no_teacher():
    model = adapted()
    with dense_teacher(model):
        pass
    plain = model.merge_and_unload()
    with pytest.raises(TargetError), dense_teacher(plain):
        pytest.fail("entered the block")
