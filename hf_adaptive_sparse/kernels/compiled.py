"""The kernel in C++ (`two_four_linear.cpp`): reads the packed bytes of a weight once, on a CPU.

For a few rows of activations, as in generation, the two kept weights of a group are multiplied with the inputs that
their positions select; nothing is expanded. With more rows a product of matrices is faster: tiles of the weight are
expanded, also compiled, and multiplied by torch.

Sums are float32, in another order than torch's, so a result differs from that of the dense layer by rounding. An
input that is inf or NaN reaches only the outputs that have kept a weight for it.
"""

from __future__ import annotations

import ctypes
import threading
from pathlib import Path

import torch
from torch import Tensor, nn

from ..errors import ConfigError
from ..formats import two_four, value_codes
from ..formats.two_four import dtype_name
from . import build, expanding
from .expanding import PackedWeight

# Rows of activations up to which the weight is multiplied as it is stored, by instruction set: with more, expanding
# tiles is as fast or faster (benchmarks/packed_decode.py).
MOST_ROWS = {"portable": 4, "avx2": 16, "avx512": 32, "avx512_bf16": 32}
LEVELS = tuple(MOST_ROWS)

_KINDS = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
_CODE_KINDS = {torch.int8: 3, torch.uint8: 4}
_LOCK = threading.Lock()
_loaded: Library | None = None


class Library:
    """The loaded library, and the best instruction set of this machine."""

    def __init__(self) -> None:
        library = build.built_library()
        pointer, size, number = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int
        self.linear = library.hf_adaptive_sparse_linear
        self.linear.argtypes = [pointer] * 7 + [size] * 4 + [number] * 6
        self.expand = library.hf_adaptive_sparse_expand
        self.expand.argtypes = [pointer] * 4 + [size] * 2 + [number] * 2
        self.level: int = library.hf_adaptive_sparse_level()
        self.parallel_for = _parallel_for()


def load() -> Library:
    """The library, built at the first call of a process if it is not in the cache.

    Raises:
        ConfigError: it cannot be built, or does not compute what it should.
    """
    global _loaded
    if _loaded is None:
        with _LOCK:
            if _loaded is None:
                library = Library()
                _check(library)
                _loaded = library
    return _loaded


def linear(input: Tensor, weight: PackedWeight, bias: Tensor | None) -> Tensor:
    """input @ weight.T + bias, on a CPU.

    Args:
        input: [..., in], of the dtype of the weight.
        bias: [out], or None.
    Raises:
        ConfigError: something is on another device, or the library cannot be built.
    """
    if input.device.type != "cpu" or weight.values.device.type != "cpu":
        raise ConfigError(
            f"kernel 'compiled' runs on a CPU, the layer is on {weight.values.device} and its input on "
            f"{input.device}. Use kernel='auto' or kernel='torch' there."
        )
    # What torch only follows (torch.compile, FakeTensor) has no bytes to read.
    if torch.compiler.is_compiling() or type(input) not in (Tensor, nn.Parameter):
        if torch.is_autocast_enabled("cpu"):
            return expanding.linear(input, weight, bias)
        return _operator(input, *weight[:3], bias, " ".join(map(dtype_name, weight.dtypes)), weight.transposed)
    return _run(input, weight, bias)


def expand(weight: PackedWeight) -> Tensor:
    """[out, in] of the last of its dtypes; as `expanding.expand`, to the last bit."""
    if torch.compiler.is_compiling() or type(weight.values) not in (Tensor, nn.Parameter):
        return expanding.expand(weight)
    values, meta = weight.values, weight.meta.contiguous()
    if weight.scale is not None:
        values = value_codes.decode(values, weight.scale, weight.dtypes)
    values = values.contiguous()
    library = load()
    dense = values.new_empty(weight.out_features, weight.in_features)
    pointers = values.data_ptr(), meta.data_ptr(), dense.data_ptr()
    failed = library.expand(library.parallel_for, *pointers, *meta.shape, values.itemsize, library.level)
    assert not failed
    return dense.t().contiguous().t() if weight.transposed else dense


def is_read_as_stored(input: Tensor, weight: PackedWeight, bias: Tensor | None) -> bool:
    """Whether the packed bytes are multiplied as they are, without expanding a tile."""
    rows, scale = input.numel() // max(weight.in_features, 1), weight.scale
    few = rows <= MOST_ROWS[LEVELS[load().level]]
    # Under autocast F.linear casts the weight, which only an expanded one can be.
    same = input.dtype == weight.dtypes[-1] and not torch.is_autocast_enabled("cpu")
    known = input.dtype in _KINDS and (bias is None or bias.dtype in _KINDS)
    if scale is None:
        return same and known and few
    # Codes that were cast once more are rounded twice, and a step of the kernel has one scale for 32 inputs.
    aligned = scale.shape[1] == 1 or weight.in_features // scale.shape[1] % 32 == 0
    return same and known and few and aligned and len(weight.dtypes) == 1


