"""Checkpoints of other tools, written here after the layouts that are documented in the importers."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from ..reference import sparse_bitmask as reference


def save_state(folder: Path, state: dict[str, Tensor], config: dict[str, Any], shards: int = 1) -> None:
    """A model folder: weights in one file, or in several with an index, and config.json."""
    folder.mkdir(parents=True, exist_ok=True)
    state = {name: tensor.contiguous().clone() for name, tensor in state.items()}
    if shards == 1:
        save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    else:
        names, weight_map = sorted(state), {}
        for shard in range(shards):
            file = f"model-{shard + 1:05d}-of-{shards:05d}.safetensors"
            part = {name: state[name] for name in names[shard::shards]}
            save_file(part, folder / file, metadata={"format": "pt"})
            weight_map |= dict.fromkeys(part, file)
        (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    (folder / "config.json").write_text(json.dumps(config))


def linears(model: PreTrainedModel) -> list[str]:
    """Names of the linear layers, but for the head."""
    kinds = (torch.nn.Linear, Conv1D)
    return [name for name, module in model.named_modules() if isinstance(module, kinds) and name != "lm_head"]


def compressed_tensors_folder(
    folder: Path,
    model: PreTrainedModel,
    sparse: str = "sparse-24-bitmask",
    quantize: Callable[[Tensor], tuple[Tensor, Tensor]] | None = None,
    *,
    shards: int = 1,
    old_names: bool = False,
    **settings: Any,
) -> dict[str, Tensor]:
    """Writes `model` as compressed-tensors did, and returns the state dict that it stands for.

    Args:
        quantize: weight -> (int8 or fp8 codes, scales).
        old_names: as versions before 0.9: every tensor is stored by its bits, its parts are named after it.
        settings: go into the quantization_config.
    """
    expected = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    chosen = [f"{name}.weight" for name in linears(model)]
    state: dict[str, Tensor] = {}
    for name, tensor in expected.items():
        if name in chosen:
            layer, weight = name.removesuffix(".weight"), tensor
            if quantize is not None:
                weight, scale = quantize(tensor)
                by_group = weight.to(scale.dtype).unflatten(1, (scale.shape[1] if scale.ndim == 2 else 1, -1))
                expected[name] = (by_group * scale.reshape(*scale.shape[:1], -1, 1)).flatten(1).to(tensor.dtype)
                state[f"{layer}.weight_scale"] = scale
            if sparse == "dense":
                state[name] = weight
            else:
                state |= _by_bits(name if old_names else layer, weight, sparse)
        elif old_names:
            state |= _by_bits(name, tensor, sparse)
        else:
            state[name] = tensor
    config = model.config.to_dict() | {"dtype": str(model.dtype).removeprefix("torch.")}
    structure = "2:4" if "24" in sparse else "unstructured"
    config["quantization_config"] = {
        "quant_method": "compressed-tensors", "version": "0.14.0.1", "ignore": ["lm_head"],
        "sparsity_config": {"format": sparse, "sparsity_structure": structure, "targets": ["Linear"]}, **settings,
    }  # fmt: skip
    save_state(folder, state, config, shards)
    return expected


def _by_bits(prefix: str, weight: Tensor, sparse: str) -> dict[str, Tensor]:
    rows = weight.float().reshape(-1, weight.shape[-1])
    values, bitmask, offsets = reference.pack(rows.tolist(), "24" in sparse)
    bits, shape = torch.tensor(bitmask, dtype=torch.uint8), torch.tensor(weight.shape)
    tensors = {
        f"{prefix}.compressed": torch.tensor(values).to(weight.dtype),
        f"{prefix}.bitmask": bits if weight.ndim == 2 else bits[0],
        f"{prefix}.shape": shape.unsqueeze(1) if "24" in sparse else shape,
    }
    if "24" not in sparse:
        tensors[f"{prefix}.row_offsets"] = torch.tensor(offsets if weight.ndim == 2 else 0)
    return tensors


def int8(strategy: str, scale_dtype: torch.dtype | None = None) -> Callable[[Tensor], tuple[Tensor, Tensor]]:
    """Symmetric codes with one scale per "tensor", "channel" or "group" of 8 inputs."""
    return lambda weight: _codes(weight, strategy, 127, torch.int8, scale_dtype)


def fp8(strategy: str) -> Callable[[Tensor], tuple[Tensor, Tensor]]:
    return lambda weight: _codes(weight, strategy, 448, torch.float8_e4m3fn, None)


def _codes(
    weight: Tensor, strategy: str, largest: float, dtype: torch.dtype, scale_dtype: torch.dtype | None
) -> tuple[Tensor, Tensor]:
    groups = {"tensor": weight.reshape(1, 1, -1), "channel": weight.unsqueeze(1), "group": weight.unflatten(1, (-1, 8))}
    scale = (groups[strategy].float().abs().amax(-1) / largest).clamp(min=1e-6).to(scale_dtype or weight.dtype)
    exact = weight.float().unflatten(1, (scale.shape[1], -1)) / scale.float().unsqueeze(-1)
    exact = exact.round() if dtype == torch.int8 else exact
    codes = exact.clamp(-largest, largest).flatten(1).to(dtype)
    return codes, scale.reshape(1) if strategy == "tensor" else scale


def modelopt_state(model: PreTrainedModel, dense: PreTrainedModel) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """A state dict with dense weights and the masks of `model` beside them, and what modelopt_state.pth holds."""
    state = {name: tensor.clone() for name, tensor in dense.state_dict().items()}
    sparse = model.state_dict()
    for layer in linears(model):
        state[f"{layer}._weight_mask"] = sparse[f"{layer}.weight"] != 0
    layers = {f"{layer}.is_sparse": -1 for layer in linears(model)} | {"lm_head.is_sparse": 0}
    mode = ("sparse_magnitude", {"config": {"nn.Linear": {"*": {}}}, "metadata": {"subnet_config": layers}})
    return state, {"modelopt_state_dict": [mode], "modelopt_version": "0.47.0"}


def modelopt_folder(folder: Path, model: PreTrainedModel, dense: PreTrainedModel, shards: int = 1) -> dict[str, Any]:
    state, about = modelopt_state(model, dense)
    save_state(folder, state, model.config.to_dict(), shards)
    torch.save(about, folder / "modelopt_state.pth")
    return about


def maskllm_archive(path: Path, model: PreTrainedModel) -> None:
    """The masks of a model as MaskLLM's tools compress them: a row of bits, by the name of the weight and ".mask"."""
    state = model.state_dict()
    masks = {f"{name}.weight.mask": (state[f"{name}.weight"] != 0).numpy() for name in linears(model)}
    np.savez_compressed(path, **{name: np.packbits(mask) for name, mask in masks.items()})


