"""What the probe measures, window after window, with the plainest means."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hf_adaptive_sparse.units import Axis


def mean_loss(model: nn.Module, tokens: Tensor) -> Tensor:
    """Mean over all windows and predictions, with its graph."""
    losses = []
    for window in tokens:
        logits = model(input_ids=window[None], use_cache=False).logits[0]
        losses += [F.cross_entropy(logits[t].float(), window[t + 1]) for t in range(len(window) - 1)]
    return torch.stack(losses).mean()


def gradients(model: nn.Module, tokens: Tensor, names: list[str]) -> dict[str, Tensor]:
    parameters = dict(model.named_parameters())
    found = torch.autograd.grad(mean_loss(model, tokens), [parameters[name] for name in names])
    return dict(zip(names, found, strict=True))


@torch.no_grad()
def inputs(model: nn.Module, tokens: Tensor, weight: str) -> Tensor:
    """[windows, length, in] that the linear layer of a weight reads."""
    seen: list[Tensor] = []
    module = model.get_submodule(weight.removesuffix(".weight"))
    handle = module.register_forward_pre_hook(lambda _, args: seen.append(args[0].clone()))
    for window in tokens:
        model(input_ids=window[None], use_cache=False)
    handle.remove()
    return torch.cat([x.reshape(1, tokens.shape[1], -1) for x in seen])


@torch.no_grad()
def cosines(model: nn.Module, tokens: Tensor) -> Tensor:
    """[blocks] float64, from the hidden states that the model returns; of all blocks but the last."""
    sums = None
    for window in tokens:
        states = model(input_ids=window[None], use_cache=False, output_hidden_states=True).hidden_states
        pairs = zip(states[:-2], states[1:-1], strict=True)
        new = torch.stack([(x * y).sum(-1).div(x.norm(dim=-1) * y.norm(dim=-1)).sum().double() for x, y in pairs])
        sums = new if sums is None else sums + new
    return sums / tokens.numel()


@torch.no_grad()
def rise_without(model: nn.Module, tokens: Tensor, axis: Axis, unit: int) -> float:
    """Of the loss when the columns that read a unit are zero."""
    before = mean_loss(model, tokens).item()
    (span,) = [span for span in axis.spans if span.reads]
    weight = model.get_parameter(span.tensor)
    original = weight.detach().clone()
    weight.movedim(span.dim, 0)[span.index[unit]] = 0.0
    after = mean_loss(model, tokens).item()
    weight.copy_(original)
    return after - before
