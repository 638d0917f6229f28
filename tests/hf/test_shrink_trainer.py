"""What a Trainer does around the stages of a shrinking run: the best checkpoint, saving, optimizers."""

from __future__ import annotations

import json
import os

import pytest
import torch
from transformers import PrinterCallback, TrainingArguments
from transformers.optimization import Adafactor

from hf_adaptive_sparse.errors import ConfigError
from hf_adaptive_sparse.hf.data import WindowDataset
from hf_adaptive_sparse.hf.mask_state import last_complete_checkpoint
from hf_adaptive_sparse.hf.optimizer_state import tried_state
from hf_adaptive_sparse.hf.shrink_training import ShrinkCallback, ShrinkTrainer
from hf_adaptive_sparse.hf.shrunk_manifest import shrunk_manifest
from hf_adaptive_sparse.methods.adaptive_width.config import ShrinkConfig
from tests.tiny_models import tiny_model, tokens

from .shrunk_cases import load, logits_of

TEXT = tokens(4, 16, seed=3)
STEPS = 12
# Stages before the steps 0, 2 and 6 of 12; blocks end with different widths.
PLAN = {"target": 0.75, "stages": 3, "prune_fraction": 1.0, "step": 0.1, "allocation": "adaptive"}
BEST = {"eval_strategy": "steps", "eval_steps": 2, "save_steps": 2, "load_best_model_at_end": True}


class Tokenizer:
    """As much of one as is asked for when a model is saved."""

    def save_pretrained(self, folder):
        (folder / "tokenizer.json").write_text("{}")

    def __call__(self, *texts):
        raise AssertionError("no text is read here")


def trainer_of(folder, plan=None, settings=None, **more):
    model = tiny_model("llama", intermediate_size=32, num_key_value_heads=4, tie_word_embeddings=True)
    callback = ShrinkCallback(model, TEXT, ShrinkConfig(**PLAN | (plan or {})))
    arguments = {"max_steps": STEPS, "per_device_train_batch_size": 2, "save_steps": 4, "learning_rate": 1e-2}
    arguments = TrainingArguments(
        output_dir=str(folder), report_to="none", use_cpu=True, disable_tqdm=True, **arguments | (settings or {})
    )
    data = {"train_dataset": WindowDataset(tokens(40, 16, seed=1)), "eval_dataset": WindowDataset(tokens(4, 16))}
    trainer = ShrinkTrainer(model, arguments, shrink=callback, **data, **more)
    trainer.remove_callback(PrinterCallback)
    return trainer


def score_by_step(monkeypatch, losses):
    """Evaluation finds what is written down for the step."""

    def evaluate(self, *args, **kwargs):
        return {"eval_loss": losses[self.state.global_step]}

    monkeypatch.setattr(ShrinkTrainer, "evaluate", evaluate)


# --- the best checkpoint --------------------------------------------------------------------------------------


@pytest.mark.parametrize("limit", [None, 1, 2])
def test_the_best_checkpoint_is_one_after_the_last_stage(tmp_path, monkeypatch, caplog, limit):
    score_by_step(monkeypatch, {2: 1.0, 4: 0.5, 6: 0.1, 8: 3.0, 10: 2.0, 12: 4.0})
    trainer = trainer_of(tmp_path, settings={**BEST, "save_total_limit": limit})
    weights = {}
    save = trainer._save_checkpoint

    def remember(*args, **kwargs):
        weights[trainer.state.global_step] = {name: each.clone() for name, each in trainer.model.state_dict().items()}
        save(*args, **kwargs)

    trainer._save_checkpoint = remember
    trainer.train()
    assert [entry["step"] for entry in trainer.shrink_callback.history] == [0, 2, 6]
    assert (trainer.state.best_global_step, trainer.state.best_metric) == (10, 2.0)
    assert all(torch.equal(each, weights[10][name]) for name, each in trainer.model.state_dict().items())
    assert not any(torch.equal(weights[10][name], weights[12][name]) for name in weights[10])
    left = {None: [2, 4, 6, 8, 10, 12], 1: [10], 2: [10, 12]}[limit]
    assert sorted(int(each.name.rpartition("-")[2]) for each in tmp_path.glob("checkpoint-*")) == left
    assert "missing keys" not in caplog.text


def test_a_best_checkpoint_from_before_the_last_stage_is_forgotten_when_a_run_goes_on(tmp_path, monkeypatch):
    score_by_step(monkeypatch, {2: 1.0, 4: 0.5, 6: 0.1, 8: 3.0, 10: 2.0, 12: 4.0})
    trainer_of(tmp_path, settings=BEST).train()
    last = tmp_path / "checkpoint-8" / "trainer_state.json"
    best = {"best_metric": 0.1, "best_global_step": 6, "best_model_checkpoint": str(tmp_path / "checkpoint-6")}
    last.write_text(json.dumps(json.loads(last.read_text()) | best))
    again = trainer_of(tmp_path, settings=BEST)
    again.train(resume_from_checkpoint=str(last.parent))
    assert (again.state.best_global_step, again.state.best_metric) == (10, 2.0)


# --- saving ---------------------------------------------------------------------------------------------------


