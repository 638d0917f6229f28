"""The model card says what is known and nothing else, for every kind of folder and every way to make one."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import yaml
from huggingface_hub import HfApi, ModelCard, parse_eval_result_entries
from hypothesis import given
from hypothesis import strategies as st

from hf_adaptive_sparse import ConfigError, FormatError, save_dense, save_packed
from hf_adaptive_sparse.cli.main import main
from hf_adaptive_sparse.hub.card import plot_files, protocol, render_card
from hf_adaptive_sparse.hub.facts import gather
from hf_adaptive_sparse.hub.kinds import KINDS, kind_of
from hf_adaptive_sparse.hub.metadata import eval_results_file
from hf_adaptive_sparse.hub.parents import Parent, find_parent
from hf_adaptive_sparse.hub.privacy import refuse_tokens, without_paths
from hf_adaptive_sparse.reports import Report
from tests.cli.runs import PRUNE
from tests.hf.two_four_models import quantize, two_four_model
from tests.hub_server.metadata import complaints, wrong_eval_results
from tests.tiny_models import tiny_model

MIT = Parent(name="someone/base", hub_id="someone/base", license={"license": "mit"}, said="Copied from the card.")
OFFLINE = HfApi()


def card_of(folder: Path, parent: Parent = MIT, repo: str = "me/model", **options) -> tuple[dict, str]:
    """(metadata, text) of a folder's card, after the checks that a Hub makes."""
    kind = kind_of(folder)
    card = render_card(gather(folder, kind, options.pop("report", None)), parent, repo, **options)
    assert complaints(card) == ([], [])
    assert "None" not in card and "{" not in card.partition("```python")[2].partition("```")[0]
    assert not re.search(r"\n\n\n", card)
    return ModelCard(card).data.to_dict(), card


@pytest.fixture(scope="module")
def pruned_run(tiny_llama_folder, tiny_text_file, tmp_path_factory):
    """What `prune` writes, with quantised values and sparsity that differs between the matrices."""
    output = tmp_path_factory.mktemp("prune") / "out"
    where = ["--data", str(tiny_text_file), "--output-dir", str(output)]
    assert main(["prune", str(tiny_llama_folder), *where, *PRUNE, "--bits", "8", "--method", "sparsegpt"]) == 0
    return output


def test_the_card_of_a_trained_model_says_how_it_was_made_and_what_was_measured(trained_run):
    data, card = card_of(trained_run / "packed")
    assert data["base_model"] == "someone/base" and data["base_model_relation"] == "quantized"
    assert data["license"] == "mit" and data["library_name"] == "transformers"
    assert {"hf_adaptive_sparse", "pruning", "weight-sparsity", "2:4", "packed"} <= set(data["tags"])
    report = json.loads((trained_run / "report.json").read_text())
    rows = report["models"]
    (result,) = data["model-index"]
    values = {metric["type"]: metric["value"] for metric in result["results"][0]["metrics"]}
    assert values["perplexity"] == pytest.approx(rows[-1]["perplexity"], abs=1e-5)
    assert values["bits_per_byte"] == pytest.approx(rows[-1]["bits_per_byte"], abs=1e-5)
    for row in rows:
        assert f"| {row['name']} |" in card
    assert report["data"]["training text sha256"] in card
    for name in ("mask_interval", "decay", "temperature", "learning_rate", "seed"):
        assert f"| `{name}` | {report['settings'][name]} |" in card
    assert "1,280 tokens" in card and "arXiv 2407.20584" in card
    packed = sum(matrix["stored_bytes"] for matrix in report["matrices"])
    assert f"| of these, packed matrices | {packed:,} | 0.5312 of their dense" in card
    assert "import hf_adaptive_sparse  # before from_pretrained" in card and "plots/masks.png" in card
    assert set(plot_files(gather(trained_run / "packed", KINDS["packed"]))) == {"plots/masks.png"}


