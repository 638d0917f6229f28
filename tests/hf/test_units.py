"""Which slices belong to a head, a channel, an expert, a hidden channel."""

from __future__ import annotations

import re

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from hf_adaptive_sparse.errors import ConfigError, TargetError
from hf_adaptive_sparse.families import FAMILIES, STRUCTURES, Structure
from hf_adaptive_sparse.hf.units import find_axes, unit_numel
from hf_adaptive_sparse.units import KINDS

from ..tiny_models import tiny_model
from .unit_models import FAMILIES_WITH_UNITS, unit_model

every_family = pytest.mark.parametrize("family", FAMILIES_WITH_UNITS)


def has_hidden(family: str) -> bool:
    return STRUCTURES[family].norm != "layer"


def spans_of(model, name: str, kinds=("kv_head", "mlp_channel")) -> dict[str, tuple[int, list, bool]]:
    """{tensor: (dim, index, reads)} of an axis."""
    (axis,) = (axis for axis in find_axes(model, kinds) if axis.name == name)
    return {span.tensor: (span.dim, span.index.tolist(), span.reads) for span in axis.spans}


def rows(*ranges: tuple[int, int]) -> list[list[int]]:
    return [list(range(*each)) for each in ranges]


def test_the_query_heads_of_a_kv_head_are_the_consecutive_ones_that_read_it():
    model = unit_model("qwen2")  # 6 query heads of 4, 3 KV heads; biases on q, k and v
    name = "model.layers.1.self_attn"
    queries, keys = rows((0, 8), (8, 16), (16, 24)), rows((0, 4), (4, 8), (8, 12))
    assert spans_of(model, name) == {
        f"{name}.q_proj.weight": (0, queries, False),
        f"{name}.q_proj.bias": (0, queries, False),
        f"{name}.k_proj.weight": (0, keys, False),
        f"{name}.k_proj.bias": (0, keys, False),
        f"{name}.v_proj.weight": (0, keys, False),
        f"{name}.v_proj.bias": (0, keys, False),
        f"{name}.o_proj.weight": (1, queries, True),
    }


def test_fused_queries_keys_and_values_are_three_parts_of_one_span():
    name = "model.layers.0.self_attn"  # phi3: 24 queries, 12 keys, 12 values
    index = [q + k + v for q, k, v in zip(rows((0, 8), (8, 16), (16, 24)), rows((24, 28), (28, 32), (32, 36)),
             rows((36, 40), (40, 44), (44, 48)), strict=True)]  # fmt: skip
    assert spans_of(unit_model("phi3"), name)[f"{name}.qkv_proj.weight"] == (0, index, False)


def test_the_weights_of_a_conv1d_are_stored_the_other_way_round():
    name = "transformer.h.2.attn"  # 3 heads of 8
    heads = rows((0, 8), (8, 16), (16, 24))
    index = [q + [i + 24 for i in q] + [i + 48 for i in q] for q in heads]
    assert spans_of(unit_model("gpt2"), name) == {
        f"{name}.c_attn.weight": (1, index, False),
        f"{name}.c_attn.bias": (0, index, False),
        f"{name}.c_proj.weight": (0, heads, True),
    }


def test_a_channel_of_a_fused_mlp_is_a_row_of_the_gate_and_one_of_the_rest():
    name = "model.layers.0.mlp"
    assert spans_of(unit_model("phi3"), name) == {
        f"{name}.gate_up_proj.weight": (0, [[i, i + 20] for i in range(20)], False),
        f"{name}.down_proj.weight": (1, [[i] for i in range(20)], True),
    }


def test_the_linears_of_an_mlp_may_lie_in_the_block_itself():
    name = "model.decoder.layers.0"
    tensors = [f"{name}.{each}" for each in ("fc1.weight", "fc1.bias", "fc2.weight")]
    assert list(spans_of(unit_model("opt"), name)) == tensors


@every_family
def test_axes_come_block_by_block_and_attention_first(family):
    axes = find_axes(unit_model(family), [kind for kind in KINDS if kind != "hidden" or has_hidden(family)])
    kinds = [(axis.block, axis.kind) for axis in axes]
    second = {"mixtral": ["expert"] * 3, "qwen3_moe": ["expert", "mlp_channel", "expert"]}
    expected = [(i, kind) for i in range(3) for kind in ("kv_head", second.get(family, ["mlp_channel"] * 3)[i])]
    assert kinds == expected + [(None, "hidden")] * has_hidden(family) + [(None, "layer")]
    assert len({axis.name for axis in axes}) == len(axes)


@every_family
def test_no_position_belongs_to_two_units_and_no_tensor_has_two_spans(family):
    model = unit_model(family)
    shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
    for axis in find_axes(model, [kind for kind in KINDS if kind != "hidden" or has_hidden(family)]):
        assert len({span.tensor for span in axis.spans}) == len(axis.spans)
        for span in axis.spans:
            assert len(span.index) == axis.count and span.index.dtype == torch.int64
            flat = span.index.flatten()
            assert len(flat.unique()) == len(flat)
            # All positions of the tensor belong to a unit, for the tensors that are known here.
            assert sorted(flat.tolist()) == list(range(shapes[span.tensor][span.dim]))


def test_an_axis_that_a_model_does_not_have_is_left_out():
    assert find_axes(unit_model("llama"), ("expert",)) == []
    assert find_axes(unit_model("mixtral"), ("mlp_channel",)) == []


def test_a_tied_head_has_no_span_of_its_own():
    def heads(tied):
        return [
            span.tensor
            for axis in find_axes(unit_model("llama", tie_word_embeddings=tied), ("hidden",))
            for span in axis.spans
            if "embed" in span.tensor or "lm_head" in span.tensor
        ]

    assert heads(True) == ["model.embed_tokens.weight"]
    assert heads(False) == ["model.embed_tokens.weight", "lm_head.weight"]


