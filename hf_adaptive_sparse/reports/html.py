"""Pieces of a page: tables, figures, lists of facts."""

from __future__ import annotations

import base64
import re
from collections.abc import Callable, Iterable, Sequence
from html import escape
from typing import Any

from .text import DASH

_AFTER_DOTS = re.compile(r"(?<=[a-zA-Z_])\.|\.(?=[a-zA-Z_])")  # where names of modules, but no numbers, may be broken
_SENTENCES = ("why not", "what", "where")  # columns of running text, which wraps


def folded(content: str, rows: int) -> list[str]:
    """A long table is opened by a click."""
    return [content] if rows <= 60 else [f"<details><summary>all {rows} matrices</summary>{content}</details>"]


def columns_table(columns: dict[str, Callable[[Any], str]], rows: Sequence[Any]) -> str:
    """A table with one row for each of `rows`; columns that nobody filled are left out."""
    cells = {name: [cell(row) for row in rows] for name, cell in columns.items()}
    shown = {name: column for name, column in cells.items() if any(cell != DASH for cell in column)}
    return table(list(shown), zip(*shown.values(), strict=True))


def facts(title: str, known: dict[str, Any]) -> list[str]:
    """A section of names and values; none if nothing is known."""
    if not known:
        return []
    rows = [(str(key), shown(value)) for key, value in known.items()]
    return [f"<h2>{escape(title)}</h2>", table([], rows)]


def shown(value: Any) -> str:
    """A setting or a fact, for a person."""
    if value is None:
        return DASH
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, dict):
        return ", ".join(f"{key} {shown(entry)}" for key, entry in value.items())
    if isinstance(value, (list, tuple, set, frozenset)):
        return ", ".join(shown(entry) for entry in value) or DASH
    return str(value)


def figure(image: bytes | None, caption: str) -> list[str]:
    """An SVG image inside the page, with its caption; nothing for no image."""
    if image is None:
        return []
    source = base64.b64encode(image).decode()
    return [
        f'<figure><img alt="{escape(caption)}" src="data:image/svg+xml;base64,{source}">'
        f"<figcaption>{escape(caption)}</figcaption></figure>"
    ]


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Rows of cells; without a head, names and values. A cell that says NO is marked."""

    def cell(tag: str, column: int, text: str) -> str:
        kind = "name" if column == 0 or not head or head[column] in _SENTENCES else "right"
        kind += " bad" if text == "NO" else ""
        shown = _AFTER_DOTS.sub(r"\g<0><wbr>", escape(text)) if kind.startswith("name") else escape(text)
        return f'<{tag} class="{kind}">{shown}</{tag}>'

    top = "".join(cell("th", column, text) for column, text in enumerate(head))
    lines = ("".join(cell("td", column, text) for column, text in enumerate(row)) for row in rows)
    body = "".join(f"<tr>{line}</tr>\n" for line in lines)
    opened = f"<table><thead><tr>{top}</tr></thead>" if head else '<table class="facts">'
    return f'<div class="scroll">{opened}<tbody>{body}</tbody></table></div>'
