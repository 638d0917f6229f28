"""Rounding to a symmetric grid, one number at a time."""

from __future__ import annotations


def nearest_code(value: float, scale: float, bits: int) -> int:
    """Halves go to the even code, as in IEEE arithmetic."""
    largest = 2 ** (bits - 1) - 1
    return max(-largest, min(largest, round(value / scale)))


def scale_of(values: list[float], bits: int) -> float:
    largest = max(abs(value) for value in values)
    return largest / (2 ** (bits - 1) - 1) if largest else 1.0


def codes(weight: list[list[float]], bits: int, group: int) -> tuple[list[list[int]], list[list[float]]]:
    """Codes [out][in] and scales [out][groups]."""
    found, scales = [], []
    for row in weight:
        size = group or len(row)
        groups = [row[start : start + size] for start in range(0, len(row), size)]
        scales.append([scale_of(values, bits) for values in groups])
        found.append(
            [nearest_code(v, scale, bits) for values, scale in zip(groups, scales[-1], strict=True) for v in values]
        )
    return found, scales
