"""push_to_hub: what arrives, under which name, in one commit; and that from_pretrained opens it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from huggingface_hub import CommitOperationAdd, HfApi, ModelCard
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

from hf_adaptive_sparse import (
    AdaptiveSparseConfig,
    ConfigError,
    OutputError,
    export_shrunk,
    find_axes,
    push_to_hub,
    remove_units,
    save_dense,
    save_packed,
)
from tests.hf.two_four_models import logits_of, quantize, two_four_model
from tests.tiny_models import tiny_model

WEIGHTS = {"packed": "model.sparse24.safetensors", "dense": "model.safetensors", "shrunk": "model.safetensors"}


def pushed(place, what, repo=None, **options):
    """push_to_hub, to a new repository unless one is named."""
    return push_to_hub(what, repo or place.new(), token=place.token, endpoint=place.url, **options)


def loaded(place, repo, folder, **options):
    """The model that from_pretrained makes of what the Hub gives out, fetched into an empty cache."""
    snapshot = place.api.snapshot_download(repo, cache_dir=folder / "cache", **options)
    return AutoModelForCausalLM.from_pretrained(snapshot)


def titles(place, repo, revision=None):
    return [commit.title for commit in place.api.list_repo_commits(repo, revision=revision)]


def shrunk_model():
    """A llama with different widths in its blocks."""
    model = tiny_model()
    axis = next(axis for axis in find_axes(model) if axis.name == "model.layers.1.mlp")
    remove_units(model, {axis.name: torch.arange(axis.count) < axis.count // 2})
    return model


@pytest.mark.parametrize("kind", ["packed", "dense"])
def test_a_folder_arrives_in_one_commit_and_opens_as_it_was(kind, place, packed_folder, dense_folder, tmp_path):
    folder = {"packed": packed_folder, "dense": dense_folder}[kind]
    (found,) = pushed(place, folder)
    assert (found.kind, found.revision, found.changed) == (kind, "main", True)
    assert found.url == f"{place.url}/{found.repo_id}"
    assert titles(place, found.repo_id) == [f"Upload the {kind} model", "initial commit"]
    files = place.api.list_repo_files(found.repo_id)
    assert set(files) >= {"README.md", "config.json", WEIGHTS[kind]}
    assert "model.safetensors" not in files or kind != "packed"
    expected = logits_of(AutoModelForCausalLM.from_pretrained(folder))
    assert torch.equal(logits_of(loaded(place, found.repo_id, tmp_path)), expected)


@pytest.mark.parametrize("bits", [None, 8])
def test_a_live_model_is_packed_where_it_can_be(bits, place, tmp_path, tiny_tokenizer):
    model = two_four_model(dtype=torch.bfloat16)
    if bits is not None:
        grids = quantize(model, bits)
        folder = tmp_path / "quantized"
        save_packed(model, folder, quantized=grids)
        model = AutoModelForCausalLM.from_pretrained(folder)
    (found,) = pushed(place, model, tokenizer=tiny_tokenizer)
    assert found.kind == "packed"
    assert "tokenizer.json" in place.api.list_repo_files(found.repo_id)
    again = loaded(place, found.repo_id, tmp_path)
    assert torch.equal(logits_of(again), logits_of(model))
    card = ModelCard.load(place.api.hf_hub_download(found.repo_id, "README.md", cache_dir=tmp_path))
    assert ("int8" in card.data.tags) == (bits is not None)


def test_a_live_model_without_two_four_layers_is_dense_stored_and_not_packed_by_force(place):
    (found,) = pushed(place, tiny_model())
    assert found.kind == "dense"
    with pytest.raises(ValueError, match="none of its 15 linear layers can be packed"):
        pushed(place, tiny_model(), packed=True)


def test_both_forms_are_two_repositories_and_the_packed_one_names_the_other_as_its_base(place, trained_run, tmp_path):
    first, second = pushed(place, trained_run, packed="both", base_model="someone/tiny")
    assert (first.kind, second.kind) == ("dense", "packed")
    assert second.repo_id == f"{first.repo_id}-packed"
    cards = [
        ModelCard.load(place.api.hf_hub_download(each.repo_id, "README.md", cache_dir=tmp_path)).data
        for each in (first, second)
    ]
    assert [(card.base_model, card.base_model_relation) for card in cards] == [
        ("someone/tiny", "finetune"),
        (first.repo_id, "quantized"),
    ]
    expected = logits_of_tiny(AutoModelForCausalLM.from_pretrained(trained_run / "dense"))
    for each in (first, second):
        assert torch.equal(logits_of_tiny(loaded(place, each.repo_id, tmp_path)), expected)


def logits_of_tiny(model):
    with torch.no_grad():
        return model(torch.arange(4, 20)[None]).logits


@pytest.mark.parametrize("wanted, name", [(True, "packed"), (False, "dense")])
def test_a_folder_of_the_other_form_is_converted(wanted, name, place, packed_folder, dense_folder, tmp_path):
    (found,) = pushed(place, dense_folder if wanted else packed_folder, packed=wanted)
    assert found.kind == name and WEIGHTS[name] in place.api.list_repo_files(found.repo_id)
    expected = logits_of(AutoModelForCausalLM.from_pretrained(dense_folder))
    assert torch.equal(logits_of(loaded(place, found.repo_id, tmp_path)), expected)


def test_a_sharded_packed_folder_opens_from_the_hub(place, tmp_path):
    model = two_four_model()
    save_packed(model, tmp_path / "sharded", max_shard_size=20_000)
    (found,) = pushed(place, tmp_path / "sharded")
    files = place.api.list_repo_files(found.repo_id)
    assert sum(name.startswith("model.sparse24-0") for name in files) > 1
    assert torch.equal(logits_of(loaded(place, found.repo_id, tmp_path)), logits_of(model))


def test_a_shrunk_model_names_no_folder_of_this_machine(place, tmp_path):
    model = shrunk_model()
    kept = {"model.layers.1.mlp": torch.arange(32)}
    export_shrunk(model, tmp_path / "shrunk", manifest={"kept": kept, "parent": str(tmp_path / "secret" / "base")})
    (found,) = pushed(place, tmp_path / "shrunk")
    assert found.kind == "shrunk"
    again = loaded(place, found.repo_id, tmp_path)
    assert torch.equal(logits_of(again), logits_of(model))
    config = json.loads(open(place.api.hf_hub_download(found.repo_id, "config.json", cache_dir=tmp_path)).read())
    assert config["pruning_manifest"]["parent"] == "base"
    (live,) = pushed(place, again)
    assert live.kind == "shrunk"
    with pytest.raises(ConfigError, match="is a smaller checkpoint, which is neither packed nor dense-stored"):
        pushed(place, tmp_path / "shrunk", packed=True)


@pytest.mark.parametrize("config", [AdaptiveSparseConfig(task_type="CAUSAL_LM"), LoraConfig(task_type="CAUSAL_LM")])
def test_an_adapter_opens_on_its_base_model(config, place, tmp_path):
    base = tiny_model()
    (of_base,) = pushed(place, base)
    model = get_peft_model(tiny_model(), config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.fill_(0.1)
    with pytest.raises(ConfigError, match="which is no Hub id, so that nobody could load it"):
        pushed(place, model)
    (found,) = pushed(place, model, base_model=of_base.repo_id)
    assert found.kind == "adapter"
    snapshot = place.api.snapshot_download(found.repo_id, cache_dir=tmp_path)
    again = PeftModel.from_pretrained(loaded(place, of_base.repo_id, tmp_path), snapshot)
    assert torch.equal(logits_of(again), logits_of(model))
    assert not torch.equal(logits_of(again), logits_of(base))
    assert json.loads(open(f"{snapshot}/adapter_config.json").read())["base_model_name_or_path"] == of_base.repo_id
    with pytest.raises(ConfigError, match="push the adapter without `packed`"):
        pushed(place, model, packed=True, base_model=of_base.repo_id)


def test_masks_alone_are_pushed_as_they_are(place, tmp_path):
    (tmp_path / "masks").mkdir()
    described = {"adaptive_sparse_masks": 1, "base": {"name": "someone/base"}, "masks": {}}
    (tmp_path / "masks" / "masks.json").write_text(json.dumps(described))
    save_file({"a.bits": torch.zeros(3, dtype=torch.uint8)}, tmp_path / "masks" / "masks.safetensors")
    (found,) = pushed(place, tmp_path / "masks")
    snapshot = Path(place.api.snapshot_download(found.repo_id, cache_dir=tmp_path / "cache"))
    for name in ("masks.json", "masks.safetensors"):
        assert (snapshot / name).read_bytes() == (tmp_path / "masks" / name).read_bytes()
    card = ModelCard.load(snapshot / "README.md")
    assert (card.data.base_model, card.data.base_model_relation) == ("someone/base", "adapter")
    assert "This repository holds no weights" in card.text
    with pytest.raises(ConfigError, match="is a mask-only repository, which is neither packed nor dense-stored"):
        pushed(place, tmp_path / "masks", packed=False)


def test_an_unchanged_rerun_makes_no_commit(place, trained_run):
    (first,) = pushed(place, trained_run)
    (second,) = pushed(place, trained_run, first.repo_id)
    assert (second.commit, second.changed) == (first.commit, False)
    assert len(titles(place, first.repo_id)) == 2


def test_a_later_push_leaves_no_weights_of_an_earlier_one_and_keeps_the_rest(place, packed_folder, dense_folder):
    (first,) = pushed(place, dense_folder)
    place.api.create_commit(
        first.repo_id, [CommitOperationAdd("NOTICE.txt", b"mine")], commit_message="A file of my own"
    )
    (second,) = pushed(place, packed_folder, first.repo_id)
    files = place.api.list_repo_files(first.repo_id)
    assert "model.safetensors" not in files and "model.sparse24.safetensors" in files and "NOTICE.txt" in files
    # The old commit is still what it was.
    old = place.api.list_repo_files(first.repo_id, revision=first.commit)
    assert "model.safetensors" in old and "model.sparse24.safetensors" not in old
    assert second.commit != first.commit


def test_a_branch_is_made_and_main_stays_as_it_is(place, packed_folder, dense_folder, tmp_path):
    (first,) = pushed(place, dense_folder)
    (second,) = pushed(place, packed_folder, first.repo_id, revision="packed")
    assert second.revision == "packed"
    assert "model.safetensors" in place.api.list_repo_files(first.repo_id)
    assert "model.safetensors" not in place.api.list_repo_files(first.repo_id, revision="packed")
    assert isinstance(loaded(place, first.repo_id, tmp_path, revision="packed"), torch.nn.Module)


def test_a_pull_request_changes_no_branch(place, packed_folder, dense_folder):
    (first,) = pushed(place, dense_folder)
    (second,) = pushed(place, packed_folder, first.repo_id, create_pr=True, commit_message="Packed")
    assert second.revision == "refs/pr/1" and second.url.endswith(f"{first.repo_id}/discussions/1")
    assert place.api.model_info(first.repo_id).sha == first.commit
    assert titles(place, first.repo_id, "refs/pr/1")[0] == "Packed"
    with pytest.raises(ConfigError, match="^a pull request is made against main, got revision='x' and create_pr=True"):
        pushed(place, packed_folder, first.repo_id, create_pr=True, revision="x")
    with pytest.raises(ConfigError, match="there is no such repository to propose a change to"):
        pushed(place, packed_folder, create_pr=True)


def test_everybody_may_propose_a_change_and_only_the_owner_make_one(place, hub, packed_folder, dense_folder):
    (first,) = pushed(place, dense_folder)
    options = {"token": hub.token("bob"), "endpoint": hub.url}
    with pytest.raises(ConfigError) as refusal:
        push_to_hub(packed_folder, first.repo_id, **options)
    assert str(refusal.value) == (
        f"{first.repo_id}: your token may not write there (Forbidden: you don't have the rights to write in the "
        "namespace 'alice'). Take a token with the role `write`, and an OWNER that is you or one of your "
        "organisations; or propose the change with create_pr (--create-pr)."
    )
    (second,) = push_to_hub(packed_folder, first.repo_id, create_pr=True, **options)
    assert second.revision == "refs/pr/1"


def test_a_private_repository_is_not_there_for_others_and_never_becomes_public_unasked(place, hub, packed_folder):
    (found,) = pushed(place, packed_folder, private=True)
    assert place.api.model_info(found.repo_id).private
    for token in (hub.token("bob"), False):
        assert not HfApi(endpoint=hub.url, token=token).repo_exists(found.repo_id)
    pushed(place, packed_folder, found.repo_id)
    assert place.api.model_info(found.repo_id).private
    (public,) = pushed(place, packed_folder)
    with pytest.raises(ConfigError) as refusal:
        pushed(place, packed_folder, public.repo_id, private=True)
    assert str(refusal.value) == (
        f"{public.repo_id}: is public, and private was asked for. Change it in the settings of the repository, or "
        "leave `private` out."
    )


def test_the_card_of_the_folder_is_kept_if_asked_for(place, packed_folder, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(packed_folder)
    save_packed(model, tmp_path / "own")
    (tmp_path / "own" / "README.md").write_text("---\nlicense: mit\n---\nmine\n")
    (found,) = pushed(place, tmp_path / "own", card=False)
    path = place.api.hf_hub_download(found.repo_id, "README.md", cache_dir=tmp_path / "cache")
    assert open(path).read().endswith("mine\n")


def test_an_access_token_in_a_file_is_not_published(place, packed_folder, tmp_path):
    save_dense(two_four_model(), tmp_path / "model")
    (tmp_path / "model" / "notes.txt").write_text(f"export HF_TOKEN={place.token}")
    repo = place.new()
    with pytest.raises(ConfigError) as refusal:
        pushed(place, tmp_path / "model", repo)
    assert str(refusal.value).startswith("notes.txt: holds an access token of a Hub, and would be published.")
    assert place.token not in str(refusal.value)
    assert not place.api.repo_exists(repo)


def test_pickles_and_leftovers_of_training_stay_at_home(place, tmp_path):
    save_dense(two_four_model(), tmp_path / "model")
    beside = "optimizer.pt", "training_args.bin", "trainer_state.json", ".hidden", "checkpoint-3/model.safetensors"
    for name in beside:
        (tmp_path / "model" / name).parent.mkdir(exist_ok=True)
        (tmp_path / "model" / name).write_bytes(b"x")
    (found,) = pushed(place, tmp_path / "model")
    assert set(place.api.list_repo_files(found.repo_id)) == {
        ".gitattributes", "README.md", "config.json", "generation_config.json", "model.safetensors",
    }  # fmt: skip


def test_plain_save_of_a_packed_model_writes_no_unguarded_folder(packed_folder, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(packed_folder)
    with pytest.raises(OutputError, match=r"or push_to_hub\(model, repo_id\) of hf_adaptive_sparse"):
        model.save_pretrained(tmp_path / "plain")
    assert not any((tmp_path / "plain").glob("*"))


def test_what_is_no_model_is_refused_before_the_hub_is_asked(place, tmp_path, packed_folder):
    wrong = {
        "model": "REPO 'model' has no owner: write OWNER/model, where OWNER is your user name on the Hub or an "
        "organisation of yours. `hf auth whoami` prints your name.",
        "a/b c": "REPO 'a/b c' is no repository: write OWNER/NAME, with letters, digits, -, _ and . only.",
    }
    for repo, message in wrong.items():
        with pytest.raises(ConfigError) as refusal:
            pushed(place, packed_folder, repo)
        assert str(refusal.value) == message
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match="the folder holds no model: neither config.json nor adapter_config.json"):
        pushed(place, tmp_path / "empty")
    with pytest.raises(ConfigError, match="there is no such folder"):
        pushed(place, tmp_path / "absent")
    with pytest.raises(ConfigError, match="can be pushed; got a int"):
        pushed(place, 3)
    (tmp_path / "empty" / "config.json").write_text("{}")
    with pytest.raises(ConfigError, match="is dense, but holds no weights"):
        pushed(place, tmp_path / "empty")
    if place.hub is not None:
        assert place.hub.requests == []


def test_a_packed_folder_with_default_weights_beside_it_is_refused(place, tmp_path):
    save_packed(two_four_model(), tmp_path / "both")
    (tmp_path / "both" / "model.safetensors").write_bytes(b"x")
    with pytest.raises(ConfigError, match="holds model.safetensors beside packed weights"):
        pushed(place, tmp_path / "both")


def test_without_a_token_it_says_how_to_get_one(place, packed_folder, monkeypatch):
    monkeypatch.setattr("hf_adaptive_sparse.hub.push.get_token", lambda: None)
    with pytest.raises(ConfigError) as refusal:
        push_to_hub(packed_folder, place.new(), endpoint=place.url)
    assert str(refusal.value) == (
        "no token: a push needs one with the role `write`. Make it in the settings of the Hub (Access Tokens), then "
        "run `hf auth login`, or set HF_TOKEN."
    )
