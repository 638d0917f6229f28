"""The template of the model card is inside the package, and every link inside the repository leads somewhere."""

from __future__ import annotations

import re
from importlib.resources import files
from pathlib import Path
from string import Formatter

import pytest

from hf_adaptive_sparse.hub.card import TEMPLATE

ROOT = Path(__file__).parents[1]
PARTS = (
    "metadata", "title", "introduction", "use", "results", "plots", "size", "made", "license", "limits", "source",
)  # fmt: skip


def test_the_template_asks_for_these_parts_in_this_order():
    asked = [name for _, name, _, _ in Formatter().parse(TEMPLATE.read_text(encoding="utf-8")) if name is not None]
    assert asked == list(PARTS)


def test_the_template_is_a_file_of_the_package_so_that_a_wheel_has_it():
    inside = files("hf_adaptive_sparse") / "hub" / "template.md"
    assert inside.read_text(encoding="utf-8") == TEMPLATE.read_text(encoding="utf-8")
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    assert '[tool.hatch.build.targets.wheel]\npackages = ["hf_adaptive_sparse"]\n\n' in project


def test_a_filled_in_template_has_the_header_that_a_hub_reads():
    card = TEMPLATE.read_text(encoding="utf-8").format(**{part: f"<{part}>" for part in PARTS})
    _, header, body = card.split("---\n", 2)
    assert header == "<metadata>\n"
    assert body.startswith("\n# <title>\n\n<introduction>\n")


@pytest.mark.parametrize(
    "path",
    [*ROOT.glob("*.md"), *ROOT.glob("model_cards/*.md"), *ROOT.glob("benchmarks/*.md"), *ROOT.glob("docs/*.md")],
    ids=lambda path: path.relative_to(ROOT).as_posix(),
)
def test_links_inside_the_repository_lead_somewhere(path):
    for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", path.read_text(encoding="utf-8")):
        if "://" not in target and "{" not in target:
            assert (path.parent / target).exists(), target
