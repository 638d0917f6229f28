import hashlib
import json
import re
import warnings

import datasets
import pyarrow
import pyarrow.parquet
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import default_data_collator

from hf_adaptive_sparse.errors import DataError
from hf_adaptive_sparse.hf.data import (
    EvalProtocol,
    WindowDataset,
    data_digest,
    encode_open,
    eval_protocol,
    load_documents,
    split_windows,
    token_windows,
)
from tests.reference import perplexity as reference

texts = st.lists(st.text(st.characters(codec="utf-8"), max_size=30), max_size=12)


def message(error, function, *arguments, **settings):
    with pytest.raises(error) as caught:
        function(*arguments, **settings)
    return str(caught.value)


# Documents of local files


def test_a_txt_is_split_on_separator_lines_only_and_stripped(tmp_path):
    file = tmp_path / "a.txt"
    file.write_bytes("\ufeff one\n\ntwo \r\n<|endoftext|>\r\n\n<|endoftext|>\nthree <|endoftext|> x\n".encode())
    documents = load_documents(file)
    assert documents.column_names == ["text"]
    assert documents["text"][:] == ["one\n\ntwo", "three <|endoftext|> x"]


def test_a_txt_without_a_separator_is_one_document(tmp_path):
    file = tmp_path / "a.txt"
    file.write_text("one\n\n\ntwo\n", encoding="utf-8")
    assert load_documents(str(file))["text"][:] == ["one\n\n\ntwo"]


@settings(max_examples=25)
@given(documents=texts.filter(any))
def test_the_three_formats_hold_the_same_documents(tmp_path_factory, documents):
    folder = tmp_path_factory.mktemp("formats")
    documents = [stripped for text in documents if (stripped := text.replace("\r", "").strip())] or ["a"]
    separated = "\n<|endoftext|>\n".join(documents)
    (folder / "a.txt").write_bytes(separated.encode())
    (folder / "a.jsonl").write_text(
        "\n".join(json.dumps({"text": text}, ensure_ascii=False) for text in documents),
        encoding="utf-8",
        newline="\n",
    )
    pyarrow.parquet.write_table(pyarrow.table({"text": documents}), folder / "a.parquet")
    for extension in ("txt", "jsonl", "parquet"):
        assert load_documents(folder / f"a.{extension}")["text"][:] == documents


def test_a_named_column_is_the_text(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"story": "one", "text": 3}\n\n{"story": "two"}\n', encoding="utf-8")
    pyarrow.parquet.write_table(pyarrow.table({"n": [1, 2], "story": ["one", "two"]}), tmp_path / "a.parquet")
    for file in ("a.jsonl", "a.parquet"):
        documents = load_documents(tmp_path / file, column="story")
        assert documents.column_names == ["text"]
        assert documents["text"][:] == ["one", "two"]


def test_a_folder_is_read_in_the_order_of_names_without_hidden_and_foreign_files(tmp_path):
    (tmp_path / "b.txt").write_text("second", encoding="utf-8")
    (tmp_path / "a.jsonl").write_text('{"text": "first"}', encoding="utf-8")
    (tmp_path / "c").mkdir()
    (tmp_path / "c" / "a.txt").write_text("third", encoding="utf-8")
    (tmp_path / ".cache").mkdir()
    (tmp_path / ".cache" / "a.txt").write_text("hidden", encoding="utf-8")
    (tmp_path / "notes.md").write_text("no data", encoding="utf-8")
    assert load_documents(tmp_path)["text"][:] == ["first", "second", "third"]


def test_validation_files_of_a_folder_are_not_in_its_training_split(tmp_path):
    for name in ("train-0.txt", "train-1.txt", "valid.txt", "extra.txt"):
        (tmp_path / name).write_text(name, encoding="utf-8")
    assert load_documents(tmp_path)["text"][:] == ["train-0.txt", "train-1.txt"]
    assert load_documents(tmp_path, split="validation")["text"][:] == ["valid.txt"]
    assert message(DataError, load_documents, tmp_path, split="test") == (
        f"{tmp_path}: the folder has no split 'test'; it has train, validation."
    )
    assert data_digest(tmp_path) != data_digest(tmp_path, split="validation")


