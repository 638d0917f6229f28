"""Shapes in the words of a user: read, checked against a model, and turned into units."""

from __future__ import annotations

import pytest

from hf_adaptive_sparse.errors import ConfigError, TargetError
from hf_adaptive_sparse.hf.shapes import parse_shape, units_of_shape
from tests.hf.unit_models import unit_model
from tests.tiny_models import tiny_model


def test_a_shape_names_what_stays_and_leaves_the_rest():
    assert parse_shape("layers=4, heads=6,ffn=512") == {"layers": 4, "heads": 6, "ffn": 512}
    assert parse_shape("ffn=3") == {"ffn": 3}


@pytest.mark.parametrize("text", ["", "layers", "layers=0", "layers=-1", "heads=1.5", "width=3", "ffn=2,ffn=3"])
def test_what_is_no_shape_is_refused(text):
    with pytest.raises(ConfigError) as error:
        parse_shape(text)
    part = text.split(",")[-1]
    assert str(error.value) == (
        f"shape is written layers=4,heads=6,ffn=512 (each once, any of them), got {part!r} in {text!r}."
    )


def test_heads_are_counted_by_the_groups_that_go_together():
    model = tiny_model("llama")  # two query heads read each of two KV heads
    assert units_of_shape(model, {"heads": 2}) == {"kv_head": 1, "mlp_channel": 64}
    assert units_of_shape(model, {"layers": 1, "ffn": 10}) == {"kv_head": 2, "mlp_channel": 10, "layer": 1}
    assert units_of_shape(model, {"layers": 2}) == {"kv_head": 2, "mlp_channel": 64}


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ({"layers": 3}, "shape layers=3: the model has 2. Ask for at most that many."),
        ({"heads": 6}, "shape heads=6: the model has 4. Ask for at most that many."),
        (
            {"heads": 3},
            "shape heads=3: 2 query heads read each KV head and go with it. Ask for a multiple of 2.",
        ),
    ],
)
def test_a_shape_that_the_model_cannot_take_is_refused(shape, message):
    with pytest.raises(ConfigError) as error:
        units_of_shape(tiny_model("llama"), shape)
    assert str(error.value) == message


def test_fewer_layers_of_a_model_from_which_none_can_go_are_refused():
    model = tiny_model("opt", do_layer_norm_before=False)
    with pytest.raises(TargetError) as error:
        units_of_shape(model, {"layers": 1, "heads": 3})
    assert str(error.value) == (
        "OPTForCausalLM: do_layer_norm_before=False has the norms of a layer behind its sums, so a layer that adds "
        "nothing still changes what it passes on, and a removed one does not. Only heads and channels can be removed "
        "from this model."
    )
    assert units_of_shape(model, {"layers": 2, "heads": 3}) == {"kv_head": 3, "mlp_channel": 64}


def test_models_with_experts_have_no_shape_of_this_kind():
    with pytest.raises(ConfigError) as error:
        units_of_shape(unit_model("mixtral"), {"layers": 1})
    assert str(error.value) == "a shape is for models whose blocks are alike and have no experts; this one's differ."
