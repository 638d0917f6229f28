"""AdaptiveSparseTrainer: the loss it says, the teacher it says, and the same run however it is cut up."""

from __future__ import annotations

import copy
import shutil
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import Trainer, TrainingArguments

from hf_adaptive_sparse.errors import ConfigError, DataError, TargetError
from hf_adaptive_sparse.hf.callbacks import AdaptiveSparseCallback
from hf_adaptive_sparse.hf.sparse_layers import sparse_layers
from hf_adaptive_sparse.hf.trainer import AdaptiveSparseTrainer, DistillationConfig, DistillationMixin
from hf_adaptive_sparse.optim import SparseAdamW
from tests.hf.runs import (
    LLAMA,
    RATE,
    At,
    Recorder,
    arguments,
    assert_same,
    distilled_loss,
    examples,
    mean_loss,
    plain_loop,
    snapshot,
    sparse_model,
)
from tests.tiny_models import tiny_model, tokens

KD = DistillationConfig(kd_weight=0.7, ce_weight=0.2, temperature=2.0, kind="forward_kl", hidden_weight=0.0)
CE = DistillationConfig(kd_weight=0.0, ce_weight=1.0, hidden_weight=0.0)
ALL = DistillationConfig(kd_weight=0.7, ce_weight=0.2, temperature=2.0, hidden_weight=2.0)
HIDDEN = DistillationConfig(kd_weight=0.0, ce_weight=1.0, hidden_weight=3.0)
CLOSE = 5e-4  # weights move by 0.1; Adam makes much of the rounding of a gradient near 0
FULL_LOGITS = "the loss is computed from full logits, which takes more memory."


def trainer_of(folder: Path, model=None, *, settings=None, kind=AdaptiveSparseTrainer, **kwargs) -> Trainer:
    given = {"distillation": KD, "train_dataset": examples(ignore=True), "data_collator": Recorder()}
    model = sparse_model() if model is None else model
    return kind(model=model, args=arguments(folder, **(settings or {})), **{**given, **kwargs})


def trained(folder: Path, model=None, resume=None, **kwargs) -> Trainer:
    trainer = trainer_of(folder, model, **kwargs)
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def losses(trainer: Trainer) -> list[dict]:
    return [entry for entry in trainer.state.log_history if "loss" in entry]


def first_losses(trainer: Trainer) -> dict[str, float]:
    return {name: losses(trainer)[0][name] for name in ("loss", "loss/ce", "loss/kd")}


# -- the loss ------------------------------------------------------------------------------------------------

