"""Dynamic batch loading: what is drawn depends on seed, place and weights alone, also across a killed run."""

from __future__ import annotations

import json
import math
from itertools import islice

import pytest
import torch
from accelerate.data_loader import BatchSamplerShard
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import BatchSampler, ConcatDataset, DataLoader, IterableDataset
from transformers import Trainer, TrainerCallback

from hf_adaptive_sparse.domain_weights import updated_weights
from hf_adaptive_sparse.errors import ConfigError, TrainingError
from hf_adaptive_sparse.hf.data import WindowDataset
from hf_adaptive_sparse.hf.domain_sampler import DomainSampler, DomainWeightsCallback, domain_losses
from hf_adaptive_sparse.hf.loss_gradients import causal_loss

from ..tiny_models import tiny_model, tokens
from .runs import LLAMA, arguments


def passes(sampler, count):
    """The draws of the first epochs, one after another."""
    found = []
    for epoch in range(count):
        sampler.set_epoch(epoch)
        found += list(sampler)
    return found


def domain_numbers(draws, lengths):
    """(domain, item in it) of every draw."""
    found = []
    for draw in draws:
        domain = 0
        while draw >= lengths[domain]:
            draw -= lengths[domain]
            domain += 1
        found.append((domain, draw))
    return found


@settings(max_examples=25)
@given(
    st.lists(st.integers(1, 9), min_size=1, max_size=4), st.integers(0, 1000), st.lists(st.integers(0, 60), max_size=4)
)
def test_a_domain_gives_all_of_its_items_before_one_comes_again(lengths, seed, changes):
    sampler = DomainSampler(lengths, seed=seed)
    for number, start in enumerate(sorted(changes)):
        sampler.set_weights([1 + (domain + number) % 3 for domain in range(len(lengths))], start)
    drawn = domain_numbers(passes(sampler, 4), lengths)
    for domain, length in enumerate(lengths):
        items = [item for which, item in drawn if which == domain]
        for start in range(0, len(items), length):
            part = items[start : start + length]
            assert len(set(part)) == len(part)


@settings(max_examples=25)
@given(st.integers(0, 1000), st.integers(1, 59), st.integers(0, 3))
def test_draws_do_not_depend_on_when_weights_are_set_or_where_one_begins(seed, start, epoch):
    lengths, new = [7, 5, 8], [1.0, 6.0, 2.0]
    early = DomainSampler(lengths, seed=seed)
    early.set_weights(new, start)
    expected = passes(early, 4)
    late, found = DomainSampler(lengths, seed=seed), []
    for number in range(4):
        late.set_epoch(number)
        for place, draw in enumerate(late, start=number * 20 + 1):
            found.append(draw)
            if place == start:
                late.set_weights(new, start)
    assert found == expected
    other = DomainSampler(lengths, seed=seed + 1)  # begins with that epoch, from a state that went through a file
    other.seed = seed
    other.load_state_dict(json.loads(json.dumps(late.state_dict())))
    other.set_epoch(epoch)
    assert list(other) == expected[20 * epoch : 20 * epoch + 20]


def test_long_runs_keep_count_over_many_chunks_of_random_numbers():
    lengths = [4000, 3000]
    sampler = DomainSampler(lengths, weights=[1, 1], seed=1)
    sampler.set_weights([9, 1], 5000)
    draws = passes(sampler, 2)
    domains = [domain for domain, _ in domain_numbers(draws, lengths)]
    assert sum(domains[:5000]) / 5000 == pytest.approx(0.5, abs=0.02)
    assert sum(domains[5000:]) / 9000 == pytest.approx(0.1, abs=0.01)
    items = [item for item, domain in zip(draws, domains, strict=True) if domain == 1]
    assert len(set(items[:3000])) == 3000  # over the end of an epoch
    assert draws != passes(DomainSampler(lengths, weights=[1, 1], seed=2), 2)


def test_by_default_domains_are_drawn_by_their_size():
    assert DomainSampler([30, 10]).weights == [0.75, 0.25]
    assert DomainSampler([list(range(30)), list(range(10))]).lengths == [30, 10]


@pytest.mark.parametrize("processes", [2, 3])
def test_processes_share_the_draws_of_one(processes):
    lengths = [11, 7, 6]
    expected = list(DomainSampler(lengths, seed=4))
    parts = []
    for rank in range(processes):
        batches = BatchSampler(DomainSampler(lengths, seed=4), batch_size=2, drop_last=False)
        parts.append(list(BatchSamplerShard(batches, processes, rank)))
    assert [draw for group in zip(*parts, strict=True) for batch in group for draw in batch] == expected


