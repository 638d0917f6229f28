"""The visit to one block: its groups with their statistics, and the hidden states that go on through it."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from ..errors import CalibrationError
from .block_calls import BlockCalls
from .blocks import BlockStack, Member, block_linears
from .experts import expert_projections
from .finished_parts import Buffers
from .measuring import Group, Meter, Site, Stream, find_sites
from .offload import Store

# Bytes of Gram matrices of experts that are held at a time, unless `experts_at_once` says otherwise.
_EXPERT_BYTES = 2**31


@dataclass(frozen=True, kw_only=True)
class WalkSettings:
    """As `walk_blocks` was given them."""

    needs: frozenset[str]
    order: str
    propagate: str
    skip: tuple[str, ...]
    experts_at_once: int | None
    kept_bytes: int
    to_end: bool
    damping: float

    @property
    def two_streams(self) -> bool:
        """Whether the dense model's hidden states are kept beside those of the pruned one."""
        return "cross" in self.needs and self.propagate == "sparse"


@dataclass(frozen=True, eq=False)
class WalkState:
    """Where a walk stands between two blocks.

    Attributes:
        next_block: the block that reads `hidden`.
        hidden: [windows, length, features] of the model's dtype.
        dense: the same of the dense model, where `cross` needs it.
    """

    next_block: int
    hidden: Tensor
    dense: Tensor | None = None


class Journey:
    """The hidden states on their way through all blocks.

    Attributes:
        stack: the blocks.
        pruned: what the blocks read as they are, or with propagate="dense" as they were.
        dense: what the blocks of the dense model read, where `cross` needs that beside `pruned`; else None.
    """

    def __init__(self, stack: BlockStack, calls: BlockCalls, store: Store, streams: list[Stream]) -> None:
        self.stack, self.store, self._calls = stack, store, calls
        self.pruned = streams[0]
        self.dense = streams[1] if len(streams) > 1 else None
        self.buffers = Buffers(store.empty)

    def state(self, next_block: int) -> WalkState:
        return WalkState(next_block, self.pruned.hidden, None if self.dense is None else self.dense.hidden)

    def run(self, index: int, block: nn.Module, number: int, hidden: Tensor) -> Tensor:
        """One batch through a block, or a copy of it, with the arguments of block `index`."""
        return self._calls.run(block, index, number, hidden)

    def run_one_window(self, index: int, block: nn.Module) -> Tensor:
        """The first window through a block: what `record_calls` noted for it comes after all batches."""
        return self._calls.run(block, index, len(self.pruned.rows), self.pruned.first_window())

    @torch.no_grad()
    def pass_on(self, index: int, stream: Stream, block: nn.Module | None = None) -> None:
        """Replace the hidden states of a stream by what a block makes of them."""
        for number in range(len(stream.rows)):
            output = self.run(index, block or self.stack.blocks[index], number, stream.batch(number))
            stream.replace(number, output, self.stack.block_name(index))
        self.store.release()