def test_a_folder_that_names_no_splits_is_all_training_text(tmp_path):
    (tmp_path / "a.txt").write_text("one", encoding="utf-8")
    assert message(DataError, load_documents, tmp_path, split="validation") == (
        f"{tmp_path}: the folder has no split 'validation'; it has train."
    )


# What can be wrong with them


def test_a_missing_path_names_its_nearest_siblings(tmp_path):
    for name in ("valid.txt", "train.txt", "readme.md", "zzzzzz"):
        (tmp_path / name).touch()
    wrong = tmp_path / "trian.txt"
    assert message(DataError, load_documents, wrong) == (
        f"{wrong}: no such file or folder; nearest names in {tmp_path}: train.txt, valid.txt, readme.md."
    )
    wrong = tmp_path / "trainn.txt" / "deeper" / "a.txt"
    assert message(DataError, data_digest, wrong) == (
        f"{wrong}: no such file or folder; nearest names in {tmp_path}: train.txt, valid.txt, readme.md."
    )
    empty = tmp_path / "empty"
    empty.mkdir()
    assert message(DataError, load_documents, empty / "a") == (
        f"{empty / 'a'}: no such file or folder; nothing is in {empty}."
    )


@pytest.mark.parametrize("spec", ["nothing.txt", "./nothing", "a/b/c", "~/no such folder", "folder/nothing"])
def test_what_cannot_be_a_hub_id_is_a_path(spec, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: pytest.fail("asked the Hub"))
    (tmp_path / "folder").mkdir()
    assert " no such file or folder; " in message(DataError, load_documents, spec)


def test_an_unknown_extension_names_the_known_ones(tmp_path):
    file = tmp_path / "a.csv"
    file.write_text("text\none\n", encoding="utf-8")
    expected = (
        f"{file}: unknown extension '.csv'; known: .txt, .jsonl, .parquet. "
        "Convert the file, or rename it if only its name is wrong."
    )
    assert message(DataError, load_documents, file) == expected
    assert message(DataError, data_digest, file) == expected


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.parquet"])
def test_an_empty_file_is_refused(tmp_path, name):
    (tmp_path / name).touch()
    assert message(DataError, load_documents, tmp_path / name) == f"{tmp_path / name}: the file is empty (0 bytes)."


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.txt", " \n\n"),
        ("b.txt", "<|endoftext|>\n<|endoftext|>\n"),
        ("a.jsonl", "\n"),
        ("b.jsonl", '{"text": " "}'),
    ],
)
def test_a_file_of_blanks_is_refused(tmp_path, name, content):
    (tmp_path / name).write_text(content, encoding="utf-8")
    assert message(DataError, load_documents, tmp_path / name) == (
        f"{tmp_path / name}: the file holds no text, only blanks."
    )


def test_a_folder_without_data_is_refused(tmp_path):
    (tmp_path / "a.csv").touch()
    assert message(DataError, load_documents, tmp_path) == (
        f"{tmp_path}: the folder holds no data files; looked for .txt, .jsonl, .parquet."
    )


def test_a_column_of_a_txt_is_refused(tmp_path):
    file = tmp_path / "a.txt"
    file.write_text("one", encoding="utf-8")
    assert message(DataError, load_documents, file, column="text") == (
        f"{file}: a .txt file has no columns, got column='text'. Leave column out."
    )


def test_a_single_file_is_taken_whole_whatever_the_split(tmp_path):
    file = tmp_path / "train.txt"
    file.write_text("one", encoding="utf-8")
    assert load_documents(file, split="validation")["text"][:] == ["one"]
    assert data_digest(file, split="validation") == data_digest(file)


