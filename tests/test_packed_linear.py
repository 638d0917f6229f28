"""PackedLinear: nn.Linear in all but its memory; with adapters on top, offloaded, compiled."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers.pytorch_utils import Conv1D

from hf_adaptive_sparse.errors import ConfigError, PatternError
from hf_adaptive_sparse.formats.value_codes import StoredGrid
from hf_adaptive_sparse.layers import BACKENDS, PackedLinear
from hf_adaptive_sparse.patterns import NMPattern

every_backend = pytest.mark.parametrize("backend", BACKENDS)
every_value = pytest.mark.parametrize("bits", [None, 8, 4], ids=["values", "int8", "int4"])
every_kind = pytest.mark.parametrize("transposed", [False, True], ids=["linear", "conv1d"])
seeds = st.integers(0, 2**31)

READ_ONLY = (
    "the weight of a packed layer is read-only: what is written to its expansion would be lost. Call "
    "set_packed_backend(model, 'dense') first, or model.dequantize()."
)


def make_pair(
    seed=0, out=24, width=32, dtype=torch.float32, bias=True, transposed=False, backend="packed", bits=None
):
    """An ordinary layer with a 2:4 weight, on a grid of `bits` if not None, and the packed one that stands for it."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(out, width, generator=generator)
    weight = torch.where(NMPattern(2, 4).keep_mask(weight.abs()), weight, 0).to(dtype)
    grid = None
    if bits is not None:
        scales = 2.0 ** (2 - bits) * (1 + torch.rand(out, 4, generator=generator))  # of 8 inputs each
        codes = (weight.unflatten(1, (4, -1)) / scales.unsqueeze(-1)).round()
        codes = codes.clamp(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
        grid, weight = StoredGrid(scales, bits), (codes * scales.unsqueeze(-1)).flatten(1).to(dtype)
    dense = Conv1D(out, width) if transposed else nn.Linear(width, out, bias=bias)
    dense.weight = nn.Parameter(weight.t().contiguous() if transposed else weight)
    if dense.bias is not None:
        dense.bias = nn.Parameter(torch.randn(out, generator=generator).to(dtype))
    copied = None if dense.bias is None else dense.bias.detach().clone()
    packed = PackedLinear.from_weight(weight, copied, transposed=transposed, grid=grid)
    packed.set_backend(backend)
    return dense, packed


def inputs(seed=1, width=32, dtype=torch.float32):
    return torch.randn(3, 5, width, generator=torch.Generator().manual_seed(seed)).to(dtype).requires_grad_()


def outputs_and_gradients(layer, x):
    x.grad = None
    if layer.bias is not None:
        layer.bias.grad = None
    y = layer(x)
    y.square().sum().backward()
    return y, x.grad, None if layer.bias is None else layer.bias.grad


@every_kind
@every_backend
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@settings(max_examples=10)
@given(seed=seeds, bias=st.booleans())
def test_outputs_and_gradients_equal_those_of_the_ordinary_layer_bit_by_bit(
    backend, transposed, dtype, seed, bias
):
    dense, packed = make_pair(seed, dtype=dtype, bias=bias, transposed=transposed, backend=backend)
    x = inputs(seed, dtype=dtype)
    expected = outputs_and_gradients(dense, x)
    for found, wanted in zip(outputs_and_gradients(packed, x), expected, strict=True):
        assert (found is None and wanted is None) or torch.equal(found, wanted)


@every_kind
def test_changing_the_backend_back_and_forth_changes_no_bit(transposed):
    _, layer = make_pair(transposed=transposed, dtype=torch.bfloat16)
    values, meta, weight = layer.weight_values.clone(), layer.weight_meta.clone(), layer.weight.clone()
    layer.set_backend("dense")
    assert layer.backend == "dense" and set(layer.state_dict()) == {"weight", "bias"}
    assert torch.equal(layer.weight, weight)
    assert torch.equal(layer.weight_values, values) and torch.equal(layer.weight_meta, meta)
    layer.set_backend("packed")
    assert layer.backend == "packed" and set(layer.state_dict()) == {"weight_values", "weight_meta", "bias"}
    assert torch.equal(layer.weight_values, values) and torch.equal(layer.weight_meta, meta)


def test_packed_it_takes_0_5625_of_the_dense_bytes_and_dense_no_more_than_nn_linear():
    dense, packed = make_pair(dtype=torch.bfloat16, bias=False)
    held = [*packed.parameters(), *packed.buffers()]
    assert sum(tensor.nbytes for tensor in held) == 0.5625 * dense.weight.nbytes
    packed.set_backend("dense")
    held = [*packed.parameters(), *packed.buffers()]
    assert sum(tensor.nbytes for tensor in held) == dense.weight.nbytes


def test_the_backward_pass_does_not_keep_the_expanded_weight():
    _, layer = make_pair()
    saved = []

    def remember(tensor):
        saved.append(tuple(tensor.shape))
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(remember, lambda tensor: tensor):
        layer(inputs())
    assert (24, 32) not in saved and (24, 16) in saved


@pytest.mark.parametrize(
    "write",
    [
        lambda layer: layer.weight.add_(1),
        lambda layer: layer.weight.data.add_(1),
        lambda layer: layer.weight.data.view(-1).mul_(2),
        lambda layer: layer.weight.__setitem__(0, 1.0),
        lambda layer: setattr(layer.weight, "data", torch.zeros(24, 32)),
        lambda layer: exec("layer.weight.data += 1", {"layer": layer}),
        lambda layer: nn.init.zeros_(layer.weight),
        lambda layer: layer.weight.copy_(torch.zeros(24, 32)),
    ],
)
def test_writing_to_a_packed_weight_is_an_error_and_not_lost(write):
    _, layer = make_pair()
    with pytest.raises(ConfigError) as error, torch.no_grad():
        write(layer)
    assert str(error.value) == READ_ONLY


def test_reading_a_packed_weight_gives_ordinary_tensors():
    _, layer = make_pair()
    for result in (layer.weight + 1, layer.weight.data.clone(), layer.weight.double(), layer.weight[0]):
        assert type(result) is torch.Tensor
    assert layer.weight.shape == (24, 32) and layer.weight.dtype == torch.float32
    assert layer.weight.data.clone().add_(1).shape == (24, 32)


def test_the_weight_cannot_be_replaced_while_packed():
    _, layer = make_pair()
    with pytest.raises((KeyError, AttributeError), match="weight"):
        layer.weight = nn.Parameter(torch.zeros(24, 32))


def test_a_dense_weight_that_was_written_to_cannot_be_packed_again():
    _, layer = make_pair(backend="dense")
    layer.weight.data += 1
    with pytest.raises(PatternError) as error:
        layer.set_backend("packed", "model.layer")
    assert str(error.value) == (
        "model.layer: row 0, group 0 (inputs 0 to 3) has 4 non-zeros, 2:4 allows 2. Prune the layer first, "
        "or leave it dense."
    )
    assert layer.backend == "dense"  # and still usable
    layer(inputs())


def test_an_unknown_backend_is_refused():
    with pytest.raises(ConfigError) as error:
        make_pair()[1].set_backend("cuda")
    assert str(error.value) == "unknown backend 'cuda'; known: dense, packed."


def test_a_shape_that_cannot_be_packed_is_refused_at_once():
    with pytest.raises(PatternError) as error:
        PackedLinear(172, 64)
    assert str(error.value) == (
        "PackedLinear: the packed format needs the input features to be a multiple of 8, got 172 in a "
        "[64, 172] weight. Leave the layer dense."
    )


@every_backend
def test_packed_values_are_frozen_and_training_them_is_an_error(backend):
    _, layer = make_pair(backend=backend)
    assert [name for name, parameter in layer.named_parameters() if parameter.requires_grad] == ["bias"]
    layer.requires_grad_(True)
    if backend == "dense":  # an ordinary weight, which may be trained
        layer(inputs()).sum().backward()
        assert layer.weight.grad is not None
        return
    with pytest.raises(ConfigError) as error:
        layer(inputs()).sum().backward()
    assert str(error.value) == (
        "packed values cannot be trained: their positions would never change. Train an adapter on top, or "
        "call model.dequantize() and train the dense layer."
    )


@every_kind
@every_backend
def test_casting_changes_the_values_and_leaves_the_positions_alone(backend, transposed):
    dense, packed = make_pair(transposed=transposed, backend=backend)
    meta = packed.weight_meta.clone()
    packed.to(torch.bfloat16)
    dense.to(torch.bfloat16)
    assert packed.weight.dtype == torch.bfloat16 and torch.equal(packed.weight_meta, meta)
    x = inputs(dtype=torch.bfloat16)
    assert torch.equal(packed(x), dense(x))


@every_kind
@every_backend
def test_autocast_gives_the_result_of_the_ordinary_layer(backend, transposed):
    dense, packed = make_pair(transposed=transposed, backend=backend)
    x = inputs()
    results = []
    for layer in (dense, packed):
        x.grad = None
        with torch.autocast("cpu", torch.bfloat16):
            y = layer(x)
        y.float().square().sum().backward()
        results.append((y, x.grad))
    assert results[1][0].dtype == torch.bfloat16
    assert torch.equal(results[0][0], results[1][0])
    torch.testing.assert_close(results[0][1], results[1][1], rtol=0.02, atol=0.02)


@every_kind
@every_backend
@pytest.mark.parametrize("compiler", ["eager", "aot_eager"])
def test_it_compiles_into_one_graph(backend, transposed, compiler):
    _, layer = make_pair(transposed=transposed, backend=backend)
    x = inputs()
    expected, gradient, _ = outputs_and_gradients(layer, x)
    torch.compiler.reset()
    compiled = torch.compile(layer, fullgraph=True, backend=compiler)
    x.grad = None
    y = compiled(x)
    y.square().sum().backward()
    assert torch.equal(y, expected) and torch.equal(x.grad, gradient)
    with torch.no_grad():
        assert torch.equal(compiled(x), expected)


@every_kind
def test_on_the_meta_device_it_has_shapes_and_no_data(transposed):
    layer = PackedLinear(32, 24, device="meta", dtype=torch.bfloat16, transposed=transposed)
    assert layer.weight.is_meta and layer.weight.shape == (24, 32)
    assert layer(torch.empty(2, 32, device="meta", dtype=torch.bfloat16)).shape == (2, 24)
    layer.set_backend("dense")
    assert layer.weight.is_meta


@every_kind
@every_backend
def test_it_can_be_copied_pickled_and_its_state_loaded(backend, transposed):
    _, layer = make_pair(transposed=transposed, backend=backend)
    x, buffer = inputs(), io.BytesIO()
    torch.save(layer, buffer)
    buffer.seek(0)
    _, other = make_pair(seed=9, transposed=transposed, backend=backend)
    assert not torch.equal(other(x), layer(x))
    other.load_state_dict(layer.state_dict())
    for same in (copy.deepcopy(layer), torch.load(buffer, weights_only=False), other):
        assert torch.equal(same(x), layer(x)) and same.backend == backend


@every_backend
def test_its_repr_says_what_it_is(backend):
    assert repr(make_pair(backend=backend)[1]) == (
        f"PackedLinear(in_features=32, out_features=24, bias=True, pattern=2:4, backend={backend})"
    )


class TwoLayers(nn.Module):
    def __init__(self, make, backend="packed"):
        super().__init__()
        self.first, self.second = make(seed=1), make(seed=2, out=32)

    def forward(self, x):
        return self.second(torch.relu(self.first(x)))


def two_layers(backend, transposed=False):
    return TwoLayers(
        lambda seed, out=32: make_pair(seed, out=out, transposed=transposed, backend=backend)[1]
    )


@every_kind
@every_backend
def test_lora_trains_on_top_of_it(backend, transposed):
    x = inputs()
    base = two_layers(backend, transposed)
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
    assert all(p.grad is None for name, p in model.named_parameters() if "lora" not in name)
    with model.disable_adapter():
        assert torch.equal(model(x), expected)


def with_trained_lora(backend, transposed=False):
    config = LoraConfig(target_modules=["first", "second"], r=4)
    model = get_peft_model(two_layers(backend, transposed), config)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter)
    return model