LARGE = {"initializer_range": 0.2}
DRY = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
FAMILIES = {
    "llama, untied": ("llama", {**LLAMA, "tie_word_embeddings": False}),
    "llama, tied": ("llama", {**LLAMA, "tie_word_embeddings": True}),
    "gpt2": ("gpt2", {"n_layer": 1, "n_embd": 16, "n_head": 2, **LARGE, **DRY}),
    "opt": ("opt", {"num_hidden_layers": 1, "dropout": 0.0, "init_std": 0.2}),
    "phi3": ("phi3", {"num_hidden_layers": 1, **LARGE}),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_follows_its_dense_self_and_ends_exactly_two_four(family, tmp_path):
    name, changes = FAMILIES[family]
    model = sparse_model(model=tiny_model(name, **changes))
    trainer = trainer_of(tmp_path, model, settings={"max_steps": 2})
    batch = {key: torch.stack([row[key] for row in examples(ignore=True)]) for key in ("input_ids", "labels")}
    expected = []
    take = At("on_step_begin", lambda state: expected.append(model.training))
    trainer.add_callback(take)
    order = Recorder()
    trainer.data_collator = order
    untouched = sparse_model(model=tiny_model(name, **changes)).eval()
    trainer.train()
    assert trainer._is_fused and all(expected) and batch["labels"].shape == (32, 8)
    assert first_losses(trainer) == pytest.approx(distilled_loss(untouched, order.batches[0], None, KD), rel=1e-4)
    names = [layer.name for layer in sparse_layers(model)]
    dense = dict(untouched.merge_and_unload().named_parameters())
    merged = model.merge_and_unload()
    for layer in names:
        module = merged.get_submodule(layer)
        weight = module.weight if isinstance(module, nn.Linear) else module.weight.T  # Conv1D
        assert ((weight.reshape(weight.shape[0], -1, 4) != 0).sum(-1) == 2).all()
    kept = [key for key in dense if key.rpartition(".")[0] not in names]
    assert kept and all(torch.equal(dense[key], dict(merged.named_parameters())[key]) for key in kept)


@pytest.mark.parametrize(("accumulation", "clip"), [(1, 1000.0), (2, 0.05)])
def test_a_run_is_a_plain_loop_with_the_distillation_loss_and_sparse_adamw(accumulation, clip, tmp_path):
    model, twin = (sparse_model() for _ in range(2))
    settings = {"gradient_accumulation_steps": accumulation, "max_grad_norm": clip, "adam_beta1": 0.8}
    trainer = trained(tmp_path, model, settings=settings)
    optimizer = trainer.optimizer.optimizer
    assert type(optimizer) is SparseAdamW and optimizer.defaults["betas"] == (0.8, 0.95)
    again = SparseAdamW(
        [parameter for parameter in twin.parameters() if parameter.requires_grad],
        lr=RATE, betas=(0.8, 0.95), decay=2.0, decay_norm="relative", decay_steps=3,
    )  # fmt: skip
    again.bind((layer.weight, layer.keep) for layer in sparse_layers(twin))

    def loss_of(student, batch, items):
        with torch.no_grad(), student.disable_adapter():
            teacher = student(input_ids=batch["input_ids"]).logits
        student.train()
        logits = student(input_ids=batch["input_ids"]).logits
        counts = (batch["labels"][:, 1:] != -100).reshape(-1)
        first, second = (
            torch.log_softmax(each[:, :-1].reshape(-1, each.shape[-1]) / 2.0, -1) for each in (teacher, logits)
        )
        kd = 4.0 * ((first.exp() * (first - second)).sum(-1) * counts).sum() / items
        return 0.7 * kd + 0.2 * mean_loss(logits, batch["labels"], items)

    batches = trainer.data_collator.batches
    plain_loop(twin, batches, again, steps=6, accumulation=accumulation, clip=clip, loss_of=loss_of)
    assert_same(snapshot(model), snapshot(twin), tolerance=CLOSE)


def test_cutting_a_batch_into_micro_batches_changes_nothing(tmp_path):
    runs = []
    for batch, accumulation in ((4, 1), (2, 2), (1, 4)):
        settings = {"per_device_train_batch_size": batch, "gradient_accumulation_steps": accumulation}
        runs.append(trained(tmp_path, settings=settings))
    for run in runs[1:]:
        assert_same(snapshot(run.model), snapshot(runs[0].model), tolerance=CLOSE)
        for entry, expected in zip(losses(run), losses(runs[0]), strict=True):
            for name in ("loss", "loss/ce", "loss/kd", "grad_norm"):
                assert entry[name] == pytest.approx(expected[name], rel=1e-3), name
            assert entry["loss"] == pytest.approx(0.7 * entry["loss/kd"] + 0.2 * entry["loss/ce"], rel=1e-4)


def test_parts_of_the_loss_are_means_since_the_last_log(tmp_path):
    often, seldom = (trained(tmp_path, settings={"logging_steps": steps}) for steps in (1, 3))
    for index, entry in enumerate(losses(seldom)):
        for name in ("loss/kd", "loss/ce"):
            parts = [each[name] for each in losses(often)[3 * index : 3 * index + 3]]
            assert min(parts) < entry[name] < max(parts)


def test_evaluation_reports_plain_cross_entropy(tmp_path):
    trainer = trainer_of(tmp_path, eval_dataset=examples(count=2, ignore=True))
    found = trainer.evaluate()["eval_loss"]
    model = trainer.model.eval()
    batch = {key: torch.stack([row[key] for row in examples(count=2, ignore=True)]) for key in ("input_ids", "labels")}
    with torch.no_grad():
        logits = model(input_ids=batch["input_ids"]).logits
    items = (batch["labels"][:, 1:] != -100).sum()
    assert found == pytest.approx(mean_loss(logits, batch["labels"], items).item(), rel=1e-5)
    trainer.train()
    assert trainer.evaluate()["eval_loss"] == pytest.approx(trainer.evaluate()["eval_loss"])
    assert "eval_loss/kd" not in trainer.state.log_history[-1]


def test_a_model_that_takes_no_number_of_items_is_evaluated_too(tmp_path):
    class Strict(type(tiny_model(**LLAMA))):
        accepts_loss_kwargs = False

        def forward(
            self, input_ids=None, attention_mask=None, inputs_embeds=None, labels=None, use_cache=None,
            output_attentions=None, output_hidden_states=None, return_dict=None,
        ):  # fmt: skip
            return super().forward(input_ids=input_ids, labels=labels, use_cache=use_cache)

    model = sparse_model(model=Strict(tiny_model(**LLAMA).config))
    trainer = trained(tmp_path, model, settings={"max_steps": 2}, eval_dataset=examples(count=2))
    assert trainer.evaluate()["eval_loss"] > 0.0


def test_a_loss_from_hidden_states_is_the_loss_from_logits(tmp_path):
    fused = trained(tmp_path, distillation=ALL)
    full = trainer_of(tmp_path, distillation=ALL)
    full._is_fused = False
    full.train()
    assert fused._is_fused
    assert_same(snapshot(full.model), snapshot(fused.model), tolerance=CLOSE)


@pytest.mark.parametrize("family", ["gemma2", "opt"])
def test_a_model_that_does_more_than_a_linear_head_is_distilled_from_its_logits(family, tmp_path, caplog):
    changes = {"num_hidden_layers": 1}
    if family == "gemma2":  # tight, so that it matters; and not noticed at the logits of a random model
        changes |= {"final_logit_softcapping": 30.0, "attn_implementation": "eager"}
    plain = tiny_model(family, **changes)
    if family == "opt":
        plain.lm_head = nn.Sequential(plain.lm_head)
        plain._tied_weights_keys = plain.all_tied_weights_keys = {}
    model = sparse_model(model=plain)
    trainer = trained(tmp_path, model, settings={"max_steps": 2})
    name = type(plain).__name__
    reason = (
        f"{name} does more to its logits than apply a linear head (such as a soft cap)"
        if family == "gemma2"
        else f"the head of {name} is not a plain linear layer"
    )
    assert caplog.messages.count(f"{reason}: {FULL_LOGITS}") == 1
    assert trainer._is_fused is False
    assert len(losses(trainer)) == 2


def test_a_tight_soft_cap_counts_in_the_loss(tmp_path):
    def new():
        changes = {"num_hidden_layers": 1, "final_logit_softcapping": 0.5, "attn_implementation": "eager"}
        return sparse_model(model=tiny_model("gemma2", **changes, **LARGE))

    trainer = trained(tmp_path, new(), settings={"max_steps": 2})
    expected = distilled_loss(new().eval(), trainer.data_collator.batches[0], None, KD)
    assert first_losses(trainer) == pytest.approx(expected, rel=1e-4)


def test_without_distillation_a_run_is_that_of_a_stock_trainer(tmp_path):
    ours = trained(tmp_path, distillation=CE)
    assert set(losses(ours)[0]) & {"loss/kd", "loss/hidden"} == set() and losses(ours)[0]["loss/ce"] > 0.0
    stock = Trainer(
        model=sparse_model(), args=arguments(tmp_path), train_dataset=examples(ignore=True),
        data_collator=Recorder(), callbacks=[AdaptiveSparseCallback()],
        optimizer_cls_and_kwargs=(SparseAdamW, {"lr": RATE}),
    )  # fmt: skip
    stock.train()
    assert_same(snapshot(ours.model), snapshot(stock.model), tolerance=CLOSE)


def test_a_batch_in_which_no_label_counts_has_loss_zero(tmp_path):
    rows = [{**row, "labels": torch.full_like(row["labels"], -100)} for row in examples()]
    trainer = trained(tmp_path, train_dataset=rows, settings={"max_steps": 2})
    assert [entry["loss"] for entry in losses(trainer)] == [0.0, 0.0]


@pytest.mark.parametrize("teacher", ["self", "other"])
def test_hidden_states_of_every_block_follow_the_teacher(teacher, tmp_path):
    def new():
        return sparse_model(model=tiny_model(**{**LLAMA, "num_hidden_layers": 2}))

    other = None if teacher == "self" else tiny_model(seed=5, **{**LLAMA, "num_hidden_layers": 2})
    settings = {"max_steps": 2, "gradient_accumulation_steps": 1}
    trainer = trained(tmp_path, new(), distillation=HIDDEN, teacher=other or "self", settings=settings)
    student, batch = new().eval(), trainer.data_collator.batches[0]
    counts = batch["labels"][:, 1:] != -100  # the last position of a row predicts nothing
    given = {"input_ids": batch["input_ids"], "output_hidden_states": True}
    with torch.no_grad():
        ours = student(**given).hidden_states
        with student.disable_adapter():
            theirs = (other or student)(**given).hidden_states
    assert len(ours) == 3
    expected = 0.0
    for mine, target in zip(ours[1:], theirs[1:], strict=True):
        mine, target = mine[:, :-1][counts], target[:, :-1][counts]
        expected += ((mine - target).square().mean() / target.square().mean()).item()
    entry = losses(trainer)[0]
    assert entry["loss/hidden"] == pytest.approx(expected, rel=1e-4)
    assert entry["loss"] == pytest.approx(entry["loss/ce"] + 3.0 * expected, rel=1e-4)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"temperature": 0.0}, "temperature is a number > 0, got 0.0. A plain KL has 1.0."),
        ({"kind": "js"}, "unknown kind of distillation 'js'; known: forward_kl, reverse_kl."),
    ],
)
def test_a_distillation_that_cannot_be_is_refused_when_it_is_written_down(wrong, message):
    with pytest.raises(ConfigError) as error:
        DistillationConfig(**wrong)
    assert str(error.value) == message