# -- with a Trainer ---------------------------------------------------------------------------------------------------

LENGTHS = [10, 6, 4]  # 20 items: 10 batches of 2, so 5 steps of 2 batches in an epoch
ROWS = tokens(sum(LENGTHS) + 6, 8, seed=3).int()
DOMAINS = [WindowDataset(part) for part in ROWS[:20].split(LENGTHS)]
HELD_OUT = [WindowDataset(part) for part in ROWS[20:].split(2)]
REFERENCES = [4.5, 4.0, 3.5]
STEPS = 13


class Killed(Exception):
    """Ends a run in the middle."""


class KillAfter(TrainerCallback):
    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            raise Killed


def run(folder, kill=None, resume=None, data=None, callback=None, **changes):
    """(what was trained on, batch after batch, the callback)."""
    model = tiny_model("llama", **LLAMA)
    seen = []

    def remember(module, args, kwargs):
        if module.training:
            seen.append(kwargs["input_ids"].tolist())

    model.register_forward_pre_hook(remember, with_kwargs=True)
    if callback is None:
        callback = DomainWeightsCallback(DomainSampler(DOMAINS, seed=5), HELD_OUT, REFERENCES, every=2)
    settings_of_run = {"max_steps": STEPS, "gradient_accumulation_steps": 2, "save_strategy": "steps", "save_steps": 4}
    trainer = Trainer(
        model=model,
        args=arguments(folder, **{**settings_of_run, **changes}),
        train_dataset=ConcatDataset(DOMAINS) if data is None else data,
        callbacks=[callback, *([KillAfter(kill)] if kill else [])],
    )
    try:
        trainer.train(resume_from_checkpoint=resume)
    except Killed:
        pass
    return seen, callback


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    return folder, *run(folder)


def test_a_run_draws_by_its_weights_and_moves_them_by_the_losses(whole):
    folder, seen, callback = whole
    assert [change["step"] for change in callback.history] == [2, 4, 6, 8, 10, 12]
    weights = [0.5, 0.3, 0.2]
    for change in callback.history:
        weights = updated_weights(weights, change["losses"], REFERENCES)
        assert change["weights"] == pytest.approx(weights)
    # One batch is read ahead: after step 2, of 4 batches of 2, the first draw that can follow is 10. At the end of an
    # epoch nothing is.
    assert [start for start, _ in callback.sampler.history] == [0, 10, 18, 26, 34, 42, 50]
    draws = passes(callback.sampler, 3)
    assert seen == [ROWS[draws[start : start + 2]].tolist() for start in range(0, 2 * 2 * STEPS, 2)]
    saved = json.loads((folder / "checkpoint-8" / "trainer_state.json").read_text())["stateful_callbacks"]
    assert saved["domain_weights"] == {
        "sampler": {
            "seed": 5,
            "lengths": LENGTHS,
            "history": [list(each) for each in callback.sampler.history[:5]],
        },
        "history": callback.history[:4],
    }


@pytest.mark.parametrize("kill, checkpoint", [(6, 4), (9, 8), (13, 12)])
def test_a_killed_run_goes_on_with_the_draws_of_an_uninterrupted_one(whole, tmp_path, kill, checkpoint):
    _, expected, callback = whole
    before, _ = run(tmp_path, kill=kill)
    after, resumed = run(tmp_path, resume=str(tmp_path / f"checkpoint-{checkpoint}"))
    assert before == expected[: 2 * kill]
    assert after == expected[2 * checkpoint :]
    assert resumed.history == callback.history
    assert resumed.sampler.history == callback.sampler.history


def test_a_callback_that_is_used_again_starts_again(whole, tmp_path):
    _, expected, callback = whole
    again, _ = run(tmp_path, callback=callback, save_strategy="no")
    assert again == expected


def test_workers_that_read_ahead_do_not_change_what_is_drawn_when(tmp_path):
    seen, callback = run(tmp_path, dataloader_num_workers=1, save_strategy="no", max_steps=6)
    assert [start for start, _ in callback.sampler.history] == [0, 14, 20]  # two batches more are read ahead
    draws = passes(callback.sampler, 2)
    assert seen == [ROWS[draws[start : start + 2]].tolist() for start in range(0, 24, 2)]


def test_losses_of_domains_are_means_per_token_without_dropout():
    model = tiny_model("llama", **LLAMA, attention_dropout=0.5).train()
    found = domain_losses(model, HELD_OUT, batch_size=1)
    assert all(module.training for module in model.modules())
    model.eval()
    for value, windows in zip(found, HELD_OUT, strict=True):
        with torch.no_grad():
            total, count = causal_loss(model, windows.tokens.long())
        assert value == pytest.approx(float(total) / count, rel=1e-5)


