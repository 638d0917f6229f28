"""With which arguments a model calls each of its blocks, recorded without running the blocks."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import TargetError
from .blocks import BlockStack

# Tokens of the window with which it is found out what the blocks return.
_PROBE = 8
_PLAIN = (type(None), bool, int, float, str, torch.dtype, torch.device)


class BlockCalls:
    """The arguments of every block for every batch, beside the hidden states.

    Equal values are kept once: a mask that all blocks and batches share is one tensor.
    """

    def __init__(self, stack: BlockStack, batches: int) -> None:
        self._stack = stack
        self._calls: list[list[tuple[tuple, dict]]] = [[] for _ in range(batches)]

    def run(self, block: nn.Module, index: int, batch: int, hidden: Tensor) -> Tensor:
        """The hidden states [windows, length, features] after a block (or a copy of it), on their device."""
        args, kwargs = self._calls[batch][index]
        args, kwargs = (_move(value, hidden.device) for value in (args, kwargs))
        output = block(hidden, *args, **kwargs)
        return output[0] if isinstance(output, tuple) else output


@torch.no_grad()
def record_calls(
    model: nn.Module, stack: BlockStack, batches: list[Tensor], keep_hidden: Callable[[int, Tensor], None]
) -> BlockCalls:
    """Run everything in front of the blocks, and note what each block is called with.

    Args:
        model: in evaluation mode.
        batches: of tokens, each [windows, length].
        keep_hidden: called for every batch with its number and what the first block reads.
    Raises:
        TargetError: the blocks are not called one after another, each with what the one before it returned and with
            nothing else that it returned.
    """
    calls = BlockCalls(stack, len(batches))
    returned = _probe(model, stack, batches[0][:1, :_PROBE])
    for number, tokens in enumerate(batches):
        recorder = _Recorder(stack, returned)
        recorder.run(model, tokens)
        if recorder.first.shape[:2] != tokens.shape:
            raise TargetError(
                f"{stack.block_name(0)}: reads {list(recorder.first.shape[:2])} hidden states for {list(tokens.shape)} "
                "tokens. Give windows of a length that the model does not pad."
            )
        keep_hidden(number, recorder.first)
        like = next((i for i in range(number) if batches[i].shape == tokens.shape), None)
        earlier = calls._calls[like] if like is not None else [None] * len(stack.blocks)
        same: dict[int, Any] = {}
        calls._calls[number] = [_keep_once(call, old, same) for call, old in zip(recorder.calls, earlier, strict=True)]
    return calls


def _probe(model: nn.Module, stack: BlockStack, tokens: Tensor) -> dict[type, tuple | None]:
    """What blocks of each kind return besides the hidden states; None for those that return a tensor."""
    returned: dict[type, tuple | None] = {}
    _Recorder(stack, returned, run_unknown=True).run(model, tokens)
    return returned


class _Recorder:
    """Stands in for all blocks during one forward pass of the model."""

    def __init__(self, stack: BlockStack, returned: dict[type, tuple | None], run_unknown: bool = False) -> None:
        self._stack, self._returned, self._run_unknown = stack, returned, run_unknown
        self.calls: list[tuple[tuple, dict]] = []
        self.first: Tensor | None = None

    def run(self, model: nn.Module, tokens: Tensor) -> None:
        base = model.base_model if _holds(model.base_model, self._stack) else model
        with self._in_place():
            base(input_ids=tokens.long().to(model.device), **_without_cache(base))
        if len(self.calls) != len(self._stack.blocks):
            raise TargetError(
                f"{self._stack.name}: {len(self.calls)} of its {len(self._stack.blocks)} blocks are called. Only "
                "models that call each once can be walked."
            )

    @contextmanager
    def _in_place(self) -> Iterator[None]:
        real = []
        try:
            for index, block in enumerate(self._stack.blocks):
                real.append(("forward" in vars(block), block.forward))
                block.forward = self._stub(index, block)
            yield
        finally:
            for block, (own, forward) in zip(self._stack.blocks, real, strict=False):
                if own:
                    block.forward = forward
                else:
                    del block.forward

    def _stub(self, index: int, block: nn.Module) -> Callable:
        real = block.forward

        def forward(*args, **kwargs):
            hidden, args, kwargs = self._take_hidden(index, args, kwargs)
            self.calls.append((args, kwargs))
            kind = type(block)
            if kind not in self._returned and self._run_unknown:
                output = real(hidden, *args, **kwargs)
                # Copies, which are nothing that the block was given: if a later block reads one, it is from here.
                self._returned[kind] = _copied(output[1:]) if isinstance(output, tuple) else None
            rest = self._returned[kind]
            return hidden if rest is None else (hidden, *rest)

        return forward

    def _take_hidden(self, index: int, args: tuple, kwargs: dict) -> tuple[Tensor, tuple, dict]:
        name = self._stack.block_name(index)
        if args:
            hidden, args = args[0], args[1:]
        else:
            hidden = kwargs.pop("hidden_states", None)
        if not isinstance(hidden, Tensor) or hidden.dim() != 3:
            found = f"a tensor {list(hidden.shape)}" if isinstance(hidden, Tensor) else f"a {type(hidden).__name__}"
            raise TargetError(
                f"{name}: is not called with hidden states [windows, length, features] as its first argument, but "
                f"with {found}. Such a model cannot be walked."
            )
        if index != len(self.calls):
            raise TargetError(
                f"{name}: is called as block {len(self.calls)}. Only models that call each block once and in order "
                "can be walked."
            )
        if self.first is None:
            self.first = hidden
        elif hidden is not self.first and not torch.equal(hidden, self.first):
            raise TargetError(
                f"{name}: does not read what the block before it returned: the model changes the hidden states "
                "between its blocks. Such a model cannot be walked."
            )
        passed_on = {id(tensor) for rest in self._returned.values() for tensor in _tensors(rest)}
        for key, value in (*enumerate(args, start=1), *kwargs.items()):
            _check_argument(name, key, value)
            if any(id(tensor) in passed_on for tensor in _tensors(value)):
                raise TargetError(
                    f"{name}: its argument {key} is what a block before it returned, so blocks pass on more than "
                    "hidden states. Such a model cannot be walked."
                )
        return hidden, args, kwargs


def _check_argument(name: str, key: int | str, value: Any) -> None:
    if isinstance(value, (tuple, list)):
        for item in value:
            _check_argument(name, key, item)
    elif not isinstance(value, (Tensor, *_PLAIN)):
        raise TargetError(
            f"{name}: its argument {key} is a {type(value).__name__}, through which blocks could pass on more than "
            "hidden states. Such a model cannot be walked."
        )


def _holds(base: nn.Module, stack: BlockStack) -> bool:
    return any(module is stack.blocks[0] for module in base.modules())


def _without_cache(base: nn.Module) -> dict[str, bool]:
    parameters = inspect.signature(base.forward).parameters
    return {"use_cache": False} if "use_cache" in parameters or "kwargs" in parameters else {}


def _keep_once(new: Any, old: Any, same: dict[int, Any]) -> Any:
    """`new`, with every tensor in it replaced by the equal one in the same place of `old`.

    Args:
        same: what was decided in this forward pass, by id: blocks are given the same tensors.
    """
    if isinstance(new, Tensor):
        if id(new) not in same:
            equal = isinstance(old, Tensor) and old.dtype == new.dtype and torch.equal(old, new)
            same[id(new)] = old if equal else new
        return same[id(new)]
    if isinstance(new, (tuple, list)):
        olds = old if isinstance(old, type(new)) and len(old) == len(new) else [None] * len(new)
        return type(new)(_keep_once(item, other, same) for item, other in zip(new, olds, strict=True))
    if isinstance(new, dict):
        return {key: _keep_once(item, (old or {}).get(key), same) for key, item in new.items()}
    return new


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from _tensors(item)


def _copied(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.clone()
    return type(value)(_copied(item) for item in value) if type(value) in (tuple, list) else value


def _move(value: Any, device: torch.device) -> Any:
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, (tuple, list)):
        return type(value)(_move(item, device) for item in value)
    if isinstance(value, dict):
        return {key: _move(item, device) for key, item in value.items()}
    return value