# -- the teacher ---------------------------------------------------------------------------------------------


def test_another_model_can_teach(tmp_path):
    teacher = tiny_model("llama", seed=5, num_hidden_layers=1, **LARGE)
    before = {name: tensor.clone() for name, tensor in teacher.state_dict().items()}
    trainer = trained(tmp_path, teacher=teacher.train(), settings={"max_steps": 2})
    assert trainer._is_fused and not teacher.training
    expected = distilled_loss(sparse_model().eval(), trainer.data_collator.batches[0], teacher, KD)
    assert first_losses(trainer) == pytest.approx(expected, rel=1e-4)
    assert not any(parameter.requires_grad for parameter in teacher.parameters())
    assert all(torch.equal(tensor, before[name]) for name, tensor in teacher.state_dict().items())


def test_a_teacher_with_capped_logits_is_noticed(tmp_path, caplog):
    changes = {"num_hidden_layers": 1, "final_logit_softcapping": 0.5, "attn_implementation": "eager"}
    teacher = tiny_model("gemma2", **changes, **LARGE)
    trainer = trained(tmp_path, teacher=teacher, settings={"max_steps": 2})
    expected = distilled_loss(sparse_model().eval(), trainer.data_collator.batches[0], teacher, KD)
    assert first_losses(trainer) == pytest.approx(expected, rel=1e-4)
    assert sum(FULL_LOGITS in message for message in caplog.messages) == 1


