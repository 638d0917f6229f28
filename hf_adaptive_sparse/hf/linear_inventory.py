"""Which matrices of a model can be 2:4 and packed, and why the others cannot: from shapes alone."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection
from dataclasses import dataclass

from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from ..formats import FORMATS
from ..patterns import PATTERNS
from .blocks import Member, block_linears, check_stored, find_blocks

_GROUP = PATTERNS["2:4"].m
_PACKED_GROUP = 8  # inputs: two groups share a byte of positions
assert list(FORMATS) == ["2:4"]


@dataclass(frozen=True, kw_only=True)
class LinearKind:
    """Matrices of one name, apart from the numbers in it, and one shape.

    Attributes:
        name: "model.layers.*.mlp.up_proj".
        shape: (out, in).
        names: of all of them.
        sparse: can be made 2:4 by this package.
        packed: can then be stored packed.
        reason: why not; empty where they can be both.
        embedding: a table that is looked up, not multiplied with.
        shared: its weight is that of another matrix, and is not counted again.
    """

    name: str
    shape: tuple[int, int]
    names: tuple[str, ...]
    sparse: bool
    packed: bool
    reason: str
    embedding: bool = False
    shared: bool = False

    @property
    def count(self) -> int:
        return len(self.names)

    @property
    def numel(self) -> int:
        """Weights of all of them."""
        return self.count * self.shape[0] * self.shape[1]


def linear_inventory(model: PreTrainedModel, skip: Collection[str] = ()) -> list[LinearKind]:
    """All matrices of a model, in the order of the model, grouped by kind.

    Args:
        model: may be on the meta device.
        skip: modules that stay dense, by full name or by the end of it.
    Raises:
        TargetError: where the blocks of this model are is not known.
    """
    stack = find_blocks(model)
    members: dict[str, Member] = {}
    for index in range(len(stack.blocks)):
        members |= block_linears(stack, index, skip, refuse_unknown=False)
    for member in members.values():
        check_stored(member)
    uses = Counter(id(parameter) for _, parameter in model.named_parameters(remove_duplicate=False))
    first: dict[int, str] = {}
    kinds: dict[tuple, dict] = {}

    def add(name: str, shape: tuple[int, int], verdict: tuple[bool, bool, str], **more: bool) -> None:
        key = (re.sub(r"(?<=[.\[])\d+(?=[.\]]|$)", "*", name), shape, verdict, *more.values())
        kinds.setdefault(key, {"names": [], **more})["names"].append(name)

    slices: dict[nn.Module, list[Member]] = {}
    for member in members.values():
        slices.setdefault(member.module, []).append(member)
    for name, module in model.named_modules():
        if module in slices:
            for member in slices[module]:
                shared = first.setdefault(id(member.parameter), name) != name
                verdict = _verdict(member, uses[id(member.parameter)] > 1)
                add(member.name, member.shape, verdict, embedding=False, shared=shared)
        elif isinstance(module, (nn.Linear, Conv1D, nn.Embedding)):
            weight = module.weight
            rows, columns = weight.shape[::-1] if isinstance(module, Conv1D) else weight.shape
            shared = first.setdefault(id(weight), name) != name
            reason = _outside(model, name, module, stack.name, skip)
            embedding = isinstance(module, nn.Embedding)
            add(name, (rows, columns), (False, False, reason), embedding=embedding, shared=shared)
    return [
        LinearKind(
            name=name, shape=shape, names=tuple(found["names"]), sparse=verdict[0], packed=verdict[1],
            reason=verdict[2], embedding=found["embedding"], shared=found["shared"],
        )
        for (name, shape, verdict, *_), found in kinds.items()
    ]  # fmt: skip


def _verdict(member: Member, shared: bool) -> tuple[bool, bool, str]:
    """(can be 2:4, can be packed, why not) of a matrix in a block."""
    features = member.shape[1]
    if features % _GROUP:
        return False, False, f"{features} inputs are no multiple of {_GROUP}"
    if member.expert is not None:
        return True, False, "is one expert of a fused parameter: becomes 2:4, and is stored dense"
    if shared:
        return True, False, "shares its weight with another matrix: becomes 2:4, and is stored dense"
    if features % _PACKED_GROUP:
        return True, False, f"{features} inputs are no multiple of {_PACKED_GROUP}: becomes 2:4, and is stored dense"
    return True, True, ""


def _outside(model: PreTrainedModel, name: str, module: nn.Module, blocks: str, skip: Collection[str]) -> str:
    if isinstance(module, nn.Embedding):
        return "is an embedding: rows are looked up, and nothing is multiplied"
    if module is model.get_output_embeddings():
        return "is the output head, which stays dense"
    if any(f".{name}.".find(f".{end}.") >= 0 for end in skip):
        return "is to be skipped"
    if not name.startswith(f"{blocks}."):
        return f"is outside of the blocks ({blocks})"
    return "chooses experts" if type(module) is nn.Linear else f"is a {type(module).__name__}, which is not known"
