"""What a machine cannot be faster than with a model in every form, and what pruning, training and shrinking take."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel

from ..footprint import STORED, Footprint
from ..hardware import Hardware
from ..methods.one_shot import OneShotConfig
from .block_shapes import BlockShape
from .linear_inventory import LinearKind
from .model_sizes import ModelWork
from .one_shot_plan import plan_one_shot

PRESETS = ("fast", "balanced", "best")

_LATENT_BYTES = 4 + 4 + 8 + 1  # of a sparse weight in training: float32 latent, gradient, two moments, one-byte mask
_ADAM_COPIES = 4  # of a weight that is trained as it is: itself, gradient, two moments

CAP_NOTES = (
    "Caps are rooflines: the larger of bytes by bandwidth and operations by rate. Nothing runs faster, most runs "
    "slower, and a form gains only where a kernel reads it as it is stored; `bench` measures what a machine does.",
    "Decoding reads all weights but the rows of the input embedding once per step, and the keys and values of every "
    "sequence. 2:4 counts half of the operations only on machines with units for it.",
    "Codes of 8 and 4 bits have a float32 scale for every 128 inputs; embeddings, head and all that cannot be packed "
    "stay in the dtype of the model.",
)
COST_NOTES = (
    "Times of jobs are operations by the peak rate, so the least there can be; small kernels and moving data come on "
    "top. What measuring perplexity, writing and loading back take is not counted: with them train and prune on a CPU "
    "took 1.5 and 1.7 times the memory that is predicted (benchmarks/predicted_memory.py).",
    "prune: calibration as given; an accelerator holds one block at a time (offload disk), on a CPU the whole model "
    "and a copy are in memory.",
    "train: masks and float32 latent weights of all matrices that can be 2:4, AdamW, the dense self as teacher with "
    "its hidden states; activations of all blocks are kept.",
    "shrink: all weights are trained in the dtype of the model, AdamW, no teacher; the model counts as dense "
    "throughout.",
)


@dataclass(frozen=True, kw_only=True)
class Cap:
    """Tokens per second that cannot be beaten, and what is in memory then."""

    form: str
    decode: float
    prefill: float
    memory_bytes: int
    fits: bool | None


@dataclass(frozen=True, kw_only=True)
class Cost:
    """The predicted peak of a device's memory and the least time of one job."""

    job: str
    device_bytes: int
    fits: bool | None
    flops: float
    seconds: float
    note: str


def caps(
    sizes: Mapping[str, Footprint], work: ModelWork, machine: Hardware, dtype: str, *, batch: int, context: int
) -> list[Cap]:
    """Of every form.

    Args:
        sizes: form -> bytes (`footprints`).
        dtype: that the products are computed in.
        batch: sequences that are decoded together, and prompts that are read together.
        context: tokens that a decoded token attends to.
    """
    cache = batch * context * (work.kv_bytes or 0)
    found = []
    for form, size in sizes.items():
        sparse = STORED[form].sparse
        every, halved = (work.dense_flops, work.sparse_flops) if sparse else (work.dense_flops + work.sparse_flops, 0.0)
        step = machine.seconds(
            size.token_bytes + cache, batch * (every + context * work.attention_flops), dtype, batch * halved
        )
        tokens = batch * work.prompt
        prompt = machine.seconds(
            size.token_bytes, tokens * every + batch * work.prompt_attention_flops, dtype, tokens * halved
        )
        memory = size.file_bytes + cache
        found.append(
            Cap(form=form, decode=batch / step, prefill=tokens / prompt, memory_bytes=memory, fits=machine.fits(memory))
        )
    return found


def costs(
    model: PreTrainedModel,
    kinds: list[LinearKind],
    shapes: list[BlockShape],
    work: ModelWork,
    machine: Hardware,
    dtype: torch.dtype,
    *,
    calibration_windows: int,
    window: int,
    train_tokens: int,
    batch_size: int,
    skip: Collection[str] = (),
    in_host_memory: bool = False,
) -> list[Cost]:
    """Of pruning with every preset, of training and of shrinking.

    Args:
        shapes: of the blocks, for windows of `window` tokens; `work`: for prompts of `window` tokens.
        batch_size: windows in one step of training, and in one pass of calibration.
        in_host_memory: the device is the CPU, whose memory also holds the whole model, what pruning by magnitude is
            undone from, and later the model that is loaded back. An accelerator holds one block at a time.
    """
    parameters = sum(parameter.numel() for parameter in model.parameters())
    sparse = sum(kind.numel for kind in kinds if kind.sparse)
    width = dtype.itemsize
    name = str(dtype).removeprefix("torch.")
    found = []
    for method in PRESETS:
        plan = plan_one_shot(
            model, OneShotConfig(method=method), windows=calibration_windows, window=window, batch_size=batch_size,
            skip=skip, dtype=dtype,
        )  # fmt: skip
        seconds = sum(plan.seconds(machine.rate(name), machine.rate("float32")).values())
        peak = plan.device_bytes["disk"]
        if in_host_memory:
            peak = max(plan.device_bytes["none"] + sparse * width, 2 * parameters * width)
        found.append(
            _cost(
                f"prune --method {method}", peak, sum(plan.flops.values()), seconds, machine,
                f"{plan.tokens:,} calibration tokens; with --offload none {plan.device_bytes['none'] / 1e9:.3g} GB",
            )  # fmt: skip
        )
    activations = batch_size * width * sum(shape.blocks * shape.activations for shape in shapes)
    hidden = batch_size * window * width * sum(shape.blocks * shape.hidden for shape in shapes)
    forward = train_tokens * (work.dense_flops + work.sparse_flops + work.prompt_attention_flops / work.prompt)
    tokens = f"{train_tokens:,} tokens, steps of {batch_size * window:,}"
    found.append(
        _cost(
            "train", parameters * width + sparse * _LATENT_BYTES + activations + hidden, 4 * forward,
            4 * forward / machine.rate(name), machine, f"{tokens}: forward twice, backward once",
        )  # fmt: skip
    )
    found.append(
        _cost(
            "shrink", _ADAM_COPIES * parameters * width + activations, 3 * forward, 3 * forward / machine.rate(name),
            machine, f"{tokens}: forward and backward once",
        )  # fmt: skip
    )
    return found


def _cost(job: str, device_bytes: int, flops: float, seconds: float, machine: Hardware, note: str) -> Cost:
    return Cost(
        job=job, device_bytes=device_bytes, fits=machine.fits(device_bytes), flops=flops, seconds=seconds, note=note
    )
