"""The model card template can be filled in, and every link inside the repository leads somewhere."""

from __future__ import annotations

import re
from pathlib import Path
from string import Formatter

import pytest
import yaml

ROOT = Path(__file__).parents[1]
TEMPLATE = ROOT / "model_cards" / "template.md"
VALUES = {
    "base_model": "someone/some-model",
    "data": "some/text",
    "dense_bytes": 2_000_000,
    "group": 4,
    "kept": 2,
    "license": "apache-2.0",
    "limits": "It was retrained on stories only.",
    "matrices": 42,
    "matrix_ratio": 0.5625,
    "name": "some-model-2of4",
    "pattern": "2:4",
    "perplexity_protocol": "400 windows of 256 tokens",
    "recipe": "200 steps",
    "results": "| model | perplexity |\n|---|---:|\n| dense | 3.9 |",
    "seed": 0,
    "steps": 200,
    "stored_bytes": 1_200_000,
    "tokens": 409_600,
    "usage": "import hf_adaptive_sparse",
    "versions": "torch 2.13.0",
}


def test_the_template_asks_for_these_values():
    asked = {name for _, name, _, _ in Formatter().parse(TEMPLATE.read_text(encoding="utf-8")) if name is not None}
    assert asked == set(VALUES)


def test_a_filled_in_template_has_the_header_that_a_hub_reads():
    card = TEMPLATE.read_text(encoding="utf-8").format(**VALUES)
    _, header, body = card.split("---\n", 2)
    assert yaml.safe_load(header) == {
        "license": "apache-2.0",
        "base_model": "someone/some-model",
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["sparse", "2-to-4-sparsity", "adaptive_sparse"],
    }
    assert "| all weights of this repository | 1,200,000 |" in body and "0.5625" in body


@pytest.mark.parametrize(
    "path",
    [*ROOT.glob("*.md"), *ROOT.glob("model_cards/*.md"), *ROOT.glob("benchmarks/*.md")],
    ids=lambda path: path.relative_to(ROOT).as_posix(),
)
def test_links_inside_the_repository_lead_somewhere(path):
    for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", path.read_text(encoding="utf-8")):
        if "://" not in target and "{" not in target:
            assert (path.parent / target).exists(), target