def test_bytes_that_are_no_utf_8_are_named(tmp_path):
    file = tmp_path / "a.txt"
    file.write_bytes(b"abc\xff")
    assert message(DataError, load_documents, file) == (
        f"{file}: not UTF-8 at byte 3: invalid start byte. Convert the file."
    )


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ('{"text": "one"', "is not JSON: Expecting ',' delimiter at column 15."),
        ('["one"]', "is a JSON list, not an object."),
        ("null", "is a JSON null, not an object."),
        ("{}", "has no column 'text'; it has none. Name the text's column as `column`."),
        (
            '{"n": 1, "story": ""}',
            "has no column 'text'; it has n, story. Name the text's column as `column`.",
        ),
        ('{"text": 3}', "has a number in 'text', not text."),
        ('{"text": null}', "has a null in 'text', not text."),
    ],
)
def test_a_bad_json_line_is_named_by_its_number(tmp_path, line, reason):
    file = tmp_path / "a.jsonl"
    file.write_text(f'{{"text": "one \u2028"}}\n\n{line}\n', encoding="utf-8")
    assert message(DataError, load_documents, file) == f"{file}: line 3 {reason}"


def test_a_parquet_without_text_is_refused(tmp_path):
    file = tmp_path / "a.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"n": [1, 2], "story": ["one", None]}), file)
    assert message(DataError, load_documents, file) == (
        f"{file} has no column 'text'; it has n, story. Name the text's column as `column`."
    )
    assert message(DataError, load_documents, file, column="n") == f"{file}: the column 'n' holds int64, not text."
    assert message(DataError, load_documents, file, column="story") == (
        f"{file}: row 1 has nothing (null) in 'story', not text."
    )


def test_a_damaged_parquet_is_refused(tmp_path):
    file = tmp_path / "a.parquet"
    file.write_bytes(b"PAR1 and nothing of the kind")
    assert re.fullmatch(
        rf"{re.escape(str(file))}: cannot be read as parquet: Parquet magic bytes not found in footer\..*",
        message(DataError, load_documents, file),
    )


# Datasets of the Hub


def test_a_hub_id_is_loaded_with_its_configuration_and_split(monkeypatch):
    asked = []

    def load_dataset(*arguments, **settings):
        asked.append((arguments, settings))
        return datasets.Dataset.from_dict({"id": [1, 2], "story": ["one", "two"]})

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    documents = load_documents("owner/name:config", split="test[:2]", column="story")
    assert documents.column_names == ["text"]
    assert documents["text"][:] == ["one", "two"]
    assert asked == [(("owner/name", "config"), {"split": "test[:2]"})]
    assert message(DataError, load_documents, "owner/name") == (
        "owner/name has no column 'text'; it has id, story. Name the text's column as `column`."
    )
    assert asked[1:] == [(("owner/name", None), {"split": "train"})]
    assert data_digest("owner/name", column="story") == hashlib.sha256(b"3 one3 two").hexdigest()


def test_a_hub_id_that_cannot_be_had_says_why():
    assert message(DataError, load_documents, "nobody/nothing") == (
        "nobody/nothing: no such local file or folder, and the Hub gave none: "
        "Couldn't reach 'nobody/nothing' on the Hub (OfflineModeIsEnabled)"
    )


# Digests


def test_the_digest_of_a_file_is_its_sha256(tmp_path):
    file = tmp_path / "a.txt"
    file.write_bytes(b"one\n" * 1_000_000)
    assert data_digest(file) == hashlib.sha256(b"one\n" * 1_000_000).hexdigest()


def test_the_digest_of_a_folder_follows_names_and_contents(tmp_path):
    (tmp_path / "a.txt").write_text("one", encoding="utf-8")
    (tmp_path / "b.txt").write_text("two", encoding="utf-8")
    one, two = (hashlib.sha256(text).hexdigest() for text in (b"one", b"two"))
    before = data_digest(tmp_path)
    assert before == hashlib.sha256(f"{one}  a.txt\n{two}  b.txt\n".encode()).hexdigest()
    (tmp_path / "b.txt").rename(tmp_path / "c.txt")
    assert data_digest(tmp_path) != before


# Windows


