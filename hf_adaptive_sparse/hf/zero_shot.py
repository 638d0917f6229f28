"""Zero-shot tests by likelihood: the right one of several continuations, the better one of two sentences.

Source: Brown et al., "Language Models are Few-Shot Learners", NeurIPS 2020, section 2.4 (continuations);
Warstadt et al., "BLiMP: The Benchmark of Linguistic Minimal Pairs for English", TACL 2020 (sentences).
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ..errors import DataError
from .data import encode_open
from .evaluation import evaluation_mode, rows_at_once
from .text_files import json_lines, missing_path

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True)
class ZeroShotResult:
    """Fractions of items for which the model likes the right choice best.

    Attributes:
        accuracy: by the log-probability of the choice.
        accuracy_norm: by its log-probability over its UTF-8 bytes, so that a long choice is not at a loss.
        items: how many there were.
    """

    accuracy: float
    accuracy_norm: float
    items: int


def cloze(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    path: str | os.PathLike,
    *,
    batch_size: int = 16,
    limit: int | None = None,
) -> ZeroShotResult:
    """The right continuation among several.

    Args:
        path: a `.jsonl` of items with a `context`, its `choices`, and the number of the right one as `label`.
        batch_size: choices in a forward pass, at most.
        limit: use only so many items, from the first.
    Raises:
        DataError: the file is missing or damaged, or a choice adds no token to its context.
    """
    rows = _read(path, {"context": str, "choices": list, "label": int}, limit)
    return _accuracy(
        model,
        tokenizer,
        [(row["context"], row["choices"]) for row in rows],
        [row["label"] for row in rows],
        batch_size,
    )


def minimal_pairs(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    path: str | os.PathLike,
    *,
    batch_size: int = 16,
    limit: int | None = None,
) -> ZeroShotResult:
    """The grammatical one of two sentences, each scored whole.

    Args:
        path: a `.jsonl` of pairs with `sentence_good` and `sentence_bad`, as the files of BLiMP.
        batch_size: sentences in a forward pass, at most.
        limit: use only so many pairs, from the first.
    Raises:
        DataError: the file is missing or damaged.
    """
    rows = _read(path, {"sentence_good": str, "sentence_bad": str}, limit)
    items = [("", [row["sentence_good"], row["sentence_bad"]]) for row in rows]
    return _accuracy(model, tokenizer, items, [0] * len(items), batch_size)


def log_probabilities(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[tuple[str, str]],
    *,
    batch_size: int = 16,
) -> list[float]:
    """Summed log-probability of each continuation, for (context, continuation) pairs.

    Context and continuation are encoded together; the tokens after those of the context alone are scored.
    Without a context, the first of them is predicted from the tokenizer's token for the start (or, for want
    of one, the end) of a text. What does not fit the model's positions is cut off at the start.
    """
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    encoded = [_encode(tokenizer, context, continuation) for context, continuation in texts]
    if positions is not None:
        encoded = [(ids[-positions:], min(scored, positions - 1)) for ids, scored in encoded]
    # Longest first: rows of a batch are of about one length, and a lack of memory shows at once.
    order = sorted(range(len(texts)), key=lambda index: -len(encoded[index][0]))
    sums = [0.0] * len(texts)
    with evaluation_mode(model):
        while order:
            count = rows_at_once(model, batch_size, len(encoded[order[0]][0]))
            batch, order = order[:count], order[count:]
            rows = [torch.tensor(encoded[index][0]) for index in batch]
            # Padded on the right, where a causal model does not look; no mask is needed.
            padded = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True).to(model.device)
            logits = model(input_ids=padded, use_cache=False).logits
            for row, ids, index in zip(logits, rows, batch, strict=True):
                scored = encoded[index][1]
                kept = row[len(ids) - 1 - scored : len(ids) - 1].float()
                targets = ids[-scored:, None].to(kept.device)
                sums[index] = kept.log_softmax(dim=-1).gather(1, targets).sum().item()
    return sums


def _accuracy(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    items: list[tuple[str, list[str]]],
    labels: list[int],
    batch_size: int,
) -> ZeroShotResult:
    texts = [(context, choice) for context, choices in items for choice in choices]
    sums = iter(log_probabilities(model, tokenizer, texts, batch_size=batch_size))
    right = right_norm = 0
    for (_, choices), label in zip(items, labels, strict=True):
        scores = [next(sums) for _ in choices]
        per_byte = [score / len(choice.encode()) for score, choice in zip(scores, choices, strict=True)]
        right += _is_best(scores, label)
        right_norm += _is_best(per_byte, label)
    return ZeroShotResult(right / len(items), right_norm / len(items), len(items))


def _is_best(scores: list[float], label: int) -> bool:
    # Strictly: a model for which all choices are equal knows nothing, whatever the label is.
    return all(scores[label] > score for index, score in enumerate(scores) if index != label)


def _encode(tokenizer: PreTrainedTokenizerBase, context: str, continuation: str) -> tuple[list[int], int]:
    """Ids of both together, and how many at the end belong to the continuation."""
    ids = encode_open(tokenizer, context + continuation)
    before = len(encode_open(tokenizer, context)) if context else 0
    if not context:
        start = tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id
        if start is None:
            raise DataError("the tokenizer has neither a bos nor an eos token to put in front of a sentence.")
        ids = ids if ids[:1] == [start] else [start, *ids]
        before = 1
    if len(ids) <= before:
        raise DataError(f"the continuation {continuation!r} adds no token to its context.")
    return ids, len(ids) - before


def _read(path: str | os.PathLike, fields: dict[str, type], limit: int | None) -> list[dict[str, Any]]:
    file = Path(path).expanduser()
    if not file.is_file():
        raise DataError(missing_path(file))
    rows = []
    for where, row in json_lines(file):
        for name, kind in fields.items():
            if not isinstance(row.get(name), kind):
                raise DataError(f"{where}: {name!r} must be a {kind.__name__}, got {row.get(name)!r}.")
        for number, choice in enumerate(row["choices"] if "choices" in fields else ()):
            if not isinstance(choice, str):
                raise DataError(f"{where}: choice {number} is {choice!r}, not text.")
        if "label" in fields and not 0 <= row["label"] < len(row["choices"]):
            raise DataError(f"{where}: label {row['label']} names none of the {len(row['choices'])} choices.")
        rows.append(row)
        if len(rows) == limit:
            break
    if not rows:
        raise DataError(f"{file}: the file holds no items.")
    return rows