def test_no_path_of_the_machine_is_in_a_card(trained_run, tiny_text_file, tmp_path):
    report = json.loads((trained_run / "report.json").read_text())
    report["command"] = f"hf-adaptive-sparse train {tmp_path}/gone/base --data {tiny_text_file}"
    (tmp_path / "report.json").write_text(json.dumps(report))
    for name in ("packed", "dense"):
        _, card = card_of(trained_run / name, report=tmp_path / "report.json")
        assert str(tmp_path.parent) not in card and str(tiny_text_file.parent) not in card
        assert f"`hf-adaptive-sparse train base --data {tiny_text_file.name}`" in card


def test_the_dense_form_needs_no_package_and_is_a_finetune(trained_run):
    data, card = card_of(trained_run / "dense")
    assert data["base_model_relation"] == "finetune"
    assert "import hf_adaptive_sparse" not in card and "pip install transformers" in card
    assert "packed" not in data["tags"] and "2:4" in data["tags"]


def test_a_pruned_model_names_its_method_and_its_bits(pruned_run):
    data, card = card_of(pruned_run / "packed")
    assert "pruned in one shot to 2:4 by the method `sparsegpt`, without training" in card
    assert "and the kept values rounded to 8 bits" in card
    assert "int8" in data["tags"] and "arXiv 2301.00774" in card and "8 bits each" in card
    assert "plots/errors.png" in card and "tokens trained" not in card
    assert {"plots/errors.png"} == set(plot_files(gather(pruned_run / "packed", KINDS["packed"])))


def test_a_shrunk_model_has_words_of_its_own(tiny_llama_folder, tiny_text_file, tmp_path):
    where = ["--data", str(tiny_text_file), "--output-dir", str(tmp_path / "out"), "--target", "0.8"]
    small = [*PRUNE[:4], "--calibration-windows", "8", "--eval-windows", "8", "--device", "cpu", "--train-tokens", "0"]
    assert main(["shrink", str(tiny_llama_folder), *where, *small]) == 0
    data, card = card_of(tmp_path / "out" / "shrunk")
    assert "structured-pruning" in data["tags"] and "weight-sparsity" not in data["tags"]
    assert re.search(r"made smaller from [\d,]+ to [\d,]+ parameters", card) and "plots/widths.png" in card
    assert "zeros" not in card.partition("## Size")[0] and "arXiv 2502.03460" in card
    stock = "shrunk_" not in (tmp_path / "out" / "shrunk" / "config.json").read_text()
    assert ("import hf_adaptive_sparse" in card) != stock


def test_what_is_not_known_is_left_out(tmp_path):
    model = two_four_model()
    save_packed(model, tmp_path / "model")
    data, card = card_of(tmp_path / "model", Parent(said="Not known: nobody said."))
    assert "base_model" not in data and "model-index" not in data and data["license"] == "unknown"
    for heading in ("## Results", "## How it was made", "![", "Perplexity"):
        assert heading not in card
    assert "A language model, made sparse; how is not recorded." in card and "Not known: nobody said." in card
    assert "AutoTokenizer" not in card
    save_dense(tiny_model(), tmp_path / "plain")
    data, card = card_of(tmp_path / "plain")
    assert "2:4" not in data["tags"] and "weight-sparsity" not in data["tags"] and "sparse:" not in card


def test_the_provenance_in_config_json_is_used_where_there_is_no_report(tmp_path):
    about = {"one_shot": {"method": "ria", "pattern": "2:4", "sparsity": 0.5}}
    save_packed(two_four_model(), tmp_path / "model", quantized=None, provenance=about)
    _, card = card_of(tmp_path / "model")
    assert "pruned in one shot to 2:4 by the method `ria`, without training" in card


def test_quantised_values_are_counted_with_their_scales(tmp_path):
    model = two_four_model()
    save_packed(model, tmp_path / "model", quantized=quantize(model, 4))
    data, card = card_of(tmp_path / "model")
    assert "int4" in data["tags"] and "are stored with 4 bits each" in card


