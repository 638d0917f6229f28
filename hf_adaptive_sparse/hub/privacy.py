"""What must not leave the machine: paths of its folders, and tokens."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..errors import ConfigError

# A path from the root, the home folder or a drive, which says how somebody's disk is laid out; in quotes it may have
# spaces.
_START = r"(?:(?:~|\.{1,2})?/|[A-Za-z]:\\)"
_QUOTED = re.compile(rf"'{_START}(?:[^']*[/\\])?([^'/\\]*)'")
_PATH = re.compile(rf"(?<![\w.:/~\\-]){_START}(?:[^\s/\\'\",;:()]+[/\\])*([^\s/\\'\",;:()]*)")
_TOKEN = re.compile(rb"\bhf_[A-Za-z0-9]{30,}")
_TEXT = (".json", ".jsonl", ".md", ".txt", ".yaml", ".yml", ".py", ".jinja", ".model", ".toml", ".cfg")
_LARGEST = 64 * 2**20


def without_paths(value: Any) -> Any:
    """The same JSON, with every path of a machine cut down to its last name."""
    if isinstance(value, dict):
        return {without_paths(key): without_paths(entry) for key, entry in value.items()}
    if isinstance(value, list):
        return [without_paths(entry) for entry in value]
    if isinstance(value, str):
        if re.match(_START, value) and Path(value).expanduser().exists():
            return Path(value).name
        return _PATH.sub(r"\1", _QUOTED.sub(r"'\1'", value))
    return value


def refuse_tokens(files: Mapping[str, Path | bytes], token: str | None) -> None:
    """Raise ConfigError if a text file that is to be uploaded holds an access token: this one, or what looks like one.

    The token itself is not shown.
    """
    secret = token.encode() if isinstance(token, str) and len(token) > 8 else None
    for name, file in files.items():
        if isinstance(file, Path):
            if not name.endswith(_TEXT) or file.stat().st_size > _LARGEST:
                continue
            content = file.read_bytes()
        else:
            content = file
        if (secret is not None and secret in content) or _TOKEN.search(content):
            raise ConfigError(
                f"{name}: holds an access token of a Hub, and would be published. Remove it from the file, and make "
                "the token invalid in the settings of the Hub if the file was seen by others."
            )
