"""PackedLinear with quantised values: codes in place of values, and nothing else changes."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from hypothesis import given, settings
from peft import LoraConfig, get_peft_model
from torch import nn

from hf_adaptive_sparse.errors import PatternError
from hf_adaptive_sparse.formats import two_four, value_codes
from hf_adaptive_sparse.formats.value_codes import StoredGrid
from hf_adaptive_sparse.layers import PackedLinear

from .test_packed_linear import TwoLayers, every_backend, every_kind, inputs, make_pair, outputs_and_gradients, seeds

every_bits = pytest.mark.parametrize("bits", [8, 4])
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
REMEDY = "Round the weight to its grid first, or keep it without one (of a loaded model: model.dequantize())."


def held_bytes(layer: nn.Module) -> int:
    return sum(tensor.nbytes for tensor in (*layer.parameters(), *layer.buffers()))


@every_kind
@every_backend
@every_bits
@pytest.mark.parametrize("dtype", DTYPES)
@settings(max_examples=4)
@given(seed=seeds)
def test_outputs_and_gradients_equal_those_of_the_ordinary_layer_bit_by_bit(backend, transposed, bits, dtype, seed):
    dense, packed = make_pair(seed, dtype=dtype, transposed=transposed, backend=backend, bits=bits)
    x = inputs(seed, dtype=dtype)
    for found, wanted in zip(outputs_and_gradients(packed, x), outputs_and_gradients(dense, x), strict=True):
        assert torch.equal(found, wanted)


@every_kind
@every_bits
@pytest.mark.parametrize("dtype", DTYPES)
def test_changing_the_backend_back_and_forth_changes_no_bit(transposed, bits, dtype):
    _, layer = make_pair(transposed=transposed, dtype=dtype, bits=bits)
    before, weight = {name: tensor.clone() for name, tensor in layer.state_dict().items()}, layer.weight.clone()
    assert set(before) == {"weight_values", "weight_meta", "weight_scale", "bias"}
    assert before["weight_values"].dtype == {8: torch.int8, 4: torch.uint8}[bits]
    layer.set_backend("dense")
    assert layer.backend == "dense" and set(layer.state_dict()) == {"weight", "weight_scale", "bias"}
    assert layer.weight.dtype == dtype and torch.equal(layer.weight, weight)
    assert torch.equal(layer.weight_values, before["weight_values"])
    assert torch.equal(layer.weight_meta, before["weight_meta"])
    layer.set_backend("packed")
    assert layer.state_dict().keys() == before.keys()
    assert all(torch.equal(tensor, before[name]) for name, tensor in layer.state_dict().items())


@pytest.mark.parametrize("bits, ratio", [(8, 0.3125), (4, 0.1875)])
def test_packed_it_takes_exactly_the_promised_bytes_and_dense_only_the_scales_more(bits, ratio):
    dense, packed = make_pair(dtype=torch.bfloat16, bias=False, bits=bits)
    scale_bytes = 24 * 4 * 4
    assert held_bytes(packed) == ratio * dense.weight.nbytes + scale_bytes
    packed.set_backend("dense")
    assert held_bytes(packed) == dense.weight.nbytes + scale_bytes


@every_bits
def test_the_backward_pass_keeps_the_codes_and_not_the_values(bits):
    _, layer = make_pair(bits=bits)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: saved.append(tensor) or tensor, lambda tensor: tensor):
        layer(inputs())
    assert {tuple(tensor.shape) for tensor in saved} == {(24, 2 * bits), (24, 4)}  # meta has the shape of the scales
    assert torch.uint8 in {tensor.dtype for tensor in saved} and saved[0].dtype == layer.weight_values.dtype


@every_kind
@every_backend
@every_bits
@pytest.mark.parametrize("casts", [DTYPES[1:], DTYPES[:1] + DTYPES[2:], [torch.float16, torch.float32], DTYPES[::-1]])
def test_casting_is_that_of_the_ordinary_layer_and_leaves_codes_and_scales_alone(backend, transposed, bits, casts):
    dense, packed = make_pair(transposed=transposed, backend=backend, bits=bits, dtype=torch.bfloat16)
    before = packed.weight_values.clone(), packed.weight_meta.clone(), packed.weight_scale.clone()
    for dtype in casts:
        dense.to(dtype)
        packed.to(dtype)
        assert packed.weight.dtype == packed.bias.dtype == dtype
        assert packed.weight_scale.dtype == torch.float32 and torch.equal(packed.weight_scale, before[2])
        x = inputs(dtype=dtype)
        for found, wanted in zip(outputs_and_gradients(packed, x), outputs_and_gradients(dense, x), strict=True):
            assert torch.equal(found, wanted)
    assert torch.equal(packed.weight_values, before[0]) and torch.equal(packed.weight_meta, before[1])
    packed.set_backend("packed" if backend == "dense" else "dense")
    assert torch.equal(packed(x), dense(x))


@pytest.mark.parametrize("cast", [nn.Module.half, nn.Module.bfloat16, lambda layer: layer.to("cpu", torch.float16)])
def test_every_way_of_casting_spares_the_scales(cast):
    _, layer = make_pair(bits=8)
    scale = layer.weight_scale.clone()
    cast(layer)
    assert torch.equal(layer.weight_scale, scale) and layer.weight.dtype == layer.bias.dtype != torch.float32


def test_a_move_that_fails_leaves_the_layer_as_it_was():
    _, layer = make_pair(bits=8)
    scale, weight = layer.weight_scale.clone(), layer.weight.clone()

    def fail(tensor):
        raise RuntimeError("no such device")

    with pytest.raises(RuntimeError, match="no such device"):
        layer._apply(fail)
    assert torch.equal(layer.weight_scale, scale) and torch.equal(layer.weight, weight)


@every_kind
@every_backend
@pytest.mark.parametrize("compiler", ["eager", "aot_eager"])
def test_it_compiles_into_one_graph(backend, transposed, compiler):
    _, layer = make_pair(transposed=transposed, backend=backend, bits=4)
    x = inputs()
    expected, gradient, _ = outputs_and_gradients(layer, x)
    torch.compiler.reset()
    compiled = torch.compile(layer, fullgraph=True, backend=compiler)
    x.grad = None
    y = compiled(x)
    y.square().sum().backward()
    assert torch.equal(y, expected) and torch.equal(x.grad, gradient)


@every_kind
@every_bits
def test_on_the_meta_device_it_has_shapes_and_no_data(transposed, bits):
    scale = torch.empty(24, 4, device="meta")
    layer = PackedLinear(
        32, 24, device="meta", dtype=torch.bfloat16, transposed=transposed, value_bits=bits, scale=scale
    )
    assert layer.weight.is_meta and layer.weight.shape == (24, 32) and layer.weight.dtype == torch.bfloat16
    assert layer(torch.empty(2, 32, device="meta", dtype=torch.bfloat16)).shape == (2, 24)
    real = copy.deepcopy(layer).to_empty(device="cpu")
    assert {name: (tensor.shape, tensor.dtype) for name, tensor in real.state_dict().items()} == {
        "weight_values": ((24, 2 * bits), {8: torch.int8, 4: torch.uint8}[bits]),
        "weight_meta": ((24, 4), torch.uint8),
        "weight_scale": ((24, 4), torch.float32),
        "bias": ((24,), torch.bfloat16),
    }
    layer.set_backend("dense")
    assert layer.weight.is_meta


@every_kind
@every_backend
@every_bits
def test_it_can_be_copied_pickled_and_its_state_loaded(backend, transposed, bits):
    _, layer = make_pair(transposed=transposed, backend=backend, bits=bits)
    x, buffer = inputs(), io.BytesIO()
    torch.save(layer, buffer)
    buffer.seek(0)
    _, other = make_pair(seed=9, transposed=transposed, backend=backend, bits=bits)
    assert not torch.equal(other(x), layer(x))
    other.load_state_dict(layer.state_dict())
    for same in (copy.deepcopy(layer), torch.load(buffer, weights_only=False), other):
        assert torch.equal(same(x), layer(x)) and same.backend == backend
        same.set_backend("packed")
        assert torch.equal(same(x), layer(x))


@every_backend
def test_its_repr_says_what_it_is(backend):
    assert repr(make_pair(backend=backend, bits=4)[1]) == (
        f"PackedLinear(in_features=32, out_features=24, bias=True, pattern=2:4, values=int4, backend={backend})"
    )


def test_a_weight_off_its_grid_is_refused_and_the_layer_named():
    weight = torch.zeros(8, 16)
    weight[5, 9] = 0.3
    with pytest.raises(PatternError) as error:
        PackedLinear.from_weight(weight, grid=StoredGrid(torch.ones(8, 1), 8), where="model.layer")
    assert str(error.value) == (
        f"model.layer: row 5, group 2 holds 0.3, which is not on the grid: its nearest code, 0, stands for 0. {REMEDY}"
    )


def test_a_dense_weight_that_was_written_to_cannot_be_packed_again():
    _, layer = make_pair(backend="dense", bits=4)
    layer.weight.data *= 1.01  # still 2:4
    with pytest.raises(PatternError, match=r"^model\.layer: row 0, group 0 holds .* which is not on the grid: "):
        layer.set_backend("packed", "model.layer")
    assert layer.backend == "dense"  # and still usable
    layer(inputs())


def test_codes_cannot_require_gradients_and_the_bias_can():
    _, layer = make_pair(bits=8)
    assert [name for name, parameter in layer.named_parameters() if parameter.requires_grad] == ["bias"]
    with pytest.raises(RuntimeError, match="only Tensors of floating point"):
        layer.requires_grad_(True)


@every_kind
@every_backend
@every_bits
def test_lora_trains_on_top_of_it_and_is_merged_into_dense_layers(backend, transposed, bits):
    def layer(seed, out=32):
        return make_pair(seed, out=out, transposed=transposed, backend=backend, bits=bits)[1]

    x, base = inputs(), TwoLayers(layer)
    expected = base(x)
    model = get_peft_model(base, LoraConfig(target_modules=["first", "second"], r=4))
    assert torch.equal(model(x), expected)  # B starts at zero
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    losses = []
    for _ in range(5):
        loss = (model(x) - 1).square().mean()
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[-1] < losses[0]
    assert {parameter.dtype for name, parameter in model.named_parameters() if "lora" in name} == {torch.float32}
    if backend == "dense":
        trained = model(x)
        torch.testing.assert_close(model.merge_and_unload()(x), trained, rtol=1e-4, atol=1e-4)


@every_backend
@every_kind
def test_dispatched_by_accelerate_and_offloaded_it_computes_the_same(backend, transposed, tmp_path):
    from accelerate import cpu_offload, disk_offload

    def model():
        return TwoLayers(
            lambda seed, out=32: make_pair(seed, out=out, transposed=transposed, backend=backend, bits=4)[1]
        )

    x = inputs().detach()
    expected = model()(x)
    ways = (
        lambda model: cpu_offload(model),
        lambda model: cpu_offload(model, offload_buffers=True),
        lambda model: disk_offload(model, str(tmp_path / "off")),
    )
    for offload in ways:
        offloaded = model()
        offload(offloaded)
        assert next(offloaded.parameters()).is_meta
        torch.testing.assert_close(offloaded(x), expected)


def test_the_weight_is_that_of_the_two_formats_one_after_the_other():
    dense, layer = make_pair(bits=4, dtype=torch.bfloat16)
    values = value_codes.decode(layer.weight_values, layer.weight_scale, (torch.bfloat16,))
    assert torch.equal(two_four.unpack(values, layer.weight_meta), dense.weight)
    assert layer.grid.bits == 4 and torch.equal(layer.grid.scales, layer.weight_scale)
    assert make_pair()[1].grid is None


def test_it_shares_no_memory_with_the_grid_it_was_made_from():
    grid = StoredGrid(torch.ones(8, 2), 4)
    layer = PackedLinear.from_weight(torch.zeros(8, 16), grid=grid)
    layer.weight_scale.fill_(2.0)
    assert torch.equal(grid.scales, torch.ones(8, 2))
