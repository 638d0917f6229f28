"""What a one-shot run will cost, from shapes alone: floating point operations, bytes, peak memory, time.

Operations are those of the large matrix products and factorisations, 2 for a multiplication with its addition. What is
measured of the machine is one rate: how fast it multiplies large matrices. Times are operations by that rate, so they
are what the run cannot be faster than; small kernels, sorting and moving data come on top.
"""

from __future__ import annotations

import time
from collections.abc import Collection
from dataclasses import dataclass

import torch
from torch import nn

from ..methods.one_shot import MEASURED_ALLOCATIONS, OneShotConfig
from .block_shapes import BlockShape, InputShape, block_shapes
from .evaluation import rows_at_once
from .experts import TOKENS_PER_FEATURE
from .one_shot_memory import FITNESS_WINDOWS, curve_points, kept_parts, one_shot_memory, stream_count
from .solver_flops import (
    FACTORISATIONS,
    curve_flops,
    factor_flops,
    half_square,
    solving_flops,
    spectrum_flops,
)

_HUTCHINSON_PASSES = 9  # forward passes that a Hessian-vector product by double backward takes
# Candidates of one generation, and windows on which they are measured.
_SEARCH_STAGES = ((32, 1), (8, 4), (3, FITNESS_WINDOWS))
_FLOAT = 4  # bytes


@dataclass(frozen=True, kw_only=True)
class OneShotPlan:
    """The predicted cost of a run.

    Attributes:
        tokens: of the calibration.
        blocks: kinds of blocks of the model, with their inputs.
        passes: how often a window starts through a block or its dense copy, to the end or to the last input that is
            read, while the blocks are pruned.
        window_flops: operations of one window through the whole model.
        flops: term -> operations.
        in_model_dtype: terms that are computed in the dtype of the model; the others are in float32.
        stored_bytes: what the weights take on disk, dense; `packed_bytes`, packed, None where that does not apply.
        device_bytes: offload -> largest memory on the device where blocks are computed.
        host_bytes: offload -> largest memory beside it; where the device is the CPU, both are in `memory_bytes`.
        file_bytes: offload -> what waits in files.
        memory_bytes: offload -> largest memory of a run on the CPU.
    """

    tokens: int
    blocks: list[BlockShape]
    passes: int
    window_flops: int
    flops: dict[str, float]
    in_model_dtype: frozenset[str]
    stored_bytes: int
    packed_bytes: int | None
    device_bytes: dict[str, int]
    host_bytes: dict[str, int]
    file_bytes: dict[str, int]
    memory_bytes: dict[str, int]

    def seconds(self, model_rate: float, float32_rate: float) -> dict[str, float]:
        """Term -> least time, given how many operations per second products take in the two dtypes."""
        rates = {name: model_rate if name in self.in_model_dtype else float32_rate for name in self.flops}
        return {name: flops / rates[name] for name, flops in self.flops.items()}


