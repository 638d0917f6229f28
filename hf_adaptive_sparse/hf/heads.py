"""The head of a causal language model, and the hidden states that go into it.

With both at hand the loss makes logits a chunk of tokens at a time, and [tokens, vocab] never exists.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from peft.utils import ModulesToSaveWrapper
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel

from ..errors import TrainingError

_LARGE = 1000.0  # logits; every soft cap in use is far below


def linear_head(model: PreTrainedModel) -> nn.Module | None:
    """The head, if it is an nn.Linear whose weight can be read; also one that peft trains as a whole."""
    head = model.get_output_embeddings()
    if not isinstance(head, nn.Module):
        return None
    linears = [head]
    if isinstance(head, ModulesToSaveWrapper):
        linears = [head.original_module, *head.modules_to_save.values()]
    # Subclasses may compute something else, and FSDP2 makes a subclass: a sharded weight is whole only within
    # the model's own forward. What ZeRO-3 and FSDP1 leave outside of it is not a matrix.
    is_linear = all(type(linear) is nn.Linear and linear.weight.dim() == 2 for linear in linears)
    return head if is_linear else None


def forward_to_head(
    model: nn.Module, plain: PreTrainedModel, inputs: dict[str, Any]
) -> tuple[Any, Tensor, nn.Module]:
    """Run a model whose head works on the first position only.

    Args:
        model: what is called; `plain`, or what it is wrapped into.
    Returns:
        The outputs, with logits of one position; the hidden states of all positions, [..., width]; the head.
    """
    head = plain.get_output_embeddings()
    outputs, hidden = _with_head_input(model, head, inputs, lambda given: given[:, :1])
    return outputs, hidden, head


@torch.no_grad()
def has_plain_logits(model: nn.Module, plain: PreTrainedModel, inputs: dict[str, Any]) -> bool:
    """Whether the logits of a model are those of its linear head: no soft cap, scale or added tokens.

    Looks at logits around 1000, which no soft cap lets pass, however small those of the model are by now.
    """
    head = plain.get_output_embeddings()
    expected: list[Tensor] = []

    def probe(given: Tensor) -> Tensor:
        first = given[:, :1]
        largest = functional.linear(first, head.weight, head.bias).abs().max().item()
        room = 1e4 / max(first.abs().max().item(), 1e-4)  # float16 ends at 65504
        factor = 2.0 ** math.floor(math.log2(max(1.0, min(_LARGE / max(largest, 1e-4), room))))
        # A power of two, so that nothing is rounded; computed here, under the same autocast.
        first = torch.cat([first, first * factor], dim=1)
        expected.append(functional.linear(first, head.weight, head.bias).float())
        return first

    logits = _with_head_input(model, head, inputs, probe)[0].logits.float()
    tolerance = 1e-2 * expected[0].abs().max().item()
    return logits.shape == expected[0].shape and torch.allclose(logits, expected[0], rtol=0.0, atol=tolerance)


def _with_head_input(
    model: nn.Module, head: nn.Module, inputs: dict[str, Any], change: Callable[[Tensor], Tensor]
) -> tuple[Any, Tensor]:
    """(outputs, what the head was given) of a forward in which it works on `change` of that."""
    given: list[Tensor] = []

    def before(module: nn.Module, arguments: tuple) -> tuple:
        given.append(arguments[0])
        return change(arguments[0]), *arguments[1:]

    hook: RemovableHandle = head.register_forward_pre_hook(before)
    try:
        outputs = model(**inputs)
    finally:
        hook.remove()
    if len(given) != 1:
        raise TrainingError(
            f"the head of {type(model).__name__} ran {len(given)} times in one forward, expected once."
        )
    return outputs, given[0]
