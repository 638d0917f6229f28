"""Masks without weights: they give the sparse model back from its base, and are never put on another model."""

from __future__ import annotations

import json
import re

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import save_file

from hf_adaptive_sparse.errors import ConfigError, FormatError, OutputError, PatternError, TargetError
from hf_adaptive_sparse.hf.inspection import inspect_folder
from hf_adaptive_sparse.hf.mask_application import apply_masks, load_with_masks
from hf_adaptive_sparse.hf.mask_folder import is_mask_folder, open_mask_folder
from hf_adaptive_sparse.hf.masks import save_masks
from hf_adaptive_sparse.hf.pretrained import save_packed

from ..tiny_models import tiny_model
from . import foreign_folders as foreign
from .two_four_models import logits_of, two_four_model

UP = "model.layers.0.mlp.up_proj.weight"
REMEDY = "Load that model, or apply the masks all the same with check=False (--check-base=false)."


def refusal(kind, function, *arguments, **options) -> str:
    with pytest.raises(kind) as caught:
        function(*arguments, **options)
    return str(caught.value)


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    """A folder with a dense base, and its masks saved with the base beside."""
    root = tmp_path_factory.mktemp("llama")
    tiny_model().save_pretrained(root / "base")
    save_masks(two_four_model(), root / "masks", base=root / "base")
    return root


@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen2", "opt"])
def test_base_and_masks_give_the_model_back_to_the_last_bit(family, tmp_path):
    sparse, base = two_four_model(family), tiny_model(family)
    base.save_pretrained(tmp_path / "base")
    saved = save_masks(sparse, tmp_path / "masks", base=tmp_path / "base")
    assert (saved.kept_weights, saved.caution, dict(saved.differing)) == ("equal", None, {})
    assert set(saved.masks) == {f"{name}.weight" for name in foreign.linears(sparse)}
    applied = apply_masks(base, tmp_path / "masks")
    assert applied.exact is True and set(applied.masks.values()) == {0.5}
    assert torch.equal(logits_of(base), logits_of(sparse))
    assert torch.equal(logits_of(load_with_masks(tmp_path / "masks", tmp_path / "base")), logits_of(sparse))


def test_masks_of_two_four_take_two_thirds_of_a_bit_for_every_weight(tmp_path):
    sparse = two_four_model(hidden_size=192, intermediate_size=384, head_dim=48, num_hidden_layers=1)
    saved = save_masks(sparse, tmp_path / "masks")
    weights = sum(sparse.get_submodule(name).weight.numel() for name in foreign.linears(sparse))
    assert saved.bits_bytes * 8 * 3 == weights * 2


def test_an_unstructured_mask_takes_a_bit_and_other_dtypes_are_compared_without_a_loss(tmp_path):
    sparse, base = tiny_model(dtype=torch.bfloat16), tiny_model(dtype=torch.bfloat16)
    for name in foreign.linears(sparse):
        weight = sparse.get_submodule(name).weight.data
        weight[weight.abs() < weight.abs().float().quantile(0.3).bfloat16()] = 0.0
    saved = save_masks(sparse, tmp_path / "masks", base=base)
    weights = sum(sparse.get_submodule(name).weight.numel() for name in foreign.linears(sparse))
    assert saved.bits_bytes * 8 == weights and saved.kept_weights == "equal"
    wide = tiny_model(dtype=torch.bfloat16).float()
    assert apply_masks(wide, tmp_path / "masks").exact is True
    assert torch.equal(wide.get_parameter(UP), sparse.get_parameter(UP).float())
    assert refusal(ConfigError, apply_masks, tiny_model(), tmp_path / "masks") == (
        f"{tmp_path / 'masks'}: the masks were saved for model.layers.0.mlp.down_proj.weight in bfloat16, and it is "
        "float32 here, so that the two cannot be compared. Load the model in bfloat16, or do not compare, with "
        "check=False (--check-base=false)."
    )


def test_a_packed_model_gives_the_same_masks_as_its_dense_one(tmp_path):
    from transformers import AutoModelForCausalLM

    sparse = two_four_model("gpt2")
    save_packed(sparse, tmp_path / "packed")
    save_masks(sparse, tmp_path / "a", base=tiny_model("gpt2"))
    packed = AutoModelForCausalLM.from_pretrained(tmp_path / "packed")
    save_masks(packed, tmp_path / "b", base=tiny_model("gpt2"))
    first, second = ((tmp_path / name / "masks.json").read_text() for name in ("a", "b"))
    assert first == second
    message = "apply_masks: the model has packed layers. Apply masks to its dense base model."
    assert refusal(ConfigError, apply_masks, packed, tmp_path / "a", check=False) == message


