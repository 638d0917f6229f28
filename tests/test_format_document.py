"""docs/format.md says what the code does."""

from __future__ import annotations

import re
from pathlib import Path

import torch

from hf_adaptive_sparse.formats import FORMATS, two_four

from .hf.corruptions import CORRUPTIONS

TEXT = (Path(__file__).parents[1] / "docs" / "format.md").read_text(encoding="utf-8")


def test_the_example_has_the_bytes_that_are_written():
    row = torch.tensor([[float(each) for each in re.search(r"the row `\[(.+)\]`", TEXT)[1].split(",")]])
    tensors = dict(zip(FORMATS["2:4"].suffixes, two_four.pack(row.bfloat16()), strict=True))
    for name, tensor in tensors.items():
        written = re.search(rf"^    {name} .*?  +((?:[0-9A-F]{{2}} ?)+)$", TEXT, re.MULTILINE)[1]
        assert bytes.fromhex(written) == tensor.view(torch.uint8).numpy().tobytes()


def test_the_legal_nibbles_are_those_of_the_format():
    nibbles, positions = re.search(r"\| nibble \| (.+) \|\n.+\n\| positions \| (.+) \|", TEXT).groups()
    found = {int(nibble): text for nibble, text in zip(nibbles.split("|"), positions.split("|"), strict=True)}
    assert tuple(found) == two_four._LEGAL_NIBBLES
    for nibble, text in found.items():
        assert [nibble & 3, nibble >> 2] == [int(position) for position in text.split(",")]


def test_every_kind_of_random_damage_has_its_row():
    assert re.findall(r"^\| `(\w+)` \| \d+ \|", TEXT, re.MULTILINE) == [*CORRUPTIONS, "all"]
