"""What one matrix at 2:4 does: the error is that of its outputs, the loss that of the model, which stays as it was."""

from __future__ import annotations

import pytest
import torch

from hf_adaptive_sparse.hf.evaluation import perplexity
from hf_adaptive_sparse.hf.layer_sensitivity import layer_sensitivity
from hf_adaptive_sparse.patterns import NMPattern
from tests.tiny_models import tiny_model, tokens


@pytest.fixture(scope="module")
def model():
    return tiny_model("llama", seed=3)


def inputs_of(model, name: str, windows: torch.Tensor) -> torch.Tensor:
    seen = []
    handle = model.get_submodule(name).register_forward_pre_hook(lambda module, args: seen.append(args[0].detach()))
    model(windows)
    handle.remove()
    return seen[0].flatten(0, 1)


def test_errors_and_losses_are_those_of_a_model_with_one_pruned_matrix(model):
    windows = tokens(6, 16)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    predicted = layer_sensitivity(model, windows, batch_size=4)
    measured = layer_sensitivity(model, windows, batch_size=4, measure=True)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert len(predicted) == len(measured) == 14
    dense = perplexity(model, windows).nll
    for guess, found in zip(predicted, measured, strict=True):
        assert (guess.name, guess.shape, guess.measured, found.measured) == (found.name, found.shape, False, True)
        module = model.get_submodule(found.name)
        x = inputs_of(model, found.name, windows)
        weight = module.weight.data.clone()
        keep = NMPattern(2, 4).keep_mask(weight.abs() * x.norm(dim=0), 0.5)
        pruned = weight * keep
        error = ((x @ (pruned - weight).t()).square().sum() / (x @ weight.t()).square().sum()).item()
        assert found.error == pytest.approx(error, rel=1e-3) == guess.error
        module.weight.data.copy_(pruned)
        assert found.loss == pytest.approx(perplexity(model, windows).nll - dense, abs=1e-6)
        module.weight.data.copy_(weight)
        assert guess.loss > 0 and guess.trace == found.trace > 0


def test_skipped_modules_are_left_out_and_blocks_are_counted(model):
    seen = []
    found = layer_sensitivity(
        model, tokens(4, 16), skip=["mlp"], on_block=lambda done, blocks: seen.append((done, blocks))
    )
    assert {each.name.split(".")[3] for each in found} == {"self_attn"} and seen == [(1, 2), (2, 2)]
