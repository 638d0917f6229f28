"""Statistics of the inputs inside one block: which weights share an input, and sums over what they read."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Protocol

import torch
from torch import Tensor, nn

from ..errors import CalibrationError, TargetError
from ..stats import LayerStats
from .accumulators import StatsSum
from .blocks import Member
from .experts import ExpertInputs, expert_projections
from .finished_parts import Buffers, FinishedParts, Part, PartFinder


class Group:
    """Weights of one block that read the same input, and what is known about it.

    Attributes:
        name: of the one member; of several "<what their names share>.(<the rest>, ...)".
        members: in the order in which the block calls them.
        measure: called when `stats` is read and is not there; it calls `fill`. None once they were released.
        tokens: how many reached the weights, for an expert those that were routed to it; 0 before they are counted.
        shrinkage: tau of `ExpertInputs.stats`: 0 where the statistics are of the group's own tokens alone.
    """

    def __init__(self, members: list[Member], measure: Callable[[], None]) -> None:
        self.members = members
        self.name = _joint_name([member.name for member in members])
        self.measure: Callable[[], None] | None = measure
        self._stats, self._closed = None, ""
        self.tokens, self.shrinkage = 0, 0.0

    @property
    def stats(self) -> LayerStats:
        """Of the input, on the device. Held until the loop goes on to the next block.

        Raises:
            CalibrationError: no token reached the weights, or one that is NaN or inf; or it is too late to ask.
        """
        if self._stats is None:
            if self._closed:
                raise CalibrationError(f"{self.name}: its statistics were released {self._closed}.")
            assert self.measure is not None
            self.measure()
        return self._stats

    def fill(self, stats: LayerStats, tokens: int, shrinkage: float = 0.0) -> None:
        self._stats, self.tokens, self.shrinkage = stats, tokens, shrinkage

    def release(self, when: str) -> None:
        # `measure` knows this group, and the dense block: the circle would hold them until Python looks for circles,
        # which may be many blocks later.
        self._stats, self._closed, self.measure = None, when, None


@dataclass(eq=False)
class Site:
    """One place in the forward pass of a block: an input, and the modules that read it.

    Attributes:
        members: that share the input; of fused experts all slices.
        path: of the module that is watched, from the block.
        calls: how often it is called in one pass.
        part: the module that returns what the one member returns, and need not run once that was solved; None where
            there is none.
        experts: the inputs of fused experts, once captured; None for other modules.
    """

    members: list[Member]
    path: str
    calls: int = 1
    part: Part | None = None
    experts: ExpertInputs | None = None
    dense_inputs: list[Tensor] = field(default_factory=list)

    @property
    def is_experts(self) -> bool:
        return self.members[0].expert is not None


class _Enough(Exception):
    """The rest of a block need not run: what was asked for has been seen."""


# (block or its copy, number of the batch, hidden states) -> hidden states
RunBlock = Callable[[nn.Module, int, Tensor], Tensor]


class Wanted(Protocol):
    """Which statistics to collect, and the damping that goes with them."""

    needs: frozenset[str]
    damping: float


@dataclass(frozen=True, eq=False)
class Stream:
    """Hidden states on their way through the blocks.

    Attributes:
        hidden: [windows, length, features], wherever the store keeps them.
        rows: slices of its windows, one for each batch.
        device: on which blocks are computed.
    """

    hidden: Tensor
    rows: list[slice]
    device: torch.device

    def batch(self, number: int) -> Tensor:
        return self.hidden[self.rows[number]].to(self.device)

    def first_window(self) -> Tensor:
        return self.hidden[:1].to(self.device)

    def replace(self, number: int, output: Tensor, name: str) -> None:
        """Store what a block returned in the place of what it read."""
        place = self.hidden[self.rows[number]]
        if output.shape != place.shape or output.dtype != place.dtype:
            raise TargetError(
                f"{name}: reads {place.dtype} {list(place.shape)} and returns {output.dtype} {list(output.shape)}. "
                "Only blocks that return hidden states like those they read can be walked."
            )
        place.copy_(output)


@torch.no_grad()
def find_sites(block: nn.Module, members: Sequence[Member], run: Callable[[nn.Module], object]) -> list[Site]:
    """Which members read the same tensor, in the order in which they are called.

    Sharing is decided by the identity of the tensor (memory, version and shape), not by names; inputs and outputs are
    kept meanwhile, so that no memory is used twice. Members that are not called at all come last.

    Args:
        run: sends something through the block.
    """
    modules: dict[nn.Module, list[Member]] = {}
    for member in members:
        modules.setdefault(member.module, []).append(member)
    paths = {module: path for path, module in block.named_modules()}
    seen: dict[nn.Module, list[tuple]] = {}
    kept: list[Tensor] = []

    def note(module: nn.Module, args: tuple, kwargs: dict) -> None:
        x = _first_input(module, args, kwargs)
        kept.append(x)
        layout = None if x.is_contiguous() else x.stride()
        seen.setdefault(module, []).append((x.data_ptr(), x._version, x.dtype, x.numel(), x.shape[-1], layout))

    linear = {paths[module]: module for module, own in modules.items() if own[0].expert is None}
    handles = [module.register_forward_pre_hook(note, with_kwargs=True) for module in modules]
    try:
        with PartFinder(block, linear) as finder:
            run(block)
    finally:
        for handle in handles:
            handle.remove()
    sites: dict[tuple, Site] = {}
    called: list[str] = []
    for module in (*seen, *(module for module in modules if module not in seen)):
        path, fused = paths[module], modules[module][0].expert is not None
        key = (module,) if fused or module not in seen else tuple(seen[module])
        called.append(path)
        if key in sites:
            sites[key].members += modules[module]
            sites[key].part = None
            continue
        sites[key] = Site(list(modules[module]), path, len(seen.get(module, ())))
        part = None if fused else finder.part_of(path)
        if part is not None and all(p in called for p in linear if p.startswith(f"{part.path}.")):
            sites[key].part = part
    return list(sites.values())


class Meter:
    """Measures groups of one block.

    Args:
        stream: hidden states that the block reads, of the pruned model.
        beside: block and hidden states of the dense model, where `cross` is the statistic of two different inputs.
        finished: of the block and of the dense one, what need not run again while groups are measured one by one.
    """

    def __init__(
        self,
        block: nn.Module,
        stream: Stream,
        run: RunBlock,
        settings: Wanted,
        name: str,
        beside: tuple[nn.Module, Stream] | None,
        new_buffer: Callable[[tuple[int, ...], torch.dtype], Tensor],
    ) -> None:
        self._block, self._stream, self._run, self._name = block, stream, run, name
        self._needs, self._damping = settings.needs, settings.damping
        self._beside, self._new_buffer = beside, new_buffer
        self._finished: dict[nn.Module, FinishedParts] = {}

    def keep_parts(self, sites: Sequence[Site], buffers: Buffers, limit: int) -> None:
        """From now on, keep what the last layers of parts of the block read: weights change between two passes.

        Args:
            sites: all of the block, in the order in which they are called.
            limit: bytes that may be kept, of the block and the dense one together.
        """
        parts = [site.part for site in sites if site.part is not None]
        paths = {module: path for path, module in self._block.named_modules()}
        order = list(dict.fromkeys(paths[member.module] for site in sites for member in site.members))
        blocks = [(self._block, self._stream), *([self._beside] if self._beside is not None else [])]
        for block, stream in blocks:
            windows, length = stream.hidden.shape[:2]
            self._finished[block] = FinishedParts(
                block, parts, order, stream.rows, (windows, length), buffers, limit // len(blocks)
            )

    def close(self) -> None:
        """Let go of what was kept."""
        for finished in self._finished.values():
            finished.close()

    @torch.no_grad()
    def send_on(self, stream: Stream, block: nn.Module) -> None:
        """Replace hidden states by what the block, or the dense one, makes of them."""
        lasts = self._finished[block].usable(None) if block in self._finished else []
        for number in range(len(stream.rows)):
            stream.replace(number, self._pass(block, number, stream, {}, None, lasts), self._name)

    @torch.no_grad()
    def pass_over(
        self,
        measured: Sequence[tuple[Site, Group]],
        captured: Sequence[Site] = (),
        replace: Sequence[Stream] = (),
        stop_early: bool = False,
    ) -> None:
        """One pass over all batches.

        Args:
            measured: sites of linear layers, each with the group to fill.
            captured: sites of experts whose inputs are kept.
            replace: which streams go on to what the block returns: any of its own and the one beside it.
            stop_early: leave every pass when the sites have been seen.
        """
        sums = {site: StatsSum(site.members[0].shape[1], self._needs, self._stream.device) for site, _ in measured}
        total = self._stream.hidden.shape[0] * self._stream.hidden.shape[1]
        for site in captured:
            site.experts = ExpertInputs(site.members[0].module, total, self._new_buffer, self._stream.device)
        limit = sum(site.calls for site in (*sums, *captured)) if stop_early else None
        lasts = self._finish(next(iter((*sums, *captured)), None))
        for number in range(len(self._stream.rows)):
            if self._beside is not None:
                block, stream = self._beside
                hooks = {site.path: partial(self._keep_dense, site, number) for site in (*sums, *captured)}
                output = self._pass(block, number, stream, hooks, limit, lasts.get(block, ()))
                if stream in replace:
                    stream.replace(number, output, self._name)
            hooks = {site.path: partial(self._add, site, sums[site], number) for site in sums}
            hooks |= {site.path: partial(self._capture, site) for site in captured}
            output = self._pass(self._block, number, self._stream, hooks, limit, lasts.get(self._block, ()))
            if self._stream in replace:
                self._stream.replace(number, output, self._name)
        for site, group in measured:
            stats = sums[site].stats(group.name, self._damping)
            check_stats(stats, self._name)
            group.fill(stats, stats.tokens)

    def _finish(self, before: Site | None) -> dict[nn.Module, list[str]]:
        """The parts that need not run until a site, which is the only one that is measured then."""
        found = {}
        for block, finished in self._finished.items():
            found[block] = finished.usable(None if before is None else before.path)
            for last in found[block]:
                finished.finish(last)
        return found

    @torch.no_grad()
    def experts(self, site: Site, groups: Sequence[Group]) -> None:
        """Fill groups of experts, each of one member, from their captured inputs."""
        dense_module = None
        if self._beside is not None:
            dense_module = self._beside[0].get_submodule(site.path)
        first, second = expert_projections(site.members[0].module)
        for group in groups:
            member = group.members[0]
            own, tokens, shrinkage = site.experts.stats(
                member.expert, member.key == second, self._needs, dense_module, group.name, self._damping
            )
            check_stats(own, self._name)
            group.fill(own, tokens, shrinkage)

    def _pass(
        self,
        block: nn.Module,
        number: int,
        stream: Stream,
        hooks: dict[str, Callable],
        limit: int | None,
        lasts: Sequence[str] = (),
    ) -> Tensor | None:
        left = limit

        def watch(action: Callable, module: nn.Module, args: tuple, kwargs: dict) -> None:
            nonlocal left
            action(module, args, kwargs)
            if left is not None:
                left -= 1
                if left == 0:
                    raise _Enough

        handles = [
            block.get_submodule(path).register_forward_pre_hook(partial(watch, action), with_kwargs=True)
            for path, action in hooks.items()
        ]
        standing_in = self._finished[block].standing_in(lasts, number) if lasts else nullcontext()
        try:
            with standing_in:
                return self._run(block, number, stream.batch(number))
        except _Enough:
            return None
        finally:
            for handle in handles:
                handle.remove()

    def _add(self, site: Site, total: StatsSum, number: int, module: nn.Module, args: tuple, kwargs: dict) -> None:
        x = _first_input(module, args, kwargs)
        total.add(x, site.dense_inputs.pop(0) if site.dense_inputs else None)
        if self._block in self._finished:
            self._finished[self._block].keep(site.path, number, x)

    def _keep_dense(self, site: Site, number: int, module: nn.Module, args: tuple, kwargs: dict) -> None:
        x = _first_input(module, args, kwargs)
        site.dense_inputs.append(x)
        if self._beside[0] in self._finished:
            self._finished[self._beside[0]].keep(site.path, number, x)

    def _capture(self, site: Site, module: nn.Module, args: tuple, kwargs: dict) -> None:
        site.experts.capture(
            _first_input(module, args, kwargs),
            _routing(args, kwargs),
            site.dense_inputs.pop(0) if site.dense_inputs else None,
        )


def check_stats(stats: LayerStats, block_name: str) -> None:
    """Raise CalibrationError, naming block and module, unless tokens were seen and all of them were finite."""
    if not stats.tokens:
        raise CalibrationError(
            f"{stats.where}: no calibration token reached it in block {block_name}. Calibrate on more text, or add it "
            "to `skip` to leave it dense."
        )
    if not stats.squares.isfinite().all():
        column = int((~stats.squares.isfinite()).nonzero()[0])
        raise CalibrationError(
            f"{stats.where}: its inputs hold NaN or inf (input feature {column}), the first in block {block_name}. "
            "Load the model in float32 or bfloat16, and check the dense model on this text."
        )


def _joint_name(names: list[str]) -> str:
    if len(names) == 1:
        return names[0]
    parts = [name.split(".") for name in names]
    shared = 0
    while len({tuple(part[: shared + 1]) for part in parts}) == 1:
        shared += 1
    return ".".join([*parts[0][:shared], f"({', '.join('.'.join(part[shared:]) for part in parts)})"])


def _first_input(module: nn.Module, args: tuple, kwargs: dict) -> Tensor:
    return args[0] if args else next(iter(kwargs.values()))


def _routing(args: tuple, kwargs: dict) -> Tensor:
    return args[1] if len(args) > 1 else kwargs["top_k_index"]
