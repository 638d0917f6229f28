"""A packed layer that takes, at every call, the backend that was measured fastest for so many rows."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from .backend_choice import DENSE, Choice, nearest
from .backend_forwards import BACKENDS, Forward, forward_of, place_of
from .errors import ConfigError
from .layers import PackedLinear


class RowDispatch:
    """Stands in for `PackedLinear.forward`: rows -> the backend of the nearest measured number of rows.

    Args:
        forwards: backend -> function; without the one in which the layer itself is held.
        choices: measured rows -> backend.
        layer: whose own forward computes every backend that is not in `forwards`.
    """

    def __init__(self, layer: PackedLinear, forwards: Mapping[str, Forward], choices: Mapping[int, str]) -> None:
        self.layer, self.forwards, self.choices = layer, dict(forwards), dict(sorted(choices.items()))
        self.device, self.dtype = place_of(layer)
        self._names: dict[int, str] = {}

    def backend(self, rows: int) -> str:
        """The name of the backend that so many rows take."""
        if rows not in self._names:
            self._names[rows] = self.choices[nearest(rows, self.choices)]
        return self._names[rows]

    def __call__(self, input: Tensor) -> Tensor:
        if input.device != self.device or input.dtype != self.dtype:
            raise ConfigError(
                f"a layer with measured backends was set up on {self.device} in {self.dtype}, and got an input on "
                f"{input.device} in {input.dtype}. Call use_measured_backends(model) again after moving the model."
            )
        rows = max(1, input.numel() // max(1, input.shape[-1]))
        forward = self.forwards.get(self.backend(rows))
        return type(self.layer).forward(self.layer, input) if forward is None else forward(input)


def dispatch(layer: PackedLinear, choices: Mapping[int, Choice], where: str = "weight") -> set[str]:
    """Let a layer take the backend of `choices` that fits the rows of its input. What it computes stays the same.

    The layer is kept in one form, that of the choices for the fewest rows among those that `PackedLinear` knows; a
    backend with a layout of its own gets a copy of the weight in it. One backend for all rows needs no dispatch.

    Args:
        choices: rows -> choice, of this layer's shape.
    Returns:
        The backends that are in use.
    Raises:
        ConfigError: a backend cannot compute this layer.
        PatternError: naming `where`, the layer is to be packed and is no longer 2:4.
    """
    undo_dispatch(layer)
    names = {rows: choice.backend for rows, choice in sorted(choices.items())}
    used = set(names.values())
    held = [form for name in names.values() if (form := BACKENDS[name].held_as) is not None]
    layer.set_backend(held[0] if held else DENSE, where)
    forwards = {name: forward_of(name, layer) for name in used if BACKENDS[name].held_as != layer.backend}
    if forwards:
        layer.forward = RowDispatch(layer, forwards, names)  # type: ignore[method-assign]
    return used


def undo_dispatch(layer: PackedLinear) -> None:
    """Back to the backend that the layer is held in."""
    if isinstance(layer.__dict__.get("forward"), RowDispatch):
        del layer.__dict__["forward"]
