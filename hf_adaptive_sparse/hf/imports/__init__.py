"""Checkpoints of other tools: IMPORTERS names those that are read, each by a file of this folder."""

from __future__ import annotations

from pathlib import Path

from ...errors import FormatError
from . import ast_release, compressed_tensors, modelopt
from .foreign import Branch, ForeignModel, ForeignTensor, Importer

IMPORTERS: dict[str, Importer] = {
    "compressed-tensors": Importer(
        "folders with a sparsity_config (sparse-24-bitmask, sparse-bitmask, dense; int8 and fp8 scaled)",
        compressed_tensors.recognises, compressed_tensors.read,
    ),
    "modelopt": Importer(
        "folders or mto.save files of NVIDIA ModelOpt's weight sparsity", modelopt.recognises, modelopt.read
    ),
    "ast-release": Importer(
        "checkpoints of the AST release, GPT-2 or LLaMA, with or without SLoRB",
        ast_release.recognises, ast_release.read,
    ),
}  # fmt: skip


def recognise(source: str | Path) -> str | None:
    """The name in IMPORTERS of what a file or folder is; None for everything else, such as an ordinary model.

    Raises:
        FormatError: a file or config.json that cannot be read.
    """
    path = Path(source).expanduser()
    if not path.exists():
        return None
    return next((name for name, importer in IMPORTERS.items() if importer.recognises(path)), None)


def read_foreign(source: str | Path, base: str | None = None) -> ForeignModel:
    """A checkpoint of another tool, as an ordinary model; nothing but headers is read before it is asked for.

    Args:
        source: file or folder.
        base: folder or Hub id of the model that it was made from, where the source lacks config.json or a tokenizer.
    Raises:
        FormatError: no known format (lists the known ones), or damaged.
        ConfigError: a base is needed and was not named.
    """
    name = recognise(source)
    if name is None:
        raise FormatError(f"{source}: is no checkpoint of another tool that is read here: {known_formats()}.")
    return IMPORTERS[name].read(Path(source).expanduser(), base)


def known_formats() -> str:
    """All of them, in half a sentence each."""
    return "; ".join(f"{name}: {importer.about}" for name, importer in IMPORTERS.items())


__all__ = [
    "IMPORTERS",
    "Branch",
    "ForeignModel",
    "ForeignTensor",
    "Importer",
    "known_formats",
    "read_foreign",
    "recognise",
]
