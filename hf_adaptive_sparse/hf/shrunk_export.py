"""Saving shrunk models so that `from_pretrained` opens them: `export_shrunk`."""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel

from ..formats.two_four import dtype_name
from . import shrunk_models
from .checkpoint import Checkpoint
from .files import atomic_folder
from .packable import refuse_adapters
from .shrunk_forms import choose_form
from .shrunk_manifest import KEY, manifest_to_json
from .shrunk_source import Layout, read_source
from .surgery import block_widths
from .tensor_files import write_tensors
from .units import find_axes

_INDEX_NAME = "model.safetensors.index.json"
# Of one tensor: along which dimension, from which positions, to which positions of one that has more.
Placed = dict[str, tuple[int, Tensor, Tensor]]


@dataclass(frozen=True, kw_only=True)
class ExportResult:
    """What `export_shrunk` wrote.

    Attributes:
        form: "stock", "per_layer" or "padded".
        model_type: that `config.json` says.
        architecture: the class that `from_pretrained` builds.
        widths: of every block as saved, by the names of Llama's config.
        parameters: numbers in all tensors, tied ones once.
        total_bytes: what they take in the folder.
        refused: what was tried before, and why it was not taken: {"llama": "LlamaConfig refuses: ..."}.
    """

    folder: Path
    form: str
    model_type: str
    architecture: str
    widths: tuple[dict[str, int], ...]
    parameters: int
    total_bytes: int
    refused: dict[str, str]


def export_shrunk(
    model: PreTrainedModel,
    folder: str | os.PathLike,
    *,
    form: str = "auto",
    multiple_of: int = 1,
    manifest: Mapping[str, Any] | None = None,
    remote_code: bool = False,
    tokenizer: Any = None,
    generation_config: GenerationConfig | None = None,
    max_shard_size: int | str = "5GB",
    overwrite: bool = False,
) -> ExportResult:
    """Save a model from which units were removed, as a folder that `from_pretrained` opens. It is not changed.

    Three forms hold it. "stock" and "per_layer" have the same weights and the same logits to the last bit; zeros that
    are added change no sum, only, where matrices are summed in another order for it, the rounding.

    - "stock": all blocks have the same widths. A checkpoint of the same architecture, or, where its config refuses
      the number of heads, of a sibling that computes the same (Llama as Mistral without a window). Opens everywhere.
    - "per_layer": any widths, of the families that this package declares. `config.json` has `per_layer_config`; opens
      after `import hf_adaptive_sparse`, and with `remote_code` also by `trust_remote_code=True` without this package.
    - "padded": every block as wide as the widest, with zeros. A stock checkpoint, no smaller and no faster than one
      with all blocks as wide.

    A bias that the stock class does not have (what FLAP leaves in o_proj and down_proj) is saved where the config can
    ask for it, with zeros in the other linears that get one by that; "per_layer" can always.

    Args:
        model: a causal language model of transformers whose units `remove_units` removed; also one that was loaded
            from such a folder.
        folder: appears whole or not at all.
        form: one of these three, or "auto": "stock" if it can be, else "per_layer".
        multiple_of: MLP widths are rounded up to a multiple of it with channels of zeros; 64 or 128 suits a GPU.
        manifest: how the model was made: "kept" (axis -> kept units of the parent, indices or bool), method, seed,
            digest of the parent; `config.json` keeps it, and `shrunk_manifest` reads it. Default: that with which the
            model was loaded, unless units were removed since: it does not say which are left.
        remote_code: put the code of the class beside the weights.
        tokenizer: or processor, saved beside the model.
        generation_config: default: that of the model.
        max_shard_size: of one weight file, as for `save_pretrained`.
        overwrite: replace a folder that is not empty.
    Raises:
        ConfigError: the form cannot hold the model, which is said of every config that was tried; or the model has
            adapters, or the manifest is no JSON, or `remote_code` is asked for with a stock form.
        TargetError: the structure of the model's family is not declared.
        OutputError: the folder is not empty, or could not be written.
    """
    refuse_adapters(model, "export_shrunk")
    source = read_source(model)
    chosen = choose_form(source, form, multiple_of, remote_code)
    skeleton = chosen.skeleton
    placed = _placed(model, skeleton)
    checkpoint, config = Checkpoint(model, {}), skeleton.config
    dtypes = {name: dtype for name, (dtype, _) in checkpoint.layout.items()}
    shapes = {name: shape for name, (_, shape) in Checkpoint(skeleton, {}).layout.items()}
    layout = {name: (dtypes.get(name, model.dtype), shape) for name, shape in shapes.items()}
    config.architectures, config.dtype = [type(skeleton).__name__], dtype_name(model.dtype)
    stored = getattr(model.config, KEY, None) if manifest is None else manifest_to_json(manifest)
    if stored is not None:
        setattr(config, KEY, stored)
    if remote_code:
        module = Path(shrunk_models.__file__).stem
        names = {"AutoConfig": type(config).__name__, "AutoModelForCausalLM": type(skeleton).__name__}
        config.auto_map = {auto: f"{module}.{name}" for auto, name in names.items()}

    def load(name: str) -> Tensor:
        dtype, shape = layout[name]
        if name not in checkpoint.layout:
            return torch.zeros(shape, dtype=dtype)
        tensor = checkpoint.load(name).detach()
        return tensor if tensor.shape == shape else _enlarged(tensor, shape, *placed[name])

    with atomic_folder(folder, overwrite) as temporary:
        config.save_pretrained(temporary)
        (generation_config or model.generation_config).save_pretrained(temporary)
        if tokenizer is not None:
            tokenizer.save_pretrained(temporary)
        if remote_code:
            shutil.copy(shrunk_models.__file__, temporary)
        _write_weights(temporary, layout, load, max_shard_size)
    return ExportResult(
        folder=Path(folder),
        form=chosen.name,
        model_type=config.model_type,
        architecture=type(skeleton).__name__,
        widths=tuple(block_widths(skeleton)),
        parameters=sum(math.prod(shape) for _, shape in layout.values()),
        total_bytes=sum(math.prod(shape) * dtype.itemsize for dtype, shape in layout.values()),
        refused=chosen.refused,
    )


def _placed(model: PreTrainedModel, skeleton: PreTrainedModel) -> Placed:
    """Where the units of every tensor lie in the model, and where in the skeleton, which may have more of them."""
    placed = {}
    for axis, wider in zip(find_axes(model), find_axes(skeleton), strict=True):
        places = {span.tensor: span.index for span in wider.spans}
        for span in axis.spans:
            placed[span.tensor] = span.dim, span.index.flatten(), places[span.tensor][: axis.count].flatten()
    return placed


def _enlarged(tensor: Tensor, shape: tuple[int, ...], dim: int, positions: Tensor, places: Tensor) -> Tensor:
    zeros = torch.zeros(shape, dtype=tensor.dtype, device=tensor.device)
    return zeros.index_copy_(dim, places.to(tensor.device), tensor.index_select(dim, positions.to(tensor.device)))


def _write_weights(folder: Path, layout: Layout, load: Any, max_shard_size: int | str) -> None:
    # Tensors without data have a name and a size, which is all that is asked of them.
    empty = {name: torch.empty(shape, dtype=dtype, device="meta") for name, (dtype, shape) in layout.items()}
    split = split_torch_state_dict_into_shards(
        empty, filename_pattern="model{suffix}.safetensors", max_shard_size=max_shard_size
    )
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        (folder / _INDEX_NAME).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", "utf-8")
    for file, names in split.filename_to_tensors.items():
        write_tensors(folder / file, {name: layout[name] for name in names}, load, {"format": "pt"})
