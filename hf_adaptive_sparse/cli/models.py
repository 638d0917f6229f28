"""MODEL on the command line: a folder, an adapter folder or a Hub id becomes a model and its tokenizer."""

from __future__ import annotations

import difflib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from ..errors import ConfigError, SparsityError
from ..hf.import_checkpoint import has_tokenizer_files
from ..hf.imports import recognise
from ..hf.mask_folder import is_mask_folder
from . import PROGRAM
from .output import weight_bytes

DTYPES = ("auto", "float32", "bfloat16", "float16")

_OF_THE_LIBRARIES = (OSError, ValueError, ImportError, KeyError, SafetensorError)


@dataclass(frozen=True)
class ModelSource:
    """Where a model comes from. `kind` is one of "dense", "packed", "adapter", "hub", "masks" and "foreign"."""

    name: str
    kind: str

    @property
    def is_local(self) -> bool:
        return self.kind != "hub"

    @property
    def tokenizer_source(self) -> str:
        """The folder or Hub id that holds the tokenizer: an adapter often leaves it with its base model."""
        if self.kind != "adapter" or (Path(self.name) / "tokenizer_config.json").is_file():
            return self.name
        return str(_read_json(Path(self.name) / "adapter_config.json").get("base_model_name_or_path"))


def find_model(name: str, argument: str = "MODEL", *, only_models: bool = True) -> ModelSource:
    """What `name` is, without loading it and without a network.

    Args:
        only_models: refuse masks and checkpoints of other tools, which transformers would load as something else.
    Raises:
        ConfigError: a path that does not exist (names what is near it), or a folder without a model.
    """
    path = Path(name).expanduser()
    if not path.exists():
        if _looks_like_a_path(name, path):
            raise ConfigError(f"{argument} {name}: no such folder.{_siblings(path)}")
        return ModelSource(name, "hub")
    if path.is_dir() and (path / "adapter_config.json").is_file():
        return ModelSource(str(path), "adapter")
    if is_mask_folder(path):
        if only_models:
            raise ConfigError(
                f"{argument} {name}: holds masks and no weights. Apply them to their base model first: {PROGRAM} "
                f"export BASE OUT --apply-masks {name}."
            )
        return ModelSource(str(path), "masks")
    settings = _quantization(path)
    if settings.get("quant_method") == "adaptive_sparse":
        return ModelSource(str(path), "packed")
    if (foreign := recognise(path)) is not None:
        if only_models:
            raise ConfigError(
                f"{argument} {name}: is a checkpoint of another tool ({foreign}), which transformers does not load as "
                f"what it is. Convert it first: {PROGRAM} export {name} OUT."
            )
        return ModelSource(str(path), "foreign")
    if not path.is_dir():
        raise ConfigError(f"{argument} {name}: a model is a folder or a Hub id, and this is a file.")
    if not (path / "config.json").is_file():
        inside = sorted(found.parent.name for found in path.glob("*/config.json"))
        hint = f" There is one in {', '.join(str(path / found) for found in inside)}." if inside else ""
        raise ConfigError(f"{argument} {name}: the folder holds no model: config.json is missing.{hint}")
    return ModelSource(str(path), "dense")


def load_config(source: ModelSource, trust_remote_code: bool = False) -> Any:
    """The configuration of the model, or of an adapter's base model, without its weights."""
    name = source.name
    if source.kind == "adapter":
        name = str(_read_json(Path(name) / "adapter_config.json").get("base_model_name_or_path"))
    with _loading(source, "its configuration"):
        return AutoConfig.from_pretrained(name, trust_remote_code=trust_remote_code)


def skeleton_of(config: Any, trust_remote_code: bool) -> PreTrainedModel:
    """The model without its weights."""
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)


def check_dtype(dtype: str) -> None:
    if dtype not in DTYPES:
        raise ConfigError(f"unknown dtype {dtype!r}; known: {', '.join(DTYPES)}.")


def load_model(
    source: ModelSource, dtype: str = "auto", device: str = "auto", trust_remote_code: bool = False
) -> PreTrainedModel | PeftModel:
    """The model in evaluation mode; an adapter comes wrapped, with its base model under it.

    Raises:
        ConfigError: it cannot be loaded, or holds NaN or infinite weights.
        FormatError: a packed folder is damaged.
    """
    check_dtype(dtype)
    wanted: Any = dtype if dtype == "auto" else getattr(torch, dtype)
    options = {"dtype": wanted, "trust_remote_code": trust_remote_code}
    with _loading(source, "the model"):
        if source.kind == "adapter":
            base = _read_json(Path(source.name) / "adapter_config.json").get("base_model_name_or_path")
            model: Any = AutoModelForCausalLM.from_pretrained(base, **options)
            model = PeftModel.from_pretrained(model, source.name)
        else:
            model = AutoModelForCausalLM.from_pretrained(source.name, **options)
    check_finite(model, source.name)
    return model.to(pick_device(device)).eval()