def test_zeros_of_a_base_and_of_short_groups_come_back(tmp_path):
    sparse, base = two_four_model(), tiny_model()
    for model in (sparse, base):
        model.get_parameter(UP).data[3] = 0.0
    sparse.get_parameter(UP).data[5, :7] = 0.0
    sparse.get_parameter(UP).data[6, :8] = -0.0
    saved = save_masks(sparse, tmp_path / "masks", base=base)
    assert saved.kept_weights == "equal"
    assert apply_masks(base, tmp_path / "masks").exact is True
    assert torch.equal(base.get_parameter(UP), sparse.get_parameter(UP))
    assert not base.get_parameter(UP)[base.get_parameter(UP) == 0].signbit().any()


def test_trained_weights_are_said_to_be_lost_when_masks_are_saved(tmp_path, caplog):
    sparse, base = two_four_model(), tiny_model()
    weight = sparse.get_parameter(UP).data
    kept = weight.nonzero()[:3].T
    weight[kept[0], kept[1]] *= 2
    sparse.model.norm.weight.data[:4] += 1
    saved = save_masks(sparse, tmp_path / "masks", base=base)
    assert saved.kept_weights == "trained" and dict(saved.differing) == {UP: 3, "model.norm.weight": 4}
    assert saved.caution == (
        "masks alone do not give this model back: 2 of its weights differ from the base where they are kept "
        f"({UP} in 3 places). Applied to the base they give a pruned model that was never trained; share a packed or "
        "dense-stored model instead"
    )
    applied = apply_masks(base, tmp_path / "masks")
    assert applied.exact is False
    assert torch.equal(base.get_parameter(UP) != 0, weight != 0)


def test_without_a_base_it_is_unknown_until_the_masks_are_applied(tmp_path):
    saved = save_masks(two_four_model(), tmp_path / "masks")
    assert saved.kept_weights == "unknown" and saved.caution == (
        "the masks were not compared with a base model: if the kept weights were trained, masks alone do not give this "
        "model back. Name the base to find out"
    )
    assert apply_masks(tiny_model(), tmp_path / "masks").exact is True
    assert apply_masks(tiny_model(seed=1), tmp_path / "masks").exact is False


def test_another_base_is_refused_and_named_before_a_weight_is_touched(llama):
    other = tiny_model(seed=1)
    before = logits_of(other)
    masks = llama / "masks"
    assert refusal(ConfigError, apply_masks, other, masks) == (
        f"{masks}: the masks are for base, whose model.layers.0.mlp.down_proj.weight has other "
        f"values. {REMEDY}"
    )
    last = tiny_model()
    last.get_parameter("model.layers.1.self_attn.v_proj.weight").data[-1, -1] += 1
    assert "whose model.layers.1.self_attn.v_proj.weight has " in refusal(ConfigError, apply_masks, last, masks)
    assert not (last.get_parameter(UP) == 0).any()
    assert torch.equal(logits_of(other), before)
    assert apply_masks(other, masks, check=False).exact is False
    assert refusal(ConfigError, apply_masks, tiny_model(num_attention_heads=2, rms_norm_eps=1e-5), masks) == (
        f"{masks}: the masks are for base, whose configuration differs: num_attention_heads is 2, there 4; "
        f"rms_norm_eps is 1e-05, there 1e-06. {REMEDY}"
    )


def test_masks_of_other_shapes_and_names_are_refused_even_unchecked(llama):
    masks = llama / "masks"
    assert refusal(FormatError, apply_masks, tiny_model(intermediate_size=72), masks, check=False) == (
        f"{masks}: the mask of model.layers.0.mlp.down_proj.weight is [32, 64], the weight of this LlamaForCausalLM is "
        "[32, 72]. The masks are of another model."
    )
    assert refusal(FormatError, apply_masks, tiny_model("gpt2"), masks, check=False) == (
        f"{masks}: has a mask for model.layers.0.mlp.down_proj.weight, and GPT2LMHeadModel has no such weight. The "
        "masks are of another model."
    )


