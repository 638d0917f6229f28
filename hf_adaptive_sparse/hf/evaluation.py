"""Perplexity: token-weighted over a whole text, of a model in memory or on disk.

The `perplexity` script of `evaluate` averages the perplexities of single texts, which is a different number,
and takes no model in memory. Here the loss is averaged over all predictions first.
"""

from __future__ import annotations

import difflib
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import datasets
import evaluate
import torch
from torch import Tensor
from torch.nn import functional
from transformers import AutoModelForCausalLM, AutoTokenizer

from ..errors import ConfigError, DataError, TrainingError
from .data import WindowDataset, eval_protocol, token_windows

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

# Elements. A forward pass takes fewer windows than `batch_size` if its logits would be larger than the first
# (2 GiB in float32); they become float32 in pieces no larger than the second (64 MiB).
_LOGITS_AT_ONCE = 2**29
_FLOAT32_AT_ONCE = 2**24
_IGNORED = -100  # a target that cross_entropy leaves out

_CITATION = """\
Jelinek, Mercer, Bahl, Baker: Perplexity, a measure of the difficulty of speech recognition tasks.
Journal of the Acoustical Society of America 62 (S1), 1977."""

_INPUTS = """\
texts: list of strings. Each is stripped, put between `prefix` and `suffix`, and encoded by itself.
model, tokenizer: in memory; or model_id: a local folder or a Hub id.
length: tokens in a window. Default: what `eval_protocol.json` in the folder `model_id` says, or 256.
prefix, suffix: likewise, or empty.
stride: None for windows that do not overlap, or by how many tokens they slide.
batch_size: windows in a forward pass, at most. max_windows: how many to use; None for all.
Returns nll, perplexity, bits_per_byte, tokens, predictions and seconds, in a dict."""


@dataclass(frozen=True)
class PerplexityResult:
    """What one evaluation measured.

    Attributes:
        nll: mean negative log-likelihood of a prediction, in nats.
        perplexity: exp(nll).
        tokens: tokens of the text that was evaluated.
        predictions: tokens that were predicted: one fewer than the tokens of every window, or of the text.
        seconds: wall-clock time.
        bits_per_byte: nll / ln 2 x tokens per UTF-8 byte of the text, the one of these numbers which compares
            models with different tokenizers; None if the windows do not know their bytes.
    """

    nll: float
    perplexity: float
    tokens: int
    predictions: int
    seconds: float
    bits_per_byte: float | None = None


def perplexity(
    model: PreTrainedModel,
    windows: WindowDataset | Tensor,
    *,
    batch_size: int = 8,
    stride: int | None = None,
    max_windows: int | None = 400,
    progress: Callable[[int, int], None] | None = None,
) -> PerplexityResult:
    """Perplexity of a causal language model, in evaluation mode and the model's own dtype.

    Args:
        model: any `transformers` causal language model, also inside a PeftModel.
        windows: [windows, length] tokens, as `token_windows` makes them.
        batch_size: windows in a forward pass, at most; fewer if their logits would pass 2 GiB.
        stride: None: the windows as they are; the first token of each is context only. From 1 to length - 1:
            the windows' tokens as one stream, over which a window slides by `stride` tokens, so that every
            token but the first is predicted once, from at least length - stride tokens before it.
        max_windows: how many of the windows to use, from the first; None for all.
        progress: called after every forward pass with (windows done, windows in all).
    Raises:
        DataError: there are no windows, or the model has no position or no embedding for some token.
        ConfigError: a stride or batch size out of range.
        TrainingError: the loss of a batch is not finite.
    """
    started = time.perf_counter()
    tokens = windows.tokens if isinstance(windows, WindowDataset) else windows
    if max_windows is not None and max_windows < 1:
        raise ConfigError(f"max_windows is a number of windows, at least 1, or None; got {max_windows}.")
    tokens = tokens[:max_windows]
    _check(model, tokens, batch_size, stride)
    length = tokens.shape[1]
    starts, scored = _slide(tokens.shape[0], length, length if stride is None else stride)
    stream = tokens.flatten()
    rows = rows_at_once(model, batch_size, length)
    losses = []
    with evaluation_mode(model):
        for first in range(0, len(starts), rows):
            last = min(first + rows, len(starts))
            batch = torch.stack([stream[start : start + length] for start in starts[first:last]])
            loss = _loss_sum(model, batch.long(), torch.tensor(scored[first:last]))
            if not math.isfinite(loss):
                raise TrainingError(
                    f"batch {first // rows} (windows {first} to {last - 1}): the loss is {loss}. Some weight "
                    f"or activation of the model is not finite, or too large for {str(model.dtype)[6:]}."
                )
            losses.append(loss)
            if progress is not None:
                progress(last, len(starts))
    nll = math.fsum(losses) / sum(scored)
    per_byte = windows.tokens_per_byte if isinstance(windows, WindowDataset) else None
    return PerplexityResult(
        nll=nll,
        perplexity=math.exp(nll) if nll < 709 else math.inf,
        tokens=tokens.numel(),
        predictions=sum(scored),
        seconds=time.perf_counter() - started,
        bits_per_byte=None if per_byte is None else nll / math.log(2) * per_byte,
    )


