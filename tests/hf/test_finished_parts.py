"""Parts of a block that are not run again: results are those of running everything, for fewer operations."""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from hf_adaptive_sparse.errors import ConfigError
from hf_adaptive_sparse.hf import measuring, visits
from hf_adaptive_sparse.hf.calibration import walk_blocks

from ..tiny_models import tiny_model, tokens
from .walked_models import ALL, any_model

WINDOWS = tokens(5, 12)


def walk(model, kept_bytes, needs=("gram",), **options):
    """What a walk measures and leaves behind, while every group is changed after it was measured."""
    found = {}
    windows = walk_blocks(model, WINDOWS, needs=needs, order="group", batch_size=2, kept_bytes=kept_bytes, **options)
    for visit in windows:
        for group in visit.groups:
            found[group.name] = group.stats.gram.clone()
            for member in group.members:
                member.set_weight(member.weight * torch.linspace(0.0, 2.0, member.shape[1]))
    return found, windows.state


@pytest.mark.parametrize("needs", [("gram",), ("gram", "cross")], ids=["gram", "cross"])
@pytest.mark.parametrize("model_type", ALL)
def test_what_is_kept_changes_no_bit_of_what_is_measured(model_type, needs):
    kept, state = walk(any_model(model_type), 2**30, needs)
    again, expected = walk(any_model(model_type), 0, needs)
    assert kept.keys() == again.keys() and all(torch.equal(kept[name], again[name]) for name in kept)
    assert torch.equal(state.hidden, expected.hidden)
    assert expected.dense is None or torch.equal(state.dense, expected.dense)


def test_a_walk_by_groups_runs_every_layer_once():
    with FlopCounterMode(display=False) as once:
        for _ in walk_blocks(tiny_model(), WINDOWS, needs=(), batch_size=2):
            pass
    counts = []
    for kept_bytes in (2**30, 0):
        with FlopCounterMode(display=False) as counter:
            for visit in walk_blocks(tiny_model(), WINDOWS, order="group", batch_size=2, kept_bytes=kept_bytes):
                for group in visit.groups:
                    assert group.stats.tokens == 60
        counts.append(counter.get_total_flops())
    assert counts[0] == once.get_total_flops() < 0.5 * counts[1]


def test_inputs_that_a_later_change_before_them_made_wrong_are_not_used():
    results = []
    for kept_bytes in (2**30, 0):
        model, measured = tiny_model(), []
        for visit in walk_blocks(model, WINDOWS, order="group", batch_size=2, kept_bytes=kept_bytes):
            for group in visit.groups:
                measured.append(group.stats.gram.clone())
                first = next(iter(visit.members.values()))
                first.set_weight(first.weight * 0.5)  # of the queries, after the output projection was measured too
        results.append(measured)
    assert all(torch.equal(one, other) for one, other in zip(*results, strict=True))


def test_parts_are_the_largest_modules_that_return_what_a_linear_layer_returned(monkeypatch):
    found = []

    def find(*args):
        found.append(measuring.find_sites(*args))
        return found[-1]

    monkeypatch.setattr(visits, "find_sites", find)

    def parts(model_type, **options):
        found.clear()
        next(iter(walk_blocks(any_model(model_type, **options), WINDOWS, needs=())))
        return [(site.part.path, site.part.last) for site in found[0] if site.part is not None]

    assert parts("llama") == [("self_attn", "self_attn.o_proj"), ("mlp", "mlp.down_proj")]
    assert parts("opt") == [("self_attn", "self_attn.out_proj")]  # its MLP is no module
    assert parts("bloom") == []  # which adds the residual inside
    assert parts("llama", attn_implementation="eager") == [("mlp", "mlp.down_proj")]  # also returns its weights


def test_a_negative_number_of_bytes_is_an_error():
    with pytest.raises(ConfigError) as raised:
        walk_blocks(tiny_model(), WINDOWS, kept_bytes=-1)
    assert str(raised.value) == "kept_bytes is a number of bytes >= 0, got -1. 0 keeps nothing."