def test_a_model_that_was_saved_by_the_trainer_opens_with_the_same_logits(tmp_path):
    trainer = trainer_of(tmp_path / "run", processing_class=Tokenizer())
    trainer.train()
    trainer.save_model(str(tmp_path / "out"))
    expected = {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "training_args.bin"}
    assert set(os.listdir(tmp_path / "out")) == expected
    loaded, report = load(tmp_path / "out"), trainer.shrink_callback.report()
    assert loaded.config.model_type == "shrunk_llama"
    assert torch.equal(logits_of(loaded), logits_of(trainer.model.eval()))
    assert shrunk_manifest(loaded.config) == {
        "kept": report.kept, "dense_parameters": report.dense_parameters,
        "method": json.loads((tmp_path / "run" / "checkpoint-4" / "shrink_state.json").read_text())["config"],
    }  # fmt: skip


def test_saving_beside_the_checkpoints_leaves_them_and_replaces_weights_that_are_there(tmp_path):
    trainer = trainer_of(tmp_path)
    trainer.save_model()
    assert torch.equal(logits_of(load(tmp_path)), logits_of(trainer.model.eval()))
    trainer.train()
    (tmp_path / "model-00001-of-00002.safetensors").write_bytes(b"")
    (tmp_path / "model.safetensors.index.json").write_text("{}")
    trainer.save_model()
    assert torch.equal(logits_of(load(tmp_path)), logits_of(trainer.model.eval()))
    assert sorted(os.listdir(tmp_path)) == [
        "checkpoint-12", "checkpoint-4", "checkpoint-8", "config.json", "generation_config.json", "model.safetensors",
        "training_args.bin",
    ]  # fmt: skip
    assert last_complete_checkpoint(tmp_path) == tmp_path / "checkpoint-12"
    again = trainer_of(tmp_path)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-8"))
    assert torch.equal(logits_of(again.model.eval()), logits_of(trainer.model.eval()))


def test_saving_a_model_over_a_checkpoint_leaves_no_checkpoint(tmp_path):
    trainer = trainer_of(tmp_path)
    trainer.train()
    trainer.save_model(str(tmp_path / "checkpoint-12"))
    assert last_complete_checkpoint(tmp_path) == tmp_path / "checkpoint-8"
    assert not (tmp_path / "checkpoint-12" / "shrink_state.json").exists()


# --- optimizers -----------------------------------------------------------------------------------------------


def test_an_optimizer_whose_state_cannot_be_cut_is_refused_before_the_first_stage(tmp_path):
    trainer = trainer_of(tmp_path, settings={"optim": "adafactor"})
    dense = trainer.shrink_callback.shrinker.dense_parameters
    with pytest.raises(ConfigError) as error:
        trainer.train()
    assert str(error.value) == (
        "optimizer: for a weight of [64, 128] Adafactor keeps exp_avg_sq_row of [64], which cannot be cut with the "
        "weight at the stage after step 2. Train with optim='adamw_torch'; or set reset_moments=True in the "
        "ShrinkConfig, which forgets it at every stage, or stages=1, which prunes before the first step."
    )
    assert trainer.model.num_parameters() == dense


@pytest.mark.parametrize("plan", [{"reset_moments": True}, {"stages": 1}])
def test_such_an_optimizer_trains_where_it_forgets_or_where_nothing_is_cut_later(tmp_path, plan):
    trainer = trainer_of(tmp_path, plan, {"optim": "adafactor"})
    trainer.train()
    assert len(trainer.shrink_callback.history) == plan.get("stages", 3)
    assert trainer.model.num_parameters() <= trainer.shrink_callback.shrinker.target
    assert all(each["exp_avg_sq_row"].isfinite().all() for each in trainer.optimizer.state.values() if len(each) > 3)


@pytest.mark.parametrize("optim", ["adamw_torch", "adamw_torch_fused", "sgd", "rmsprop", "adagrad"])
def test_other_optimizers_are_taken(tmp_path, optim):
    trainer = trainer_of(tmp_path, settings={"optim": optim, "save_strategy": "no"})
    trainer.train()
    assert trainer.model.num_parameters() <= trainer.shrink_callback.shrinker.target


def test_trying_an_optimizer_changes_neither_it_nor_the_random_numbers_that_follow():
    class Noisy(Adafactor):
        def step(self, closure=None):
            torch.rand(1)
            return super().step(closure)

    weight = torch.nn.Parameter(torch.ones(3, 5))
    optimizer = Noisy([weight], lr=1e-3, relative_step=False, scale_parameter=False)
    calls = []
    optimizer.register_step_pre_hook(lambda *given: calls.append(given))
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer)
    torch.manual_seed(0)
    (state,) = tried_state(optimizer).values()
    found = torch.rand(1)
    torch.manual_seed(0)
    assert torch.equal(found, torch.rand(1))
    assert set(state) == {"step", "exp_avg_sq_row", "exp_avg_sq_col", "RMS"}
    assert not optimizer.state and not calls and schedule.last_epoch == 0
    assert torch.equal(weight, torch.ones(3, 5)) and optimizer.param_groups[0]["params"] == [weight]


def test_an_optimizer_that_wants_a_closure_is_not_tried():
    assert tried_state(torch.optim.LBFGS([torch.nn.Parameter(torch.ones(3))])) == {}
