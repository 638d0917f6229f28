"""What a model takes in every stored form, and what one decoding step reads and computes: from shapes alone."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from ..footprint import STORED, Footprint, Stored, kv_bytes_per_token
from .block_shapes import BlockShape
from .linear_inventory import LinearKind
from .one_shot_plan import linear_flops


@dataclass(frozen=True, kw_only=True)
class ModelWork:
    """What a model computes.

    Attributes:
        dense_flops: of one token, in products that stay dense (head and layers that cannot be 2:4).
        sparse_flops: of one token, in products that can be 2:4, counted as if they were dense.
        attention_flops: of one token, for every token that it attends to.
        prompt_attention_flops: of a whole prompt of `prompt` tokens, in attention.
        prompt: tokens of the prompt.
        kv_bytes: of keys and values, for one token; None where the config does not say.
    """

    dense_flops: float
    sparse_flops: float
    attention_flops: float
    prompt_attention_flops: float
    prompt: int
    kv_bytes: int | None


def footprint(kinds: list[LinearKind], model: PreTrainedModel, stored: Stored, dtype: torch.dtype) -> Footprint:
    """Bytes of the whole model, with the matrices that can be packed in the form `stored`, all else in `dtype`.

    The input embedding is read by the row, so it is not part of what a decoding step reads, unless it is the head too.
    """
    width = dtype.itemsize
    numbers = sum(parameter.numel() for parameter in model.parameters())
    changed = [kind for kind in kinds if kind.packed]
    whole = width * (numbers - sum(kind.numel for kind in changed))
    whole += sum(kind.count * stored.weight_bytes(*kind.shape, width) for kind in changed)
    head = model.get_output_embeddings()
    looked_up = sum(
        module.weight.numel()
        for module in model.modules()
        if isinstance(module, torch.nn.Embedding) and (head is None or module.weight is not head.weight)
    )
    return Footprint(file_bytes=whole, token_bytes=whole - width * looked_up)


def footprints(kinds: list[LinearKind], model: PreTrainedModel, dtype: torch.dtype) -> dict[str, Footprint]:
    """Of every form that is compared."""
    return {name: footprint(kinds, model, stored, dtype) for name, stored in STORED.items()}


def model_work(
    model: PreTrainedModel, kinds: list[LinearKind], shapes: list[BlockShape], prompt: int, dtype: torch.dtype
) -> ModelWork:
    """What a token costs.

    Args:
        shapes: of the blocks, for windows of `prompt` tokens (`block_shapes`).
    """
    head = model.get_output_embeddings()
    sparse_names = {name for kind in kinds if kind.sparse for name in kind.names}
    sparse = dense = 0.0
    for shape in shapes:
        for each in shape.inputs:
            flops = shape.blocks * 2 * each.share * each.numel
            # Names of an input are of the first block of its kind; all of one input have the same verdict.
            if each.names[0] in sparse_names:
                sparse += flops
            else:
                dense += flops
    config = model.config.get_text_config()
    attention = sum(shape.blocks * shape.flops for shape in shapes) - linear_flops(shapes, prompt)
    return ModelWork(
        dense_flops=dense + (0 if head is None else 2 * head.weight.numel()),
        sparse_flops=sparse,
        # A prompt attends to all pairs of its tokens, as it is computed.
        attention_flops=max(0.0, attention) / prompt**2,
        prompt_attention_flops=max(0.0, attention),
        prompt=prompt,
        kv_bytes=_kv_bytes(config, dtype),
    )


def _kv_bytes(config: PreTrainedConfig, dtype: torch.dtype) -> int | None:
    layers, heads = getattr(config, "num_hidden_layers", None), getattr(config, "num_attention_heads", None)
    hidden = getattr(config, "hidden_size", None)
    if not (layers and heads and hidden) or hasattr(config, "kv_lora_rank"):
        return None  # latent attention keeps something else
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    head_dim = getattr(config, "head_dim", None) or hidden // heads
    return kv_bytes_per_token(layers, kv_heads, head_dim, dtype.itemsize)