def test_a_model_trained_in_place_can_learn_from_another_model(tmp_path):
    model = sparse_model(layout="inplace")
    trainer = trained(tmp_path, model, teacher=tiny_model(**LLAMA), settings={"max_steps": 2})
    assert losses(trainer)[0]["loss/kd"] > 0.0


OTHER_WORDS = tiny_model(**LLAMA, vocab_size=68)
NARROW = tiny_model(num_hidden_layers=1)
INPLACE = (
    "dense_teacher: layout='inplace' trains the weights of the model itself, so there is no dense model "
    "to learn from. Use layout='copy', or give another model as the teacher."
)


@pytest.mark.parametrize(
    ("config", "teacher", "message"),
    [
        (
            {}, OTHER_WORDS,
            "teacher LlamaForCausalLM has a vocabulary of 68, student LlamaForCausalLM one of 64. "
            "Distillation compares them token by token: take a teacher with the same tokenizer.",
        ),
        ({"layout": "inplace"}, "self", INPLACE),
        (
            {}, NARROW,
            "hidden_weight=3.0 compares states block by block, and the student has 1 blocks of width 16, "
            "the teacher 1 of width 32. Set hidden_weight=0, or take a teacher of the same shape.",
        ),
        (
            {}, "some/model",
            "teacher is 'self' or a model, got 'some/model'. Load it with from_pretrained first.",
        ),
    ],
    ids=["vocabulary", "inplace", "shape", "name"],
)  # fmt: skip
def test_a_teacher_that_cannot_be_is_refused(config, teacher, message, tmp_path):
    with pytest.raises(ConfigError) as error:
        trainer_of(tmp_path, sparse_model(**config), teacher=teacher, distillation=HIDDEN)
    assert str(error.value) == message


