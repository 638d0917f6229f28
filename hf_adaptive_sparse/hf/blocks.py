"""The blocks of a model, found by structure, and the weights inside them that can be pruned."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection
from dataclasses import dataclass

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from ..errors import TargetError
from ..layers import PackedLinear
from .experts import expert_projections, is_fused_experts
from .packable import refuse_adapters

# Compute the same as nn.Linear.
_LINEAR_SUBCLASSES = ("FalconLinear",)
# Hold matrices of more than one dimension that are no linear map over tokens; they stay as they are.
_NOT_LINEAR = (nn.Embedding, nn.modules.conv._ConvNd)
_FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class BlockStack:
    """The blocks of a model, in the order in which they run.

    Attributes:
        name: of the list that holds them, from the root of the model, for example "model.layers".
        blocks: the modules of that list.
    """

    name: str
    blocks: list[nn.Module]

    def block_name(self, index: int) -> str:
        return f"{self.name}.{index}"


@dataclass(frozen=True, eq=False)
class Member:
    """One weight matrix that can be pruned: of an nn.Linear, of a Conv1D, or one expert's slice of a fused parameter.

    Attributes:
        name: full name of the module; of a slice "<module>.<parameter>[<expert>]".
        module: that holds the parameter.
        key: name of the parameter in the module.
        expert: which slice of the first dimension; None where the parameter is the matrix.
        transposed: whether it is stored [in, out].
    """

    name: str
    module: nn.Module
    key: str = "weight"
    expert: int | None = None
    transposed: bool = False

    @property
    def parameter(self) -> nn.Parameter:
        """That holds the matrix as it is stored; of an expert, all experts."""
        return getattr(self.module, self.key)

    @property
    def weight(self) -> Tensor:
        """[out, in], a view without gradient: writing into it writes to the model."""
        stored = self.parameter.detach()
        stored = stored if self.expert is None else stored[self.expert]
        return stored.t() if self.transposed else stored

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in)."""
        out, features = self.weight.shape
        return out, features

    @torch.no_grad()
    def set_weight(self, weight: Tensor) -> None:
        """Write [out, in] of any float dtype and device into the model, rounded to the dtype that is there."""
        place = self.weight
        if weight.shape != place.shape:
            raise TargetError(
                f"{self.name}: the new weight is {list(weight.shape)}, the layer needs {list(place.shape)} [out, in]."
            )
        place.copy_(weight)


def find_blocks(model: nn.Module, name: str | None = None) -> BlockStack:
    """The list of blocks of a transformers model.

    Every nn.ModuleList whose items hold linear layers, and that lies in no other such list, is one. Among several
    (a model that also sees images), the one in the model's text decoder is meant.

    Args:
        name: of the list, where the model has several and none of them is its text decoder.
    Raises:
        ConfigError: the model has adapters in it.
        TargetError: there is no such list, or more than one; the message names what was found. Or the model is none of
            transformers.
    """
    kind = type(model).__name__
    if not isinstance(model, (PreTrainedModel, PeftModel)):
        raise TargetError(f"{kind}: is no model of transformers, and only their blocks are known.")
    refuse_adapters(model, "pruning")
    if getattr(model.config, "is_encoder_decoder", False):
        raise TargetError(
            f"{kind}: is an encoder and a decoder, whose blocks read each other. Only models with one stack of "
            "blocks can be walked."
        )
    found = _block_lists(model)
    if name is not None:
        if name not in found:
            raise TargetError(f"{kind}: {name} is no list of blocks. {_listing(found)}")
        return BlockStack(name, list(found[name]))
    if len(found) > 1 and (decoder := model.get_decoder()) is not model:
        inside = {id(module) for module in decoder.modules()}
        found = {name: blocks for name, blocks in found.items() if id(blocks) in inside} or found
    if len(found) != 1:
        raise TargetError(
            f"{kind}: cannot tell where its blocks are. {_listing(found)} "
            + ("Name one with `blocks`." if found else _unknown(model))
            + ("" if found else "Only models that keep their blocks in one can be walked.")
        )
    ((name, blocks),) = found.items()
    return BlockStack(name, list(blocks))


def block_linears(
    stack: BlockStack, index: int, skip: Collection[str] = (), refuse_unknown: bool = True
) -> dict[str, Member]:
    """Every weight of a block that can be pruned, by full name, in the order of the model.

    Routers of experts are never among them.

    Args:
        skip: what stays dense, by full name or by the end of it: linear layers, and modules or parameters that are not
            known here. All in a skipped module stays dense.
        refuse_unknown: whether a module that is not known is an error, or left out as if it were skipped; and whether
            a weight that cannot be pruned as it is stored is one.
    Raises:
        TargetError: a module holds weights and is of a kind that is not known here, or stores them in another form.
    """
    block, members, hidden = stack.blocks[index], {}, []
    routers = _routers(block)
    for name, module in block.named_modules(prefix=stack.block_name(index)):
        if any(name.startswith(prefix) for prefix in hidden):
            continue
        if module in routers or is_skipped(name, skip):
            hidden.append(f"{name}.")
        elif is_fused_experts(module):
            for parameter in expert_projections(module):
                for expert in range(module.num_experts):
                    full = f"{name}.{parameter}[{expert}]"
                    if not is_skipped(full, skip) and not is_skipped(f"{name}.{parameter}", skip):
                        members[full] = Member(full, module, parameter, expert, module.is_transposed)
                        if refuse_unknown:
                            check_stored(members[full])
        elif isinstance(module, Conv1D) or type(module) is nn.Linear or type(module).__name__ in _LINEAR_SUBCLASSES:
            members[name] = Member(name, module, transposed=isinstance(module, Conv1D))
            if refuse_unknown:
                check_stored(members[name])
        elif refuse_unknown:
            _check_known(name, module, skip)
    return members


