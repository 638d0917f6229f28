"""The loops that learn which units stay: on a model in which the useless units are known."""

from __future__ import annotations

import copy

import pytest
import torch

from hf_adaptive_sparse.errors import ConfigError, DataError, FormatError, TrainingError
from hf_adaptive_sparse.hf.data import WindowDataset
from hf_adaptive_sparse.hf.learning_progress import LearningProgress
from hf_adaptive_sparse.hf.loss_gradients import causal_loss
from hf_adaptive_sparse.hf.unit_gates import gated
from hf_adaptive_sparse.hf.unit_learning import learn_by_policy, learn_to_shape
from hf_adaptive_sparse.methods.hard_concrete import HardConcreteConfig
from hf_adaptive_sparse.methods.policy_gradient import PolicyGradientConfig

from ..tiny_models import tiny_model
from .llama_axes import llama_axes

SMALL = {"hidden_size": 16, "intermediate_size": 8, "num_attention_heads": 4, "num_key_value_heads": 4, "head_dim": 4}
WINDOWS = WindowDataset((torch.arange(24 * 12) % 7 + 3).view(24, 12).int())


@pytest.fixture(scope="module")
def model():
    """Counts 3, 4, ... 9, 3, ... and was given units that disturb it: head 1 and channels 5, 6, 7 of each block."""
    model = tiny_model("llama", seed=1, **SMALL)
    wrong = [(axis, unit) for axis in llama_axes(model) for unit in ((1,) if axis.kind == "kv_head" else (5, 6, 7))]
    parameters = dict(model.named_parameters())
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(60):
        with torch.no_grad():
            for axis, unit in wrong:
                for span in axis.spans:
                    parameters[span.tensor].index_fill_(span.dim, span.index[unit], 0.0)
        total, count = causal_loss(model, WINDOWS.tokens.long())
        (total / count).backward()
        optimizer.step()
        optimizer.zero_grad()
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for axis, unit in wrong:
            for span in axis.spans:
                shape = parameters[span.tensor].index_select(span.dim, span.index[unit]).shape
                noise = 0.2 * torch.randn(shape, generator=generator)
                parameters[span.tensor].index_copy_(span.dim, span.index[unit], noise)
    return model


def loss_of(model):
    with torch.no_grad():
        total, count = causal_loss(model, WINDOWS.tokens.long())
    return float(total / count)


def loss_under(model, axes, keep):
    with gated(model, axes, {name: each.float() for name, each in keep.items()}):
        return loss_of(model)


def test_the_policy_finds_units_that_disturb_without_a_backward_pass(model):
    axes, before = llama_axes(model), {name: each.clone() for name, each in model.state_dict().items()}

    def loss(module, batch):
        assert not torch.is_grad_enabled() and not module.training
        return causal_loss(module, batch)

    model.train()
    config = PolicyGradientConfig(steps=150, learning_rate=0.1, baseline="batch")
    shown = []
    found = learn_by_policy(
        model, axes, WINDOWS, 0.7, config=config, batch_size=8, seed=0, loss=loss, on_step=shown.append
    )
    assert all(module.training for module in model.modules())
    model.eval()
    assert all(torch.equal(each, before[name]) for name, each in model.state_dict().items())
    assert loss_of(model) > 1.5 and loss_under(model, axes, found.keep) < 0.5
    assert sum(int((~each).sum()) for each in found.keep.values()) == 2 * 1 + 5 + 1  # floor(0.7 n): 5 of 8, 11 of 16
    assert shown == found.history and [each["step"] for each in shown] == list(range(1, 151))
    early, late = (sum(each["loss"] for each in part) for part in (shown[:20], shown[-20:]))
    assert late < 0.6 * early and shown[-1]["undecided"] < shown[0]["undecided"]
    assert list(found.gates) == list(found.keep) == [axis.name for axis in axes]