def test_a_checkpoint_without_weights_or_of_other_data_is_refused(whole, tmp_path):
    folder = whole[0] / "checkpoint-8"
    other = DomainWeightsCallback(DomainSampler(DOMAINS, seed=6), HELD_OUT, REFERENCES)
    with pytest.raises(ConfigError) as wrong:
        run(tmp_path, resume=str(folder), callback=other)
    assert str(wrong.value) == (
        "the run to go on with had seed=5, and this sampler has 6. Resume with the data and the seed that it was "
        "started with."
    )
    model = tiny_model("llama", **LLAMA)
    args = arguments(tmp_path, max_steps=2, save_strategy="steps", save_steps=1)
    Trainer(model=model, args=args, train_dataset=ConcatDataset(DOMAINS)).train()
    with pytest.raises(TrainingError) as none:
        run(tmp_path, resume=str(tmp_path / "checkpoint-1"))
    assert str(none.value) == (
        "the checkpoint of step 1 was written by a run without DomainWeightsCallback, so what that run would draw next "
        "is not known. Start from its weights as a new run."
    )


class Stream(IterableDataset):
    def __iter__(self):
        return iter(DOMAINS[0])


def test_data_that_the_sampler_does_not_know_is_refused(tmp_path):
    with pytest.raises(ConfigError) as short:
        run(tmp_path, data=ConcatDataset(DOMAINS[:2]))
    assert str(short.value) == (
        "the training data has 16 items, and the domains of the sampler have 20 together. Use ConcatDataset(domains), "
        "of the same domains, as train_dataset."
    )
    with pytest.raises(ConfigError) as stream:
        run(tmp_path, data=Stream())
    assert str(stream.value) == (
        "the data loader of a Stream has no sampler to replace. Give the Trainer a train_dataset with a length, such "
        "as ConcatDataset(domains), and leave train_sampling_strategy at 'random'."
    )


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path):
    broken = DomainWeightsCallback(
        DomainSampler(DOMAINS), HELD_OUT, REFERENCES, every=1, loss=lambda model, batch: (torch.tensor(math.inf), 1)
    )
    with pytest.raises(TrainingError) as error:
        run(tmp_path, callback=broken)
    assert str(error.value) == "step 1: the held-out loss of domain 0 is inf."


def test_a_sampler_also_serves_a_plain_data_loader():
    sampler = DomainSampler(DOMAINS, seed=5)
    loader = DataLoader(ConcatDataset(DOMAINS), batch_size=4, sampler=sampler)
    found = [batch["input_ids"] for batch in islice(loader, 2)]
    draws = list(islice(DomainSampler(DOMAINS, seed=5), 8))
    assert torch.equal(torch.cat(found), ROWS[draws].long())


@pytest.mark.parametrize(
    "build, message",
    [
        (lambda: DomainSampler([3, 0]), "every domain needs an item at least, got domains of [3, 0] items."),
        (lambda: DomainSampler([3, 2], weights=[1.0]), "there are 2 domains, and 1 weights."),
        (lambda: DomainSampler([3, 2]).set_weights([1.0], 9), "there are 2 domains, and 1 weights."),
        (
            lambda: DomainWeightsCallback(DomainSampler([3, 2]), HELD_OUT, REFERENCES),
            "there are 2 domains, and held-out windows of 3.",
        ),
        (
            lambda: DomainWeightsCallback(DomainSampler([3, 2]), HELD_OUT[:2], REFERENCES),
            "2 domains have weights, but losses has 3 entries.",
        ),
        (
            lambda: DomainWeightsCallback(DomainSampler([3, 2]), HELD_OUT[:2], REFERENCES[:2], every=0),
            "every is a number of optimizer steps >= 1, got 0.",
        ),
    ],
)
def test_what_does_not_fit_the_domains_is_refused(build, message):
    with pytest.raises(ConfigError) as error:
        build()
    assert str(error.value) == message


def test_weights_do_not_reach_back():
    sampler = DomainSampler([3, 2])
    list(islice(sampler, 4))
    with pytest.raises(TrainingError) as drawn:
        sampler.set_weights([1, 1], 3)
    assert str(drawn.value) == (
        "new weights are to hold from draw 3, and 4 were taken already: the data loader reads further ahead than its "
        "number of workers says. Set them for a later draw."
    )
    sampler.set_weights([1, 1], 6)
    with pytest.raises(ConfigError) as before:
        sampler.set_weights([1, 1], 5)
    assert str(before.value) == "weights are set for draw 5, and were for draw 6 before."
