"""Ways to compute a packed layer, by name: what `bench` measures, and what `backend_choice` chooses from.

An entry of BACKENDS builds, from a `PackedLinear` that it leaves as it is, a function [..., in] -> [..., out]. To add a
backend, add an entry: it is then measured, saved, chosen where it is the fastest, and forced by its name.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from .backend_choice import DENSE
from .errors import ConfigError
from .layers import PackedLinear

Forward = Callable[[Tensor], Tensor]

# cuSPARSELt multiplies weights whose sides are multiples of the first with rows in multiples of the second
# (torch/sparse/semi_structured.py; for 16-bit values).
_CUSPARSELT_SIDE, _CUSPARSELT_ROWS = 16, 8
_CUSPARSELT_DTYPES = (torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class Backend:
    """One way to compute a packed layer.

    Attributes:
        build: from a layer, the function that computes it.
        held_as: the backend of `PackedLinear` that computes the same, so that no second copy of the weight is needed.
            None: `build` makes a copy of its own, beside the dense weight.
        refuses: (layer) -> why it cannot compute this layer on the layer's device; None if it can.
    """

    build: Callable[[PackedLinear], Forward]
    held_as: str | None = None
    refuses: Callable[[PackedLinear], str | None] = lambda layer: None


def forward_of(name: str, layer: PackedLinear) -> Forward:
    """The function of one backend for a layer.

    Raises:
        ConfigError: no backend has this name, or it cannot compute this layer; the message says why.
    """
    if name not in BACKENDS:
        raise ConfigError(f"unknown backend {name!r}; known: {', '.join(BACKENDS)}.")
    reason = BACKENDS[name].refuses(layer)
    if reason is not None:
        raise ConfigError(f"backend {name!r} {reason}. Known: {', '.join(BACKENDS)}.")
    return BACKENDS[name].build(layer)


def usable_backends(layer: PackedLinear) -> tuple[dict[str, Backend], dict[str, str]]:
    """The backends that can compute this layer, and why the others cannot."""
    reasons = {name: backend.refuses(layer) for name, backend in BACKENDS.items()}
    return (
        {name: BACKENDS[name] for name, reason in reasons.items() if reason is None},
        {name: reason for name, reason in reasons.items() if reason is not None},
    )


def place_of(layer: PackedLinear) -> tuple[torch.device, torch.dtype]:
    """Where a layer is, and the dtype of its weight; asking the weight itself would expand it."""
    return next(layer.parameters()).device, layer.value_dtypes[-1]


def competes(name: str) -> bool:
    """Whether a backend may take the place of dense: one that holds the dense weight and multiplies by it is dense."""
    return name == DENSE or (name in BACKENDS and BACKENDS[name].held_as != DENSE)


def _dense(layer: PackedLinear) -> Forward:
    """As `nn.Linear` computes it: the reference that every other time is compared with."""
    weight, bias = _plain_weight(layer), layer.bias
    return lambda input: F.linear(input, weight, bias)


def _kept(layer: PackedLinear, backend: str) -> Forward:
    if layer.backend != backend:
        layer = copy.deepcopy(layer)
        layer.set_backend(backend)
    return layer.forward


def _plain_weight(layer: PackedLinear) -> Tensor:
    """[out, in], expanded and writable."""
    return layer.weight.detach().as_subclass(Tensor).contiguous()


class CusparseltForward:
    """2:4 products by cuSPARSELt, through torch; the compressed weight is in the layout of that library and device.

    Args:
        layer: on a CUDA device.
        search: let the library try its algorithms at the first call of every number of rows, and keep the fastest.
            Without it torch takes algorithm 0, which is often not the fastest.
    """

    def __init__(self, layer: PackedLinear, search: bool) -> None:
        self.compressed = torch._cslt_compress(_plain_weight(layer))
        self.bias, self.search = layer.bias, search
        self.algorithms: dict[int, int] = {}

    def __call__(self, input: Tensor) -> Tensor:
        x = input.reshape(-1, input.shape[-1])
        rows = len(x)
        if padding := -rows % _CUSPARSELT_ROWS:
            x = F.pad(x, (0, 0, 0, padding))
        operands = self.compressed, x.t()
        algorithm = 0
        if self.search:
            if len(x) not in self.algorithms:
                self.algorithms[len(x)] = torch._cslt_sparse_mm_search(
                    *operands, bias=self.bias, transpose_result=True
                )  # fmt: skip
            algorithm = self.algorithms[len(x)]
        result = torch._cslt_sparse_mm(*operands, bias=self.bias, transpose_result=True, alg_id=algorithm)
        return result[:rows].reshape(*input.shape[:-1], -1)


def _refuses_cusparselt(layer: PackedLinear) -> str | None:
    device, dtype = place_of(layer)
    if device.type != "cuda":
        return f"needs a CUDA device, and the layer is on {device}"
    missing = [name for name in ("_cslt_compress", "_cslt_sparse_mm", "_cslt_sparse_mm_search") if not has(name)]
    if missing:
        return f"needs torch.{missing[0]}, which torch {torch.__version__} lacks"
    if dtype not in _CUSPARSELT_DTYPES:
        return f"multiplies float16 and bfloat16, and the layer is {str(dtype).removeprefix('torch.')}"
    shape = layer.out_features, layer.in_features
    if any(side % _CUSPARSELT_SIDE for side in shape):
        return f"needs sides in multiples of {_CUSPARSELT_SIDE}, and the layer is {shape[0]}x{shape[1]}"
    return cusparselt_problem(device)


def has(name: str) -> bool:
    """Whether this torch has a function of that name."""
    return hasattr(torch, name)


_PROBED: dict[torch.device, str | None] = {}


def cusparselt_problem(device: torch.device) -> str | None:
    """Why cuSPARSELt does not work on this device; None if it does. Found out by doing it, once for every device.

    `torch.backends.cusparselt.is_available()` is true also where the library refuses the card.
    """
    if device not in _PROBED:
        weight = torch.tensor([1.0, 0.0, 2.0, 0.0], device=device, dtype=torch.float16).repeat(32, 8)
        x = torch.ones(8, 32, device=device, dtype=torch.float16)
        try:
            result = torch._cslt_sparse_mm(torch._cslt_compress(weight), x.t(), transpose_result=True)
            right = bool((result == 24.0).all())
            _PROBED[device] = None if right else "gives wrong results on this device: 24 expected in a product of 32x32"
        except RuntimeError as problem:
            reason = (str(problem).strip() or "no reason given").splitlines()[0]
            _PROBED[device] = f"does not work on this device ({reason})"
    return _PROBED[device]


BACKENDS: dict[str, Backend] = {
    "dense": Backend(_dense, held_as="dense"),
    "expanded": Backend(lambda layer: _kept(layer, "dense"), held_as="dense"),
    "packed": Backend(lambda layer: _kept(layer, "packed"), held_as="packed"),
    "cusparselt": Backend(lambda layer: CusparseltForward(layer, search=False), refuses=_refuses_cusparselt),
    "cusparselt-searched": Backend(lambda layer: CusparseltForward(layer, search=True), refuses=_refuses_cusparselt),
}