@contextmanager
def evaluation_mode(model: torch.nn.Module) -> Iterator[None]:
    """No gradients and no dropout inside; afterwards every module is in the mode in which it was before."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module in training:
            module.training = True


def rows_at_once(model: PreTrainedModel, batch_size: int, length: int) -> int:
    """How many rows of `length` tokens go through the model together: `batch_size`, or what fits memory."""
    return max(1, min(batch_size, _LOGITS_AT_ONCE // (length * _vocabulary(model))))


class Perplexity(evaluate.Metric):
    """Perplexity as an `evaluate.Metric` that needs no network.

    `Perplexity().compute(texts=texts, model=model, tokenizer=tokenizer)`, or `model_id=` in place of both.
    """

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description="exp of the mean negative log-likelihood of a token, over all texts together.",
            citation=_CITATION,
            inputs_description=_INPUTS,
            features=datasets.Features({"texts": datasets.Value("string")}),
        )

    def _compute(
        self,
        texts: Sequence[str],
        model: PreTrainedModel | None = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
        model_id: str | None = None,
        length: int | None = None,
        stride: int | None = None,
        batch_size: int = 8,
        max_windows: int | None = None,
        prefix: str | None = None,
        suffix: str | None = None,
    ) -> dict[str, Any]:
        if (model is None) == (model_id is None) or (model is None) != (tokenizer is None):
            raise ConfigError("Perplexity needs either `model` with its `tokenizer`, or `model_id` alone.")
        if model_id is not None:
            model = AutoModelForCausalLM.from_pretrained(model_id)
            tokenizer = AutoTokenizer.from_pretrained(model_id)
        protocol = eval_protocol(model_id or "")
        windows = token_windows(
            texts,
            tokenizer,
            protocol.window if length is None else length,
            protocol.prefix if prefix is None else prefix,
            protocol.suffix if suffix is None else suffix,
        )
        result = perplexity(model, windows, batch_size=batch_size, stride=stride, max_windows=max_windows)
        return asdict(result)


def lm_eval_tasks(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    tasks: Sequence[str | Mapping[str, Any]],
    *,
    batch_size: int = 8,
    max_length: int | None = None,
    **settings: Any,
) -> dict[str, dict[str, Any]]:
    """Tasks of the language model evaluation harness, on the model in memory.

    Args:
        tasks: names of its tasks, or task configurations as dicts (for example of a local JSON file).
        max_length: tokens of context, at most; by default what the model's config says.
        settings: passed on to `lm_eval.simple_evaluate`, for example num_fewshot, limit, bootstrap_iters.
    Returns:
        {task: {metric: value}}
    Raises:
        ConfigError: the harness is not installed, or does not know a task.
        DataError: the data of a task cannot be had.
    """
    try:
        import lm_eval
        from lm_eval.models.huggingface import HFLM
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise ConfigError(
            f"lm-eval tasks need the package lm-eval, which cannot be imported ({error}). "
            'Install it: pip install "hf_adaptive_sparse[eval]"'
        ) from error
    # The index of its own tasks is thousands of files; configurations given as dicts do not need it.
    names = [task for task in tasks if isinstance(task, str)]
    manager = settings.pop("task_manager", None) or TaskManager(include_defaults=bool(names))
    for name in names:
        if name not in manager.all_tasks:
            nearest = difflib.get_close_matches(name, manager.all_tasks, n=3, cutoff=0.0)
            raise ConfigError(f"lm-eval knows no task {name!r}; nearest: {', '.join(nearest)}.")
    with evaluation_mode(model):
        wrapped = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size, max_length=max_length)
        try:
            results = lm_eval.simple_evaluate(model=wrapped, tasks=list(tasks), task_manager=manager, **settings)
        except (datasets.exceptions.DatasetsError, FileNotFoundError, ConnectionError) as error:
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise DataError(f"the data of the lm-eval tasks cannot be had: {reason}") from error
    return results["results"]


def _slide(windows: int, length: int, stride: int) -> tuple[list[int], list[int]]:
    """Where in the stream each window starts, and how many tokens at its end are scored in it."""
    if stride == length:
        return [window * length for window in range(windows)], [length - 1] * windows
    end = (windows - 1) * length
    # The last window is moved back to end with the stream: its tokens get more context, none is lost.
    starts = [*range(0, end, stride), end]
    return starts, [length - 1] + [after - before for before, after in zip(starts, starts[1:], strict=False)]


def _loss_sum(model: PreTrainedModel, batch: Tensor, scored: Tensor) -> float:
    """Summed loss of the last `scored` tokens of each window; batch [windows, length], scored [windows]."""
    output = model(input_ids=batch.to(model.device), use_cache=False)
    logits = output.logits.flatten(0, 1)
    position = torch.arange(1, batch.shape[1] + 1)
    targets = batch.roll(-1, dims=1)
    # Position i predicts token i + 1; the last position of a window predicts nothing that is in the window.
    left_out = (position < batch.shape[1] - scored[:, None]) | (position == batch.shape[1])
    targets = targets.masked_fill(left_out, _IGNORED).flatten().to(logits.device)
    piece = max(1, _FLOAT32_AT_ONCE // logits.shape[-1])
    return math.fsum(
        functional.cross_entropy(part.float(), target, ignore_index=_IGNORED, reduction="sum").item()
        for part, target in zip(logits.split(piece), targets.split(piece), strict=True)
    )


def _check(model: PreTrainedModel, tokens: Tensor, batch_size: int, stride: int | None) -> None:
    if tokens.dim() != 2 or 0 in tokens.shape:
        raise DataError(f"perplexity needs a [windows, length] tensor of tokens, got {list(tokens.shape)}.")
    length = tokens.shape[1]
    if length < 2:
        raise DataError(f"a window needs 2 tokens or more, to predict one from another; got {length}.")
    if batch_size < 1:
        raise ConfigError(f"batch_size is a number of windows, at least 1; got {batch_size}.")
    if stride is not None and not 1 <= stride <= length:
        raise ConfigError(f"stride is from 1 to the {length} tokens of a window, got {stride}.")
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if positions is not None and length > positions:
        raise DataError(f"windows of {length} tokens are longer than the {positions} positions of the model.")
    if int(tokens.max()) >= _vocabulary(model):
        raise DataError(
            f"the windows hold token {int(tokens.max())}, the model knows {_vocabulary(model)} tokens. "
            "Use the tokenizer that belongs to the model."
        )


def _vocabulary(model: PreTrainedModel) -> int:
    return model.get_input_embeddings().num_embeddings
