"""Causal language models whose blocks have different widths: what `from_pretrained` builds for `shrunk_<family>`.

A stock class builds all its blocks from one config. These build block i from the config as `per_layer_config` has it
for layer i, and everything else, forward included, is the stock class; so are the names of all tensors.

This file needs torch and transformers alone, because `export_shrunk(..., remote_code=True)` puts a copy of it beside
the weights.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from huggingface_hub.dataclasses import strict
from torch import nn
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    GemmaConfig,
    GemmaForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    PreTrainedConfig,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)
from transformers.models.gemma.modeling_gemma import GemmaDecoderLayer
from transformers.models.gemma2.modeling_gemma2 import Gemma2DecoderLayer
from transformers.models.gpt2.modeling_gpt2 import GPT2Attention, GPT2Block
from transformers.models.llama.modeling_llama import LlamaDecoderLayer
from transformers.models.mistral.modeling_mistral import MistralDecoderLayer
from transformers.models.mixtral.modeling_mixtral import MixtralDecoderLayer
from transformers.models.opt.modeling_opt import OPTAttention, OPTDecoderLayer
from transformers.models.phi3.modeling_phi3 import Phi3DecoderLayer
from transformers.models.qwen2.modeling_qwen2 import Qwen2DecoderLayer
from transformers.models.qwen3.modeling_qwen3 import Qwen3DecoderLayer
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeDecoderLayer
from transformers.pytorch_utils import Conv1D


class BlockConfig:
    """The config of a model as block `index` sees it; `changes` go over it.

    Only what differs between blocks is kept here. All else is read from the model's config at every access, since some
    of it, like the attention implementation, may be set after the model was built.
    """

    def __init__(self, config: PreTrainedConfig, index: int, **changes: Any) -> None:
        layer = config.per_layer_config[index]
        self._shared = config
        own = {name: getattr(layer, name) for name in config.per_layer_attributes or ()} | changes
        self._own = {config.attribute_map.get(name, name): value for name, value in own.items()}

    def __getattr__(self, name: str) -> Any:
        # Asked for what is not there, also by copy and pickle on an object that is still empty.
        if name.startswith("__") or "_own" not in vars(self):
            raise AttributeError(name)
        name = self._shared.attribute_map.get(name, name)
        return self._own[name] if name in self._own else getattr(self._shared, name)


class ShrunkConfig:
    """What every config below adds to that of its family; it comes first among the bases.

    Attributes:
        per_layer_config: layer index -> what differs there from the rest of the config, by the names of the family's
            config: numbers of heads, channels or experts. transformers' own, which its caches know, too.
        head_dim: of every head of every layer; not every family has such a field.
        added_biases: linears of a block that have a bias here and none in the stock family ("self_attn.o_proj").
    """

    head_dim: Any = None
    added_biases: Any = ()

    def __post_init__(self, **kwargs: Any) -> None:
        if self._auto_class is None:  # this is no copy beside the weights, so a folder saved from here has none
            kwargs.pop("auto_map", None)
        # Of a family without such a field it comes among the other arguments.
        head_dim = kwargs.pop("head_dim", self.head_dim)
        self.head_dim = head_dim or self.hidden_size // self.num_attention_heads
        super().__post_init__(**kwargs)

    def validate_architecture(self) -> None:
        """In place of the checks of the families, some of which want the heads to divide the hidden size."""
        for index, layer in enumerate(self.per_layer_config):
            heads = layer.num_attention_heads
            kv_heads = getattr(layer, "num_key_value_heads", None) or heads
            if heads < 1 or kv_heads < 1 or heads % kv_heads:
                raise ValueError(
                    f"layer {index} has {heads} attention heads and {kv_heads} key and value heads; the first must be "
                    "a multiple of the second, and neither can be 0."
                )

    def validate_rope(self) -> None:
        """Of one layer: the check of longrope divides by the number of heads before it reads head_dim."""
        super(ShrunkConfig, self.per_layer_config[0]).validate_rope()


class ShrunkModel:
    """Builds the blocks in the place of the stock class, which comes next among the bases.

    Attributes:
        block_class: of the family.
        blocks: name of the list of blocks.
    """

    block_class: type[nn.Module]
    blocks = "model.layers"

    def __init__(self, config: PreTrainedConfig) -> None:
        with _no_blocks(config):
            super().__init__(config)
        blocks = self.get_submodule(self.blocks)
        for index in range(config.num_hidden_layers):
            block = self.build_block(config, index)
            for name in config.added_biases:
                linear = block.get_submodule(name)
                linear.bias = nn.Parameter(torch.zeros(linear.out_features))
            blocks.append(block)
        for module in self.modules():
            if hasattr(module, "inv_freq"):
                # The frequencies are computed again by post_init, and, where they follow the length of the input, by
                # forward. Some of transformers' functions divide by the number of heads before they read head_dim,
                # which is always set here; so any number does, and the config has none that holds for all layers.
                module.config = BlockConfig(config, 0, num_attention_heads=1)
        self.post_init()

    def build_block(self, config: PreTrainedConfig, index: int) -> nn.Module:
        """Block `index`, as the stock class would build it if all blocks were like this one."""
        return self.block_class(BlockConfig(config, index), index)


@contextlib.contextmanager
def _no_blocks(config: PreTrainedConfig) -> Iterator[None]:
    """While this lasts a stock class builds everything but blocks, and all modules keep this very config."""
    layers, key = config.num_hidden_layers, "allow_global_per_layer_attribute_access"
    allowed = vars(config).get(key)
    config.num_hidden_layers = 0
    # A mixture of experts keeps their number in the model, too, for the loss that balances them.
    setattr(config, key, True)
    try:
        yield
    finally:
        config.num_hidden_layers = layers
        vars(config).pop(key)
        if allowed is not None:
            setattr(config, key, allowed)


@strict
class ShrunkLlamaConfig(ShrunkConfig, LlamaConfig):
    """LlamaConfig with the widths of every layer."""

    model_type = "shrunk_llama"


class ShrunkLlamaForCausalLM(ShrunkModel, LlamaForCausalLM):
    """LlamaForCausalLM with blocks of different widths."""

    config_class = ShrunkLlamaConfig
    block_class = LlamaDecoderLayer


@strict
class ShrunkMistralConfig(ShrunkConfig, MistralConfig):
    """MistralConfig with the widths of every layer."""

    model_type = "shrunk_mistral"


class ShrunkMistralForCausalLM(ShrunkModel, MistralForCausalLM):
    """MistralForCausalLM with blocks of different widths."""

    config_class = ShrunkMistralConfig
    block_class = MistralDecoderLayer


@strict
class ShrunkQwen2Config(ShrunkConfig, Qwen2Config):
    """Qwen2Config with the widths of every layer."""

    model_type = "shrunk_qwen2"


class ShrunkQwen2ForCausalLM(ShrunkModel, Qwen2ForCausalLM):
    """Qwen2ForCausalLM with blocks of different widths."""

    config_class = ShrunkQwen2Config
    block_class = Qwen2DecoderLayer


@strict
class ShrunkQwen3Config(ShrunkConfig, Qwen3Config):
    """Qwen3Config with the widths of every layer."""

    model_type = "shrunk_qwen3"


class ShrunkQwen3ForCausalLM(ShrunkModel, Qwen3ForCausalLM):
    """Qwen3ForCausalLM with blocks of different widths."""

    config_class = ShrunkQwen3Config
    block_class = Qwen3DecoderLayer


@strict
class ShrunkGemmaConfig(ShrunkConfig, GemmaConfig):
    """GemmaConfig with the widths of every layer."""

    model_type = "shrunk_gemma"


class ShrunkGemmaForCausalLM(ShrunkModel, GemmaForCausalLM):
    """GemmaForCausalLM with blocks of different widths."""

    config_class = ShrunkGemmaConfig
    block_class = GemmaDecoderLayer


@strict
class ShrunkGemma2Config(ShrunkConfig, Gemma2Config):
    """Gemma2Config with the widths of every layer."""

    model_type = "shrunk_gemma2"


class ShrunkGemma2ForCausalLM(ShrunkModel, Gemma2ForCausalLM):
    """Gemma2ForCausalLM with blocks of different widths."""

    config_class = ShrunkGemma2Config
    block_class = Gemma2DecoderLayer


@strict
class ShrunkPhi3Config(ShrunkConfig, Phi3Config):
    """Phi3Config with the widths of every layer."""

    model_type = "shrunk_phi3"

    def validate_rope(self) -> None:
        """Without the family's check, which takes the size of a head for the hidden size over the number of heads."""
        super(Phi3Config, self.per_layer_config[0]).validate_rope()


