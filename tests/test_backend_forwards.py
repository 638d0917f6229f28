"""Every backend computes the same layer, says why it cannot, and a layer takes the one that was measured fastest."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hf_adaptive_sparse import backend_forwards
from hf_adaptive_sparse.backend_choice import Choice
from hf_adaptive_sparse.backend_dispatch import RowDispatch, dispatch, undo_dispatch
from hf_adaptive_sparse.backend_forwards import (
    BACKENDS,
    Backend,
    CusparseltForward,
    competes,
    forward_of,
    place_of,
    usable_backends,
)
from hf_adaptive_sparse.errors import ConfigError
from hf_adaptive_sparse.layers import PackedLinear
from hf_adaptive_sparse.patterns import NMPattern


def layer(rows: int = 32, columns: int = 48, dtype=torch.float32, bias: bool = True, seed: int = 0) -> PackedLinear:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, columns, generator=generator)
    weight = torch.where(NMPattern(2, 4).keep_mask(weight.abs()), weight, 0.0).to(dtype)
    return PackedLinear.from_weight(weight, torch.randn(rows, generator=generator).to(dtype) if bias else None)


def fake_cusparselt(monkeypatch, calls: list) -> None:
    """What the library does, as its schema has it: W @ X^T, or the transpose of that."""
    def compress(weight):
        return weight.clone()

    def search(compressed, dense, bias=None, transpose_result=False):
        calls.append(("search", tuple(dense.shape)))
        return 7

    def multiply(compressed, dense, bias=None, transpose_result=False, alg_id=0):
        calls.append((alg_id, tuple(dense.shape)))
        assert dense.shape[1] % 8 == 0 and transpose_result
        result = compressed @ dense
        return (result if bias is None else result + bias[:, None]).t()

    for name, function in (("compress", compress), ("sparse_mm_search", search), ("sparse_mm", multiply)):
        monkeypatch.setattr(torch, f"_cslt_{name}", function, raising=False)


@pytest.mark.parametrize("held", ["packed", "dense"])
@pytest.mark.parametrize("bias", [True, False])
def test_backends_of_this_machine_compute_the_same_and_leave_the_layer_as_it_is(held, bias):
    module = layer(bias=bias)
    module.set_backend(held)
    x = torch.randn(2, 3, 48, generator=torch.Generator().manual_seed(1))
    expected = module(x)
    usable, refused = usable_backends(module)
    assert list(usable) == ["dense", "expanded", "packed"] and list(refused) == ["cusparselt", "cusparselt-searched"]
    for name in usable:
        torch.testing.assert_close(forward_of(name, module)(x), expected)
        assert module.backend == held and "forward" not in vars(module)


@pytest.mark.parametrize("search", [False, True])
@given(rows=st.integers(1, 20), bias=st.booleans())
def test_cusparselt_is_fed_what_it_takes_and_gives_the_rows_of_the_input(search, rows, bias):
    with pytest.MonkeyPatch.context() as monkeypatch:
        calls: list = []
        fake_cusparselt(monkeypatch, calls)
        module = layer(bias=bias)
        forward = CusparseltForward(module, search)
        x = torch.randn(1, rows, 48, generator=torch.Generator().manual_seed(2))
        for _ in range(2):
            torch.testing.assert_close(forward(x), module(x))
        padded = -(-rows // 8) * 8
        product = (7 if search else 0, (48, padded))
        assert calls == ([("search", (48, padded))] if search else []) + [product, product]


@pytest.mark.parametrize("name, module, message", [
    ("fast", layer(), "unknown backend 'fast'; known: dense, expanded, packed, cusparselt, cusparselt-searched."),
    ("cusparselt", layer(),
     "backend 'cusparselt' needs a CUDA device, and the layer is on cpu. Known: dense, expanded, packed, cusparselt, "
     "cusparselt-searched."),
])  # fmt: skip
def test_a_backend_that_cannot_be_used_says_why(name, module, message):
    with pytest.raises(ConfigError) as caught:
        forward_of(name, module)
    assert str(caught.value) == message


class _OnCuda:
    """A layer as if it were on a CUDA device."""

    def __init__(self, rows: int, columns: int, dtype: torch.dtype) -> None:
        self.out_features, self.in_features, self.value_dtypes = rows, columns, (dtype,)

    def parameters(self):
        return iter([type("Parameter", (), {"device": torch.device("cuda:0")})])


@pytest.mark.parametrize("rows, columns, dtype, reason", [
    (32, 48, torch.float32, "multiplies float16 and bfloat16, and the layer is float32"),
    (32, 40, torch.bfloat16, "needs sides in multiples of 16, and the layer is 32x40"),
    (32, 48, torch.bfloat16, "is not there"),
])  # fmt: skip
def test_cusparselt_refuses_layers_that_it_cannot_multiply(monkeypatch, rows, columns, dtype, reason):
    monkeypatch.setitem(backend_forwards._PROBED, torch.device("cuda:0"), "is not there")
    assert BACKENDS["cusparselt"].refuses(_OnCuda(rows, columns, dtype)) == reason


def test_an_older_torch_without_the_functions_is_named(monkeypatch):
    monkeypatch.setattr(backend_forwards, "has", lambda name: name != "_cslt_sparse_mm")
    expected = f"needs torch._cslt_sparse_mm, which torch {torch.__version__} lacks"
    assert BACKENDS["cusparselt"].refuses(_OnCuda(32, 48, torch.bfloat16)) == expected


def test_a_library_that_fails_or_computes_nonsense_is_found_out_once(monkeypatch):
    device = torch.device("cpu")
    monkeypatch.setattr(backend_forwards, "_PROBED", {})
    fake_cusparselt(monkeypatch, [])
    assert backend_forwards.cusparselt_problem(device) is None
    backend_forwards._PROBED.clear()
    monkeypatch.setattr(torch, "_cslt_compress", lambda weight: weight + 1)
    assert backend_forwards.cusparselt_problem(device).startswith("gives wrong results on this device")
    backend_forwards._PROBED.clear()

    def broken(weight):
        raise RuntimeError("cuSPARSELt: architecture mismatch\nat line 3")

    monkeypatch.setattr(torch, "_cslt_compress", broken)
    reason = "does not work on this device (cuSPARSELt: architecture mismatch)"
    assert backend_forwards.cusparselt_problem(device) == reason
    fake_cusparselt(monkeypatch, [])
    assert backend_forwards.cusparselt_problem(device) == reason  # it is not tried again


def test_a_layer_is_placed_without_its_weight_being_expanded(monkeypatch):
    module = layer(dtype=torch.bfloat16)
    monkeypatch.setattr(PackedLinear, "_expanded", None)
    assert place_of(module) == (torch.device("cpu"), torch.bfloat16)


def test_what_is_dense_by_another_name_does_not_compete_with_it():
    assert {name for name in BACKENDS if competes(name)} == {"dense", "packed", "cusparselt", "cusparselt-searched"}
    assert not competes("of the future")


def choices(**names: str) -> dict[int, Choice]:
    return {int(rows.removeprefix("rows")): Choice(name, 2.0) for rows, name in names.items()}


def test_one_choice_for_all_rows_needs_no_dispatch():
    module = layer()
    assert dispatch(module, choices(rows1="packed", rows64="packed")) == {"packed"}
    assert module.backend == "packed" and "forward" not in vars(module)
    assert dispatch(module, choices(rows1="dense", rows64="expanded")) == {"dense", "expanded"}
    assert module.backend == "dense" and "forward" not in vars(module)


def test_a_layer_takes_the_backend_of_the_nearest_measured_rows(monkeypatch):
    used = []

    def build(each):
        return lambda x: used.append(len(x)) or each(x)

    monkeypatch.setitem(BACKENDS, "noted", Backend(lambda each: build(copy.deepcopy(each))))
    module = layer()
    x = {rows: torch.randn(rows, 48) for rows in (1, 2, 7, 8, 9, 500)}
    expected = {rows: module(each) for rows, each in x.items()}
    state = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    assert dispatch(module, choices(rows1="dense", rows64="noted")) == {"dense", "noted"}
    assert isinstance(module.forward, RowDispatch) and module.backend == "dense"
    for rows, each in x.items():
        torch.testing.assert_close(module(each), expected[rows])
    assert used == [9, 500]
    torch.testing.assert_close(copy.deepcopy(module)(x[9]), expected[9])
    undo_dispatch(module)
    torch.testing.assert_close(module(x[500]), expected[500])
    assert used == [9, 500, 9]
    module.set_backend("packed")
    assert {name: tensor.tolist() for name, tensor in module.state_dict().items()} == {
        name: tensor.tolist() for name, tensor in state.items()
    }


def test_a_layer_that_was_moved_since_says_so(monkeypatch):
    monkeypatch.setitem(BACKENDS, "other", Backend(lambda each: copy.deepcopy(each)))
    module = layer()
    dispatch(module, choices(rows1="dense", rows64="other"))
    with pytest.raises(ConfigError) as caught:
        module(torch.randn(1, 48, dtype=torch.float64))
    assert str(caught.value) == (
        "a layer with measured backends was set up on cpu in torch.float32, and got an input on cpu in torch.float64. "
        "Call use_measured_backends(model) again after moving the model."
    )


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["cusparselt", "cusparselt-searched"])
@pytest.mark.parametrize("rows", [1, 4, 16, 100])
def test_cusparselt_computes_the_layer(name, rows):
    module = layer(256, 512, torch.bfloat16).to("cuda")
    problem = BACKENDS[name].refuses(module)
    if problem is not None:
        pytest.skip(problem)
    x = torch.randn(rows, 512, device="cuda", dtype=torch.bfloat16)
    torch.testing.assert_close(forward_of(name, module)(x), module(x), rtol=2e-2, atol=2e-1)
