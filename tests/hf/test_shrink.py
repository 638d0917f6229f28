"""Shrinking in memory: to the parameter, layer by layer, between steps of training, and on after an interruption."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from transformers import PrinterCallback, Trainer, TrainingArguments

from hf_adaptive_sparse.errors import ConfigError, FormatError
from hf_adaptive_sparse.hf.data import WindowDataset
from hf_adaptive_sparse.hf.mask_state import last_complete_checkpoint
from hf_adaptive_sparse.hf.shrink import Shrinker, kv_values, shrink
from hf_adaptive_sparse.hf.shrink_training import ShrinkCallback, ShrinkTrainer
from hf_adaptive_sparse.hf.surgery import block_widths
from hf_adaptive_sparse.hf.trainer import DistillationConfig
from hf_adaptive_sparse.methods.adaptive_width.config import ALLOCATORS, ShrinkConfig, Stage
from hf_adaptive_sparse.unit_scores import UNIT_SCORES
from tests.tiny_models import tiny_model, tokens

TEXT = tokens(4, 16, seed=3)
STEPS = 12


def small_model(**changes):
    return tiny_model("llama", intermediate_size=32, num_key_value_heads=4, **changes)


def count(model) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize("allocation", ALLOCATORS)
def test_the_target_is_met_to_one_unit_and_the_model_still_runs(allocation):
    model = small_model()
    dense = count(model)
    report = shrink(model, TEXT, ShrinkConfig(target=0.8, step=0.1, allocation=allocation))
    smallest = 3 * 32  # one MLP channel
    assert 0 <= round(0.8 * dense) - report.parameters < smallest
    assert report.parameters == count(model)
    assert report.widths == block_widths(model)
    generated = model.generate(TEXT[:1], max_new_tokens=4, do_sample=False)
    assert generated.shape == (1, 20)


@pytest.mark.parametrize("score", sorted(UNIT_SCORES))
def test_every_score_shrinks(score):
    report = shrink(small_model(), TEXT, ShrinkConfig(target=0.85, step=0.5, score=score))
    assert report.parameters < report.dense_parameters


def test_what_stays_are_the_units_of_the_dense_model_that_the_report_names():
    dense, model = small_model(), small_model()
    report = shrink(model, TEXT, ShrinkConfig(target=0.75, step=0.1))
    lost = 0
    for block in range(2):
        kept = torch.tensor(report.kept[f"model.layers.{block}.mlp"])
        lost += 32 - len(kept)
        for name in ("gate_proj", "up_proj"):
            whole = dense.get_submodule(f"model.layers.{block}.mlp.{name}").weight
            assert torch.equal(model.get_submodule(f"model.layers.{block}.mlp.{name}").weight, whole[kept])
    assert lost > 0


def test_blocks_that_turn_the_stream_less_lose_more():
    model = small_model()
    with torch.no_grad():  # the second block hardly does anything
        for part in ("self_attn.o_proj", "mlp.down_proj"):
            model.get_submodule(f"model.layers.1.{part}").weight.mul_(1e-3)
    report = shrink(model, TEXT, ShrinkConfig(target=0.8, step=0.05))
    assert all(step.importance == [1.0, -1.0] for step in report.steps)
    assert report.widths[0]["intermediate_size"] > report.widths[1]["intermediate_size"]


def test_widths_end_equal_and_as_multiples_where_this_is_asked_for():
    report = shrink(small_model(), TEXT, ShrinkConfig(target=0.8, step=0.1, multiple_of=8, equal_widths=True))
    assert report.widths[0] == report.widths[1]
    assert report.widths[0]["intermediate_size"] % 8 == 0
    assert report.parameters < report.dense_parameters


@pytest.mark.parametrize("allocation", ["adaptive", "uniform", "global_threshold"])
@pytest.mark.parametrize("step", [0.005, 0.02, 0.3])
@pytest.mark.parametrize("target", [0.6, 0.7, 0.9])
def test_widths_by_block_end_as_multiples_however_small_the_steps_are(target, step, allocation):
    config = ShrinkConfig(target=target, step=step, multiple_of=8, allocation=allocation, score="l2")
    model = small_model()
    report = shrink(model, TEXT, config)
    assert all(block["intermediate_size"] % 8 == 0 for block in report.widths)
    # Half a multiple of each of both blocks, and what a head is larger than that.
    assert abs(report.parameters - target * report.dense_parameters) <= 2 * 8 * 3 * 32


@pytest.mark.parametrize("equal", [False, True])
@pytest.mark.parametrize("step", [0.05, 1.0])
def test_the_biases_of_a_repair_count(step, equal):
    """They are part of what is left, and of the smallest target that can be reached."""
    config = ShrinkConfig(target=0.8, step=step, score="flap", bias_repair=True, equal_widths=equal)
    shrinker = Shrinker(small_model(), TEXT, config)
    shrinker.check_target()
    shrinker.shrink_to(shrinker.target)
    assert shrinker.parameters == shrinker.target if equal else shrinker.parameters <= shrinker.target
    least = shrinker.dense_parameters - 2 * (31 * 3 * 32 + 3 * 4 * 8 * 32) + 4 * 32
    with pytest.raises(ConfigError) as error:
        shrink(small_model(), TEXT, replace(config, target=(least - 1) / shrinker.dense_parameters))
    assert f"Ask for at least {least} " in str(error.value)
    shrink(small_model(), TEXT, replace(config, target=(least + 1) / shrinker.dense_parameters))


def test_bias_repair_keeps_the_mean_of_what_the_readers_return():
    outputs = {}
    for repair in (False, True):
        model = small_model()
        hook = model.model.layers[0].mlp.down_proj.register_forward_hook(
            lambda module, inputs, output, repair=repair: outputs.__setitem__(repair, output.detach().mean((0, 1)))
        )
        if not repair:
            model(TEXT)
        else:
            shrink(model, TEXT, ShrinkConfig(target=0.97, step=1.0, score="flap", bias_repair=True))
            assert model.model.layers[0].mlp.down_proj.bias is not None
            model(TEXT)
        hook.remove()
    # Not to the digit: the attention before it lost heads too.
    torch.testing.assert_close(outputs[True], outputs[False], rtol=0.0, atol=0.2 * float(outputs[False].abs().max()))


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_repaired_layers_return_more_nearly_what_the_dense_ones_did(family):
    text, errors = tokens(8, 32, seed=3), {}
    for repair in (False, True):
        model = tiny_model(family)
        with torch.no_grad():
            dense = model(text).logits
            shrink(model, text, ShrinkConfig(target=0.9, step=0.1, repair=repair))
            errors[repair] = float((model(text).logits - dense).norm() / dense.norm())
    assert errors[True] < 0.7 * errors[False]


def test_a_target_that_cannot_be_reached_names_the_smallest_that_can():
    model = small_model()
    dense = count(model)
    least = dense - 2 * (31 * 3 * 32 + 3 * 4 * 8 * 32)
    with pytest.raises(ConfigError) as error:
        shrink(model, TEXT, ShrinkConfig(target=0.1))
    assert str(error.value) == (
        f"a target of {round(0.1 * dense)} parameters cannot be reached: without any kv_head and mlp_channel unit but "
        f"1 per block the model still has {least} of its {dense}. Ask for at least {least} ({least / dense:.4f} of "
        "them)."
    )
    assert count(model) == dense


def test_the_kv_cache_is_counted_from_the_heads_that_are_left():
    model = small_model()
    assert kv_values(model) == 2 * 2 * 4 * 8
    shrinker = Shrinker(model, TEXT, ShrinkConfig(target=0.5, step=0.5, allocation="uniform"))
    shrinker.shrink_to(shrinker.target)
    left = sum(widths["num_key_value_heads"] for widths in block_widths(model))
    assert left < 8
    assert kv_values(model) == 2 * left * 8


@pytest.mark.parametrize("target", [0.95, 0.8, 0.7])
def test_equal_widths_are_planned_and_reached_in_small_steps(target):
    """Heads go at different steps in different blocks, and all blocks end with as many."""
    model = small_model()
    shrinker = Shrinker(model, TEXT, ShrinkConfig(target=target, step=0.02, equal_widths=True))
    # One row of channels in two blocks, or one head of each, is what the nearest equal widths may miss it by.
    assert abs(shrinker.target - target * shrinker.dense_parameters) <= 3 * 2 * 32
    shrinker.shrink_to(shrinker.target)
    assert count(model) == shrinker.target
    first, second = block_widths(model)
    assert first == second


def test_a_target_that_cannot_be_reached_does_not_matter_to_a_learner_of_shapes():
    shrinker = Shrinker(small_model(), TEXT, ShrinkConfig(target=0.01))
    with pytest.raises(ConfigError):
        shrinker.check_target()
    shrinker.remove_learned({"model.layers": torch.tensor([True, False])})
    assert shrinker.report().parameters < shrinker.dense_parameters


def test_a_layer_that_is_left_stands_for_those_removed_behind_it():
    model = small_model(num_hidden_layers=5)
    shrinker = Shrinker(model, TEXT, ShrinkConfig(target=0.9))
    assert shrinker.replaced_layers == [0, 1, 2, 3, 4]
    shrinker.remove_learned({"model.layers": torch.tensor([False, True, False, False, True])})
    assert shrinker.replaced_layers == [3, 4]


# --- between steps of training --------------------------------------------------------------------------------


PLAN = {"target": 0.75, "stages": 3, "prune_fraction": 1.0, "step": 0.1, "allocation": "adaptive"}


def training(folder, resume=None, config=None, **more):
    """(model, callback) after a run of 12 steps in 3 stages, with a checkpoint every 4 steps."""
    model = small_model()
    config = config or ShrinkConfig(**PLAN)
    callback = ShrinkCallback(model, TEXT, config, judge=WindowDataset(tokens(4, 16, seed=5)))
    settings = TrainingArguments(
        output_dir=str(folder), max_steps=STEPS, per_device_train_batch_size=2, save_steps=4, report_to="none",
        use_cpu=True, learning_rate=1e-2, disable_tqdm=True, seed=0,
    )  # fmt: skip
    data = WindowDataset(tokens(40, 16, seed=1))
    trainer = ShrinkTrainer(model, settings, shrink=callback, train_dataset=data, **more)
    trainer.remove_callback(PrinterCallback)
    trainer.train(resume_from_checkpoint=None if resume is None else str(resume))
    return model, callback


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("shrink")
    return folder, *training(folder)


def test_training_is_interrupted_at_the_planned_steps_and_ends_at_the_target(whole):
    _, model, callback = whole
    dense = callback.shrinker.dense_parameters
    assert [entry["step"] for entry in callback.history] == [0, 2, 6]
    assert callback.history[-1]["parameters"] == count(model)
    assert 0 <= callback.shrinker.target - count(model) < 3 * 32
    parameters = [entry["parameters"] for entry in callback.history]
    assert parameters == sorted(parameters, reverse=True)
    assert all(later <= dense - (dense - callback.shrinker.target) * n // 3 for n, later in enumerate(parameters, 1))
    assert all(entry["before"] > 1.0 and entry["after"] > 1.0 for entry in callback.history)


@pytest.mark.parametrize("step", [4, 8])
def test_a_resumed_run_ends_with_bit_equal_weights(whole, tmp_path, step):
    folder, model, callback = whole
    again, second = training(tmp_path, resume=folder / f"checkpoint-{step}")
    assert second.report().kept == callback.report().kept
    assert second.history == callback.history
    for name, tensor in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor), name


def test_checkpoints_are_marked_complete(whole):
    folder, _, _ = whole
    assert last_complete_checkpoint(folder) == folder / "checkpoint-12"
    (folder / "checkpoint-12" / "shrink_state.json").rename(folder / "state")
    assert last_complete_checkpoint(folder) == folder / "checkpoint-8"
    (folder / "state").rename(folder / "checkpoint-12" / "shrink_state.json")


def test_resuming_with_another_config_names_what_differs(whole, tmp_path):
    folder, _, _ = whole
    with pytest.raises(ConfigError) as error:
        training(tmp_path, folder / "checkpoint-4", ShrinkConfig(**PLAN | {"target": 0.7, "score": "l2"}))
    assert str(error.value) == (
        "cannot resume with other settings: score was 'taylor' and is 'l2'; target was 0.75 and is 0.7. Use the old "
        "ones."
    )


def test_a_checkpoint_of_another_trainer_is_refused(tmp_path):
    (tmp_path / "checkpoint-4").mkdir()
    (tmp_path / "checkpoint-4" / "trainer_state.json").write_text(json.dumps({"global_step": 4}))
    with pytest.raises(FormatError) as error:
        training(tmp_path / "out", tmp_path / "checkpoint-4")
    assert str(error.value) == (
        f"{tmp_path / 'checkpoint-4'}: has no shrink_state.json, so it is no checkpoint of a shrinking run, or an "
        "incomplete one. Resume from another checkpoint."
    )


def test_moments_are_cut_with_the_weights_or_forgotten_where_this_is_asked_for(tmp_path):
    moments = {}
    for reset in (False, True):
        config = ShrinkConfig(target=0.75, stages=2, step=1.0, reset_moments=reset)
        model = small_model()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        callback = ShrinkCallback(model, TEXT, config)
        model(TEXT, labels=TEXT).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        callback._stages = [Stage(0, callback.shrinker.target)]
        callback.on_step_begin(arguments(tmp_path), State(), None, optimizer=optimizer)
        for parameter in model.parameters():
            assert optimizer.state[parameter]["exp_avg"].shape == parameter.shape
        moments[reset] = sum(float(each["exp_avg_sq"].sum()) for each in optimizer.state.values())
    assert moments[False] > 0.0
    assert moments[True] == 0.0


class State:
    global_step = 0
    max_steps = STEPS


def arguments(folder):
    return TrainingArguments(output_dir=str(folder), use_cpu=True, report_to="none")


def test_a_stock_trainer_takes_the_callback(tmp_path):
    model = small_model()
    callback = ShrinkCallback(model, TEXT, ShrinkConfig(target=0.8, stages=2, step=0.5))
    settings = TrainingArguments(
        output_dir=str(tmp_path), max_steps=4, per_device_train_batch_size=2, save_strategy="no", report_to="none",
        use_cpu=True, disable_tqdm=True,
    )  # fmt: skip
    trainer = Trainer(model, settings, train_dataset=WindowDataset(tokens(16, 16)), callbacks=[callback])
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    assert count(model) <= callback.shrinker.target


def test_the_dense_model_teaches_the_one_that_shrinks(tmp_path):
    _, callback = training(tmp_path, distillation=DistillationConfig(), teacher=small_model())
    assert len(callback.history) == 3


def test_wrong_combinations_are_refused(tmp_path):
    model = small_model()
    callback = ShrinkCallback(model, TEXT, ShrinkConfig())
    with pytest.raises(ConfigError) as error:
        ShrinkTrainer(small_model(), arguments(tmp_path), shrink=callback)
    assert str(error.value) == "the ShrinkCallback was made for another model than the Trainer gets."
    with pytest.raises(ConfigError) as error:
        ShrinkTrainer(model, arguments(tmp_path), shrink=callback, distillation=DistillationConfig())
    assert str(error.value) == (
        "distillation of a model that shrinks needs a teacher that does not: pass teacher=a copy of the dense model."
    )
    with pytest.raises(ConfigError) as error:
        ShrinkCallback(model, TEXT, ShrinkConfig(bias_repair=True))
    assert str(error.value) == (
        "bias_repair puts what removed units had on average into a bias, and training repairs that by itself. Leave it "
        "out, or prune without training with `shrink`."
    )
