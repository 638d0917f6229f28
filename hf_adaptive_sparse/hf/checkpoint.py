"""The tensors of a model as a checkpoint holds them: some linear layers packed, tied tensors once."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from huggingface_hub import StateDictSplit, split_torch_state_dict_into_shards
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from ..formats import FORMATS, value_codes
from .integrity import WEIGHTS_NAME
from .packed_modules import linear_weight, packed_modules, resident
from .stored_values import StoredValues

_FORMAT = FORMATS["2:4"]
_SUFFIXES = (*_FORMAT.suffixes, value_codes.SUFFIX)


class Checkpoint:
    """Names, dtypes and shapes of all tensors at once, their values one at a time.

    Args:
        packed: the 2:4 layers to pack, by name; all others are dense, also those packed in the model.
        grids: of those of them whose values are stored as codes.
    Attributes:
        stored_values: how the values of each of `packed` are stored.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        packed: dict[str, nn.Module],
        grids: Mapping[str, value_codes.StoredGrid] | None = None,
    ) -> None:
        self._model, self._packed, self._dense = model, packed, _dense_state(model)
        self._modules, self._grids = packed_modules(model), grids or {}
        self._last: tuple[str, tuple[Tensor, ...]] = ("", ())
        self.stored_values: dict[str, StoredValues] = {}
        self.layout: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {}
        for name, tensor in self._dense.items():
            place, _, suffix = name.rpartition(".")
            if place in packed and suffix == "weight":
                rows, columns = tensor.shape[::-1] if _is_transposed(packed[place]) else tensor.shape
                self._lay_out_packed(place, tensor.dtype, rows, columns)
            else:
                self.layout[name] = tensor.dtype, tuple(tensor.shape)

    def _lay_out_packed(self, place: str, dtype: torch.dtype, rows: int, columns: int) -> None:
        grid, values = self._grids.get(place), (dtype, (rows, columns // 2))
        self.stored_values[place] = StoredValues()
        if grid is not None:
            value_codes.check_grid(grid, (rows, columns // 2), dtype, place)
            groups = grid.scales.shape[1]
            self.stored_values[place] = StoredValues(grid.bits, None if groups == 1 else columns // groups, dtype)
            values = value_codes.CODE_DTYPES[grid.bits], (rows, columns * grid.bits // 16)
        self.layout[f"{place}.weight_values"] = values
        self.layout[f"{place}.weight_meta"] = torch.uint8, (rows, columns // 8)
        if grid is not None:
            self.layout[f"{place}.{value_codes.SUFFIX}"] = grid.scales.dtype, tuple(grid.scales.shape)

    def load(self, name: str) -> Tensor:
        """The tensor of a name in `layout`; PatternError if it cannot be packed after all (NaN, off its grid)."""
        place, _, suffix = name.rpartition(".")
        if place in self._packed and suffix in _SUFFIXES:
            if self._last[0] != place:  # all tensors of a layer are asked for, one after the other
                self._last = place, self._pack(place)
            return self._last[1][_SUFFIXES.index(suffix)]
        module = self._modules.get(place)
        if module is not None and suffix == "weight":
            weight = linear_weight(self._model, place, module)
            return weight.t() if module.transposed else weight
        return resident(self._model, name, self._dense[name])

    def _pack(self, place: str) -> tuple[Tensor, ...]:
        values, meta = _FORMAT.pack(linear_weight(self._model, place, self._packed[place]), place)
        if place not in self._grids:
            return values, meta
        scale, bits = self._grids[place]
        scale = scale.to(values.device)
        return value_codes.encode(values, scale, bits, (values.dtype,), place), meta, scale

    def split(self, max_shard_size: int | str) -> StateDictSplit:
        """Which tensor goes into which file."""
        # Tensors without data have a name and a size, which is all that is asked of them.
        layout = self.layout.items()
        empty = {name: torch.empty(shape, dtype=dtype, device="meta") for name, (dtype, shape) in layout}
        pattern = WEIGHTS_NAME.replace(".safetensors", "{suffix}.safetensors")
        return split_torch_state_dict_into_shards(empty, filename_pattern=pattern, max_shard_size=max_shard_size)

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
            dtype = tensor.dtype if module.grid is None else module.value_dtypes[-1]
            state[f"{place}.weight"] = torch.empty(shape, dtype=dtype, device="meta")
        elif place in modules and suffix == "weight":
            state[name] = tensor.t() if modules[place].transposed else tensor
        elif not (place in modules and suffix in _SUFFIXES) and name not in ignored:
            state[name] = tensor
    for target, source in model.all_tied_weights_keys.items():
        if target in state and source in state and _is_same(state[target], state[source]):
            del state[target]
    return state


def _is_same(first: Tensor, second: Tensor) -> bool:
    return first.shape == second.shape and (first.is_meta or first.data_ptr() == second.data_ptr())
