"""One-shot pruning that can be killed: goals and finished blocks are on the disk, and a later run goes on."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ..errors import ConfigError, FormatError, SparsityError
from ..methods.one_shot import Goal
from ..patterns import Unstructured, parse_pattern
from .blocks import BlockStack
from .data import WindowDataset
from .files import atomic_file, atomic_write
from .one_shot_goals import Chosen
from .one_shot_report import MatrixResult, QuantizedMatrix
from .visits import BlockVisit, WalkState
from .walk_state import load_walk, save_walk

_GOALS = "goals.json"


class PruningProgress:
    """Where `one_shot` saves what is finished, and finds it again.

    The folder holds `goals.json` (the settings of the run, a digest of the dense weights, and what each matrix shall
    become), for every finished block its weights, its rows of the report and its codes, and the hidden states that the
    next block reads. The hidden states are written last and replace those of the block before in one step: they say how
    many blocks are finished. Every run starts from the dense model, also one that goes on.

    Args:
        folder: of this run alone; made when the first thing is saved.
    """

    def __init__(self, folder: str | os.PathLike) -> None:
        self.folder = Path(folder)

    def open(self, settings: Mapping[str, Any], weights: str) -> Chosen | None:
        """The goals that an interrupted run had settled; None where there is none.

        Args:
            settings: what decides the weights of the run; must be the same in the run that goes on.
            weights: digest of the dense model, before anything of it is pruned; must be the same too.
        Raises:
            ConfigError: the folder is of a run with other settings, of which each that differs is named, or of another
                model.
            FormatError: goals.json is damaged.
        """
        for leftover in self.folder.glob(".*.tmp"):
            leftover.unlink()
        self._settings, self._weights = json.loads(json.dumps(settings)), weights
        path = self.folder / _GOALS
        if not path.is_file():
            return None
        with _as_written(path):
            content = json.loads(path.read_text(encoding="utf-8"))
            found, dense = dict(content["settings"]), str(content["weights"])
            goals = {name: _goal(*entry) for name, entry in content["goals"].items()}
            chosen = Chosen(goals=goals, sensitivity=dict(content["sensitivity"]))
        differing = [
            f"{name} was {json.dumps(found.get(name))} and is {json.dumps(self._settings.get(name))}"
            for name in sorted(found.keys() | self._settings.keys())
            if found.get(name) != self._settings.get(name)
        ]
        if differing:
            raise ConfigError(
                f"{self.folder}: cannot go on with other settings: {'; '.join(differing)}. Use the old ones, or "
                "another folder."
            )
        if dense != weights:
            raise ConfigError(
                f"{self.folder}: the model has other weights than the dense model that this run began with. It was "
                "pruned since, or is another model. Load the dense model again, or use another folder."
            )
        return chosen

    def begin(self, chosen: Chosen) -> None:
        """Save the goals of a new run."""
        goals = {name: _entry(goal) for name, goal in chosen.goals.items()}
        content = {
            "settings": self._settings, "weights": self._weights, "goals": goals, "sensitivity": chosen.sensitivity
        }  # fmt: skip
        atomic_write(self.folder / _GOALS, json.dumps(content, indent=1) + "\n")

    def save(
        self,
        visit: BlockVisit,
        windows: WindowDataset | Tensor,
        rows: list[MatrixResult],
        quantized: Mapping[str, QuantizedMatrix],
    ) -> None:
        """Finish a block, and save what was made of it.

        Args:
            rows: of this block.
            quantized: of all blocks so far; those of this one are saved.
        Raises:
            OutputError: it could not be written; the blocks before are as they were.
        """
        codes = {row.name: quantized[row.name] for row in rows if row.name in quantized}
        if codes:
            tensors = {f"{name}.codes": matrix.codes for name, matrix in codes.items()}
            tensors |= {f"{name}.scales": matrix.scales for name, matrix in codes.items()}
            about = {name: [matrix.bits, matrix.group] for name, matrix in codes.items()}
            with atomic_file(self._codes(visit.index)) as path:
                save_file(
                    {name: tensor.contiguous() for name, tensor in tensors.items()}, path, {"about": json.dumps(about)}
                )
        text = json.dumps([dataclasses.asdict(row) for row in rows], indent=1)
        atomic_write(self._rows(visit.index), text + "\n")
        save_walk(self.folder, visit, windows)

    def restore(
        self, stack: BlockStack, windows: WindowDataset | Tensor
    ) -> tuple[WalkState | None, list[MatrixResult], dict[str, QuantizedMatrix]]:
        """Put the weights of the finished blocks back into the model.

        Returns:
            Where the walk goes on (None: at the start), the rows and the codes of the finished blocks.
        Raises:
            ConfigError: the saved run had other windows or another model.
            FormatError: a file is damaged or missing.
        """
        state = load_walk(self.folder, stack, windows)
        rows: list[MatrixResult] = []
        quantized: dict[str, QuantizedMatrix] = {}
        for index in range(0 if state is None else state.next_block):
            path = self._rows(index)
            with _as_written(path):
                for row in json.loads(path.read_text(encoding="utf-8")):
                    rows.append(MatrixResult(**{**row, "shape": tuple(row["shape"])}))
            if self._codes(index).is_file():
                quantized |= _read_codes(self._codes(index))
        return state, rows, quantized

    def remove(self) -> None:
        """Remove the folder: the run is finished, and its result is kept elsewhere."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def _rows(self, index: int) -> Path:
        return self.folder / f"block-{index}.json"

    def _codes(self, index: int) -> Path:
        return self.folder / f"block-{index}.codes.safetensors"


def has_finished_blocks(folder: Path) -> bool:
    """Whether an interrupted run in this folder has something to go on with."""
    return any(folder.glob("block-*.json"))


def _entry(goal: Goal) -> tuple[str, str | None, float]:
    return goal.pattern.name, getattr(goal.pattern, "scope", None), goal.sparsity


def _goal(pattern: str, scope: str | None, sparsity: float) -> Goal:
    return Goal(parse_pattern(pattern) if scope is None else Unstructured(scope), sparsity)


@contextmanager
def _as_written(path: Path) -> Iterator[None]:
    """Whatever goes wrong while a file is read and taken apart says that it is not as it was written."""
    try:
        yield
    except KeyError as error:
        raise FormatError(
            f"{path}: has no {error}: it is damaged, or of an older version of hf_adaptive_sparse. Remove the folder "
            "and start again."
        ) from error
    except (OSError, SafetensorError, SparsityError, ValueError, TypeError, AttributeError) as error:
        what = str(error).rstrip(".")
        raise FormatError(f"{path}: cannot be read ({what}). Remove the folder and start again.") from error


def _read_codes(path: Path) -> dict[str, QuantizedMatrix]:
    with _as_written(path), safe_open(path, "pt") as file:
        about = json.loads((file.metadata() or {})["about"])
        return {
            name: QuantizedMatrix(file.get_tensor(f"{name}.codes"), file.get_tensor(f"{name}.scales"), bits, group)
            for name, (bits, group) in about.items()
        }