def test_the_student_is_not_its_own_other_teacher(tmp_path):
    model = sparse_model()
    with pytest.raises(ConfigError) as error:
        trainer_of(tmp_path, model, teacher=model.get_base_model())
    assert str(error.value) == ("the teacher is a part of the student. For the dense model in it write teacher='self'.")
    assert any(parameter.requires_grad for parameter in model.parameters())


def test_the_teacher_does_not_drop_out_and_the_student_does(tmp_path):
    model, seen = sparse_model("gpt2"), []
    layer = sparse_layers(model)[0].layer
    model.get_base_model().register_forward_hook(
        lambda module, args, out: seen.append((layer.adaptive_sparse_dense, module.transformer.drop.training))
    )
    trained(tmp_path, model, settings={"max_steps": 2})
    assert seen[1:] == [(False, True), (True, False)] * 2  # the first forward looks at the head
    assert seen[0] == (False, False)


def test_trained_norms_and_head_are_the_students_and_the_teacher_keeps_the_originals(tmp_path):
    plain = tiny_model(**LLAMA)
    originals = {name: tensor.clone() for name, tensor in plain.state_dict().items()}
    model = sparse_model(model=plain, modules_to_save=["norm", "lm_head"])
    first = trained(tmp_path, model, settings={"learning_rate": 0.05})
    base = model.get_base_model()
    for module in (base.lm_head, base.model.norm):
        original, ours = module.original_module.weight, module.modules_to_save["default"].weight
        assert (original - ours).abs().max() > 0.01
    now = copy.deepcopy(model).eval()
    second = trained(tmp_path, model, settings={"max_steps": 2})
    assert first._is_fused and second._is_fused
    expected = distilled_loss(now, second.data_collator.batches[0], None, KD)
    assert first_losses(second) == pytest.approx(expected, rel=1e-4)
    teacher = tiny_model(**LLAMA)  # a third opinion on what the original was
    assert all(torch.equal(tensor, originals[name]) for name, tensor in teacher.state_dict().items())
    by_another = distilled_loss(now, second.data_collator.batches[0], teacher, KD)
    assert expected == pytest.approx(by_another, rel=1e-6)


# -- precision, memory, compile ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def reference(tmp_path_factory) -> Trainer:
    return trained(tmp_path_factory.mktemp("reference"), distillation=ALL)


def test_gradient_checkpointing_changes_nothing(reference, tmp_path):
    trainer = trained(tmp_path, settings={"activation_checkpointing": True}, distillation=ALL)
    assert trainer.model.get_base_model().is_gradient_checkpointing
    assert_same(snapshot(trainer.model), snapshot(reference.model), tolerance=1e-6)


def test_bf16_autocast_trains_float32_latents_to_about_the_same_losses(reference, tmp_path):
    inside = []
    model = sparse_model()
    layer = sparse_layers(model)[0].layer
    layer.register_forward_hook(lambda module, args, out: inside.append(out.dtype))
    trainer = trained(tmp_path, model, settings={"bf16": True}, distillation=ALL)
    assert set(inside) == {torch.bfloat16} and trainer._is_fused
    assert {layer.weight.dtype for layer in sparse_layers(trainer.model)} == {torch.float32}
    for entry, expected in zip(losses(trainer), losses(reference), strict=True):
        assert entry["loss"] == pytest.approx(expected["loss"], rel=0.01 if entry is losses(trainer)[0] else 0.1)
        assert entry["loss"] != expected["loss"]


def test_a_bf16_model_trains_float32_latents_and_keeps_its_own_weights(tmp_path):
    model = sparse_model(model=tiny_model(**LLAMA, dtype=torch.bfloat16))
    layer = sparse_layers(model)[0]
    dense = layer.layer.base_layer.weight.clone()
    trainer = trained(tmp_path, model)
    assert trainer._is_fused
    assert layer.weight.dtype == torch.float32 and layer.layer.base_layer.weight.dtype == torch.bfloat16
    assert torch.equal(layer.layer.base_layer.weight, dense)
    moved = (layer.weight.detach() - dense.float()).abs()
    assert moved.max() > 1e-3 and not torch.equal(layer.weight, layer.weight.bfloat16().float())
    state = trainer.optimizer.optimizer.state[layer.weight]
    assert state["exp_avg"].dtype == state["exp_avg_sq"].dtype == torch.float32


