"""Start training from weights that were pruned in one shot, with the dense model still there as the teacher."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..errors import PatternError, TargetError
from ..patterns import NMPattern, parse_pattern
from ..saliency import SALIENCY
from .packed_modules import LINEAR_TYPES, linear_weight
from .sparse_layers import sparse_layers


@torch.no_grad()
def warm_start(model: nn.Module, pruned: PreTrainedModel | Mapping[str, Tensor], adapter: str | None = None) -> int:
    """Give every sparse layer the weight and the mask of a pruned model.

    Args:
        model: with an adapter of this package on the dense model; its dense weights are not touched.
        pruned: the same architecture after `one_shot` (or loaded from a folder, packed ones too), or its weights
            [out, in] by name of the layer.
        adapter: which one (default: the active ones).
    Returns:
        How many layers were set.
    Raises:
        TargetError: a sparse layer has no counterpart, or one of another shape.
        PatternError: a weight is not of the adapter's pattern.
    """
    layers = sparse_layers(model, adapter)
    weights = {layer.name: _weight(pruned, layer.name) for layer in layers}
    for layer in layers:
        weight, pattern = weights[layer.name], parse_pattern(layer.config.pattern)
        if weight is None or weight.shape != layer.keep.shape:
            found = "no such linear layer" if weight is None else f"one of shape {list(weight.shape)}"
            raise TargetError(
                f"{layer.name}: the pruned model has {found}, needed is {list(layer.keep.shape)}. Start from a pruned "
                "copy of the same model."
            )
        assert isinstance(pattern, NMPattern)
        violation = pattern.first_violation(weight)
        if violation is not None:
            raise PatternError(
                f"{layer.name}: row {violation[0]}, group {violation[1]} of the pruned weight is not {pattern.name}. "
                f"Prune the model to {pattern.name} first, or exclude the layer from the adapter."
            )
    for layer in layers:
        weight = weights[layer.name]
        assert weight is not None
        layer.weight.copy_(weight)
        # By the adapter's own score, which keeps what is not zero and fills up groups that keep too few.
        layer.keep.copy_(parse_pattern(layer.config.pattern).keep_mask(SALIENCY[layer.config.saliency](layer.weight)))
    return len(layers)


def _weight(pruned: PreTrainedModel | Mapping[str, Tensor], name: str) -> Tensor | None:
    if isinstance(pruned, Mapping):
        return pruned.get(name)
    module = dict(pruned.named_modules()).get(name)
    if not isinstance(module, LINEAR_TYPES):
        return None
    return linear_weight(pruned, name, module)
