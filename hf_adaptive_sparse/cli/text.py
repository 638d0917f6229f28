"""Training and evaluation text of one run, as windows of the model's tokens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedTokenizerBase

from ..errors import DataError
from ..hf.data import WindowDataset, data_digest, eval_protocol, load_documents, split_windows, token_windows
from .models import ModelSource

# Windows are drawn at random from so many times the text that a run needs: a corpus of any size can be named.
_POOL = 16
_HELD_OUT = 0.05


@dataclass(frozen=True)
class RunText:
    """What a run trains on and what it is judged by."""

    train: WindowDataset
    evaluation: WindowDataset
    facts: dict[str, Any]


def run_text(
    source: ModelSource,
    tokenizer: PreTrainedTokenizerBase,
    *,
    data: str,
    split: str,
    column: str | None,
    eval_data: str | None,
    eval_split: str,
    eval_windows: int,
    window: int,
    needed: int,
) -> RunText:
    """Windows for training, and windows for evaluation that are none of them.

    Args:
        eval_data: None holds out the end of the training text.
        needed: windows that the run will train on.
    Raises:
        DataError: no such text, or too little of it.
    """
    protocol = eval_protocol(source.name)
    around = {"prefix": protocol.prefix, "suffix": protocol.suffix}
    documents = load_documents(data, split=split, column=column)
    train = _windows(data, documents, tokenizer, window, limit=_POOL * needed, **around)
    facts = {"training text": data, "training text sha256": data_digest(data, split=split, column=column)}
    if eval_data is None:
        held_out = min(eval_windows, -int(-_HELD_OUT * len(train) // 1))
        train, evaluation = split_windows(train, held_out)
        facts["evaluation text"] = f"the last {held_out} windows of the training text, not trained on"
    else:
        held_out_documents = load_documents(eval_data, split=eval_split, column=column)
        evaluation = _windows(eval_data, held_out_documents, tokenizer, window, limit=eval_windows, **around)
        facts["evaluation text"] = eval_data
        facts["evaluation text sha256"] = data_digest(eval_data, split=eval_split, column=column)
    facts |= {
        "tokens in a window": window,
        "training windows to draw from": len(train),
        "evaluation windows": len(evaluation),
    }
    return RunText(train, evaluation, facts)


def _windows(name: str, documents: Any, tokenizer: PreTrainedTokenizerBase, window: int, **options: Any):
    if len(documents) == 0:
        raise DataError(f"{name}: holds no text. Give a file with at least {window} tokens of it.")
    try:
        return token_windows(documents, tokenizer, window, **options)
    except DataError as problem:
        raise DataError(f"{name}: {problem}") from problem
