"""The text that a run learns from and the text that judges it, as windows of the model's tokens."""

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
    """What a run trains on (or calibrates on) and what it is judged by."""

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
        evaluation, more = _evaluation(eval_data, eval_split, column, tokenizer, window, eval_windows, around)
        facts |= more
    facts |= {
        "tokens in a window": window,
        "training windows to draw from": len(train),
        "evaluation windows": len(evaluation),
    }
    return RunText(train, evaluation, facts)


def calibration_text(
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
    """The first windows of a text for calibration, and windows for evaluation that are none of them.

    Args:
        eval_data: None takes the evaluation windows from the same text, behind those for calibration.
        needed: windows that the run calibrates on.
    Raises:
        DataError: no such text, too little of it, or the same windows in both parts.
    """
    protocol = eval_protocol(source.name)
    around = {"prefix": protocol.prefix, "suffix": protocol.suffix}
    documents = load_documents(data, split=split, column=column)
    behind = eval_windows if eval_data is None else 0
    found = _windows(data, documents, tokenizer, window, limit=needed + behind, **around)
    if len(found) < needed + min(behind, 1):
        judging = ", and more to judge by" if behind else ""
        raise DataError(
            f"{data}: the text fills {len(found)} windows of {window} tokens, and calibration takes {needed}{judging}. "
            "Give more text, or lower --calibration-windows or --window."
        )
    facts = {"calibration text": data, "calibration text sha256": data_digest(data, split=split, column=column)}
    calibration, evaluation = found.select(slice(0, needed)), found.select(slice(needed, None))
    if eval_data is None:
        facts["evaluation text"] = f"the {len(evaluation)} windows behind those of the calibration"
    else:
        evaluation, more = _evaluation(eval_data, eval_split, column, tokenizer, window, eval_windows, around)
        facts |= more
    _check_apart(calibration, evaluation, None if eval_data is not None else data)
    facts |= {
        "tokens in a window": window,
        "calibration windows": f"{needed}, the first of the text",
        "evaluation windows": len(evaluation),
    }
    return RunText(calibration, evaluation, facts)


def opening_words(text: RunText, tokenizer: Any, count: int = 3, length: int = 12) -> list[str]:
    """How some documents of the evaluation text begin, as prompts; without borders, how windows do."""
    stream = text.evaluation.tokens.flatten()
    starts = (stream == tokenizer.bos_token_id).nonzero().flatten().tolist() if tokenizer.bos_token else []
    starts += range(0, len(stream), text.evaluation.length)
    prompts: list[str] = []
    for start in starts:
        prompt = tokenizer.decode(stream[start : start + length].tolist(), skip_special_tokens=True).rstrip()
        if prompt and prompt not in prompts and len(prompts) < count:
            prompts.append(prompt)
    return prompts


def _evaluation(
    data: str,
    split: str,
    column: str | None,
    tokenizer: PreTrainedTokenizerBase,
    window: int,
    limit: int,
    around: dict[str, str],
) -> tuple[WindowDataset, dict[str, Any]]:
    documents = load_documents(data, split=split, column=column)
    facts = {"evaluation text": data, "evaluation text sha256": data_digest(data, split=split, column=column)}
    return _windows(data, documents, tokenizer, window, limit=limit, **around), facts


def _check_apart(calibration: WindowDataset, evaluation: WindowDataset, shared: str | None) -> None:
    """Raise DataError where a window is in both parts: text that calibrates never judges.

    Args:
        shared: the text that both are of; None where there are two.
    """
    seen = {window.numpy().tobytes() for window in calibration.tokens}
    both = sum(window.numpy().tobytes() in seen for window in evaluation.tokens)
    if both and shared is not None:
        raise DataError(
            f"{shared}: the text repeats itself: {both} of the {len(evaluation)} evaluation windows are calibration "
            "windows as well, and a model must not be judged by them. Give --eval-data, or other text."
        )
    if both:
        raise DataError(
            f"{both} of the {len(evaluation)} evaluation windows are calibration windows as well, and a model must not "
            "be judged by them. Give another --eval-data, or leave it out."
        )


def _windows(name: str, documents: Any, tokenizer: PreTrainedTokenizerBase, window: int, **options: Any):
    if len(documents) == 0:
        raise DataError(f"{name}: holds no text. Give a file with at least {window} tokens of it.")
    try:
        return token_windows(documents, tokenizer, window, **options)
    except DataError as problem:
        raise DataError(f"{name}: {problem}") from problem
