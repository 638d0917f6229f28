"""Dynamic batch loading in any Trainer: a sampler over several domains, and the callback that moves its weights."""

from __future__ import annotations

import hashlib
import math
from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from itertools import accumulate, pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import BatchSampler, IterableDataset, Sampler
from transformers import TrainerCallback

from ..domain_weights import checked_weights, updated_weights
from ..errors import ConfigError, TrainingError
from .data import WindowDataset
from .evaluation import rows_at_once
from .loss_gradients import Loss, causal_loss

STATE_KEY = "domain_weights"  # in `stateful_callbacks` of trainer_state.json

_CHUNK = 4096  # draws whose random numbers are made together


class DomainSampler(Sampler[int]):
    """Indices into the concatenation of several datasets; which domain each comes from follows weights that change.

    Draw k takes domain i with the probability w_i that holds for k, and of that domain the next item in an order that
    is shuffled anew whenever all items were drawn. It depends on nothing but the seed, k, and the weights of draws up
    to k: not on when, where or how often the sampler is asked.

    An epoch is as many draws as there are items in all domains, and epoch e starts at draw e * len(sampler); the
    Trainer calls `set_epoch` by itself. The order of items is that of `torch.utils.data.ConcatDataset(domains)` or
    `datasets.concatenate_datasets(domains)`.

    Args:
        lengths: items of each domain, or the datasets themselves.
        weights: to begin with, any sum; default: as many as each domain has items, which is plain shuffling on average.
        seed: of domains and orders.
    Attributes:
        history: [(first draw, weights)], in order; the first entry is that of draw 0.
        drawn: one more than the last draw that was asked for.
    Raises:
        ConfigError: a domain is empty, or weights do not fit the domains.
    """

    def __init__(self, lengths: Sequence[Any], weights: Sequence[float] | None = None, seed: int = 0) -> None:
        self.lengths = [each if isinstance(each, int) else len(each) for each in lengths]
        if not self.lengths or min(self.lengths) < 1:
            raise ConfigError(f"every domain needs an item at least, got domains of {self.lengths} items.")
        first = checked_weights(self.lengths if weights is None else list(weights))
        if len(first) != len(self.lengths):
            raise ConfigError(f"there are {len(self.lengths)} domains, and {len(first)} weights.")
        self.seed, self.drawn = seed, 0
        self.history: list[tuple[int, list[float]]] = [(0, first)]
        self._epoch = 0

    @property
    def weights(self) -> list[float]:
        """That hold from the last change on."""
        return list(self.history[-1][1])

    def set_epoch(self, epoch: int) -> None:
        """Begin the next pass at draw epoch * len(self)."""
        self._epoch = epoch

    def set_weights(self, weights: Sequence[float], start: int) -> None:
        """New weights for draw `start` and all after it.

        Raises:
            ConfigError: the weights do not fit the domains, or `start` lies before an earlier change.
            TrainingError: `start` was drawn already, so that a resumed run would differ.
        """
        new = checked_weights(weights)
        if len(new) != len(self.lengths):
            raise ConfigError(f"there are {len(self.lengths)} domains, and {len(new)} weights.")
        if start < self.history[-1][0]:
            raise ConfigError(f"weights are set for draw {start}, and were for draw {self.history[-1][0]} before.")
        if start < self.drawn:
            raise TrainingError(
                f"new weights are to hold from draw {start}, and {self.drawn} were taken already: the data loader "
                "reads further ahead than its number of workers says. Set them for a later draw."
            )
        if start == self.history[-1][0]:
            self.history.pop()
        self.history.append((start, new))

    def __len__(self) -> int:
        return sum(self.lengths)

    def __iter__(self) -> Iterator[int]:
        first = self._epoch * len(self)
        counts = self._counts(first)
        offsets = [0, *accumulate(self.lengths)]
        orders: dict[int, tuple[int, Tensor]] = {}
        uniform = self._uniform(first // _CHUNK)
        for k in range(first, first + len(self)):
            self.drawn = max(self.drawn, k + 1)
            if k % _CHUNK == 0:
                uniform = self._uniform(k // _CHUNK)
            domain = bisect_right(_bounds(self._weights_at(k)), float(uniform[k % _CHUNK]))
            number, place = divmod(counts[domain], self.lengths[domain])
            if domain not in orders or orders[domain][0] != number:
                orders[domain] = number, self._order(domain, number)
            counts[domain] += 1
            yield offsets[domain] + int(orders[domain][1][place])

    def state_dict(self) -> dict[str, Any]:
        """Of numbers, strings and lists alone, so that it may be written as JSON."""
        history = [[start, list(weights)] for start, weights in self.history]
        return {"seed": self.seed, "lengths": list(self.lengths), "history": history}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over the weights of an earlier run.

        Raises:
            ConfigError: that run had other domains or another seed.
        """
        for name in ("seed", "lengths"):
            if state[name] != getattr(self, name):
                raise ConfigError(
                    f"the run to go on with had {name}={state[name]}, and this sampler has {getattr(self, name)}. "
                    "Resume with the data and the seed that it was started with."
                )
        self.history = [(start, list(weights)) for start, weights in state["history"]]
        self.drawn = 0

    def _weights_at(self, k: int) -> list[float]:
        return next(weights for start, weights in reversed(self.history) if start <= k)

    def _counts(self, end: int) -> list[int]:
        """How often each domain was taken in the first `end` draws."""
        counts = torch.zeros(len(self.lengths), dtype=torch.int64)
        changes = {start for start, _ in self.history if start < end}
        # Neither a chunk of random numbers nor a change of the weights lies inside a piece.
        for start, stop in pairwise(sorted({*range(0, end, _CHUNK), *changes, end})):
            uniform = self._uniform(start // _CHUNK)[start % _CHUNK :][: stop - start]
            bounds = torch.tensor(_bounds(self._weights_at(start)), dtype=torch.float64)
            counts += torch.bincount(torch.searchsorted(bounds, uniform, right=True), minlength=len(counts))
        return counts.tolist()

    def _uniform(self, chunk: int) -> Tensor:
        return torch.rand(_CHUNK, dtype=torch.float64, generator=self._generator("draws", chunk))

    def _order(self, domain: int, number: int) -> Tensor:
        return torch.randperm(self.lengths[domain], generator=self._generator(f"domain {domain}", number))

    def _generator(self, purpose: str, number: int) -> torch.Generator:
        # Seeds that lie close together give streams that are alike at first; a digest spreads them.
        digest = hashlib.sha256(f"{self.seed}/{purpose}/{number}".encode()).digest()
        return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)


class DomainWeightsCallback(TrainerCallback):
    """Gives a Trainer its DomainSampler, and moves the weights by the losses of the domains every few steps.

    `sampler = DomainSampler(domains)`, then `Trainer(train_dataset=ConcatDataset(domains),
    callbacks=[DomainWeightsCallback(sampler, held_out, references)], ...)`. New weights hold from the first draw that
    no data loader can have read ahead: `1 + workers * prefetch_factor` batches after the step. They are part of
    trainer_state.json in every checkpoint, so a resumed run draws what an uninterrupted one does.

    Args:
        sampler: over the domains of the training data.
        held_out: of each domain a few windows of tokens that are not trained on.
        references: loss of each domain in nats per token that the model should reach, see `domain_losses`.
        every: optimizer steps between two changes; the paper has 50 while pruning and 400 in training after it.
        rate, floor, clip_gap: see `domain_weights.updated_weights`.
        batch_size: windows in a forward pass.
        loss: for a model that is no causal language model.
    Attributes:
        history: [{"step", "losses", "weights"}] of every change.
    Raises:
        ConfigError: domains, windows and references are not equally many, or a setting is out of range.
    """

    def __init__(
        self,
        sampler: DomainSampler,
        held_out: Sequence[WindowDataset | Tensor],
        references: Sequence[float],
        *,
        every: int = 50,
        rate: float = 1.0,
        floor: float = 1e-4,
        clip_gap: bool = True,
        batch_size: int = 8,
        loss: Loss = causal_loss,
    ) -> None:
        if len(held_out) != len(sampler.lengths):
            raise ConfigError(f"there are {len(sampler.lengths)} domains, and held-out windows of {len(held_out)}.")
        if every < 1:
            raise ConfigError(f"every is a number of optimizer steps >= 1, got {every}.")
        self.sampler, self.held_out, self.references = sampler, list(held_out), list(references)
        self.every, self.batch_size, self.loss = every, batch_size, loss
        self._rule = {"rate": rate, "floor": floor, "clip_gap": clip_gap}
        self.history: list[dict[str, Any]] = []
        updated_weights(sampler.weights, self.references, self.references, **self._rule)  # raises if one does not fit
        self._first = sampler.state_dict()

    def on_train_begin(self, args, state, control, train_dataloader=None, **kwargs) -> None:
        """Put the sampler into the Trainer's data loader, with the weights of the checkpoint if there is one."""
        _install(train_dataloader, self.sampler)
        saved = state.stateful_callbacks.get(STATE_KEY)
        if state.global_step and saved is None:
            raise TrainingError(
                f"the checkpoint of step {state.global_step} was written by a run without DomainWeightsCallback, so "
                "what that run would draw next is not known. Start from its weights as a new run."
            )
        self.sampler.load_state_dict(self._first if saved is None else saved["sampler"])
        self.history = [] if saved is None else list(saved["history"])
        self._ahead = 1 + args.dataloader_num_workers * (args.dataloader_prefetch_factor or 2)
        self._batches, self._batch_items = len(train_dataloader), train_dataloader.total_batch_size
        self._save(state)

    def on_step_end(self, args, state, control, model=None, **kwargs) -> None:
        """Every `every` steps: losses of all domains, then new weights."""
        if state.global_step % self.every or state.global_step >= state.max_steps:
            return
        losses = domain_losses(model, self.held_out, batch_size=self.batch_size, loss=self.loss)
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.broadcast_object_list(losses, src=0)  # to the last bit, or processes would draw apart
        for domain, value in enumerate(losses):
            if not math.isfinite(value):
                raise TrainingError(f"step {state.global_step}: the held-out loss of domain {domain} is {value}.")
        weights = updated_weights(self.sampler.weights, losses, self.references, **self._rule)
        self.sampler.set_weights(weights, self._next_draw(args, state.global_step))
        self.history.append({"step": state.global_step, "losses": losses, "weights": weights})
        self._save(state)

    def _next_draw(self, args, step: int) -> int:
        """The first draw that no process can have read when `step` is done."""
        per_epoch = math.ceil(self._batches / args.gradient_accumulation_steps)
        epoch, inside = divmod(step, per_epoch)
        taken = (inside * args.gradient_accumulation_steps + self._ahead) * self._batch_items
        return epoch * len(self.sampler) + min(taken, len(self.sampler))

    def _save(self, state) -> None:
        state.stateful_callbacks[STATE_KEY] = {"sampler": self.sampler.state_dict(), "history": list(self.history)}


@torch.no_grad()
def domain_losses(
    model: nn.Module,
    held_out: Sequence[WindowDataset | Tensor],
    *,
    batch_size: int = 8,
    loss: Loss = causal_loss,
) -> list[float]:
    """Mean loss per token of every domain, in nats, dropout off: also a way to references, with the dense model.

    Args:
        held_out: of each domain [windows, length] tokens, without padding.
        batch_size: windows in a forward pass, at most.
    """
    training = {module: module.training for module in model.modules()}
    model.eval()
    try:
        return [_mean_loss(model, windows, batch_size, loss) for windows in held_out]
    finally:
        for module, was in training.items():
            module.training = was


def _mean_loss(model: nn.Module, windows: WindowDataset | Tensor, batch_size: int, loss: Loss) -> float:
    tokens = windows.tokens if isinstance(windows, WindowDataset) else windows
    total, count = 0.0, 0
    for batch in tokens.split(rows_at_once(model, batch_size, tokens.shape[1])):
        part, number = loss(model, batch.long().to(model.device))
        total, count = total + part.item(), count + number
    return total / count


def _install(loader: Any, sampler: DomainSampler) -> None:
    """Make the Trainer's data loader draw by `sampler`."""
    inner = getattr(loader, "batch_sampler", None)
    while hasattr(inner, "batch_sampler"):  # that of accelerate, which gives each process its part
        inner = inner.batch_sampler
    if type(inner) is not BatchSampler or isinstance(loader.dataset, IterableDataset):
        raise ConfigError(
            f"the data loader of a {type(loader.dataset).__name__} has no sampler to replace. Give the Trainer a "
            "train_dataset with a length, such as ConcatDataset(domains), and leave train_sampling_strategy at "
            "'random'."
        )
    found = len(inner.sampler)
    if found != len(sampler):
        raise ConfigError(
            f"the training data has {found} items, and the domains of the sampler have {len(sampler)} together. Use "
            "ConcatDataset(domains), of the same domains, as train_dataset."
        )
    loader.set_sampler(sampler)


def _bounds(weights: Sequence[float]) -> list[float]:
    """Where in [0, 1) one domain ends and the next begins."""
    return list(accumulate(weights[:-1]))