def test_what_cannot_be_masked_or_saved_is_refused(tmp_path, llama):
    assert refusal(PatternError, save_masks, tiny_model(), tmp_path / "out") == (
        "LlamaForCausalLM: none of its weights has 1% zeros or more, so there are no masks. Train or prune the "
        "model first."
    )
    assert "save_masks: only the base has a weight model.layers.1." in refusal(
        ConfigError, save_masks, two_four_model(num_hidden_layers=1), tmp_path / "out", base=tiny_model()
    )
    assert refusal(ConfigError, save_masks, two_four_model(), tmp_path / "out", base=tiny_model(vocab_size=72)) == (
        "save_masks: model.embed_tokens.weight is [64, 32], and [72, 32] in the base. Name the model that the sparse "
        "one was made from."
    )
    adapted = get_peft_model(two_four_model(), LoraConfig(target_modules=["up_proj"]))
    assert "has adapters in it" in refusal(ConfigError, save_masks, adapted, tmp_path / "out")
    assert "has adapters in it" in refusal(ConfigError, apply_masks, adapted, llama / "masks")
    assert not (tmp_path / "out").exists()
    before = (llama / "masks" / "masks.json").read_text()
    assert "is not empty" in refusal(OutputError, save_masks, two_four_model(), llama / "masks")
    assert (llama / "masks" / "masks.json").read_text() == before


def test_a_base_that_is_not_named_or_not_there_is_asked_for(tmp_path):
    save_masks(two_four_model(), tmp_path / "masks")
    assert refusal(ConfigError, load_with_masks, tmp_path / "masks") == (
        f"{tmp_path / 'masks'}: does not say which model it is for. Name it: base=..."
    )
    tiny_model().save_pretrained(tmp_path / "base")
    save_masks(two_four_model(), tmp_path / "local", base=tmp_path / "base")
    assert refusal(ConfigError, load_with_masks, tmp_path / "local") == (
        f"{tmp_path / 'local'}: is for a folder called base. Name it: base=..."
    )
    assert str(tmp_path) not in (tmp_path / "local" / "masks.json").read_text()
    assert refusal(ConfigError, load_with_masks, tmp_path / "masks", tmp_path / "nothing").startswith(
        f"{tmp_path / 'nothing'}: cannot load the base model of {tmp_path / 'masks'}: "
    )


def test_masks_that_are_not_there_are_looked_for_on_the_hub():
    message = refusal(ConfigError, apply_masks, tiny_model(), "nobody/no-masks")
    assert message.startswith("nobody/no-masks: no such folder or file, and the Hub does not give it: ")


def test_a_mask_folder_is_told_from_others(llama, tmp_path):
    assert is_mask_folder(llama / "masks") and not is_mask_folder(llama / "base") and not is_mask_folder(tmp_path)
    (tmp_path / "masks.json").write_text("{")
    assert not is_mask_folder(tmp_path)
    assert refusal(FormatError, open_mask_folder, tmp_path).startswith(f"{tmp_path}/masks.json: cannot be read (")
    (tmp_path / "masks.json").write_text('{"adaptive_sparse_masks": 2}')
    assert refusal(FormatError, apply_masks, tiny_model(), tmp_path) == (
        f"{tmp_path}/masks.json: is of version 2 of mask folders, this hf_adaptive_sparse reads 1. Update "
        "hf_adaptive_sparse; if that does not help, the file is damaged."
    )
    assert refusal(FormatError, apply_masks, tiny_model(), llama / "base") == (
        f"{llama / 'base'}: holds no masks (masks.json). What is read: a folder of save_masks, an .npz archive of "
        "MaskLLM, or a .safetensors or .pt file of 0 and 1."
    )


def test_inspection_counts_the_zeros_of_masks(llama):
    found = inspect_folder(llama / "masks")
    assert (found.kind, len(found.two_four), found.zeros * 2) == ("masks", 14, found.parameters)
    assert {matrix.stored for matrix in found.matrices} == {"mask"}
    assert found.notes == ("masks for base; kept weights of the sparse model: equal",)


def test_an_archive_of_maskllm_is_applied_bit_by_bit(tmp_path):
    sparse = two_four_model()
    foreign.maskllm_archive(tmp_path / "mask_compressed.npz", sparse)
    for masks in (tmp_path / "mask_compressed.npz", tmp_path):
        model = tiny_model()
        applied = apply_masks(model, masks)
        assert (applied.format, applied.exact, len(applied.masks)) == ("MaskLLM archive", None, 14)
        assert torch.equal(logits_of(model), logits_of(sparse))
    assert torch.equal(
        logits_of(load_with_masks(tmp_path, save_base(tmp_path / "base"))), logits_of(sparse)
    )


