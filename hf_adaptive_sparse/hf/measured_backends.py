"""Setting up a packed model by what was measured fastest on this machine: never slower than dense by choice."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import nn

from ..backend_choice import DENSE, MARGIN, Choice, Times, choose, choose_for
from ..backend_dispatch import dispatch
from ..backend_forwards import competes
from ..errors import ConfigError, TargetError
from .backend_times import TimesKey, load_times
from .packed_modules import packed_modules


@dataclass(frozen=True)
class BackendUse:
    """What one packed layer computes with.

    Attributes:
        choices: measured rows -> backend; empty where this shape was not measured here, and the layer is dense.
    """

    name: str
    shape: tuple[int, int]
    choices: dict[int, str]


def use_measured_backends(
    model: nn.Module,
    rows: int | None = None,
    *,
    tables: Mapping[TimesKey, Times] | None = None,
    margin: float = MARGIN,
) -> list[BackendUse]:
    """Let every packed layer compute with the backend that was measured fastest for its shape on this machine.

    Measure first: `hf-adaptive-sparse bench FOLDER --save`. A layer of a shape that was not measured here is dense, and
    so is one whose other backends save less than the margin. `set_packed_backend` forces one backend for all layers.

    Args:
        rows: tokens that go through the model together, of which there will always be about so many: batch size while
            decoding, tokens of the prompts before. Every layer then keeps one form of its weight. None: every call
            takes the backend for its own number of rows, and a layer keeps its weight in as many forms as that takes.
        tables: measured times; default: those of `bench --save`.
        margin: part of the dense time that another backend must save, in [0, 1).
    Returns:
        One entry for every packed layer.
    Raises:
        TargetError: the model has no packed layers.
        ConfigError: a layer is moved between devices by accelerate, or `rows` is below 1.
        FormatError: the file of times cannot be read.
    """
    modules = packed_modules(model)
    if not modules:
        raise TargetError(f"{type(model).__name__} has no packed layers; loading a packed folder makes them.")
    for name, module in modules.items():
        if hasattr(module, "_hf_hook") or any(tensor.is_meta for tensor in module.state_dict().values()):
            raise ConfigError(
                f"{name}: is moved between devices by accelerate (device_map), so its backend cannot be chosen. Load "
                "the model without device_map."
            )
    tables = load_times() if tables is None else tables
    found = []
    for name, module in modules.items():
        choices = _choices(tables.get(TimesKey.of(module)), rows, margin)
        dispatch(module, choices or {1: Choice(DENSE, 1.0)}, name)
        used = {count: choice.backend for count, choice in choices.items()}
        found.append(BackendUse(name, (module.out_features, module.in_features), used))
    return found


def _choices(times: Times | None, rows: int | None, margin: float) -> dict[int, Choice]:
    known = {name: each for name, each in (times or {}).items() if competes(name)}
    if not known:
        return {}
    return choose(known, margin) if rows is None else {rows: choose_for(known, rows, margin)}
