"""What a run will cost is known from shapes alone, and is what the arithmetic of the published figures says."""

from __future__ import annotations

from functools import partial
from importlib import import_module

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode, addmm_flop
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, PreTrainedModel

from hf_adaptive_sparse.errors import TargetError
from hf_adaptive_sparse.hf import solver_flops
from hf_adaptive_sparse.hf.block_shapes import block_shapes
from hf_adaptive_sparse.hf.blocks import find_blocks
from hf_adaptive_sparse.hf.calibration import walk_blocks
from hf_adaptive_sparse.hf.one_shot import one_shot, prunable_members
from hf_adaptive_sparse.hf.one_shot_plan import (
    gram_flops,
    linear_flops,
    measured_rate,
    plan_one_shot,
    shared_gram_flops,
)
from hf_adaptive_sparse.hf.pretrained import save_packed
from hf_adaptive_sparse.hf.solver_flops import FACTORISATIONS, solving_flops, sweep_flops
from hf_adaptive_sparse.methods.one_shot import METHODS, Goal, OneShotConfig, prune_group
from hf_adaptive_sparse.patterns import NMPattern
from tests.hf.walked_models import any_model
from tests.layers import random_inputs, random_weight, stats_of
from tests.tiny_models import CONFIGS, tiny_model, tokens

one_shot_module = import_module("hf_adaptive_sparse.hf.one_shot")  # the package exports the function by this name
goals_module = import_module("hf_adaptive_sparse.hf.one_shot_goals")
admm_module = import_module("hf_adaptive_sparse.solvers.admm")

TOKENS = 128 * 2048
_EXPERTS = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "num_local_experts": 4, "num_experts_per_tok": 2,
}  # fmt: skip


def without_weights(config) -> PreTrainedModel:
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()


def llama(hidden: int, intermediate: int, layers: int, heads: int, kv_heads: int) -> PreTrainedModel:
    return without_weights(
        LlamaConfig(
            vocab_size=32000, hidden_size=hidden, intermediate_size=intermediate, num_hidden_layers=layers,
            num_attention_heads=heads, num_key_value_heads=kv_heads,
        )
    )  # fmt: skip


# Computed by hand for 128 windows of 2048 tokens, in PFLOP: Gram matrices of every matrix, the same where q, k and v
# and where gate and up share one, one pass through the linear layers, updates of the sweep (with those between tiles).
@pytest.mark.parametrize("shape, per_matrix, shared, forward, sweep", [
    ((4096, 11008, 32, 32, 32), 3.72, 2.88, 3.40, 0.0381),
    ((4096, 14336, 32, 32, 8), 5.14, 4.29, 3.66, 0.0496),
    ((5120, 13824, 40, 40, 40), 7.31, 5.66, 6.65, 0.0930),
    ((8192, 28672, 80, 64, 8), 51.4, 42.9, 35.9, 0.963),
], ids=["7B", "8B", "13B", "70B"])  # fmt: skip
def test_operations_of_llamas_are_those_of_the_arithmetic(shape, per_matrix, shared, forward, sweep):
    plan = plan_one_shot(llama(*shape), OneShotConfig(method="sparsegpt"), windows=128, window=2048)
    assert plan.tokens == TOKENS
    found = (
        shared_gram_flops(plan.blocks, TOKENS, per_matrix=True), shared_gram_flops(plan.blocks, TOKENS),
        linear_flops(plan.blocks, TOKENS),
    )  # fmt: skip
    for flops, expected in zip(found, (per_matrix, shared, forward), strict=True):
        assert flops / 1e15 == pytest.approx(expected, rel=0.02)
    # Tiles of the sweep cost some products more than a column after the other would.
    assert sweep <= plan.flops["sweep"] / 1e15 <= 1.06 * sweep
    # One pass while what is kept fits KEPT_BYTES, attention included; more for wide models.
    assert forward <= plan.flops["forward passes"] / 1e15 <= 1.9 * forward
    # Half of the Gram matrices: the other half is their mirror image.
    assert 0.5 * shared < plan.flops["Gram matrices"] / 1e15 < 0.6 * shared