class BlockVisit:
    """One block, on the device.

    Attributes:
        index, name, block: which one.
        members: its weights that can be pruned by full name, in the order of the model.
        groups: those that read the same input, in the order in which the block calls them; of fused experts first all
            that read the hidden state, then all that write to it, chunk by chunk.
    """

    def __init__(self, journey: Journey, settings: WalkSettings, index: int) -> None:
        self._journey, self._settings = journey, settings
        self.index, self.name, self.block = index, journey.stack.block_name(index), journey.stack.blocks[index]
        self.members: dict[str, Member] = block_linears(journey.stack, index, settings.skip)
        self.groups: list[Group] = []
        self._finished = False
        self._held: Sequence[Group] = ()
        by_group, cross = settings.order == "group", "cross" in settings.needs
        # By group, weights change while others are still measured: the dense block is kept beside them.
        self._dense = copy.deepcopy(self.block) if by_group and (cross or settings.propagate == "dense") else self.block
        beside = None
        if settings.two_streams or (by_group and cross):
            beside = (self._dense, journey.dense or journey.pruned)
        run = partial(journey.run, index)
        self._meter = Meter(self.block, journey.pruned, run, settings, self.name, beside, journey.store.empty)
        sites = self._find_sites()
        if by_group:
            self._meter.keep_parts(sites, journey.buffers, settings.kept_bytes)
            self._measure_when_asked(sites)
        else:
            self._measure_now(sites)
        journey.store.release()

    def finish(self) -> WalkState:
        """Send the hidden states through the block as it is now; the walk does it if the caller has not.

        Returns:
            Where the walk stands then.
        """
        journey = self._journey
        if not self._settings.to_end and self.index + 1 == len(journey.stack.blocks):
            self._finished = True
        if not self._finished:
            by_group, dense = self._settings.order == "group", self._settings.propagate == "dense"
            if by_group or not dense:  # otherwise they went on while the block was measured
                self._meter.send_on(journey.pruned, self._dense if dense else self.block)
            if by_group and journey.dense is not None:
                self._meter.send_on(journey.dense, self._dense)
            self._meter.close()
            journey.store.release()
            self._finished = True
        return journey.state(self.index + 1)

    def close(self) -> None:
        """Release the statistics."""
        for group in self.groups:
            group.release("when the walk went on to the next block")
        self._meter.close()

    def _find_sites(self) -> list[Site]:
        """With one window; with a whole batch where that does not reach every weight: experts may get no token."""
        journey, members = self._journey, list(self.members.values())
        sites = find_sites(self.block, members, partial(journey.run_one_window, self.index))
        if all(site.calls for site in sites):
            return sites
        last = len(journey.pruned.rows) - 1
        return find_sites(
            self.block, members, lambda block: journey.run(self.index, block, last, journey.pruned.batch(last))
        )

    def _measure_now(self, sites: list[Site]) -> None:
        measured: list[tuple[Site, Group]] = []
        at_once: list[tuple[Site, list[Group]]] = []
        for site in sites:
            if not site.is_experts:
                self.groups.append(Group(site.members, self._not_asked))
                measured.append((site, self.groups[-1]))
                continue
            chunks = list(self._chunks(site))
            for chunk in chunks:
                groups = self._expert_groups(site, [*chunk[0], *chunk[1]])
                if len(chunks) == 1:
                    at_once.append((site, groups))
        journey = self._journey
        # No weight has changed yet, so what the block returns now is the dense block's.
        advance = [journey.pruned] if self._settings.propagate == "dense" else [journey.dense] if journey.dense else []
        if self._settings.needs:
            self._meter.pass_over(measured, [site for site in sites if site.is_experts], advance, not advance)
            for site, groups in at_once:
                self._meter.experts(site, groups)
        elif advance:
            self._meter.pass_over([], [], advance)

    def _measure_when_asked(self, sites: list[Site]) -> None:
        for site in sites:
            if site.is_experts:
                for chunk in self._chunks(site):
                    for members in chunk:
                        self._expert_groups(site, members)
            else:
                group = Group(site.members, self._not_asked)
                if self._settings.needs:
                    group.measure = partial(self._meter.pass_over, [(site, group)], stop_early=True)
                self.groups.append(group)

    def _chunks(self, site: Site) -> Iterator[tuple[list[Member], list[Member]]]:
        """(first projections, second projections) of as many experts as are measured together.

        Of an expert one of them may be missing, where `skip` names it.
        """
        first, _ = expert_projections(site.members[0].module)
        experts = sorted({member.expert for member in site.members if member.expert is not None})
        count = self._settings.experts_at_once
        if count is None:
            matrices = len(self._settings.needs & {"gram", "cross"})
            widths = {member.key: member.shape[1] for member in site.members}
            bytes_each = 4 * matrices * sum(width**2 for width in widths.values())
            count = len(experts) if not matrices else max(1, _EXPERT_BYTES // bytes_each)
        for start in range(0, len(experts), count):
            own = set(experts[start : start + count])
            members = [member for member in site.members if member.expert in own]
            firsts = [member for member in members if member.key == first]
            yield firsts, [member for member in members if member.key != first]

    def _expert_groups(self, site: Site, members: Sequence[Member]) -> list[Group]:
        """New groups, one for each member, that are measured together when one of them is asked for."""
        groups = [Group([member], self._not_asked) for member in members]
        if self._settings.needs:
            for group in groups:
                group.measure = partial(self._measure_experts, site, groups)
        self.groups += groups
        return groups

    def _measure_experts(self, site: Site, groups: Sequence[Group]) -> None:
        for group in self._held:
            group.release("when those of the next experts were measured; raise `experts_at_once` to hold more")
        if site.experts is None:
            self._meter.pass_over([], [site], stop_early=True)
        self._meter.experts(site, groups)
        self._held = groups

    def _not_asked(self) -> None:
        raise CalibrationError(f"{self.name}: the walk was asked for no statistics (`needs` is empty).")
