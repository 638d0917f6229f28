"""What a saved form of a shrunk model must hold, and whether the model that a config builds can hold it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from ..errors import ConfigError
from ..families import Structure, stock_type
from .block_parts import block_parts, find_structure
from .checkpoint import Checkpoint
from .shrunk_manifest import KEY
from .shrunk_models import ShrunkConfig
from .shrunk_registry import SHRUNK_CLASSES

Widths = list[dict[str, int]]
Layout = dict[str, tuple[torch.dtype, tuple[int, ...]]]

# Of the config in memory; the new config says these anew, or must not say them.
_SAID_ANEW = ("model_type", "architectures", "per_layer_config", "head_dim", "added_biases", "auto_map", KEY)
_SAID_ANEW += ("dtype", "transformers_version", "_name_or_path", "quantization_config")
# Fields with which a stock config gives linears a bias.
_BIAS_FIELDS = ("attention_bias", "mlp_bias")


class Refusal(Exception):
    """Why a config cannot hold the model, as the end of a sentence."""


@dataclass(frozen=True, eq=False)
class Source:
    """A model in memory, as far as every form must agree with it.

    Attributes:
        family: model type of the stock class.
        values: fields of its config; its widths may be wrong.
        widths: of every block, read off its weights, by the names of Llama's config.
        layout: dtype and shape of every tensor of its checkpoint.
    """

    model: PreTrainedModel
    family: str
    structure: Structure
    head_dim: int
    values: dict[str, Any]
    widths: Widths
    layout: Layout

    @property
    def hidden_size(self) -> int:
        return self.model.config.hidden_size


def read_source(model: PreTrainedModel) -> Source:
    """Look at a model.

    Raises:
        ConfigError: it is no causal language model of transformers, has adapters, or its config does not say of
            every layer of what type it is.
        TargetError: the structure of its family is not declared.
    """
    structure, stack = find_structure(model)
    family = stock_type(model.config.model_type)
    stock = MODEL_FOR_CAUSAL_LM_MAPPING.get(CONFIG_MAPPING[family], None) if family in CONFIG_MAPPING else None
    if stock is None:
        raise ConfigError(
            f"{type(model).__name__}: models of type {family!r} cannot be exported, for transformers has no causal "
            f"language model of this type. Of other types, {', '.join(sorted(SHRUNK_CLASSES))} take every form."
        )
    # A family whose structure the caller declared has no class of ours, and its stock class can hold equal widths.
    expected = (stock, *SHRUNK_CLASSES.get(family, ())[1:])
    if type(model).__name__ not in [each.__name__ for each in expected]:  # a copy beside weights has the same name
        raise ConfigError(
            f"{type(model).__name__}: only causal language models can be exported, of type {family!r} a "
            f"{expected[0].__name__}."
        )
    parts = [block_parts(structure, stack, index) for index in range(len(stack.blocks))]
    types = getattr(model.config, "layer_types", None)
    if types is not None and len(types) != len(parts):
        raise ConfigError(
            f"{type(model).__name__}: its config has layer_types for {len(types)} layers, and it has {len(parts)}. "
            "Remove layers with remove_units, which keeps the two together."
        )
    values = {name: value for name, value in model.config.to_dict().items() if name not in _SAID_ANEW}
    head = model.get_output_embeddings()
    values["tie_word_embeddings"] = head.weight is model.get_input_embeddings().weight
    widths = [part.widths for part in parts]
    return Source(model, family, structure, parts[0].head_dim, values, widths, Checkpoint(model, {}).layout)


def own_names(config_class: type[PreTrainedConfig], structure: Structure, width: Mapping[str, int]) -> dict[str, int]:
    """The widths of a block by the names that a config has for them."""
    names = {
        "num_attention_heads": "num_attention_heads",
        "num_key_value_heads": structure.kv_heads_field,
        "intermediate_size": structure.channels_field,
        "num_experts": structure.experts_field,
    }
    stored = config_class.attribute_map
    return {stored.get(names[name], names[name]): number for name, number in width.items() if names[name]}


def build_skeleton(source: Source, config_class: type[PreTrainedConfig], values: dict[str, Any]) -> PreTrainedModel:
    """The model that a config builds, on the meta device, with every bias that the model in memory has.

    Raises:
        Refusal: the config refuses the values, or the model that it builds has no place for a tensor.
    """
    skeleton = _build(source, config_class, values)
    missing = _missing(source, skeleton)
    biases = [name.removesuffix(".bias") for name in missing if name.endswith(".bias")]
    if biases and issubclass(config_class, ShrunkConfig):
        inside = f"{type(skeleton).blocks}."
        added = {name.removeprefix(inside).split(".", 1)[1] for name in biases if name.startswith(inside)}
        skeleton = _build(source, config_class, {**values, "added_biases": sorted(added)})
        missing = _missing(source, skeleton)
    for field in _BIAS_FIELDS:
        if missing and getattr(skeleton.config, field, None) is False:
            other = _build(source, config_class, {**values, field: True})
            if len(fewer := _missing(source, other)) < len(missing):
                skeleton, values, missing = other, {**values, field: True}, fewer
    if missing:
        shape = list(source.layout[missing[0]][1])
        raise Refusal(f"{type(skeleton).__name__} has no place for {missing[0]} of {shape}")
    _check_heads(source, skeleton)
    return skeleton


def _check_heads(source: Source, skeleton: PreTrainedModel) -> None:
    """Raise Refusal where tensors that are large enough hold other heads, as where a config has no `head_dim`."""
    structure, stack = find_structure(skeleton)
    for index, width in enumerate(source.widths):
        part, group = block_parts(structure, stack, index), width["num_attention_heads"] // width["num_key_value_heads"]
        if (part.head_dim, part.heads // part.kv_heads) != (source.head_dim, group):
            raise Refusal(
                f"{type(skeleton).__name__} has {part.heads // part.kv_heads} query heads of {part.head_dim} for each "
                f"KV head in {stack.block_name(index)}, and the model has {group} of {source.head_dim}"
            )


def _build(source: Source, config_class: type[PreTrainedConfig], values: dict[str, Any]) -> PreTrainedModel:
    try:
        config = config_class(**values)
    except (StrictDataclassError, ValueError) as error:
        reason = str(error.__cause__ or error).strip().rstrip(".")
        raise Refusal(f"{config_class.__name__} refuses: {reason}") from error
    try:
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(config, dtype=source.model.dtype)
    except ValueError as error:  # some families check the number of heads here
        raise Refusal(f"the model of {config_class.__name__} refuses: {str(error).strip().rstrip('.')}") from error


def _missing(source: Source, skeleton: PreTrainedModel) -> list[str]:
    """Tensors that the skeleton does not have, or has smaller."""
    there = {name: shape for name, (_, shape) in Checkpoint(skeleton, {}).layout.items()}
    return [
        name
        for name, (_, shape) in source.layout.items()
        if name not in there or any(size < needed for size, needed in zip(there[name], shape, strict=True))
    ]