def check_stored(member: Member) -> None:
    """Raise TargetError where a weight is no parameter of its module, or not one of floats."""
    _check_own(member.name, member.module, member.key)
    if member.parameter.dtype not in _FLOATS:
        raise TargetError(
            f"{member.name}: the weight is {member.parameter.dtype}, and pruning starts from float weights. Load the "
            "model without quantization."
        )


def check_blocks(model: nn.Module, stack: BlockStack) -> None:
    """Raise TargetError where blocks share a weight, or where weights are not in memory."""
    for module_name, module in model.named_modules():
        if hasattr(module, "_hf_hook"):
            raise TargetError(
                f"{module_name or type(model).__name__}: is moved between devices by accelerate (device_map). Load the "
                "model without device_map; `device` and `offload` bring its blocks to the device one at a time."
            )
    for name, parameter in model.named_parameters():
        if parameter.is_meta:
            raise TargetError(f"{name}: is on the meta device, without values. Load the model into memory.")
    owners = Counter(id(parameter) for block in stack.blocks for parameter in block.parameters())
    for index, block in enumerate(stack.blocks):
        for name, parameter in block.named_parameters():
            if owners[id(parameter)] > 1:
                raise TargetError(
                    f"{stack.block_name(index)}.{name}: is shared with another block, and blocks are pruned one by "
                    "one. Untie the blocks first."
                )


def _block_lists(model: nn.Module) -> dict[str, nn.ModuleList]:
    found: dict[str, nn.ModuleList] = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and len(module) and not any(name.startswith(f"{n}.") for n in found):
            if all(not isinstance(item, nn.Linear) and _has_weights(item) for item in module):
                found[name] = module
    return found


def _has_weights(block: nn.Module) -> bool:
    return any(isinstance(module, (nn.Linear, Conv1D, PackedLinear)) for module in block.modules())


def _listing(found: dict[str, nn.ModuleList]) -> str:
    if not found:
        return "It has no nn.ModuleList of modules with linear layers in them."
    return "Its lists of blocks are " + ", ".join(f"{name} ({len(blocks)})" for name, blocks in found.items()) + "."


def _unknown(model: nn.Module) -> str:
    """A list that would be one of blocks if what computes in it were known."""
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList):
            for inner, child in module.named_modules(prefix=name):
                if any(value.dim() > 1 for value in child.parameters(recurse=False)):
                    return (
                        f"{inner} holds weights, and a {_kind(child)} is not known: make it an nn.Linear or a Conv1D. "
                    )
    return ""


def _routers(block: nn.Module) -> set[nn.Module]:
    """Modules that choose experts, with all that is in them: they stand beside the experts."""
    routers: set[nn.Module] = set()
    for module in block.modules():
        children = dict(module.named_children())
        listed = isinstance(children.get("experts"), nn.ModuleList)
        if listed or any(is_fused_experts(child) for child in children.values()):
            for name, child in children.items():
                named = name.lower().endswith(("gate", "router"))
                bare = not isinstance(child, nn.Linear) and getattr(child, "weight", torch.empty(0)).dim() > 1
                if named or bare:
                    routers.add(child)
    return routers


def _check_own(name: str, module: nn.Module, key: str) -> None:
    """Of what every forward pass computes a weight from, the weight is a copy: to write into it changes nothing."""
    if key in module._parameters:
        return
    own = dict(module.named_parameters())
    sources = [source for source in own if source.startswith((f"{key}_", f"parametrizations.{key}."))]
    raise TargetError(
        f"{name}: its weight is computed from {', '.join(sources)} in every forward pass, so pruning it would have no "
        "effect. Make it a parameter first: call torch.nn.utils.prune.remove, remove_weight_norm, "
        "remove_spectral_norm or parametrize.remove_parametrizations, whichever undoes what was applied."
    )


def is_skipped(name: str, skip: Collection[str]) -> bool:
    """Whether one of `skip` is a name or the end of it, from a dot on."""
    return any(f".{name}".endswith(f".{end}") for end in skip)


def _kind(module: nn.Module) -> str:
    return f"{type(module).__module__}.{type(module).__qualname__}"


def _check_known(name: str, module: nn.Module, skip: Collection[str]) -> None:
    if isinstance(module, PackedLinear):
        raise TargetError(f"{name}: is packed already. Call dequantize() on the model first.")
    if isinstance(module, _NOT_LINEAR):
        return
    if isinstance(module, nn.Linear):
        _check_own(name, module, "weight")
    matrices = [key for key, value in module.named_parameters(recurse=False) if value.dim() > 1]
    unknown = [key for key in matrices if not is_skipped(f"{name}.{key}", skip)]
    if unknown or isinstance(module, nn.Linear):
        last = name.rpartition(".")[2]
        raise TargetError(
            f"{name}: a {_kind(module)} holds weights ({', '.join(unknown) or 'weight'}) and is not known: only "
            "nn.Linear, Conv1D and the fused experts of transformers are. To leave them dense, add to `skip`: "
            f"{', '.join(f'{last}.{key}' for key in unknown) or last}."
        )
