"""Defaults, then the recipe file, then the command line: all fill one dataclass with the same checks."""

from __future__ import annotations

from argparse import ArgumentTypeError
from dataclasses import dataclass, field, fields
from importlib import import_module
from typing import ClassVar

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hf_adaptive_sparse.cli import SUBCOMMANDS
from hf_adaptive_sparse.cli.arguments import CommonArguments, TokenCount, borrowed, parse_arguments
from hf_adaptive_sparse.errors import ConfigError
from hf_adaptive_sparse.hf.adapter_config import AdaptiveSparseConfig


@dataclass(kw_only=True)
class Sample(CommonArguments):
    """A sample."""

    POSITIONAL: ClassVar[tuple[str, ...]] = ("model",)
    REQUIRED: ClassVar[tuple[str, ...]] = ("model", "data")

    model: str = field(default="", metadata={"help": "Which 100 % real model."})
    data: str = field(default="", metadata={"help": "Text."})
    batch_size: int = field(default=8, metadata={"help": "Rows."})
    learning_rate: float = field(default=1e-3, metadata={"help": "Step."})
    tokens: TokenCount = field(default=TokenCount(100), metadata={"help": "Budget."})
    names: list[str] | None = field(default=None, metadata={"help": "Names."})
    decay: float = borrowed(AdaptiveSparseConfig, "decay")


def parsed(*argv: str) -> Sample:
    return parse_arguments(Sample, "sample", argv)


def refusal(*argv: str) -> str:
    with pytest.raises(ConfigError) as caught:
        parsed(*argv)
    return str(caught.value)


@pytest.fixture
def recipe(tmp_path):
    def write(text: str) -> str:
        file = tmp_path / "recipe.yaml"
        file.write_text(text, encoding="utf-8")
        return str(file)

    return write


def test_the_command_line_wins_over_the_recipe_and_the_recipe_over_the_default(recipe):
    file = recipe("model: a\ndata: b\nbatch-size: 4\nlearning_rate: 5e-4\ndry_run: true\nnames: [x, y]\n")
    found = parsed("--config", file, "--batch_size", "2", "--tokens=1.6M")
    assert (found.model, found.data, found.batch_size, found.learning_rate) == ("a", "b", 2, 5e-4)
    assert (found.tokens, found.dry_run, found.overwrite, found.names) == (1_600_000, True, False, ["x", "y"])
    assert parsed("c", f"--config={file}").model == "c"
    assert parsed("c", "--config", file, "--dry-run=false", "--names", "z").dry_run is False


def test_a_recipe_key_without_a_value_is_the_default(recipe):
    assert parsed("m", "--data", "d", "--config", recipe("batch_size:\nnames:\n")).batch_size == 8
    assert parsed("m", "--data", "d", "--config", recipe("# nothing\n")).batch_size == 8


def test_a_recipe_is_read_as_it_is_written(recipe):
    found = parsed("m", "--config", recipe("data: 2:4\nnames: [1:30, 010, 2024-01-01]\ntokens: 1_000\ndry_run: yes\n"))
    assert (found.data, found.names, found.tokens, found.dry_run) == ("2:4", ["1:30", "010", "2024-01-01"], 1000, True)


@pytest.mark.parametrize("argv", [
    ["--dry-run", "m", "--data", "d"], ["m", "--dry-run", "--data", "d"], ["--data", "d", "--dry_run", "m"],
])  # fmt: skip
def test_a_switch_does_not_swallow_what_follows_it(argv):
    found = parsed(*argv)
    assert (found.model, found.data, found.dry_run) == ("m", "d", True)


def test_a_borrowed_field_has_the_default_and_the_help_of_its_source(capsys):
    assert parsed("m", "--data", "d").decay == AdaptiveSparseConfig().decay
    with pytest.raises(SystemExit) as stop:
        parsed("--help")
    assert stop.value.code == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "usage: hf-adaptive-sparse sample MODEL [options] A sample." in shown
    assert "MODEL Which 100 % real model." in shown
    help_of_decay = next(e.metadata["help"] for e in fields(AdaptiveSparseConfig) if e.name == "decay")
    assert f"--decay DECAY {help_of_decay}" in shown
    assert "--batch-size BATCH_SIZE Rows. (default: 8)" in shown
    assert "--batch_size" not in shown and "(default: None)" not in shown and "--model" not in shown


