"""What `export` starts from: a model, or a checkpoint of another tool, opened to be saved again."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from huggingface_hub import hf_hub_download, snapshot_download
from peft import PeftModel
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..errors import ConfigError
from ..formats.value_codes import StoredGrid
from ..hf.import_checkpoint import load_foreign, provenance
from ..hf.imports import ForeignModel, known_formats, read_foreign, recognise
from ..hf.imports.compressed_tensors import is_sparse_config
from .models import ModelSource, find_model, load_model, load_tokenizer

# What an importer may need of a repository on the Hub.
_FETCHED = ("*.json", "*.safetensors", "*.model", "*.jinja", "*.txt")


@dataclass(frozen=True)
class ExportSource:
    """One of the two: a model that `from_pretrained` loads, or a checkpoint of another tool."""

    name: str
    model: ModelSource | None = None
    foreign: ForeignModel | None = None

    @property
    def about(self) -> str:
        """For the plan and the report."""
        if self.foreign is not None:
            return f"{self.name} ({self.foreign.format})"
        assert self.model is not None
        return f"{self.model.name} ({self.model.kind})"

    @property
    def has_branch(self) -> bool:
        return self.foreign is not None and bool(self.foreign.branches)


@dataclass(frozen=True, kw_only=True)
class Opened:
    """A loaded model, and what belongs to it."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase | None
    quantized: dict[str, StoredGrid] = field(default_factory=dict)
    factors: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    provenance: dict[str, Any] | None = None


def find_source(name: str, base: str | None) -> ExportSource:
    """What `name` is; nothing is loaded.

    Raises:
        ConfigError: it is nothing that can be exported; lists the formats of other tools that are read.
        FormatError: a checkpoint of another tool that is damaged.
    """
    path = Path(name).expanduser()
    if recognise(path) is not None:
        return ExportSource(name, foreign=read_foreign(path, base))
    try:
        model = find_model(name)
    except ConfigError as problem:
        if not path.exists():
            raise
        raise ConfigError(f"{problem} Of other tools, export reads {known_formats()}.") from problem
    if model.kind == "hub" and (folder := _fetch_foreign(name)) is not None:
        return ExportSource(name, foreign=read_foreign(folder, base))
    return ExportSource(name, model=model)


def open_source(source: ExportSource, branch: str, dtype: str, trust_remote_code: bool) -> Opened:
    """Load it, adapters merged."""
    if source.foreign is not None:
        loaded = load_foreign(source.foreign, branch=branch, dtype=dtype)
        return Opened(
            model=loaded.model, tokenizer=loaded.tokenizer, quantized=loaded.quantized, factors=loaded.factors,
            notes=loaded.notes, provenance=provenance(source.foreign),
        )  # fmt: skip
    assert source.model is not None
    # On the CPU: nothing is computed, and a model that is only copied need not fit the accelerator.
    model = load_model(source.model, dtype, "cpu", trust_remote_code)
    tokenizer = load_tokenizer(source.model, trust_remote_code)
    return Opened(model=model.merge_and_unload() if isinstance(model, PeftModel) else model, tokenizer=tokenizer)


def _fetch_foreign(name: str) -> Path | None:
    """The files of a repository whose config.json is one of another tool, which transformers would load with random
    weights; None for every other repository, and where it cannot be asked: loading it says why."""
    try:
        config = json.loads(Path(hf_hub_download(name, "config.json")).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    if not isinstance(config, dict) or not is_sparse_config(config):
        return None
    return Path(snapshot_download(name, allow_patterns=list(_FETCHED)))
