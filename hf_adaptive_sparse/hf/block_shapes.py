"""What a block would compute, found out without weights: a pass on the meta device, where tensors have shapes only."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from ..errors import TargetError
from .block_calls import record_calls
from .blocks import BlockStack, Member, block_linears, find_blocks
from .experts import expert_projections, is_fused_experts
from .finished_parts import PartFinder


@dataclass(frozen=True, kw_only=True)
class InputShape:
    """One input inside a block, and the matrices that read it.

    Attributes:
        names: of the matrices; of experts that of the first one.
        features: of the input.
        rows: outputs of all matrices together.
        count: how many such inputs there are: of experts one each, else 1.
        share: part of the tokens that reach one of them, on average.
        site: number of the module call at which it is seen; inputs of one experts module have the same.
        flops_before: of the block, until then, for one window.
    """

    names: tuple[str, ...]
    features: int
    rows: int
    count: int = 1
    share: float = 1.0
    site: int = 0
    flops_before: int = 0

    @property
    def numel(self) -> int:
        """Weights that read it, of all `count`."""
        return self.count * self.rows * self.features


@dataclass(frozen=True, kw_only=True)
class PartShape:
    """A module that ends in a linear layer and need not run again once that was measured, see finished_parts.

    Attributes:
        site: at which the linear layer is seen.
        features: of its input, which is kept instead.
        flops: of the module for one window.
        last_flops: of its last layer alone.
    """

    site: int
    features: int
    flops: int
    last_flops: int


@dataclass(frozen=True, kw_only=True)
class BlockShape:
    """A block, and how many of the model are like it.

    Attributes:
        name: of the first one.
        blocks: how many there are.
        is_last: whether the last block of the model is one of them.
        inputs: in the order in which they are read.
        parts: in the order in which their last layers are called.
        flops: of a forward pass of one window.
        parameters: numbers in all its weights.
        activations: numbers that its linear layers return for one window, with the hidden states.
        hidden: features of the hidden states.
    """

    name: str
    blocks: int
    is_last: bool
    inputs: tuple[InputShape, ...]
    parts: tuple[PartShape, ...]
    flops: int
    parameters: int
    activations: int
    hidden: int


def block_shapes(model: nn.Module, window: int, skip: Collection[str] = ()) -> list[BlockShape]:
    """The kinds of blocks of a model whose parameters are on the meta device.

    One block of each kind is run with hooks. Matrices share an input when they are called with the same tensor object;
    fused experts are not run, and counted from their shapes.

    Args:
        window: tokens in one window.
        skip: modules that stay dense, as for `one_shot`.
    Raises:
        TargetError: a block computes something that depends on values, so that it cannot be run without them.
    """
    stack = find_blocks(model)
    tokens = torch.zeros(1, window, dtype=torch.int64)
    kinds: dict[tuple, list[int]] = {}
    for index, block in enumerate(stack.blocks):
        shapes = tuple((name, tuple(parameter.shape)) for name, parameter in block.named_parameters())
        kinds.setdefault((type(block), shapes), []).append(index)
    hidden: list[Tensor] = []
    try:
        # Fake tensors tell transformers not to look at values, for instance to leave out a mask that hides nothing.
        with _without_experts(stack), torch.no_grad(), FakeTensorMode(allow_non_fake_inputs=True):
            calls = record_calls(model, stack, [tokens], lambda _, first: hidden.append(first))
            found = []
            for indices in kinds.values():
                index = indices[0]
                watch = _Watch(stack.blocks[index], list(block_linears(stack, index, skip).values()))
                with watch:
                    calls.run(stack.blocks[index], index, 0, hidden[0])
                is_last = indices[-1] + 1 == len(stack.blocks)
                found.append(watch.shape(stack.block_name(index), len(indices), is_last, window, hidden[0].shape[-1]))
    except RuntimeError as problem:
        reason = (str(problem).strip() or type(problem).__name__).splitlines()[0]
        raise TargetError(
            f"{type(model).__name__}: its blocks cannot be run without weights ({reason}), so what they cost is not "
            "known before they run."
        ) from problem
    return found


class _Watch:
    """Hooks on the linear layers of one block, during one pass of one window."""

    def __init__(self, block: nn.Module, members: list[Member]) -> None:
        self._block, self._counter = block, FlopCounterMode(display=False)
        self._modules: dict[nn.Module, list[Member]] = {}
        for member in members:
            self._modules.setdefault(member.module, []).append(member)
        self._seen: dict[int, tuple[Tensor, int, list[nn.Module]]] = {}  # the tensors are kept, so that ids stay apart
        self._routed: dict[nn.Module, float] = {}
        self._outputs = 0
        paths = {module: path for path, module in block.named_modules()}
        self._linears = {
            paths[module]: module for module, own in self._modules.items() if not is_fused_experts(module) and own
        }
        self._finder = PartFinder(block, self._linears)
        self._spans: dict[nn.Module, list[int]] = {}  # of a module: operations before it, and with it

    def __enter__(self) -> _Watch:
        self._handles = [module.register_forward_pre_hook(self._note, with_kwargs=True) for module in self._modules]
        self._handles += [module.register_forward_hook(self._returned) for module in self._modules]
        timed = {*self._linears.values(), *self._finder.outer.values()}
        self._handles += [module.register_forward_pre_hook(self._count) for module in timed]
        self._handles += [module.register_forward_hook(self._count) for module in timed]
        self._finder.__enter__()
        self._counter.__enter__()
        return self

    def __exit__(self, *exception: object) -> None:
        self._counter.__exit__(*exception)
        self._finder.__exit__(*exception)
        for handle in self._handles:
            handle.remove()

    def _note(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        x = args[0] if args else next(iter(kwargs.values()))
        entry = self._seen.setdefault(id(x), (x, self._counter.get_total_flops(), []))
        entry[2].append(module)
        if is_fused_experts(module):
            index = args[1] if len(args) > 1 else kwargs["top_k_index"]
            self._routed[module] = index.shape[-1] / module.num_experts

    def _count(self, module: nn.Module, *_: object) -> None:
        self._spans.setdefault(module, []).append(self._counter.get_total_flops())

    def _parts(self, inputs: list[InputShape]) -> Iterator[PartShape]:
        """Of linear layers alone: experts are not run here."""
        names = [[member.module for module in modules for member in self._modules[module]] for _, _, modules in
                 self._seen.values()]  # fmt: skip
        called = [module for modules in names for module in modules]
        for each in inputs:
            modules = names[each.site]
            path = next((path for path, module in self._linears.items() if module is modules[0]), None)
            part = None if path is None or len(modules) > 1 else self._finder.part_of(path)
            if part is None:
                continue
            inside = [module for path, module in self._linears.items() if path.startswith(f"{part.path}.")]
            if all(module in called[: called.index(modules[0]) + 1] for module in inside):
                begin, end = self._spans[self._finder.outer[part.path]]
                first, last = self._spans[modules[0]]
                yield PartShape(site=each.site, features=each.features, flops=end - begin, last_flops=last - first)

    def _returned(self, module: nn.Module, args: tuple, output: Tensor) -> None:
        self._outputs += output.numel()

    def shape(self, name: str, blocks: int, is_last: bool, window: int, features: int) -> BlockShape:
        inputs: list[InputShape] = []
        expert_flops = 0
        for site, (_, before, modules) in enumerate(self._seen.values()):
            before += expert_flops
            linear = [m for module in modules if module not in self._routed for m in self._modules[module]]
            if linear:
                inputs.append(
                    InputShape(
                        names=tuple(member.name for member in linear),
                        features=linear[0].shape[1],
                        rows=sum(member.shape[0] for member in linear),
                        site=site,
                        flops_before=before,
                    )
                )
            for module in (module for module in modules if module in self._routed):
                for parameter in expert_projections(module):
                    members = [member for member in self._modules[module] if member.key == parameter]
                    if not members:
                        continue
                    rows, width = members[0].shape
                    share = self._routed[module]
                    inputs.append(
                        InputShape(
                            names=(members[0].name,), features=width, rows=rows, count=len(members), share=share,
                            site=site, flops_before=before,
                        )  # fmt: skip
                    )
                    expert_flops += round(2 * window * share * inputs[-1].numel)
        return BlockShape(
            name=name,
            blocks=blocks,
            is_last=is_last,
            inputs=tuple(inputs),
            parts=tuple(self._parts(inputs)),
            flops=self._counter.get_total_flops() + expert_flops,
            parameters=sum(parameter.numel() for parameter in self._block.parameters()),
            activations=self._outputs + 4 * window * features,
            hidden=features,
        )


@contextmanager
def _without_experts(stack: BlockStack) -> Iterator[None]:
    """Fused experts return what they were given: which token goes where depends on values."""
    fused = [module for block in stack.blocks for module in block.modules() if is_fused_experts(module)]
    try:
        for module in fused:
            module.forward = lambda hidden_states, *_, **__: torch.empty_like(hidden_states)
        yield
    finally:
        for module in fused:
            vars(module).pop("forward", None)
