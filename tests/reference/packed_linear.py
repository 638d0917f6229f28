"""The product with a packed weight, slow and obvious: one kept value at a time, in float64."""

from __future__ import annotations

import torch
from torch import Tensor


def packed_linear(input: Tensor, values: Tensor, meta: Tensor, bias: Tensor | None) -> Tensor:
    """input [rows, in] @ weight.T + bias, in float64; `values` [out, in/2] are no codes."""
    rows, out = len(input), len(meta)
    result = torch.zeros(rows, out, dtype=torch.float64) if bias is None else bias.double().repeat(rows, 1)
    x, kept, bytes_ = input.double().tolist(), values.double().tolist(), meta.tolist()
    for row in range(rows):
        for o in range(out):
            nibbles = [nibble for byte in bytes_[o] for nibble in (byte & 15, byte >> 4)]
            for group, nibble in enumerate(nibbles):
                for slot, position in enumerate((nibble & 3, nibble >> 2)):
                    result[row, o] += kept[o][2 * group + slot] * x[row][4 * group + position]
    return result
