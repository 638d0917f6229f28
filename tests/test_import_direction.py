"""Imports go one way, and Hugging Face stays at the edge: read from the import statements."""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterator
from importlib.metadata import requires
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "hf_adaptive_sparse"

# The order of the tree: a file imports only from lines above its own.
ORDER = (
    "errors",
    "field_types",
    "products",
    "stats",
    "saliency",
    "sensitivity",
    "allocation",
    "patterns",
    "mask_choice",
    "solvers",
    "formats",
    "quantizers",
    "kernels",
    "layers",
    "backend_choice",
    "backend_timing",
    "backend_forwards",
    "backend_dispatch",
    "shards",
    "optim",
    "divergences",
    "logits",
    "losses",
    "families",
    "units",
    "unit_scores",
    "domain_weights",
    "hardware",
    "footprint",
    "methods",
    "hf",  # from here on: the edge
    "reports",
    "demo",
    "hub",
    "cli",
    "__main__",
    "__init__",
)

CORE = {"torch"}
HUGGING_FACE = set("accelerate datasets evaluate huggingface_hub peft safetensors tokenizers transformers".split())
# What a part may import besides the standard library and what stands above it.
ALLOWED = {
    **{part: CORE for part in ORDER},
    "hf": CORE | HUGGING_FACE | {"lm_eval", "numpy", "pyarrow", "xxhash"},
    "reports": {"matplotlib", "numpy"},
    "demo": set(),
    "hub": CORE | HUGGING_FACE | {"yaml"},
    "cli": CORE | HUGGING_FACE | {"rich", "yaml"},
    "__main__": set(),
    "__init__": set(),
}

DISTRIBUTION = {"huggingface_hub": "huggingface-hub", "lm_eval": "lm-eval", "yaml": "pyyaml"}
# Imported by us and required by a library that we require: not worth a line in pyproject.toml.
BROUGHT_BY = {
    "numpy": "transformers",
    "pyarrow": "datasets",
    "tokenizers": "transformers",
    "yaml": "transformers",
}

Imported = tuple[str, ...]  # ("torch", "nn") or ("hf_adaptive_sparse", "hf", "files")


def imports_of(source: str, module: Imported) -> Iterator[Imported]:
    """Every module or name that a source imports, anywhere in it, as absolute dotted names.

    Args:
        module: dotted name of the source itself; the last part is "__init__" for a package.
    """
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield tuple(alias.name.split("."))
        elif isinstance(node, ast.ImportFrom):
            base = module[: len(module) - node.level] if node.level else ()
            base += tuple(node.module.split(".")) if node.module else ()
            for alias in node.names:
                yield (*base, alias.name)


def part_of(dotted: Imported) -> str:
    """Which line of the tree a name of our package stands on."""
    return dotted[1] if len(dotted) > 1 else "__init__"


def complaints(source: str, module: Imported) -> list[str]:
    """What one source file imports and must not, as sentences."""
    part, found = part_of(module), []
    for imported in imports_of(source, module):
        name = ".".join(imported)
        if imported[0] == "hf_adaptive_sparse":
            other = part_of(imported)
            if other == part:
                if part == "methods" and module[2:3] != ("__init__",) and imported[2:3] != module[2:3]:
                    found.append(f"a method imports another: {name}")
            elif other not in ORDER:
                found.append(f"not a line of the tree: {name}")
            elif ORDER.index(other) > ORDER.index(part):
                found.append(f"imports from below itself: {name}")
        elif imported[0] not in sys.stdlib_module_names and imported[0] not in ALLOWED[part]:
            found.append(f"{part} does not import {imported[0]}")
    return found


def modules() -> dict[Imported, Path]:
    """Dotted name -> file, for every file of the package."""
    files = sorted(PACKAGE.rglob("*.py"))
    return {("hf_adaptive_sparse", *path.relative_to(PACKAGE).with_suffix("").parts): path for path in files}


def required_by(distribution: str | None) -> set[str]:
    """Names of the libraries that an installed distribution requires; None: that our pyproject.toml names."""
    if distribution is not None:
        lines = [line for line in requires(distribution) or [] if "extra ==" not in line]
    else:
        project = (PACKAGE.parent / "pyproject.toml").read_text(encoding="utf-8").split("[project.scripts]")[0]
        lines = re.findall(r'"([^"]+)"', project.split("\ndependencies = [")[1])
    return {re.match(r"[\w.-]+", line)[0].lower().replace("_", "-") for line in lines}


