"""Which class and config hold a shrunk model: a stock one, one that is built per layer, or a stock one with zeros."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from typing import Any, NamedTuple

from transformers import PreTrainedConfig, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from ..errors import ConfigError
from .shrunk_registry import SHRUNK_CLASSES
from .shrunk_source import Refusal, Source, Widths, build_skeleton, own_names

FORMS = ("stock", "per_layer", "padded")

# Families that compute the same from tensors of the same names, and what must be said for that. LlamaConfig wants the
# heads to divide the hidden size, MistralConfig does not; Llama can have biases, Mistral cannot.
_LLAMA = ("llama", {"attention_bias": False, "mlp_bias": False})
SIBLINGS: dict[str, tuple[tuple[str, dict[str, Any]], ...]] = {
    "llama": (("mistral", {"sliding_window": None}),),
    "mistral": (_LLAMA,),
    "qwen2": (_LLAMA,),
}


class Candidate(NamedTuple):
    """A config to try."""

    label: str
    config_class: type[PreTrainedConfig]
    values: dict[str, Any]


@dataclass(frozen=True, eq=False)
class Form:
    """What will be written.

    Attributes:
        name: of FORMS.
        skeleton: what `from_pretrained` will build, on the meta device.
        refused: what was tried before it, and why it was not taken.
    """

    name: str
    skeleton: PreTrainedModel
    refused: dict[str, str]


def choose_form(source: Source, form: str, multiple_of: int = 1, remote_code: bool = False) -> Form:
    """The form that was asked for; for "auto" the stock one, and where there is none the one built per layer.

    Args:
        multiple_of: MLP widths are rounded up to a multiple of it.
        remote_code: whether the code of the class is to be beside the weights.
    Raises:
        ConfigError: the form cannot hold the model, and the message says why of every config that was tried; or
            `remote_code` is asked for with a stock form.
    """
    if form not in ("auto", *FORMS):
        raise ConfigError(f"unknown form {form!r}; known: auto, {', '.join(FORMS)}.")
    if multiple_of < 1:
        raise ConfigError(f"multiple_of is the number that MLP widths are multiples of, at least 1, got {multiple_of}.")
    widths = [_rounded_up(width, multiple_of) for width in source.widths]
    tried = ("stock", "per_layer") if form == "auto" else (form,)
    refused: dict[str, str] = {}
    for name in tried:
        try:
            for label, config_class, values in _CANDIDATES[name](source, widths):
                try:
                    skeleton = build_skeleton(source, config_class, values)
                except Refusal as refusal:
                    refused[label] = str(refusal)
                    continue
                if remote_code and name != "per_layer":
                    raise ConfigError(
                        f"remote_code: a checkpoint of form {name!r} has no code of its own; {type(skeleton).__name__} "
                        "is part of transformers. Leave remote_code out, or use form='per_layer'."
                    )
                return Form(name, skeleton, refused)
        except Refusal as refusal:
            refused[name] = str(refusal)
    reasons = "; ".join(f"{label}: {reason}" for label, reason in refused.items())
    if source.family not in SHRUNK_CLASSES:
        alike = "Remove only what the config of its family can say"
        other = "Make all blocks equally wide" if _differing(widths) else alike
        other += "." if "padded" in tried else ", or use form='padded'."
    else:
        other = "Save what remove_units left, unchanged." if "per_layer" in tried else "Use form='per_layer'."
    raise ConfigError(f"{type(source.model).__name__}: form={form!r} cannot hold this model ({reasons}). {other}")


def _stock(source: Source, widths: Widths) -> Iterator[Candidate]:
    if differing := _differing(widths):
        raise Refusal(f"its blocks differ in {', '.join(differing)}")
    yield from _uniform(source, _widest(widths), len(widths))


def _padded(source: Source, widths: Widths) -> Iterator[Candidate]:
    """With the widths of the widest block; with more heads where no config takes as many."""
    groups = {width["num_attention_heads"] // width["num_key_value_heads"] for width in widths}
    if len(groups) > 1:
        raise Refusal("its blocks have different numbers of query heads for one KV head")
    if "num_experts" in _differing(widths):
        raise Refusal("its blocks have different numbers of experts, and a router would choose one of zeros")
    widest, group = _widest(widths), groups.pop()
    most = max(widest["num_key_value_heads"], source.hidden_size // (source.head_dim * group))
    for kv_heads in range(widest["num_key_value_heads"] if source.structure.head_dim_field else most, most + 1):
        heads = {"num_attention_heads": kv_heads * group, "num_key_value_heads": kv_heads}
        for candidate in _uniform(source, {**widest, **heads}, len(widths)):
            yield candidate._replace(label=f"{candidate.label} with {kv_heads * group} heads")


def _per_layer(source: Source, widths: Widths) -> Iterator[Candidate]:
    if source.family not in SHRUNK_CLASSES:
        raise Refusal(
            f"no class is known that builds blocks of different widths for type {source.family!r}, as there is for "
            f"{', '.join(sorted(SHRUNK_CLASSES))}"
        )
    config_class = SHRUNK_CLASSES[source.family][0]
    layers = [own_names(config_class, source.structure, width) for width in widths]
    values = {
        **source.values,
        **_widest(layers),
        **_depth(config_class, len(widths)),
        "head_dim": source.head_dim,
        "per_layer_config": dict(enumerate(layers)),
    }
    yield Candidate(config_class.model_type, config_class, values)


_CANDIDATES = {"stock": _stock, "per_layer": _per_layer, "padded": _padded}


def _uniform(source: Source, width: Mapping[str, int], depth: int) -> Iterator[Candidate]:
    """Stock configs in which all blocks have one width: of the family, then of its siblings."""
    own, structure, values = CONFIG_MAPPING[source.family], source.structure, source.values
    said = own_names(own, structure, width) | _depth(own, depth)
    if structure.head_dim_field:
        said[structure.head_dim_field] = source.head_dim
    elif width["num_attention_heads"] * source.head_dim != source.hidden_size:
        raise Refusal(
            f"{own.__name__} cannot say that {width['num_attention_heads']} heads are {source.head_dim} wide each: it "
            f"divides the hidden size {source.hidden_size} by their number"
        )
    yield Candidate(source.family, own, values | said)
    windows = values.get("sliding_window"), *(values.get("layer_types") or ())
    if any(window not in (None, "full_attention") for window in windows):
        return
    for sibling, told in SIBLINGS.get(source.family, ()):
        config_class = CONFIG_MAPPING[sibling]
        known = {field.name for field in fields(config_class)} | {"adaptive_sparse"}
        carried = {name: value for name, value in values.items() if name in known}
        yield Candidate(sibling, config_class, carried | told | said)


def _depth(config_class: type[PreTrainedConfig], layers: int) -> dict[str, int]:
    return {config_class.attribute_map.get("num_hidden_layers", "num_hidden_layers"): layers}


def _rounded_up(width: dict[str, int], multiple_of: int) -> dict[str, int]:
    if "intermediate_size" not in width:
        return width
    return {**width, "intermediate_size": -(-width["intermediate_size"] // multiple_of) * multiple_of}


def _differing(widths: Widths) -> list[str]:
    return [name for name in _widest(widths) if len({width[name] for width in widths if name in width}) > 1]


def _widest(widths: Widths) -> dict[str, int]:
    """The largest of every width, in the order of the first block that has it."""
    names = dict.fromkeys(name for width in widths for name in width)
    return {name: max(width[name] for width in widths if name in width) for name in names}
