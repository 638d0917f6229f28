"""What tests of callback and trainer share: tiny sparse models, data, arguments, a plain training loop."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import TrainerCallback, TrainingArguments

from hf_adaptive_sparse.hf.adapter import AdaptiveSparseConfig
from hf_adaptive_sparse.hf.sparse_layers import sparse_layers
from tests.reference.distillation import distillation, next_token_labels
from tests.reference.patterns import keep_n_of_m
from tests.tiny_models import tiny_model, tokens

LLAMA = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "num_hidden_layers": 1,
    "initializer_range": 0.2,  # with logits around 1, so that a KL is no rounding error
}
RATE = 2e-2  # a tenth of the weights: masks flip, and rounding does not grow in a few steps
# Every value that a test here depends on; the defaults of the recipe may change.
MASKS: dict[str, Any] = {
    "mask_interval": 2,
    "start_fraction": 0.0,
    "freeze_fraction": 0.0,
    "decay": 2.0,
    "decay_norm": "relative",
    "decay_fraction": 0.5,
}


def sparse_model(family: str = "llama", model: nn.Module | None = None, **changes: Any) -> PeftModel:
    """A tiny model with an adapter; `changes` go into its config."""
    if model is None:
        model = tiny_model(family, **(LLAMA if family == "llama" else {}))
    return get_peft_model(model, AdaptiveSparseConfig(task_type="CAUSAL_LM", **{**MASKS, **changes}))


def examples(count: int = 32, length: int = 8, ignore: bool = False) -> list[dict[str, Tensor]]:
    """Random sequences; with `ignore`, a different number of labels of each does not count."""
    rows = []
    for index, ids in enumerate(tokens(count, length, seed=7)):
        labels = ids.clone()
        if ignore:
            labels[: index % (length - 2)] = -100
        rows.append({"input_ids": ids, "labels": labels})
    return rows


def arguments(folder: Path, **changes: Any) -> TrainingArguments:
    values: dict[str, Any] = {
        "output_dir": str(folder),
        "max_steps": 6,
        "per_device_train_batch_size": 2,
        "learning_rate": RATE,
        "lr_scheduler_type": "constant",
        "max_grad_norm": 1.0,
        "save_strategy": "no",
        "logging_steps": 1,
        "logging_nan_inf_filter": False,
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
        "dataloader_pin_memory": False,
    }
    return TrainingArguments(**{**values, **changes})


class Recorder:
    """A collator that remembers the batches in the order in which the Trainer takes them."""

    def __init__(self) -> None:
        self.batches: list[dict[str, Tensor]] = []

    def __call__(self, rows: list[dict[str, Tensor]]) -> dict[str, Tensor]:
        batch = {name: torch.stack([row[name] for row in rows]) for name in rows[0]}
        self.batches.append({name: tensor.clone() for name, tensor in batch.items()})
        return batch


class At(TrainerCallback):
    """Does something at one event of the Trainer: At("on_step_end", lambda state: ...)."""

    def __init__(self, event: str, action: Callable) -> None:
        setattr(self, event, lambda args, state, control, **kwargs: action(state))


def mean_loss(logits: Tensor, labels: Tensor, items: Tensor) -> Tensor:
    """Cross-entropy of the next token, summed, divided by `items`."""
    flat = logits[:, :-1].reshape(-1, logits.shape[-1])
    return nn.functional.cross_entropy(flat, labels[:, 1:].reshape(-1), reduction="sum") / items


def distilled_loss(model: nn.Module, batch: dict[str, Tensor], teacher: nn.Module | None, config) -> dict[str, float]:
    """What DistillationMixin should report for a batch, token by token in float64. No teacher: the self."""
    with torch.no_grad():
        student = model(input_ids=batch["input_ids"]).logits
        if teacher is None:
            with model.disable_adapter():
                target = model(input_ids=batch["input_ids"]).logits
        else:
            target = teacher(input_ids=batch["input_ids"]).logits
    width = student.shape[-1]
    loss, ce, kd = distillation(
        student.double().reshape(-1, width),
        target.double().reshape(-1, width),
        next_token_labels(batch["labels"]).flatten(),
        temperature=config.temperature,
        ce_weight=config.ce_weight,
        kd_weight=config.kd_weight,
        kind=config.kind,
    )
    return {"loss": float(loss), "loss/ce": float(ce), "loss/kd": float(kd)}


def plain_loop(
    model: PeftModel,
    batches: list[dict[str, Tensor]],
    optimizer: torch.optim.Optimizer,
    *,
    steps: int,
    accumulation: int,
    clip: float,
    before_clip: Callable[[int], None] = lambda step: None,
    before_step: Callable[[int], None] = lambda step: None,
    loss_of: Callable = lambda model, batch, items: mean_loss(
        model(input_ids=batch["input_ids"]).logits, batch["labels"], items
    ),
) -> None:
    """The published training loop, with nothing of a Trainer in it; masks are chosen as the config says."""
    model.train()
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    layers = sparse_layers(model)
    config = layers[0].config
    for step in range(1, steps + 1):
        micro = batches[(step - 1) * accumulation : step * accumulation]
        items = sum((batch["labels"][:, 1:] != -100).sum() for batch in micro)
        for batch in micro:
            loss_of(model, batch, items).backward()
        before_clip(step)
        torch.nn.utils.clip_grad_norm_(parameters, clip)
        before_step(step)
        optimizer.step()
        optimizer.zero_grad()
        changes = step % config.mask_interval == 0 and step <= (1 - config.freeze_fraction) * steps
        if config.mask_policy == "adaptive" and changes:
            for layer in layers:
                layer.keep.copy_(expected_keep(layer.weight))


def add_pull(layers: list, step: int, steps: int) -> None:
    """The reference rule: gradient of masked weights += lambda_s * weight, entry by entry."""
    for layer in layers:
        config = layer.config
        ramp = round(config.decay_fraction * steps)
        pull = config.decay * (min(1.0, step / ramp) if ramp else 1.0)
        gradient, weight = layer.weight.grad, layer.weight.detach()
        if config.decay_norm == "relative":
            pull *= float(gradient.norm() / weight.norm())
        gradient[~layer.keep] += pull * weight[~layer.keep]


def expected_keep(weight: Tensor) -> Tensor:
    return torch.tensor(keep_n_of_m(weight.detach().abs().tolist(), 2, 4))


def snapshot(model: nn.Module) -> dict[str, Tensor]:
    """Latent weights and masks of every layer, copied."""
    tensors = {}
    for layer in sparse_layers(model):
        tensors[f"{layer.name}.weight"] = layer.weight.detach().clone()
        tensors[f"{layer.name}.keep"] = layer.keep.clone()
    return tensors


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float = 0.0) -> None:
    """Masks to the last bit; weights too, or up to `tolerance`."""
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        if tolerance and not name.endswith(".keep"):
            torch.testing.assert_close(found[name], tensor, rtol=tolerance, atol=tolerance)
        else:
            assert torch.equal(found[name], tensor), name
