"""The declared structure of a family, found in the blocks of a model: its heads, channels and experts, and how many."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from ..errors import TargetError
from ..families import STRUCTURES, Structure, stock_type
from .blocks import BlockStack, find_blocks
from .packable import refuse_adapters


@dataclass(frozen=True, eq=False)
class BlockParts:
    """What a block is made of. Names are from the root of the model, widths are those of the weights.

    Attributes:
        attention: (name, module) that holds the heads.
        heads_in: name -> linear that makes queries, keys and values, one for each or one for all.
        heads_out: (name, linear) that reads the heads.
        heads: of the queries.
        kv_heads: of the keys and values; query head h reads KV head h // (heads // kv_heads).
        head_dim: outputs of a linear in `heads_in` per head.
        mlp: (name, module) that holds the MLP, or the router and the experts.
        channels_in: name -> linear that makes the channels; empty where there are experts.
        channels_out: (name, linear) that reads them; None where there are experts.
        channels: 0 where there are experts.
        experts: (name, module) with all experts; None where there is a dense MLP.
        router: (name, module) whose weight has one row per expert.
        expert_count: 0 where there is a dense MLP.
    """

    attention: tuple[str, nn.Module]
    heads_in: dict[str, nn.Module]
    heads_out: tuple[str, nn.Module]
    heads: int
    kv_heads: int
    head_dim: int
    mlp: tuple[str, nn.Module]
    channels_in: dict[str, nn.Module]
    channels_out: tuple[str, nn.Module] | None
    channels: int
    experts: tuple[str, nn.Module] | None
    router: tuple[str, nn.Module] | None
    expert_count: int

    @property
    def hidden(self) -> int:
        """Features that the block reads."""
        return in_features(next(iter(self.heads_in.values())))

    @property
    def widths(self) -> dict[str, int]:
        """By the names of Llama's config; the experts of a block without a dense MLP as "num_experts"."""
        heads = {"num_attention_heads": self.heads, "num_key_value_heads": self.kv_heads}
        if self.experts is not None:
            return {**heads, "num_experts": self.expert_count}
        return {**heads, "intermediate_size": self.channels}


def find_structure(model: nn.Module) -> tuple[Structure, BlockStack]:
    """What is declared about the model's family, and its blocks.

    Raises:
        ConfigError: the model has adapters in it.
        TargetError: it is none of transformers, or of a family without a declared structure; the message lists its
            linears and how to declare them.
    """
    if isinstance(model, PreTrainedModel):
        refuse_adapters(model, "coupled units")
    stack = find_blocks(model)
    model_type = stock_type(model.config.model_type)
    if model_type not in STRUCTURES:
        raise TargetError(
            f"{type(model).__name__}: no structure is declared for models of type {model_type!r}, so it is not known "
            f"which weights make and read a head or a channel; known: {', '.join(sorted(STRUCTURES))}. The linears of "
            f"{stack.block_name(0)} are {_listing(stack.blocks[0])}. Declare them with "
            f"hf_adaptive_sparse.families.STRUCTURES[{model_type!r}] = Structure(heads=..., heads_out=..., "
            "channels=..., channels_out=...)."
        )
    return STRUCTURES[model_type], stack


def block_parts(structure: Structure, stack: BlockStack, index: int) -> BlockParts:
    """The parts of one block, each looked up by its declared name.

    Raises:
        TargetError: a declared module is not there, is no nn.Linear or Conv1D, or its width is no whole number of
            heads.
    """
    name = stack.block_name(index)
    attention = _child((name, stack.blocks[index]), structure.attention)
    heads_in = dict(_linear(attention, key) for key in structure.heads)
    heads_out = _linear(attention, structure.heads_out)
    heads, kv_heads, head_dim = _count_heads(attention, heads_in, heads_out)
    mlp = _child((name, stack.blocks[index]), structure.mlp)
    if structure.experts and hasattr(mlp[1], structure.experts):
        experts, router = _child(mlp, structure.experts), _child(mlp, structure.router)
        channels_in, channels_out, channels, expert_count = {}, None, 0, len(router[1].weight)
    else:
        experts = router = None
        channels_in = dict(_linear(mlp, key) for key in structure.channels)
        channels_out = _linear(mlp, structure.channels_out)
        channels, expert_count = in_features(channels_out[1]), 0
        for each, linear in channels_in.items():
            _check_width(each, linear, structure.channel_parts * channels, f"{channels_out[0]} reads {channels}")
    return BlockParts(
        attention, heads_in, heads_out, heads, kv_heads, head_dim, mlp, channels_in, channels_out, channels, experts,
        router, expert_count,
    )  # fmt: skip


def in_features(linear: nn.Module) -> int:
    """Of an nn.Linear or a Conv1D, by its weight."""
    return linear.weight.shape[0 if isinstance(linear, Conv1D) else 1]


def out_features(linear: nn.Module) -> int:
    """Of an nn.Linear or a Conv1D, by its weight."""
    return linear.weight.shape[1 if isinstance(linear, Conv1D) else 0]


def _count_heads(
    attention: tuple[str, nn.Module], heads_in: dict[str, nn.Module], heads_out: tuple[str, nn.Module]
) -> tuple[int, int, int]:
    head_dim = attention[1].head_dim
    read, made = in_features(heads_out[1]), [out_features(linear) for linear in heads_in.values()]
    kv = (made[0] - read) // 2 if len(made) == 1 else made[1]
    heads, kv_heads = read // head_dim, kv // head_dim
    expected = [read + 2 * kv] if len(made) == 1 else [read, kv, kv]
    if made != expected or read % head_dim or kv % head_dim or kv <= 0 or heads % kv_heads:
        raise TargetError(
            f"{attention[0]}: {', '.join(heads_in)} have {', '.join(map(str, made))} outputs and {heads_out[0]} has "
            f"{read} inputs, which is no whole number of heads of {head_dim} with the same number of query heads "
            "for every KV head. Only attentions whose heads are all of one size are known."
        )
    return heads, kv_heads, head_dim


def _check_width(name: str, linear: nn.Module, expected: int, because: str) -> None:
    if out_features(linear) != expected:
        raise TargetError(
            f"{name}: has {out_features(linear)} outputs and needs {expected}, because {because}. Correct the "
            "structure that is declared for this family."
        )


def _child(parent: tuple[str, nn.Module], key: str) -> tuple[str, nn.Module]:
    if not key:
        return parent
    name = f"{parent[0]}.{key}"
    if not isinstance(module := getattr(parent[1], key, None), nn.Module):
        raise TargetError(
            f"{name}: there is no such module, and the structure that is declared for this family names it. "
            f"{parent[0]} has {', '.join(each for each, _ in parent[1].named_children())}."
        )
    return name, module


def _linear(parent: tuple[str, nn.Module], key: str) -> tuple[str, nn.Module]:
    name, module = _child(parent, key)
    if type(module) is not nn.Linear and not isinstance(module, Conv1D):
        raise TargetError(
            f"{name}: is a {type(module).__module__}.{type(module).__qualname__}, and only nn.Linear and Conv1D can "
            "be made smaller. Call dequantize() on a packed or quantized model, and remove units before its linears "
            "become sparse."
        )
    return name, module


def _listing(block: nn.Module) -> str:
    found = [
        f"{name} [{out_features(module)}, {in_features(module)}]"
        for name, module in block.named_modules()
        if isinstance(module, nn.Linear | Conv1D)
    ]
    return ", ".join(found)
