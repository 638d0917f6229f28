"""Adapt-Pruner as its code has it, in widths alone: no budget, no remainders, sparsities of the stage."""

from __future__ import annotations


def importance(cosines: list[float]) -> list[float]:
    """r = -c; d = r - mean r; I = d / max |d|."""
    raw = [-c for c in cosines]
    mean = sum(raw) / len(raw)
    centred = [r - mean for r in raw]
    largest = max(abs(d) for d in centred)
    return [d / largest if largest > 1e-12 else 0.0 for d in centred]


def published_stage(
    heads: list[int],
    channels: list[int],
    costs: tuple[int, int],
    excess: int,
    importance: list[float],
    step: float,
    size: int,
) -> tuple[list[int], list[int]]:
    """One stage: sparsities from zero on, rounded to whole KV heads and channels, until `excess` parameters are gone.

    Args:
        heads, channels: of every block at the start of the stage.
        costs: parameters of a KV head and of a channel.
        step: D and A.
        size: rows of a head.
    """
    sparsity = [0.0] * len(heads)
    now = list(heads), list(channels)
    for _ in range(round(1 / step)):
        sparsity = [min(max(s + step - step * i, 0.0), 0.99) for s, i in zip(sparsity, importance, strict=True)]
        # A head goes when as many rows as it has are to go.
        rows = [(n * size, int(n * size * (1 - s))) for n, s in zip(heads, sparsity, strict=True)]
        now = (
            [n - (all_rows - left) // size for n, (all_rows, left) in zip(heads, rows, strict=True)],
            [int(n * (1 - s)) for n, s in zip(channels, sparsity, strict=True)],
        )
        gone = (sum(heads) - sum(now[0])) * costs[0] + (sum(channels) - sum(now[1])) * costs[1]
        if gone > excess:
            break
    return now
