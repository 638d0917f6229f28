"""The probe of structural pruning: what it measures, and that it leaves nothing behind."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from hf_adaptive_sparse.errors import CalibrationError, ConfigError, DataError, TargetError
from hf_adaptive_sparse.hf.data import WindowDataset
from hf_adaptive_sparse.hf.unit_statistics import STATISTICS, unit_statistics
from hf_adaptive_sparse.unit_scores import NEEDS, UNIT_SCORES
from hf_adaptive_sparse.units import Axis, Span
from tests.reference import unit_statistics as reference
from tests.tiny_models import tiny_model, tokens
from tests.unit_axes import axes_of_llama, channels_of_gpt2, consecutive

ALL = frozenset(STATISTICS)


def small_llama(**changes):
    """Two blocks of two KV heads with two query heads each, and six channels."""
    model = tiny_model(intermediate_size=6, head_dim=4, **changes)
    return model, axes_of_llama(model)


def small_gpt2():
    model = tiny_model("gpt2", n_embd=8, n_head=2)
    return model, channels_of_gpt2(model)


MODELS = {"llama": small_llama, "gpt2": small_gpt2}


def names_of(axes):
    return list(dict.fromkeys(span.tensor for axis in axes for span in axis.spans))


@pytest.mark.parametrize("family", MODELS)
@pytest.mark.parametrize("batch_size", [1, 2, 8])
def test_everything_is_that_of_the_reference_however_windows_are_batched(family, batch_size):
    model, axes = MODELS[family]()
    windows = tokens(3, 7)
    stats = unit_statistics(model, windows, axes, ALL - {"losses"}, batch_size=batch_size)
    assert stats.loss == pytest.approx(reference.mean_loss(model, windows).item(), rel=1e-6)
    expected = reference.gradients(model, windows, names_of(axes))
    assert stats.gradients.keys() == expected.keys()
    for name, gradient in expected.items():
        assert stats.gradients[name].dtype == torch.float32
        torch.testing.assert_close(stats.gradients[name], gradient, rtol=1e-4, atol=1e-7)
    assert stats.inputs.keys() == {span.tensor for axis in axes for span in axis.spans if span.reads}
    for name, moments in stats.inputs.items():
        x = reference.inputs(model, windows, name).double()
        assert moments.tokens == windows.numel()
        for found, direct in (
            (moments.mean, x.mean((0, 1))),
            (moments.variance, x.flatten(0, 1).var(0, correction=0)),
            (moments.norm, x.flatten(0, 1).norm(dim=0)),
            (moments.magnitudes, x.abs().mean(1).square().sum(0)),
        ):
            assert found.dtype == torch.float64
            torch.testing.assert_close(found, direct, rtol=1e-5, atol=1e-12)
        gram = stats.grams[name]
        assert gram.tokens == windows.numel() and gram.where.startswith(name.rpartition(".")[0])
        torch.testing.assert_close(gram.gram.double(), x.flatten(0, 1).T @ x.flatten(0, 1), rtol=1e-4, atol=1e-6)
    cosines = reference.cosines(model, windows)
    assert stats.cosines.shape == (2,) and stats.cosines.dtype == torch.float64
    torch.testing.assert_close(stats.cosines[:-1], cosines, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("family", MODELS)
def test_the_rise_of_the_loss_without_a_unit_is_that_of_zero_columns(family):
    model, axes = MODELS[family]()
    windows = tokens(3, 7)
    stats = unit_statistics(model, windows, axes[:2], {"losses"}, batch_size=2)
    assert stats.losses.keys() == {axis.name for axis in axes[:2]}
    for axis in axes[:2]:
        assert stats.losses[axis.name].shape == (axis.count,)
        for unit in (0, axis.count - 1):
            expected = reference.rise_without(model, windows, axis, unit)
            assert float(stats.losses[axis.name][unit]) == pytest.approx(expected, abs=2e-6)


@pytest.mark.parametrize("name", UNIT_SCORES)
def test_every_score_has_what_it_needs_and_nothing_else_is_measured(name):
    model, axes = small_llama()
    stats = unit_statistics(model, tokens(2, 6), axes, NEEDS[name])
    for axis in axes:
        scores = UNIT_SCORES[name](axis, dict(model.named_parameters()), stats)
        assert scores.shape == (axis.count,) and scores.isfinite().all()
    filled = {"gradients": stats.gradients, "inputs": stats.inputs, "losses": stats.losses}
    assert {field for field, value in filled.items() if value} == NEEDS[name]
    assert stats.cosines is None and stats.loss > 0


@pytest.mark.parametrize("needs", [set(), {"gradients"}, ALL])
@pytest.mark.parametrize("fails", [False, True])
def test_the_model_is_as_it_was_afterwards_however_it_ends(needs, fails):
    model, axes = small_llama()
    model.train()
    model.model.layers[0].mlp.eval()
    model.model.layers[1].mlp.up_proj.weight.requires_grad = False
    model.lm_head.weight.requires_grad = False
    gradient = torch.ones_like(model.model.layers[0].mlp.up_proj.weight)
    model.model.layers[0].mlp.up_proj.weight.grad = gradient
    weights = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    before = {name: (p, p.requires_grad, p.grad) for name, p in model.named_parameters()}
    modes = {name: module.training for name, module in model.named_modules()}

    def loss(model, batch):
        if fails:
            raise RuntimeError("stopped")
        logits = model(input_ids=batch).logits
        return logits.logsumexp(-1).sum(), batch.numel()

    if fails:
        with pytest.raises(RuntimeError, match="^stopped$"):
            unit_statistics(model, tokens(2, 6), axes, needs, loss=loss)
    else:
        unit_statistics(model, tokens(2, 6), axes, needs, loss=loss)
    assert gradient.eq(1).all()
    for name, parameter in model.named_parameters():
        same, required, grad = before[name]
        assert parameter is same and parameter.requires_grad == required and parameter.grad is grad
        assert torch.equal(parameter, weights[name])
        assert not parameter._post_accumulate_grad_hooks
    assert modes == {name: module.training for name, module in model.named_modules()}
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_gradients_of_bfloat16_are_summed_in_float32_and_need_no_requires_grad():
    model, axes = small_llama(dtype=torch.bfloat16)
    model.requires_grad_(False)
    windows = tokens(4, 6)
    with torch.no_grad():
        stats = unit_statistics(model, windows, axes, {"gradients"}, batch_size=1)
    model.requires_grad_(True)
    name = "model.layers.1.mlp.up_proj.weight"
    parts = [reference.gradients(model, window[None], [name])[name].float() for window in windows]
    torch.testing.assert_close(stats.gradients[name], torch.stack(parts).mean(0), rtol=2e-2, atol=1e-5)
    assert stats.gradients[name].dtype == torch.float32
    assert not torch.equal(stats.gradients[name], stats.gradients[name].bfloat16().float())


def test_dropout_is_off():
    model, axes = small_llama(attention_dropout=0.5)
    model.train()
    first, second = (unit_statistics(model, tokens(2, 6), axes, {"cosines", "inputs"}) for _ in range(2))
    assert torch.equal(first.cosines, second.cosines) and first.loss == second.loss


def test_blocks_that_return_a_tuple_have_the_same_cosines():
    model, axes = small_llama()
    expected = unit_statistics(model, tokens(2, 6), axes, {"cosines"}).cosines

    class Tupled(nn.Module):
        def __init__(self, block):
            super().__init__()
            self.block = block

        def forward(self, hidden_states, **kwargs):
            return (self.block(hidden_states, **kwargs), "more")

    class Unpacks(nn.ModuleList):
        """Gives the model what it expects of its blocks, after the hooks have seen a tuple."""

        def __getitem__(self, index):
            found = super().__getitem__(index)
            if not isinstance(index, slice):
                return found
            return [lambda h, block=block, **kwargs: block(h, **kwargs)[0] for block in self]

    model.model.layers = Unpacks([Tupled(block) for block in model.model.layers])
    stats = unit_statistics(model, tokens(2, 6), [], {"cosines"})
    assert torch.equal(stats.cosines, expected)


def test_windows_of_a_dataset_are_its_tokens():
    model, axes = small_llama()
    windows = tokens(2, 6)
    dataset = WindowDataset(windows)
    assert unit_statistics(model, dataset, axes, set()).loss == unit_statistics(model, windows, axes, set()).loss


def test_windows_of_one_token_have_no_loss():
    model, axes = small_llama()
    with pytest.raises(DataError) as raised:
        unit_statistics(model, tokens(2, 1), axes, {"gradients"})
    assert str(raised.value) == (
        "windows of 1 token hold nothing to predict, so the model has no loss on them. Give windows of at least 2."
    )


@pytest.mark.parametrize("needs", [{"gradients"}, {"inputs"}, {"cosines"}, set()])
def test_a_module_that_returns_inf_is_named_with_its_block(needs):
    model, axes = small_llama()
    with torch.no_grad():
        model.model.layers[1].mlp.gate_proj.weight.fill_(3e38)
    with pytest.raises(CalibrationError) as raised:
        unit_statistics(model, tokens(3, 6), axes, needs, batch_size=2)
    assert str(raised.value) == (
        "model.layers.1.mlp.gate_proj (block 1) returns NaN or inf: the loss is nan on batch 0 of the text. Load "
        "the model in float32 or bfloat16, and check it."
    )


def test_a_weight_that_is_nan_is_named():
    model, axes = small_llama()
    with torch.no_grad():
        model.model.layers[1].self_attn.k_proj.weight[0, 0] = torch.nan
    with pytest.raises(CalibrationError) as raised:
        unit_statistics(model, tokens(2, 6), axes, set())
    assert str(raised.value) == (
        "model.layers.1.self_attn.k_proj.weight: the weight holds NaN or inf. Load a model without them."
    )


def test_a_loss_that_is_nan_though_no_block_returns_it_is_refused():
    model, axes = small_llama()
    with torch.no_grad():
        model.lm_head.weight[5] = torch.nan
    with pytest.raises(CalibrationError) as raised:
        unit_statistics(model, tokens(2, 6), axes, {"inputs"})
    assert str(raised.value) == (
        "no block returns NaN or inf: the loss is nan on batch 0 of the text. Load the model in float32 or bfloat16, "
        "and check it."
    )


def test_a_gradient_that_is_nan_is_named_with_its_block():
    model, axes = small_llama()

    def loss(model, batch):
        x = model(input_ids=batch).logits
        return (x.sum() * 0.0).sqrt() + 1.0, 1  # the root has an infinite slope at 0, and 0 * inf is NaN

    with pytest.raises(CalibrationError) as raised:
        unit_statistics(model, tokens(2, 6), axes, {"gradients"}, loss=loss)
    assert str(raised.value) == (
        "model.layers.0.self_attn.q_proj (block 0): the gradient of weight holds NaN or inf. Load the model in float32 "
        "or bfloat16, and check its loss on this text."
    )


def test_units_that_no_linear_layer_reads_have_gradients_and_no_inputs():
    model = tiny_model()
    axis = Axis(
        "model.layers.0.mlp", "expert", 0, 4, (Span("model.layers.0.mlp.up_proj.weight", 0, consecutive(4, 1)),)
    )
    assert unit_statistics(model, tokens(2, 6), [axis], {"gradients"}).gradients
    for needs in ({"inputs"}, {"losses"}):
        with pytest.raises(TargetError) as raised:
            unit_statistics(model, tokens(2, 6), [axis], needs)
        assert str(raised.value) == (
            "model.layers.0.mlp: no linear layer reads units of kind expert alone, so their inputs are not measured. "
            "Use a score of weights, such as taylor or l2."
        )


def test_what_cannot_be_measured_is_refused():
    model, axes = small_llama()
    with pytest.raises(ConfigError) as raised:
        unit_statistics(model, tokens(2, 6), axes, {"hessian"})
    assert str(raised.value) == (
        "unknown statistic 'hessian'; the probe measures gradients, inputs, grams, losses, cosines."
    )
    with pytest.raises(ConfigError, match="^batch_size is at least 1, got 0.$"):
        unit_statistics(model, tokens(2, 6), axes, set(), batch_size=0)
    with pytest.raises(DataError):
        unit_statistics(model, tokens(2, 6) + 1000, axes, set())
    other = Axis("mlp", "mlp_channel", 0, 4, (Span("mlp.up.weight", 0, consecutive(4, 1)),))
    with pytest.raises(TargetError) as raised:
        unit_statistics(model, tokens(2, 6), [other], set())
    assert str(raised.value) == (
        "mlp: names mlp.up.weight, which is no parameter of LlamaForCausalLM. Find the axes of this model."
    )