def test_ten_refinements_of_a_7b_model_are_seven_tenths_of_a_petaflop():
    model = llama(4096, 11008, 32, 32, 32)
    costs = [
        plan_one_shot(model, OneShotConfig(method="sparsegpt", refine_iterations=count), windows=128, window=2048)
        .flops["conjugate gradients"] for count in (5, 15)
    ]  # fmt: skip
    assert (costs[1] - costs[0]) / 1e15 == pytest.approx(0.73, rel=0.02)


def test_a_7b_plan_says_what_must_fit_into_memory():
    plan = plan_one_shot(llama(4096, 11008, 32, 32, 32), OneShotConfig(), windows=128, window=2048)
    assert plan.stored_bytes == 2 * 6_738_415_616
    # 0.5625 of the bytes of the matrices; embeddings and head stay.
    assert plan.packed_bytes == 2 * (6_738_415_616 - 6_476_005_376) + 1.125 * 6_476_005_376
    assert plan.host_bytes["none"] == 0
    # Of both models the hidden states, and what the output projections read. There is no room for the down projections.
    assert plan.host_bytes["cpu"] == plan.file_bytes["disk"] == plan.stored_bytes + 2 * 2 * TOKENS * (4096 + 4096)
    assert plan.host_bytes["disk"] == plan.file_bytes["none"] == plan.file_bytes["cpu"] == 0
    assert plan.device_bytes["cpu"] < 12e9 < plan.stored_bytes < plan.device_bytes["none"]
    assert plan.memory_bytes["cpu"] == plan.memory_bytes["none"] == plan.device_bytes["none"]
    assert plan.memory_bytes["disk"] == plan.device_bytes["disk"]
    seconds = plan.seconds(model_rate=1e15, float32_rate=1e14)
    assert seconds["forward passes"] == pytest.approx(plan.flops["forward passes"] / 1e15)
    assert seconds["sweep"] == pytest.approx(plan.flops["sweep"] / 1e14)


def tensor_bytes(tensors) -> int:
    return sum(tensor.numel() * tensor.itemsize for tensor in tensors)


@pytest.mark.parametrize("settings, points", [
    ({"pattern": "unstructured"}, 9), ({"pattern": "unstructured", "sparsity": 0.87}, 7), ({"pattern": "mixed"}, 3),
], ids=str)  # fmt: skip
def test_the_plan_knows_the_weights_that_an_evolutionary_search_keeps(monkeypatch, settings, points):
    kept, search = [], goals_module._search

    def watched(*arguments):
        kept.extend(weight for levels in arguments[7].values() for weight in levels.values())
        return search(*arguments)

    monkeypatch.setattr(goals_module, "_search", watched)
    config, model = OneShotConfig(method="fast", allocation="evolutionary", generations=1, **settings), tiny_model()
    plan = planned(model, config)
    one_shot(model, tokens(6, 16), config)
    pruned = prunable_members(find_blocks(model))
    assert len(kept) == points * len(pruned)
    # The library of weights is on the host, wherever the model is.
    assert plan.host_bytes["none"] == tensor_bytes(kept)
    dense, whole = tensor_bytes(member.weight for member in pruned.values()), tensor_bytes(model.parameters())
    # For 6 windows of 16 tokens the scores of 64 words, and for one batch of all of them 3 times as many.
    search_bytes = dense + 4 * 6 * 16 * 64 * 4
    assert plan.host_bytes["cpu"] == tensor_bytes(kept) + whole + search_bytes
    assert plan.host_bytes["disk"] == tensor_bytes(kept) + search_bytes
    assert plan.memory_bytes["none"] >= plan.host_bytes["cpu"] and plan.device_bytes["none"] >= whole + search_bytes


