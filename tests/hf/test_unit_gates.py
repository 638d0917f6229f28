"""Gates on units: closed ones remove them, soft ones scale them, and the model is left as it was."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_adaptive_sparse.errors import TargetError
from hf_adaptive_sparse.hf.unit_gates import fold_gates, gated
from hf_adaptive_sparse.hf.units import find_axes
from hf_adaptive_sparse.units import Axis, Span

from ..tiny_models import tiny_model, tokens
from .llama_axes import llama_axes

IDS = tokens(2, 10)


def random_model(family):
    """With biases and norms that are not what they are initialised to."""
    model = tiny_model(family)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model


def logits_of(model):
    return model(input_ids=IDS).logits.detach()


def zeroed(model, axes, gates):
    """A copy whose parameters of closed units are all 0; of a closed layer every linear."""
    model = copy.deepcopy(model)
    parameters = dict(model.named_parameters())
    for axis in axes:
        closed = (gates[axis.name] == 0).nonzero().flatten().tolist() if axis.name in gates else []
        for unit in closed:
            for span in axis.spans:
                parameters[span.tensor].data.index_fill_(span.dim, span.index[unit], 0.0)
            if axis.kind == "layer":
                for parameter in model.get_submodule(axis.name)[unit].parameters():
                    parameter.data.zero_()
    return model


@settings(max_examples=8)
@given(st.integers(0, 10_000))
def test_closed_gates_give_the_logits_of_the_model_without_these_units(seed):
    model = tiny_model("llama", initializer_range=0.2)
    axes = llama_axes(model, with_layers=True)
    generator = torch.Generator().manual_seed(seed)
    gates = {axis.name: (torch.rand(axis.count, generator=generator) < 0.6).float() for axis in axes}
    expected, dense = logits_of(zeroed(model, axes, gates)), logits_of(model)
    with gated(model, axes, gates):
        found = logits_of(model)
    assert torch.equal(found, expected)
    assert torch.equal(logits_of(model), dense)


@pytest.mark.parametrize("family", ["gpt2", "opt", "phi3", "gemma2", "qwen3"])
def test_closed_gates_remove_units_of_other_families(family):
    model = random_model(family)
    axes = find_axes(model, ("kv_head", "mlp_channel", "layer"))
    gates = {axis.name: (torch.arange(axis.count) % 3 > 0).float() for axis in axes if axis.kind != "layer"}
    for closed in ({}, {axes[-1].name: torch.tensor([1.0, 0.0])}):
        gates |= closed
        with gated(model, axes, gates):
            found = logits_of(model)
        assert torch.equal(found, logits_of(zeroed(model, axes, gates)))
        assert not torch.equal(found, logits_of(model))


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt"])
def test_folded_gates_compute_what_gates_did(family):
    model = random_model(family)
    axes = find_axes(model, ("kv_head", "mlp_channel", "layer"))
    generator = torch.Generator().manual_seed(0)
    gates = {axis.name: torch.rand(axis.count, generator=generator) for axis in axes}
    with gated(model, axes, gates):
        expected = logits_of(model)
    fold_gates(model, axes, gates)
    torch.testing.assert_close(logits_of(model), expected, rtol=1e-5, atol=1e-5)


def test_gradients_reach_the_gates_and_new_gates_are_taken_at_the_next_pass():
    model = tiny_model("llama", initializer_range=0.2).requires_grad_(False)
    axes = llama_axes(model, with_layers=True)
    gates = {axis.name: torch.ones(axis.count, requires_grad=True) for axis in axes}
    dense = logits_of(model)
    with gated(model, axes, gates):
        output = model(input_ids=IDS).logits
        assert torch.equal(output, dense)
        direction = torch.randn(output.shape, generator=torch.Generator().manual_seed(0))
        (output * direction).sum().backward()
        for axis in axes:
            gradient = gates[axis.name].grad
            for unit in range(0, axis.count, 20):
                with torch.no_grad():
                    ends = []
                    for step in (-1e-2, 1e-2):
                        changed = torch.ones(axis.count)
                        changed[unit] += step
                        old, gates[axis.name] = gates[axis.name], changed
                        ends.append(float((model(input_ids=IDS).logits.double() * direction).sum()))
                        gates[axis.name] = old
                assert (ends[1] - ends[0]) / 2e-2 == pytest.approx(float(gradient[unit]), rel=0.05, abs=0.02)


def test_the_model_is_restored_after_an_error():
    model = tiny_model("llama")
    axes, dense = llama_axes(model), logits_of(model)
    with pytest.raises(RuntimeError, match="^stop$"):
        with gated(model, axes, {axes[0].name: torch.zeros(2)}):
            assert not torch.equal(logits_of(model), dense)
            raise RuntimeError("stop")
    assert torch.equal(logits_of(model), dense)
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in model.modules())


@pytest.mark.parametrize(
    ("family", "changes", "because"),
    [
        (
            "opt",
            {"do_layer_norm_before": False},
            "OPTForCausalLM: do_layer_norm_before=False has the norms of a layer behind its sums, so a layer that adds "
            "nothing still changes what it passes on, and a removed one does not",
        ),
        (
            "gpt2",
            {"scale_attn_by_inverse_layer_idx": True},
            "GPT2LMHeadModel: scale_attn_by_inverse_layer_idx divides by the number of the layer, which changes for "
            "the layers behind a removed one",
        ),
    ],
)
def test_layers_that_cannot_be_removed_cannot_be_gated(family, changes, because):
    model = tiny_model(family, **changes)
    axes = find_axes(model, ("kv_head", "mlp_channel", "layer"))
    for act in (lambda *given: gated(*given).__enter__(), fold_gates):
        with pytest.raises(TargetError) as error:
            act(model, axes, {axes[-1].name: torch.ones(2)})
        assert str(error.value) == f"{because}. Only heads and channels can be removed from this model."
    with gated(model, axes, {axis.name: torch.ones(axis.count) for axis in axes[:-1]}):
        logits_of(model)
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in model.modules())


def test_what_cannot_be_gated_is_refused():
    model = tiny_model("llama")
    axes = llama_axes(model, with_layers=True)
    embedding = Span("model.embed_tokens.weight", 1, torch.arange(32)[:, None], reads=True)
    hidden = Axis("model", "hidden", None, 32, (embedding,))
    not_linear = Axis("model.x", "mlp_channel", 0, 32, (embedding,))
    cases = [
        (axes, {"model.layers.0.mlp": torch.ones(3)}, "model.layers.0.mlp: has 64 units, and its gates are [3]."),
        (axes, {"model.layers.7.mlp": torch.ones(3)}, "model.layers.7.mlp: has gates, and is none of the 5 axes."),
        (
            [hidden],
            {"model": torch.ones(32)},
            "model: units of kind hidden cannot be gated, or nothing reads them. Gates are for kv_head, mlp_channel, "
            "layer.",
        ),
        (
            [not_linear],
            {"model.x": torch.ones(32)},
            "model.x: model.embed_tokens.weight reads its units along dimension 1 of a Embedding. Gates need the input "
            "features of an nn.Linear or Conv1D.",
        ),
        (
            [axes[0], axes[-1]],
            {"model.layers": torch.ones(2)},
            "model.layers: block 0 needs an axis of KV heads and one of MLP channels, which name the layers that add "
            "to the residual stream; found model.layers.0.self_attn. Pass all axes of the model.",
        ),
    ]
    for given_axes, gates, message in cases:
        with pytest.raises(TargetError) as error:
            with gated(model, given_axes, gates):
                pass
        assert str(error.value) == message
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in model.modules())