def test_the_report_of_the_run_can_be_named_and_a_damaged_one_is_refused(trained_run, packed_folder, tmp_path):
    _, card = card_of(packed_folder, report=trained_run / "report.json")
    assert "1,280 tokens" in card
    bad = tmp_path / "report.json"
    for text, message in (
        ("[]", f"{bad}: report: report_version is 'list', this hf_adaptive_sparse reads 1."),
        ('{"report_version": 99}', f"{bad}: report: report_version is 99, this hf_adaptive_sparse reads 1."),
        ("{", f"{bad}: is not JSON ("),
    ):
        bad.write_text(text)
        with pytest.raises(FormatError) as refusal:
            card_of(packed_folder, report=bad)
        assert str(refusal.value).startswith(message)


def test_results_on_a_dataset_of_the_hub_are_a_file_of_eval_results(trained_run, tmp_path):
    report = json.loads((trained_run / "report.json").read_text())
    report["settings"] |= {"data": "someone/text", "eval_data": "someone/judge:small"}
    report["data"] |= {"evaluation text": "someone/judge:small", "evaluation text sha256": "ab" * 32}
    (tmp_path / "report.json").write_text(json.dumps(report))
    facts = gather(trained_run / "packed", KINDS["packed"], tmp_path / "report.json")
    text = eval_results_file(facts, protocol(facts.report)).decode()
    assert wrong_eval_results("x", text) == []
    (entry,) = parse_eval_result_entries(yaml.safe_load(text))
    assert (entry.dataset_id, entry.task_id) == ("someone/judge", "perplexity")
    assert entry.notes == f"8 windows of 16 tokens of someone/judge:small (sha256 of the text `{'ab' * 8}...`)"
    data, _ = card_of(trained_run / "packed", report=tmp_path / "report.json")
    assert data["datasets"] == ["someone/text"]
    assert data["model-index"][0]["results"][0]["dataset"]["type"] == "someone/judge"
    # Local text has no place there.
    assert eval_results_file(gather(trained_run / "packed", KINDS["packed"]), "") is None


def test_the_licence_is_that_of_the_parents_card(trained_run, tmp_path, monkeypatch):
    made_of = gather(trained_run / "packed", KINDS["packed"]).made_of
    found = find_parent(made_of, None, None, OFFLINE)
    assert found.license == {"license": "mit"} and found.hub_id is None
    assert found.said == "Copied from the card of tiny-llama."
    (tmp_path / "base").mkdir()
    for text, said in (
        (None, "the folder of the base model has no card (README.md)"),
        ("---\ntags: [a]\n---\n", "the card of the base model names no licence"),
        ("---\nlicense: [mit, zlib]\n---\n", ""),
        ("---\nlicense: other\nlicense_name: own\nlicense_link: https://a.b/c\n---\n", ""),
    ):
        if text is not None:
            (tmp_path / "base" / "README.md").write_text(text)
        found = find_parent(str(tmp_path / "base"), None, None, OFFLINE)
        assert (found.license == {}) == bool(said) and said in found.said
    assert found.license == {"license": "other", "license_name": "own", "license_link": "https://a.b/c"}
    _, card = card_of(trained_run / "dense", found)
    assert "[own](https://a.b/c). Copied from the card of base." in card
    gone = find_parent(str(tmp_path / "gone" / "base"), None, None, OFFLINE)
    assert gone.name == "base" and "was a local folder that is not there any more" in gone.said
    assert find_parent(None, None, "mit", OFFLINE).license == {"license": "mit"}
    with pytest.raises(ConfigError, match="base_model is the Hub id OWNER/NAME of the dense model, got 'x'"):
        find_parent(None, "x", None, OFFLINE)


def test_the_licence_of_a_parent_on_a_hub_is_read_there(place, tmp_path, naps):
    repo = place.new("base")
    place.api.create_repo(repo)
    from huggingface_hub import CommitOperationAdd

    head = b"---\nlicense: other\nlicense_name: own\n---\n"
    place.api.create_commit(repo, [CommitOperationAdd("README.md", head)], commit_message="card")
    found = find_parent(repo, None, None, place.api)
    assert found.license == {"license": "other", "license_name": "own"} and found.hub_id == repo
    missing = find_parent(f"{repo}-absent", None, None, place.api)
    assert missing.license == {} and missing.said == (
        f"Not known: the card of {repo}-absent could not be read (HTTP 404). The licence of the base model holds; ask "
        "whoever published this before use."
    )
    nowhere = find_parent(repo, None, None, HfApi(endpoint="http://127.0.0.1:9", token=False))
    assert f"the card of {repo} could not be read (ConnectError)" in nowhere.said


