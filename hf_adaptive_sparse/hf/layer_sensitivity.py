"""What making one matrix 2:4 would do, matrix by matrix, with all others dense: measured on a little text."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from ..patterns import PATTERNS
from ..saliency import wanda_score
from ..sensitivity import output_error
from .blocks import Member, find_blocks
from .calibration import walk_blocks
from .data import WindowDataset
from .evaluation import perplexity
from .loss_gradients import fisher_traces
from .one_shot import prunable_members


@dataclass(frozen=True, kw_only=True)
class LayerSensitivity:
    """One matrix.

    Attributes:
        error: squared error of its outputs on the text, as a part of the squared outputs, if its smallest Wanda scores
            go to 2:4 and nothing makes up for it.
        trace: Fisher trace per weight: what a small random change of a weight weighs in the loss.
        loss: what it adds to the loss, in nats per token: measured, or predicted to second order as half of the
            absolute error by the squared gradient of one output. The prediction takes the error to have no special
            direction, and can be several times too high where softmax takes no notice of much of it: for queries and
            keys (benchmarks/layer_sensitivity.py).
        measured: whether the loss is.
    """

    name: str
    shape: tuple[int, int]
    error: float
    trace: float
    loss: float
    measured: bool


def layer_sensitivity(
    model: nn.Module,
    windows: WindowDataset | Tensor,
    *,
    pattern: str = "2:4",
    batch_size: int = 8,
    device: torch.device | str | None = None,
    skip: Collection[str] = (),
    measure: bool = False,
    on_block: Callable[[int, int], None] | None = None,
) -> list[LayerSensitivity]:
    """Of every matrix that can be pruned, in the order of the model, which is as before when this returns.

    One backward pass for the traces (`fisher_traces`), one walk over the blocks for the errors.

    Args:
        windows: [windows, length] tokens.
        batch_size: windows in a pass, at most.
        skip: modules that are left out, by full name or by the end of it.
        measure: run the model once for every matrix, with it alone at 2:4.
        on_block: called with (finished blocks, all blocks).
    Raises:
        TargetError, DataError, CalibrationError: as `walk_blocks` and `fisher_traces`.
    """
    chosen = PATTERNS[pattern]
    stack = find_blocks(model)
    members = prunable_members(stack, skip)
    fitting = {name for name, member in members.items() if member.shape[1] % chosen.m == 0}
    traces = fisher_traces(model, windows, sorted(fitting), batch_size=batch_size, device=device)
    found, kept = {}, {}
    walk = walk_blocks(
        model, windows, needs={"gram"}, propagate="dense", batch_size=batch_size, device=device, skip=skip
    )
    for visit in walk:
        for group in visit.groups:
            for member in (member for member in group.members if member.name in fitting):
                weight, trace = member.weight, traces[member.name]
                keep = chosen.keep_mask(wanda_score(weight, group.stats), chosen.sparsity)
                pruned = torch.where(keep, weight, weight.new_zeros(()))
                absolute = output_error(weight, pruned, group.stats, relative=False)
                found[member.name] = LayerSensitivity(
                    name=member.name,
                    shape=member.shape,
                    error=output_error(weight, pruned, group.stats),
                    trace=trace.trace / weight.numel(),
                    loss=0.5 * absolute * trace.output_gradient / member.shape[0],
                    measured=False,
                )
                if measure:
                    kept[member.name] = keep.cpu()
        if on_block is not None:
            on_block(visit.index + 1, len(stack.blocks))
    if measure:
        losses = _measured_losses(model, windows, {name: members[name] for name in kept}, kept, batch_size)
        found = {name: replace(each, loss=losses[name], measured=True) for name, each in found.items()}
    return [found[name] for name in members if name in found]


def _measured_losses(
    model: nn.Module,
    windows: WindowDataset | Tensor,
    members: dict[str, Member],
    kept: dict[str, Tensor],
    batch_size: int,
) -> dict[str, float]:
    dense = perplexity(model, windows, batch_size=batch_size, max_windows=None).nll
    losses = {}
    for name, member in members.items():
        weight = member.weight.clone()
        try:
            member.set_weight(torch.where(kept[name].to(weight.device), weight, weight.new_zeros(())))
            losses[name] = perplexity(model, windows, batch_size=batch_size, max_windows=None).nll - dense
        finally:
            member.set_weight(weight)
    return losses