def save_base(folder):
    tiny_model().save_pretrained(folder)
    return folder


@pytest.mark.parametrize("kind", ["safetensors", "pt"])
@pytest.mark.parametrize("suffix, dtype", [(".mask", torch.float32), ("", torch.bool), (".mask", torch.uint8)])
def test_mask_tensors_of_0_and_1_are_applied(tmp_path, kind, suffix, dtype):
    sparse = two_four_model()
    weights = {f"{name}.weight": sparse.get_submodule(name).weight for name in foreign.linears(sparse)}
    masks = {f"{name}{suffix}": (weight != 0).to(dtype) for name, weight in weights.items()}
    file = tmp_path / f"masks.{kind}"
    if kind == "pt":
        torch.save(masks, file)
    else:
        save_file(masks, file)
    model = tiny_model()
    assert apply_masks(model, file).format == "mask tensors"
    assert torch.equal(logits_of(model), logits_of(sparse))


def test_foreign_masks_that_are_damaged_or_do_not_fit_are_named(tmp_path):
    file = tmp_path / "masks.npz"
    foreign.maskllm_archive(file, two_four_model())
    whole = file.read_bytes()
    message = refusal(FormatError, apply_masks, tiny_model(hidden_size=40, head_dim=10), file)
    expected = rf"{file}: \S+\.weight\.mask: a mask of .* takes \d+ bytes, found uint8 .*of another model\."
    assert re.fullmatch(expected, message)
    file.write_bytes(whole[: len(whole) // 2])
    message = refusal(FormatError, apply_masks, tiny_model(), file)
    assert message.startswith(f"{file}: is no .npz archive that can be read (")
    data = bytearray(whole)
    data[60:90] = bytes(30)
    file.write_bytes(data)
    model = tiny_model()
    before = logits_of(model)
    assert refusal(FormatError, apply_masks, model, file).startswith(f"{file}: ")
    assert torch.equal(logits_of(model), before)
    file.write_bytes(whole)
    with np.load(file) as archive:
        masks = dict(archive)
    last = list(masks)[-1]
    np.savez_compressed(file, **{**masks, last: masks[last][:-1]})  # all that come before it are intact
    assert refusal(FormatError, apply_masks, model, file).startswith(f"{file}: {last}: a mask of ")
    assert torch.equal(logits_of(model), before)
    np.savez(file, **{f"{UP}.mask": np.array([{"an": "object"}], dtype=object)})
    assert "Object arrays cannot be loaded when allow_pickle=False" in refusal(FormatError, apply_masks, model, file)
    np.savez(file, nothing=np.zeros(4, dtype=np.uint8))
    assert "has a mask for nothing, and LlamaForCausalLM has no" in refusal(FormatError, apply_masks, model, file)
    np.savez(file)
    assert refusal(TargetError, apply_masks, model, file) == f"{file}: holds no masks."
    save_file({UP: torch.full((64, 32), 0.5)}, tmp_path / "m.safetensors")
    assert refusal(FormatError, apply_masks, model, tmp_path / "m.safetensors") == (
        f"{tmp_path / 'm.safetensors'}: {UP}: a mask is 0 and 1, found other float32 values. The file is damaged, or "
        "of another model."
    )
    (tmp_path / "m.txt").write_text("1 0 1 0")
    assert refusal(FormatError, apply_masks, model, tmp_path / "m.txt") == (
        f"{tmp_path / 'm.txt'}: is not a file of masks that is read: a folder of save_masks, an .npz archive of "
        "MaskLLM, or a .safetensors or .pt file of 0 and 1."
    )
    assert torch.equal(logits_of(model), before)


def test_the_manifest_holds_what_it_documents(llama):
    content = json.loads((llama / "masks" / "masks.json").read_text())
    assert set(content) == {"adaptive_sparse_masks", "base", "kept_weights", "masks", "producer", "tensor_digest"}
    assert (content["base"]["name"], content["base"]["is_local"]) == ("base", True)
    assert content["base"]["config"]["hidden_size"] == 32
    assert content["masks"][UP]["shape"] == [64, 32] and content["masks"][UP]["kept"] == 1024
    assert sorted(path.name for path in (llama / "masks").iterdir()) == ["masks.json", "masks.safetensors"]
