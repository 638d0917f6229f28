"""The product with a packed weight, slow and obvious: one kept value at a time, in float64."""

from __future__ import annotations

import torch
from torch import Tensor


def packed_linear(input: Tensor, values: Tensor, meta: Tensor, bias: Tensor | None) -> Tensor:
    """input [rows, in] @ weight.T + bias, in float64; `values` [out, in/2] are no codes."""
    x, kept, octets = input.double().tolist(), values.double().tolist(), meta.tolist()
    start = [0.0] * len(octets) if bias is None else bias.double().tolist()
    result = [list(start) for _ in x]
    for row, activations in enumerate(x):
        for o, row_of_octets in enumerate(octets):
            nibbles = [nibble for octet in row_of_octets for nibble in (octet & 15, octet >> 4)]
            for group, nibble in enumerate(nibbles):
                for slot, position in enumerate((nibble & 3, nibble >> 2)):
                    result[row][o] += kept[o][2 * group + slot] * activations[4 * group + position]
    return torch.tensor(result, dtype=torch.float64).reshape(len(x), len(octets))