@every_kind
@pytest.mark.parametrize("safe", [False, True])
def test_merging_lora_into_dense_layers_keeps_the_outputs(transposed, safe):
    model, x = with_trained_lora("dense", transposed), inputs()
    expected = model(x)
    merged = model.merge_and_unload(safe_merge=safe)
    assert type(merged.first) is PackedLinear and merged.first.backend == "dense"
    torch.testing.assert_close(merged(x), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("safe", [False, True])
def test_merging_lora_into_packed_layers_is_an_error_and_not_lost(safe):
    model, x = with_trained_lora("packed"), inputs()
    expected = model(x)
    with pytest.raises(ConfigError) as error:
        model.merge_and_unload(safe_merge=safe)
    assert str(error.value) == READ_ONLY
    assert torch.equal(model(x), expected)


@every_backend
@every_kind
def test_dispatched_by_accelerate_and_offloaded_it_computes_the_same(backend, transposed, tmp_path):
    from accelerate import cpu_offload, disk_offload

    x = inputs().detach()
    expected = two_layers(backend, transposed)(x)
    for name, offload in (("cpu", cpu_offload), ("disk", lambda m: disk_offload(m, str(tmp_path / "off")))):
        offloaded = two_layers(backend, transposed)
        offload(offloaded)
        assert next(offloaded.parameters()).is_meta, name
        torch.testing.assert_close(offloaded(x), expected)
