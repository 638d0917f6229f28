"""Masks in few bits, slow and obvious: Python lists, one group at a time."""

from __future__ import annotations

from .sparse_bitmask import bits_of

PATTERNS = [(0, 1), (0, 2), (1, 2), (0, 3), (1, 3), (2, 3)]
# What a group of fewer than two takes, by its only member, if it has one.
SHORT = {None: 5, 0: 1, 1: 2, 2: 5, 3: 5}


def two_of_four(keep: list[list[bool]]) -> tuple[list[list[int]], list[int]]:
    """Bytes row by row, and the places that they keep and the mask does not."""
    rows, cleared = [], []
    for number, row in enumerate(keep):
        digits = []
        for start in range(0, len(row), 4):
            members = tuple(position for position in range(4) if row[start + position])
            assert len(members) <= 2
            digit = PATTERNS.index(members) if len(members) == 2 else SHORT[members[0] if members else None]
            digits.append(digit)
            extra = set(PATTERNS[digit]) - set(members)
            cleared += [number * len(row) + start + position for position in sorted(extra)]
        digits += [0] * (-len(digits) % 3)
        rows.append([digits[i] + 6 * digits[i + 1] + 36 * digits[i + 2] for i in range(0, len(digits), 3)])
    return rows, cleared


def bits(keep: list[list[bool]]) -> list[list[int]]:
    return [bits_of(row) for row in keep]
