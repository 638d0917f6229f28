"""Rules that no tool holds for us: paths, marks, lengths, docstrings, quiet excepts."""

from __future__ import annotations

import ast
import inspect
import re
from pathlib import Path

import pytest

import hf_adaptive_sparse

ROOT = Path(__file__).parents[1]
FOLDERS = ("hf_adaptive_sparse", "tests", "examples", "benchmarks", "scripts", "model_cards", "docs", ".ci")
TEXT = {".py", ".md", ".toml", ".txt", ".json", ".yaml", ".yml", ".html", ".cfg", ".sh", ""}
LONGEST_MODULE = 400

# With dots inside, so that this file does not hold what it looks for.
MACHINE_FOLDERS = "wo.rk ro.ot fa.rm ho.me Us.ers".replace(".", "").split()
UNFINISHED_MARKS = "TO.DO FIX.ME XX.X NotImplemented.Error xf.ail".replace(".", "").split()
MACHINE_PATH = re.compile(rf"(?<![\w.])/(?:{'|'.join(MACHINE_FOLDERS)})/")
UNFINISHED = re.compile(rf"\b(?:{'|'.join(UNFINISHED_MARKS)})\b")


def text_files() -> list[Path]:
    """Every text file of the project: those at its top, and all in its folders."""
    inside = [path for folder in FOLDERS for path in sorted((ROOT / folder).rglob("*"))]
    top = [path for path in sorted(ROOT.iterdir()) if path.name != ".git"]  # of a worktree it is a file with a path
    return [path for path in [*top, *inside] if path.is_file() and path.suffix in TEXT]


def python_files(*folders: str) -> list[Path]:
    return [path for folder in folders for path in sorted((ROOT / folder).rglob("*.py"))]


def parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def lines_matching(pattern: re.Pattern, text: str) -> list[int]:
    return [number for number, line in enumerate(text.splitlines(), start=1) if pattern.search(line)]


def is_public(name: str) -> bool:
    return not name.startswith("_")


def without_docstring(module: ast.Module) -> list[str]:
    """Names of the public functions and classes at the top of a module, and "module", that lack a docstring.

    A function whose body is one statement says what it does.
    """
    missing = [] if ast.get_docstring(module) or not module.body else ["module"]
    for node in module.body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef) and is_public(node.name):
            trivial = not isinstance(node, ast.ClassDef) and len(node.body) == 1
            if not trivial and not ast.get_docstring(node):
                missing.append(node.name)
    return missing


def quiet_excepts(module: ast.Module) -> list[int]:
    """Lines of the excepts that catch everything and do nothing about it."""
    found = []
    for node in ast.walk(module):
        if isinstance(node, ast.ExceptHandler):
            kinds = node.type.elts if isinstance(node.type, ast.Tuple) else [node.type]
            broad = any(kind is None or getattr(kind, "id", "") in ("Exception", "BaseException") for kind in kinds)
            if broad and all(
                isinstance(each, ast.Pass | ast.Continue | ast.Expr) and not calls(each) for each in node.body
            ):
                found.append(node.lineno)
    return found


def calls(node: ast.AST) -> bool:
    return any(isinstance(each, ast.Call) for each in ast.walk(node))


def relative(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


@pytest.mark.parametrize("path", text_files(), ids=relative)
def test_no_file_names_a_path_of_one_machine(path):
    assert lines_matching(MACHINE_PATH, path.read_text(encoding="utf-8")) == []


@pytest.mark.parametrize("path", python_files(*FOLDERS), ids=relative)
def test_no_mark_of_unfinished_work_is_left(path):
    assert lines_matching(UNFINISHED, path.read_text(encoding="utf-8")) == []


@pytest.mark.parametrize("path", python_files("hf_adaptive_sparse"), ids=relative)
def test_a_module_has_one_subject_and_its_public_parts_say_what_they_do(path):
    assert len(path.read_text(encoding="utf-8").splitlines()) <= LONGEST_MODULE
    assert without_docstring(parsed(path)) == []
    assert quiet_excepts(parsed(path)) == []


@pytest.mark.parametrize("name", hf_adaptive_sparse.__all__)
def test_a_public_name_and_its_methods_are_documented(name):
    """Of a method that overrides one, the text of the overridden one counts; one statement needs none."""
    thing = getattr(hf_adaptive_sparse, name)
    assert inspect.getdoc(thing)
    if not inspect.isclass(thing):
        return
    methods = {key: each for key, each in vars(thing).items() if is_public(key) and inspect.isfunction(each)}
    for key, method in methods.items():
        body = ast.parse(inspect.cleandoc("\n" + inspect.getsource(method))).body[0].body
        assert len(body) == 1 or inspect.getdoc(getattr(thing, key)), f"{name}.{key} has no docstring"


def test_the_checks_find_what_they_look_for():
    folder, mark = MACHINE_FOLDERS[0], UNFINISHED_MARKS[0]
    paths = f"see\n/{folder}/x/y and\nhttps://a.b/{folder}/x\nhf_adaptive_sparse/{folder}/x"
    assert lines_matching(MACHINE_PATH, paths) == [2]
    assert lines_matching(UNFINISHED, f"done\n# {mark}: more\n{mark}S") == [2]
    undocumented = "def f():\n    x = 1\n    return x\nclass C: ...\ndef g(): return 1"
    assert without_docstring(ast.parse(undocumented)) == ["module", "f", "C"]
    quiet = "try:\n    f()\nexcept Exception:\n    pass"
    assert quiet_excepts(ast.parse(quiet)) == [3]
    assert quiet_excepts(ast.parse(quiet.replace("pass", "raise"))) == []
    assert quiet_excepts(ast.parse(quiet.replace("Exception", "OSError"))) == []
