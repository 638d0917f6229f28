"""Rooflines and bytes are those of the textbook, and of the tensors that are really stored."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hf_adaptive_sparse.errors import ConfigError
from hf_adaptive_sparse.footprint import STORED, Stored, kv_bytes_per_token
from hf_adaptive_sparse.formats import two_four
from hf_adaptive_sparse.hardware import HARDWARE, Hardware, custom_hardware

amounts = st.floats(1.0, 1e18)


def machine(**changes) -> Hardware:
    known = {"name": "m", "bytes_per_second": 100.0, "flops_per_second": {"bfloat16": 1000.0}, "sparse_factor": 2.0}
    return Hardware(**known | changes)


@given(amounts, amounts, amounts)
def test_the_time_is_the_larger_of_bytes_and_operations_and_grows_with_each(nbytes, flops, sparse):
    found = machine().seconds(nbytes, flops, "bfloat16", sparse)
    assert found == max(nbytes / 100.0, (flops + sparse / 2.0) / 1000.0)
    assert machine().seconds(2 * nbytes, flops, "bfloat16", sparse) >= found
    assert machine().seconds(nbytes, flops + sparse, "bfloat16") >= found
    assert machine(sparse_factor=1.0).seconds(nbytes, flops, "bfloat16", sparse) >= found


@pytest.mark.parametrize("name", HARDWARE)
def test_every_machine_of_the_table_has_a_source_memory_and_rates(name):
    found = HARDWARE[name]
    assert found.source and found.memory_bytes and found.sparse_factor == 2.0
    assert found.rate("float16") == found.rate("bfloat16") > found.rate("float32")
    # A card computes between 50 and 1000 operations in 16 bits for every byte that it reads.
    assert 50 < found.rate("bfloat16") / found.bytes_per_second < 1000
    assert found.fits(found.memory_bytes) and not found.fits(found.memory_bytes + 1)


def test_a_machine_of_two_numbers_has_the_same_rate_for_all():
    found = custom_hardware(50, 200)
    assert (found.bytes_per_second, found.rate("float32"), found.rate("float16")) == (5e10, 2e11, 2e11)
    assert (found.sparse_factor, found.fits(1e15)) == (1.0, None)


@pytest.mark.parametrize("make, message", [
    (lambda: machine(bytes_per_second=0.0), "m: bytes_per_second is a rate above 0, got 0.0."),
    (lambda: machine(flops_per_second={"float32": math.inf}), "m: float32 is a rate above 0, got inf."),
    (lambda: machine(flops_per_second={}), "m: needs operations per second of at least one dtype."),
    (lambda: machine().rate("float32"),
     "m: its operations per second in float32 are not known; known: bfloat16. Choose one of these with --dtype."),
    (lambda: Stored(bits=3), "bits of stored values are 8 or 4, got 3."),
    (lambda: Stored(bits=8, group_size=6), "group_size is a multiple of 4 inputs, got 6."),
])  # fmt: skip
def test_what_cannot_be_is_refused(make, message):
    with pytest.raises(ConfigError) as caught:
        make()
    assert str(caught.value) == message


@given(st.integers(1, 9), st.integers(1, 6), st.sampled_from([torch.float32, torch.bfloat16]))
def test_packed_bytes_are_those_of_the_packed_tensors(rows, octets, dtype):
    weight = torch.zeros(rows, 8 * octets, dtype=dtype)
    packed = sum(tensor.nbytes for tensor in two_four.pack(weight))
    assert STORED["2:4"].weight_bytes(rows, 8 * octets, dtype.itemsize) == packed
    assert STORED["dense"].weight_bytes(rows, 8 * octets, dtype.itemsize) == weight.nbytes


@pytest.mark.parametrize("form, dense, per_weight, ratio", [
    ("2:4", "dense", 1.125, 0.5625), ("2:4 int8", "dense int8", 0.625 + 4 / 128, None),
    ("2:4 int4", "dense int4", 0.375 + 4 / 128, None),
])  # fmt: skip
def test_bytes_per_weight_are_those_of_the_table(form, dense, per_weight, ratio):
    """With scales of 4 bytes for 128 inputs; without, 8 and 4 bits are 0.625 and 0.75 of dense codes."""
    mine, theirs = (STORED[name].weight_bytes(4096, 4096, 2) / 4096**2 for name in (form, dense))
    assert mine == per_weight
    if ratio is None:
        bits = STORED[form].bits
        assert (mine - 4 / 128) / (theirs - 4 / 128) == {8: 0.625, 4: 0.75}[bits]
    else:
        assert mine / theirs == ratio


def test_the_cache_of_llama_2_7b_is_half_a_megabyte_per_token():
    assert kv_bytes_per_token(32, 32, 128, 2) == 524288