def test_the_plan_knows_the_gradients_that_the_taylor_score_keeps(monkeypatch):
    kept, gradients = [], one_shot_module.weight_gradients

    def watched(*arguments, **options):
        found = gradients(*arguments, **options)
        kept.extend(found.values())
        return found

    monkeypatch.setattr(one_shot_module, "weight_gradients", watched)
    config, model = OneShotConfig(method="taylor", pattern="unstructured"), tiny_model(dtype=torch.bfloat16)
    plans = [
        plan_one_shot(_meta_copy(model), each, windows=6, window=16)
        for each in (config, OneShotConfig(method="magnitude", pattern="unstructured"))
    ]
    one_shot(model, tokens(6, 16), config)
    size = tensor_bytes(kept)
    assert size == 4 * sum(member.weight.numel() for member in prunable_members(find_blocks(model)).values())
    taylor, magnitude = plans
    assert taylor.host_bytes["cpu"] == magnitude.host_bytes["cpu"] + size
    assert (taylor.host_bytes["disk"], magnitude.host_bytes["disk"]) == (size, 0)
    assert taylor.file_bytes == magnitude.file_bytes
    for offload in ("none", "cpu", "disk"):  # while they are collected, all of them are on the device
        assert taylor.device_bytes[offload] >= tensor_bytes(model.parameters()) + size
    assert taylor.memory_bytes["disk"] >= taylor.device_bytes["disk"]


class Counted:
    """What a run of `one_shot` on a model with weights really does: passes, and products in and beside them.

    Attributes:
        starts: of a window through a block or its dense copy, but for those that are stood in for.
        aside: name of a function that `one_shot` calls -> operations in it.
        walk: operations in nothing of these: in passes through the blocks.
    """

    def __init__(self, monkeypatch, config: OneShotConfig, model: PreTrainedModel, windows: torch.Tensor) -> None:
        self.starts, self.aside, self._inside = 0, {}, False
        self._counter = FlopCounterMode(display=False)
        for name in ("choose_goals", "weight_gradients", "prune_group"):
            monkeypatch.setattr(one_shot_module, name, partial(self._count, name, getattr(one_shot_module, name)))
        for block in find_blocks(model).blocks:
            # A function, because the dense copy of a block has a copy of what a method belongs to.
            block.register_forward_pre_hook(lambda *arguments: self._start(*arguments), with_kwargs=True)
        with self._counter:
            one_shot(model, windows, config, batch_size=4)
        self.walk = self._counter.get_total_flops() - sum(self.aside.values())

    def _start(self, module, args, kwargs) -> None:
        if not self._inside and "forward" not in vars(module):
            self.starts += len(args[0] if args else kwargs["hidden_states"])

    def _count(self, name, real, *arguments, **options):
        before, self._inside = self._counter.get_total_flops(), True
        found = real(*arguments, **options)
        self._inside = False
        self.aside[name] = self.aside.get(name, 0) + self._counter.get_total_flops() - before
        return found


def eager(model_type: str = "llama", **changes) -> PreTrainedModel:
    """A model whose products are all counted."""
    return any_model(model_type, attn_implementation="eager", **changes)


def planned(model: PreTrainedModel, config: OneShotConfig):
    return plan_one_shot(_meta_copy(model), config, windows=6, window=16, dtype=torch.float32)


def probe_flops(model: PreTrainedModel) -> int:
    """Of the 8 tokens that go through the first block beside all windows, to see what it returns."""
    return block_shapes(_meta_copy(model), 8)[0].flops


@pytest.mark.parametrize("method, order", [
    *((method, None) for method in METHODS), ("fast", "group"), ("taylor", "group"), ("balanced", "block"),
    ("sparsegpt", "block"),
])  # fmt: skip
def test_the_predicted_passes_are_those_that_a_run_makes(monkeypatch, method, order):
    config, model = OneShotConfig(method=method, order=order), eager()
    plan, probe = planned(model, config), probe_flops(model)
    found = Counted(monkeypatch, config, model, tokens(6, 16))
    assert found.starts == plan.passes
    assert found.walk - probe == plan.flops["forward passes"]
    assert found.aside.get("weight_gradients") == plan.flops.get("gradient pass of the score")


