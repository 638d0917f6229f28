"""The compiled kernel computes what the packed bytes say, with every instruction set of this machine."""

from __future__ import annotations

import copy
import functools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from hf_adaptive_sparse.errors import ConfigError
from hf_adaptive_sparse.formats import value_codes
from hf_adaptive_sparse.kernels import KERNELS, PackedWeight, compiled, expanding
from hf_adaptive_sparse.layers import PackedLinear

from ..reference.packed_linear import packed_linear
from ..test_packed_linear import inputs, make_pair, outputs_and_gradients, two_layers
from .compilers import needs_a_compiler

pytestmark = needs_a_compiler

LEGAL = torch.tensor([4, 8, 9, 12, 13, 14], dtype=torch.uint8)
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
every_dtype = pytest.mark.parametrize("dtype", DTYPES)
seeds = st.integers(0, 2**31)


@functools.cache
def levels() -> tuple[str, ...]:
    return compiled.LEVELS[: compiled.load().level + 1]


def random_weight(seed, out, octets, dtype, bits=None, groups=1, scale_dtype=torch.float32) -> PackedWeight:
    """Any legal positions, short groups among them, and values that are often zero."""
    draw = torch.Generator().manual_seed(seed)
    nibbles = LEGAL[torch.randint(6, (out, octets, 2), generator=draw)]
    meta = nibbles[..., 0] | nibbles[..., 1] << 4
    shape = out, octets * 4
    if bits is None:
        values = torch.randn(shape, generator=draw) * (torch.rand(shape, generator=draw) > 0.3)
        return PackedWeight(values.to(dtype), meta, None, (dtype,))
    codes = torch.randint(-(2 ** (bits - 1)), 2 ** (bits - 1), shape, generator=draw, dtype=torch.int8)
    scale = (torch.rand(out, groups, generator=draw) + 0.5).to(scale_dtype) * 2.0 ** (1 - bits)
    return PackedWeight(codes if bits == 8 else value_codes._join(codes), meta, scale, (dtype,))


def check(weight: PackedWeight, rows: int, bias: torch.Tensor | None, seed: int) -> None:
    """Every instruction set against the reference, within what the dtype of the result rounds."""
    dtype = weight.dtypes[-1]
    x = torch.randn(rows, weight.in_features, generator=torch.Generator().manual_seed(seed)).to(dtype)
    values = weight.values if weight.scale is None else value_codes.decode(weight.values, weight.scale, weight.dtypes)
    expected = packed_linear(x, values, weight.meta, bias)
    # The sum of the sizes bounds what the order of a float32 sum changes.
    size = packed_linear(x.abs(), values.abs(), weight.meta, None if bias is None else bias.abs())
    allowed = 1e-6 * size + 1.01 * torch.finfo(dtype).eps / 2 * expected.abs() + 1e-7
    for level in levels():
        found = compiled.multiply_stored(x, weight, bias, level)
        assert found.dtype == dtype and found.shape == expected.shape
        excess = ((found.double() - expected).abs() - allowed).max() if expected.numel() else torch.tensor(-1.0)
        assert excess <= 0, f"{level}: {excess.item():.3g} over"


@every_dtype
@settings(max_examples=12)
@given(seed=seeds, out=st.integers(1, 11), octets=st.integers(1, 19), rows=st.integers(1, 6), bias=st.booleans())
def test_it_multiplies_as_the_reference(dtype, seed, out, octets, rows, bias):
    weight = random_weight(seed, out, octets, dtype)
    check(weight, rows, torch.randn(out).to(dtype) if bias else None, seed)


@pytest.mark.parametrize("bits", [8, 4])
@every_dtype
@settings(max_examples=8)
@given(seed=seeds, out=st.integers(1, 9), octets=st.integers(1, 17), rows=st.integers(1, 5), data=st.data())
def test_codes_stand_for_the_values_that_were_saved(dtype, bits, seed, out, octets, rows, data):
    # Scales of a row, or of 32n inputs; their products are rounded to the dtype before they are multiplied.
    groups = data.draw(st.sampled_from([each for each in (1, 2, 4) if each == 1 or octets % (4 * each) == 0]))
    scale_dtype = data.draw(st.sampled_from([torch.float32, torch.bfloat16]))
    weight = random_weight(seed, out, octets, dtype, bits, groups, scale_dtype)
    assert compiled.is_read_as_stored(torch.empty(rows, octets * 8, dtype=dtype), weight, None)
    check(weight, rows, None, seed)


def test_more_rows_than_a_block_holds_and_more_outputs_than_a_thread():
    for dtype in DTYPES:
        check(random_weight(1, 37, 9, dtype), 23, None, 1)


