"""A walk that can be killed: what is finished is on the disk, block by block."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from ..errors import ConfigError, FormatError
from .blocks import BlockStack
from .data import WindowDataset
from .files import atomic_file
from .tensor_files import digest_of_digests, digest_of_tensor
from .visits import BlockVisit, WalkState

_STATE = "state.safetensors"


def save_walk(folder: str | os.PathLike, visit: BlockVisit, windows: WindowDataset | Tensor, note: str = "") -> None:
    """Finish a block and save its weights, and then the hidden states that the next block reads.

    The file of the hidden states takes the place of that of the block before in one step, so whenever the process is
    killed, `load_walk` finds a finished block with what belongs to it.

    Args:
        folder: of the run; made if missing.
        windows: that the walk was given.
        note: what else must be the same when the run goes on, for example its settings as text.
    Raises:
        OutputError: it could not be written; what was saved before is as it was.
    """
    state = visit.finish()
    weights = {name: parameter.detach().contiguous() for name, parameter in visit.block.named_parameters()}
    with atomic_file(Path(folder, f"block-{visit.index}.safetensors")) as path:
        save_file(weights, path)
    tensors = {"hidden": state.hidden} | ({} if state.dense is None else {"dense": state.dense})
    progress = {"next_block": state.next_block, "windows": windows_digest(windows), "note": note}
    with atomic_file(Path(folder, _STATE)) as path:
        save_file(tensors, path, metadata={"progress": json.dumps(progress)})


def load_walk(
    folder: str | os.PathLike, stack: BlockStack, windows: WindowDataset | Tensor, note: str = ""
) -> WalkState | None:
    """Put the weights of the finished blocks back into the model.

    Args:
        stack: of the model as it was when the run began.
        windows, note: as they were saved.
    Returns:
        For `walk_blocks(..., start_block=state.next_block, hidden=state)`; None where nothing was saved.
    Raises:
        ConfigError: the saved run had other windows, another note or another model.
        FormatError: a file is damaged or missing.
    """
    path = Path(folder, _STATE)
    if not path.is_file():
        return None
    tensors, progress = _read(path)
    if lacking := [name for name in ("windows", "note", "next_block") if name not in progress]:
        raise FormatError(f"{path}: has no {', '.join(lacking)} in its metadata. Remove the folder and start again.")
    if "hidden" not in tensors:
        raise FormatError(f"{path}: holds no hidden states. Remove the folder and start again.")
    for key, given, what in (("windows", windows_digest(windows), "other windows"), ("note", note, "other settings")):
        if progress[key] != given:
            raise ConfigError(
                f"{path}: is of a run with {what} ({progress[key]!r}, now {given!r}). Resume with the same, or choose "
                "another folder."
            )
    for index in range(progress["next_block"]):
        _restore(Path(folder, f"block-{index}.safetensors"), stack, index)
    return WalkState(progress["next_block"], tensors["hidden"], tensors.get("dense"))


def _read(path: Path) -> tuple[dict[str, Tensor], dict]:
    try:
        with safe_open(path, "pt") as file:
            progress = json.loads((file.metadata() or {}).get("progress", "{}"))
            return {name: file.get_tensor(name) for name in file.keys()}, progress
    except (OSError, SafetensorError, ValueError) as error:
        raise FormatError(f"{path}: cannot be read ({error}). Remove the folder and start again.") from error


@torch.no_grad()
def _restore(path: Path, stack: BlockStack, index: int) -> None:
    tensors, _ = _read(path)
    parameters = dict(stack.blocks[index].named_parameters()) if index < len(stack.blocks) else {}
    if {name: tensor.shape for name, tensor in tensors.items()} != {name: p.shape for name, p in parameters.items()}:
        raise ConfigError(f"{path}: is not of {stack.block_name(index)}. The saved run pruned another model.")
    for name, parameter in parameters.items():
        parameter.copy_(tensors[name])


def windows_digest(windows: WindowDataset | Tensor) -> str:
    """16 hex digits that tell windows of tokens from others."""
    tokens = windows.tokens if isinstance(windows, WindowDataset) else windows
    content = tokens.to("cpu", torch.int64).contiguous().numpy().tobytes()
    return hashlib.sha256(f"{list(tokens.shape)}".encode() + content).hexdigest()[:16]


def weights_digest(model: nn.Module) -> str:
    """32 hex digits that tell the parameters of a model from others: of their names, dtypes, shapes and bytes.

    All of them, since embeddings and norms decide what the layers to be pruned are given.
    """
    # One core reads 0.4 GB of float32 weights in 0.15 s (100M parameters) and those of stories3M in 2 ms, where the
    # fastest pruning takes 5.8 s on 512 tokens and 15 s on 32768: far below a tenth, at every start with a progress.
    return digest_of_digests({name: digest_of_tensor(name, parameter) for name, parameter in model.named_parameters()})