class ShrunkPhi3ForCausalLM(ShrunkModel, Phi3ForCausalLM):
    """Phi3ForCausalLM with blocks of different widths."""

    config_class = ShrunkPhi3Config
    block_class = Phi3DecoderLayer


@strict
class ShrunkMixtralConfig(ShrunkConfig, MixtralConfig):
    """MixtralConfig with the widths of every layer."""

    model_type = "shrunk_mixtral"


class ShrunkMixtralForCausalLM(ShrunkModel, MixtralForCausalLM):
    """MixtralForCausalLM with blocks of different widths."""

    config_class = ShrunkMixtralConfig
    block_class = MixtralDecoderLayer


@strict
class ShrunkQwen3MoeConfig(ShrunkConfig, Qwen3MoeConfig):
    """Qwen3MoeConfig with the widths of every layer."""

    model_type = "shrunk_qwen3_moe"


class ShrunkQwen3MoeForCausalLM(ShrunkModel, Qwen3MoeForCausalLM):
    """Qwen3MoeForCausalLM with blocks of different widths."""

    config_class = ShrunkQwen3MoeConfig
    block_class = Qwen3MoeDecoderLayer


@strict
class ShrunkOPTConfig(ShrunkConfig, OPTConfig):
    """OPTConfig with the widths of every layer."""

    model_type = "shrunk_opt"