@settings(max_examples=60)
@given(documents=texts, length=st.integers(2, 20), affixes=st.sampled_from([("", ""), ("", "</s>"), ("\n", "!")]))
def test_windows_are_the_stream_of_all_documents_without_its_tail(tiny_tokenizer, documents, length, affixes):
    expected, tail = reference.windows(documents, tiny_tokenizer, length, *affixes)
    if not expected:
        assert message(DataError, token_windows, documents, tiny_tokenizer, length, *affixes) == (
            f"the text holds {len(tail)} tokens, fewer than one window of {length}. "
            "Give more text, or a shorter window."
        )
        return
    windows = token_windows(documents, tiny_tokenizer, length, *affixes)
    assert windows.tokens.tolist() == expected
    assert len(tail) < length
    size = sum(len(document.strip().encode()) for document in documents)
    assert windows.tokens_per_byte == (len(expected) * length + len(tail)) / size


@settings(max_examples=30)
@given(documents=texts.filter(lambda texts: len("".join(texts)) > 40), limit=st.integers(1, 6))
def test_a_limit_keeps_the_first_windows(tiny_tokenizer, documents, limit):
    everything = token_windows(documents, tiny_tokenizer, 4)
    some = token_windows(documents, tiny_tokenizer, 4, limit=limit)
    assert torch.equal(some.tokens, everything.tokens[:limit])


def test_a_limit_leaves_the_rest_of_the_text_unread(tiny_tokenizer):
    def endless():
        while True:
            yield "one two three"

    assert len(token_windows(endless(), tiny_tokenizer, 16, limit=50)) == 50


def test_a_dataset_and_a_list_give_the_same_windows_over_several_batches(tiny_tokenizer):
    documents = [f"story {number}" for number in range(2500)]
    dataset = datasets.Dataset.from_dict({"text": documents, "other": documents})
    windows = token_windows(dataset, tiny_tokenizer, 32)
    assert torch.equal(windows.tokens, token_windows(documents, tiny_tokenizer, 32).tokens)
    assert windows.tokens.tolist() == reference.windows(documents, tiny_tokenizer, 32)[0]
    most = len(windows) - 1
    some = token_windows(dataset, tiny_tokenizer, 32, limit=most)
    assert torch.equal(some.tokens, windows.tokens[:most])


def test_ids_beyond_16_bits_survive():
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.WordLevel({f"w{index}": index for index in range(70_000)}, unk_token="w0"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="w0")
    windows = token_windows(["w65535 w65536 w69999 w1"], tokenizer, 2)
    assert windows.tokens.tolist() == [[65535, 65536], [69999, 1]]
    assert windows[1]["input_ids"].dtype == torch.int64


def test_documents_longer_than_the_model_context_give_no_warning(tiny_tokenizer, caplog):
    tiny_tokenizer.model_max_length, before = 8, tiny_tokenizer.model_max_length
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            token_windows(["a" * 100], tiny_tokenizer, 4)
    finally:
        tiny_tokenizer.model_max_length = before
    assert not caught
    assert not caplog.records


@pytest.mark.parametrize(
    ("documents", "settings", "expected"),
    [
        (["a"], {"length": 1}, "a window needs 2 tokens or more, to predict one from another; got length=1."),
        (["a"], {"limit": 0}, "limit is a number of windows, at least 1; got 0. To keep all, leave it out."),
        ("a text", {}, "documents must be several texts, got one string. Put it in a list."),
        (["a", None], {}, "document 1 is of type NoneType, not text."),
        (
            datasets.Dataset.from_dict({"a": ["x"], "b": [1]}),
            {},
            "the dataset has no column 'text'; it has a, b. Name the text's column as `column`.",
        ),
    ],
)
def test_windows_refuse_what_they_cannot_cut(tiny_tokenizer, documents, settings, expected):
    assert message(DataError, token_windows, documents, tiny_tokenizer, **settings) == expected


def test_windows_feed_a_trainer(tiny_tokenizer):
    windows = token_windows(["one two three four"], tiny_tokenizer, 8)
    batch = default_data_collator([windows[0], windows[1]])
    assert set(batch) == {"input_ids", "labels"}
    assert torch.equal(batch["input_ids"], windows.tokens.long())
    assert torch.equal(batch["labels"], windows.tokens.long())
    assert (len(windows), windows.length) == (2, 8)
    assert repr(windows) == "WindowDataset(2 windows of 8 tokens)"