def test_layers_of_different_widths_have_different_costs():
    model = unit_model("qwen3_moe")
    (layers,) = find_axes(model, ("layer",))
    blocks = model.model.layers
    expected = [sum(parameter.numel() for parameter in block.parameters()) for block in blocks]
    assert unit_numel(model, layers).tolist() == expected and len(set(expected)) == 2
    with pytest.raises(ConfigError) as error:
        layers.cost({name: parameter.shape for name, parameter in model.named_parameters()})
    assert str(error.value) == (
        "model.layers: units of kind layer take whole tensors, and need not cost the same. Ask unit_numel(model, axis)."
    )


def test_every_declared_family_is_tried_here_and_every_structure_of_a_family_is_found():
    assert {name for name, family in FAMILIES.items() if family.structure is not None} <= STRUCTURES.keys()
    assert set(FAMILIES_WITH_UNITS) == STRUCTURES.keys()


def message(function, *args) -> tuple[type, str]:
    with pytest.raises((ConfigError, TargetError)) as caught:
        function(*args)
    return caught.type, str(caught.value)


KNOWN = "gemma, gemma2, gpt2, llama, mistral, mixtral, opt, phi3, qwen2, qwen3, qwen3_moe"


def test_an_unsupported_family_is_told_its_linears_and_how_to_declare_them():
    assert message(find_axes, tiny_model("bloom")) == (
        TargetError,
        "BloomForCausalLM: no structure is declared for models of type 'bloom', so it is not known which weights make "
        f"and read a head or a channel; known: {KNOWN}. The linears of transformer.h.0 are "
        "self_attention.query_key_value [96, 32], self_attention.dense [32, 32], mlp.dense_h_to_4h [128, 32], "
        "mlp.dense_4h_to_h [32, 128]. Declare them with hf_adaptive_sparse.families.STRUCTURES['bloom'] = "
        "Structure(heads=..., heads_out=..., channels=..., channels_out=...).",
    )


def test_an_unknown_kind_is_refused():
    assert message(find_axes, unit_model("llama"), ("head",)) == (
        ConfigError,
        "unknown kind of unit 'head'; known: kv_head, mlp_channel, expert, hidden, layer.",
    )


@pytest.mark.parametrize("family", ["opt", "gpt2"])
def test_hidden_channels_of_layer_norms_are_refused(family):
    model = unit_model(family)
    assert message(find_axes, model, ("hidden",)) == (
        TargetError,
        f"{type(model).__name__}: its norms subtract the mean over all hidden channels, so removing one is not the "
        "same as making it zero. Only models with RMS norms can have fewer hidden channels.",
    )


def test_a_parameter_that_may_be_hidden_is_never_passed_over():
    model = unit_model("llama")
    model.model.layers[1].extra = nn.Linear(24, 2, bias=False)
    assert message(find_axes, model, ("hidden",)) == (
        TargetError,
        "LlamaForCausalLM: it is not known whether model.layers.1.extra.weight [2, 24] holds hidden channels: the "
        "structure that is declared for this family does not name it.",
    )


def test_adapters_are_refused():
    model = unit_model("llama")
    get_peft_model(model, LoraConfig(target_modules=["q_proj"]))
    assert message(find_axes, model) == (
        ConfigError,
        "coupled units: this LlamaForCausalLM has adapters in it. Call merge_and_unload() on it first, and save what "
        "it returns.",
    )


def test_another_kind_of_linear_is_refused():
    model = unit_model("llama")
    mlp = model.model.layers[0].mlp
    mlp.down_proj = nn.Sequential(mlp.down_proj)
    assert message(find_axes, model) == (
        TargetError,
        "model.layers.0.mlp.down_proj: is a torch.nn.modules.container.Sequential, and only nn.Linear and Conv1D can "
        "be made smaller. Call dequantize() on a packed or quantized model, and remove units before its linears "
        "become sparse.",
    )


def test_a_structure_that_does_not_fit_is_refused(monkeypatch):
    model = unit_model("llama")
    monkeypatch.setitem(STRUCTURES, "llama", Structure(heads_out="out_proj"))
    assert message(find_axes, model) == (
        TargetError,
        "model.layers.0.self_attn.out_proj: there is no such module, and the structure that is declared for this "
        "family names it. model.layers.0.self_attn has q_proj, k_proj, v_proj, o_proj.",
    )
    monkeypatch.setitem(STRUCTURES, "llama", Structure(channel_parts=2))
    assert message(find_axes, model) == (
        TargetError,
        "model.layers.0.mlp.gate_proj: has 20 outputs and needs 40, because model.layers.0.mlp.down_proj reads 20. "
        "Correct the structure that is declared for this family.",
    )
    monkeypatch.setitem(STRUCTURES, "llama", Structure(heads=("q_proj", "k_proj", "o_proj")))
    attention = "model.layers.0.self_attn"
    assert message(find_axes, model) == (
        TargetError,
        f"{attention}: {attention}.q_proj, {attention}.k_proj, {attention}.o_proj have 24, 12, 24 outputs and "
        f"{attention}.o_proj has 24 inputs, which is no whole number of heads of 4 with the same number of query heads "
        "for every KV head. Only attentions whose heads are all of one size are known.",
    )


def test_a_model_of_another_library_is_refused():
    kind, text = message(find_axes, nn.Sequential(nn.Linear(2, 2)))
    assert kind is TargetError and re.fullmatch(
        "Sequential: is no model of transformers, and only their blocks are known.", text
    )
