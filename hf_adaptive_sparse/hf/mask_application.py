"""Applying masks to the dense model that they are for: every check first, then zeros, and nothing else."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.utils import logging

from ..errors import ConfigError, FormatError, TargetError
from ..formats.two_four import dtype_name
from ..layers import PackedLinear
from .mask_folder import MaskFolder
from .mask_sources import MaskSource, open_masks
from .masks import config_of, digest
from .packable import refuse_adapters

logger = logging.get_logger(__name__)

_REMEDY = "Load that model, or apply the masks all the same with check=False (--check-base=false)."


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
    refuse_adapters(model, "apply_masks")
    if check and source.folder is not None:
        _check_config(model, source.folder)
    parameters = _targets(model, source)
    if check and source.folder is not None:
        _check_weights(source.folder, parameters)
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
            f"{masks}: the kept weights of this model are not those of the sparse model that the masks are from, which "
            "was trained further, or made from another base. This is a pruned model of its own."
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
        base: folder or Hub id; default: the Hub id that the masks name, at the revision that they name.
        options: for `AutoModelForCausalLM.from_pretrained`; dtype is "auto" unless given.
    Raises:
        ConfigError: no base is named, or it cannot be loaded, or is another one.
        FormatError: the masks are damaged, or do not fit.
    """
    source = open_masks(masks, revision)
    about = {} if source.folder is None else source.folder.manifest.base
    name = base if base is not None else None if about.get("is_local") else about.get("name")
    if not name:
        is_local = about.get("is_local")
        found = f"is for a folder called {about['name']}" if is_local else "does not say which model it is for"
        raise ConfigError(f"{masks}: {found}. Name it: base=...")
    if base is None and about.get("revision"):
        options = {"revision": about["revision"], **options}
    try:
        model = AutoModelForCausalLM.from_pretrained(name, **{"dtype": "auto", **options})
    except (OSError, ValueError) as problem:
        reason = (str(problem).strip() or type(problem).__name__).splitlines()[0]
        raise ConfigError(f"{name}: cannot load the base model of {masks}: {reason}") from problem
    apply_masks(model, masks, revision=revision, check=check)
    return model.eval()


def _targets(model: PreTrainedModel, source: MaskSource) -> dict[str, nn.Parameter]:
    """The parameters that masks are for; all of them exist, in these shapes, in memory."""
    if any(isinstance(module, PackedLinear) for module in model.modules()):
        raise ConfigError("apply_masks: the model has packed layers. Apply masks to its dense base model.")
    found, parameters = dict(model.named_parameters(remove_duplicate=False)), {}
    for name in source.names:
        parameter = found.get(name)
        if parameter is None:
            raise FormatError(
                f"{source.path}: has a mask for {name}, and {type(model).__name__} has no such weight. The masks are "
                "of another model."
            )
        if parameter.is_meta:
            raise ConfigError(f"apply_masks: {name} is offloaded. Load the model so that it fits in memory.")
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


def _check_config(model: PreTrainedModel, folder: MaskFolder) -> None:
    stored, found = folder.manifest.base["config"], config_of(model)
    differing = [
        f"{key} is {found[key]!r}, there {stored[key]!r}"
        for key in sorted(stored.keys() & found.keys()) if stored[key] != found[key]
    ]  # fmt: skip
    if differing:
        raise ConfigError(
            f"{folder.path}: the masks are for {_base_name(folder)}, whose configuration differs: "
            f"{'; '.join(differing[:3])}. {_REMEDY}"
        )


def _check_weights(folder: MaskFolder, parameters: Mapping[str, nn.Parameter]) -> None:
    for key, parameter in parameters.items():
        entry = folder.manifest.masks[key]
        if entry.base_digest is None or entry.base_dtype is None:
            continue
        digest = _digest_as(key, parameter, entry.base_dtype)
        if digest is None:
            raise ConfigError(
                f"{folder.path}: the masks were saved for {key} in {entry.base_dtype}, and it is "
                f"{dtype_name(parameter.dtype)} here, so that the two cannot be compared. Load the model in "
                f"{entry.base_dtype}, or do not compare, with check=False (--check-base=false)."
            )
        if digest != entry.base_digest:
            raise ConfigError(
                f"{folder.path}: the masks are for {_base_name(folder)}, whose {key} has other values. {_REMEDY}"
            )


def _base_name(folder: MaskFolder) -> str:
    return str(folder.manifest.base.get("name") or "the model that they were saved from")


def _digest_as(name: str, tensor: Tensor, dtype: str) -> str | None:
    """The digest that a tensor has in another dtype, with every zero as +0.0 left as it is; None if values change."""
    cast = tensor.detach().cpu().to(getattr(torch, dtype))
    return digest(name, cast) if torch.equal(cast.to(tensor.dtype), tensor.detach().cpu()) else None