@pytest.mark.parametrize("model_type", ["gpt2", "opt", "falcon", "qwen3", "mixtral"])
@pytest.mark.parametrize("method", ["fast", "sparsegpt", "balanced"])
def test_the_predicted_passes_are_those_of_other_families(monkeypatch, model_type, method):
    config, model = OneShotConfig(method=method), eager(model_type)
    assert Counted(monkeypatch, config, model, tokens(6, 16)).starts == planned(model, config).passes


@pytest.mark.parametrize("order", ["block", "group"])
def test_nothing_goes_on_from_the_last_block(order):
    plans = [
        planned(eager(num_hidden_layers=layers), OneShotConfig(method="sparsegpt", order=order)) for layers in (1, 2, 3)
    ]
    one, two, three = (plan.passes for plan in plans)
    assert three - two == two - one == one + 6


@pytest.mark.parametrize("settings, tolerance", [
    ({"allocation": "ranked"}, 0.0),
    ({"allocation": "ranked", "sensitivity": "hutchinson", "probes": 2}, 0.15),
    ({"allocation": "evolutionary", "generations": 1}, 0.4),  # with products of the sweeps
])  # fmt: skip
def test_the_predicted_passes_of_an_allocation_are_those_that_it_makes(monkeypatch, settings, tolerance):
    config, model = OneShotConfig(method="fast", pattern="unstructured", **settings), eager()
    expected = planned(model, config).flops["allocation: passes"]
    found = Counted(monkeypatch, config, model, tokens(6, 16)).aside["choose_goals"]
    assert found == pytest.approx(expected, rel=tolerance)


def _in_place(shape, a, b, *_, **__) -> int:
    return addmm_flop(shape, a, b)


