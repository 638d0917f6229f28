"""What is pushed: a live model or a folder becomes the folders that go to the Hub, made where they are not there."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from ..errors import ConfigError
from ..hf.packable import packable_modules
from ..hf.pretrained import save_dense, save_packed
from ..hf.shrunk_export import export_shrunk
from ..hf.shrunk_manifest import KEY as MANIFEST
from .facts import RUN_FOLDERS, find_report
from .kinds import Kind, check_complete, kind_of

ANY = ""
_WANTED: dict[Any, tuple[str, ...]] = {
    None: (ANY,),
    True: ("packed",),
    False: ("dense",),
    "both": ("dense", "packed"),
}
_AS_IT_IS = ("adapter", "shrunk", "masks")


@dataclass(frozen=True, kw_only=True)
class Source:
    """One folder that goes to one repository.

    Args:
        report: `report.json` of the run; None if there is none.
    """

    folder: Path
    kind: Kind
    report: Path | None


@contextmanager
def sources(
    model_or_folder: Any,
    packed: bool | str | None,
    tokenizer: Any = None,
    report: str | Path | None = None,
    max_shard_size: int | str = "5GB",
) -> Iterator[list[Source]]:
    """The folders to push: one, or with packed="both" the dense-stored one and then the packed one.

    They are there inside the `with` block; what had to be written for it is removed after it.

    Raises:
        ConfigError: `packed` asks for what this model has not, or there is no model in the folder.
        PatternError: it should be packed, and none of its layers is 2:4.
    """
    if packed not in _WANTED:
        raise ConfigError(f"packed is True, False, 'both' or None, got {packed!r}.")
    with ExitStack() as stack:
        if isinstance(model_or_folder, (PreTrainedModel, PeftModel)):
            place = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="hf_adaptive_sparse_push_")))
            folders = _save(model_or_folder, place, packed, tokenizer, max_shard_size)
            found = None if report is None else Path(report)
            yield [_source(folder, found) for folder in folders]
            return
        if not isinstance(model_or_folder, (str, Path)):
            found = type(model_or_folder).__name__
            raise ConfigError(f"a model of transformers or PEFT, or a folder, can be pushed; got a {found}.")
        if tokenizer is not None:
            raise ConfigError("tokenizer goes with a live model; a folder is pushed with the tokenizer that is in it.")
        yield list(_of_folder(Path(model_or_folder).expanduser(), packed, report, max_shard_size, stack))


def _source(folder: Path, report: Path | None) -> Source:
    kind = kind_of(folder)
    assert kind is not None
    check_complete(folder, kind)
    return Source(folder=folder, kind=kind, report=find_report(folder) if report is None else report)


def _of_folder(
    path: Path, packed: bool | str | None, report: str | Path | None, max_shard_size: int | str, stack: ExitStack
) -> Iterator[Source]:
    inside = model_folders(path)
    for want in _WANTED[packed]:
        folder, kind = inside.get(want) or next(iter(inside.values()))
        found = find_report(folder) if report is None else Path(report)
        if not _fits(kind, want):
            if kind.name in _AS_IT_IS:
                raise ConfigError(
                    f"{folder}: is {kind.words.partition(':')[0]}, which is neither packed nor dense-stored; push it "
                    "as it is, without `packed` (--format)."
                )
            place = stack.enter_context(tempfile.TemporaryDirectory(prefix="hf_adaptive_sparse_push_"))
            folder = _converted(folder, Path(place) / want, want, max_shard_size)
        yield _source(folder, found)


def _fits(kind: Kind, want: str) -> bool:
    # The weights of a shrunk model are stored as dense ones are.
    return want in (ANY, kind.name) or (want, kind.name) == ("dense", "shrunk")


def model_folders(path: Path) -> dict[str, tuple[Path, Kind]]:
    """The model folders at a path, by their kinds or names: itself, or those that a subcommand wrote, packed first.

    Raises:
        ConfigError: there is none.
    """
    if not path.is_dir():
        what = "this is a file" if path.exists() else "there is no such folder"
        raise ConfigError(
            f"PATH {path}: {what}. Give the output folder of train, prune, shrink or export, or a model folder."
        )
    kind = kind_of(path)
    if kind is not None:
        return {kind.name: (path, kind)}
    found = {name: (path / name, kind_of(path / name)) for name in RUN_FOLDERS}
    known = {name: (folder, kind) for name, (folder, kind) in found.items() if kind is not None}
    if not known:
        others = [each.parent for deep in ("*", "*/*") for each in sorted(path.glob(f"{deep}/config.json"))]
        near = f" There is one in {others[0]}." if others else ""
        raise ConfigError(
            f"PATH {path}: the folder holds no model: neither config.json nor adapter_config.json, nor a folder "
            f"{', '.join(RUN_FOLDERS)} with one.{near}"
        )
    return known


def _converted(folder: Path, target: Path, want: str, max_shard_size: int | str) -> Path:
    model = AutoModelForCausalLM.from_pretrained(folder)
    save = save_packed if want == "packed" else save_dense
    tokenizer = AutoTokenizer.from_pretrained(folder) if any(folder.glob("tokenizer*")) else None
    save(model, target, tokenizer, max_shard_size=max_shard_size)
    return target


def _save(model: Any, place: Path, packed: Any, tokenizer: Any, max_shard_size: int | str) -> list[Path]:
    if isinstance(model, PeftModel):
        if packed is not None:
            raise ConfigError(
                "the model has an adapter on it: push the adapter without `packed`, or make one model of both with "
                "merge_and_unload() and push that."
            )
        folder = place / "adapter"
        model.save_pretrained(folder)
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)
        return [folder]
    if getattr(model.config, MANIFEST, None) is not None:
        if packed in (True, "both"):
            raise ConfigError("the model lost heads and MLP channels, and is not stored packed; leave `packed` out.")
        export_shrunk(model, place / "shrunk", tokenizer=tokenizer, max_shard_size=max_shard_size)
        return [place / "shrunk"]
    if packed is None:
        packed = bool(packable_modules(model)[0])
    saves = {"dense": save_dense, "packed": save_packed}
    for name in _WANTED[packed]:
        saves[name](model, place / name, tokenizer, max_shard_size=max_shard_size)
    return [place / name for name in _WANTED[packed]]
