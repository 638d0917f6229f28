"""Grids of evenly spaced values around zero, and rounding to the nearest one (RTN).

Symmetric grids only: zero is a value of the grid, so that what a pattern made zero stays zero. Codes go from
-(2^(bits-1) - 1) to 2^(bits-1) - 1; the most negative integer is not used.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import ConfigError

BITS = (4, 8)

# What `search` multiplies the largest magnitude of a group with.
_SHRINKS = tuple(1.0 - 0.02 * step for step in range(31))


@dataclass(frozen=True, eq=False)
class Grid:
    """The values that the weights of one layer can have.

    Attributes:
        scales: [out, groups] float32 or float64, > 0: the distance of neighbouring values.
        bits: of one code.
        group: how many consecutive inputs share a scale; 0 = all inputs of a row.
    """

    scales: Tensor
    bits: int
    group: int = 0

    @property
    def largest(self) -> int:
        """The largest code."""
        return largest_code(self.bits)

    def codes(self, weight: Tensor) -> Tensor:
        """[out, in], any float dtype -> nearest codes [out, in] int8; 0 for 0.

        A half is rounded to the even code; what lies outside the grid goes to its end.
        """
        return self._nearest(weight, slice(0, weight.shape[1])).to(torch.int8)

    def dequantize(self, codes: Tensor) -> Tensor:
        """[out, in] int8 -> values in the dtype of `scales`."""
        return codes * self._scales(slice(0, codes.shape[1]))

    def round(self, values: Tensor, columns: slice = slice(None)) -> Tensor:
        """The nearest values of the grid, equal to `dequantize(codes(...))` to the last bit.

        Args:
            values: [out, k], any float dtype.
            columns: which k inputs of the layer they belong to; a slice with a start, or all.
        Returns:
            [out, k] in the dtype of `scales`; zeros are +0.0.
        """
        start = columns.start or 0
        columns = slice(start, start + values.shape[1])
        # Adding 0.0 turns the -0.0 of small negative values into +0.0.
        return self._nearest(values, columns).add_(0.0) * self._scales(columns)

    def _nearest(self, values: Tensor, columns: slice) -> Tensor:
        ratio = values.detach().to(self.scales.dtype) / self._scales(columns)
        return ratio.round_().clamp_(-self.largest, self.largest)

    def _scales(self, columns: slice) -> Tensor:
        if not self.group:
            return self.scales
        if columns.stop - columns.start == 1:  # in the loop of a sweep
            return self.scales[:, columns.start // self.group, None]
        inputs = torch.arange(columns.start, columns.stop, device=self.scales.device)
        return self.scales[:, inputs // self.group]


@dataclass(frozen=True)
class RTN:
    """Scales from the weights alone: the largest magnitude of a group of weights becomes the largest code.

    Attributes:
        bits: 4 or 8.
        group: how many consecutive inputs share a scale; 0 = one scale per output channel.
        search: try scales down to 0.4 of that one and take, for each group, the one with the least squared rounding
            error; large weights are then clipped. Worth its time at 4 bits.

    Raises:
        ConfigError: `bits` or `group` cannot be used.
    """

    bits: int = 8
    group: int = 0
    search: bool = False

    def __post_init__(self) -> None:
        if self.bits not in BITS:
            raise ConfigError(f"weights are rounded to {' or '.join(map(str, BITS))} bits, got bits={self.bits}.")
        if self.group < 0:
            raise ConfigError(
                f"group is how many inputs share a scale, got {self.group}. For one scale per output channel write 0."
            )

    def check_in_features(self, shape: Sequence[int], where: str = "") -> None:
        """Raise ConfigError, naming `where`, unless groups fill the rows of a [out, in] weight."""
        if self.group and shape[1] % self.group:
            raise ConfigError(
                f"{where}{': ' if where else ''}groups of {self.group} inputs need the input features to be a multiple "
                f"of {self.group}, got {shape[1]} in a {list(shape)} weight. Use a group that divides it, or 0."
            )

    def fit(self, weight: Tensor, keep: Tensor | None = None) -> Grid:
        """The grid of a layer.

        Args:
            weight: [out, in], any float dtype.
            keep: [out, in] bool: fit the kept weights only. Zeros are exact on any grid and do not count anyway.
        Returns:
            A grid with scales [out, groups], float64 for a float64 weight, else float32. Groups without a weight
            other than zero have scale 1.
        Raises:
            ConfigError: `in` is not a multiple of `group`.
        """
        self.check_in_features(weight.shape)
        out_features, in_features = weight.shape
        values = weight.detach().to(torch.float64 if weight.dtype == torch.float64 else torch.float32)
        if keep is not None:
            values = torch.where(keep, values, 0.0)
        groups = values.reshape(out_features, -1, self.group or in_features)
        largest = groups.abs().amax(dim=-1)
        scales = torch.where(largest > 0, largest / largest_code(self.bits), 1.0)
        if self.search:
            scales = _least_squares_scales(groups, scales, largest_code(self.bits))
        return Grid(scales, self.bits, self.group)


def largest_code(bits: int) -> int:
    return 2 ** (bits - 1) - 1


def _least_squares_scales(groups: Tensor, scales: Tensor, largest: int) -> Tensor:
    """[out, groups] scales, each the best of a few parts of the one given; groups is [out, groups, k]."""
    best, least = scales, torch.full_like(scales, torch.inf)
    for shrink in _SHRINKS:
        tried = (scales * shrink)[..., None]
        error = (groups / tried).round_().clamp_(-largest, largest).mul_(tried).sub_(groups).square_().sum(dim=-1)
        better = error < least
        best, least = torch.where(better, tried[..., 0], best), torch.where(better, error, least)
    return best


def round_to_nearest(weight: Tensor, stats: object | None, keep: Tensor, grid: Grid) -> Tensor:
    """Every kept weight rounded by itself.

    Args:
        weight: [out, in], any float dtype.
        stats: not read; both ways of rounding take it, so that they can be exchanged.
        keep: [out, in] bool.
    Returns:
        [out, in] in the dtype of `grid.scales`: values of the grid, +0.0 where keep is False.
    """
    return torch.where(keep, grid.round(weight), 0.0)
