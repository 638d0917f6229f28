"""Text into documents, documents into windows of tokens.

The perplexity of a model depends on how its text is cut, so there is one way, used by training and
evaluation alike: every document is stripped, given the model's `prefix` and `suffix` and encoded with special
tokens on; all ids are joined in order and cut into windows that do not overlap; the tail that fills no window
is dropped.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, fields
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING

import datasets
import numpy
import torch
from torch import Tensor

from ..errors import DataError
from .text_files import READERS, SEPARATOR, files_of, missing_path, no_column, read_documents

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_BATCH = 1000  # documents that are encoded at a time

# What an `eval_protocol.json` may say about the steps that are always done the same way.
_ONLY = {"document_separator": SEPARATOR, "strip_documents": True, "add_special_tokens": True}


def load_documents(spec: str | os.PathLike, *, split: str = "train", column: str | None = None) -> datasets.Dataset:
    """Documents of a local file or folder, or of a dataset on the Hub.

    Args:
        spec: a `.txt` (documents separated by a line `<|endoftext|>`, otherwise one document), a `.jsonl`, a
            `.parquet`, a folder of such files, or a Hub id, with its configuration after a colon if it has
            several (`Salesforce/wikitext:wikitext-2-raw-v1`). Local files are read into memory.
        split: of the Hub dataset, or of a folder whose file names say their split. A single file is named by
            its path and always taken whole.
        column: which column holds the text; default `text`.
    Returns:
        a dataset with the one column `text`.
    Raises:
        DataError: nothing is there, or it is not text; the message says where and why.
    """
    if not is_local(spec):
        return _from_hub(str(spec), split, column)
    path = Path(spec).expanduser()
    if not path.exists():
        raise DataError(missing_path(path))
    documents = [document for file in files_of(path, split) for document in read_documents(file, column)]
    # large_string: all of one file may be one document, and Arrow's string columns end at 2 GiB.
    features = datasets.Features({"text": datasets.Value("large_string")})
    return datasets.Dataset.from_dict({"text": documents}, features=features)


def data_digest(spec: str | os.PathLike, *, split: str = "train", column: str | None = None) -> str:
    """sha256 of the data, as 64 hex digits, to name in a report exactly what was used.

    Of a file: of its bytes, as `sha256sum` prints it. Of a folder: of the lines "digest  name" of its files
    in order. Of a Hub dataset: of its documents, each with its length in bytes in front.
    """
    if not is_local(spec):
        digest = hashlib.sha256()
        for document in _texts(_from_hub(str(spec), split, column)):
            content = document.encode("utf-8", "surrogatepass")
            digest.update(f"{len(content)} ".encode() + content)
        return digest.hexdigest()
    path = Path(spec).expanduser()
    if not path.exists():
        raise DataError(missing_path(path))
    files = files_of(path, split)
    if not path.is_dir():
        return _file_digest(path)
    lines = (f"{_file_digest(file)}  {file.relative_to(path).as_posix()}\n" for file in files)
    return hashlib.sha256("".join(lines).encode()).hexdigest()


@dataclass(frozen=True)
class EvalProtocol:
    """How text becomes windows for one model: the `eval_protocol.json` of its folder."""

    prefix: str = ""
    suffix: str = ""
    window: int = 256
    stride: int = 256
    windows: int = 400


def eval_protocol(model: str | os.PathLike) -> EvalProtocol:
    """The protocol that a local model folder carries; the default one where it carries none.

    Raises:
        DataError: the file cannot be read, or asks for something that `token_windows` does not do.
    """
    path = Path(model) / "eval_protocol.json"
    if not path.is_file():
        return EvalProtocol()
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise DataError(f"{path}: not JSON: {error}.") from None
    if not isinstance(content, dict):
        raise DataError(f"{path}: not a JSON object.")
    for key, only in _ONLY.items():
        if content.get(key, only) != only:
            raise DataError(f"{path}: {key} must be {only!r}, got {content[key]!r}.")
    settings = {field.name: content[field.name] for field in fields(EvalProtocol) if field.name in content}
    for key, value in settings.items():
        kind = type(getattr(EvalProtocol, key))
        if type(value) is not kind or (kind is int and value < 1):
            expected = "text" if kind is str else "a positive whole number"
            raise DataError(f"{path}: {key} must be {expected}, got {value!r}.")
    return EvalProtocol(**settings)


class WindowDataset(torch.utils.data.Dataset):
    """Windows of tokens, as a dataset for a Trainer: no padding, so no attention mask.

    Attributes:
        tokens: [windows, length] int32; an item is int64, as models take it.
        tokens_per_byte: tokens of all encoded text over the UTF-8 bytes of its documents; None if not known.
    """

    def __init__(self, tokens: Tensor, tokens_per_byte: float | None = None) -> None:
        self.tokens = tokens
        self.tokens_per_byte = tokens_per_byte

    @property
    def length(self) -> int:
        """Tokens in one window."""
        return self.tokens.shape[1]

    def __len__(self) -> int:
        return self.tokens.shape[0]

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        window = self.tokens[index].long()
        return {"input_ids": window, "labels": window}

    def __repr__(self) -> str:
        return f"WindowDataset({len(self)} windows of {self.length} tokens)"

    def select(self, indices: slice | Sequence[int] | Tensor) -> WindowDataset:
        """The windows at `indices`, in that order."""
        return WindowDataset(self.tokens[indices], self.tokens_per_byte)


def token_windows(
    documents: datasets.Dataset | Iterable[str],
    tokenizer: PreTrainedTokenizerBase,
    length: int = 256,
    prefix: str = "",
    suffix: str = "",
    limit: int | None = None,
) -> WindowDataset:
    """Documents as windows of `length` tokens that do not overlap; the tail is dropped, nothing is padded.

    Args:
        documents: strings, or a dataset with the column `text`. Each is stripped; blank ones are left out.
        tokenizer: encodes each document by itself, special tokens on.
        prefix, suffix: put around each document, as the model's `eval_protocol` says.
        limit: keep at most so many windows from the start, and encode no more text than they need.
    Raises:
        DataError: a document is not text, or all of them together do not fill one window.
    """
    if length < 2:
        raise DataError(f"a window needs 2 tokens or more, to predict one from another; got length={length}.")
    if limit is not None and limit < 1:
        raise DataError(f"limit is a number of windows, at least 1; got {limit}. To keep all, leave it out.")
    pieces, found, size = [], 0, 0
    for batch in _batches(_texts(documents)):
        size += sum(len(document.encode("utf-8", "surrogatepass")) for document in batch)
        # verbose=False: the tokenizer's warning about documents longer than the model's context is void here.
        encoded = tokenizer(
            [prefix + document + suffix for document in batch],
            add_special_tokens=True, return_attention_mask=False, return_token_type_ids=False, verbose=False,
        )["input_ids"]  # fmt: skip
        pieces.append(numpy.fromiter(chain.from_iterable(encoded), dtype=numpy.int32))
        found += len(pieces[-1])
        if limit is not None and found >= limit * length:
            break
    if found < length:
        raise DataError(
            f"the text holds {found} tokens, fewer than one window of {length}. Give more text, or a shorter window."
        )
    count = found // length if limit is None else min(found // length, limit)
    tokens = torch.from_numpy(numpy.concatenate(pieces)[: count * length].reshape(count, length))
    return WindowDataset(tokens, found / size)


def encode_open(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Ids of a text that something follows: special tokens on, but none that ends the text."""
    ids = tokenizer(text, add_special_tokens=True, verbose=False)["input_ids"]
    return ids[:-1] if ids and ids[-1] == tokenizer.eos_token_id != ids[0] else ids


