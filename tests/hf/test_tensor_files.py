"""Safetensors files written and read a tensor at a time: as the library does, and strict about damage."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from hf_adaptive_sparse.errors import FormatError
from hf_adaptive_sparse.hf import tensor_files
from hf_adaptive_sparse.hf.tensor_files import DTYPES, digest_of_digests, read_header, rewrite_metadata, write_tensors

TENSORS = {
    "matrix": torch.arange(12, dtype=torch.float32).view(3, 4),
    "half": torch.randn(2, 5, dtype=torch.float16),
    "brain": torch.randn(7, dtype=torch.bfloat16),
    "scalar": torch.tensor(3.5),
    "empty": torch.zeros(0, 4),
    "bytes": torch.arange(5, dtype=torch.uint8),
    "flags": torch.tensor([[True, False, True]]),
    "fused": torch.randn(2, 3, 4),
    "strided": torch.arange(6).view(2, 3).t(),
}


def write(path: Path, tensors=TENSORS, metadata=None) -> dict[str, str]:
    layout = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}
    return write_tensors(path, layout, tensors.__getitem__, metadata or {})


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "a.safetensors"
    write(path, metadata={"key": "value", "other": "x"})
    return path


def test_the_library_reads_what_is_written_here(file):
    read = load_file(file)
    assert read.keys() == TENSORS.keys()
    assert all(read[name].dtype == each.dtype and torch.equal(read[name], each) for name, each in TENSORS.items())
    with safe_open(file, "pt") as opened:
        assert opened.metadata() == {"key": "value", "other": "x"}


def test_what_the_library_writes_is_read_here(tmp_path):
    tensors = {name: tensor.contiguous() for name, tensor in TENSORS.items()}
    save_file(tensors, tmp_path / "b", metadata={"key": "value"})
    found, metadata = read_header(tmp_path / "b")
    assert metadata == {"key": "value"} and found.keys() == tensors.keys()
    for name, stored in found.items():
        assert (stored.dtype, stored.shape) == (tensors[name].dtype, tuple(tensors[name].shape))
        assert b"".join(stored.chunks()) == tensors[name].reshape(-1).view(torch.uint8).numpy().tobytes()


@pytest.mark.parametrize("chunk", [1, 7, 1 << 24])
def test_blocks_and_chunks_put_together_are_the_tensor(file, chunk, monkeypatch):
    monkeypatch.setattr(tensor_files, "_CHUNK", chunk)
    found, _ = read_header(file)
    for name in ("matrix", "half", "flags", "fused", "strided", "empty"):
        blocks = list(found[name].blocks())
        assert [first for first, _ in blocks] == list(range(0, TENSORS[name].shape[0], 8))
        if blocks:
            assert torch.equal(torch.cat([block for _, block in blocks]), TENSORS[name])
    assert b"".join(found["matrix"].chunks()) == TENSORS["matrix"].numpy().tobytes()


def test_the_digest_is_of_name_dtype_shape_and_bytes(file, tmp_path):
    digests = write(tmp_path / "again")
    found, _ = read_header(file)
    assert {name: tensor.digest() for name, tensor in found.items()} == digests
    zeros = {
        "a": torch.zeros(4, 2),
        "b": torch.zeros(4, 2),
        "c": torch.zeros(2, 4),
        "d": torch.zeros(8, dtype=torch.int32),
    }
    assert len(set(write(tmp_path / "zeros", zeros).values())) == 4
    renamed = write(tmp_path / "renamed", {"c": zeros["a"].view(4, 2)})
    assert renamed["c"] not in write(tmp_path / "zeros", zeros).values()


@settings(max_examples=20)
@given(st.dictionaries(st.text(min_size=1), st.text(alphabet="0123456789abcdef", min_size=1), min_size=1))
def test_the_digest_of_digests_does_not_depend_on_their_order(digests):
    backwards = dict(reversed(digests.items()))
    assert digest_of_digests(digests) == digest_of_digests(backwards)
    assert digest_of_digests(digests) != digest_of_digests({**digests, "one more": "0"})


def test_metadata_are_replaced_in_place(file):
    before = load_file(file)
    rewrite_metadata(file, {"key": "VALUE", "other": "y"})
    assert read_header(file)[1] == {"key": "VALUE", "other": "y"}
    assert all(torch.equal(before[name], each) for name, each in load_file(file).items())
    with pytest.raises(AssertionError, match="another length"):
        rewrite_metadata(file, {"key": "a longer value, by a lot", "other": "y"})
    assert read_header(file)[1] == {"key": "VALUE", "other": "y"}


def test_a_tensor_that_is_not_as_it_was_laid_out_is_our_own_mistake(tmp_path):
    with pytest.raises(AssertionError, match="a is not as it was laid out"):
        write_tensors(tmp_path / "f", {"a": (torch.float32, (2,))}, lambda name: torch.zeros(3), {})


def test_every_dtype_has_the_name_that_the_library_gives_it(tmp_path):
    for number, (name, dtype) in enumerate(DTYPES.items()):
        save_file({"t": torch.zeros(2).to(dtype)}, tmp_path / str(number))
        assert read_header(tmp_path / str(number))[0]["t"].dtype_name == name


def test_a_missing_file_and_a_short_one_are_named(tmp_path):
    with pytest.raises(FormatError) as error:
        read_header(tmp_path / "none")
    assert str(error.value) == f"{tmp_path / 'none'}: the file is missing."
    for content in (b"", b"123", (100).to_bytes(8, "little") + b"{}", (2**63).to_bytes(8, "little") + b"{}"):
        (tmp_path / "f").write_bytes(content)
        with pytest.raises(FormatError) as error:
            read_header(tmp_path / "f")
        assert str(error.value) == (
            f"{tmp_path / 'f'}: the header does not fit in {len(content)} bytes. The file is truncated."
        )


def entry(dtype="F32", shape=(2,), start=0, end=8) -> dict:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [start, end]}


@pytest.mark.parametrize(
    "header, reason",
    [
        ("{", "Expecting property name enclosed in double quotes: line 1 column 2 (char 1)"),
        (b"\xff\xfe", "'utf-8' codec can't decode byte 0xff in position 0: invalid start byte"),
        ("[]", "it is no object"),
        ('{"a": 1}', "'int' object is not subscriptable"),
        ({"a": {"dtype": "F32"}}, "'shape'"),
        ({"a": entry("F99")}, "a has the unknown dtype 'F99'"),
        ({"a": entry(shape=(-2,))}, "a has a shape or a place that is no number"),
        ({"a": entry(shape=(True, 2))}, "a has a shape or a place that is no number"),
        ({"a": entry(shape=(3,))}, "a has 8 bytes, which is not [3] of F32"),
        ({"a": entry(start=8, end=16)}, "a starts at byte {0} + 8, expected {0}"),
        ({"a": entry(), "b": entry()}, "b starts at byte {0}, expected {0} + 8"),
        ({}, "the tensors end at byte {0} of {0} + 8"),
        ({"__metadata__": {"a": 1}, "a": entry()}, "its metadata are not all strings"),
        ('{"a": {"dtype": "F32", "dtype": "F16"}}', "a name occurs twice"),
    ],
)
def test_a_header_that_makes_no_sense_is_refused_with_the_reason(tmp_path, header, reason):
    text = json.dumps(header) if isinstance(header, dict) else header
    encoded = text.encode() if isinstance(text, str) else text
    path, start = tmp_path / "f", 8 + len(encoded)
    path.write_bytes(len(encoded).to_bytes(8, "little") + encoded + bytes(8))
    reason = reason.replace("{0} + 8", str(start + 8)).replace("{0}", str(start))
    with pytest.raises(FormatError) as error:
        read_header(path)
    assert str(error.value) == f"{path}: the header cannot be read ({reason}). The file is damaged."


def test_a_file_that_shrinks_while_it_is_read_is_an_error(file):
    tensor = read_header(file)[0]["matrix"]
    file.write_bytes(file.read_bytes()[: tensor.start + 5])
    message = f"^{re.escape(str(file))}: ends inside of matrix\\. The file is truncated\\.$"
    with pytest.raises(FormatError, match=message):
        tensor.digest()
    with pytest.raises(FormatError, match=message):
        list(tensor.blocks())


def test_deeply_nested_json_is_an_error_and_not_a_crash(tmp_path):
    encoded = b"[" * 200_000
    (tmp_path / "f").write_bytes(len(encoded).to_bytes(8, "little") + encoded)
    with pytest.raises(FormatError, match="the header cannot be read"):
        read_header(tmp_path / "f")
