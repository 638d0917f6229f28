"""Linear layers with zeros: masked while training, packed after loading."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .errors import ConfigError
from .formats import two_four, value_codes
from .kernels import EXPANSIONS, KERNELS, PackedWeight, check_kernel, choose, expanding

BACKENDS = ("dense", "packed")


class _StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(weight: Tensor, keep: Tensor) -> Tensor:
        # where and not a product: weight * False is -0.0 for a negative weight, which some 2:4 compressors
        # read as a value.
        return torch.where(keep, weight, weight.new_zeros(()))

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        pass

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient, None


def straight_through(weight: Tensor, keep: Tensor) -> Tensor:
    """The masked weight, with a gradient that reaches every entry of `weight`, kept or not.

    Source: AST (arXiv 2407.20584) section 3; dL/dW := dL/d(keep * W).

    Args:
        weight: [out, in] latent weight, any float dtype.
        keep: [out, in] bool, True = kept.
    Returns:
        [out, in] of the dtype of `weight`; masked entries are +0.0.
    """
    return _StraightThrough.apply(weight, keep)


class _StraightThroughDecay(torch.autograd.Function):
    @staticmethod
    def forward(weight: Tensor, keep: Tensor, decay: float) -> Tensor:
        return torch.where(keep, weight, weight.new_zeros(()))

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        weight, keep, ctx.decay = inputs
        ctx.save_for_backward(weight, keep)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None, None]:
        weight, keep = ctx.saved_tensors
        return gradient + ctx.decay * weight.masked_fill(keep, 0.0), None, None


def straight_through_with_decay(weight: Tensor, keep: Tensor, decay: float) -> Tensor:
    """As `straight_through`; the backward pass adds a pull of masked weights towards zero to the gradient.

    Source: SR-STE, Zhou et al., ICLR 2021, eq. 8; dL/dW := dL/d(keep * W) + decay * ~keep * W.

    For optimizers that hide their gradients (DeepSpeed). The pull is added once per backward pass and before
    clipping, so with gradient accumulation over n batches pass decay / n.

    Args:
        weight: [out, in] latent weight, any float dtype.
        keep: [out, in] bool, True = kept.
        decay: strength of the pull.
    Returns:
        [out, in] of the dtype of `weight`; masked entries are +0.0.
    """
    return _StraightThroughDecay.apply(weight, keep, decay)


class PackedLinear(nn.Linear):
    """A linear layer whose weight is 2:4 and can be kept in the packed format (`formats/two_four.py`).

    backend "packed": `weight_values` (frozen parameter) and `weight_meta` (buffer) are kept, 0.5625 of the
        dense bytes in 16 bit; `weight` is an expansion, read-only. `kernel` says how it is multiplied (`kernels/`):
        "compiled" reads the packed bytes once (CPU), "torch" expands them at every call, "auto" takes the first
        where it can run. The backward pass expands, a tile at a time.
    backend "dense": `weight` is kept, an ordinary frozen parameter, as fast and as large as in `nn.Linear`;
        `weight_values` and `weight_meta` are computed when asked for. It may be written to (an adapter is
        merged into it); it is then no longer 2:4, and packing it again raises PatternError.

    "dense" and "packed" with the kernel "torch" compute the same, to the last bit, if the layer has no more than
    `kernels.expanding.TILE` weights; else, and with the compiled kernel, they differ by rounding. A new layer is
    packed and empty: load into it, or `from_weight`.

    Of a quantised layer `weight_values` are codes of 8 or 4 bits (`formats/value_codes.py`), and with either
    backend it has the buffer `weight_scale`, which is not cast with the layer: the codes stand for the values
    that were saved, and these are cast.

    Args:
        transposed: the layer stands for a `Conv1D` (GPT-2), whose weight is [in, out]. Here it is [out, in] like
            any other; only the order in memory is that of Conv1D, which gives the same rounding.
        value_bits: of the codes, 8 or 4. None: not quantised.
        scale: [out, groups], of a quantised layer.
        value_dtype: to which code * scale is rounded before it is cast to `dtype` (default: `dtype`).
    """

    weight_scale: Tensor | None
    kernel = "auto"

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        transposed: bool = False,
        value_bits: int | None = None,
        scale: Tensor | None = None,
        value_dtype: torch.dtype | None = None,
    ) -> None:
        nn.Module.__init__(self)  # not nn.Linear's, which would allocate and fill the dense weight
        dtype = torch.get_default_dtype() if dtype is None else dtype
        two_four.check_packable(torch.empty(out_features, in_features, device="meta", dtype=dtype), "PackedLinear")
        columns = in_features // 2 if value_bits is None else in_features * value_bits // 16
        kind = dtype if value_bits is None else value_codes.CODE_DTYPES[value_bits]
        values = torch.empty(out_features, columns, device=device, dtype=kind)
        meta = torch.empty(out_features, in_features // 8, device=device, dtype=torch.uint8)
        self.in_features, self.out_features, self.transposed = in_features, out_features, transposed
        self.value_bits, self.value_dtypes = value_bits, value_codes.after_cast((value_dtype or dtype,), dtype)
        # These names are properties of the class, which register_parameter would refuse.
        self._parameters["weight_values"] = nn.Parameter(values, requires_grad=False)
        self._buffers["weight_meta"] = meta
        self.register_buffer("weight_scale", scale)
        bias_value = torch.zeros(out_features, device=device, dtype=dtype) if bias else None
        self.register_parameter("bias", None if bias_value is None else nn.Parameter(bias_value))

    @classmethod
    def from_weight(
        cls,
        weight: Tensor,
        bias: Tensor | None = None,
        *,
        transposed: bool = False,
        grid: value_codes.StoredGrid | None = None,
        where: str = "weight",
    ) -> PackedLinear:
        """A packed layer with this [out, in] weight; PatternError, naming `where`, if it is not 2:4.

        Args:
            grid: to which the weight was rounded; it is then stored as codes.
        """
        values, meta = two_four.pack(weight, where)
        scale, bits = (None, None) if grid is None else (grid.scales.detach().clone(), grid.bits)
        if grid is not None:
            values = value_codes.encode(values, grid.scales, grid.bits, (weight.dtype,), where)
        rows, columns = weight.shape
        layer = cls(
            columns, rows, bias is not None, "meta", weight.dtype, transposed=transposed, value_bits=bits, scale=scale
        )
        layer._parameters["weight_values"] = nn.Parameter(values, requires_grad=False)
        layer._buffers["weight_meta"] = meta
        if bias is not None:
            layer.bias = bias if isinstance(bias, nn.Parameter) else nn.Parameter(bias)
        return layer

    @property
    def backend(self) -> str:
        return "dense" if "weight" in self._parameters else "packed"

    def set_backend(self, backend: str, where: str = "weight", *, kernel: str = "auto") -> None:
        """Keep the weight in this form, and multiply it so while it is packed.

        Raises:
            PatternError: naming `where`, it cannot be packed.
            ConfigError: there is no such backend or kernel, or the kernel was named and cannot run.
        """
        if backend not in BACKENDS:
            raise ConfigError(f"unknown backend {backend!r}; known: {', '.join(BACKENDS)}.")
        check_kernel(kernel)
        self.kernel = kernel
        if backend == self.backend:
            return
        if backend == "dense":
            name, tensor = "weight", self._expanded()
            del self._parameters["weight_values"], self._buffers["weight_meta"]
        else:
            name, (tensor, meta) = "weight_values", self._packed(where)
            del self._parameters["weight"]
            self._buffers["weight_meta"] = meta
        bias = self._parameters.pop("bias")  # stays behind the weight, so that equal models are saved alike
        self._parameters[name] = nn.Parameter(tensor, requires_grad=False)
        self._parameters["bias"] = bias

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        """[out, in]: the parameter itself (dense), or a read-only expansion (packed)."""
        if self.backend == "dense":
            return self._held(self._parameters, "weight")
        weight = self._expanded()
        return weight if weight.is_meta else weight.as_subclass(_ReadOnlyWeight)

    @property
    def weight_values(self) -> Tensor:
        """[out, in/2]; codes if the layer is quantised, [out, in/4] of 4 bits"""
        if self.backend == "dense":
            return self._packed()[0]
        return self._held(self._parameters, "weight_values")

    @property
    def weight_meta(self) -> Tensor:
        """[out, in/8] uint8"""
        if self.backend == "dense":
            return two_four.pack(self.weight)[1]
        return self._held(self._buffers, "weight_meta")

    @staticmethod
    def _held(tensors: Mapping[str, Tensor | None], name: str) -> Tensor:
        tensor = tensors[name]
        assert tensor is not None
        return tensor

    @property
    def grid(self) -> value_codes.StoredGrid | None:
        """To which the weight was rounded, if the layer is quantised."""
        if self.weight_scale is None or self.value_bits is None:
            return None
        return value_codes.StoredGrid(self.weight_scale, self.value_bits)

    def _packed(self, where: str = "weight") -> tuple[Tensor, Tensor]:
        values, meta = two_four.pack(self.weight, where)
        if self.grid is not None:
            values = value_codes.encode(values, *self.grid, self.value_dtypes, where)
        return values, meta

    def _packed_weight(self) -> PackedWeight:
        values, meta = self.weight_values, self.weight_meta
        return PackedWeight(values, meta, self.weight_scale, self.value_dtypes, self.transposed)

    def _expanded(self) -> Tensor:
        return expanding.expand(self._packed_weight())

    def _apply(self, fn, recurse=True):
        scale = self.weight_scale
        if scale is None:
            return super()._apply(fn, recurse)
        self.weight_scale = scale.view(torch.uint8)  # moves with the layer; bytes are not cast
        try:
            super()._apply(fn, recurse)
        finally:
            self.weight_scale = self._held(self._buffers, "weight_scale").view(scale.dtype)
        cast = fn(torch.empty(0, dtype=self.value_dtypes[-1], device=scale.device))
        self.value_dtypes = value_codes.after_cast(self.value_dtypes, cast.dtype)
        return self

    def forward(self, input: Tensor) -> Tensor:
        if self.backend == "dense":
            return expanding.multiply(input, self.weight, self.bias, self.transposed)
        weight, kernel = self._packed_weight(), choose(self.kernel, input.device.type)
        if not torch.is_grad_enabled():
            return KERNELS[kernel](input, weight, self.bias)
        return _PackedLinearFunction.apply(input, self.bias, kernel, *weight)

    def extra_repr(self) -> str:
        values = "" if self.value_bits is None else f", values=int{self.value_bits}"
        return f"{super().extra_repr()}, pattern=2:4{values}, backend={self.backend}"


_DATA: Any = Tensor.data


class _ReadOnlyWeight(Tensor):
    """An expansion of a packed weight. Writing to it would change nothing, so it raises."""

    _is_hf_initialized = True  # or transformers would try to fill it with random values while loading

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        name = getattr(func, "__name__", "")
        in_place = name.endswith("_") and not name.endswith("__") and name != "requires_grad_"
        in_place_operator = name.startswith("__i") and name not in ("__invert__", "__index__", "__int__")
        if in_place or in_place_operator or name == "__setitem__" or func == _DATA.__set__:
            raise ConfigError(
                "the weight of a packed layer is read-only: what is written to its expansion would be lost. "
                "Call set_packed_backend(model, 'dense') first, or model.dequantize()."
            )
        with torch._C.DisableTorchFunctionSubclass():
            result = func(*args, **(kwargs or {}))
        # An alias is as read-only as the tensor; everything else is an ordinary result.
        is_alias = func == _DATA.__get__ or name in ("detach", "view", "t", "transpose")
        return result.as_subclass(cls) if is_alias else result


class _PackedLinearFunction(torch.autograd.Function):
    """Saves the packed tensors for the backward pass, not their expansion, which is 1.78 times as large."""

    @staticmethod
    def forward(input: Tensor, bias: Tensor | None, kernel: str, *packed: Any) -> Tensor:
        return KERNELS[kernel](input, PackedWeight(*packed), bias)

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        input, bias, ctx.kernel, values, meta, scale, ctx.dtypes, ctx.transposed = inputs
        ctx.input_dtype, ctx.bias_dtype = input.dtype, None if bias is None else bias.dtype
        ctx.save_for_backward(values, meta, scale)

    @staticmethod
    def backward(ctx, gradient: Tensor):
        if ctx.needs_input_grad[3]:
            raise ConfigError(
                "packed values cannot be trained: their positions would never change. Train an adapter on "
                "top, or call model.dequantize() and train the dense layer."
            )
        input_gradient = bias_gradient = None
        if ctx.needs_input_grad[0]:
            values, meta, scale = ctx.saved_tensors
            weight = PackedWeight(values, meta, scale, ctx.dtypes, ctx.transposed)
            input_gradient = expanding.backward(gradient, weight, EXPANSIONS[ctx.kernel]).to(ctx.input_dtype)
        if ctx.needs_input_grad[1]:
            bias_gradient = gradient.flatten(0, -2).sum(0).to(ctx.bias_dtype)
        return input_gradient, bias_gradient, *[None] * 6