def product_count(monkeypatch, config: OneShotConfig, rows: int, features: int) -> tuple[int, int]:
    """Operations of what `prune_group` computes from a Gram matrix that was factored before; and steps of ADMM."""
    penalties, inverse = [], admm_module._inverse
    monkeypatch.setattr(admm_module, "_inverse", lambda matrix, rho: inverse(matrix, penalties.append(rho) or rho))
    inputs = random_inputs(0, features, 2 * features)
    stats = stats_of(inputs, cross=inputs.T @ (inputs + 0.1 * random_inputs(1, features, 2 * features)))
    assert stats.scaled.upper.isfinite().all()
    goal = Goal(NMPattern(2, 4), 0.5)
    with FlopCounterMode(display=False, custom_mapping={torch.ops.aten.addmm_: _in_place}) as counter:
        prune_group([random_weight(part, rows // 2, features) for part in range(2)], stats, [goal, goal], config)
    return counter.get_total_flops(), 3 * len(penalties)


@pytest.mark.parametrize("settings", [
    *({"method": name} for name in ("sparsegpt", "isc", "thanos", "alps", "fista", "balanced", "best")),
    {"method": "balanced", "bits": 8}, {"method": "sparsegpt", "solver": "zero_fill", "refine_iterations": 3},
], ids=str)  # fmt: skip
def test_the_predicted_products_of_a_solver_are_those_that_it_makes(monkeypatch, settings):
    config, rows, features = OneShotConfig(**settings), 64, 384
    found, steps = product_count(monkeypatch, config, rows, features)
    monkeypatch.setattr(solver_flops, "ADMM_STEPS", steps)
    terms = solving_flops(rows, features, config)
    expected = sum(flops for term, flops in terms.items() if term != FACTORISATIONS)
    if settings["method"] == "best":  # its conjugate gradients begin where those of ADMM ended, and may converge
        assert expected - terms["conjugate gradients"] <= found <= expected
    else:
        assert found == pytest.approx(expected, rel=0.01)


def test_the_support_of_admm_rests_after_about_as_many_steps_as_are_assumed(monkeypatch):
    _, steps = product_count(monkeypatch, OneShotConfig(method="alps"), 64, 384)
    assert 30 <= steps <= 60


def _meta_copy(model: PreTrainedModel) -> PreTrainedModel:
    return without_weights(model.config)


@pytest.mark.parametrize("model_type", CONFIGS)
def test_matrices_share_an_input_as_they_do_in_the_walk(model_type):
    model = tiny_model(model_type)
    walked = [
        sorted(member.name for member in group.members)
        for visit in walk_blocks(model, tokens(1, 16), needs=())
        for group in visit.groups
    ]
    shapes = block_shapes(_meta_copy(model), 16)
    assert [shape.blocks for shape in shapes] == [2]
    planned = [sorted(each.names) for each in shapes[0].inputs]
    assert planned == [names for names in walked if ".0." in names[0]]
    numel = sum(member.weight.numel() for member in prunable_members(find_blocks(model)).values())
    assert 2 * sum(each.numel for each in shapes[0].inputs) == numel


def test_experts_have_inputs_of_their_own_and_see_a_part_of_the_tokens():
    model = without_weights(AutoConfig.for_model("mixtral", **_EXPERTS))
    (shape,) = block_shapes(model, 16)
    found = [(each.features, each.rows, each.count, each.share) for each in shape.inputs]
    assert found == [(32, 64, 1, 1.0), (32, 32, 1, 1.0), (32, 128, 4, 0.5), (64, 32, 4, 0.5)]
    # Two of four experts for each of 16 tokens, up and down.
    assert shape.flops - shape.inputs[2].flops_before == 2 * 16 * 2 * (128 * 32 + 32 * 64)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("pattern", ["2:4", "unstructured", "mixed"])
def test_every_method_has_a_plan(method, pattern):
    config = OneShotConfig(method=method, pattern=pattern)
    plan = plan_one_shot(without_weights(tiny_model().config), config, windows=4, window=16)
    assert all(flops > 0 for flops in plan.flops.values())
    assert ("Gram matrices" in plan.flops) == ("gram" in config.needs)
    assert any(term.startswith("allocation") for term in plan.flops) == (config.resolved.allocation != "uniform")
    assert (plan.packed_bytes is not None) == (pattern == "2:4")


@pytest.mark.parametrize("allocation", ["ranked", "owl", "alpha", "error_curves", "evolutionary"])
def test_every_allocation_has_a_cost(allocation):
    config = OneShotConfig(method="fast", pattern="unstructured", allocation=allocation)
    plan = plan_one_shot(without_weights(tiny_model().config), config, windows=4, window=16)
    assert sum(flops for term, flops in plan.flops.items() if term.startswith("allocation")) > 0


@pytest.mark.parametrize("bits", [0, 8, 4])
def test_the_predicted_size_is_that_of_the_packed_folder(tmp_path, bits):
    config = OneShotConfig(bits=bits)
    plan = plan_one_shot(without_weights(tiny_model().config), config, windows=4, window=16, stored=torch.bfloat16)
    model = tiny_model(dtype=torch.bfloat16)
    quantized = one_shot(model, tokens(8, 16), config).quantized
    saved = save_packed(model, tmp_path / "packed", quantized=quantized or None)
    assert plan.packed_bytes == saved.total_bytes
    assert plan.stored_bytes == saved.total_dense_bytes


def test_a_model_that_needs_values_to_run_is_named(monkeypatch):
    model = without_weights(tiny_model().config)
    block = model.model.layers[0]
    block.mlp.register_forward_pre_hook(lambda module, args: args[0].sum().item() and None)
    with pytest.raises(TargetError) as caught:
        block_shapes(model, 16)
    message = str(caught.value)
    assert message.startswith("LlamaForCausalLM: its blocks cannot be run without weights (")
    assert message.endswith("), so what they cost is not known before they run.")


def test_a_gram_matrix_and_a_sweep_cost_what_the_textbook_says():
    assert gram_flops(4096, 10) == 2 * 10 * 4096 * 4096
    rows, features = 3, 7
    updates = sum(2 * rows * (features - j) for j in range(features))
    assert sweep_flops(rows, features) == pytest.approx(updates, rel=0.2)


def test_the_rate_of_this_machine_is_a_rate():
    assert 1e7 < measured_rate("cpu", torch.float32, seconds=0.0) < 1e14
