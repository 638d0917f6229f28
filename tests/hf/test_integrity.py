"""Every check of a packed folder by itself, with its whole message; and what is allowed to change."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from hf_adaptive_sparse.errors import FormatError
from hf_adaptive_sparse.hf import integrity
from hf_adaptive_sparse.hf.integrity import INDEX_NAME, WEIGHTS_NAME, reseal
from hf_adaptive_sparse.hf.pretrained import save_packed
from hf_adaptive_sparse.hf.quantizer import VERIFY_VARIABLE, loading_options
from hf_adaptive_sparse.hf.tensor_files import digest_of_digests, digest_of_file, read_header, write_tensors

from .two_four_models import logits_of, two_four_model

LAYER = "model.layers.0.mlp.up_proj"  # [48, 32]: values [48, 16], meta [48, 4]
VALUES, META = f"{LAYER}.weight_values", f"{LAYER}.weight_meta"


def load(folder, **options):
    return AutoModelForCausalLM.from_pretrained(folder, **options)


@pytest.fixture(scope="module")
def model():
    return two_four_model("llama", torch.bfloat16, num_hidden_layers=1, intermediate_size=48)


@pytest.fixture(scope="module")
def saved(model, tiny_tokenizer, tmp_path_factory):
    root = tmp_path_factory.mktemp("saved")
    save_packed(model, root / "single", tiny_tokenizer)
    save_packed(model, root / "sharded", tiny_tokenizer, max_shard_size="6KB")
    save_packed(two_four_model("llama", torch.bfloat16, seed=1, num_hidden_layers=1, intermediate_size=48),
                root / "other", tiny_tokenizer, max_shard_size="6KB")  # fmt: skip
    return root


@pytest.fixture(params=["single"])
def folder(request, saved, tmp_path):
    """A copy that may be damaged."""
    return Path(shutil.copytree(saved / request.param, tmp_path / "out"))


sharded = pytest.mark.parametrize("folder", ["sharded"], indirect=True)


def write_consistently(folder: Path, change) -> None:
    """Change the tensors and write them as `save_packed` would have, digests and all."""
    file = folder / WEIGHTS_NAME
    stored, metadata = read_header(file)
    tensors = {
        name: torch.frombuffer(bytearray(b"".join(tensor.chunks())), dtype=tensor.dtype).view(tensor.shape)
        for name, tensor in stored.items()
    }
    change(tensors)
    layout = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}
    digests = write_tensors(file, layout, tensors.__getitem__, {})
    whole = digest_of_digests(digests)
    edit_config(folder, lambda config: config["quantization_config"].update(tensor_digest=whole))
    beside = json.loads(metadata["adaptive_sparse_files"])
    beside["config.json"] = digest_of_file(folder / "config.json")
    version = metadata["adaptive_sparse_format"]
    write_tensors(file, layout, tensors.__getitem__, integrity.metadata_of(digests, whole, beside, version))


def edit_config(folder: Path, change) -> None:
    config = json.loads((folder / "config.json").read_text())
    change(config)
    (folder / "config.json").write_text(json.dumps(config))


def edit_metadata(file: Path, change) -> None:
    """Change the metadata of a weight file, whatever their length."""
    raw = file.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + length])
    change(header["__metadata__"])
    encoded = json.dumps(header).encode()
    file.write_bytes(len(encoded).to_bytes(8, "little") + encoded + raw[8 + length :])


def refusal(folder: Path, **options) -> str:
    """The message with which the folder is refused, with and without digests if `options` say nothing of it."""
    with pytest.raises(FormatError) as error, loading_options(**options):
        load(folder)
    return str(error.value)


def test_a_consistent_rewrite_of_nothing_still_loads(folder, model):
    write_consistently(folder, lambda tensors: None)
    assert torch.equal(logits_of(load(folder)), logits_of(model))


DAMAGED = "The file is damaged or not format v1."


@pytest.mark.parametrize("verify", [True, False])
@pytest.mark.parametrize(
    "change, message",
    [
        (
            lambda tensors: tensors.pop(META),
            "{folder}: " + f"{LAYER}.weight_meta is missing; config.json lists {LAYER}.",
        ),
        (
            lambda tensors: (tensors.pop(META), tensors.pop(VALUES)),
            "{folder}: " + f"{LAYER}.weight_values is missing; config.json lists {LAYER}.",
        ),
        (
            lambda tensors: tensors.update({META: tensors[META][:, :3].contiguous()}),
            "{file}: " + f"{LAYER}.weight_meta: must be [48, 4] beside values of [48, 16], found [48, 3]. {DAMAGED}",
        ),
        (
            lambda tensors: tensors.update({META: tensors[META].to(torch.int16)}),
            "{file}: " + f"{LAYER}.weight_meta: must be uint8, found int16. {DAMAGED}",
        ),
        (
            lambda tensors: tensors.update({VALUES: tensors[VALUES].to(torch.int16)}),
            "{file}: "
            + f"{LAYER}.weight_values: must be one of float32, float16, bfloat16, found int16. {DAMAGED}",
        ),
        (
            lambda tensors: tensors[META][7].__setitem__(2, 0x40),
            "{file}: "
            + f"{LAYER}.weight_meta: row 7, group 4 has an illegal nibble, 0 (byte 2 of the row is 64); legal are 4, "
            f"8, 9, 12, 13, 14. {DAMAGED}",
        ),
        (
            lambda tensors: tensors.update({name: tensors[name][:40] for name in (VALUES, META)}),
            f"{LAYER}: the stored values are [40, 16], LlamaForCausalLM needs [48, 16]. The files are of different "
            "models.",
        ),
        (
            lambda tensors: tensors.pop("model.norm.weight"),
            "{folder}: tensors are missing: model.norm.weight. The files are of different models.",
        ),
        (
            lambda tensors: tensors.update({f"extra{number}": torch.zeros(2) for number in range(5)}),
            "{folder}: tensors are not of this model: extra0, extra1, extra2 and 2 more. The files are of different "
            "models.",
        ),
        (
            lambda tensors: tensors.update({"lm_head.weight_meta": torch.zeros(2, dtype=torch.uint8)}),
            "{folder}: lm_head is packed, but config.json does not list it.",
        ),
    ],
)
def test_what_is_wrong_inside_a_consistent_file_is_named(folder, change, message, verify):
    write_consistently(folder, change)
    expected = message.replace("{folder}", str(folder)).replace("{file}", str(folder / WEIGHTS_NAME))
    assert refusal(folder, verify=verify) == expected


@pytest.mark.parametrize("verify", [True, False])
@pytest.mark.parametrize(
    "listed, message",
    [
        ("model.layers.7.mlp.up_proj", "has no such module"),
        ("model.embed_tokens", "has a Embedding there"),
    ],
)
def test_a_module_that_the_model_does_not_have_is_named(folder, listed, message, verify):
    def add(tensors):
        tensors[f"{listed}.weight_values"] = torch.zeros(8, 4)
        tensors[f"{listed}.weight_meta"] = torch.full((8, 1), 0xEE, dtype=torch.uint8)

    edit_config(folder, lambda config: config["quantization_config"]["modules"].append(listed))
    write_consistently(folder, add)
    assert refusal(folder, verify=verify) == (
        f"config.json: lists {listed} as packed, but LlamaForCausalLM {message}. The file is damaged, or of another "
        f"model."
    )


def test_a_changed_byte_of_any_tensor_is_found_and_named(saved, tmp_path):
    tensors, _ = read_header(saved / "single" / WEIGHTS_NAME)
    for name, tensor in tensors.items():
        if name.endswith("weight_meta"):  # a legal byte for another
            continue
        broken = Path(shutil.copytree(saved / "single", tmp_path / "out", dirs_exist_ok=True)) / WEIGHTS_NAME
        data = bytearray(broken.read_bytes())
        data[tensor.start + 3] ^= 0x10
        broken.write_bytes(data)
        assert refusal(broken.parent) == (
            f"{broken}: tensor {name} is not as it was saved (bytes {tensor.start} to {tensor.end} of the file). The "
            f"file is damaged; fetch it again."
        )


def test_a_legal_nibble_in_place_of_another_is_found_too(folder):
    file = folder / WEIGHTS_NAME
    tensor = read_header(file)[0][f"{LAYER}.weight_meta"]
    data = bytearray(file.read_bytes())
    data[tensor.start] = 0x44 if data[tensor.start] != 0x44 else 0x88
    file.write_bytes(data)
    assert refusal(folder).startswith(f"{file}: tensor {LAYER}.weight_meta is not as it was saved")


def test_a_version_of_the_future_in_the_weight_file_is_refused(folder):
    file = folder / WEIGHTS_NAME
    for version in ("2", "1.2", "1.10"):
        edit_metadata(file, lambda metadata, version=version: metadata.update(adaptive_sparse_format=version))
        assert refusal(folder, verify=False) == (
            f"{file}: is of format version {version}, this hf_adaptive_sparse reads 1 and 1.1. Update "
            f"hf_adaptive_sparse; if that does not help, the file is damaged."
        )


@pytest.mark.parametrize("key", ["adaptive_sparse_tensors", "adaptive_sparse_files"])
@pytest.mark.parametrize(
    "value, reason",
    [
        (None, "{key!r}"),
        ("{", "Expecting property name enclosed in double quotes: line 1 column 2 (char 1)"),
        ("[1]", "not a table of digests"),
        ('{"a": 1}', "not a table of digests"),
    ],
)
def test_metadata_that_cannot_be_read_are_refused(folder, key, value, reason):
    def change(metadata):
        del metadata[key]
        if value is not None:
            metadata[key] = value

    edit_metadata(folder / WEIGHTS_NAME, change)
    assert refusal(folder) == (
        f"{folder / WEIGHTS_NAME}: cannot read the metadata {key} ({reason.format(key=key)}). It is damaged."
    )


@pytest.mark.parametrize(
    "change, what",
    [(lambda digests: digests.pop("model.norm.weight"), "has no digest"), (dict.clear, "has no digest")],
)
def test_a_tensor_without_a_digest_is_refused(folder, change, what):
    def edit(metadata):
        digests = json.loads(metadata["adaptive_sparse_tensors"])
        change(digests)
        metadata["adaptive_sparse_tensors"] = json.dumps(digests)

    edit_metadata(folder / WEIGHTS_NAME, edit)
    message = refusal(folder)
    assert re.fullmatch(
        rf"{re.escape(str(folder / WEIGHTS_NAME))}: tensor \S+ {what}\. The file is damaged\.", message
    )


def test_weights_of_another_checkpoint_are_refused(folder, saved, tmp_path):
    other = two_four_model("llama", torch.bfloat16, seed=1, num_hidden_layers=1, intermediate_size=48)
    save_packed(other, tmp_path / "other")
    file = folder / WEIGHTS_NAME
    shutil.copy(tmp_path / "other" / WEIGHTS_NAME, file)
    digest = json.loads((tmp_path / "other" / "config.json").read_text())["quantization_config"]["tensor_digest"]
    expected = json.loads((folder / "config.json").read_text())["quantization_config"]["tensor_digest"]
    beside = {"config.json": digest_of_file(folder / "config.json")}  # else it would be noticed first
    edit_metadata(file, lambda metadata: metadata.update(adaptive_sparse_files=json.dumps(beside)))
    assert refusal(folder) == (
        f"{file}: is not of the checkpoint that config.json describes (digest {digest}, expected {expected}). Fetch "
        f"the whole folder again."
    )


@pytest.mark.parametrize("folder", ["single", "sharded"], indirect=True)
def test_every_weight_file_holds_the_digests_of_the_other_files(folder):
    first, *others = sorted(folder.glob("*.safetensors"))
    for file in (first, *others):
        before = file.read_bytes()
        edit_metadata(file, lambda metadata: metadata.update(adaptive_sparse_files="{}"))
        assert refusal(folder) == (
            f"{file}: has no digest of config.json in its metadata. It is damaged."
            if file == first
            else f"{file}: has other digests of config.json and the rest than {first.name} has."
        )
        file.write_bytes(before)


@sharded
def test_one_shard_of_another_checkpoint_is_refused(folder, saved):
    names = sorted(file.name for file in folder.glob("*.safetensors"))
    assert len(names) >= 3
    for name in names[1:]:
        shutil.copy(saved / "other" / name, folder / name)
        digest = json.loads((saved / "other" / "config.json").read_text())["quantization_config"]["tensor_digest"]
        assert re.fullmatch(
            rf"{re.escape(str(folder / name))}: is not of the checkpoint that config\.json describes \(digest "
            rf"{digest}, expected [0-9a-f]{{32}}\)\. Fetch the whole folder again\.",
            refusal(folder),
        )
        shutil.copy(saved / "sharded" / name, folder / name)
    load(folder)


@sharded
def test_two_shards_that_traded_places_are_refused(folder):
    first, second = sorted(folder.glob("*.safetensors"))[:2]
    tensor = min(set(read_header(first)[0]) | set(read_header(second)[0]))
    a, b = (first, second) if tensor in read_header(first)[0] else (second, first)
    first.rename(folder / "x")
    second.rename(first)
    (folder / "x").rename(second)
    for verify in (True, False):
        assert refusal(folder, verify=verify) == (
            f"{folder / INDEX_NAME}: says that tensor {tensor} is in {a.name}, it is in {b.name}. Files were renamed, "
            f"or are of different checkpoints; fetch the whole folder again."
        )


@sharded
def test_a_shard_that_is_missing_is_named(folder):
    file = sorted(folder.glob("*.safetensors"))[1]
    file.unlink()
    assert refusal(folder) == f"{file}: the file is missing."


@sharded
def test_a_shard_that_the_index_does_not_name_any_more_is_missed(folder):
    index = json.loads((folder / INDEX_NAME).read_text())
    gone = index["weight_map"]["model.norm.weight"]
    index["weight_map"] = {name: file for name, file in index["weight_map"].items() if file != gone}
    (folder / INDEX_NAME).write_text(json.dumps(index))
    assert refusal(folder).startswith(f"{folder / INDEX_NAME}: is not as it was saved with the model.")
    assert "is missing" in refusal(folder, verify=False) or "are missing" in refusal(folder, verify=False)
    reseal(folder)
    assert refusal(folder, verify=True) == refusal(folder, verify=False) or refusal(folder) == (
        f"{folder}: is not the whole checkpoint. Fetch the whole folder again."
    )


def test_a_tensor_in_two_shards_is_refused(saved, tmp_path):
    folder = Path(shutil.copytree(saved / "sharded", tmp_path / "out"))
    first, second = sorted(folder.glob("*.safetensors"))[:2]
    shutil.copy(first, second)
    with pytest.raises(FormatError) as error:
        integrity.verify([first, second], {}, None, digests=False)
    name = str(error.value).split()[3].rstrip(",")
    assert str(error.value) == f"{second}: holds tensor {name}, which {first.name} holds too."


@pytest.mark.parametrize("name", ["config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"])
def test_every_file_beside_the_weights_is_held_to_what_was_saved(folder, name):
    path = folder / name
    path.write_text(path.read_text().replace("\n", "\n ", 1))
    assert refusal(folder) == (
        f"{path}: is not as it was saved with the model. Restore it; if it was changed on purpose, call "
        f"hf_adaptive_sparse.hf.integrity.reseal on the folder."
    )
    if name != "config.json":
        path.unlink()
        assert refusal(folder) == f"{path}: the file is missing; it was saved with the model."


def test_files_that_were_added_later_do_not_matter(folder, model):
    (folder / "README.md").write_text("a card")
    (folder / "model.safetensors").write_text("not ours")
    assert torch.equal(logits_of(load(folder)), logits_of(model))


def test_of_a_download_only_what_was_fetched_is_checked(saved, model, tmp_path):
    folder = tmp_path / "models--me--tiny" / "snapshots" / "0123456789abcdef"
    folder.mkdir(parents=True)
    for name in ("config.json", WEIGHTS_NAME):
        shutil.copy(saved / "single" / name, folder / name)
    assert torch.equal(logits_of(load(folder)), logits_of(model))
    shutil.copy(saved / "single" / "tokenizer.json", folder)
    (folder / "tokenizer.json").write_text("{}")
    assert refusal(folder).startswith(f"{folder / 'tokenizer.json'}: is not as it was saved with the model.")


def test_a_damaged_configuration_is_found_before_a_model_is_built_from_it(folder, monkeypatch):
    edit_config(folder, lambda config: config.update(num_hidden_layers=10**9))

    def fail(*arguments, **options):
        raise AssertionError("built")

    monkeypatch.setattr("transformers.LlamaForCausalLM.__init__", fail)
    assert refusal(folder).startswith(f"{folder / 'config.json'}: is not as it was saved with the model.")


def test_in_a_subfolder_it_is_found_as_well(saved, tmp_path):
    folder = Path(shutil.copytree(saved / "single", tmp_path / "repo" / "sub"))
    edit_config(folder, lambda config: config.update(rms_norm_eps=0.5))
    with pytest.raises(FormatError, match=f"^{re.escape(str(folder / 'config.json'))}: is not as it was saved"):
        load(tmp_path / "repo", subfolder="sub")


@pytest.mark.parametrize("way", ["option", "environment"])
def test_checking_digests_can_be_switched_off(folder, way, monkeypatch):
    edit_config(folder, lambda config: config.update(rms_norm_eps=0.5))
    if way == "environment":
        monkeypatch.setenv(VERIFY_VARIABLE, "0")
        assert load(folder).config.rms_norm_eps == 0.5
        monkeypatch.setenv(VERIFY_VARIABLE, "1")
        load_refused = refusal(folder)
    else:
        with loading_options(verify=False):
            assert load(folder).config.rms_norm_eps == 0.5
        load_refused = refusal(folder)
    assert load_refused.startswith(f"{folder / 'config.json'}: is not as it was saved")


@pytest.mark.parametrize("folder", ["single", "sharded"], indirect=True)
def test_a_change_on_purpose_can_be_sealed(folder):
    assert reseal(folder) == []
    edit_config(folder, lambda config: config.update(rms_norm_eps=0.5))
    (folder / "tokenizer_config.json").write_text("{}")
    sizes = {file: file.stat().st_size for file in folder.glob("*.safetensors")}
    assert reseal(folder) == ["config.json", "tokenizer_config.json"]
    assert {file: file.stat().st_size for file in folder.glob("*.safetensors")} == sizes
    assert load(folder).config.rms_norm_eps == 0.5
    assert reseal(str(folder)) == []


def test_damaged_weights_are_not_sealed(folder):
    file = folder / WEIGHTS_NAME
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    with pytest.raises(FormatError, match=f"^{re.escape(str(file))}: tensor .* is not as it was saved"):
        reseal(folder)
    assert file.read_bytes() == data


def test_there_must_be_something_to_seal(tmp_path):
    with pytest.raises(FormatError) as error:
        reseal(tmp_path)
    assert str(error.value) == f"{tmp_path}: holds no packed weights (model.sparse24*.safetensors)."


def test_weights_that_the_loader_put_elsewhere_are_an_error_and_not_random(folder):
    """With a mapping of names of the caller's own, the tensors are there and do not arrive."""
    with pytest.raises(FormatError) as error:
        load(folder, key_mapping={re.escape(f"{LAYER}.weight_meta"): f"{LAYER.replace('up', 'gate')}.weight_meta"})
    assert str(error.value) == f"{LAYER}.weight_meta: was not loaded, so the model would be random."
