"""What is measured of a model for a report: perplexity, zeros, one greedy continuation of each prompt."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.pytorch_utils import Conv1D

from ..hf.data import WindowDataset
from ..hf.evaluation import PerplexityResult, evaluation_mode, perplexity
from ..methods.learned_masks import magnitude_one_shot
from ..patterns import NMPattern
from .console import Progress


def measure_perplexity(
    model: PreTrainedModel, windows: WindowDataset, name: str, batch_size: int = 8, stride: int | None = None
) -> PerplexityResult:
    """Perplexity on all of `windows`, with progress."""
    with Progress(f"perplexity of {name}", len(windows)) as progress:
        return perplexity(
            model, windows, batch_size=batch_size, stride=stride, max_windows=None,
            progress=lambda done, _: progress.update(done),
        )  # fmt: skip


def bytes_in_memory(model: nn.Module) -> int:
    """Bytes of all weights; tied ones are counted once."""
    return sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())


def zeros_in(modules: Mapping[str, nn.Module]) -> float:
    """Fraction of zeros over the weights of all `modules` together."""
    zeros = sum(int((module.weight == 0).sum()) for module in modules.values())
    return zeros / sum(module.weight.numel() for module in modules.values())


@torch.no_grad()
def prune_by_magnitude(modules: Mapping[str, nn.Module], pattern: NMPattern) -> None:
    """Set all but the largest weights of every group to zero, in place, and nothing else."""
    for name, module in modules.items():
        weight = module.weight.T if isinstance(module, Conv1D) else module.weight
        pattern.check_in_features(weight.shape, name)
        weight.copy_(magnitude_one_shot(weight, pattern))


@contextmanager
def pruned_by_magnitude(modules: Mapping[str, nn.Module], pattern: NMPattern) -> Iterator[None]:
    """`prune_by_magnitude` inside the block; the weights are as before after it."""
    before = {name: module.weight.detach().clone() for name, module in modules.items()}
    try:
        prune_by_magnitude(modules, pattern)
        yield
    finally:
        with torch.no_grad():
            for name, module in modules.items():
                module.weight.copy_(before[name])


def continuations(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str], tokens: int = 40
) -> list[str]:
    """A greedy continuation of each prompt, without the prompt."""
    texts = []
    with evaluation_mode(model):
        for prompt in prompts:
            encoded = tokenizer(prompt, return_tensors="pt", return_token_type_ids=False).to(model.device)
            found = model.generate(
                **encoded, max_new_tokens=tokens, do_sample=False, num_beams=1,
                pad_token_id=tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0,
            )  # fmt: skip
            texts.append(
                tokenizer.decode(found[0, encoded["input_ids"].shape[1] :], skip_special_tokens=True)
            )
    return texts


def logits_of(model: PreTrainedModel, windows: WindowDataset, count: int = 2) -> Tensor:
    """Logits of the first windows, to compare two models bit by bit."""
    with evaluation_mode(model):
        return model(input_ids=windows.tokens[:count].long().to(model.device), use_cache=False).logits.cpu()
