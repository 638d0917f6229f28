"""The packed 2:4 format, slow and obvious: Python lists, one group at a time."""

from __future__ import annotations

# Which two positions a group with fewer than two non-zeros keeps, by the positions of its non-zeros.
SHORT_GROUPS = {(): (2, 3), (0,): (0, 2), (1,): (1, 2), (2,): (2, 3), (3,): (2, 3)}


def pack(weight: list[list[float]]) -> tuple[list[list[float]], list[list[int]]]:
    """Values and bytes of positions, row by row."""
    values, meta = [], []
    for row in weight:
        kept, nibbles = [], []
        for start in range(0, len(row), 4):
            nonzero = tuple(position for position in range(4) if row[start + position] != 0)
            assert len(nonzero) <= 2
            first, second = SHORT_GROUPS.get(nonzero, nonzero)
            kept += [row[start + first] or 0.0, row[start + second] or 0.0]  # `or`: -0.0 becomes 0.0
            nibbles.append(first + 4 * second)
        values.append(kept)
        meta.append([nibbles[i] + 16 * nibbles[i + 1] for i in range(0, len(nibbles), 2)])
    return values, meta


def unpack(values: list[list[float]], meta: list[list[int]]) -> list[list[float]]:
    weight = []
    for kept, codes in zip(values, meta, strict=True):
        row = []
        nibbles = [nibble for byte in codes for nibble in (byte % 16, byte // 16)]
        for group, nibble in enumerate(nibbles):
            four = [0.0, 0.0, 0.0, 0.0]
            four[nibble % 4], four[nibble // 4] = kept[2 * group], kept[2 * group + 1]
            row += four
        weight.append(row)
    return weight