def ast_gpt2(model: PreTrainedModel, k: int | None, seed: int = 0) -> dict[str, Tensor]:
    """The state dict of the AST release for a GPT-2: latent weights [out, in], a branch, a tied head."""
    generator = torch.Generator().manual_seed(seed)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for layer in linears(model):
        weight = state[f"{layer}.weight"].T.contiguous()
        state[f"{layer}.weight"] = weight
        if k is not None:
            state |= _branch(layer, weight, k, "SLoRB_Weight", generator)
    return state


def ast_llama(model: PreTrainedModel, k: int | None, seed: int = 0) -> dict[str, Tensor]:
    """The state dict of the AST release for a LLaMA: Composer's names, masks (random ones) and a branch."""
    from hf_adaptive_sparse.patterns import NMPattern

    generator = torch.Generator().manual_seed(seed)
    state: dict[str, Tensor] = {"model.transformer.blocks.0.attn.rotary_emb.inv_freq": torch.ones(4)}
    for name, tensor in model.state_dict().items():
        layer, _, last = name.rpartition(".")
        new = f"model.{_composer_name(layer)}"
        state[f"{new}.{last}"] = tensor.clone()
        if layer in linears(model):
            keep = NMPattern(2, 4).keep_mask(torch.rand(tensor.shape, generator=generator))
            state |= {f"{new}.mask": keep, f"{new}.inital_mask": ~keep}
            if k is not None:
                state |= _branch(new, tensor, k, "SLoRA_Weight", generator)
    return state


def _branch(layer: str, weight: Tensor, k: int, scale: str, generator: torch.Generator) -> dict[str, Tensor]:
    rows, columns = weight.shape
    return {
        f"{layer}.x_proj": torch.randn(columns // k, columns, generator=generator) * 0.1,
        f"{layer}.{scale}": torch.randn(rows, columns // k, generator=generator) * 0.1,
    }


def _composer_name(layer: str) -> str:
    outside = {"model.embed_tokens": "wte", "model.norm": "ln_f", "lm_head": "output"}
    if layer in outside:
        return f"transformer.{outside[layer]}"
    _, _, number, rest = layer.split(".", 3)
    inside = {
        "self_attn.q_proj": "attn.wq", "self_attn.k_proj": "attn.wk", "self_attn.v_proj": "attn.wv",
        "self_attn.o_proj": "attn.out_proj", "input_layernorm": "ln_1", "post_attention_layernorm": "ln_2",
    }  # fmt: skip
    return f"transformer.blocks.{number}.{inside.get(rest, rest)}"