def plan_one_shot(
    model: nn.Module,
    config: OneShotConfig,
    *,
    windows: int,
    window: int,
    batch_size: int = 8,
    skip: Collection[str] = (),
    dtype: torch.dtype | None = None,
    stored: torch.dtype | None = None,
) -> OneShotPlan:
    """Predict the cost of `one_shot` for a model on the meta device.

    Args:
        windows, window: how many calibration windows, of how many tokens.
        batch_size, skip: as for `one_shot`.
        dtype: of the model in memory; default: that of its parameters.
        stored: dtype of the results; default: the same.
    Raises:
        TargetError: the blocks cannot be run without weights.
    """
    shapes = block_shapes(model, window, skip)
    tokens = windows * window
    terms: dict[str, float] = {}

    def add(term: str, flops: float) -> None:
        if flops:
            terms[term] = terms.get(term, 0.0) + flops

    whole = sum(shape.blocks * shape.flops for shape in shapes) + _head_flops(model, window)
    dtype = dtype or next(model.parameters()).dtype
    for term, flops in _allocation_flops(shapes, config, whole, windows, window).items():
        add(term, flops)
    if "gradient" in config.needs:
        products = 2 * tokens * _numel(shapes)  # of gradients with inputs, for the weights
        add("gradient pass of the score", windows * (whole + _backward_flops(shapes, whole, window)) + products)
    needs = config.needs & {"gram", "cross"}
    passes = 0
    for shape in shapes:
        walk = _walk(shape, config, windows, window, dtype.itemsize)
        passes += shape.blocks * walk.passes - (walk.closing_passes if shape.is_last else 0)
        add("forward passes", shape.blocks * walk.flops - (walk.closing_flops if shape.is_last else 0))
        for each in shape.inputs:
            for term, flops in _input_flops(each, config, needs, tokens).items():
                add(term, shape.blocks * flops)
    numbers = sum(parameter.numel() for parameter in model.parameters())
    stored_width = (stored or dtype).itemsize
    head = model.get_output_embeddings()
    phases = one_shot_memory(
        shapes, config, windows=windows, window=window, batch_size=min(batch_size, windows),
        rows=min(rows_at_once(model, batch_size, window), windows), width=dtype.itemsize,
        model_bytes=numbers * dtype.itemsize, vocabulary=0 if head is None else len(head.weight),
    )  # fmt: skip
    return OneShotPlan(
        tokens=tokens,
        blocks=shapes,
        passes=passes,
        window_flops=whole,
        flops=terms,
        in_model_dtype=frozenset(("forward passes", "gradient pass of the score", "allocation: passes")),
        stored_bytes=numbers * stored_width,
        packed_bytes=_packed_bytes(shapes, config, stored_width, numbers * stored_width),
        device_bytes={offload: max(phase.device for phase in found) for offload, found in phases.items()},
        host_bytes={offload: max(phase.host for phase in found) for offload, found in phases.items()},
        file_bytes={offload: max(phase.files for phase in found) for offload, found in phases.items()},
        # On the CPU blocks that wait in memory do not move.
        memory_bytes={
            offload: max(phase.device + phase.host for phase in phases["none" if offload == "cpu" else offload])
            for offload in phases
        },
    )


def gram_flops(features: int, tokens: int) -> int:
    """Of x x^T summed over tokens, computed in full."""
    return 2 * tokens * features**2


def shared_gram_flops(shapes: list[BlockShape], tokens: int, per_matrix: bool = False) -> int:
    """Of the full Gram matrices of all inputs; `per_matrix`, of one for every matrix that reads them."""
    return sum(
        shape.blocks * each.count * (len(each.names) if per_matrix else 1)
        * gram_flops(each.features, round(each.share * tokens))
        for shape in shapes
        for each in shape.inputs
    )  # fmt: skip


def linear_flops(shapes: list[BlockShape], tokens: int) -> float:
    """Of the linear layers in one forward pass of all blocks."""
    return sum(shape.blocks * 2 * tokens * each.share * each.numel for shape in shapes for each in shape.inputs)


def measured_rate(device: torch.device | str, dtype: torch.dtype, seconds: float = 0.3) -> float:
    """Operations per second of products of two large square matrices on this device: the best of some of them."""
    device = torch.device(device)
    size = 1024 if device.type == "cpu" else 8192
    a = torch.randn(size, size, device=device).to(dtype)
    best, until = 0.0, time.perf_counter() + seconds
    while best == 0.0 or time.perf_counter() < until:
        _wait(device)
        started = time.perf_counter()
        a @ a
        _wait(device)
        best = max(best, 2 * size**3 / (time.perf_counter() - started))
    return best