def test_a_compiled_model_trains_the_same_and_a_refresh_compiles_nothing(reference, tmp_path):
    torch._dynamo.reset()
    model, graphs = sparse_model(), []
    count = torch._dynamo.utils.counters["stats"]
    settings = {"torch_compile": True, "torch_compile_backend": "eager"}
    trainer = trainer_of(tmp_path, model, settings=settings, distillation=ALL)
    trainer.add_callback(At("on_step_end", lambda state: graphs.append(count["unique_graphs"])))
    trainer.train()
    assert trainer._is_fused is False and trainer.mask_callback.flips_total > 0
    assert graphs[0] > 0 and graphs == [graphs[0]] * 6
    assert_same(snapshot(model), snapshot(reference.model), tolerance=CLOSE)
    torch._dynamo.reset()


# -- optimizers ----------------------------------------------------------------------------------------------


def test_an_optimizer_of_ones_own_is_used_and_gets_the_pull(tmp_path):
    ends = []
    for decay in (0.0, 2.0):
        model = sparse_model(decay=decay)
        own = torch.optim.SGD([parameter for parameter in model.parameters() if parameter.requires_grad], lr=0.05)
        trainer = trained(tmp_path, model, optimizers=(own, None))
        assert trainer.optimizer.optimizer is own
        ends.append(snapshot(model))
    masked = ~ends[0]["model.layers.0.mlp.up_proj.keep"]
    weights = [end["model.layers.0.mlp.up_proj.weight"][masked].abs().mean() for end in ends]
    assert weights[1] < weights[0]


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, SparseAdamW),
        ({"settings": {"optim": "sgd"}}, torch.optim.SGD),
        ({"optimizer_cls_and_kwargs": (torch.optim.Adagrad, {"lr": 0.1})}, torch.optim.Adagrad),
    ],
)
def test_the_optimizer_is_the_one_that_was_asked_for(given, expected, tmp_path):
    trainer = trainer_of(tmp_path, **given)
    assert type(trainer.create_optimizer()) is expected


def test_sparse_adamw_follows_the_arguments(tmp_path):
    settings = {"weight_decay": 0.1, "adam_beta2": 0.9, "adam_epsilon": 1e-6, "learning_rate": 0.3}
    optimizer = trainer_of(tmp_path, sparse_model(modules_to_save=["norm"]), settings=settings).create_optimizer()
    assert optimizer.defaults["betas"] == (0.9, 0.9)
    assert {(group["lr"], group["eps"], group["weight_decay"]) for group in optimizer.param_groups} == {
        (0.3, 1e-6, 0.1), (0.3, 1e-6, 0.0),
    }  # fmt: skip


# -- resume --------------------------------------------------------------------------------------------------


def settings_of(**changes):
    values = {
        "max_steps": 8, "save_strategy": "steps", "save_steps": 4, "lr_scheduler_type": "cosine",
        "gradient_accumulation_steps": 2, "per_device_train_batch_size": 3, "weight_decay": 0.01,
    }  # fmt: skip
    return {**values, **changes}


def model_that_drops_out():
    model = tiny_model(**LLAMA, attention_dropout=0.2)
    return sparse_model(model=model, slorb_k=4, modules_to_save=["norm"], freeze_fraction=0.25)


def everything(trainer: Trainer) -> dict[str, torch.Tensor]:
    tensors = snapshot(trainer.model)
    for name, parameter in trainer.model.named_parameters():
        if parameter.requires_grad:
            tensors[name] = parameter.detach()
    for index, state in trainer.optimizer.state_dict()["state"].items():
        for name, value in state.items():
            tensors[f"{index}.{name}"] = torch.as_tensor(value, dtype=torch.float64)
    return tensors


@pytest.mark.parametrize("moved", [False, True])
def test_a_resumed_run_is_bit_equal_to_one_that_was_never_interrupted(moved, tmp_path):
    given = {"settings": settings_of(), "distillation": ALL}
    straight = trained(tmp_path / "straight", model_that_drops_out(), **given)
    checkpoint = tmp_path / "straight" / "checkpoint-4"
    if moved:
        checkpoint = shutil.copytree(checkpoint, tmp_path / "moved")
    again = trained(tmp_path / "again", model_that_drops_out(), checkpoint, **given)
    assert_same(everything(again), everything(straight))
    assert losses(again) == losses(straight) and len(losses(straight)) == 8
    assert len({tuple(batch["input_ids"].flatten().tolist()) for batch in straight.data_collator.batches}) > 10
    assert again.mask_callback.state() == straight.mask_callback.state()
    starts = [[track.start.tolist() for track in run.mask_callback._tracks] for run in (straight, again)]
    assert starts[0] == starts[1]
    assert straight.mask_callback.refreshes == 3


