"""Modules and config of a model are told how many heads, channels, experts and layers it has left."""

from __future__ import annotations

from torch import Tensor, nn
from transformers import PreTrainedConfig
from transformers.pytorch_utils import Conv1D

from ..families import Structure, stock_type
from .block_parts import BlockParts
from .blocks import BlockStack
from .shrunk_manifest import KEY
from .shrunk_source import own_names


class HeadsConfig:
    """The config of a model as one attention sees it that has fewer heads than others; all else is the model's."""

    def __init__(self, shared: PreTrainedConfig, heads: int, kv_heads: int) -> None:
        self._shared, self.num_attention_heads, self.num_key_value_heads = shared, heads, kv_heads

    def __getattr__(self, name: str) -> object:
        # Asked for what is not there, also by copy and pickle on an object that is still empty.
        if name.startswith("__") or "_shared" not in vars(self):
            raise AttributeError(name)
        return getattr(self._shared, name)


def tell_modules(model: nn.Module, structure: Structure, parts: list[BlockParts]) -> None:
    """Write the widths of the weights into the attributes that modules have for them."""
    hidden = parts[0].hidden
    for module in model.modules():
        _tell_features(module)
        _set(module, hidden_size=hidden, hidden_dim=hidden)
    experts = {block.expert_count for block in parts if block.experts is not None}
    if len(experts) == 1:
        _set(model, num_experts=experts.pop())  # for the loss that balances them
    same_heads = len({(block.heads, block.kv_heads) for block in parts}) == 1
    for block in parts:
        heads, kv_heads, attention = block.heads, block.kv_heads, block.attention[1]
        _set(attention, num_heads=heads, num_attention_heads=heads, num_key_value_heads=kv_heads)
        _set(attention, num_key_value_groups=heads // kv_heads, split_size=heads * block.head_dim)
        if structure.heads_from_config:
            own = same_heads and not is_per_layer(model.config)
            attention.config = model.config if own else HeadsConfig(model.config, heads, kv_heads)
        if block.experts is None:
            _set(block.mlp[1], intermediate_size=block.channels)
        else:
            for module in (block.mlp[1], block.experts[1], block.router[1]):
                _set(module, num_experts=block.expert_count)


def is_per_layer(config: PreTrainedConfig) -> bool:
    """Whether it is the config of one of our classes, which build every block with its own widths."""
    return stock_type(config.model_type) != config.model_type


def tell_config(config: PreTrainedConfig, structure: Structure, parts: list[BlockParts]) -> None:
    """Write the widths into the config: what all blocks have, and where they differ the largest.

    The numbers of heads only where the config has a field for the size of a head. A config of our own classes gets
    the widths of every block. A manifest goes: what it says is kept is of the model before.
    """
    vars(config).pop(KEY, None)
    config.hidden_size = parts[0].hidden
    if is_per_layer(config):
        each = [own_names(type(config), structure, block.widths) for block in parts]
        config.per_layer_config = dict(enumerate(each))
        return
    if structure.head_dim_field:
        setattr(config, structure.head_dim_field, parts[0].head_dim)
        config.num_attention_heads = max(block.heads for block in parts)
        if structure.kv_heads_field:
            setattr(config, structure.kv_heads_field, max(block.kv_heads for block in parts))
    if channels := max(block.channels for block in parts):
        setattr(config, structure.channels_field, channels)
    if experts := max(block.expert_count for block in parts):
        setattr(config, structure.experts_field, experts)


def remove_layers(model: nn.Module, stack: BlockStack, keep: Tensor, structure: Structure) -> None:
    """Remove blocks, number those that stay from 0, and tell the config.

    Args:
        keep: [blocks] bool.
    """
    kept = keep.nonzero().flatten().tolist()
    blocks = model.get_submodule(stack.name)
    for index in reversed(range(len(blocks))):
        if index not in kept:
            del blocks[index]
    for index, block in enumerate(blocks):
        for module in block.modules():
            _set(module, layer_idx=index)
    config = model.config
    config.num_hidden_layers = len(kept)
    if getattr(config, "layer_types", None) is not None:
        config.layer_types = [config.layer_types[index] for index in kept]
    if hasattr(config, "mlp_only_layers"):  # which blocks have experts is a rule over their numbers otherwise
        has_experts = [hasattr(getattr(block, structure.mlp), structure.experts) for block in blocks]
        config.decoder_sparse_step = 1
        config.mlp_only_layers = [index for index, sparse in enumerate(has_experts) if not sparse]


def _tell_features(module: nn.Module) -> None:
    if isinstance(module, nn.Linear):
        module.out_features, module.in_features = module.weight.shape
    elif isinstance(module, nn.Embedding):
        module.embedding_dim = module.weight.shape[1]
    elif isinstance(module, Conv1D):
        module.nx, module.nf = module.weight.shape


def _set(module: nn.Module, **values: int) -> None:
    """Set those attributes that the module has."""
    for name, value in values.items():
        if name in vars(module):
            setattr(module, name, value)
