"""What a report says about a model: one-shot pruning is undone, zeros are counted, texts are continued."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.pytorch_utils import Conv1D

from hf_adaptive_sparse.cli.console import Progress, print_models
from hf_adaptive_sparse.cli.measure import (
    bytes_in_memory,
    cast_weights,
    continuations,
    prune_by_magnitude,
    pruned_by_magnitude,
    zeros_in,
)
from hf_adaptive_sparse.cli.text import RunText, opening_words
from hf_adaptive_sparse.errors import PatternError
from hf_adaptive_sparse.hf.data import WindowDataset
from hf_adaptive_sparse.patterns import NMPattern
from hf_adaptive_sparse.reports import ModelRow

TWO_FOUR = NMPattern(2, 4)


def test_groups_run_along_the_inputs_of_both_kinds_of_linear():
    linear, conv = nn.Linear(8, 3), Conv1D(3, 8)
    with torch.no_grad():
        conv.weight.copy_(linear.weight.T)
    prune_by_magnitude({"a": linear, "b": conv}, TWO_FOUR)
    assert torch.equal(linear.weight, conv.weight.T)
    assert TWO_FOUR.first_violation(linear.weight) is None
    assert zeros_in({"a": linear, "b": conv}) == 0.5


def test_a_model_is_pruned_inside_the_block_only_also_after_an_error():
    linear = nn.Linear(8, 3)
    before = linear.weight.detach().clone()
    with pytest.raises(ZeroDivisionError), pruned_by_magnitude({"a": linear}, TWO_FOUR):
        assert zeros_in({"a": linear}) == 0.5
        raise ZeroDivisionError
    assert torch.equal(linear.weight, before)


def test_a_linear_that_does_not_fit_the_pattern_is_named():
    with pytest.raises(PatternError) as caught:
        prune_by_magnitude({"block.up": nn.Linear(6, 3)}, TWO_FOUR)
    assert str(caught.value) == (
        "block.up: 2:4 needs the input features to be a multiple of 4, got 6 in a [3, 6] weight. Add the layer to "
        "`exclude_modules`, or pad it."
    )


def test_casting_weights_leaves_rotary_frequencies_alone(tiny_llama_folder):
    model = AutoModelForCausalLM.from_pretrained(tiny_llama_folder)
    frequencies = model.model.rotary_emb.inv_freq.clone()
    assert bytes_in_memory(model) == 2 * bytes_in_memory(model, torch.bfloat16) == 4 * 26_912
    cast_weights(model, torch.bfloat16)
    assert model.dtype == torch.bfloat16
    assert torch.equal(model.model.rotary_emb.inv_freq, frequencies)
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_a_continuation_is_greedy_and_without_its_prompt(tiny_llama_folder, tiny_tokenizer):
    model = AutoModelForCausalLM.from_pretrained(tiny_llama_folder).eval()
    ids = tiny_tokenizer("the cat", return_tensors="pt")["input_ids"]
    expected = []
    for _ in range(5):
        token = int(model(ids).logits[0, -1].argmax())
        expected.append(token)
        ids = torch.cat([ids, torch.tensor([[token]])], dim=1)
    assert continuations(model, tiny_tokenizer, ["the cat"], tokens=5) == [
        tiny_tokenizer.decode(expected, skip_special_tokens=True)
    ]


def test_prompts_are_how_documents_begin(tiny_llama_folder):
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama_folder)
    ids = tokenizer("xx")["input_ids"][1:]
    for story in ("Once upon a time", "Lily saw a ball", "Lily saw a ball again", "Third of them all"):
        ids += tokenizer(story)["input_ids"]
    windows = WindowDataset(torch.tensor(ids[:75]).view(5, 15))
    assert opening_words(RunText(windows, windows, {}), tokenizer, length=12) == [
        "Once upon a", "Lily saw a", "Third of th"
    ]  # fmt: skip


def test_long_names_are_not_cut_where_no_terminal_is(capsys):
    print_models([ModelRow(name="n" * 150, perplexity=2.0)])
    out = capsys.readouterr().out
    assert "n" * 150 in out and "2.000" in out and "tokens" not in out


def test_progress_says_nothing_about_a_short_phase_and_something_about_a_long_one(capsys, monkeypatch):
    with Progress("phase", 3) as progress:
        progress.update(1)
        now = progress.said + 6.0
        monkeypatch.setattr("time.monotonic", lambda: now)
        progress.update(2, "loss 1.5")
        progress.update(3)
    captured = capsys.readouterr()
    assert (captured.out, captured.err) == ("", "phase: 2 of 3, loss 1.5\n")