# -- other trainers ------------------------------------------------------------------------------------------


def test_the_mixin_works_on_a_subclass_of_trainer(reference, tmp_path):
    class Counting(Trainer):
        steps = 0

        def training_step(self, *args, **kwargs):
            self.steps += 1
            return super().training_step(*args, **kwargs)

    class Distilling(DistillationMixin, Counting):
        pass

    trainer = trained(
        tmp_path, kind=Distilling, callbacks=[AdaptiveSparseCallback()], distillation=ALL,
        optimizer_cls_and_kwargs=(SparseAdamW, {"lr": RATE}),
    )  # fmt: skip
    assert trainer.steps == 6
    assert_same(snapshot(trainer.model), snapshot(reference.model))
    assert losses(trainer)[0]["sparse/decay"] == losses(reference)[0]["sparse/decay"]


def test_the_mixin_works_on_the_sft_trainer_of_trl(tmp_path, tiny_tokenizer):
    trl = pytest.importorskip("trl", reason="trl is not installed")

    class Distilling(DistillationMixin, trl.SFTTrainer):
        pass

    args = trl.SFTConfig(
        output_dir=str(tmp_path), max_steps=2, per_device_train_batch_size=2, report_to="none", use_cpu=True,
        bf16=False, logging_steps=1, save_strategy="no", max_length=8,
    )  # fmt: skip
    rows = [{"input_ids": row["input_ids"].tolist()} for row in examples()]
    from datasets import Dataset

    trainer = Distilling(
        model=sparse_model(), args=args, train_dataset=Dataset.from_list(rows), processing_class=tiny_tokenizer,
        distillation=KD, callbacks=[AdaptiveSparseCallback()],
    )  # fmt: skip
    trainer.train()
    assert losses(trainer)[0]["loss/kd"] > 0.0


# -- bad input -----------------------------------------------------------------------------------------------


def test_data_without_labels_is_named(tmp_path):
    rows = [{"input_ids": row["input_ids"]} for row in examples()]
    with pytest.raises(DataError) as error:
        trained(tmp_path, train_dataset=rows)
    assert str(error.value) == (
        "the batch has no labels, only input_ids. Give each example `labels` (a copy of input_ids; -100 "
        "where no loss is wanted), or use DataCollatorForLanguageModeling(mlm=False)."
    )


def test_a_model_that_is_not_wrapped_is_refused(tmp_path):
    with pytest.raises(ConfigError) as error:
        trainer_of(tmp_path, tiny_model(**LLAMA))
    assert str(error.value) == (
        "the model has no sparse layers. Add an adapter first: get_peft_model(model, AdaptiveSparseConfig())."
    )

    class Distilling(DistillationMixin, Trainer):
        pass

    with pytest.raises(TargetError) as error:
        trainer_of(tmp_path, tiny_model(**LLAMA), kind=Distilling)
    assert str(error.value) == (
        "dense_teacher: the model has no sparse layers. Add an adapter first: get_peft_model(model, "
        "AdaptiveSparseConfig())."
    )


@pytest.mark.parametrize(
    ("name", "given"),
    [
        ("compute_loss_func", {"compute_loss_func": lambda outputs, labels, num_items_in_batch: outputs.loss}),
        ("label_smoothing_factor", {"settings": {"label_smoothing_factor": 0.1}}),
    ],
)
def test_another_loss_is_refused(name, given, tmp_path):
    with pytest.raises(ConfigError) as error:
        trainer_of(tmp_path, **given)
    assert str(error.value) == (
        f"{name} has no effect on a loss that follows a teacher. Leave it out, or use a Trainer with "
        "AdaptiveSparseCallback and without distillation."
    )


def test_arguments_may_be_given_by_position_and_the_arguments_left_out(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    by_position = AdaptiveSparseTrainer(sparse_model(), arguments(tmp_path), Recorder(), examples())
    assert len(by_position.train_dataset) == 32
    assert by_position.args.optim == TrainingArguments.__dataclass_fields__["optim"].default
    without = AdaptiveSparseTrainer(sparse_model(), train_dataset=examples(), data_collator=Recorder())
    assert type(without.create_optimizer()) is SparseAdamW
    assert tokens().shape == (2, 12)
