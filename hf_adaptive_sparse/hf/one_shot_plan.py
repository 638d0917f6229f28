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

from ..methods.one_shot import MEASURED_ALLOCATIONS, MIXED, OneShotConfig
from .block_shapes import BlockShape, InputShape, PartShape, block_shapes
from .evaluation import rows_at_once
from .experts import TOKENS_PER_FEATURE
from .finished_parts import KEPT_BYTES
from .solver_flops import (
    FACTORISATIONS,
    curve_flops,
    factor_flops,
    half_square,
    solving_flops,
    spectrum_flops,
)

_EXPERT_BYTES = 2**31  # of Gram matrices of experts that are held at a time
_CURVE_POINTS = {"error_curves": 7, "evolutionary": 9}  # sparsities at which a matrix is measured
_HUTCHINSON_PASSES = 9  # forward passes that a Hessian-vector product by double backward takes
_SEARCH_STAGES = ((32, 1), (8, 4), (3, 16))  # candidates of one generation, and windows on which they are measured
# Float32 copies of a stack of weights that are alive at the same time.
_COPIES = {"zero_fill": 3, "obs_sweep": 6, "thanos": 5, "admm": 9, "fista": 9}
_PCG_COPIES = 9
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
        host_bytes: offload -> what waits elsewhere: in memory, or with "disk" in files.
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
    rows = rows_at_once(model, batch_size, window)  # that go through the whole model together
    device_bytes, host_bytes = _memory(
        shapes, config, needs, windows, window, batch_size, rows, dtype.itemsize, numbers * dtype.itemsize
    )
    return OneShotPlan(
        tokens=tokens,
        blocks=shapes,
        passes=passes,
        window_flops=whole,
        flops=terms,
        in_model_dtype=frozenset(("forward passes", "gradient pass of the score", "allocation: passes")),
        stored_bytes=numbers * stored_width,
        packed_bytes=_packed_bytes(shapes, config, stored_width, numbers * stored_width),
        device_bytes=device_bytes,
        host_bytes=host_bytes,
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
    streams = _streams(config)
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


def kept_parts(shape: BlockShape, config: OneShotConfig, tokens: int, width: int) -> list[PartShape]:
    """The parts of a block whose last inputs are kept: those for which there is room."""
    if config.resolved.order == "block":
        return []
    kept, room = [], KEPT_BYTES // _streams(config)
    for part in shape.parts:
        if tokens * part.features * width <= room:
            room -= tokens * part.features * width
            kept.append(part)
    return kept


def _streams(config: OneShotConfig) -> int:
    """Of hidden states: those of the dense model beside those of the pruned one, or these alone."""
    return 2 if "cross" in config.needs else 1


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
    points = len(config.level_patterns()) if config.pattern == MIXED else _CURVE_POINTS[allocation]
    flops = {
        "allocation: passes": gradients + (windows + 1) * blocks,
        "allocation: Gram matrices": sum(count * _measured_gram(each, {"gram"}, tokens) for count, each in inputs),
        f"allocation: {FACTORISATIONS}": sum(count * factor_flops(each.features) for count, each in inputs),
        "allocation: sweeps": sum(count * points * curve_flops(each.rows, each.features) for count, each in inputs),
    }
    if allocation == "evolutionary":
        measured = sum(candidates * min(effort, windows) for candidates, effort in _SEARCH_STAGES)
        begins = 2 * min(_SEARCH_STAGES[-1][1], windows)  # through the dense model, and through the first candidate
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


def _memory(
    shapes: list[BlockShape],
    config: OneShotConfig,
    needs: frozenset[str],
    windows: int,
    window: int,
    batch_size: int,
    rows: int,
    width: int,
    model_bytes: int,
) -> tuple[dict[str, int], dict[str, int]]:
    """Largest memory on the device, and what waits elsewhere, for every way to offload."""
    streams = _streams(config)
    blocks = 2 if "cross" in needs and config.resolved.order == "group" else 1  # the dense block, beside the pruned one
    working = 0
    for shape in shapes:
        block = blocks * width * shape.parameters
        activations = batch_size * width * shape.activations
        working = max(working, block + activations + _statistics_bytes(shape, needs) + _solver_bytes(shape, config))
    tokens = windows * window
    inputs = max(sum(part.features for part in kept_parts(shape, config, tokens, width)) for shape in shapes)
    hidden = streams * width * tokens * (shapes[0].hidden + inputs)
    largest = max(width * shape.parameters for shape in shapes)
    whole = model_bytes
    if config.resolved.allocation in ("ranked", *MEASURED_ALLOCATIONS) or "gradient" in config.needs:
        # A backward pass of the whole model, which keeps its activations.
        kept_activations = sum(shape.blocks * shape.activations for shape in shapes)
        whole += rows * width * kept_activations
    alone = model_bytes + hidden + working - largest
    moved = whole if whole > model_bytes else 0
    return (
        {"none": max(alone, whole), "cpu": max(working, moved), "disk": max(working, moved)},
        {"none": 0, "cpu": model_bytes + hidden, "disk": model_bytes + hidden},
    )


def _statistics_bytes(shape: BlockShape, needs: frozenset[str]) -> int:
    """Of all inputs of a block, each with its Gram matrix, scaled and factored."""
    if "gram" not in needs:
        return 0
    each_input = 3 + ("cross" in needs)
    total = 0
    for each in shape.inputs:
        one = each_input * _FLOAT * each.features**2
        total += min(each.count * one, max(one, each_input * _EXPERT_BYTES)) if each.count > 1 else one
    # Two more for the factorisation of the largest.
    return total + 2 * _FLOAT * max(each.features for each in shape.inputs) ** 2


def _solver_bytes(shape: BlockShape, config: OneShotConfig) -> int:
    copies = _COPIES[config.resolved.solver]
    if config.resolved.refine_iterations:
        copies = max(copies, _PCG_COPIES)
    return max(
        _FLOAT * (copies * each.rows * each.features + (each.features**2 if copies > 3 else 0))
        for each in shape.inputs
    )  # fmt: skip