def test_the_same_seed_learns_the_same_by_policy(model):
    axes, config = llama_axes(model), PolicyGradientConfig(steps=5, learning_rate=0.1)
    runs = [learn_by_policy(model, axes, WINDOWS, 0.7, config=config, seed=seed) for seed in (3, 3, 4)]
    assert runs[0].history == runs[1].history != runs[2].history
    assert all(torch.equal(each, runs[1].gates[name]) for name, each in runs[0].gates.items())


def test_gates_alone_reach_the_shape_and_find_units_that_disturb(model):
    model = copy.deepcopy(model)
    axes, before = llama_axes(model), {name: each.clone() for name, each in model.state_dict().items()}
    config = HardConcreteConfig(steps=120, weight_lr=0.0, gate_lr=0.2, multiplier_lr=0.2)
    shape = {"kv_head": 3, "mlp_channel": 5}
    found = learn_to_shape(model, axes, shape, WINDOWS, config=config, batch_size=8, fold=False)
    assert all(torch.equal(each, before[name]) for name, each in model.state_dict().items())
    assert all(parameter.requires_grad and parameter.grad is None for parameter in model.parameters())
    assert not model.training
    assert {name: int(each.sum()) for name, each in found.keep.items()} == {
        axis.name: shape[axis.kind] for axis in axes
    }
    assert loss_of(model) > 1.5 and loss_under(model, axes, found.keep) < 0.1
    assert not any(found.keep[axis.name][1] for axis in axes if axis.kind == "kv_head")
    last = found.history[-1]
    assert list(last) == ["step", "loss", "penalty", "sparsity/kv_head", "sparsity/mlp_channel"]
    assert last["step"] == 120
    assert last["sparsity/kv_head"] == pytest.approx(0.25, abs=0.15)
    assert last["sparsity/mlp_channel"] == pytest.approx(0.375, abs=0.15)


def test_with_its_weights_a_model_is_trained_and_folded(model):
    axes = llama_axes(model, with_layers=True)
    config = HardConcreteConfig(steps=60, weight_lr=3e-3, gate_lr=0.3, multiplier_lr=0.3)
    shape = {"layer": 1, "kv_head": 3, "mlp_channel": 5}
    first, second = copy.deepcopy(model), copy.deepcopy(model)
    found = learn_to_shape(first, axes, shape, WINDOWS, config=config)
    unfolded = learn_to_shape(second, axes, shape, WINDOWS, config=config, fold=False)
    assert found.history == unfolded.history  # the same seed
    assert int(found.keep["model.layers"].sum()) == 1
    assert not all(torch.equal(each, model.state_dict()[name]) for name, each in second.state_dict().items())
    with gated(second, axes, found.gates):
        expected = loss_of(second)
    assert loss_of(first) == pytest.approx(expected, abs=1e-5)
    closed = int((~found.keep["model.layers"]).nonzero())
    assert not first.model.layers[closed].self_attn.o_proj.weight.any()
    assert not first.model.layers[closed].mlp.down_proj.weight.any()
    assert all(parameter.grad is None for parameter in first.parameters())


class Killed(Exception):
    """The process ends here."""


def killed_after(step):
    def on_step(entry):
        if entry["step"] == step:
            raise Killed

    return on_step


def test_gates_that_were_killed_go_on_to_the_same_bits(tmp_path):
    axes, shape = llama_axes(tiny_model("llama", **SMALL)), {"kv_head": 3, "mlp_channel": 5}
    config = HardConcreteConfig(steps=9, weight_lr=3e-3, gate_lr=0.3, multiplier_lr=0.3)

    def learn(**more):
        # With dropout, whose random numbers are those of torch.
        model = tiny_model("llama", seed=1, attention_dropout=0.2, **SMALL)
        torch.manual_seed(0)
        return model, learn_to_shape(model, axes, shape, WINDOWS, config=config, **more)

    whole, expected = learn()
    progress = LearningProgress(tmp_path / "gates.safetensors", every=2)
    with pytest.raises(Killed):
        learn(progress=progress, on_step=killed_after(5))
    shown = []
    for first in (5, None):  # in the middle, and once more when all steps are done
        torch.manual_seed(7)
        again, found = learn(progress=progress, on_step=shown.append)
        assert (shown[0]["step"] if shown else None) == first
        assert found.history == expected.history
        assert all(torch.equal(each, found.gates[name]) for name, each in expected.gates.items())
        assert all(torch.equal(each, again.state_dict()[name]) for name, each in whole.state_dict().items())
        shown.clear()
    progress.remove()
    assert not list(tmp_path.iterdir())


