"""AdaptiveSparseCallback in a stock Trainer: the same as a plain loop, step by step, also after a resume."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import Trainer, TrainerControl, TrainerState

from hf_adaptive_sparse.errors import ConfigError, FormatError, TrainingError
from hf_adaptive_sparse.hf import callbacks
from hf_adaptive_sparse.hf.callbacks import (
    COMPLETE_FILE,
    STATE_FILE,
    AdaptiveSparseCallback,
    last_complete_checkpoint,
)
from hf_adaptive_sparse.hf.sparse_layers import sparse_layers
from hf_adaptive_sparse.optim import SparseAdamW
from tests.hf.runs import (
    RATE,
    At,
    Recorder,
    add_pull,
    arguments,
    assert_same,
    examples,
    expected_keep,
    plain_loop,
    snapshot,
    sparse_model,
)

FIRST = "model.layers.0.self_attn.q_proj"
SPARSE = {"optimizer_cls_and_kwargs": (SparseAdamW, {"lr": RATE})}


def trainer_of(model, args, *first, callback=None, **kwargs) -> Trainer:
    """A stock Trainer; callbacks `first` come before ours."""
    callback = callback or AdaptiveSparseCallback()
    kwargs.setdefault("data_collator", Recorder())
    return Trainer(model=model, args=args, train_dataset=examples(), callbacks=[*first, callback], **kwargs)


def trained(folder: Path, *first, model=None, resume=None, callback=None, settings=None, **kwargs):
    """(trainer, callback in use) after a run."""
    model = sparse_model() if model is None else model
    trainer = trainer_of(model, arguments(folder, **(settings or {})), *first, callback=callback, **kwargs)
    trainer.train(resume_from_checkpoint=resume)
    return trainer, callback_of(trainer)


def callback_of(trainer: Trainer) -> AdaptiveSparseCallback:
    found = [each for each in trainer.callback_handler.callbacks if isinstance(each, AdaptiveSparseCallback)]
    assert len(found) == 1
    return found[0]


def losses(trainer: Trainer) -> list[dict]:
    return [entry for entry in trainer.state.log_history if "loss" in entry]


def begin(model, optimizer=None, callback=None, max_steps=6, global_step=0, **args) -> AdaptiveSparseCallback:
    """Fire on_train_begin as a Trainer does."""
    callback = callback or AdaptiveSparseCallback()
    values = {
        "n_gpu": 0, "fp16": False, "max_grad_norm": 1.0, "save_total_limit": None, "save_strategy": "no",
        "gradient_accumulation_steps": 1, "output_dir": "nowhere", "resume_from_checkpoint": None,
    }  # fmt: skip
    state = TrainerState(max_steps=max_steps, global_step=global_step)
    optimizer = optimizer or torch.optim.SGD(model.parameters())
    callback.on_train_begin(SimpleNamespace(**{**values, **args}), state, TrainerControl(), model, optimizer)
    return callback


# -- the pull on masked weights ------------------------------------------------------------------------------


@pytest.mark.parametrize("clip", [1000.0, 0.05], ids=["idle", "active"])
@pytest.mark.parametrize("accumulation", [1, 2])
def test_with_adamw_a_run_is_the_plain_loop_of_the_reference_rule(accumulation, clip, tmp_path):
    norm = "absolute" if accumulation == 1 else "relative"
    model, twin = (sparse_model(decay_norm=norm) for _ in range(2))
    recorder = Recorder()
    settings = {"gradient_accumulation_steps": accumulation, "max_grad_norm": clip}
    trainer, _ = trained(tmp_path, model=model, settings=settings, data_collator=recorder)
    assert isinstance(trainer.optimizer.optimizer, torch.optim.AdamW)
    layers = sparse_layers(twin)
    optimizer = torch.optim.AdamW(
        [parameter for parameter in twin.parameters() if parameter.requires_grad], lr=RATE, weight_decay=0.0
    )
    plain_loop(
        twin, recorder.batches, optimizer, steps=6, accumulation=accumulation, clip=clip,
        before_step=lambda step: add_pull(layers, step, 6),
    )  # fmt: skip
    assert_same(snapshot(model), snapshot(twin), tolerance=2e-5)
    norms = [entry["grad_norm"] for entry in losses(trainer)]
    assert (min(norms) > clip) if clip < 1 else (max(norms) < clip)


def test_without_the_pull_the_same_run_ends_elsewhere(tmp_path):
    ends = []
    for decay in (0.0, 2.0):
        model = sparse_model(decay=decay)
        trained(tmp_path, model=model)
        ends.append(snapshot(model))
    distance = (ends[0][f"{FIRST}.weight"] - ends[1][f"{FIRST}.weight"]).abs().max()
    assert distance > 1e-3  # fifty times what the comparisons above allow


@pytest.mark.parametrize(("accumulation", "clip"), [(1, 1000.0), (2, 0.05)])
def test_with_sparse_adamw_a_run_is_a_plain_loop_with_it(accumulation, clip, tmp_path):
    model, twin = (sparse_model() for _ in range(2))
    recorder = Recorder()
    settings = {"gradient_accumulation_steps": accumulation, "max_grad_norm": clip}
    trained(tmp_path, model=model, settings=settings, data_collator=recorder, **SPARSE)
    optimizer = SparseAdamW(
        [parameter for parameter in twin.parameters() if parameter.requires_grad],
        lr=RATE, decay=2.0, decay_norm="relative", decay_steps=3,
    )  # fmt: skip
    optimizer.bind((layer.weight, layer.keep) for layer in sparse_layers(twin))
    plain_loop(twin, recorder.batches, optimizer, steps=6, accumulation=accumulation, clip=clip)
    assert_same(snapshot(model), snapshot(twin), tolerance=1e-5)


@pytest.mark.parametrize("accumulation", [1, 2])
def test_the_backward_pull_is_added_before_clipping_and_shared_by_micro_batches(accumulation, tmp_path):
    model, twin = (sparse_model(decay_norm="absolute", decay=0.1) for _ in range(2))
    recorder = Recorder()
    settings = {"gradient_accumulation_steps": accumulation, "max_grad_norm": 0.05}
    callback = AdaptiveSparseCallback(decay_mode="backward")
    trained(tmp_path, model=model, settings=settings, data_collator=recorder, callback=callback)
    layers = sparse_layers(twin)
    optimizer = torch.optim.AdamW(
        [parameter for parameter in twin.parameters() if parameter.requires_grad], lr=RATE, weight_decay=0.0
    )
    plain_loop(
        twin, recorder.batches, optimizer, steps=6, accumulation=accumulation, clip=0.05,
        before_clip=lambda step: add_pull(layers, step, 6),
    )  # fmt: skip
    assert_same(snapshot(model), snapshot(twin), tolerance=2e-5)
    assert {layer.layer.adaptive_sparse_backward_decay for layer in sparse_layers(model)} == {0.0}


def test_a_run_that_failed_leaves_no_second_pull_behind():
    model = sparse_model()
    optimizer = torch.optim.SGD(model.parameters())
    callback = begin(model, optimizer)
    begin(model, optimizer, callback)  # without an on_train_end before
    assert len(optimizer._optimizer_step_pre_hooks) == 1
    callback.on_train_end(None, None, None)
    assert len(optimizer._optimizer_step_pre_hooks) == 0


# -- masks and counters --------------------------------------------------------------------------------------


def test_masks_change_exactly_at_their_steps_and_every_flip_is_counted(tmp_path):
    model = sparse_model(mask_interval=2, start_fraction=0.3, freeze_fraction=0.2)
    callback, seen = AdaptiveSparseCallback(log_layers=True), [snapshot(model)]
    watch = At("on_step_end", lambda state: seen.append(snapshot(model)))
    args = arguments(tmp_path, max_steps=10, learning_rate=0.05)
    trainer = Trainer(model, args, train_dataset=examples(), callbacks=[callback, watch])
    trainer.train()
    names = [layer.name for layer in sparse_layers(model)]
    assert [entry["step"] for entry in callback.history] == [4, 6, 8]
    assert callback.refreshes == 3
    earlier, total = dict(seen[0]), 0  # what the mask was before its last change
    logs = {entry["step"]: entry for entry in losses(trainer)}
    for step in range(1, 11):
        before, after = seen[step - 1], seen[step]
        flipped = returned = from_start = numel = 0
        for name in names:
            old, new = before[f"{name}.keep"], after[f"{name}.keep"]
            if step not in (4, 6, 8):
                assert torch.equal(old, new)
                continue
            assert torch.equal(new, expected_keep(after[f"{name}.weight"]))
            flips = int((old != new).sum())
            rate = callback.history[step // 2 - 2]["flip_rates"][name]
            assert rate == logs[step][f"sparse/flip_rate/{name}"] == flips / new.numel()
            flipped, numel = flipped + flips, numel + new.numel()
            returned += int(((old != new) & (new == earlier[f"{name}.keep"])).sum())
            from_start += int((new != seen[0][f"{name}.keep"]).sum())
        if step in (4, 6, 8):
            assert flipped > 0
            total, earlier = total + flipped, before
            assert logs[step]["sparse/flip_rate"] == pytest.approx(flipped / numel)
            assert logs[step]["sparse/oscillation"] == pytest.approx(returned / numel)
            assert logs[step]["sparse/from_start"] == pytest.approx(from_start / numel)
            assert logs[step]["sparse/flips_total"] == total
    assert callback.flips_total == total > 20
    decays = [logs[step]["sparse/decay"] for step in range(1, 11)]
    assert decays == pytest.approx([0.4, 0.8, 1.2, 1.6, 2.0, 2.0, 2.0, 2.0, 2.0, 2.0])


def test_frozen_masks_never_change_and_pruned_weights_stay_zero(tmp_path):
    pruned = sparse_model().merge_and_unload()
    model = sparse_model(model=pruned, mask_policy="frozen", mask_interval=1)
    before = snapshot(model)
    _, callback = trained(tmp_path, model=model)
    after = snapshot(model)
    assert callback.refreshes == 0
    for name in (name for name in before if name.endswith(".keep")):
        assert torch.equal(before[name], after[name])
        assert not after[name.replace(".keep", ".weight")][~after[name]].any()
    assert not torch.equal(before[f"{FIRST}.weight"], after[f"{FIRST}.weight"])


def test_a_long_history_is_joined_two_by_two_into_means(tmp_path, monkeypatch):
    rates = {}
    for limit in (511, 3):
        monkeypatch.setattr(callbacks, "HISTORY_LENGTH", limit)
        _, callback = trained(tmp_path, model=sparse_model(mask_interval=1))
        rates[limit] = [(entry["step"], entry["flip_rates"][FIRST]) for entry in callback.history]
    (_, a), (_, b), (_, c), (_, d), (_, e), (_, f) = rates[511]
    assert [step for step, _ in rates[511]] == [1, 2, 3, 4, 5, 6]
    assert [step for step, _ in rates[3]] == [4, 6]
    assert [rate for _, rate in rates[3]] == pytest.approx([(a + b + c + d) / 4, (e + f) / 2])
    assert callbacks.HISTORY_LENGTH == 3 and len(callback.history) <= 3


def test_several_active_adapters_have_masks_of_their_own():
    model = sparse_model()
    model.add_adapter("other", model.peft_config["default"])
    model.base_model.set_adapter(["default", "other"])
    sparse_layers(model, "other")[0].keep.logical_not_()
    callback = begin(model)
    names = [track.name for track in callback._tracks]
    assert len(names) == len(set(names)) == 2 * len(sparse_layers(model, "default"))
    assert names[:2] == [f"{FIRST}.default", f"{FIRST}.other"]
    assert torch.equal(callback._tracks[1].start, ~callback._tracks[0].start)


# -- what stops a run ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("optimizer", [SPARSE, {}], ids=["SparseAdamW", "AdamW"])
def test_a_latent_weight_without_a_gradient_stops_the_run(optimizer, tmp_path):
    model = sparse_model()
    weight = sparse_layers(model)[1].weight
    lose = At("on_pre_optimizer_step", lambda state: setattr(weight, "grad", None))
    with pytest.raises(TrainingError) as error:
        trained(tmp_path, lose, model=model, **optimizer)
    assert str(error.value) == (
        "model.layers.0.self_attn.k_proj: the latent weight has no gradient at the optimizer's step, so "
        "its masked weights would not decay. Under DeepSpeed use decay_mode='backward'."
    )


def test_a_hook_in_a_loop_of_ones_own_sees_a_missing_gradient_too():
    model = sparse_model()
    optimizer = torch.optim.SGD(model.parameters())
    begin(model, optimizer)
    with pytest.raises(TrainingError) as error:
        optimizer.step()
    assert str(error.value).startswith(f"{FIRST}: the latent weight has no gradient at the optimizer's step")


@pytest.mark.parametrize("clip", [0.0, 0.05])
def test_a_nan_loss_stops_the_run_and_leaves_the_last_checkpoint(clip, tmp_path):
    model, seen = sparse_model(), []

    def spoil(state):
        if state.global_step == 3:
            seen.append(snapshot(model))
            model.get_base_model().model.norm.weight.data[0] = float("nan")

    settings = {"save_strategy": "steps", "save_steps": 2, "max_grad_norm": clip}
    with pytest.raises(TrainingError) as error:
        trained(tmp_path, At("on_step_begin", spoil), model=model, settings=settings, **SPARSE)
    assert str(error.value) == (
        "step 4: 7 of 7 gradients are NaN or infinite, the first that of "
        f"{FIRST}.adaptive_sparse_weight.default. The weights are as after step 3; the last complete "
        f"checkpoint in {tmp_path} is untouched. Lower the learning rate, or look at the data of this "
        "step."
    )
    assert_same(snapshot(model), seen[0])
    assert last_complete_checkpoint(tmp_path) == tmp_path / "checkpoint-2"
    stored = load_file(tmp_path / "checkpoint-2" / "adapter_model.safetensors")
    assert all(tensor.isfinite().all() for tensor in stored.values())


def test_one_infinite_gradient_is_found_also_outside_the_sparse_layers(tmp_path):
    model = sparse_model(modules_to_save=["norm"])
    norm = model.get_base_model().model.norm.modules_to_save["default"].weight
    norm.register_hook(lambda gradient: gradient * float("inf"))
    with pytest.raises(TrainingError) as error:  # clipped by an infinite norm, every other gradient is 0
        trained(tmp_path, model=model, settings={"max_grad_norm": 1.0})
    assert str(error.value).startswith(
        "step 1: 1 of 10 gradients are NaN or infinite, the first that of model.norm.modules_to_save.default.weight. "
    )


def test_infinite_weights_are_not_saved(tmp_path):
    model = sparse_model()

    def spoil(state):
        if state.global_step == 2:
            sparse_layers(model)[0].weight.data[0, 0] = float("inf")

    settings = {"save_strategy": "steps", "save_steps": 1}
    with pytest.raises(TrainingError) as error:
        trained(tmp_path, At("on_optimizer_step", spoil), model=model, settings=settings)
    assert str(error.value) == (
        "step 3: 1 of 7 trained tensors hold NaN or infinite values, the first "
        f"{FIRST}.adaptive_sparse_weight.default. They are not saved; the last complete checkpoint in "
        f"{tmp_path} is untouched. Lower the learning rate."
    )
    assert last_complete_checkpoint(tmp_path) == tmp_path / "checkpoint-2"


@pytest.mark.parametrize(
    ("masks", "callback", "args", "error", "message"),
    [
        (
            {"mask_interval": 10}, {}, {},
            TrainingError,
            "masks are chosen anew every 10 optimizer steps, and none of these falls between the first "
            "0% (start_fraction) and the last 0% (freeze_fraction) of this run's 6: they never would "
            "change. Train longer, set a smaller mask_interval, or freeze_fraction=1.0 to keep the first "
            "masks.",
        ),
        (
            {"mask_interval": 4, "freeze_fraction": 0.5}, {}, {},
            TrainingError,
            "masks are chosen anew every 4 optimizer steps, and none of these falls between the first 0% "
            "(start_fraction) and the last 50% (freeze_fraction) of this run's 6: they never would "
            "change. Train longer, set a smaller mask_interval, or freeze_fraction=1.0 to keep the first "
            "masks.",
        ),
        (
            {}, {"decay_mode": "optimizer"}, {},
            ConfigError,
            "decay_mode='optimizer' needs SparseAdamW, got SGD. Pass "
            "optimizer_cls_and_kwargs=(SparseAdamW, {...}) to the Trainer, or use decay_mode='auto'.",
        ),
        (
            {"decay_norm": "relative"}, {"decay_mode": "backward"}, {},
            ConfigError,
            "decay_norm='relative' needs the gradients of whole steps, which decay_mode='backward' (and "
            "so DeepSpeed) does not see. Set decay_norm='absolute', and decay to the paper's number, "
            "such as 6e-5.",
        ),
        (
            {}, {}, {"n_gpu": 2},
            ConfigError,
            "2 devices in one process would be nn.DataParallel, which cannot copy sparse layers. Start "
            "one process per device (torchrun, accelerate launch), or show one of them with "
            "CUDA_VISIBLE_DEVICES.",
        ),
        (
            {}, {"decay_mode": "sometimes"}, {},
            ConfigError,
            "unknown decay_mode 'sometimes'; known: auto, optimizer, gradient, backward.",
        ),
    ],
)  # fmt: skip
def test_a_run_that_cannot_be_as_asked_is_refused(masks, callback, args, error, message):
    model = sparse_model(**masks)
    with pytest.raises(error) as caught:
        begin(model, callback=AdaptiveSparseCallback(**callback), **args)
    assert str(caught.value) == message


def test_loss_scaled_gradients_are_refused():
    model = sparse_model()
    fused = torch.optim.AdamW(model.parameters(), fused=True)
    begin(model, fused, fp16=True, max_grad_norm=1.0)  # clipping takes the scale off
    with pytest.raises(ConfigError) as error:
        begin(model, fused, fp16=True, max_grad_norm=0.0)
    assert str(error.value) == (
        "fp16 with a fused AdamW and max_grad_norm=0: gradients still carry the loss scale when the pull "
        "on masked weights is added to them. Set max_grad_norm, use bf16, or take an optimizer that is "
        "not fused."
    )


def test_masks_that_are_kept_on_purpose_are_no_error():
    begin(sparse_model(mask_interval=10, freeze_fraction=1.0))
    begin(sparse_model(model=sparse_model().merge_and_unload(), mask_policy="frozen", mask_interval=10))


# -- complete checkpoints ------------------------------------------------------------------------------------


def checkpoint(folder: Path, files=("trainer_state.json",), marker: str | None = None) -> Path:
    folder.mkdir(parents=True)
    for name in files:
        (folder / name).write_text("{}")
    listed = json.dumps({"global_step": 1, "files": ["trainer_state.json"]})
    (folder / COMPLETE_FILE).write_text(listed if marker is None else marker)
    return folder


def test_the_last_complete_checkpoint_is_the_newest_that_has_all_its_files(tmp_path):
    assert last_complete_checkpoint(tmp_path / "nowhere") is None
    (tmp_path / "checkpoint-40").mkdir()  # cut short while it was written
    assert last_complete_checkpoint(tmp_path) is None
    nine = checkpoint(tmp_path / "checkpoint-9")
    assert last_complete_checkpoint(tmp_path) == nine
    ten = checkpoint(tmp_path / "checkpoint-10")
    checkpoint(tmp_path / "checkpoint-20", files=())  # cut short while it was deleted
    checkpoint(tmp_path / "checkpoint-30", marker='{"global_st')
    checkpoint(tmp_path / "checkpoint-best")
    assert last_complete_checkpoint(str(tmp_path)) == ten


def test_a_checkpoint_that_is_written_over_is_not_complete_meanwhile(tmp_path, monkeypatch):
    settings = {"save_strategy": "steps", "save_steps": 2, "max_steps": 2}
    trained(tmp_path, settings=settings)
    assert last_complete_checkpoint(tmp_path) == tmp_path / "checkpoint-2"

    def killed(self, folder):
        raise KeyboardInterrupt

    monkeypatch.setattr(Trainer, "_save_rng_state", killed)
    with pytest.raises(KeyboardInterrupt):
        trained(tmp_path, settings=settings)
    assert last_complete_checkpoint(tmp_path) is None


def test_keeping_one_checkpoint_only_is_warned_about(caplog):
    message = (
        "save_total_limit=1: the Trainer deletes a checkpoint before the next one is complete, so a run "
        "that is killed in between starts again. Use 2."
    )
    begin(sparse_model(), save_total_limit=2, save_strategy="steps")
    assert message not in caplog.messages
    begin(sparse_model(), save_total_limit=1, save_strategy="steps")
    assert caplog.messages.count(message) == 1


# -- resume --------------------------------------------------------------------------------------------------

HALVES = {"save_strategy": "steps", "save_steps": 3}
OTHER = {**HALVES, "max_steps": 3, "learning_rate": 1e-2}


def often():
    """Two refreshes before the first checkpoint, so that its start and previous masks differ."""
    return sparse_model(mask_interval=1)


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    """A run of 6 steps with checkpoints at 3 and 6: (folder, trainer, callback)."""
    folder = tmp_path_factory.mktemp("straight")
    trainer, callback = trained(folder, model=often(), settings=HALVES, **SPARSE)
    return folder, trainer, callback


def counters(trainer: Trainer, callback: AdaptiveSparseCallback) -> tuple:
    return callback.state(), losses(trainer), [
        (track.name, track.start.tolist(), track.previous.tolist()) for track in callback._tracks
    ]  # fmt: skip


@pytest.mark.parametrize("restore", [False, True])
def test_a_resumed_run_ends_with_the_same_weights_masks_and_counters(restore, straight, tmp_path):
    folder, trainer, callback = straight
    shutil.copytree(folder / "checkpoint-3", tmp_path / "checkpoint-3")
    settings = {**HALVES, "restore_callback_states_from_checkpoint": restore}
    given = AdaptiveSparseCallback()
    again, used = trained(
        tmp_path, model=often(), settings=settings, resume=str(tmp_path / "checkpoint-3"), callback=given, **SPARSE
    )
    assert (used is given) != restore
    assert_same(snapshot(again.model), snapshot(trainer.model))
    assert counters(again, used) == counters(trainer, callback)
    assert callback.flips_total > 0


def test_a_moved_checkpoint_that_the_arguments_name_is_resumed_in_full(straight, tmp_path, caplog):
    folder, trainer, callback = straight
    moved = shutil.copytree(folder / "checkpoint-3", tmp_path / "moved")
    # Of another run, at the same step, where checkpoints are looked for by default.
    trained(tmp_path / "out", model=sparse_model(decay=0.0), settings=OTHER)
    settings = {**HALVES, "resume_from_checkpoint": str(moved)}
    again, used = trained(tmp_path / "out", model=often(), settings=settings, resume=str(moved), **SPARSE)
    assert_same(snapshot(again.model), snapshot(trainer.model))
    assert counters(again, used) == counters(trainer, callback)
    assert not [message for message in caplog.messages if STATE_FILE in message]


def test_masks_of_another_run_are_not_taken_for_those_of_this_one(straight, tmp_path, caplog):
    folder, trainer, callback = straight
    moved = shutil.copytree(folder / "checkpoint-3", tmp_path / "moved")
    trained(tmp_path / "out", model=sparse_model(decay=0.0), settings=OTHER)
    again, used = trained(tmp_path / "out", model=often(), settings=HALVES, resume=str(moved), **SPARSE)
    assert_same(snapshot(again.model), snapshot(trainer.model))
    assert used.flips_total == callback.flips_total
    assert caplog.messages.count(
        f"no {STATE_FILE} of step 3 was found: sparse/from_start and sparse/oscillation count from here. "
        "Weights, masks and all else are those of the checkpoint. If it was moved, name its folder in "
        "TrainingArguments(resume_from_checkpoint=...) as well."
    ) == 1  # fmt: skip


def test_a_second_run_of_one_callback_counts_from_zero(tmp_path):
    callback = AdaptiveSparseCallback()
    _, first = trained(tmp_path, callback=callback)
    expected = first.state()
    _, second = trained(tmp_path, callback=callback)
    assert second is first and second.state() == expected


def without(file: Path, part: str) -> None:
    tensors = {name: tensor for name, tensor in load_file(file).items() if part not in name}
    metadata = {"format": "pt"}
    if file.name == STATE_FILE:
        metadata = {"global_step": "3", "flips_total": _flips(file)}
    save_file(tensors, file, metadata=metadata)


def _flips(file: Path) -> str:
    state = json.loads((file.parent / "trainer_state.json").read_text())
    return str(state["stateful_callbacks"]["AdaptiveSparseCallback"]["attributes"]["flips_total"])


def test_a_checkpoint_without_its_masks_is_not_resumed(straight, tmp_path):
    folder = shutil.copytree(straight[0] / "checkpoint-3", tmp_path / "checkpoint-3")
    without(folder / "adapter_model.safetensors", "adaptive_sparse_keep")
    with pytest.raises(FormatError) as error:
        trained(tmp_path, model=often(), settings=HALVES, resume=str(folder), **SPARSE)
    assert str(error.value) == (
        f"the file of adapter 'default' lacks 7 tensors, the first {FIRST}.adaptive_sparse_keep. A mask "
        "cannot be recomputed from the weights. Save the adapter again with save_pretrained; to start a "
        "new one instead, build a new AdaptiveSparseConfig."
    )


def test_a_checkpoint_without_its_earlier_masks_is_not_resumed(straight, tmp_path):
    folder = shutil.copytree(straight[0] / "checkpoint-3", tmp_path / "checkpoint-3")
    without(folder / STATE_FILE, f"{FIRST}.start")
    with pytest.raises(FormatError) as error:
        trained(tmp_path, model=often(), settings=HALVES, resume=str(folder), **SPARSE)
    assert str(error.value) == (
        f"{folder / STATE_FILE} has no masks of {FIRST}: it is that of another model, or damaged. Resume "
        "from another checkpoint."
    )