class ShrunkOPTForCausalLM(ShrunkModel, OPTForCausalLM):
    """OPT takes the hidden size for the width of all heads together, so its attention is built apart."""

    config_class = ShrunkOPTConfig
    blocks = "model.decoder.layers"

    def build_block(self, config: PreTrainedConfig, index: int) -> nn.Module:
        heads, hidden, bias = BlockConfig(config, index).num_attention_heads, config.hidden_size, config.enable_bias
        width = heads * config.head_dim
        block = OPTDecoderLayer(BlockConfig(config, index, num_attention_heads=1), index)
        attention = block.self_attn = OPTAttention(BlockConfig(config, index, hidden_size=width), index)
        for name in ("q_proj", "k_proj", "v_proj"):
            setattr(attention, name, nn.Linear(hidden, width, bias=bias))
        attention.out_proj = nn.Linear(width, hidden, bias=bias)
        attention.embed_dim = hidden
        return block


@strict
class ShrunkGPT2Config(ShrunkConfig, GPT2Config):
    """GPT2Config with the widths of every layer."""

    model_type = "shrunk_gpt2"


class ShrunkGPT2LMHeadModel(ShrunkModel, GPT2LMHeadModel):
    """GPT-2 takes the hidden size for the width of all heads together, so its attention is built apart."""

    config_class = ShrunkGPT2Config
    blocks = "transformer.h"

    def build_block(self, config: PreTrainedConfig, index: int) -> nn.Module:
        heads, hidden = BlockConfig(config, index).num_attention_heads, config.hidden_size
        width = heads * config.head_dim
        block = GPT2Block(BlockConfig(config, index, n_head=1), index)
        attention = block.attn = GPT2Attention(BlockConfig(config, index, n_embd=width), layer_idx=index)
        attention.c_attn, attention.c_proj = Conv1D(3 * width, hidden), Conv1D(hidden, width)
        attention.embed_dim = hidden
        return block
