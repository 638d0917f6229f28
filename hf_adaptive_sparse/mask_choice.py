"""Which weights of the matrices that read one input are kept, asked by a solver block by block."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .patterns import NMPattern, Unstructured
from .saliency import SALIENCY, WHOLE_MATRIX
from .stats import LayerStats


@dataclass(frozen=True)
class Goal:
    """What one matrix shall become."""

    pattern: NMPattern | Unstructured
    sparsity: float


class MaskChooser:
    """Which of the weights that a solver asks about are kept: score and pattern of each of the stacked matrices.

    How many zeros each column of an unstructured matrix gets (each row of a column block, where the scope is a row) is
    settled by the scores of the starting weights. A solver that asks block by block then meets the budget exactly, and
    blocks that matter more keep more, where a threshold per block would prune all blocks alike.
    """

    def __init__(self, weight: Tensor, stats: LayerStats, members: Sequence[Member], saliency: str) -> None:
        self.score = SALIENCY[saliency]
        self.members = members = members if saliency in WHOLE_MATRIX else _joined(members)
        patterns = [member.goal.pattern for member in members]
        widest = max((pattern.m for pattern in patterns if isinstance(pattern, NMPattern)), default=1)
        # 1 where all stay dense or are unstructured: then any number of columns can be decided together.
        self.width = widest if widest > 1 else 128
        self.budgets: list[Tensor | None] = []
        for member in members:
            pattern, start = member.goal.pattern, None
            if isinstance(pattern, Unstructured):
                start = pattern.keep_mask(self.score(weight[member.rows], member.stats), member.goal.sparsity)
            self.budgets.append(start)

    def __call__(self, weight: Tensor, columns: slice) -> Tensor:
        keeps = []
        for member, start in zip(self.members, self.budgets, strict=True):
            pattern = member.goal.pattern
            scores = self.score(weight[member.rows], member.stats, columns)
            if isinstance(pattern, NMPattern):
                keeps.append(pattern.keep_mask(scores))
            else:
                assert start is not None
                keeps.append(pattern.keep_as_many(scores, start[:, columns]))
        return keeps[0] if len(keeps) == 1 else torch.cat(keeps)


@dataclass(frozen=True, eq=False)
class Member:
    """The rows of a stack of matrices that are one of them, with statistics that may hold its own gradient."""

    rows: slice
    goal: Goal
    stats: LayerStats


def _joined(members: Sequence[Member]) -> Sequence[Member]:
    """One member for all where nothing differs: groups of n:m are decided row by row."""
    first, last = members[0], members[-1]
    same = all(member.goal == first.goal and member.stats is first.stats for member in members)
    if same and isinstance(first.goal.pattern, NMPattern):
        return [Member(slice(first.rows.start, last.rows.stop), first.goal, first.stats)]
    return members
