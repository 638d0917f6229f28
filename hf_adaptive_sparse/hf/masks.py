"""Masks without weights: saved from a sparse model, and applied to the dense one that it was made from.

A mask folder takes 0.67 bits per pruned weight of 2:4 (1 bit otherwise) and holds no weights, so that it may be shared
where those may not. Applying it only ever sets weights to zero: a model whose kept weights were trained is not given
back by it.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.pytorch_utils import Conv1D
from transformers.utils import logging

from ..errors import ConfigError, PatternError
from ..formats import mask_bits
from ..formats.two_four import dtype_name
from ..layers import PackedLinear
from .checkpoint import Checkpoint
from .files import atomic_folder
from .mask_folder import Manifest, MaskEntry, write_mask_folder
from .packable import refuse_adapters
from .pretrained import producer
from .tensor_files import digest_of_tensor

logger = logging.get_logger(__name__)

# Of config.json: what says nothing about the weights, or differs between versions of transformers.
_NOT_COMPARED = {
    "_name_or_path", "transformers_version", "dtype", "torch_dtype", "quantization_config", "adaptive_sparse",
    "use_cache", "architectures", "auto_map", "bos_token_id", "eos_token_id", "pad_token_id", "id2label", "label2id",
    "torchscript", "return_dict", "output_hidden_states", "output_attentions", "chunk_size_feed_forward",
    "problem_type", "is_encoder_decoder", "tie_word_embeddings", "pretraining_tp", "initializer_range",
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class SavedMasks:
    """What `save_masks` wrote.

    Args:
        masks: names of the weights, and the fraction of zeros of each.
        bits_bytes: what all bits take.
        kept_weights: "equal" to those of the base, "trained", or "unknown" if no base was there to be compared.
        differing: weights that differ from the base where they are kept, or have no mask, and in how many places.
    """

    folder: Path
    masks: Mapping[str, float]
    bits_bytes: int
    kept_weights: str
    differing: Mapping[str, int]

    @property
    def caution(self) -> str | None:
        """What must be known before these masks are given to somebody; None if they give the model back."""
        if self.kept_weights == "equal":
            return None
        if self.kept_weights == "unknown":
            return (
                "the masks were not compared with a base model: if the kept weights were trained, masks alone do not "
                "give this model back. Name the base to find out"
            )
        name, count = next(iter(self.differing.items()))
        return (
            f"masks alone do not give this model back: {len(self.differing)} of its weights differ from the base where "
            f"they are kept ({name} in {count:,} places). Applied to the base they give a pruned model that was never "
            f"trained; share a packed or dense-stored model instead"
        )


def save_masks(
    model: PreTrainedModel,
    folder: str | os.PathLike,
    *,
    base: PreTrainedModel | str | os.PathLike | None = None,
    base_revision: str | None = None,
    min_sparsity: float = 0.01,
    overwrite: bool = False,
) -> SavedMasks:
    """Save which weights of a model are not zero, and nothing of their values. The model is not changed.

    Args:
        model: of transformers, with adapters merged; packed layers and Conv1D too.
        folder: appears whole or not at all.
        base: the dense model that it was made from, or its folder or Hub id, which is loaded beside `model`. Its
            weights are compared with those of `model`, and their digests stored, so that no other gets these masks.
        base_revision: of a Hub id.
        min_sparsity: weights with a smaller fraction of zeros get no mask.
        overwrite: replace a folder that is not empty.
    Raises:
        ConfigError: the model has adapters in it, or `base` has other weights or shapes.
        PatternError: no weight has that many zeros.
        OutputError: the folder is not empty, or could not be written.
    """
    refuse_adapters(model, "save_masks")
    base_name = None if base is None else base.name_or_path if isinstance(base, PreTrainedModel) else str(base)
    if base is not None and not isinstance(base, PreTrainedModel):
        base = AutoModelForCausalLM.from_pretrained(base, dtype="auto", revision=base_revision)
    checkpoint, before = Checkpoint(model, {}), None if base is None else Checkpoint(base, {})
    transposed = _transposed(model)
    entries, encoded, sparsities, differing = {}, {}, {}, {}
    for name, weight, original in _weights(checkpoint, before):
        keep = weight != 0
        sparsity = 1.0 - int(keep.count_nonzero()) / keep.numel()
        has_mask = weight.ndim >= 2 and sparsity >= min_sparsity and name not in _embeddings(model)
        if original is not None:
            expected = original.masked_fill(~keep, 0.0) if has_mask else original
            count = int((expected != weight).count_nonzero())
            differing |= {name: count} if count else {}
        if not has_mask:
            continue
        matrix = keep.t() if name in transposed else keep.flatten(0, -2)
        encoded[name] = mask_bits.encode(matrix.contiguous())
        entries[name] = MaskEntry(
            shape=tuple(weight.shape), transposed=name in transposed, encoding=encoded[name].encoding,
            kept=int(keep.count_nonzero()), dtype=dtype_name(weight.dtype), result_digest=digest(name, weight),
            base_dtype=None if original is None else dtype_name(original.dtype),
            base_digest=None if original is None else digest(name, original),
        )  # fmt: skip
        sparsities[name] = sparsity
    if not entries:
        raise PatternError(
            f"{type(model).__name__}: none of its weights has {min_sparsity:.0%} zeros or more, so there are no masks. "
            f"Train or prune the model first."
        )
    kept_weights = "unknown" if base is None else "trained" if differing else "equal"
    is_local = base_name is not None and Path(base_name).exists()
    about = {
        # Not the path: a mask folder is made to be shared.
        "name": Path(base_name).resolve().name if base_name and is_local else base_name or None,
        "is_local": is_local,
        "revision": base_revision or getattr(getattr(base, "config", None), "_commit_hash", None),
        "config": config_of(model if base is None else base),
    }
    with atomic_folder(folder, overwrite) as temporary:
        manifest = Manifest(base=about, kept_weights=kept_weights, masks=entries)
        nbytes = write_mask_folder(temporary, manifest, encoded, producer())
    saved = SavedMasks(
        folder=Path(folder), masks=sparsities, bits_bytes=nbytes, kept_weights=kept_weights, differing=differing
    )
    if saved.caution is not None:
        logger.warning(f"{folder}: {saved.caution}.")
    return saved


def _weights(checkpoint: Checkpoint, before: Checkpoint | None) -> Iterator[tuple[str, Tensor, Tensor | None]]:
    """Name, weight with every zero as +0.0, and the weight of the base: one after the other."""
    if before is not None and before.layout.keys() != checkpoint.layout.keys():
        name = min(before.layout.keys() ^ checkpoint.layout.keys())
        whose = "only the base" if name in before.layout else "only the sparse model"
        raise ConfigError(f"save_masks: {whose} has a weight {name}. Name the model that the sparse one was made from.")
    for name, (dtype, shape) in checkpoint.layout.items():
        if not dtype.is_floating_point:
            continue
        original = None if before is None else before.load(name).detach().cpu()
        if original is not None and tuple(original.shape) != tuple(shape):
            raise ConfigError(
                f"save_masks: {name} is {list(shape)}, and {list(original.shape)} in the base. Name the model that the "
                f"sparse one was made from."
            )
        weight = checkpoint.load(name).detach().cpu()
        yield name, weight.masked_fill(weight == 0, 0.0), original


def _transposed(model: nn.Module) -> set[str]:
    """Names of the weights that are stored [in, out]."""
    return {
        f"{name}.weight" for name, module in model.named_modules()
        if isinstance(module, Conv1D) or (isinstance(module, PackedLinear) and module.transposed)
    }  # fmt: skip


def _embeddings(model: nn.Module) -> set[str]:
    return {f"{name}.weight" for name, module in model.named_modules() if isinstance(module, nn.Embedding)}


def digest(name: str, tensor: Tensor) -> str:
    return digest_of_tensor(name, tensor.contiguous())


def config_of(model: PreTrainedModel) -> dict[str, Any]:
    """What config.json says about the architecture."""
    return _comparable({key: value for key, value in model.config.to_dict().items() if key not in _NOT_COMPARED})


def _comparable(value: Any) -> Any:
    """As it comes back from JSON."""
    if isinstance(value, Mapping):
        return {str(key): _comparable(each) for key, each in value.items() if key not in _NOT_COMPARED}
    if isinstance(value, (list, tuple)):
        return [_comparable(each) for each in value]
    return value if isinstance(value, (str, int, float, bool, type(None))) else str(value)
