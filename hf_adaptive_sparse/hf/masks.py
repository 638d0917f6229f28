"""Masks without weights: saved from a sparse model, and applied to the dense one that it was made from.

A mask folder takes 0.67 bits per pruned weight of 2:4 (1 bit otherwise) and holds no weights, so that it may be shared
where those may not. Applying it only ever sets weights to zero: a model whose kept weights were trained is not given
back by it.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.pytorch_utils import Conv1D
from transformers.utils import logging

from ..errors import ConfigError, FormatError, PatternError, TargetError
from ..formats import mask_bits
from ..formats.two_four import dtype_name
from ..layers import PackedLinear
from .checkpoint import Checkpoint
from .files import atomic_folder
from .mask_folder import Manifest, MaskEntry, MaskFolder, write_mask_folder
from .mask_sources import MaskSource, open_masks
from .packable import refuse_adapters
from .pretrained import producer
from .tensor_files import digest_of_tensor

logger = logging.get_logger(__name__)

# Of config.json: what says nothing about the weights, or differs between versions of transformers.
_NOT_COMPARED = {
    "_name_or_path", "transformers_version", "dtype", "torch_dtype", "quantization_config", "adaptive_sparse", "use_cache",
    "architectures", "auto_map", "bos_token_id", "eos_token_id", "pad_token_id", "id2label", "label2id", "torchscript",
    "return_dict", "output_hidden_states", "output_attentions", "chunk_size_feed_forward", "problem_type",
    "is_encoder_decoder", "tie_word_embeddings", "pretraining_tp", "initializer_range",
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


@dataclass(frozen=True, kw_only=True)
class AppliedMasks:
    """What `apply_masks` did.

    Args:
        format: of the masks.
        masks: names of the weights, and the fraction of zeros of each now.
        exact: whether these weights are now those of the sparse model, to the last bit; None if that cannot be told.
    """

    format: str
    masks: Mapping[str, float]
    exact: bool | None


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
        base: the dense model that it was made from, or its folder or Hub id, which is loaded beside `model`. Its weights
            are compared with those of `model`, and their digests are stored, so that masks are never applied to others.
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
            kept=int(keep.count_nonzero()), dtype=dtype_name(weight.dtype), result_digest=_digest(name, weight),
            base_dtype=None if original is None else dtype_name(original.dtype),
            base_digest=None if original is None else _digest(name, original),
        )  # fmt: skip
        sparsities[name] = sparsity
    if not entries:
        raise PatternError(
            f"{type(model).__name__}: none of its weights has {min_sparsity:.0%} zeros or more, so there are no masks. "
            f"Train or prune the model first."
        )
    kept_weights = "unknown" if base is None else "trained" if differing else "equal"
    about = {
        "name": base_name,
        "revision": base_revision or getattr(getattr(base, "config", None), "_commit_hash", None),
        "config": _config_of(model if base is None else base),
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


def apply_masks(
    model: PreTrainedModel, masks: str | os.PathLike, *, revision: str | None = None, check: bool = True
) -> AppliedMasks:
    """Set the weights of a dense model to zero that a mask does not keep, in place. No other weight is changed.

    Everything is checked before the first weight is touched.

    Args:
        model: of transformers, not packed.
        masks: folder or Hub id of masks; or masks of another tool: an .npz file of MaskLLM, or a .safetensors or .pt
            file of masks by the names of the weights.
        revision: of a Hub id.
        check: compare configuration and weights of `model` with those of the base that the masks are for.
    Raises:
        FormatError: the masks are damaged, or are for weights that the model does not have, or of other shapes.
        ConfigError: the model is not the base that they are for (names what differs), or is packed.
    """
    source = open_masks(masks, revision)
    parameters = _targets(model, source)
    if check and source.folder is not None:
        _check_base(model, source.folder, parameters)
    for name, parameter in parameters.items():
        source.load(name, tuple(parameter.shape))
    result: dict[str, float] = {}
    same = source.folder is not None
    for name, parameter in parameters.items():
        keep = source.load(name, tuple(parameter.shape)).to(parameter.device)
        with torch.no_grad():
            parameter.copy_(torch.where(keep, parameter, torch.zeros((), dtype=parameter.dtype)))
        result[name] = 1.0 - int(parameter.count_nonzero()) / parameter.numel()
        if source.folder is not None:
            entry = source.folder.manifest.masks[name]
            same = same and _digest_as(name, parameter, entry.dtype) == entry.result_digest
    exact = None if source.folder is None else same
    if exact is False:
        logger.warning(
            f"{masks}: the kept weights of this model are not those of the sparse model that the masks are from, which was "
            f"trained further, or made from another base. This is a pruned model of its own."
        )
    return AppliedMasks(format=source.format, masks=result, exact=exact)


def load_with_masks(
    masks: str | os.PathLike,
    base: str | os.PathLike | None = None,
    *,
    revision: str | None = None,
    check: bool = True,
    **options: Any,
) -> PreTrainedModel:
    """Load the base of a mask folder with `from_pretrained`, and apply the masks.

    Args:
        masks, revision, check: as for `apply_masks`.
        base: folder or Hub id; default: what the masks name, at the revision that they name.
        options: for `AutoModelForCausalLM.from_pretrained`; dtype is "auto" unless given.
    Raises:
        ConfigError: no base is named, or it cannot be loaded, or is another one.
        FormatError: the masks are damaged, or do not fit.
    """
    source = open_masks(masks, revision)
    about = {} if source.folder is None else source.folder.manifest.base
    name = base if base is not None else about.get("name")
    if not name:
        raise ConfigError(f"{masks}: does not say which model it is for. Name it: base=...")
    if base is None and about.get("revision"):
        options = {"revision": about["revision"], **options}
    try:
        model = AutoModelForCausalLM.from_pretrained(name, **{"dtype": "auto", **options})
    except (OSError, ValueError) as problem:
        reason = (str(problem).strip() or type(problem).__name__).splitlines()[0]
        raise ConfigError(f"{name}: cannot load the base model of {masks}: {reason}") from problem
    apply_masks(model, masks, revision=revision, check=check)
    return model.eval()


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


def _targets(model: PreTrainedModel, source: MaskSource) -> dict[str, nn.Parameter]:
    """The parameters that masks are for; all of them exist, in these shapes, in memory."""
    refuse_adapters(model, "apply_masks")
    if any(isinstance(module, PackedLinear) for module in model.modules()):
        raise ConfigError("apply_masks: the model has packed layers. Apply masks to its dense base model.")
    found, parameters = dict(model.named_parameters(remove_duplicate=False)), {}
    for name in source.names:
        parameter = found.get(name)
        if parameter is None:
            raise FormatError(
                f"{source.path}: has a mask for {name}, and {type(model).__name__} has no such weight. The masks are of "
                f"another model."
            )
        if parameter.is_meta:
            raise ConfigError(f"apply_masks: {name} is offloaded. Load the model with a device_map that keeps it in memory.")
        shape = source.shapes.get(name)
        if shape is not None and shape != tuple(parameter.shape):
            raise FormatError(
                f"{source.path}: the mask of {name} is {list(shape)}, the weight of this {type(model).__name__} is "
                f"{list(parameter.shape)}. The masks are of another model."
            )
        parameters[name] = parameter
    if not parameters:
        raise TargetError(f"{source.path}: holds no masks.")
    return parameters


def _check_base(model: PreTrainedModel, folder: MaskFolder, parameters: Mapping[str, nn.Parameter]) -> None:
    base = folder.manifest.base
    name = base.get("name") or "the model they were saved from"
    stored, found = base["config"], _config_of(model)
    differing = [
        f"{key} is {found[key]!r}, there {stored[key]!r}"
        for key in sorted(stored.keys() & found.keys()) if stored[key] != found[key]
    ]  # fmt: skip
    remedy = "Load that model, or apply the masks all the same with check=False (--check false)."
    if differing:
        raise ConfigError(
            f"{folder.path}: the masks are for {name}, whose configuration differs: {'; '.join(differing[:3])}. {remedy}"
        )
    for key, parameter in parameters.items():
        entry = folder.manifest.masks[key]
        if entry.base_digest is None or entry.base_dtype is None:
            continue
        digest = _digest_as(key, parameter, entry.base_dtype)
        if digest is None:
            raise ConfigError(
                f"{folder.path}: {key} was compared in {entry.base_dtype} when the masks were saved, and is "
                f"{dtype_name(parameter.dtype)} here, which cannot be compared. Load the model in {entry.base_dtype}, or "
                f"apply the masks without comparing, check=False (--check false)."
            )
        if digest != entry.base_digest:
            raise ConfigError(f"{folder.path}: the masks are for {name}, whose {key} has other values. {remedy}")


def _digest(name: str, tensor: Tensor) -> str:
    return digest_of_tensor(name, tensor.contiguous())


def _digest_as(name: str, tensor: Tensor, dtype: str) -> str | None:
    """The digest that a tensor has in another dtype, with every zero as +0.0 left as it is; None if values change."""
    cast = tensor.detach().cpu().to(getattr(torch, dtype))
    return _digest(name, cast) if torch.equal(cast.to(tensor.dtype), tensor.detach().cpu()) else None


def _config_of(model: PreTrainedModel) -> dict[str, Any]:
    """What config.json says about the architecture."""
    return _comparable({key: value for key, value in model.config.to_dict().items() if key not in _NOT_COMPARED})


def _comparable(value: Any) -> Any:
    """As it comes back from JSON."""
    if isinstance(value, Mapping):
        return {str(key): _comparable(each) for key, each in value.items() if key not in _NOT_COMPARED}
    if isinstance(value, (list, tuple)):
        return [_comparable(each) for each in value]
    return value if isinstance(value, (str, int, float, bool, type(None))) else str(value)
