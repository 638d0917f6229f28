"""Shapes that a model is to be pruned to, in the words of a user: layers, heads and width of the MLP."""

from __future__ import annotations

from torch import nn

from ..errors import ConfigError
from .surgery import block_widths
from .units import check_layers_can_go

# What a user says -> the kind of unit.
SHAPE_NAMES = {"layers": "layer", "heads": "kv_head", "ffn": "mlp_channel"}


def parse_shape(text: str) -> dict[str, int]:
    """"layers=4,heads=6,ffn=512" -> {"layers": 4, "heads": 6, "ffn": 512}; each may be left out.

    Raises:
        ConfigError: a name that is not known, one that is said twice, or no whole number of at least 1.
    """
    found: dict[str, int] = {}
    for part in text.split(","):
        name, _, value = (piece.strip() for piece in part.partition("="))
        if name not in SHAPE_NAMES or name in found or not value.isdecimal() or int(value) < 1:
            raise ConfigError(
                f"shape is written layers=4,heads=6,ffn=512 (each once, any of them), got {part.strip()!r} in {text!r}."
            )
        found[name] = int(value)
    return found


def units_of_shape(model: nn.Module, shape: dict[str, int]) -> dict[str, int]:
    """The shape in units of each kind, as `learn_to_shape` takes it; what is not named stays as it is.

    Heads are query heads; they go in groups, with the KV head that they read.

    Raises:
        ConfigError: blocks that differ, more of something than the model has, or heads that do not fill groups.
        TargetError: fewer layers of a model from which none can go.
    """
    widths = block_widths(model)
    if any(block != widths[0] for block in widths) or "intermediate_size" not in widths[0]:
        raise ConfigError("a shape is for models whose blocks are alike and have no experts; this one's differ.")
    heads, kv_heads = widths[0]["num_attention_heads"], widths[0]["num_key_value_heads"]
    has = {"layers": len(widths), "heads": heads, "ffn": widths[0]["intermediate_size"]}
    for name, value in shape.items():
        if value > has[name]:
            raise ConfigError(f"shape {name}={value}: the model has {has[name]}. Ask for at most that many.")
    group = heads // kv_heads
    if (asked := shape.get("heads", heads)) % group:
        raise ConfigError(
            f"shape heads={asked}: {group} query heads read each KV head and go with it. Ask for a multiple of {group}."
        )
    units = {"kv_head": asked // group, "mlp_channel": shape.get("ffn", has["ffn"])}
    if shape.get("layers", has["layers"]) < has["layers"]:
        check_layers_can_go(model)
        units["layer"] = shape["layers"]
    return units
