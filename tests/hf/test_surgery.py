"""Units are removed: the model computes what it did with them at zero, and goes on training and generating."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM

from hf_adaptive_sparse.families import STRUCTURES, Structure
from hf_adaptive_sparse.hf.shrunk_export import export_shrunk
from hf_adaptive_sparse.hf.surgery import block_widths, remove_units
from hf_adaptive_sparse.hf.units import find_axes, unit_numel
from hf_adaptive_sparse.units import KINDS, Axis

from ..tiny_models import tokens
from .unit_models import FAMILIES_WITH_UNITS, random_keep, unit_model

seeds = st.integers(0, 10_000)
Keep = dict[str, torch.Tensor]
# Norms compute in float32, and routers choose in float32, whatever the model is in.
TOLERANCE = {"hidden": 1e-4, "expert": 1e-5}


def has(family: str, kind: str) -> bool:
    """Whether a model of the family has units of a kind."""
    if kind in ("expert", "hidden"):
        return bool(STRUCTURES[family].experts) if kind == "expert" else STRUCTURES[family].norm != "layer"
    return (family, kind) != ("mixtral", "mlp_channel")


PAIRS = [(family, kind) for family in FAMILIES_WITH_UNITS for kind in KINDS if has(family, kind)]
every_family = pytest.mark.parametrize("family", FAMILIES_WITH_UNITS)


def keep_some(model, kinds, seed: int, uniform: bool = False) -> tuple[list[Axis], Keep]:
    """The axes of these kinds, and a random mask for each; `uniform`: the same number for all of a kind."""
    axes = find_axes(model, kinds)
    same = range(len(axes)) if not uniform else [KINDS.index(axis.kind) for axis in axes]
    least = {"expert": 2}  # experts per token
    return axes, {a.name: random_keep(a, seed + i, least.get(a.kind, 1)) for i, a in zip(same, axes, strict=True)}


@torch.no_grad()
def zeroed(model, axes: list[Axis], keep: Keep):
    """A copy of the model in which the units that go are without effect, by a way that knows no surgery."""
    model = copy.deepcopy(model)
    parameters = dict(model.named_parameters())
    for axis in axes:
        gone = (~keep[axis.name]).nonzero().flatten()
        if axis.kind == "layer":
            writers = ("o_proj", "out_proj", "c_proj", "down_proj", "fc2")
            for name, parameter in parameters.items():
                if any(name.startswith(f"{axis.name}.{i}.") for i in gone) and any(w in name for w in writers):
                    parameter.zero_()
        elif axis.kind == "expert":
            model.get_submodule(axis.name.replace("experts", "gate")).register_forward_hook(without_experts(gone))
        else:
            for span in axis.spans:
                # Who reads a head or a channel no longer does; who writes to a hidden channel writes zeros.
                if span.reads == (axis.kind != "hidden"):
                    parameters[span.tensor].index_fill_(span.dim, span.index[gone].flatten(), 0.0)
    return model


def without_experts(gone: torch.Tensor):
    def route(module, args, output):
        logits = output[0].index_fill(-1, gone, -torch.inf)
        best, chosen = logits.float().softmax(-1).topk(module.top_k)
        if getattr(module, "norm_topk_prob", True):
            best = best / best.sum(-1, keepdim=True)
        return logits, best.to(output[1].dtype), chosen

    return route


@torch.no_grad()
def logits(model) -> torch.Tensor:
    return model(tokens(2, 8)).logits


def numel(model) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize("family, kind", PAIRS)
@settings(max_examples=2)
@given(seed=seeds, tied=st.booleans())
def test_removing_units_is_the_same_as_zeroing_them(family, kind, seed, tied):
    model = unit_model(family, seed, torch.float64, tie_word_embeddings=tied)
    axes, keep = keep_some(model, (kind,), seed)
    expected, dense, before = logits(zeroed(model, axes, keep)), logits(model), numel(model)
    cost = sum(int(unit_numel(model, axis)[~keep[axis.name]].sum()) for axis in axes)
    remove_units(model, keep)
    torch.testing.assert_close(logits(model), expected, rtol=0, atol=TOLERANCE.get(kind, 1e-9))
    assert (expected - dense).abs().max() > 1e-3
    assert numel(model) == before - cost


@every_family
@settings(max_examples=2)
@given(seed=seeds)
def test_units_of_all_kinds_go_at_once(family, seed):
    model = unit_model(family, seed, torch.float64)
    axes, keep = keep_some(model, [kind for kind in KINDS if has(family, kind)], seed)
    expected = logits(zeroed(model, axes, keep))
    remove_units(model, keep)
    torch.testing.assert_close(logits(model), expected, rtol=0, atol=1e-4)


@given(seed=seeds)
@settings(max_examples=5)
def test_gradients_are_those_of_the_zeroed_model(seed):
    model = unit_model("llama", seed, torch.float64)
    axes, keep = keep_some(model, ("kv_head", "mlp_channel"), seed)
    slow = zeroed(model, axes, keep)
    remove_units(model, keep)
    for each in (slow, model):
        each(tokens(2, 8), labels=tokens(2, 8)).loss.backward()
    expected = {name: parameter.grad for name, parameter in slow.named_parameters()}
    for axis in axes:
        for span in axis.spans:
            kept = span.index[keep[axis.name]].flatten().sort().values
            expected[span.tensor] = expected[span.tensor].index_select(span.dim, kept)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name], rtol=1e-9, atol=1e-9, msg=name)


def test_a_kv_head_takes_with_it_the_query_heads_that_read_it():
    # KV head 1 of 3 is read by query heads 2 and 3 of 6, not by 1 and 4.
    model = unit_model("llama", dtype=torch.float64)
    slow = copy.deepcopy(model)
    with torch.no_grad():
        slow.model.layers[0].self_attn.o_proj.weight[:, 2 * 4 : 4 * 4] = 0
    remove_units(model, {"model.layers.0.self_attn": torch.tensor([True, False, True])})
    torch.testing.assert_close(logits(model), logits(slow), rtol=0, atol=1e-9)


@torch.no_grad()
def greedy_without_cache(model, prompt: torch.Tensor, count: int) -> torch.Tensor:
    for _ in range(count):
        prompt = torch.cat([prompt, model(prompt, use_cache=False).logits[:, -1:].argmax(-1)], dim=1)
    return prompt


@every_family
@pytest.mark.parametrize("cache", [None, "static"])
def test_generate_works_after_surgery_with_either_cache(family, cache):
    model = unit_model(family)
    _, keep = keep_some(model, [kind for kind in KINDS if has(family, kind)], seed=4)
    remove_units(model, keep)
    # No eos: it would end one row before the other.
    found = model.generate(
        tokens(2, 4), max_new_tokens=5, do_sample=False, cache_implementation=cache, eos_token_id=None, pad_token_id=0,
        disable_compile=True,
    )  # fmt: skip
    assert found.tolist() == greedy_without_cache(model, tokens(2, 4), 5).tolist()


@every_family
def test_a_uniform_shape_is_a_config_that_builds_the_model(family, tmp_path):
    model = unit_model(family)
    kinds = [kind for kind in KINDS if has(family, kind) and (kind != "kv_head" or STRUCTURES[family].head_dim_field)]
    axes = find_axes(model, kinds)
    # 2 of 3 KV heads: 4 query heads, which divide the 16 hidden channels that stay.
    left = {"kv_head": 2, "mlp_channel": 7, "expert": 3, "hidden": 16, "layer": 2}
    remove_units(model, {axis.name: torch.arange(axis.count) < left[axis.kind] for axis in axes})
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path, experts_implementation="eager")
    assert torch.equal(logits(again), logits(model))
    assert {name: module.extra_repr() for name, module in again.named_modules()} == {
        name: module.extra_repr() for name, module in model.named_modules()
    }


def test_the_widths_of_the_blocks_are_read_off_their_weights_and_the_config_has_the_largest():
    model = unit_model("llama")
    remove_units(model, {
        "model.layers.0.self_attn": torch.tensor([True, False, True]),
        "model.layers.1.self_attn": torch.tensor([False, False, True]),
        "model.layers.2.self_attn": torch.tensor([True, False, False]),
        "model.layers.1.mlp": torch.arange(20) % 3 > 0,
    })  # fmt: skip
    widths = [(4, 2, 20), (2, 1, 13), (2, 1, 20)]
    keys = ("num_attention_heads", "num_key_value_heads", "intermediate_size")
    assert block_widths(model) == [dict(zip(keys, each, strict=True)) for each in widths]
    assert [getattr(model.config, key) for key in keys] == [4, 2, 20]
    mlp = model.model.layers[1].mlp
    assert (mlp.intermediate_size, mlp.up_proj.out_features, mlp.down_proj.in_features) == (13, 13, 13)


def test_the_width_of_a_block_with_experts_is_their_number():
    model = unit_model("qwen3_moe")
    remove_units(model, {"model.layers.2.mlp.experts": torch.tensor([True, False, True, True])})
    heads = {"num_attention_heads": 6, "num_key_value_heads": 3}
    dense, whole, fewer = {"intermediate_size": 20}, {"num_experts": 4}, {"num_experts": 3}
    assert block_widths(model) == [{**heads, **last} for last in (whole, dense, fewer)]


@pytest.mark.parametrize("family", ["opt", "gpt2"])
def test_a_config_without_a_field_for_the_size_of_a_head_keeps_its_number_of_heads(family):
    model = unit_model(family)
    keep = torch.tensor([True, False, True])
    remove_units(model, {axis.name: keep for axis in find_axes(model, ("kv_head",))})
    assert model.config.num_attention_heads == 3
    assert [each["num_attention_heads"] for each in block_widths(model)] == [2, 2, 2]


def test_layers_are_numbered_anew_and_keep_their_types():
    model = unit_model("gemma2", layer_types=["sliding_attention", "full_attention", "sliding_attention"])
    remove_units(model, {"model.layers": torch.tensor([False, True, True])})
    assert [layer.self_attn.layer_idx for layer in model.model.layers] == [0, 1]
    assert model.config.num_hidden_layers == 2
    assert model.config.layer_types == ["full_attention", "sliding_attention"]


def test_which_blocks_have_experts_is_written_out_when_their_numbers_change():
    model = unit_model("qwen3_moe")
    remove_units(model, {"model.layers": torch.tensor([False, True, True])})
    assert (model.config.mlp_only_layers, model.config.decoder_sparse_step) == ([0], 1)


def test_an_attention_that_asks_its_config_sees_its_own_heads_and_else_the_config_of_the_model():
    model = unit_model("phi3")
    remove_units(model, {"model.layers.1.self_attn": torch.tensor([True, False, True])})
    whole, fewer = (model.model.layers[i].self_attn.config for i in (0, 1))
    assert (whole.num_attention_heads, whole.num_key_value_heads) == (6, 3)
    assert (fewer.num_attention_heads, fewer.num_key_value_heads, fewer.hidden_size) == (4, 2, 24)
    model.set_attn_implementation("eager")
    assert fewer._attn_implementation == "eager"
    assert torch.equal(logits(copy.deepcopy(model)), logits(model))
    rest = torch.tensor([True, False, True])
    remove_units(model, {f"model.layers.{i}.self_attn": rest for i in (0, 2)})
    assert all(layer.self_attn.config is model.config for layer in model.model.layers)


@every_family
def test_a_model_whose_blocks_differ_can_lose_more_and_its_config_says_so(family, tmp_path):
    model = unit_model(family)
    remove_units(model, {find_axes(model)[0].name: torch.tensor([True, False, True])})
    export_shrunk(model, tmp_path / "first")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "first", experts_implementation="eager")
    (layers,) = find_axes(again, ("layer",))
    middle = next(each for each in find_axes(again) if each.block == 1)
    keep = {middle.name: torch.tensor([False, False, True]), layers.name: torch.tensor([True, True, False])}
    for each in (model, again):
        remove_units(each, keep)
    again.save_pretrained(tmp_path / "second")
    last = AutoModelForCausalLM.from_pretrained(tmp_path / "second", experts_implementation="eager")
    assert torch.equal(logits(last), logits(model))
    assert block_widths(last) == block_widths(model)


def trained(family: str, seed: int = 0, **changes):
    """A model and an AdamW that took a step; the loss is alive, as it is in a loop of training."""
    model = unit_model(family, seed, **changes)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    loss = model(tokens(2, 8), labels=tokens(2, 8)).loss
    loss.backward()
    optimizer.step()
    return model, optimizer, loss


@pytest.mark.parametrize("family, kind", PAIRS)
def test_moments_are_cut_like_their_parameters_and_training_goes_on(family, kind):
    model, optimizer, _loss = trained(family)
    before = {name: (p, optimizer.state[p]["exp_avg"].clone(), p.grad.clone()) for name, p in model.named_parameters()}
    axes, keep = keep_some(model, (kind,), seed=3)
    spans = [(span, keep[axis.name]) for axis in axes for span in axis.spans]
    kept = keep.get(axes[-1].name) if kind == "layer" else None
    remove_units(model, keep, optimizer)
    if kept is not None:
        numbers = kept.nonzero().flatten().tolist()
        before = {renamed(name, axes[-1].name, numbers): value for name, value in before.items()}
    for name, parameter in model.named_parameters():
        was, moment, grad = before[name]
        assert parameter is was
        for span, mask in spans:
            if span.tensor == name:
                stays = span.index[mask].flatten().sort().values
                moment, grad = moment.index_select(span.dim, stays), grad.index_select(span.dim, stays)
        assert torch.equal(optimizer.state[parameter]["exp_avg"], moment)
        assert torch.equal(parameter.grad, grad)
        assert optimizer.state[parameter]["exp_avg_sq"].shape == parameter.shape
    assert {id(p) for p in optimizer.state} == {id(p) for p in model.parameters()}
    assert [id(p) for p in optimizer.param_groups[0]["params"]] == [id(p) for p in model.parameters()]
    optimizer.zero_grad()
    losses = []
    for _ in range(3):
        losses.append(model(tokens(2, 8), labels=tokens(2, 8)).loss)
        losses[-1].backward()
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < losses[0]


def renamed(name: str, layers: str, kept: list[int]) -> str:
    """The name of a parameter after the removal of layers; "" if it is removed."""
    if not name.startswith(f"{layers}."):
        return name
    number, rest = name.removeprefix(f"{layers}.").split(".", 1)
    return f"{layers}.{kept.index(int(number))}.{rest}" if int(number) in kept else ""


def test_named_parameters_leave_the_optimizer_with_their_names():
    model = unit_model("llama")
    optimizer = torch.optim.AdamW(model.named_parameters())
    remove_units(model, {"model.layers": torch.tensor([True, False, True])}, optimizer)
    (group,) = optimizer.param_groups
    assert len(group["params"]) == len(group["param_names"])
    assert not any(".layers.1." in name for name in group["param_names"])


def test_another_dtype_and_a_frozen_parameter_are_cut_too():
    model = unit_model("llama", dtype=torch.float16)
    model.requires_grad_(False)
    remove_units(model, {"model.layers.0.mlp": torch.arange(20) < 5})
    weight = model.model.layers[0].mlp.up_proj.weight
    assert weight.dtype == torch.float16 and weight.shape == (5, 24) and not weight.requires_grad


def test_a_family_that_is_declared_by_its_user_can_be_cut(monkeypatch):
    monkeypatch.setitem(STRUCTURES, "gemma3_text", Structure(norm="rms_plus_one", head_norms=("q_norm", "k_norm")))
    model = unit_model("gemma3_text", dtype=torch.float64)
    for kind in ("kv_head", "mlp_channel", "hidden", "layer"):
        axes, keep = keep_some(model, (kind,), seed=1)
        expected = logits(zeroed(model, axes, keep))
        remove_units(model, keep)
        torch.testing.assert_close(logits(model), expected, rtol=0, atol=TOLERANCE.get(kind, 1e-9))
