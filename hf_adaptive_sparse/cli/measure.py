"""What is measured of a model for a report: perplexity, zeros, one greedy continuation of each prompt."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Protocol

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.pytorch_utils import Conv1D

from ..hf.data import WindowDataset
from ..hf.evaluation import PerplexityResult, evaluation_mode, perplexity
from ..hf.generation import sample_texts
from ..hf.inspection import FolderReport
from ..methods.learned_masks import magnitude_one_shot
from ..patterns import NMPattern
from ..reports import MatrixRow
from .console import Progress


class HasWeight(Protocol):
    """A linear layer, or one matrix of a module that holds several."""

    @property
    def weight(self) -> Tensor: ...


def measure_perplexity(
    model: PreTrainedModel, windows: WindowDataset, name: str, batch_size: int = 8, stride: int | None = None
) -> PerplexityResult:
    """Perplexity on all of `windows`, with progress."""
    with Progress(f"perplexity of {name}", len(windows)) as progress:
        return perplexity(
            model, windows, batch_size=batch_size, stride=stride, max_windows=None,
            progress=lambda done, _: progress.update(done),
        )  # fmt: skip


def bytes_in_memory(model: nn.Module, dtype: torch.dtype | None = None) -> int:
    """Bytes of all weights, as they are or in another dtype; tied ones are counted once."""
    return sum(parameter.numel() * (dtype or parameter.dtype).itemsize for parameter in model.parameters())


def cast_weights(model: nn.Module, dtype: torch.dtype) -> None:
    """Give all weights another dtype, in place. Buffers stay: rotary frequencies are always float32."""
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)


def weight_of(module: nn.Module) -> Tensor:
    """The weight of a linear layer as [out, in]; a `Conv1D` stores it [in, out]."""
    return module.weight.T if isinstance(module, Conv1D) else module.weight


def zeros_in(modules: Mapping[str, HasWeight]) -> float:
    """Fraction of zeros over the weights of all `modules` together."""
    zeros = sum(int((module.weight == 0).sum()) for module in modules.values())
    return zeros / sum(module.weight.numel() for module in modules.values())


@torch.no_grad()
def prune_by_magnitude(modules: Mapping[str, nn.Module], pattern: NMPattern) -> None:
    """Set all but the largest weights of every group to zero, in place, and nothing else."""
    for name, module in modules.items():
        weight = weight_of(module)
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


def matrix_rows(folder: FolderReport, names: Collection[str] | None = None) -> list[MatrixRow]:
    """Rows for a report: of all matrices in a folder, or of the modules `names`."""
    return [
        MatrixRow(
            module=matrix.name.removesuffix(".weight"), shape=matrix.shape, dtype=matrix.stored_dtype,
            sparsity=matrix.sparsity, stored_bytes=matrix.nbytes,
            two_four=None if matrix.violations is None else matrix.is_two_four, violations=matrix.violations,
            first_violation=matrix.first_violation,
        )
        for matrix in folder.matrices
        if names is None or matrix.name.removesuffix(".weight") in names
    ]  # fmt: skip


def continuations(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str], tokens: int = 40
) -> list[str]:
    """A greedy continuation of each prompt, without the prompt."""
    return [
        text.removeprefix(p) for p, text in zip(prompts, sample_texts(model, tokenizer, prompts, tokens), strict=True)
    ]


def logits_of(model: PreTrainedModel, windows: WindowDataset, count: int = 2) -> Tensor:
    """Logits of the first windows, to compare two models bit by bit."""
    with evaluation_mode(model):
        return model(input_ids=windows.tokens[:count].long().to(model.device), use_cache=False).logits.cpu()