def split_windows(windows: WindowDataset, held_out: int | float) -> tuple[WindowDataset, WindowDataset]:
    """(windows to train on, windows to select by): the last `held_out` windows are held out.

    Args:
        held_out: a number of windows, or, as a float in (0, 1), a fraction of them, rounded up.
    Raises:
        DataError: one of the two parts would be empty.
    """
    total = len(windows)
    count = -int(-total * held_out // 1) if isinstance(held_out, float) else held_out
    if not 0 < count < total:
        raise DataError(
            f"cannot hold out {held_out} of {total} windows: each part needs at least one. "
            "Give more text, shorter windows, or hold out fewer."
        )
    return windows.select(slice(0, total - count)), windows.select(slice(total - count, total))


def is_local(spec: str | os.PathLike) -> bool:
    """Whether `spec` means a path. What exists is one; otherwise what could not be a Hub id."""
    path = Path(spec).expanduser()
    if not isinstance(spec, str) or path.exists():
        return True
    return (
        path.is_absolute() or spec.startswith(".") or "\\" in spec or len(path.parts) > 2
        or path.suffix.lower() in READERS or (len(path.parts) == 2 and path.parent.is_dir())
    )  # fmt: skip


def _from_hub(spec: str, split: str, column: str | None) -> datasets.Dataset:
    name, _, config = spec.partition(":")
    try:
        dataset = datasets.load_dataset(name, config or None, split=split)
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise DataError(f"{spec}: no such local file or folder, and the Hub gave none: {reason}") from error
    if (column or "text") not in dataset.column_names:
        raise DataError(no_column(spec, column, dataset.column_names))
    dataset = dataset.select_columns([column or "text"])
    return dataset if column in (None, "text") else dataset.rename_column(column, "text")


def _texts(documents: datasets.Dataset | Iterable[str]) -> Iterator[str]:
    if isinstance(documents, str):
        raise DataError("documents must be several texts, got one string. Put it in a list.")
    columns = getattr(documents, "column_names", None)
    if columns is not None and "text" not in columns:
        raise DataError(no_column("the dataset", None, list(columns)))
    # Reading a dataset in batches is many times faster than row by row.
    texts = documents if columns is None else chain.from_iterable(b["text"] for b in documents.iter(_BATCH))
    for number, document in enumerate(texts):
        if not isinstance(document, str):
            raise DataError(f"document {number} is of type {type(document).__name__}, not text.")
        yield document


def _batches(documents: Iterator[str]) -> Iterator[list[str]]:
    batch = []
    for document in documents:
        if stripped := document.strip():
            batch.append(stripped)
        if len(batch) == _BATCH:
            yield batch
            batch = []
    if batch:
        yield batch


def _file_digest(path: Path) -> str:
    if path.suffix.lower() not in READERS:
        read_documents(path)  # says which extensions are known
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
