"""What a checkpoint of the Trainer needs besides its own files: earlier masks, and a mark of completeness."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from ..errors import FormatError
from ..methods.learned_masks import MaskTrack

STATE_FILE = "adaptive_sparse_state.safetensors"
COMPLETE_FILE = "adaptive_sparse_complete.json"
KINDS = ("previous", "start")


def save_masks(folder: Path, tracks: Iterable[MaskTrack], identity: dict[str, str]) -> None:
    """Write the start and previous masks of all layers, 1 bit per weight.

    Args:
        identity: tells this checkpoint from others; `load_masks` asks for the same.
    """
    tensors = {f"{track.name}.{kind}": _to_bits(getattr(track, kind)) for track in tracks for kind in KINDS}
    save_file(tensors, folder / STATE_FILE, metadata=identity)


def load_masks(
    folder: Path, keeps: dict[str, Tensor], identity: dict[str, str]
) -> tuple[dict[str, Tensor], dict[str, Tensor]] | None:
    """(previous, start) masks by layer; None if this is not the checkpoint that is looked for.

    Args:
        keeps: the present masks, whose shapes and devices are taken.
    Raises:
        FormatError: the file lacks masks of these layers.
    """
    file = folder / STATE_FILE
    if not file.is_file():
        return None
    with safe_open(file, "pt") as stored:
        if stored.metadata() != identity:
            return None
        names = set(stored.keys())
        missing = [name for name in keeps for kind in KINDS if f"{name}.{kind}" not in names]
        if missing:
            raise FormatError(
                f"{file} has no masks of {missing[0]}: it is that of another model, or damaged. Resume from "
                "another checkpoint."
            )
        previous, start = (
            {
                name: _from_bits(stored.get_tensor(f"{name}.{kind}"), keep.shape).to(keep.device)
                for name, keep in keeps.items()
            }
            for kind in KINDS
        )
    return previous, start


def mark_complete(folder: Path, step: int) -> None:
    """Write the last file of a checkpoint; without it, or without a file that it names, it is incomplete."""
    files = sorted(file.relative_to(folder).as_posix() for file in folder.rglob("*") if file.is_file())
    marker = {"global_step": step, "files": [name for name in files if name != COMPLETE_FILE]}
    (folder / COMPLETE_FILE).write_text(json.dumps(marker))


def mark_incomplete(folder: Path) -> None:
    """Before a checkpoint is written over."""
    (folder / COMPLETE_FILE).unlink(missing_ok=True)


def last_complete_checkpoint(output_dir: str | Path) -> Path | None:
    """The newest checkpoint under `output_dir` that was written to its end and not deleted since, or None."""
    steps = {
        int(name[1]): marker.parent
        for marker in Path(output_dir).glob(f"checkpoint-*/{COMPLETE_FILE}")
        if (name := re.fullmatch(r"checkpoint-(\d+)", marker.parent.name)) and _is_complete(marker)
    }
    return steps[max(steps)] if steps else None


def _is_complete(marker: Path) -> bool:
    try:
        files = json.loads(marker.read_text())["files"]
    except json.JSONDecodeError:  # cut short itself
        return False
    return all((marker.parent / name).is_file() for name in files)


def _to_bits(keep: Tensor) -> Tensor:
    flat = keep.detach().cpu().reshape(-1)
    padded = torch.cat([flat, flat.new_zeros(-len(flat) % 8)]).view(-1, 8)
    return (padded.to(torch.uint8) << torch.arange(8, dtype=torch.uint8)).sum(dim=1, dtype=torch.uint8)


def _from_bits(bits: Tensor, shape: torch.Size) -> Tensor:
    unpacked = (bits[:, None] >> torch.arange(8, dtype=torch.uint8)) & 1
    return unpacked.bool().reshape(-1)[: shape.numel()].view(shape)