@given(total=st.integers(2, 40), data=st.data())
def test_a_split_keeps_every_window_once_and_in_order(total, data):
    windows = WindowDataset(torch.arange(total * 3, dtype=torch.int32).view(total, 3), 0.5)
    held_out = data.draw(st.integers(1, total - 1) | st.floats(0.01, (total - 1) / total))
    train, selection = split_windows(windows, held_out)
    assert torch.equal(torch.cat([train.tokens, selection.tokens]), windows.tokens)
    assert len(train) > 0
    if isinstance(held_out, int):
        assert len(selection) == held_out
    else:
        assert held_out * total <= len(selection) < held_out * total + 1
    assert (train.tokens_per_byte, selection.tokens_per_byte) == (0.5, 0.5)


@pytest.mark.parametrize("held_out", [0, 10, 11, -1, 0.0, 1.0, 0.95])
def test_a_split_with_an_empty_part_is_refused(held_out):
    windows = WindowDataset(torch.zeros(10, 4, dtype=torch.int32))
    assert message(DataError, split_windows, windows, held_out) == (
        f"cannot hold out {held_out} of 10 windows: each part needs at least one. "
        "Give more text, shorter windows, or hold out fewer."
    )


def test_a_text_to_continue_has_no_end_token(tiny_tokenizer):
    from tokenizers import processors

    assert encode_open(tiny_tokenizer, "a</s>")[0] == tiny_tokenizer.bos_token_id
    backend, before = tiny_tokenizer.backend_tokenizer, tiny_tokenizer.backend_tokenizer.post_processor
    plain = encode_open(tiny_tokenizer, "ab")
    try:
        backend.post_processor = processors.TemplateProcessing(
            single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 1)]
        )
        assert tiny_tokenizer("ab")["input_ids"] == [*plain, tiny_tokenizer.eos_token_id]
        assert encode_open(tiny_tokenizer, "ab") == plain
    finally:
        backend.post_processor = before


# The protocol of a model folder


def test_a_folder_without_a_protocol_has_the_default_one(tmp_path):
    assert eval_protocol(tmp_path) == EvalProtocol(prefix="", suffix="", window=256, stride=256, windows=400)
    assert eval_protocol("owner/name") == EvalProtocol()


def test_a_protocol_is_read(tmp_path):
    content = {"prefix": "a", "suffix": "b", "window": 64, "stride": 32, "windows": 5, "max_context": 512}
    content |= {"document_separator": "<|endoftext|>", "strip_documents": True, "add_special_tokens": True}
    (tmp_path / "eval_protocol.json").write_text(json.dumps(content), encoding="utf-8")
    assert eval_protocol(tmp_path) == EvalProtocol("a", "b", 64, 32, 5)


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("{", "not JSON: Expecting property name enclosed in double quotes: line 1 column 2 (char 1)."),
        ("[]", "not a JSON object."),
        ('{"document_separator": "\\n"}', "document_separator must be '<|endoftext|>', got '\\n'."),
        ('{"add_special_tokens": false}', "add_special_tokens must be True, got False."),
        ('{"strip_documents": false}', "strip_documents must be True, got False."),
        ('{"window": "256"}', "window must be a positive whole number, got '256'."),
        ('{"stride": true}', "stride must be a positive whole number, got True."),
        ('{"windows": 0}', "windows must be a positive whole number, got 0."),
        ('{"prefix": null}', "prefix must be text, got None."),
    ],
)
def test_a_protocol_that_cannot_be_followed_is_refused(tmp_path, content, expected):
    file = tmp_path / "eval_protocol.json"
    file.write_text(content, encoding="utf-8")
    assert message(DataError, eval_protocol, tmp_path) == f"{file}: {expected}"


def test_the_stories_are_all_there(stories_folder):
    file = stories_folder / "data" / "tinystories" / "valid.txt"
    assert len(load_documents(file)) == 2363
    assert data_digest(file) == "4501f2391608c4010b39d9c3b7b8158952c190201b208e508dc785a09d949ca9"
