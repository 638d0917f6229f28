"""Documents of local files: `.txt`, `.jsonl`, `.parquet`, or a folder of such files.

Every reader returns the documents of one file as a list of strings, in file order.
"""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet

from ..errors import DataError

SEPARATOR = "<|endoftext|>"

# The words in a file's name that say which split it belongs to, as on the Hub.
_SPLIT_WORDS = {
    "train": "train", "training": "train",
    "valid": "validation", "validation": "validation", "val": "validation", "dev": "validation",
    "test": "test", "testing": "test",
}  # fmt: skip


def read_txt(path: Path, column: str | None = None) -> list[str]:
    """The parts between lines that hold only `<|endoftext|>`; without such a line, the whole file."""
    if column is not None:
        raise DataError(f"{path}: a .txt file has no columns, got column={column!r}. Leave column out.")
    parts = re.split(rf"(?m)^{re.escape(SEPARATOR)}$", _decode(path))
    return [stripped for part in parts if (stripped := part.strip())] or [""]


def read_jsonl(path: Path, column: str | None = None) -> list[str]:
    """The field `column` (default: `text`) of the JSON object on every line; blank lines are skipped."""
    name = column or "text"
    documents = []
    for where, row in json_lines(path):
        if name not in row:
            raise DataError(no_column(where, column, list(row)))
        if not isinstance(row[name], str):
            raise DataError(f"{where} has a {_json_kind(row[name])} in {name!r}, not text.")
        documents.append(row[name])
    return documents


def json_lines(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """(where it stands, the object) for every line that is not blank.

    Raises:
        DataError: a line is not a JSON object.
    """
    # Not splitlines(): a JSON string may hold U+2028 and its like as they are.
    for number, line in enumerate(_decode(path).split("\n"), start=1):
        where = f"{path}: line {number}"
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise DataError(f"{where} is not JSON: {error.msg} at column {error.colno}.") from None
        if not isinstance(row, dict):
            raise DataError(f"{where} is a JSON {_json_kind(row)}, not an object.")
        yield where, row


def read_parquet(path: Path, column: str | None = None) -> list[str]:
    """The column `column` (default: `text`), which must hold strings."""
    name = column or "text"
    try:
        schema = pyarrow.parquet.read_schema(path)
        if name not in schema.names:
            raise DataError(no_column(str(path), column, schema.names))
        kind = schema.field(name).type
        if not (pyarrow.types.is_string(kind) or pyarrow.types.is_large_string(kind)):
            raise DataError(f"{path}: the column {name!r} holds {kind}, not text.")
        documents: list[str | None] = pyarrow.parquet.read_table(path, columns=[name])[name].to_pylist()
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(f"{path}: cannot be read as parquet: {_first_line(error)}") from error
    for number, document in enumerate(documents):
        if document is None:
            raise DataError(f"{path}: row {number} has nothing (null) in {name!r}, not text.")
    return documents  # type: ignore[return-value]


READERS: dict[str, Callable[[Path, str | None], list[str]]] = {
    ".txt": read_txt,
    ".jsonl": read_jsonl,
    ".parquet": read_parquet,
}


def read_documents(path: Path, column: str | None = None) -> list[str]:
    """Documents of one file, by its extension.

    Raises:
        DataError: an unknown extension, an empty file, or whatever the file's reader finds wrong.
    """
    if path.suffix.lower() not in READERS:
        raise DataError(
            f"{path}: unknown extension {path.suffix!r}; known: {', '.join(READERS)}. "
            "Convert the file, or rename it if only its name is wrong."
        )
    if path.stat().st_size == 0:
        raise DataError(f"{path}: the file is empty (0 bytes).")
    documents = READERS[path.suffix.lower()](path, column)
    if not any(document.strip() for document in documents):
        raise DataError(f"{path}: the file holds no text, only blanks.")
    return documents


def files_of(path: Path, split: str) -> list[Path]:
    """The file itself, or the data files below a folder in the order of their names.

    If any file's name says a split (`train.txt`, `validation-00000.parquet`), only the files of `split` are
    taken, so that a validation file beside the training file is never trained on. If none does, all of them
    are the split `train`.
    """
    if not path.is_dir():
        return [path]
    hidden = re.compile(r"(^|/)[._]")
    found = [file for file in path.rglob("*") if file.is_file() and file.suffix.lower() in READERS]
    relative = {file: file.relative_to(path).as_posix() for file in found}
    files = sorted((file for file in found if not hidden.search(relative[file])), key=relative.__getitem__)
    if not files:
        raise DataError(f"{path}: the folder holds no data files; looked for {', '.join(READERS)}.")
    named = {file: _split_of(relative[file]) for file in files}
    splits = sorted({name for name in named.values() if name is not None} or {"train"})
    asked = _SPLIT_WORDS.get(split, split)
    if asked not in splits:
        raise DataError(f"{path}: the folder has no split {split!r}; it has {', '.join(splits)}.")
    return [file for file in files if named[file] == asked or not any(named.values())]


def missing_path(path: Path) -> str:
    """What to say about a path that is not there: the names nearest to it that are."""
    missing, parent = path, path.parent
    while not parent.exists() and parent != parent.parent:
        missing, parent = parent, parent.parent
    names = sorted(child.name for child in parent.iterdir()) if parent.is_dir() else []
    if not names:
        return f"{path}: no such file or folder; nothing is in {parent}."
    names.sort(key=lambda name: -difflib.SequenceMatcher(None, missing.name.lower(), name.lower()).ratio())
    return f"{path}: no such file or folder; nearest names in {parent}: {', '.join(names[:3])}."


def no_column(where: str, column: str | None, columns: list[str]) -> str:
    """What to say when the column that was asked for, or by default `text`, is not among `columns`."""
    found = ", ".join(columns) or "none"
    return f"{where} has no column {column or 'text'!r}; it has {found}. Name the text's column as `column`."


def _split_of(name: str) -> str | None:
    words = re.split(r"[^a-z]+", name.lower())
    return next((_SPLIT_WORDS[word] for word in words if word in _SPLIT_WORDS), None)


def _decode(path: Path) -> str:
    content = path.read_bytes()
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        where = f"{path}: not UTF-8 at byte {error.start}"
        raise DataError(f"{where}: {error.reason}. Convert the file.") from None
    return text.replace("\r\n", "\n")


def _json_kind(value: object) -> str:
    kinds = {dict: "object", list: "list", str: "string", bool: "boolean", int: "number", float: "number"}
    return kinds.get(type(value), "null")


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
