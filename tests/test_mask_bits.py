"""Masks alone: nothing is lost, equal masks give equal bytes, the shorter form is taken, damage is named."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_adaptive_sparse.errors import FormatError
from hf_adaptive_sparse.formats import mask_bits, two_four
from hf_adaptive_sparse.formats.mask_bits import EncodedMask
from hf_adaptive_sparse.formats.two_four import row_blocks
from hf_adaptive_sparse.patterns import NMPattern

from .reference import mask_bits as reference

seeds = st.integers(0, 2**31)
DAMAGED = "The file is damaged; fetch it again."


def random_keep(seed: int, rows: int, columns: int, density: float | None = None) -> torch.Tensor:
    scores = torch.rand(rows, columns, generator=torch.Generator().manual_seed(seed))
    return NMPattern(2, 4).keep_mask(scores) if density is None else scores < density


@settings(max_examples=50)
@given(seed=seeds, rows=st.integers(1, 6), groups=st.integers(1, 20))
def test_two_of_four_has_the_bytes_of_the_reference(seed, rows, groups):
    keep = random_keep(seed, rows, 4 * groups)
    found = mask_bits.encode(keep)
    expected, cleared = reference.two_of_four(keep.tolist())
    if len(expected[0]) < -(-groups * 4 // 8):
        assert (found.encoding, found.bits.tolist(), found.cleared) == ("two_of_four", expected, None)
    else:  # one or two groups in a row take a byte either way
        assert (found.encoding, found.bits.tolist()) == ("bits", reference.bits(keep.tolist()))
    assert cleared == []
    assert torch.equal(mask_bits.decode(found, tuple(keep.shape)), keep)


@settings(max_examples=50)
@given(seed=seeds, rows=st.integers(1, 6), columns=st.integers(1, 70), density=st.floats(0, 1))
def test_any_mask_comes_out_as_it_went_in(seed, rows, columns, density):
    keep = random_keep(seed, rows, columns, density)
    found = mask_bits.encode(keep)
    assert torch.equal(mask_bits.decode(found, (rows, columns)), keep)
    if found.encoding == "bits":
        assert found.bits.tolist() == reference.bits(keep.tolist())
    else:
        expected, cleared = reference.two_of_four(keep.tolist())
        assert found.bits.tolist() == expected and ([] if found.cleared is None else found.cleared.tolist()) == cleared


def test_a_few_short_groups_do_not_cost_the_shorter_form():
    keep = random_keep(0, 64, 4096)
    keep[3, :4], keep[60, 8:12] = False, torch.tensor([False, False, True, False])
    found = mask_bits.encode(keep)
    assert found.encoding == "two_of_four" and torch.equal(mask_bits.decode(found, (64, 4096)), keep)
    assert found.cleared is not None and found.cleared.tolist() == [3 * 4096 + 2, 3 * 4096 + 3, 60 * 4096 + 11]
    assert found.bits.nbytes * 8 / keep.numel() == pytest.approx(2 / 3, rel=2e-3)


def test_a_mask_of_several_blocks_of_rows_is_whole():
    keep = random_keep(0, 700, 1024)
    keep[300:700:7, :8] = False
    assert len(row_blocks(700, 1024)) > 2
    assert torch.equal(mask_bits.decode(mask_bits.encode(keep), (700, 1024)), keep)


def test_a_short_group_takes_the_pattern_that_the_packed_format_gives_it():
    for bits in range(16):
        group = torch.tensor([[bool(bits >> position & 1) for position in range(4)]]).repeat(1, 40)
        if group[0, :4].sum() > 2:
            continue
        _, meta = two_four.pack(group.float())
        nibble = int(meta[0, 0]) & 15
        digits, _ = reference.two_of_four(group.tolist())
        assert reference.PATTERNS[digits[0][0] % 6] == (nibble & 3, nibble >> 2)


def refusal(encoding: str, bits: torch.Tensor, shape: tuple[int, int], cleared: torch.Tensor | None = None) -> str:
    with pytest.raises(FormatError) as caught:
        mask_bits.decode(EncodedMask(encoding, bits, cleared), shape, "up.bits")
    return str(caught.value)


def test_damage_is_named_with_its_place():
    _, bits, _ = mask_bits.encode(random_keep(0, 3, 32))  # 8 groups: three bytes a row, two groups in the last
    bits = bits.clone()
    bits[1, 0] = 216
    assert refusal("two_of_four", bits, (3, 32)) == (
        f"up.bits: byte 0 of row 1 is 216, which stands for no pattern. {DAMAGED}"
    )
    bits[1, 0] = 0
    bits[2, 2] = 36
    assert refusal("two_of_four", bits, (3, 32)) == (
        f"up.bits: byte 2 of row 2 is 36, which stands for no pattern. {DAMAGED}"
    )
    assert refusal("two_of_four", bits, (3, 36 + 4)) == (
        f"up.bits: must be uint8 [3, 4] for a mask of [3, 40], found uint8 [3, 3]. {DAMAGED}"
    )
    assert refusal("bits", torch.full((1, 1), 255, dtype=torch.uint8), (1, 5)) == (
        f"up.bits: row 0 has bits behind column 4. {DAMAGED}"
    )
    known = "this hf_adaptive_sparse reads two_of_four (of a multiple of 4 columns) and bits. Update "
    known += "hf_adaptive_sparse;"
    assert refusal("gzip", bits, (3, 32)) == (
        f"up.bits: has the encoding 'gzip' for 32 columns; {known} if that does not help, the file is damaged."
    )
    assert refusal("two_of_four", bits, (3, 30)).startswith("up.bits: has the encoding 'two_of_four' for 30 columns;")


@pytest.mark.parametrize("cleared", [[5, 5], [9, 2], [-1], [96], [0.0], []])
def test_cleared_places_must_be_places_that_are_kept(cleared):
    keep = torch.zeros(3, 32, dtype=torch.bool)
    keep.view(-1, 4)[:, :2] = True
    encoding, bits, _ = mask_bits.encode(keep)
    assert refusal(encoding, bits, (3, 32), torch.tensor(cleared)).startswith("up.bits: `cleared` must be increasing ")
    assert refusal(encoding, bits, (3, 32), torch.tensor([2])).startswith("up.bits: `cleared` must be increasing ")
