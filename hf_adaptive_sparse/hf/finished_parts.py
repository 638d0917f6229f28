"""Parts of a block that need not run again: an attention that ends in its output projection, an MLP in its down
projection.

When the groups of a block are measured one after another, each with all weights before it pruned, the block would have
to run from its start for every group. But a module that returns what its last linear layer returned is determined by
what that layer read. Its inputs are kept when they are measured; from then on the linear layer alone is called, in the
place of the whole module. What comes out is the same, bit for bit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import chain

import torch
from torch import Tensor, nn

KEPT_BYTES = 2**33
"""Of inputs that are kept at a time, unless the caller says otherwise."""

_PLAIN = (type(None), bool, int, float, str)


@dataclass(frozen=True)
class Part:
    """A module inside a block, and the linear layer in it whose output it returns.

    Attributes:
        path: of the module, from the block.
        last: path of the linear layer.
        form: what the module returns, with the class Tensor in the place of the tensor: Tensor, or a tuple with it.
    """

    path: str
    last: str
    form: type | tuple

    def returned(self, output: Tensor) -> Tensor | tuple:
        """What the module returns where its linear layer returns `output`."""
        if not isinstance(self.form, tuple):
            return output
        return tuple(output if item is Tensor else item for item in self.form)


class PartFinder:
    """Watches one pass through a block for modules that return what a linear layer in them returned.

    Args:
        block: that is run while this is open.
        linears: its linear layers that can be pruned, by path.

    Attributes:
        outer: the modules around them, the largest first, by path.
    """

    def __init__(self, block: nn.Module, linears: dict[str, nn.Module]) -> None:
        self._linears = linears
        inside = {path[:end] for path in linears for end, letter in enumerate(path) if letter == "."}
        self.outer = {path: block.get_submodule(path) for path in sorted(inside, key=len)}
        self._returned: dict[nn.Module, list[_Returned]] = {}

    def __enter__(self) -> PartFinder:
        def note(module: nn.Module, args: tuple, output: object) -> None:
            self._returned.setdefault(module, []).append(_Returned(output))

        watched = {*self._linears.values(), *self.outer.values()}
        self._handles = [module.register_forward_hook(note) for module in watched]
        return self

    def __exit__(self, *exception: object) -> None:
        for handle in self._handles:
            handle.remove()

    def part_of(self, last: str) -> Part | None:
        """The largest module that returned the output of this linear layer; None where there is no such module."""
        own = self._returned.get(self._linears[last], [])
        for path, module in self.outer.items():
            found = self._returned.get(module, [])
            if last.startswith(f"{path}.") and len(own) == len(found) == 1 and found[0].is_only(own[0]):
                return Part(path, last, found[0].form)
        return None


class _Returned:
    """What a module returned: a tensor, or a tuple with one among plain values. `form` is None for anything else.

    Tensors are told apart as objects, which works without values too. A version is kept, because a tensor that was
    written to in the meantime is another value in the same object.
    """

    def __init__(self, output: object) -> None:
        items = output if type(output) is tuple else (output,)
        tensors = [item for item in items if isinstance(item, Tensor)]
        self.form: type | tuple | None = None
        if len(tensors) == 1 and all(isinstance(item, (Tensor, *_PLAIN)) for item in items):
            self._tensor, self._version = tensors[0], tensors[0]._version
            form = tuple(Tensor if isinstance(item, Tensor) else item for item in items)
            self.form = form if items is output else Tensor

    def is_only(self, linear: _Returned) -> bool:
        """Whether it is what this linear layer returned, unchanged, and nothing else."""
        if self.form is None or linear.form is not Tensor:
            return False
        return self._tensor is linear._tensor and self._version == linear._version


class Buffers:
    """Tensors that block after block uses again.

    Args:
        new_buffer: (shape, dtype) -> a tensor of unset values.
    """

    def __init__(self, new_buffer: Callable[[tuple[int, ...], torch.dtype], Tensor]) -> None:
        self._new_buffer = new_buffer
        self._free: dict[tuple, list[Tensor]] = {}

    def take(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        free = self._free.get((shape, dtype))
        return free.pop() if free else self._new_buffer(shape, dtype)

    def give_back(self, tensor: Tensor) -> None:
        self._free.setdefault((tuple(tensor.shape), tensor.dtype), []).append(tensor)


@dataclass(eq=False)
class _Kept:
    """What the last layer of a part read in every batch; once `finished`, what it returned."""

    part: Part
    values: Tensor
    versions: dict[str, int]
    shapes: list[torch.Size] = field(default_factory=list)
    finished: bool = False


class FinishedParts:
    """What is kept of one block, or of its dense copy, while its groups are measured one after another.

    Args:
        block: that is run.
        parts: that may be kept.
        order: paths of all linear layers in the order in which they are called first.
        rows: the windows of each batch.
        shape: windows, and tokens of each.
        buffers: to keep values in.
        limit: bytes that are kept at a time; a part that would need more runs again instead.
    """

    def __init__(
        self,
        block: nn.Module,
        parts: Sequence[Part],
        order: Sequence[str],
        rows: Sequence[slice],
        shape: tuple[int, int],
        buffers: Buffers,
        limit: int,
    ) -> None:
        self._block, self._buffers, self._limit = block, buffers, limit
        self._parts = {part.last: part for part in parts}
        self._after = {part.last: set(order[order.index(part.last) + 1 :]) for part in parts}
        windows, length = shape
        self._tokens = [slice(each.start * length, min(each.stop, windows) * length) for each in rows]
        self._kept: dict[str, _Kept] = {}

    def keep(self, last: str, number: int, x: Tensor) -> None:
        """Keep what a linear layer reads in batch `number`, if a part ends in it and there is room. In order."""
        if number == 0 and last in self._parts:
            self._drop(last)
            values = self._room(x.shape[-1], x.dtype)
            if values is not None:
                self._kept[last] = _Kept(self._parts[last], values, self._versions())
        kept = self._kept.get(last)
        if kept is None:
            return
        place = kept.values[self._tokens[number]]
        if x.numel() != place.numel() or number != len(kept.shapes):
            self._drop(last)  # not every token is read, so the layer is not all that the part returns
            return
        kept.shapes.append(x.shape)
        place.view(x.shape).copy_(x)

    def usable(self, before: str | None) -> list[str]:
        """Layers in which parts end that need not run; all are called before the layer `before` (None: all there are).

        What was kept before a weight in front of it changed is forgotten.
        """
        found, now = [], self._versions()
        for last, kept in list(self._kept.items()):
            changed = {name.rpartition(".")[0] for name, version in now.items() if kept.versions[name] != version}
            allowed = self._after[last] if kept.finished else self._after[last] | {last}
            if not changed <= allowed or len(kept.shapes) != len(self._tokens):
                self._drop(last)
            elif before is None or before in self._after[last]:
                found.append(last)
        return found

    def finish(self, last: str) -> None:
        """Call the layer once for every batch and keep what it returns; where there is no room, its inputs stay."""
        kept, layer = self._kept[last], self._block.get_submodule(last)
        if kept.finished:
            return
        old = target = kept.values
        for number, tokens in enumerate(self._tokens):
            output = self._call(layer, kept, number)
            if number == 0 and (output.shape[-1], output.dtype) != (old.shape[-1], old.dtype):
                room = self._room(output.shape[-1], output.dtype)
                if room is None:
                    return
                target = room
            target[tokens].view(output.shape).copy_(output)
            kept.shapes[number] = output.shape
        if target is not old:
            self._buffers.give_back(old)
        kept.values, kept.finished, kept.versions = target, True, self._versions()

    @contextmanager
    def standing_in(self, lasts: Sequence[str], number: int) -> Iterator[None]:
        """While it is open, the parts that end in these layers return what they would return for batch `number`."""
        replaced = []
        try:
            for last in lasts:
                module = self._block.get_submodule(self._kept[last].part.path)
                if "forward" not in vars(module):  # else something else replaced it, and it runs
                    module.forward = self._stand_in(last, number)
                    replaced.append(module)
            yield
        finally:
            for module in replaced:
                del module.forward

    def close(self) -> None:
        """Forget everything."""
        for last in list(self._kept):
            self._drop(last)

    def _stand_in(self, last: str, number: int) -> Callable:
        kept, layer = self._kept[last], self._block.get_submodule(last)

        def forward(*args: object, **kwargs: object) -> Tensor | tuple:
            return kept.part.returned(self._call(layer, kept, number))

        return forward

    def _call(self, layer: nn.Module, kept: _Kept, number: int) -> Tensor:
        values = kept.values[self._tokens[number]].view(kept.shapes[number])
        values = values.to(next(layer.parameters()).device)
        # A copy, because the block may write into what a module of it returned.
        return values.clone() if kept.finished else layer(values)

    def _room(self, features: int, dtype: torch.dtype) -> Tensor | None:
        shape = (self._tokens[-1].stop, features)
        used = sum(kept.values.nbytes for kept in self._kept.values())
        if used + shape[0] * features * dtype.itemsize > self._limit:
            return None
        return self._buffers.take(shape, dtype)

    def _drop(self, last: str) -> None:
        if last in self._kept:
            self._buffers.give_back(self._kept.pop(last).values)

    def _versions(self) -> dict[str, int]:
        tensors = chain(self._block.named_parameters(), self._block.named_buffers())
        return {name: tensor._version for name, tensor in tensors}
