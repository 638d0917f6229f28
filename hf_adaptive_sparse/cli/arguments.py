"""Arguments: the command line and the recipe file fill the same dataclass, with the same checks."""

import argparse
import dataclasses
import difflib
import re
from argparse import ArgumentDefaultsHelpFormatter, ArgumentTypeError
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, NoReturn, TypeVar

import yaml
from transformers import HfArgumentParser

from ..errors import ConfigError
from . import PROGRAM


class TokenCount(int):
    """A number of tokens that may be written 410k, 1.6M or 2G on the command line."""

    def __new__(cls, value: int | str) -> "TokenCount":
        if isinstance(value, str):
            match = re.fullmatch(r"\s*([0-9][0-9_,]*(?:\.[0-9]+)?(?:e[0-9]+)?)\s*([kmgb]?)\s*", value.lower())
            if match is None:
                raise ArgumentTypeError(f"a count is written 400000, 410k, 1.6M or 2G, got {value!r}")
            scale = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "b": 10**9}[match[2]]
            value = round(float(re.sub("[_,]", "", match[1])) * scale)
        return super().__new__(cls, value)


@dataclass(kw_only=True)
class CommonArguments:
    """What every subcommand takes."""

    POSITIONAL: ClassVar[tuple[str, ...]] = ()
    REQUIRED: ClassVar[tuple[str, ...]] = ()

    config: str | None = field(
        default=None, metadata={"help": "Recipe in YAML with any of these arguments; the command line wins."}
    )
    dry_run: bool = field(default=False, metadata={"help": "Print what would be done and stop; write nothing."})
    seed: int = field(default=0, metadata={"help": "Seed of everything random."})
    overwrite: bool = field(default=False, metadata={"help": "Replace the results in an output folder."})
    debug: bool = field(default=False, metadata={"help": "Show the traceback of an error."})

    def __post_init__(self) -> None:
        """Raise ConfigError for values that make no sense; every class adds its own checks."""


Arguments = TypeVar("Arguments", bound=CommonArguments)


def borrowed(config: type, name: str, **changes: Any) -> Any:
    """A dataclass field with the default and the help that `config` gives its field `name`."""
    source = next(entry for entry in dataclasses.fields(config) if entry.name == name)
    default = changes.pop("default", source.default)
    return field(default=default, metadata={"help": source.metadata.get("help", "")} | changes)


def parse_arguments(kind: type[Arguments], command: str, argv: Sequence[str]) -> Arguments:
    """The arguments of one subcommand, from defaults, then `--config`, then the command line.

    Raises:
        ConfigError: an unknown argument or key (names the closest), a wrong type, a missing argument.
        SystemExit: after --help.
    """
    parser = _Parser(kind, command)
    argv = parser.with_values(argv)
    recipe = _recipe_tokens(parser, parser.recipe_path(argv))
    namespace = parser.parse_args(argv, parser.parse_args(recipe) if recipe else None)
    check_given(namespace, kind.REQUIRED, kind.POSITIONAL, command)
    return kind(**{name: getattr(namespace, name) for name in parser.names})


def check_given(arguments: Any, names: Sequence[str], positional: Sequence[str], command: str) -> None:
    """Raise ConfigError unless all of these arguments were given."""
    for name in names:
        if getattr(arguments, name) in (None, "", []):
            raise ConfigError(f"{shown(name, positional)} is missing. See {PROGRAM} {command} --help.")


def shown(name: str, positional: Sequence[str]) -> str:
    """An argument as it is written: MODEL, --output-dir."""
    return name.upper() if name in positional else "--" + name.replace("_", "-")


