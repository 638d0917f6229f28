"""How the linears of a decoder block hang together: what makes and what reads its heads, channels and experts."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Structure:
    """Names of the parts of a decoder block and of the config fields that hold their widths; defaults: Llama's.

    Args:
        attention: name of the module of a block that holds the heads.
        heads: its linears whose outputs are queries, keys and values, in this order; of a single one they are the
            consecutive parts [q | k | v].
        heads_out: its linear that reads the heads.
        heads_from_config: whether the attention asks its `config` for the number of heads at every forward pass.
        head_norms: norms over one head, shared by all heads; they stay as they are.
        mlp: name of the module of a block that holds the MLP, or the router and the experts; "": the block itself.
        channels: its linears whose outputs are the channels.
        channel_parts: consecutive parts of their outputs, each with one row per channel ([gate | up]: 2).
        channels_out: its linear that reads the channels.
        experts: name of the fused experts in `mlp`; "": the family has none.
        router: name of the module in `mlp` whose `weight` has one row per expert.
        norm: "rms"; "rms_plus_one", which multiplies by 1 + weight; "layer", which subtracts the mean, so that no
            hidden channel can go.
        head_dim_field: of the config; "": the config divides the hidden size by the heads, so it cannot tell of
            fewer heads of the same size.
        kv_heads_field: of the config; "": as many as heads.
        channels_field: of the config.
        experts_field: of the config.
    """

    attention: str = "self_attn"
    heads: tuple[str, ...] = ("q_proj", "k_proj", "v_proj")
    heads_out: str = "o_proj"
    heads_from_config: bool = False
    head_norms: tuple[str, ...] = ()
    mlp: str = "mlp"
    channels: tuple[str, ...] = ("gate_proj", "up_proj")
    channel_parts: int = 1
    channels_out: str = "down_proj"
    experts: str = ""
    router: str = "gate"
    norm: str = "rms"
    head_dim_field: str = "head_dim"
    kv_heads_field: str = "num_key_value_heads"
    channels_field: str = "intermediate_size"
    experts_field: str = ""