def multiply_stored(input: Tensor, weight: PackedWeight, bias: Tensor | None, level: str | None = None) -> Tensor:
    """The product from the packed bytes; `is_read_as_stored` must hold, but for the number of rows.

    Args:
        level: one of LEVELS, not above that of the machine. Default: the best.
    """
    library = load()
    out, columns, scale = weight.out_features, weight.in_features, weight.scale
    rows = input.numel() // columns if columns else 0
    result = input.new_empty(*input.shape[:-1], out)
    # Kept in names: a copy must live until the library is done with it.
    x, values, meta = input.contiguous(), weight.values.contiguous(), weight.meta.contiguous()
    scale = None if scale is None else scale.contiguous()
    bias = None if bias is None else bias.contiguous()
    if rows == 0 or out == 0:
        return result
    failed = library.linear(
        library.parallel_for,
        x.data_ptr(),
        values.data_ptr(),
        meta.data_ptr(),
        None if scale is None else scale.data_ptr(),
        None if bias is None else bias.data_ptr(),
        result.data_ptr(),
        rows,
        out,
        columns,
        0 if scale is None else scale.shape[1],
        _KINDS[values.dtype] if scale is None else _CODE_KINDS[values.dtype],
        0 if scale is None else _KINDS[scale.dtype],
        0 if bias is None else _KINDS[bias.dtype],
        _KINDS[input.dtype],
        _KINDS[weight.dtypes[-1]],
        library.level if level is None else LEVELS.index(level),
    )
    if failed:
        raise MemoryError(f"no memory for a copy of {rows} x {columns} activations")
    return result


def _run(input: Tensor, weight: PackedWeight, bias: Tensor | None) -> Tensor:
    if is_read_as_stored(input, weight, bias):
        return multiply_stored(input, weight, bias)
    return expanding.linear(input, weight, bias, expand)


# For torch.compile, which cannot look into the library.
@torch.library.custom_op("hf_adaptive_sparse::packed_linear", mutates_args=(), device_types="cpu")
def _operator(
    input: Tensor,
    values: Tensor,
    meta: Tensor,
    scale: Tensor | None,
    bias: Tensor | None,
    dtypes: str,
    transposed: bool,
) -> Tensor:
    rounding = tuple(getattr(torch, name) for name in dtypes.split())  # a schema has no list of dtypes
    return _run(input, PackedWeight(values, meta, scale, rounding, transposed), bias)


@_operator.register_fake
def _(input, values, meta, scale, bias, dtypes, transposed):
    return input.new_empty(*input.shape[:-1], meta.shape[0])


def _parallel_for() -> int:
    """The address of the function with which torch shares work among its threads."""
    folder = Path(torch.__file__).parent / "lib"
    errors = []
    # By name the one that is already loaded is found, wherever a distribution has put it.
    for name in (folder / "libtorch_cpu.so", folder / "libtorch_cpu.dylib", "libtorch_cpu.so"):
        try:
            function = ctypes.CDLL(str(name)).torch_parallel_for
        except (OSError, AttributeError) as error:
            errors.append(str(error))
        else:
            address = ctypes.cast(function, ctypes.c_void_p).value
            assert address is not None
            return address
    raise ConfigError(
        f"the compiled kernel cannot find the threads of torch {torch.__version__} ({errors[-1]}). Use kernel='torch', "
        f"or backend='dense'."
    )


def _check(library: Library) -> None:
    """Refuse a library that does not multiply right on this machine."""
    generator = torch.Generator().manual_seed(0)
    values = torch.randint(-3, 4, (3, 52), generator=generator).bfloat16()
    meta = torch.tensor([4, 8, 9, 12, 13, 14], dtype=torch.uint8)[torch.randint(6, (3, 26), generator=generator)]
    meta = meta.view(3, 13, 2)[..., 0] | meta.view(3, 13, 2)[..., 1] << 4
    x, y = torch.randint(-3, 4, (2, 104), generator=generator).bfloat16(), torch.empty(2, 3, dtype=torch.bfloat16)
    pointers = (x.data_ptr(), values.data_ptr(), meta.data_ptr(), None, None, y.data_ptr())
    failed = library.linear(library.parallel_for, *pointers, 2, 3, 104, 0, 2, 0, 0, 2, 2, library.level)
    # Small integers: every order of the sum gives the same.
    if failed or not torch.equal(y, x @ two_four.unpack(values, meta).t()):
        raise ConfigError(
            f"the compiled kernel in {build.library_path()} does not compute what it should on this machine "
            f"({LEVELS[library.level]}). Use kernel='torch', or backend='dense', and report it."
        )