class _Parser(HfArgumentParser):
    def __init__(self, kind: type[CommonArguments], command: str) -> None:
        usage = " ".join([f"{PROGRAM} {command}", *map(str.upper, kind.POSITIONAL), "[options]"])
        description = (kind.__doc__ or "").strip()
        super().__init__(
            kind, prog=f"{PROGRAM} {command}", usage=usage, description=description,
            formatter_class=_HelpFormatter, allow_abbrev=False,
        )  # fmt: skip
        self.names = [entry.name for entry in dataclasses.fields(kind) if entry.init]
        self.switches = {entry.name for entry in dataclasses.fields(kind) if entry.type is bool}
        for action in list(self._actions):
            action.required = False  # what is missing is found out after the recipe has been read
            action.help = re.sub(r"%(?!\()", "%%", action.help or "")
            # "--dry_run" is understood and "--dry-run" is shown.
            action.option_strings = [name for name in action.option_strings if "_" not in name]
            if action.dest in kind.POSITIONAL:
                shown = action.help
                action.help = argparse.SUPPRESS
                self.add_argument(
                    action.dest, nargs="?", default=argparse.SUPPRESS, metavar=action.dest.upper(), help=shown
                )

    def with_values(self, argv: Sequence[str]) -> list[str]:
        """Switches get their value: `--dry-run MODEL` must not read MODEL as the value of --dry-run."""
        switches = {f"--{form}" for name in self.switches for form in (name, name.replace("_", "-"))}
        return [f"{token}=true" if token in switches else token for token in argv]

    def takes_many(self, option: str) -> bool:
        return any(action.nargs in ("*", "+") for action in self._actions if option in action.option_strings)

    def recipe_path(self, argv: Sequence[str]) -> str | None:
        finder = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
        finder.add_argument("--config")
        finder.error = self.error  # type: ignore[method-assign]
        return finder.parse_known_args(list(argv))[0].config

    def error(self, message: str) -> NoReturn:
        match = re.fullmatch(r"unrecognized arguments: (--?[^ =]+).*", message, flags=re.DOTALL)
        if match is not None:
            options = [option for action in self._actions for option in action.option_strings]
            known = [option for option in options if option.startswith("--") and option != "--help"]
            message = f"unknown argument {match[1]}{_closest(match[1], known)}"
        message = message if message.endswith("?") else f"{message.rstrip('.')}."
        raise ConfigError(f"{message} See {self.prog} --help.")


class _HelpFormatter(ArgumentDefaultsHelpFormatter):
    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=30, width=110)

    def _get_help_string(self, action: argparse.Action) -> str | None:
        if action.default in (None, "", False, argparse.SUPPRESS):
            return action.help
        return super()._get_help_string(action)


class _Words(yaml.SafeLoader):
    """Numbers stay as they are written, as on the command line: YAML reads 2:4 in base 60, as 124."""

    yaml_implicit_resolvers = {
        first: [each for each in resolvers if each[0].rpartition(":")[2] in ("bool", "null", "merge")]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }


def _recipe_tokens(parser: _Parser, path: str | None) -> list[str]:
    """A recipe file as the command line that says the same."""
    if path is None:
        return []
    try:
        recipe = yaml.load(Path(path).expanduser().read_text(encoding="utf-8"), _Words)
    except OSError as problem:
        raise ConfigError(f"{path}: cannot read the recipe: {problem.strerror}.") from problem
    except (yaml.YAMLError, UnicodeDecodeError) as problem:
        raise ConfigError(f"{path}: the recipe is not YAML: {' '.join(str(problem).split())}.") from problem
    if recipe is None:
        return []
    if not isinstance(recipe, dict):
        raise ConfigError(f"{path}: a recipe is a list of `key: value` lines, got a {type(recipe).__name__}.")
    tokens = []
    for key, value in recipe.items():
        name = str(key).replace("-", "_")
        if name == "config":
            raise ConfigError(f"{path}: a recipe cannot name another one. Leave out {key!r}.")
        if name not in parser.names:
            raise ConfigError(f"{path}: unknown key {key!r}{_closest(name, parser.names)}")
        option = "--" + name
        if isinstance(value, dict):
            raise ConfigError(f"{path}: {key} takes one value or a list, got a mapping.")
        if isinstance(value, list):
            if len(value) > 1 and not parser.takes_many(option):
                raise ConfigError(f"{path}: {key} takes one value, got a list of {len(value)}.")
            tokens += [option, *map(str, value)]
        elif value is not None:
            tokens.append(f"{option}={str(value).lower() if isinstance(value, bool) else value}")
    return tokens


def _closest(name: str, known: Sequence[str]) -> str:
    # The order of `known` must not matter for a tie, so that the same mistake gets the same answer.
    for option in sorted(known):
        if "".join(word[0] for word in re.findall(r"[^-_]+", option)) == name.strip("-_"):
            return f"; did you mean {option}?"  # --lr
    starting = [option for option in sorted(known) if option.strip("-_").startswith(name.strip("-_"))]
    match = starting or difflib.get_close_matches(name, sorted(known), n=1, cutoff=0.5)
    return f"; did you mean {match[0]}?" if match else f"; known: {', '.join(known)}."