def _wait(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize()


def _numel(shapes: list[BlockShape]) -> int:
    return sum(shape.blocks * each.numel for shape in shapes for each in shape.inputs)


def _head_flops(model: nn.Module, window: int) -> int:
    head = model.get_output_embeddings()
    return 0 if head is None else 2 * window * head.weight.numel()


@dataclass(frozen=True)
class _Walk:
    """What takes all windows through one block: to measure it, and to go on with what was made of it.

    Attributes:
        passes: starts of a window through the block, or through its dense copy.
        flops: of them.
        closing_passes, closing_flops: of these, the last ones, with which hidden states leave the block. What the last
            block returns is not read, so it has none.
    """

    passes: int
    flops: float
    closing_passes: int
    closing_flops: float


def _walk(shape: BlockShape, config: OneShotConfig, windows: int, window: int, width: int) -> _Walk:
    streams = stream_count(config)
    stops = {each.site: each.flops_before for each in shape.inputs}
    if config.resolved.order == "block":
        # Unless the dense hidden states have to go on, the first pass ends where the last input is read.
        measuring = streams * shape.flops if streams > 1 else max(stops.values())
        closing, starts, ends = shape.flops, streams, 1
    else:
        measuring, closing = sum(stops.values()), shape.flops
        for part in kept_parts(shape, config, windows * window, width):
            after = sum(site > part.site for site in stops)
            measuring += (part.last_flops if after else 0) - part.flops * after
            closing += (0 if after else part.last_flops) - part.flops
        measuring, closing = streams * measuring, streams * closing
        starts, ends = streams * len(stops), streams
    return _Walk(
        # With one window more it is found out which weights share an input.
        passes=windows * (starts + ends) + 1,
        flops=windows * (measuring + closing) + shape.flops,
        closing_passes=windows * ends,
        closing_flops=windows * closing,
    )


def _input_flops(each: InputShape, config: OneShotConfig, needs: frozenset[str], tokens: int) -> dict[str, float]:
    """Of the statistics of one input, and of solving the matrices that read it."""
    if "gram" not in needs:
        return {}
    flops = {"Gram matrices": _measured_gram(each, needs, tokens)}
    flops |= solving_flops(each.rows, each.features, config)
    return {term: each.count * amount for term, amount in flops.items()}


def _measured_gram(each: InputShape, needs: Collection[str], tokens: int) -> float:
    """Of one input, as it is computed: tiles on and below the diagonal; the cross products in full."""
    seen = each.share * tokens
    if each.count > 1 and seen < TOKENS_PER_FEATURE * each.features:
        seen += TOKENS_PER_FEATURE * each.features  # of all tokens, for an expert that sees few
    return seen * (half_square(each.features) + (2 * each.features**2 if "cross" in needs else 0))


def _allocation_flops(
    shapes: list[BlockShape], config: OneShotConfig, whole: int, windows: int, window: int
) -> dict[str, float]:
    """Of what decides how sparse each matrix becomes."""
    allocation = config.resolved.allocation
    blocks = sum(shape.blocks * shape.flops for shape in shapes)
    inputs = [(shape.blocks * each.count, each) for shape in shapes for each in shape.inputs]
    tokens, gradients = windows * window, windows * (whole + _backward_flops(shapes, whole, window))
    hutchinson = _HUTCHINSON_PASSES * config.probes * whole
    if allocation == "ranked":
        return {"allocation: passes": gradients if config.sensitivity == "fisher" else hutchinson}
    if allocation == "owl":
        return {"allocation: passes": (windows + 1) * blocks}
    if allocation == "alpha":
        return {"allocation: spectra": sum(count * _spectra_flops(each) for count, each in inputs)}
    if allocation not in MEASURED_ALLOCATIONS:
        return {}
    points = curve_points(config)
    flops = {
        "allocation: passes": gradients + (windows + 1) * blocks,
        "allocation: Gram matrices": sum(count * _measured_gram(each, {"gram"}, tokens) for count, each in inputs),
        f"allocation: {FACTORISATIONS}": sum(count * factor_flops(each.features) for count, each in inputs),
        "allocation: sweeps": sum(count * points * curve_flops(each.rows, each.features) for count, each in inputs),
    }
    if allocation == "evolutionary":
        measured = sum(candidates * min(effort, windows) for candidates, effort in _SEARCH_STAGES)
        begins = 2 * min(FITNESS_WINDOWS, windows)  # through the dense model, and through the first candidate
        flops["allocation: passes"] += (begins + config.generations * measured) * whole
    return flops


def _backward_flops(shapes: list[BlockShape], whole: int, window: int) -> float:
    """Of a backward pass of one window without gradients of weights: attention takes two products for every one."""
    attention = sum(shape.blocks * shape.flops for shape in shapes) - linear_flops(shapes, window)
    return whole + attention


def _spectra_flops(each: InputShape) -> float:
    return len(each.names) * spectrum_flops(each.rows // len(each.names), each.features)


def _packed_bytes(shapes: list[BlockShape], config: OneShotConfig, width: int, model_bytes: int) -> int | None:
    if config.pattern not in ("2:4", "1:4"):
        return None
    saved = 0.0
    for shape in shapes:
        for each in shape.inputs:
            if each.features % 8 or each.count > 1:
                continue
            values = each.numel / 2 * (config.bits / 8 if config.bits else width)
            scales = _FLOAT * each.rows * (each.features // config.group_size if config.group_size else 1)
            saved += shape.blocks * (each.numel * width - values - each.numel / 8 - (scales if config.bits else 0))
    return round(model_bytes - saved)