@every_dtype
def test_values_at_the_ends_of_a_dtype_are_read_exactly(dtype):
    info = torch.finfo(dtype)
    numbers = [info.max, -info.max, info.tiny, info.smallest_normal * info.eps, 1 + info.eps, 0.0, -1.0, info.eps]
    meta = torch.tensor([[0xE4, 0x98]], dtype=torch.uint8)
    weight = PackedWeight(torch.tensor([numbers], dtype=dtype), meta, None, (dtype,))
    dense = expanding.expand(weight)
    for level in levels():
        for column in range(16):
            x = torch.zeros(1, 16, dtype=dtype)
            x[0, column] = 1
            found = compiled.multiply_stored(x, weight, None, level).item()
            # The bfloat16 products of the processor take subnormal numbers for zero.
            subnormal = level == "avx512_bf16" and dtype == torch.bfloat16 and abs(dense[0, column]) < info.tiny
            assert found == (0 if subnormal else dense[0, column].item()), (level, column)


def test_inf_and_nan_in_the_input_reach_the_outputs_that_keep_a_weight_for_it():
    weight = PackedWeight(torch.ones(2, 4), torch.tensor([[0x44], [0xEE]], dtype=torch.uint8), None, (torch.float32,))
    x = torch.zeros(1, 8)
    x[0, 0] = float("nan")
    for level in levels():
        first, second = compiled.multiply_stored(x, weight, None, level)[0].tolist()
        assert first != first and second == 0
    x[0, 0] = float("inf")
    for level in levels():
        assert compiled.multiply_stored(x, weight, None, level).tolist() == [[float("inf"), 0.0]]


@every_dtype
@settings(max_examples=10)
@given(seed=seeds, out=st.integers(1, 9), octets=st.integers(1, 11))
def test_the_compiled_expansion_equals_that_of_torch(dtype, seed, out, octets):
    weight = random_weight(seed, out, octets, dtype)
    dense, level = expanding.expand(weight), compiled.load().level
    try:
        for each in range(level + 1):
            compiled.load().level = each
            assert torch.equal(compiled.expand(weight), dense)
            assert torch.equal(compiled.expand(weight._replace(transposed=True)), dense)
    finally:
        compiled.load().level = level


def test_tiles_put_together_are_the_product_forwards_and_backwards(monkeypatch):
    monkeypatch.setattr(expanding, "TILE", 256)
    bias = torch.randn(21)
    for weight in (random_weight(3, 21, 8, torch.float32), random_weight(3, 21, 8, torch.float32, 8, 2)):
        for expand in (expanding.expand, compiled.expand):
            x, gradient, dense = torch.randn(2, 40, 64), torch.randn(2, 40, 21), expanding.expand(weight)
            torch.testing.assert_close(expanding.linear(x, weight, bias, expand), x @ dense.t() + bias)
            torch.testing.assert_close(expanding.backward(gradient, weight, expand), gradient @ dense)
    assert len(expanding._tiles(21, 64, 1)) == 6


# --- in a layer -----------------------------------------------------------------------------------------------


def compiled_pair(**options):
    dense, packed = make_pair(**options)
    packed.set_backend("packed", kernel="compiled")
    return dense, packed


@pytest.mark.parametrize("transposed", [False, True])
@every_dtype
@pytest.mark.parametrize("bits", [None, 8, 4])
def test_a_layer_gives_outputs_and_gradients_of_the_dense_one(dtype, transposed, bits):
    dense, packed = compiled_pair(dtype=dtype, transposed=transposed, bits=bits)
    x = inputs(dtype=dtype)
    for found, wanted in zip(outputs_and_gradients(packed, x), outputs_and_gradients(dense, x), strict=True):
        tolerance = 8 * torch.finfo(dtype).eps
        torch.testing.assert_close(found, wanted, rtol=tolerance, atol=tolerance * wanted.abs().max().item())


def test_few_rows_are_multiplied_as_stored_and_many_are_not(monkeypatch):
    seen = []
    whole = compiled.multiply_stored
    monkeypatch.setattr(compiled, "multiply_stored", lambda *a: seen.append(len(a[0])) or whole(*a))
    monkeypatch.setattr(expanding, "expand", lambda weight: pytest.fail("expanded by torch"))
    dense, packed = compiled_pair()
    most = compiled.MOST_ROWS[compiled.LEVELS[compiled.load().level]]
    for rows in (0, 1, most, most + 1):
        x = torch.randn(rows, 32)
        torch.testing.assert_close(packed(x), dense(x))
    assert seen == [0, 1, most]


