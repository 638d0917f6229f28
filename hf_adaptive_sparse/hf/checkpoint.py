"""The tensors of a model as a checkpoint holds them: some linear layers packed, tied tensors once."""

from __future__ import annotations

import math

import torch
from huggingface_hub import StateDictSplit, split_torch_state_dict_into_shards
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from ..formats import FORMATS
from .integrity import WEIGHTS_NAME
from .packed_modules import linear_weight, packed_modules, resident

_FORMAT = FORMATS["2:4"]


class Checkpoint:
    """Names, dtypes and shapes of all tensors at once, their values one at a time.

    Args:
        packed: the 2:4 layers to pack, by name; all others are dense, also those packed in the model.
    """

    def __init__(self, model: PreTrainedModel, packed: dict[str, nn.Module]) -> None:
        self._model, self._packed, self._dense = model, packed, _dense_state(model)
        self._modules = packed_modules(model)
        self._last: tuple[str, tuple[Tensor, ...]] = ("", ())
        self.layout: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {}
        for name, tensor in self._dense.items():
            place, _, suffix = name.rpartition(".")
            if place in packed and suffix == "weight":
                rows, columns = tensor.shape[::-1] if _is_transposed(packed[place]) else tensor.shape
                self.layout[f"{place}.weight_values"] = tensor.dtype, (rows, columns // 2)
                self.layout[f"{place}.weight_meta"] = torch.uint8, (rows, columns // 8)
            else:
                self.layout[name] = tensor.dtype, tuple(tensor.shape)

    def load(self, name: str) -> Tensor:
        """The tensor of a name in `layout`; PatternError if it cannot be packed after all (NaN, inf)."""
        place, _, suffix = name.rpartition(".")
        if place in self._packed and suffix in _FORMAT.suffixes:
            if self._last[0] != place:  # both tensors of a layer are asked for, one after the other
                weight = linear_weight(self._model, place, self._packed[place])
                self._last = place, _FORMAT.pack(weight, place)
            return self._last[1][_FORMAT.suffixes.index(suffix)]
        module = self._modules.get(place)
        if module is not None and suffix == "weight":
            weight = linear_weight(self._model, place, module)
            return weight.t() if module.transposed else weight
        return resident(self._model, name, self._dense[name])

    def split(self, max_shard_size: int | str) -> StateDictSplit:
        """Which tensor goes into which file."""
        # Tensors without data have a name and a size, which is all that is asked of them.
        layout = self.layout.items()
        empty = {name: torch.empty(shape, dtype=dtype, device="meta") for name, (dtype, shape) in layout}
        pattern = WEIGHTS_NAME.replace(".safetensors", "{suffix}.safetensors")
        return split_torch_state_dict_into_shards(
            empty, filename_pattern=pattern, max_shard_size=max_shard_size
        )

    @property
    def stored_bytes(self) -> dict[str, int]:
        """Of every tensor of the checkpoint."""
        return {name: math.prod(shape) * dtype.itemsize for name, (dtype, shape) in self.layout.items()}

    @property
    def dense_bytes(self) -> dict[str, int]:
        """Of every tensor of the same checkpoint if no layer were packed."""
        return {name: tensor.nbytes for name, tensor in self._dense.items()}


def _is_transposed(module: nn.Module) -> bool:
    return isinstance(module, Conv1D) or getattr(module, "transposed", False)


def _dense_state(model: PreTrainedModel) -> dict[str, Tensor]:
    """As `model.state_dict()` of the same model without packed layers, and each tied tensor once.

    What is packed or offloaded is here without data, on the meta device.
    """
    modules, ignored = packed_modules(model), set(model._keys_to_ignore_on_save or ())
    state = {}
    for name, tensor in model.state_dict().items():
        place, _, suffix = name.rpartition(".")
        if place in modules and suffix == "weight_values":
            module = modules[place]
            shape = (module.out_features, module.in_features)
            shape = shape[::-1] if module.transposed else shape
            state[f"{place}.weight"] = torch.empty(shape, dtype=tensor.dtype, device="meta")
        elif place in modules and suffix == "weight":
            state[name] = tensor.t() if modules[place].transposed else tensor
        elif not (place in modules and suffix == "weight_meta") and name not in ignored:
            state[name] = tensor
    for target, source in model.all_tied_weights_keys.items():
        if target in state and source in state and _is_same(state[target], state[source]):
            del state[target]
    return state


def _is_same(first: Tensor, second: Tensor) -> bool:
    return first.shape == second.shape and (first.is_meta or first.data_ptr() == second.data_ptr())
