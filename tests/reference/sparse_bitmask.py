"""The two bitmask formats of compressed-tensors, slow and obvious: Python lists, one weight at a time."""

from __future__ import annotations


def pack(weight: list[list[float]], two_of_four: bool) -> tuple[list, list[list[int]], list[int]]:
    """Values (rows of them, or one row for all), bytes of bits row by row, and how many values stand before each row.

    With `two_of_four`, two of every four are kept: the non-zeros, and from the right what is missing.
    """
    values, bitmask, offsets, before = [], [], [], 0
    for row in weight:
        kept = [value != 0 for value in row]
        for start in range(0, len(row), 4) if two_of_four else ():
            for position in reversed(range(start, start + 4)):
                if sum(kept[start : start + 4]) < 2:
                    kept[position] = True
        values.append([value for value, keep in zip(row, kept, strict=True) if keep])
        bitmask.append(bits_of(kept))
        offsets.append(before)
        before += len(values[-1])
    return values if two_of_four else [value for row in values for value in row], bitmask, offsets


def bits_of(kept: list[bool]) -> list[int]:
    """Eight entries a byte, the first in the lowest bit."""
    return [
        sum(1 << bit for bit, keep in enumerate(kept[start : start + 8]) if keep) for start in range(0, len(kept), 8)
    ]
