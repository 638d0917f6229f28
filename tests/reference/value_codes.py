"""Codes of quantised values, slow and obvious: Python lists, one value at a time."""

from __future__ import annotations


def code_bytes(codes: list[list[int]], bits: int) -> list[list[int]]:
    """What is stored of codes, as bytes 0 to 255, row by row."""
    if bits == 8:
        return [[code % 256 for code in row] for row in codes]
    return [[row[i] % 16 + 16 * (row[i + 1] % 16) for i in range(0, len(row), 2)] for row in codes]


def products(codes: list[list[int]], scales: list[list[float]], group_size: int) -> list[list[float]]:
    """code * scale of the kept values, two of every four inputs; not rounded."""
    rows = zip(codes, scales, strict=True)
    return [[code * scale[2 * place // group_size] for place, code in enumerate(row)] for row, scale in rows]
