"""The model that a sparse one was made of: its name on the Hub, and its licence, which goes with the weights."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, ModelCard
from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

from ..errors import ConfigError

REPO_ID = re.compile(r"[A-Za-z0-9_][\w.-]*/[A-Za-z0-9_][\w.-]*")
_LICENSE_KEYS = ("license", "license_name", "license_link")


@dataclass(frozen=True, kw_only=True)
class Parent:
    """The base model.

    Args:
        name: to show; None if nobody knows it.
        hub_id: OWNER/NAME on a Hub; None for a local folder.
        license: keys of the card: license, license_name, license_link; empty if unknown.
        said: where the licence is from, or why it is not known, as a sentence.
    """

    name: str | None = None
    hub_id: str | None = None
    license: Mapping[str, str] = field(default_factory=dict)
    said: str = ""


def find_parent(
    made_of: str | None, base_model: str | None, license: str | None, api: HfApi, shown_as: str | None = None
) -> Parent:
    """The base model, and its licence by its own card.

    Args:
        made_of: what the run says it was made of: a Hub id, or a folder that may be gone.
        base_model: Hub id by the user, which counts before it.
        license: by the user, which counts before the card's.
        shown_as: name of a local folder that nobody knows by its own.
    Raises:
        ConfigError: `base_model` is no Hub id.
    """
    if base_model is not None and REPO_ID.fullmatch(base_model) is None:
        raise ConfigError(f"base_model is the Hub id OWNER/NAME of the dense model, got {base_model!r}.")
    folder = None if made_of is None or base_model is not None else Path(made_of).expanduser()
    if folder is not None and not folder.is_dir():
        folder = None
    hub_id = base_model or _hub_id(made_of, folder)
    name = hub_id or shown_as
    if name is None and made_of is not None:
        name = Path(made_of.rstrip("/\\").replace("\\", "/")).name
    if license is not None:
        return Parent(name=name, hub_id=hub_id, license={"license": license}, said="Stated by who published it.")
    if folder is not None:
        keys, reason = _of_folder(folder)
    elif hub_id is not None:
        keys, reason = _of_hub(hub_id, api)
    elif name is not None:
        keys, reason = {}, "the base model was a local folder that is not there any more"
    else:
        keys, reason = {}, "it is not recorded what this model was made of"
    if keys:
        said = f"Copied from the card of {name}."
    else:
        said = f"Not known: {reason}. The licence of the base model holds; ask whoever published this before use."
    return Parent(name=name, hub_id=hub_id, license=keys, said=said)


def _hub_id(made_of: str | None, folder: Path | None) -> str | None:
    if made_of is None:
        return None
    if folder is None:
        return made_of if REPO_ID.fullmatch(made_of) else None
    # A folder in the cache of a Hub: .../models--OWNER--NAME/snapshots/HASH
    for part in folder.absolute().parts:
        match = re.fullmatch(r"models--(.+?)--(.+)", part)
        if match is not None:
            return f"{match[1]}/{match[2]}"
    return None


def _of_folder(folder: Path) -> tuple[dict[str, str], str]:
    if not (folder / "README.md").is_file():
        return {}, "the folder of the base model has no card (README.md)"
    try:
        card = ModelCard.load(folder / "README.md")
    except (ValueError, OSError) as problem:
        return {}, f"the card of the base model cannot be read ({' '.join(str(problem).split())[:200]})"
    return _keys(card.data.to_dict()), "the card of the base model names no licence"


def _of_hub(hub_id: str, api: HfApi) -> tuple[dict[str, str], str]:
    try:
        card = api.model_info(hub_id, timeout=20).card_data
    except OfflineModeIsEnabled:
        return {}, f"the card of {hub_id} was not asked for, since HF_HUB_OFFLINE is set"
    except HfHubHTTPError as problem:
        status = getattr(problem.response, "status_code", "no answer")
        return {}, f"the card of {hub_id} could not be read (HTTP {status})"
    except Exception as problem:
        if not is_of_the_network(problem):
            raise
        return {}, f"the card of {hub_id} could not be read ({type(problem).__name__})"
    return _keys({} if card is None else card.to_dict()), f"the card of {hub_id} names no licence"


def _keys(data: Mapping[str, Any]) -> dict[str, str]:
    found = {key: data[key] for key in _LICENSE_KEYS if data.get(key)}
    return found if "license" in found else {}


def is_of_the_network(problem: BaseException) -> bool:
    """Whether an exception is of the HTTP library that huggingface_hub uses: no connection, a timeout."""
    # By the name of the library, which is huggingface_hub's choice (httpx, then httpx2) and no dependency of ours.
    return any(kind.__module__.partition(".")[0] in ("httpx", "httpx2", "httpcore") for kind in type(problem).__mro__)
