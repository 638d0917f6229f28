"""Fused experts: what each of them reads, and what is done for those that read little."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from hf_adaptive_sparse.errors import CalibrationError
from hf_adaptive_sparse.hf import experts as experts_module
from hf_adaptive_sparse.hf.blocks import find_blocks
from hf_adaptive_sparse.hf.calibration import walk_blocks
from hf_adaptive_sparse.hf.experts import is_fused_experts, run_experts, shrink
from hf_adaptive_sparse.stats import LayerStats

from ..tiny_models import tokens
from .walked_models import MOE_CONFIGS, any_model

WINDOWS = tokens(6, 12)


def fused(model) -> dict[str, nn.Module]:
    return {name: module for name, module in model.named_modules() if is_fused_experts(module)}


@torch.no_grad()
def inputs_of_experts(model, windows=WINDOWS) -> dict[str, torch.Tensor]:
    """What every slice of every fused parameter reads: {member name: [tokens, in] float64}, token by token.

    By the name of the module itself: what all its experts together read.
    """
    found: dict[str, list[torch.Tensor]] = {}

    def keep(name):
        def hook(module, args):
            hidden, index, _ = args
            found.setdefault(name, []).extend(hidden.double())
            for token, chosen in zip(hidden, index.tolist(), strict=True):
                for expert in chosen:
                    found.setdefault(f"{name}.gate_up_proj[{expert}]", []).append(token.double())
                    weight = module.gate_up_proj[expert].t() if module.is_transposed else module.gate_up_proj[expert]
                    first = weight @ token + (module.gate_up_proj_bias[expert] if module.has_bias else 0)
                    middle = module._apply_gate(first[None])[0]
                    found.setdefault(f"{name}.down_proj[{expert}]", []).append(middle.double())

        return hook

    handles = [module.register_forward_pre_hook(keep(name)) for name, module in fused(model).items()]
    for batch in windows.split(2):
        model(input_ids=batch)
    for handle in handles:
        handle.remove()
    return {name: torch.stack(parts) for name, parts in found.items()}


def expert_groups(visit):
    return [group for group in visit.groups if group.members[0].expert is not None]


@pytest.mark.parametrize("model_type", MOE_CONFIGS)
def test_experts_run_one_by_one_compute_what_the_module_computes(model_type):
    model = any_model(model_type)
    for module in fused(model).values():
        hidden = torch.randn(20, 32)
        index = torch.stack([torch.randperm(4)[:2] for _ in range(20)])
        index[:, 0][index[:, 0] == 3], index[:, 1][index[:, 1] == 3] = 0, 1  # one expert gets nothing
        weights = torch.rand(20, 2)
        products = []
        with torch.no_grad():
            result = run_experts(module, hidden, index, weights, lambda *product, to=products: to.append(product[:2]))
            torch.testing.assert_close(result, module(hidden, index, weights), rtol=1e-5, atol=1e-6)
        assert sorted(products) == sorted(
            (name, expert) for name in ("gate_up_proj", "down_proj") for expert in range(3)
        )


@pytest.mark.parametrize("order", ["block", "group"])
@pytest.mark.parametrize("model_type", MOE_CONFIGS)
def test_an_expert_is_measured_on_the_tokens_routed_to_it(model_type, order, monkeypatch):
    monkeypatch.setattr(experts_module, "TOKENS_PER_FEATURE", 0)
    model = any_model(model_type)
    expected, seen = inputs_of_experts(model), []
    for visit in walk_blocks(model, WINDOWS, order=order, batch_size=2):
        for group in expert_groups(visit):
            (member,) = group.members
            x = expected[member.name]
            torch.testing.assert_close(group.stats.gram, (x.t() @ x).float(), rtol=1e-4, atol=1e-5)
            assert group.tokens == group.stats.tokens == len(x) and group.shrinkage == 0
            assert group.stats.where == group.name == member.name
            seen.append(member.name)
    assert sorted(seen) == sorted(name for name in expected if "[" in name) and len(seen) == 16


def test_experts_with_few_tokens_lean_on_all_tokens_of_the_layer():
    """H = H_e + tau H_shared, all per token, with tau = n0 / (n0 + n_e)."""
    model = any_model("qwen3_moe")
    x = inputs_of_experts(model)
    for visit in walk_blocks(model, WINDOWS, batch_size=2):
        for group in expert_groups(visit):
            (member,) = group.members
            own, shared = x[member.name], x[f"{visit.name}.mlp.experts"]
            assert group.tokens == group.stats.tokens == len(own)
            features = member.shape[1]
            if len(own) >= 4 * features:
                assert group.shrinkage == 0
                continue
            tau = features / (features + len(own))
            assert group.shrinkage == tau
            if member.key == "down_proj":  # of the 72 tokens 64, spread evenly
                shared = shared[[number * 72 // 64 for number in range(64)]]
                first = shared.float() @ member.module.gate_up_proj[member.expert].detach().t()
                shared = member.module._apply_gate(first).double()
            per_token = own.t() @ own / len(own) + tau * shared.t() @ shared / len(shared)
            torch.testing.assert_close(group.stats.gram / len(own), per_token.float(), rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(group.stats.squares, group.stats.gram.diagonal(), rtol=1e-5, atol=1e-5)
    assert group.shrinkage > 0


def starve(model, expert: int) -> None:
    """No token goes to this expert of any layer."""
    for module in model.modules():
        gate = getattr(module, "gate", None)
        if gate is not None and isinstance(getattr(gate, "weight", None), nn.Parameter):
            gate.register_forward_hook(lambda _, args, out: (out[0], out[1], out[2].masked_fill(out[2] == expert, 0)))


@pytest.mark.parametrize("needs", [{"squares"}, {"gram", "cross"}])
def test_an_expert_without_tokens_gets_the_statistics_of_all(needs):
    model = any_model("mixtral")
    starve(model, 2)
    expected = inputs_of_experts(model)
    assert not [name for name in expected if "[2]" in name]
    for visit in walk_blocks(model, WINDOWS, needs=needs, batch_size=2):
        groups = {group.name.removeprefix(f"{visit.name}.mlp.experts."): group for group in expert_groups(visit)}
        assert len(groups) == 8
        for name in ("gate_up_proj[2]", "down_proj[2]"):
            group = groups[name]
            assert (group.tokens, group.shrinkage, group.stats.tokens) == (0, 1.0, 72)
            assert group.stats.squares.gt(0).any() and group.stats.squares.isfinite().all()
            assert group.stats.where == group.name
            if "gram" in needs:
                assert group.stats.scaled.rung == "damping 0.01"
                torch.testing.assert_close(group.stats.cross, group.stats.gram, rtol=1e-5, atol=1e-5)
        middle = groups["gate_up_proj[2]"].stats
        torch.testing.assert_close(middle.squares, groups["gate_up_proj[0]"]._stats.squares, rtol=10, atol=10)


@pytest.mark.parametrize("order", ["block", "group"])
def test_chunks_of_experts_measure_the_same_and_are_released_one_after_another(order):
    def walk(at_once):
        found, before = {}, None
        for visit in walk_blocks(any_model("mixtral"), WINDOWS, order=order, experts_at_once=at_once, batch_size=2):
            for group in expert_groups(visit):
                found[group.name] = group.stats.gram
                if at_once == 1 and before is not None and before.name.startswith(visit.name) and order == "group":
                    with pytest.raises(CalibrationError) as error:
                        _ = before.stats
                    assert str(error.value) == (
                        f"{before.name}: its statistics were released when those of the next experts were measured; "
                        "raise `experts_at_once` to hold more."
                    )
                before = group
        return found

    whole, parts, single = walk(None), walk(3), walk(1)
    assert len(whole) == 16 and set(whole) == set(parts) == set(single)
    for name, gram in whole.items():
        assert torch.equal(gram, parts[name]) and torch.equal(gram, single[name])


def test_the_limit_of_memory_decides_how_many_experts_are_measured_together(monkeypatch):
    monkeypatch.setattr("hf_adaptive_sparse.hf.visits._EXPERT_BYTES", 2 * 4 * (32**2 + 64**2))
    walk = iter(walk_blocks(any_model("mixtral"), WINDOWS))
    names = [group.name.rpartition(".")[2] for group in expert_groups(next(walk))]
    first = ["gate_up_proj[0]", "gate_up_proj[1]", "down_proj[0]", "down_proj[1]"]
    assert names == [*first, *(name.replace("1", "3").replace("0", "2") for name in first)]


@pytest.mark.parametrize("order", ["block", "group"])
def test_the_second_projection_reads_the_pruned_first_one_in_the_order_group_alone(order, monkeypatch):
    monkeypatch.setattr(experts_module, "TOKENS_PER_FEATURE", 0)
    model, dense = any_model("mixtral"), any_model("mixtral")
    expected_dense = inputs_of_experts(dense)
    visit = None
    for visit in walk_blocks(model, WINDOWS, order=order, needs={"gram", "cross"}, batch_size=2):
        for group in expert_groups(visit):
            (member,) = group.members
            if member.key == "gate_up_proj":
                _ = group.stats
                member.set_weight(member.weight * 0.5)
            elif visit.index == 0:
                x = inputs_of_experts(model)[member.name] if order == "group" else expected_dense[member.name]
                y = expected_dense[member.name]
                torch.testing.assert_close(group.stats.gram, (x.t() @ x).float(), rtol=1e-4, atol=1e-5)
                torch.testing.assert_close(group.stats.cross, (y.t() @ x).float(), rtol=1e-4, atol=1e-5)


def test_cross_of_an_expert_is_of_the_tokens_that_the_pruned_model_routes_to_it(monkeypatch):
    monkeypatch.setattr(experts_module, "TOKENS_PER_FEATURE", 0)
    model, dense = any_model("qwen3_moe"), any_model("qwen3_moe")
    stack, dense_stack = find_blocks(model), find_blocks(dense)

    def moe_input(source):
        kept = []
        hook = lambda module, args: kept.append((args[0].double(), args[1]))  # noqa: E731
        handle = source.blocks[1].mlp.experts.register_forward_pre_hook(hook)
        owner = model if source is stack else dense
        with torch.no_grad():
            for batch in WINDOWS.split(2):
                owner(input_ids=batch)
        handle.remove()
        return torch.cat([x for x, _ in kept]), torch.cat([index for _, index in kept])

    for visit in walk_blocks(model, WINDOWS, needs={"gram", "cross"}, batch_size=2):
        if visit.index == 0:
            for member in visit.members.values():
                member.set_weight(member.weight * 0.7)
            continue
        (x, index), (y, _) = moe_input(stack), moe_input(dense_stack)
        for group in expert_groups(visit)[:4]:
            routed = (index == group.members[0].expert).any(-1)
            expected = (y[routed].t() @ x[routed]).float()
            torch.testing.assert_close(group.stats.cross, expected, rtol=1e-4, atol=1e-4)
        assert not torch.allclose(x, y, atol=1e-3)


@given(own=st.integers(1, 50), shared=st.integers(1, 50), tau=st.floats(0, 1))
@settings(max_examples=20)
def test_shrinkage_adds_means_and_keeps_the_number_of_tokens(own, shared, tau):
    draw = torch.Generator().manual_seed(own * 51 + shared)
    x, y = torch.randn(own, 3, generator=draw), torch.randn(shared, 3, generator=draw)
    one, other = (LayerStats(tokens=len(z), squares=z.square().sum(0), gram=z.t() @ z) for z in (x, y))
    merged = shrink(one, other, tau)
    assert merged.tokens == own and merged.cross is None
    torch.testing.assert_close(merged.gram / own, x.t() @ x / own + tau * y.t() @ y / shared, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(merged.squares, merged.gram.diagonal(), rtol=1e-5, atol=1e-5)
