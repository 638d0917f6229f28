"""How much memory a one-shot run takes, phase by phase, from shapes alone."""

from __future__ import annotations

from dataclasses import dataclass

from ..methods.one_shot import MEASURED_ALLOCATIONS, MIXED, OneShotConfig
from .block_shapes import BlockShape, PartShape
from .finished_parts import KEPT_BYTES
from .offload import OFFLOADS

FITNESS_WINDOWS = 16  # at most, on which the evolutionary search compares models
# Around the target, in steps of 0.05, where matrices are measured.
_REACH = {"error_curves": 3, "evolutionary": 4}
_STEP = 0.05
_EXPERT_BYTES = 2**31  # of Gram matrices of experts that are held at a time
# Float32 copies of a stack of weights that are alive at the same time.
_COPIES = {"zero_fill": 4, "obs_sweep": 6, "thanos": 5, "admm": 9, "fista": 9}
_PCG_COPIES = 9
# While an unstructured mask is chosen: of the stack, and of one of its matrices, whose scores get 64 bit numbers.
_MASK_COPIES = (3, 6)
_FLOAT = 4  # bytes


@dataclass(frozen=True)
class Phase:
    """Bytes in one phase of a run: on the device where blocks are computed, in the memory beside it, in files."""

    device: int
    host: int = 0
    files: int = 0


def one_shot_memory(
    shapes: list[BlockShape],
    config: OneShotConfig,
    *,
    windows: int,
    window: int,
    batch_size: int,
    rows: int,
    width: int,
    model_bytes: int,
    vocabulary: int,
) -> dict[str, list[Phase]]:
    """offload -> the phases of a run.

    Args:
        batch_size: windows in a forward pass.
        rows: windows in a pass of the whole model with gradients.
        width: bytes of a number of the model.
        vocabulary: numbers that the head returns for a token.
    """
    allocation, needs = config.resolved.allocation, config.needs & {"gram", "cross"}
    tokens = windows * window
    weights = sum(shape.blocks * each.numel for shape in shapes for each in shape.inputs)
    largest = max(width * shape.parameters for shape in shapes)
    found: dict[str, list[Phase]] = {offload: [] for offload in OFFLOADS}

    def by_block(working: int, hidden: int, home: int = 0, host: int = 0) -> None:
        for offload, phases in found.items():
            # A block that lies on the device is not there twice.
            device = working - (largest if offload == "none" else 0)
            phases.append(_phase(offload, device, model_bytes + hidden, home, host))

    # Taylor: the root mean squares of the gradients, in float32 until the run ends.
    gradients = _FLOAT * weights if "gradient" in config.needs else 0
    if gradients or allocation in ("ranked", *MEASURED_ALLOCATIONS):
        # A backward pass of the whole model on the device, which keeps its activations.
        activations = rows * width * sum(shape.blocks * shape.activations for shape in shapes)
        for phases in found.values():
            phases.append(Phase(model_bytes + activations + gradients))
    if allocation in MEASURED_ALLOCATIONS:
        # The search keeps what every matrix becomes at every sparsity, on the host.
        database = curve_points(config) * width * weights if allocation == "evolutionary" else 0
        sweep = OneShotConfig(method="sparsegpt", pattern="unstructured")
        working = _working(shapes, sweep, frozenset({"gram"}), batch_size, width)
        by_block(working, width * tokens * shapes[0].hidden, host=database)
        if allocation == "evolutionary":
            # The dense weights, the log-probabilities of the dense model, and 3 times those of a batch to compare.
            judged = min(windows, FITNESS_WINDOWS)
            scores = (judged + 3 * min(batch_size, judged)) * window * vocabulary * _FLOAT
            for offload, phases in found.items():
                phases.append(_phase(offload, 0, model_bytes, width * weights + scores, database))
    kept = max(sum(part.features for part in kept_parts(shape, config, tokens, width)) for shape in shapes)
    hidden = stream_count(config) * width * tokens * (shapes[0].hidden + kept)
    by_block(_working(shapes, config, needs, batch_size, width), hidden, home=gradients)
    return found


def curve_points(config: OneShotConfig) -> int:
    """At how many sparsities every matrix is measured, where errors decide."""
    if config.pattern == MIXED:
        return len(config.level_patterns())
    reach = _REACH[config.resolved.allocation]
    return sum(0.0 <= config.target + _STEP * number < 1.0 for number in range(-reach, reach + 1))


def kept_parts(shape: BlockShape, config: OneShotConfig, tokens: int, width: int) -> list[PartShape]:
    """The parts of a block whose last inputs are kept: those for which there is room."""
    if config.resolved.order == "block":
        return []
    kept, room = [], KEPT_BYTES // stream_count(config)
    for part in shape.parts:
        if tokens * part.features * width <= room:
            room -= tokens * part.features * width
            kept.append(part)
    return kept


def stream_count(config: OneShotConfig) -> int:
    """Of hidden states: those of the dense model beside those of the pruned one, or these alone."""
    return 2 if "cross" in config.needs else 1


def _phase(offload: str, device: int, waiting: int, home: int, host: int) -> Phase:
    """`waiting` is the model and its hidden states, `home` what lies on the device that the model was on."""
    if offload == "none":
        return Phase(device + waiting + home, host)
    if offload == "cpu":
        return Phase(device, waiting + home + host)
    return Phase(device, home + host, waiting)


def _working(
    shapes: list[BlockShape], config: OneShotConfig, needs: frozenset[str], batch_size: int, width: int
) -> int:
    """On the device for the most expensive block: the block, its activations, its statistics and what solves it."""
    blocks = 2 if "cross" in needs and config.resolved.order == "group" else 1  # the dense block, beside the pruned one
    return max(
        blocks * width * shape.parameters + batch_size * width * shape.activations
        + _statistics_bytes(shape, needs) + _solver_bytes(shape, config)
        for shape in shapes
    )  # fmt: skip


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
    found = []
    for each in shape.inputs:
        stack = each.rows * each.features
        found.append(copies * stack + (each.features**2 if copies > _COPIES["zero_fill"] else 0))
        if config.pattern == "unstructured":
            of_stack, of_matrix = _MASK_COPIES
            found.append(of_stack * stack + of_matrix * stack // len(each.names))
    return _FLOAT * max(found)
