"""The GPT-2 of the AST release, one layer after the other: y = x (keep W)^T + (x P^T) S^T + b, exact GELU."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def keep_of(weight: Tensor) -> Tensor:
    """The two largest magnitudes of every four, group by group."""
    keep = torch.zeros_like(weight, dtype=torch.bool)
    for row in range(weight.shape[0]):
        for start in range(0, weight.shape[1], 4):
            group = weight[row, start : start + 4].abs()
            for position in sorted(range(4), key=lambda each: -group[each].item())[:2]:
                keep[row, start + position] = True
    return keep


def gpt2_logits(state: dict[str, Tensor], tokens: Tensor, heads: int) -> Tensor:
    """[batch, length, vocabulary] from a state dict of the release."""

    def linear(name: str, x: Tensor) -> Tensor:
        weight = state[f"{name}.weight"]
        y = x @ (weight * keep_of(weight)).T + state[f"{name}.bias"]
        if f"{name}.x_proj" in state:
            y = y + (x @ state[f"{name}.x_proj"].T) @ state[f"{name}.SLoRB_Weight"].T
        return y

    def norm(name: str, x: Tensor) -> Tensor:
        centred = x - x.mean(-1, keepdim=True)
        scaled = centred / torch.sqrt(centred.square().mean(-1, keepdim=True) + 1e-5)
        return scaled * state[f"{name}.weight"] + state[f"{name}.bias"]

    batch, length = tokens.shape
    x = state["transformer.wte.weight"][tokens] + state["transformer.wpe.weight"][:length]
    width = x.shape[-1]
    blocks = {name.split(".")[2] for name in state if name.startswith("transformer.h.")}
    for block in sorted(blocks, key=int):
        prefix = f"transformer.h.{block}"
        parts = linear(f"{prefix}.attn.c_attn", norm(f"{prefix}.ln_1", x)).split(width, dim=-1)
        q, k, v = (part.view(batch, length, heads, width // heads).transpose(1, 2) for part in parts)
        scores = q @ k.transpose(-1, -2) / math.sqrt(width // heads)
        scores = scores.masked_fill(torch.ones(length, length).triu(1).bool(), -math.inf)
        attended = (scores.softmax(-1) @ v).transpose(1, 2).reshape(batch, length, width)
        x = x + linear(f"{prefix}.attn.c_proj", attended)
        hidden = linear(f"{prefix}.mlp.c_fc", norm(f"{prefix}.ln_2", x))
        hidden = hidden * 0.5 * (1 + torch.erf(hidden / math.sqrt(2)))
        x = x + linear(f"{prefix}.mlp.c_proj", hidden)
    return norm("transformer.ln_f", x) @ state["transformer.wte.weight"].T