@pytest.mark.parametrize("argv, message", [
    (["m"], "--data is missing. See hf-adaptive-sparse sample --help."),
    (["--data", "d"], "MODEL is missing. See hf-adaptive-sparse sample --help."),
    (["m", "--data"], "argument --data: expected one argument. See hf-adaptive-sparse sample --help."),
    (["m", "--batch-size", "x"],
     "argument --batch-size: invalid int value: 'x'. See hf-adaptive-sparse sample --help."),
    (["m", "--tokens", "many"],
     "argument --tokens: a count is written 400000, 410k, 1.6M or 2G, got 'many'. "
     "See hf-adaptive-sparse sample --help."),
    (["m", "--lerning-rate", "1"],
     "unknown argument --lerning-rate; did you mean --learning-rate? See hf-adaptive-sparse sample --help."),
    (["m", "--lr", "1"], "unknown argument --lr; did you mean --learning-rate? See hf-adaptive-sparse sample --help."),
    (["m", "n"], "unrecognized arguments: n. See hf-adaptive-sparse sample --help."),
    (["m", "--config"], "argument --config: expected one argument. See hf-adaptive-sparse sample --help."),
])  # fmt: skip
def test_a_wrong_command_line_says_what_is_wrong(argv, message):
    assert refusal(*argv) == message


@pytest.mark.parametrize("text, message", [
    ("lerning_rate: 1\n", "{file}: unknown key 'lerning_rate'; did you mean learning_rate?"),
    ("config: x\n", "{file}: a recipe cannot name another one. Leave out 'config'."),
    ("- a\n- b\n", "{file}: a recipe is a list of `key: value` lines, got a list."),
    ("data: {a: 1}\n", "{file}: data takes one value or a list, got a mapping."),
    ("data: [a, b]\n", "{file}: data takes one value, got a list of 2."),
    ("batch_size: x\n",
     "argument --batch-size: invalid int value: 'x'. See hf-adaptive-sparse sample --help."),
    ("a: [1\n",
     "{file}: the recipe is not YAML: while parsing a flow sequence in \"<unicode string>\", line 1, "
     "column 4: a: [1 ^ expected ',' or ']', but got '<stream end>' in \"<unicode string>\", line 2, "
     "column 1: ^."),
])  # fmt: skip
def test_a_wrong_recipe_says_what_is_wrong(recipe, text, message):
    file = recipe(text)
    assert refusal("m", "--config", file) == message.replace("{file}", file)


def test_a_recipe_that_is_not_there_is_named(tmp_path):
    file = str(tmp_path / "absent.yaml")
    assert refusal("m", "--config", file) == f"{file}: cannot read the recipe: No such file or directory."


@pytest.mark.parametrize("text, count", [
    ("400000", 400_000), ("410k", 410_000), ("1.6M", 1_600_000), ("1.64m", 1_640_000), ("2G", 2 * 10**9),
    ("2B", 2 * 10**9), ("1_000", 1000), ("1,000", 1000), (" 7 k ", 7000), ("1e6", 10**6),
])  # fmt: skip
def test_a_count_is_read_as_people_write_it(text, count):
    assert TokenCount(text) == count


@given(st.integers(0, 10**15))
def test_a_count_that_is_printed_is_read_back(count):
    assert TokenCount(str(TokenCount(count))) == count or count > 2**53


@pytest.mark.parametrize("text", ["", "k", "-1", "1.6 MB x", "nan", "inf", "1.6.2M", "0x10"])
def test_what_is_no_count_is_refused(text):
    with pytest.raises(ArgumentTypeError) as caught:
        TokenCount(text)
    assert str(caught.value) == f"a count is written 400000, 410k, 1.6M or 2G, got {text!r}"


@pytest.mark.parametrize("command", SUBCOMMANDS)
def test_every_subcommand_takes_the_common_arguments_and_explains_each_of_its_own(command):
    module = import_module(f"hf_adaptive_sparse.cli.{command}")
    helps = {entry.name: entry.metadata["help"] for entry in fields(module.ARGUMENTS)}
    assert {"config", "dry_run", "seed", "overwrite"} <= helps.keys()
    assert [name for name, text in helps.items() if not text.endswith((".", ")"))] == []
