"""Checkpoints of the code that was released with AST (arXiv 2407.20584), with or without a SLoRB branch.

    GPT-2   `<perplexity>_ckpt.pt`: {"model": state dict, ...}; names of transformers, weights [out, in] where
            transformers has [in, out], the activation exact GELU. Masks are not in the file.
    LLaMA   Composer's {"state": {"model": state dict}}, or the state dict; `transformer.blocks.0.attn.wq.weight`.
            Masks are in it (`mask`, `inital_mask`).
    branch  `x_proj` P [in/k, in] and `SLoRB_Weight` (GPT-2) or `SLoRA_Weight` (LLaMA) S [out, in/k]

The weights in both are latent: not zero under the mask. A mask that is not in the file is taken from the magnitudes,
as the release does every ten steps.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import GPT2Config

from ...errors import ConfigError, FormatError
from ...formats.two_four import dtype_name, first_violation
from ...patterns import NMPattern
from .foreign import Branch, ForeignModel, ForeignTensor
from .weight_files import TORCH_SUFFIXES, config_of, open_weights, read_torch_file, safetensors_headers, state_tensors

_PROJECTION = ".x_proj"
_SCALES = (".SLoRB_Weight", ".SLoRA_Weight")
_MASKS = (".mask", ".inital_mask")
_BUFFERS = (".attn.bias", ".attn.masked_bias", ".inv_freq", *_MASKS)
_PREFIXES = ("_orig_mod.", "module.", "student.")

_GPT2 = re.compile(r"transformer\.h\.\d+\.(?:attn\.c_attn|attn\.c_proj|mlp\.c_fc|mlp\.c_proj)")
_COMPOSER = re.compile(r"(?:model\.)?transformer\.")
_LLAMA_NAMES = (
    (r"transformer\.blocks\.(\d+)\.attn\.wq", r"model.layers.\1.self_attn.q_proj"),
    (r"transformer\.blocks\.(\d+)\.attn\.wk", r"model.layers.\1.self_attn.k_proj"),
    (r"transformer\.blocks\.(\d+)\.attn\.wv", r"model.layers.\1.self_attn.v_proj"),
    (r"transformer\.blocks\.(\d+)\.attn\.out_proj", r"model.layers.\1.self_attn.o_proj"),
    (r"transformer\.blocks\.(\d+)\.mlp\.(gate|up|down)_proj", r"model.layers.\1.mlp.\2_proj"),
    (r"transformer\.blocks\.(\d+)\.ln_1", r"model.layers.\1.input_layernorm"),
    (r"transformer\.blocks\.(\d+)\.ln_2", r"model.layers.\1.post_attention_layernorm"),
    (r"transformer\.wte", "model.embed_tokens"),
    (r"transformer\.ln_f", "model.norm"),
    (r"transformer\.output", "lm_head"),
)
_HEAD_SIZE = 64  # of every GPT-2


def recognises(source: Path) -> bool:
    """A torch file with the names of the release, or a folder with its branch in it."""
    if source.is_dir():
        if any(name.endswith(_PROJECTION) for name in safetensors_headers(source)):
            return True
        return not (source / "config.json").is_file() and _single_file(source) is not None
    if source.suffix not in TORCH_SUFFIXES:
        return False
    names = _state(read_torch_file(source, checksums=False)).keys()
    return any(_GPT2.match(name) or ".blocks.0.attn.wq" in name or name.endswith(_PROJECTION) for name in names)


def read(source: Path, base: str | None = None) -> ForeignModel:
    """What such a file or folder holds; `base` gives configuration and tokenizer.

    Raises:
        ConfigError: the configuration is not in it and no base was named.
        FormatError: a mask or a branch does not fit its weight.
    """
    file = source if source.is_file() else _single_file(source)
    stored = open_weights(source) if file is None else state_tensors(_state(read_torch_file(file)))
    stored = {_without_prefix(name): tensor for name, tensor in stored.items()}
    is_gpt2, is_composer = any(map(_GPT2.match, stored)), any(".blocks.0.attn.wq" in name for name in stored)
    tensors: dict[str, ForeignTensor] = {}
    branches, notes, without_mask = {}, [], []
    for name, tensor in stored.items():
        layer, _, last = name.rpartition(".")
        if name.endswith((_PROJECTION, *_SCALES, *_BUFFERS)) or (is_gpt2 and name == "lm_head.weight"):
            continue  # GPT-2's head is its embedding
        new_name = _name(layer, is_composer)
        branch = _branch(source, layer, stored) if last == "weight" else None
        if branch is not None:
            branches[new_name] = branch
        mask = stored.get(f"{layer}.mask")
        if last == "weight" and (mask is not None or branch is not None or (is_gpt2 and _GPT2.match(layer))):
            without_mask += [layer] * (mask is None)
            tensor = _pruned(source, layer, tensor, mask, transposed=is_gpt2)
        tensors[f"{new_name}.{last}"] = tensor
    if without_mask:
        notes.append(
            f"the masks of {len(without_mask)} layers are not in the file: 2:4 weights stay, of others the two largest "
            "of four are kept. The masks of the last refresh, up to ten steps before that, may differ in a few places"
        )
    if is_gpt2:
        notes.append("activation_function is set to gelu: the release computes the exact one, GPT-2 an approximation")
    return ForeignModel(
        source=source, format="AST release" + (" with SLoRB" if branches else ""), tensors=tensors,
        config=partial(_config, source, base, stored, is_gpt2),
        tokenizer_from=base or (str(source) if source.is_dir() else None), branches=branches, notes=tuple(notes),
    )  # fmt: skip


def _state(content: Any) -> dict[str, Any]:
    """The state dict in what a torch file holds; empty if there is none."""
    for key in ("state", "model", "model_state_dict", "state_dict"):
        if isinstance(content, Mapping) and isinstance(content.get(key), Mapping):
            content = content[key]
    if not isinstance(content, Mapping):
        return {}
    return {_without_prefix(str(name)): value for name, value in content.items() if isinstance(value, Tensor)}


def _single_file(folder: Path) -> Path | None:
    files = [file for file in sorted(folder.glob("*_ckpt.pt")) if recognises(file)]
    if len(files) > 1:
        raise ConfigError(f"{folder}: holds {len(files)} checkpoints, such as {files[0].name}. Name one of the files.")
    return files[0] if files else None


def _without_prefix(name: str) -> str:
    for prefix in _PREFIXES:
        name = name.removeprefix(prefix)
    return name.removeprefix("model.") if _COMPOSER.match(name) else name


def _name(layer: str, is_composer: bool) -> str:
    for pattern, replacement in _LLAMA_NAMES if is_composer else ():
        if re.fullmatch(pattern, layer):
            return re.sub(pattern, replacement, layer)
    return layer


def _branch(source: Path, layer: str, stored: Mapping[str, ForeignTensor]) -> Branch | None:
    projection = stored.get(layer + _PROJECTION)
    scale = next((stored[layer + each] for each in _SCALES if layer + each in stored), None)
    if projection is None and scale is None:
        return None
    if projection is None or scale is None:
        missing = _SCALES[0] if scale is None else _PROJECTION
        raise FormatError(f"{source}: {layer}{missing} is missing, the rest of it is there. Take an intact copy.")
    out_features, in_features = stored[f"{layer}.weight"].shape
    rank = projection.shape[0]
    if projection.shape != (rank, in_features) or scale.shape != (out_features, rank):
        raise FormatError(
            f"{source}: {layer}: a branch beside a {[out_features, in_features]} weight is {[rank, in_features]} and "
            f"{[out_features, rank]}, found {list(projection.shape)} and {list(scale.shape)}. The file is damaged."
        )
    return Branch(projection.load, scale.load)


def _pruned(
    source: Path, layer: str, weight: ForeignTensor, mask: ForeignTensor | None, *, transposed: bool
) -> ForeignTensor:
    if len(weight.shape) != 2 or weight.shape[1] % 4:
        raise FormatError(f"{source}: {layer}.weight: 2:4 needs inputs in a multiple of 4, found {list(weight.shape)}.")
    if mask is not None and (mask.shape != weight.shape or mask.dtype.is_floating_point):
        raise FormatError(
            f"{source}: {layer}.mask: must be {list(weight.shape)} as its weight, of bool or integers, found "
            f"{dtype_name(mask.dtype)} {list(mask.shape)}. The file is damaged."
        )

    def load() -> Tensor:
        dense = weight.load()
        if mask is not None:
            dense = dense.masked_fill(mask.load() == 0, 0.0)
        elif first_violation(dense) is not None:
            dense = torch.where(NMPattern(2, 4).keep_mask(dense.float().abs()), dense, 0.0)
        return dense.t().contiguous() if transposed else dense

    shape = weight.shape[::-1] if transposed else weight.shape
    nbytes = weight.nbytes + (0 if mask is None else mask.nbytes)
    return ForeignTensor(weight.dtype, shape, nbytes, load)


def _config(source: Path, base: str | None, stored: Mapping[str, ForeignTensor], is_gpt2: bool) -> dict[str, Any]:
    if not is_gpt2:
        return config_of(source, base)
    if base is not None or (source.is_dir() and (source / "config.json").is_file()):
        config = dict(config_of(source, base))
    else:
        vocabulary, width = stored["transformer.wte.weight"].shape
        if width % _HEAD_SIZE:
            raise ConfigError(
                f"{source}: has {width} channels, which heads of {_HEAD_SIZE} do not fill. Name a model with its "
                f"configuration: base=... (--base)."
            )
        config = GPT2Config(
            vocab_size=vocabulary, n_embd=width, n_head=width // _HEAD_SIZE,
            n_positions=stored["transformer.wpe.weight"].shape[0],
            n_layer=len({name.split(".")[2] for name in stored if name.startswith("transformer.h.")}),
        ).to_dict()  # fmt: skip
    return config | {"activation_function": "gelu", "architectures": ["GPT2LMHeadModel"], "dtype": "float32"}