def test_a_base_model_in_the_cache_of_a_hub_is_known_by_its_id(tmp_path):
    folder = tmp_path / "models--someone--base" / "snapshots" / ("a" * 40)
    folder.mkdir(parents=True)
    (folder / "README.md").write_text("---\nlicense: mit\n---\n")
    found = find_parent(str(folder), None, None, OFFLINE)
    assert (found.hub_id, found.license) == ("someone/base", {"license": "mit"})


@pytest.mark.parametrize(
    "text, kept",
    [
        ("Saved in /a/b/dense and /a/b/packed; loaded", "Saved in dense and packed; loaded"),
        ("train '/a/my name/b' --data '~/my texts/z.txt'", "train 'b' --data 'z.txt'"),
        ("train ~/models/x --data ../y/z.txt", "train x --data z.txt"),
        (r"C:\Users\me\model here", "model here"),
        ("https://a.b/c/d and someone/model, 1/2 and/or", "https://a.b/c/d and someone/model, 1/2 and/or"),
        ("hf-adaptive-sparse train someone/model", "hf-adaptive-sparse train someone/model"),
    ],
)
def test_paths_are_cut_down_to_their_names_and_other_slashes_stay(text, kept):
    assert without_paths({"a": [text]}) == {"a": [kept]}


def test_a_path_with_spaces_that_is_there_is_cut_down_too(tmp_path):
    (tmp_path / "my name").mkdir()
    (tmp_path / "my name" / "text.txt").touch()
    assert without_paths(str(tmp_path / "my name" / "text.txt")) == "text.txt"


names = st.text("aZ09_.-", min_size=1, max_size=8).filter(lambda name: name.strip("."))


@given(st.lists(names, min_size=2, max_size=5))
def test_of_any_absolute_path_only_the_last_name_is_left(parts):
    found = without_paths("see /" + "/".join(parts))
    assert found == f"see {parts[-1]}"


def test_tokens_are_found_in_text_and_in_what_was_rendered(tmp_path):
    secret = "hf_" + "A1" * 17
    file = tmp_path / "notes.md"
    file.write_text(f"token={secret}")
    for files in ({"notes.md": file}, {"README.md": f"x {secret} y".encode()}):
        for token in (secret, None):
            with pytest.raises(ConfigError, match="holds an access token of a Hub") as refusal:
                refuse_tokens(files, token)
            assert secret not in str(refusal.value)
    with pytest.raises(ConfigError, match="holds an access token of a Hub"):
        refuse_tokens({"a.md": b"my own-hub-token"}, "own-hub-token")
    refuse_tokens({"a.md": b"hf_adaptive_sparse", "b.json": b"hf_" + b"x" * 12}, secret)


def test_a_report_without_a_protocol_gives_no_sentence_about_it():
    assert protocol(None) == protocol(Report(title="x")) == ""


def test_every_kind_is_told_apart_from_its_files(tmp_path):
    files = {
        "masks": {"masks.json": "{}", "masks.safetensors": "x", "config.json": "{}"},
        "adapter": {"adapter_config.json": "{}", "adapter_model.safetensors": "x"},
        "packed": {"config.json": '{"quantization_config": {"quant_method": "adaptive_sparse"}}'},
        "shrunk": {"config.json": '{"model_type": "shrunk_llama"}'},
        "dense": {"config.json": "{}"},
    }
    assert set(files) == set(KINDS)
    for name, content in files.items():
        (tmp_path / name).mkdir()
        for file, text in content.items():
            (tmp_path / name / file).write_text(text)
        assert kind_of(tmp_path / name) is KINDS[name]
    assert kind_of(tmp_path) is None