def load_dense(
    source: ModelSource, dtype: str, device: str, trust_remote_code: bool, home: str | None = None
) -> PreTrainedModel:
    """A model whose linears are all ordinary ones, also if it was stored packed.

    Args:
        device: on which it computes.
        home: where its weights are kept; default: on that device.
    """
    if dtype == "auto" and pick_device(device).type == "cpu":
        dtype = "float32"  # bfloat16 is several times slower there, and the masks train in float32 anyway
    model = load_model(source, dtype, home or device, trust_remote_code)
    return model.dequantize() if source.kind == "packed" else model


def has_tokenizer(source: ModelSource) -> bool:
    """Whether a tokenizer can be looked for: a local folder may hold a configuration alone."""
    return not source.is_local or has_tokenizer_files(Path(source.tokenizer_source))


def load_tokenizer(source: ModelSource, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """The tokenizer that belongs to the model.

    Raises:
        ConfigError: there is none.
    """
    with _loading(source, "its tokenizer"):
        return AutoTokenizer.from_pretrained(source.tokenizer_source, trust_remote_code=trust_remote_code)


def stored_dtype(config: Any, asked: str = "auto") -> torch.dtype | None:
    """The dtype to save in: what was asked for, or else what the model's config.json says it is stored in."""
    dtype = config.dtype if asked == "auto" else asked
    return getattr(torch, dtype) if isinstance(dtype, str) else dtype


def size_on_disk(source: ModelSource) -> int | None:
    """Bytes of the weight files in a local folder; None where there are none."""
    return (weight_bytes(source.name) if source.is_local else 0) or None


def check_finite(model: torch.nn.Module, name: str) -> None:
    """Refuse a model that is broken before anything is made of it."""
    for key, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            bad = int((~torch.isfinite(tensor)).sum())
            raise ConfigError(
                f"{name}: {key} holds {bad} NaN or infinite values of {tensor.numel()}. It is damaged: "
                "take an intact copy."
            )


def pick_device(device: str) -> torch.device:
    """ "auto": the accelerator if there is one.

    Raises:
        ConfigError: no such device, or none on this machine.
    """
    if device != "auto":
        try:
            found = torch.device(device)
        except RuntimeError as problem:
            raise ConfigError(f"unknown device {device!r}. Write cpu, cuda or cuda:1.") from problem
        try:
            torch.empty(0, device=found)
        except (RuntimeError, AssertionError) as problem:
            reason = str(problem).strip().splitlines()[0].rstrip(".")
            raise ConfigError(f"device {device!r} cannot be used here: {reason}. Leave --device out.") from problem
        return found
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    return accelerator if accelerator is not None else torch.device("cpu")


class _loading:
    """Errors of the libraries, while loading what the user named, are about what the user named."""

    def __init__(self, source: ModelSource, what: str) -> None:
        self.source, self.what = source, what

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: type | None, problem: BaseException | None, trace: object) -> None:
        if isinstance(problem, SparsityError) or not isinstance(problem, _OF_THE_LIBRARIES):
            return
        where = "" if self.source.is_local else " (no such local folder, so it was looked for on the Hub)"
        reason = (str(problem).strip() or type(problem).__name__).splitlines()[0]
        raise ConfigError(f"{self.source.name}: cannot load {self.what}{where}: {reason}") from problem


def _looks_like_a_path(name: str, path: Path) -> bool:
    # A Hub id is NAME or OWNER/NAME. OWNER/NAME is a path as well if a folder OWNER is here.
    return (
        name.startswith((".", "/", "~"))
        or "\\" in name
        or name.endswith("/")
        or len(path.parts) > 2
        or (len(path.parts) == 2 and path.parent.is_dir())
    )


def _quantization(path: Path) -> dict[str, Any]:
    file = path / "config.json"
    settings = _read_json(file).get("quantization_config") if file.is_file() else None
    return settings if isinstance(settings, dict) else {}


def _siblings(path: Path) -> str:
    parent = path.parent
    while not parent.is_dir() and parent != parent.parent:
        path, parent = parent, parent.parent
    names = sorted(entry.name for entry in parent.iterdir() if entry.is_dir() and entry.name[0] != ".")
    if not names:
        return f" {parent} holds no folders."
    close = difflib.get_close_matches(path.name, names, n=3, cutoff=0.4) or names[:3]
    return f" In {parent} there are: {', '.join(close)}."


def _read_json(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as problem:
        raise ConfigError(f"{file}: cannot be read: {' '.join(str(problem).split())}.") from problem
    if not isinstance(content, dict):
        raise ConfigError(f"{file}: expected a JSON object, got a {type(content).__name__}.")
    return content