def test_inference_mode_no_grad_odd_strides_and_a_vector():
    dense, packed = compiled_pair()
    x = torch.randn(32, 5).t()
    with torch.inference_mode():
        torch.testing.assert_close(packed(x), dense(x))
    with torch.no_grad():
        torch.testing.assert_close(packed(x[0]), dense(x[0]))


def test_under_autocast_the_weight_is_cast_as_that_of_the_dense_layer():
    dense, packed = compiled_pair()
    x = inputs()
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(packed(x), dense(x)) and packed(x).dtype == torch.bfloat16


def test_an_input_of_another_dtype_is_refused_as_by_the_dense_layer():
    dense, packed = compiled_pair()
    for layer in (dense, packed):
        with pytest.raises(RuntimeError, match="dtype"):
            layer(inputs(dtype=torch.bfloat16))


def test_what_was_cast_twice_or_has_short_groups_of_scales_is_expanded_and_right():
    dense, packed = compiled_pair(bits=8)  # groups of 8 inputs
    assert not compiled.is_read_as_stored(inputs(), packed._packed_weight(), None)
    torch.testing.assert_close(packed(inputs()), dense(inputs()))
    weight = random_weight(0, 8, 4, torch.bfloat16, 8)._replace(dtypes=(torch.float16, torch.bfloat16))
    assert not compiled.is_read_as_stored(torch.empty(1, 32, dtype=torch.bfloat16), weight, None)


@pytest.mark.parametrize("compiler", ["eager", "aot_eager"])
def test_it_compiles_into_one_graph(compiler):
    dense, layer = compiled_pair()
    torch.compiler.reset()
    graph = torch.compile(layer, fullgraph=True, backend=compiler)
    x = inputs()
    for found, wanted in zip(outputs_and_gradients(layer, x), outputs_and_gradients(dense, x), strict=True):
        torch.testing.assert_close(found, wanted)
    x.grad = None
    y = graph(x)
    y.square().sum().backward()
    torch.testing.assert_close(y, dense(x))
    assert x.grad is not None
    with torch.no_grad():
        torch.testing.assert_close(graph(x), dense(x))


def test_it_compiles_under_autocast_and_is_followed_without_bytes():
    dense, layer = compiled_pair()
    torch.compiler.reset()
    graph = torch.compile(layer, fullgraph=True, backend="eager")
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(graph(inputs()), dense(inputs()))
    with FakeTensorMode(allow_non_fake_inputs=True) as mode, torch.no_grad():
        assert layer(mode.from_tensor(inputs().detach())).shape == (3, 5, 24)


def test_the_operator_is_registered_as_torch_wants_it():
    weight = random_weight(0, 6, 4, torch.float32)
    arguments = (torch.randn(2, 32), *weight[:3], torch.randn(6), "float32", False)
    torch.library.opcheck(compiled._operator, arguments)


def test_it_is_copied_pickled_and_loaded_with_its_kernel(tmp_path):
    _, layer = compiled_pair()
    torch.save(layer, tmp_path / "layer")
    other = compiled_pair(seed=9)[1]
    other.load_state_dict(layer.state_dict())
    for same in (copy.deepcopy(layer), torch.load(tmp_path / "layer", weights_only=False), other):
        assert same.kernel == "compiled" and torch.equal(same(inputs()), layer(inputs()))


def test_lora_trains_on_top_of_it():
    base = two_layers("packed")
    for layer in (base.first, base.second):
        layer.set_backend("packed", kernel="compiled")
    model = get_peft_model(base, LoraConfig(target_modules=["first", "second"], r=4))
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    losses = []
    for _ in range(5):
        loss = (model(inputs()) - 1).square().mean()
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[-1] < losses[0]


def test_on_another_device_it_is_an_error():
    weight = random_weight(0, 6, 4, torch.float32)
    with pytest.raises(ConfigError) as error:
        KERNELS["compiled"](torch.empty(2, 32, device="meta"), weight, None)
    assert str(error.value) == (
        "kernel 'compiled' runs on a CPU, the layer is on cpu and its input on meta. Use kernel='auto' or "
        "kernel='torch' there."
    )


def test_several_threads_give_what_one_gives():
    layer = PackedLinear.from_weight(expanding.expand(random_weight(0, 301, 64, torch.bfloat16)))
    layer.set_backend("packed", kernel="compiled")
    x, before = torch.randn(7, 512).bfloat16(), torch.get_num_threads()
    one = layer(x)
    try:
        torch.set_num_threads(3)
        assert torch.equal(layer(x), one)
    finally:
        torch.set_num_threads(before)
    assert isinstance(layer, nn.Linear)
