"""Fisher traces and weight gradients from one backward pass, against gradients of the weights themselves."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from hf_adaptive_sparse.errors import CalibrationError, ConfigError, DataError, TargetError
from hf_adaptive_sparse.hf.blocks import block_linears, find_blocks
from hf_adaptive_sparse.hf.loss_gradients import fisher_traces, weight_gradients

from ..tiny_models import tiny_model, tokens
from .walked_models import any_model, linears

WINDOWS = tokens(4, 10)
TYPES = ("llama", "gpt2", "opt", "mixtral", "gpt_oss", "qwen2_moe")


def members_of(model):
    stack = find_blocks(model)
    return {name: member for index in range(len(stack.blocks)) for name, member in block_linears(stack, index).items()}


def gradient_of(member):
    """The gradient of a weight [out, in] after a backward pass; zero where no token went."""
    gradient = member.parameter.grad
    gradient = torch.zeros_like(member.parameter) if gradient is None else gradient
    gradient = gradient if member.expert is None else gradient[member.expert]
    return gradient.t() if member.transposed else gradient


def window_gradients(model):
    """Reference: a backward pass for every window."""
    members, found = members_of(model), {}
    for window in WINDOWS:
        model.zero_grad()
        model(input_ids=window[None], labels=window[None]).loss.backward()
        for name, member in members.items():
            found.setdefault(name, []).append(gradient_of(member).clone())
    model.zero_grad()
    return {name: torch.stack(parts) for name, parts in found.items()}


@pytest.mark.parametrize("batch_size", [1, 3])
@pytest.mark.parametrize("model_type", TYPES)
def test_weight_gradients_are_root_mean_squares_over_windows(model_type, batch_size):
    model = any_model(model_type)
    expected = window_gradients(model)
    found = weight_gradients(model, WINDOWS, batch_size=batch_size)
    assert list(found) == list(expected)
    for name, gradients in expected.items():
        assert found[name].dtype == torch.float32 and found[name].shape == members_of(model)[name].shape
        torch.testing.assert_close(found[name], gradients.square().mean(0).sqrt(), rtol=1e-3, atol=1e-6)
    assert max(float(value.max()) for value in found.values()) > 1e-3


@pytest.mark.parametrize("model_type", ["llama", "gpt2"])
def test_the_fisher_trace_is_the_mean_square_of_the_gradients_of_single_tokens(model_type):
    model = any_model(model_type)
    kept = {}

    def keep(name):
        def hook(module, args, output):
            output.retain_grad()
            kept.setdefault(name, []).append((args[0].detach(), output))

        return hook

    handles = [module.register_forward_hook(keep(name)) for name, module in linears(model).items()]
    logits = model(input_ids=WINDOWS).logits[:, :-1]
    F.cross_entropy(logits.flatten(0, 1), WINDOWS[:, 1:].flatten(), reduction="sum").backward()
    for handle in handles:
        handle.remove()
    found = fisher_traces(model, WINDOWS, batch_size=3)
    assert list(found) == list(members_of(model))
    for name, trace in found.items():
        ((x, y),) = kept[name]
        total = 0.0
        for token, g in zip(x.flatten(0, -2), y.grad.flatten(0, -2), strict=True):
            total += float(torch.outer(g, token).square().sum())
        assert trace.tokens == 40 and trace.where == name
        assert trace.trace == pytest.approx(total / 40, rel=1e-3)


@pytest.mark.parametrize("model_type", ["mixtral", "gpt_oss"])
def test_the_fisher_trace_of_an_expert_counts_the_tokens_routed_to_it(model_type):
    model = any_model(model_type)
    routed = {}

    def count(name):
        def hook(module, args):
            routed[name] = torch.bincount(args[1].flatten(), minlength=4)

        return hook

    for name, module in model.named_modules():
        if name.endswith("mlp.experts"):
            module.register_forward_pre_hook(count(name))
    found = fisher_traces(model, WINDOWS[:1])
    for name, trace in found.items():
        member = members_of(model)[name]
        if member.expert is not None:
            assert trace.tokens == routed[name.partition(f".{member.key}")[0]][member.expert]
    # Of two tokens the second one has no prediction, so in the last block only the first one has a gradient.
    window = WINDOWS[:1, :2]
    model.zero_grad()
    model(input_ids=window, labels=window).loss.backward()
    first = [name for name in found if "layers.1.mlp.experts.down_proj" in name]
    traces = fisher_traces(model, window, first)
    for name in first:
        expected = float(gradient_of(members_of(model)[name]).square().sum())
        assert traces[name].weights == pytest.approx(expected, rel=1e-3, abs=1e-12)
    assert max(traces[name].weights for name in first) > 0


def test_only_the_weights_that_are_named_are_measured():
    model = tiny_model()
    names = ["model.layers.1.mlp.up_proj", "model.layers.0.self_attn.q_proj"]
    assert list(fisher_traces(model, WINDOWS, names)) == list(weight_gradients(model, WINDOWS, names)) == names
    with pytest.raises(TargetError) as error:
        fisher_traces(model, WINDOWS, ["model.layers.1.mlp.up"])
    assert str(error.value) == (
        "model.layers.1.mlp.up: is no weight of a block of LlamaForCausalLM; the closest are "
        "model.layers.1.mlp.up_proj, model.layers.0.mlp.up_proj, model.layers.1.mlp.gate_proj."
    )


@pytest.mark.parametrize("fails", [False, True])
def test_the_model_is_as_it_was_afterwards(fails):
    model = any_model("mixtral").train()
    model.model.embed_tokens.weight.requires_grad = False
    if fails:
        with torch.no_grad():
            model.lm_head.weight[0, 0] = float("nan")

    def traces():
        return [
            (
                name,
                module.training,
                len(module._forward_pre_hooks),
                len(module._forward_hooks),
                "forward" in vars(module),
            )
            for name, module in model.named_modules()
        ] + [(name, p.requires_grad, p.grad is None) for name, p in model.named_parameters()]

    before, weights = traces(), {name: tensor.clone() for name, tensor in model.state_dict().items()}
    if fails:
        with pytest.raises(CalibrationError) as error:
            fisher_traces(model, WINDOWS)
        assert str(error.value) == (
            "the loss of the dense model is nan on batch 0 of the text. Load the model in float32 or bfloat16, and "
            "check it."
        )
    else:
        fisher_traces(model, WINDOWS)
    assert traces() == before
    state = model.state_dict()
    assert all(torch.equal(weight.nan_to_num(), state[name].nan_to_num()) for name, weight in weights.items())


def test_windows_without_a_prediction_are_refused():
    with pytest.raises(DataError) as error:
        fisher_traces(tiny_model(), WINDOWS[:, :1])
    assert str(error.value) == (
        "windows of 1 token hold nothing to predict, so the model has no loss on them. Give windows of at least 2."
    )


def test_a_model_that_predicts_no_next_token_needs_a_loss():
    model = any_model("bert")
    with pytest.raises(ConfigError) as error:
        fisher_traces(model, WINDOWS)
    assert str(error.value) == (
        "BertForMaskedLM: is no causal language model. Pass `loss`, a function of the model and a batch of tokens that "
        "returns the sum of its losses and how many they are."
    )

    def loss(model, batch):
        masked = batch.clone()
        masked[:, ::3] = 1
        logits = model(input_ids=masked).logits[:, ::3].flatten(0, 1)
        return F.cross_entropy(logits, batch[:, ::3].flatten(), reduction="sum"), logits.shape[0]

    traces = fisher_traces(model, WINDOWS, loss=loss)
    assert len(traces) == 12 and all(trace.trace > 0 for trace in traces.values())
    gradients = weight_gradients(model, WINDOWS, loss=loss)
    model.zero_grad()
    total, count = loss(model, WINDOWS[:1])
    (total / count).backward()
    name = "bert.encoder.layer.1.output.dense"
    expected = model.get_submodule(name).weight.grad.abs()
    torch.testing.assert_close(weight_gradients(model, WINDOWS[:1], loss=loss)[name], expected, rtol=1e-3, atol=1e-6)
    assert gradients[name].shape == (32, 64)


def test_windows_that_cannot_be_told_apart_are_refused():
    class Packing(torch.nn.Module):
        """Sends every second token through a layer of its own."""

        def __init__(self, layer):
            super().__init__()
            self.layer, self.own = layer, torch.nn.Linear(32, 32)

        def forward(self, x):
            flat = x.flatten(0, 1)
            return self.layer(x) + self.own(flat[::2]).repeat_interleave(2, 0).view_as(x)

    model = tiny_model()
    model.model.layers[0].mlp = Packing(model.model.layers[0].mlp)
    with pytest.raises(ConfigError) as error:
        weight_gradients(model, WINDOWS, batch_size=2)
    assert str(error.value) == (
        "model.layers.0.mlp.own: reads [10, 32], in which the windows of a batch cannot be told apart. Use "
        "batch_size=1."
    )
    assert weight_gradients(model, WINDOWS, batch_size=1)["model.layers.0.mlp.own"].abs().sum() > 0
    assert fisher_traces(model, WINDOWS, batch_size=2)["model.layers.0.mlp.own"].tokens == 20
