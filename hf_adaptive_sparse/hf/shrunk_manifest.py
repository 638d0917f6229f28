"""How a model was shrunk, as `config.json` keeps it: which units stay of every axis, and whatever else is said."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig

from ..errors import ConfigError, FormatError

KEY = "pruning_manifest"


def manifest_to_json(manifest: Mapping[str, Any]) -> dict[str, Any]:
    """The manifest as it stands in `config.json`: kept units as runs ("0-5,7,9-20"), for there may be very many.

    Args:
        manifest: "kept": axis -> the units of the parent model that stay, as ascending indices or as a bool tensor
            [units]. All else (method, seed, digest of the parent) is kept as it is, and must be JSON.
    Raises:
        ConfigError: indices that are not ascending, or a value that is not JSON.
    """
    found = {key: value for key, value in manifest.items() if key != "kept"}
    try:
        found = json.loads(json.dumps(found))
    except (TypeError, ValueError) as error:
        raise ConfigError(f"manifest: must be of values that JSON has, got one that it has not ({error}).") from error
    kept = {axis: _runs(axis, _indices(units)) for axis, units in manifest.get("kept", {}).items()}
    return {**found, "kept": kept}


def shrunk_manifest(config: PreTrainedConfig | Mapping[str, Any]) -> dict[str, Any] | None:
    """The manifest that `export_shrunk` put into a config, with lists of indices under "kept"; None if there is none.

    Args:
        config: of a loaded model, or what `config.json` holds.
    Raises:
        FormatError: it is there and cannot be read.
    """
    stored = config.get(KEY) if isinstance(config, Mapping) else getattr(config, KEY, None)
    if stored is None:
        return None
    try:
        return {**stored, "kept": {axis: _units(runs) for axis, runs in stored["kept"].items()}}
    except (TypeError, ValueError, KeyError, AttributeError) as error:
        raise FormatError(
            f"config.json: {KEY} cannot be read ({error!r}). The file was edited, or is of a later version."
        ) from error


def _indices(units: Tensor | Iterable[int]) -> list[int]:
    if isinstance(units, Tensor):
        units = units.nonzero().flatten() if units.dtype == torch.bool else units
        return [int(unit) for unit in units.tolist()]
    return [int(unit) for unit in units]


def _runs(axis: str, indices: list[int]) -> str:
    if any(second <= first for first, second in zip([-1, *indices], indices, strict=False)):
        raise ConfigError(f"manifest: the units kept of {axis} must be ascending indices from 0, got {indices[:8]}.")
    runs: list[list[int]] = []
    for index in indices:
        if runs and index == runs[-1][1] + 1:
            runs[-1][1] = index
        else:
            runs.append([index, index])
    return ",".join(str(first) if first == last else f"{first}-{last}" for first, last in runs)


def _units(runs: str) -> list[int]:
    bounds = [[int(bound) for bound in run.split("-")] for run in runs.split(",") if run]
    return [unit for run in bounds for unit in range(run[0], run[-1] + 1)]