def within_a_folder(module: Imported, known: dict[Imported, Path]) -> set[Imported]:
    """The modules of the same folder that a module imports; the folder's __init__ is not among them."""
    found = set()
    for imported in imports_of(known[module].read_text(encoding="utf-8"), module):
        for dotted in (imported, imported[:-1]):
            if dotted in known and dotted[:-1] == module[:-1] and dotted != module and len(dotted) > 2:
                found.add(dotted)
    return found


@pytest.mark.parametrize("module", modules(), ids=".".join)
def test_a_file_imports_only_from_above_itself(module):
    assert part_of(module) in ORDER, "a new file or folder needs its line in ORDER above, and in CONTRIBUTING.md"
    assert complaints(modules()[module].read_text(encoding="utf-8"), module) == []


def test_files_of_one_folder_do_not_import_each_other_in_a_circle():
    known = modules()
    graph = {module: within_a_folder(module, known) for module in known}
    while graph:
        free = {module for module, needs in graph.items() if not needs & graph.keys()}
        assert free, f"these import each other in a circle: {sorted('.'.join(module) for module in graph)}"
        graph = {module: needs for module, needs in graph.items() if module not in free}


def test_every_library_that_is_imported_is_required_by_us_or_by_what_we_require():
    ours = required_by(None)
    for module, path in modules().items():
        for imported in imports_of(path.read_text(encoding="utf-8"), module):
            if imported[0] in sys.stdlib_module_names or imported[0] == "hf_adaptive_sparse":
                continue
            library = DISTRIBUTION.get(imported[0], imported[0])
            bringer = BROUGHT_BY.get(imported[0])
            required = library in ours if bringer is None else bringer in ours and library in required_by(bringer)
            assert required, f"{'.'.join(module)} imports {imported[0]}, which nothing declares"


BELOW, NOT_LISTED, METHOD = "imports from below itself", "not a line of the tree", "a method imports another"
PACKAGE_NAME = PACKAGE.name


@pytest.mark.parametrize(
    "module, source, complaint",
    [
        ("optim", "from .hf.trainer import Trainer", f"{BELOW}: {PACKAGE_NAME}.hf.trainer.Trainer"),
        ("optim", "from . import methods", f"{BELOW}: {PACKAGE_NAME}.methods"),
        ("optim", "import hf_adaptive_sparse.cli.main", f"{BELOW}: {PACKAGE_NAME}.cli.main"),
        ("optim", "from hf_adaptive_sparse import SparseAdamW", f"{NOT_LISTED}: {PACKAGE_NAME}.SparseAdamW"),
        ("optim", "def step():\n    import transformers", "optim does not import transformers"),
        ("formats.two_four", "from ..layers import Packed", f"{BELOW}: {PACKAGE_NAME}.layers.Packed"),
        ("formats.two_four", "import safetensors.torch", "formats does not import safetensors"),
        ("methods.a", "from .b import refresh", f"{METHOD}: {PACKAGE_NAME}.methods.b.refresh"),
        ("methods.a", "from . import b", f"{METHOD}: {PACKAGE_NAME}.methods.b"),
        ("hf.adapter", "from ..cli import main", f"{BELOW}: {PACKAGE_NAME}.cli.main"),
        ("reports.plots", "import torch", "reports does not import torch"),
        ("hf.adapter", "import requests", "hf does not import requests"),
    ],
)
def test_a_wrong_import_is_named(module, source, complaint):
    assert complaints(source, (PACKAGE_NAME, *module.split("."))) == [complaint]


@pytest.mark.parametrize(
    "module, source",
    [
        ("optim", "import math\nimport torch.nn as nn\nfrom .errors import ConfigError"),
        ("methods.__init__", "from .learned_masks import LearnedMasksConfig"),
        ("formats.__init__", "from ..patterns import NMPattern\nfrom .two_four import pack"),
        ("hf.trainer", "from transformers import Trainer\nfrom ..losses import x\nfrom .callbacks import y"),
        ("__init__", "from .hf.adapter import AdaptiveSparseConfig"),
    ],
)
def test_a_right_import_passes(module, source):
    assert complaints(source, (PACKAGE_NAME, *module.split("."))) == []
