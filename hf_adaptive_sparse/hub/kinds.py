"""What kinds of folder can be pushed. A new kind is one entry of KINDS.

    masks     positions of the kept weights alone, for a base model that everybody fetches for himself
    adapter   of PEFT, also the latent weights and masks of `AdaptiveSparseConfig`
    packed    2:4 layers packed: `save_packed`
    shrunk    heads and MLP channels removed: `export_shrunk`
    dense     zeros stored as ordinary weights: `save_dense`, or any other model of transformers
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import ConfigError
from ..hf.quantizer import QUANT_METHOD
from ..hf.shrunk_manifest import KEY as MANIFEST

# Under these names transformers would open weights without asking this package.
_DEFAULT_WEIGHTS = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin")


@dataclass(frozen=True, kw_only=True)
class Kind:
    """How one kind of folder is told apart and described.

    Args:
        is_one: whether a folder with these JSON files (by name, empty if absent) and these file names is of this kind;
            the first entry of KINDS that says yes counts.
        weights: patterns of its weight files; without one the folder is not complete.
        forbidden: names that must not be beside them.
        words: what it is, in the card: "a ... checkpoint".
        relation: `base_model_relation` of the card.
        tags: of the card, besides those of how it was made.
        library: `library_name` of the card.
        use: Python that loads it; {repo} and {base} are filled in. Lines with {tokenizer} go where there is none.
        note: what the reader must know to load it.
        settings: the JSON file that describes it.
        made_of: what that file says it was made of: a Hub id or a folder; None where it says nothing.
    """

    name: str
    is_one: Callable[[Mapping[str, dict[str, Any]], set[str]], bool]
    weights: tuple[str, ...]
    words: str
    relation: str
    tags: tuple[str, ...]
    use: str
    note: str
    library: str = "transformers"
    forbidden: tuple[str, ...] = ()
    settings: str = "config.json"
    made_of: Callable[[Mapping[str, Any]], Any] = lambda config: (config.get(MANIFEST) or {}).get("parent")


_LOAD = """\
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("{repo}")
tokenizer = AutoTokenizer.from_pretrained("{repo}")  # {tokenizer}
"""
_REGISTER = "import hf_adaptive_sparse  # before from_pretrained: it registers the loader\n"

KINDS: dict[str, Kind] = {
    kind.name: kind
    for kind in (
        Kind(
            name="masks",
            is_one=lambda found, names: "masks.json" in names and "masks.safetensors" in names,
            weights=("masks.safetensors",),
            forbidden=_DEFAULT_WEIGHTS,
            words="a mask-only repository: which weights stay, and no weights",
            relation="adapter",
            tags=("masks",),
            library="hf_adaptive_sparse",
            settings="masks.json",
            made_of=lambda found: (found.get("base") or {}).get("name"),
            use="from hf_adaptive_sparse import load_with_masks\nfrom transformers import AutoTokenizer\n\n"
            'model = load_with_masks("{repo}", base="{base}")\n'
            'tokenizer = AutoTokenizer.from_pretrained("{base}")\n',
            note="This repository holds no weights: fetch those of the base model, under its own licence.",
        ),
        Kind(
            name="adapter",
            is_one=lambda found, names: "adapter_config.json" in names,
            weights=("adapter_model.safetensors",),
            words="an adapter of PEFT",
            relation="adapter",
            tags=("peft",),
            library="peft",
            settings="adapter_config.json",
            made_of=lambda config: config.get("base_model_name_or_path"),
            use=_REGISTER.replace("it registers the loader", "it registers the PEFT method")
            + 'from peft import PeftModel\nfrom transformers import AutoModelForCausalLM, AutoTokenizer\n\n'
            'model = AutoModelForCausalLM.from_pretrained("{base}")\n'
            'model = PeftModel.from_pretrained(model, "{repo}")\n'
            'tokenizer = AutoTokenizer.from_pretrained("{base}")\n',
            note="`model.merge_and_unload()` makes an ordinary model of both. Where the base model is packed, import "
            "`hf_adaptive_sparse` first.",
        ),
        Kind(
            name="packed",
            is_one=lambda found, names: _quantization(found).get("quant_method") == QUANT_METHOD,
            weights=("model.sparse24*.safetensors",),
            forbidden=_DEFAULT_WEIGHTS,
            words="a packed checkpoint: of the 2:4 layers only the kept values and their positions are stored",
            relation="quantized",
            tags=("packed", "2:4"),
            use=_REGISTER + _LOAD,
            note="Without `import hf_adaptive_sparse` loading ends with an error: plain transformers does not know the "
            "format, and the weight files have names of their own so that it cannot fill in random weights. "
            "`model.dequantize()` makes an ordinary dense model of it.",
        ),
        Kind(
            name="shrunk",
            is_one=lambda found, names: MANIFEST in found["config.json"] or _is_shrunk_class(found),
            weights=("model*.safetensors",),
            words="a smaller checkpoint: what is left of its weights is stored as ordinary dense weights are",
            relation="finetune",
            tags=("structured-pruning",),
            use=_LOAD,
            note="",
        ),
        Kind(
            name="dense",
            is_one=lambda found, names: "config.json" in names,
            weights=("*.safetensors",),
            words="a dense-stored checkpoint: its zeros are stored as ordinary weights",
            relation="finetune",
            tags=(),
            use=_LOAD,
            note="It opens in every engine that runs the base model, with or without this package; it is no smaller "
            "than that.",
        ),
    )
}


def kind_of(folder: Path) -> Kind | None:
    """What a folder is; None if it is of no known kind. Of an incomplete one, too, it is told what it would be."""
    names = {file.name for file in folder.iterdir() if file.is_file()} if folder.is_dir() else set()
    found = {name: _read(folder / name) for name in ("config.json", "adapter_config.json")}
    return next((kind for kind in KINDS.values() if kind.is_one(found, names)), None)


def check_complete(folder: Path, kind: Kind) -> None:
    """Raise ConfigError unless all of a folder's weights are there, and none under a name that must not be."""
    if not any(any(folder.glob(pattern)) for pattern in kind.weights):
        raise ConfigError(f"{folder}: is {kind.name}, but holds no weights ({', '.join(kind.weights)}).")
    for name in kind.forbidden:
        if (folder / name).exists():
            raise ConfigError(
                f"{folder}: holds {name} beside {kind.name} weights. transformers would open that file in its place; "
                "move it to another folder."
            )
    for index in folder.glob("*.safetensors.index.json"):
        missing = sorted(set(_read(index).get("weight_map", {}).values()) - {file.name for file in folder.iterdir()})
        if missing:
            raise ConfigError(f"{folder}: {index.name} names {missing[0]}, which is not there. Save the model again.")


def needs_package(folder: Path) -> bool:
    """Whether the class of a shrunk model is one of this package, which must be imported to open it."""
    return _is_shrunk_class({"config.json": _read(folder / "config.json")})


def _is_shrunk_class(found: Mapping[str, dict[str, Any]]) -> bool:
    return str(found["config.json"].get("model_type", "")).startswith("shrunk_")


def _quantization(found: Mapping[str, dict[str, Any]]) -> dict[str, Any]:
    settings = found["config.json"].get("quantization_config")
    return settings if isinstance(settings, dict) else {}


def _read(file: Path) -> dict[str, Any]:
    if not file.is_file():
        return {}
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as problem:
        raise ConfigError(f"{file}: is not JSON ({problem}). Save the model again.") from problem
    if not isinstance(content, dict):
        raise ConfigError(f"{file}: holds a {type(content).__name__}, expected an object. Save the model again.")
    return content