def test_a_policy_that_was_killed_goes_on_to_the_same_bits(model, tmp_path):
    axes, config = llama_axes(model), PolicyGradientConfig(steps=9, learning_rate=0.1)
    expected = learn_by_policy(model, axes, WINDOWS, 0.7, config=config)
    progress = LearningProgress(tmp_path / "policy.safetensors", every=4)
    with pytest.raises(Killed):
        learn_by_policy(model, axes, WINDOWS, 0.7, config=config, progress=progress, on_step=killed_after(7))
    shown = []
    found = learn_by_policy(model, axes, WINDOWS, 0.7, config=config, progress=progress, on_step=shown.append)
    assert [entry["step"] for entry in shown] == [5, 6, 7, 8, 9]
    assert found.history == expected.history
    assert all(torch.equal(each, found.gates[name]) for name, each in expected.gates.items())
    assert all(torch.equal(each, found.keep[name]) for name, each in expected.keep.items())


def test_a_run_goes_on_only_with_its_own_settings_and_an_intact_file(model, tmp_path):
    axes, file = llama_axes(model), tmp_path / "policy.safetensors"
    config = PolicyGradientConfig(steps=2)
    learn_by_policy(model, axes, WINDOWS, 0.7, config=config, progress=LearningProgress(file))
    with pytest.raises(ConfigError) as error:
        other = WindowDataset(WINDOWS.tokens[:12])
        learn_by_policy(model, axes, other, 0.8, config=config, seed=1, progress=LearningProgress(file))
    start, _, rest = str(error.value).partition("windows was ")
    assert start == f"{file}: cannot go on with other settings: keep_fraction was 0.7 and is 0.8; seed was 0 and is 1; "
    assert rest.endswith(". Use the old ones, or another file.")
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(FormatError) as damaged:
        learn_by_policy(model, axes, WINDOWS, 0.7, config=config, progress=LearningProgress(file))
    assert str(damaged.value).startswith(f"{file}: cannot be read (")
    assert str(damaged.value).endswith("). Remove the file and start again.")
    with pytest.raises(ConfigError) as every:
        LearningProgress(file, every=0)
    assert str(every.value) == "every is a number of steps >= 1, got 0."


def test_errors_say_what_to_do(model):
    axes = llama_axes(model)
    with pytest.raises(DataError) as few:
        learn_by_policy(model, axes, WINDOWS, 0.7, batch_size=25)
    assert str(few.value) == "there are 24 windows, fewer than batch_size=25. Give more text, or lower it."
    with pytest.raises(ConfigError) as none:
        learn_to_shape(model, axes, {"kv_head": 2}, WINDOWS, batch_size=0)
    assert str(none.value) == "batch_size is at least 1, got 0."
    with pytest.raises(TrainingError) as broken:
        config, nan = HardConcreteConfig(steps=1, weight_lr=0.0), torch.tensor(torch.nan)
        learn_to_shape(model, axes, {"kv_head": 2}, WINDOWS, config=config, loss=lambda *_: (nan, 1))
    assert str(broken.value) == "step 0: the loss is nan. Lower weight_lr, or load the model in float32 or bfloat16."
    assert all(parameter.requires_grad for parameter in model.parameters())
