import json
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_adaptive_sparse.errors import DataError
from hf_adaptive_sparse.hf import evaluation
from hf_adaptive_sparse.hf.zero_shot import ZeroShotResult, cloze, log_probabilities, minimal_pairs
from tests.reference import zero_shot as reference

words = st.text("ab é", min_size=1, max_size=6)


@pytest.fixture(scope="module")
def model(tiny_llama_folder):
    """The random tiny model with its weights scaled up, so that its predictions differ much."""
    model = AutoModelForCausalLM.from_pretrained(tiny_llama_folder)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.mul_(6)
    return model


@pytest.fixture
def write(tmp_path):
    def write(*rows):
        file = tmp_path / "items.jsonl"
        file.write_text("\n".join(json.dumps(row) for row in rows), encoding="utf-8")
        return file

    return write


def message(function, *arguments, **settings):
    with pytest.raises(DataError) as caught:
        function(*arguments, **settings)
    return str(caught.value)


@settings(max_examples=15)
@given(
    texts=st.lists(st.tuples(st.just("") | words, words), min_size=1, max_size=5),
    batch_size=st.integers(1, 4),
)
def test_log_probabilities_match_a_loop_over_tokens(model, tiny_tokenizer, texts, batch_size):
    found = log_probabilities(model, tiny_tokenizer, texts, batch_size=batch_size)
    for sum_, (context, continuation) in zip(found, texts, strict=True):
        expected = reference.log_probability(model, tiny_tokenizer, context, continuation)
        assert math.isclose(sum_, expected, rel_tol=1e-4)


def test_a_text_longer_than_the_positions_is_cut_off_at_its_start(model, tiny_tokenizer):
    context, continuation = "abc" * 60, "xyz"
    ids = tiny_tokenizer(context + continuation)["input_ids"][-128:]
    expected = sum(-reference.loss_of_token(model, ids[:k], ids[k]) for k in (125, 126, 127))
    assert math.isclose(log_probabilities(model, tiny_tokenizer, [(context, continuation)])[0], expected, rel_tol=1e-4)
    ids = tiny_tokenizer("a" * 200)["input_ids"][-128:]
    expected = sum(-reference.loss_of_token(model, ids[:k], ids[k]) for k in range(1, 128))
    assert math.isclose(log_probabilities(model, tiny_tokenizer, [("", "a" * 200)])[0], expected, rel_tol=1e-4)


def test_a_start_token_is_put_where_the_tokenizer_puts_none(model, tiny_tokenizer):
    from tokenizers import processors

    expected = log_probabilities(model, tiny_tokenizer, [("", "abc")])
    backend, before = tiny_tokenizer.backend_tokenizer, tiny_tokenizer.backend_tokenizer.post_processor
    start, end = tiny_tokenizer.bos_token, tiny_tokenizer.eos_token
    try:
        backend.post_processor = processors.ByteLevel()
        assert log_probabilities(model, tiny_tokenizer, [("", "abc")]) == expected
        tiny_tokenizer.bos_token = None
        from_end = log_probabilities(model, tiny_tokenizer, [("", "abc")])[0]
        ids = [tiny_tokenizer.eos_token_id, *tiny_tokenizer("abc")["input_ids"]]
        by_hand = sum(-reference.loss_of_token(model, ids[:k], ids[k]) for k in (1, 2, 3))
        assert math.isclose(from_end, by_hand, rel_tol=1e-4)
        tiny_tokenizer.eos_token = None
        assert message(log_probabilities, model, tiny_tokenizer, [("", "abc")]) == (
            "the tokenizer has neither a bos nor an eos token to put in front of a sentence."
        )
    finally:
        backend.post_processor = before
        tiny_tokenizer.bos_token, tiny_tokenizer.eos_token = start, end


def test_batches_shrink_to_the_logits_that_fit_and_modes_are_kept(model, tiny_tokenizer, monkeypatch):
    texts = [("a", "b" * n) for n in range(1, 9)]
    expected = log_probabilities(model, tiny_tokenizer, texts)
    rows = []
    handle = model.register_forward_hook(lambda *call: rows.append(call[-1].logits.shape[:2]))
    monkeypatch.setattr(evaluation, "_LOGITS_AT_ONCE", 20 * len(tiny_tokenizer))
    model.train()
    try:
        assert log_probabilities(model, tiny_tokenizer, texts) == pytest.approx(expected, rel=1e-4)
        assert model.training
    finally:
        handle.remove()
        model.eval()
    assert rows == [(2, 10), (2, 8), (3, 6), (1, 3)]


def choose(model, tokenizer, context, choices, weigh):
    scores = [reference.log_probability(model, tokenizer, context, choice) / weigh(choice) for choice in choices]
    return scores.index(max(scores))


def test_cloze_counts_the_items_whose_label_scores_best(model, tiny_tokenizer, write):
    choices = [" a", " bé", " the long one", "!"]
    rows = [{"context": f"story {n}", "choices": choices[: 2 + n % 3], "label": n % 2} for n in range(8)]
    plain = [choose(model, tiny_tokenizer, row["context"], row["choices"], lambda _: 1) for row in rows]
    norm = [
        choose(model, tiny_tokenizer, row["context"], row["choices"], lambda choice: len(choice.encode()))
        for row in rows
    ]
    assert plain != norm
    labels = [row["label"] for row in rows]
    right = sum(a == b for a, b in zip(plain, labels, strict=True))
    right_norm = sum(a == b for a, b in zip(norm, labels, strict=True))
    result = cloze(model, tiny_tokenizer, write(*rows), batch_size=3)
    assert result == ZeroShotResult(right / 8, right_norm / 8, 8)


def test_minimal_pairs_count_the_better_good_sentences(model, tiny_tokenizer, write):
    pairs = [("the cat runs", "the cat run"), ("a", "b"), ("b", "a"), ("they are", "they is it")]
    rows = [{"sentence_good": good, "sentence_bad": bad, "UID": "x"} for good, bad in pairs]
    better = [
        reference.log_probability(model, tiny_tokenizer, "", good)
        > reference.log_probability(model, tiny_tokenizer, "", bad)
        for good, bad in pairs
    ]
    file = write(*rows)
    result = minimal_pairs(model, tiny_tokenizer, file)
    assert (result.accuracy, result.items) == (sum(better) / 4, 4)
    assert 0 < result.accuracy < 1
    assert minimal_pairs(model, tiny_tokenizer, file, limit=1) == ZeroShotResult(*[float(better[0])] * 2, 1)


def test_equal_choices_are_never_right(model, tiny_tokenizer, write):
    file = write({"context": "a", "choices": ["b", "b"], "label": 0})
    assert cloze(model, tiny_tokenizer, file) == ZeroShotResult(0.0, 0.0, 1)


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"choices": ["a"], "label": 0}, "{file}: line 2: 'context' must be a str, got None."),
        (
            {"context": "a", "choices": "ab", "label": 0},
            "{file}: line 2: 'choices' must be a list, got 'ab'.",
        ),
        (
            {"context": "a", "choices": ["b"], "label": 1},
            "{file}: line 2: label 1 names none of the 1 choices.",
        ),
        ({"context": "a", "choices": [""], "label": 0}, "the continuation '' adds no token to its context."),
        ({"context": "a", "choices": ["b", 3], "label": 0}, "{file}: line 2: choice 1 is 3, not text."),
    ],
)
def test_a_bad_cloze_item_is_named_by_its_line(model, tiny_tokenizer, write, row, expected):
    file = write({"context": "a", "choices": ["b"], "label": 0}, row)
    assert message(cloze, model, tiny_tokenizer, file) == expected.format(file=file)


def test_a_missing_or_empty_file_of_items_is_refused(model, tiny_tokenizer, write, tmp_path):
    file = write()
    assert message(minimal_pairs, model, tiny_tokenizer, file) == f"{file}: the file holds no items."
    assert message(minimal_pairs, model, tiny_tokenizer, tmp_path / "item.jsonl") == (
        f"{tmp_path / 'item.jsonl'}: no such file or folder; nearest names in {tmp_path}: items.jsonl."
    )


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_stories260k_reproduces_its_zero_shot_numbers(stories_folder):
    folder = stories_folder / "models" / "stories260K"
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    zeroshot = stories_folder / "data" / "zeroshot"
    result = cloze(model, tokenizer, zeroshot / "tinystories_cloze.jsonl", batch_size=32)
    assert (round(result.accuracy, 3), round(result.accuracy_norm, 3), result.items) == (0.436, 0.506, 708)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "expected"),
    [("stories260K", 0.906), ("stories3M", 0.893)],
)
def test_a_blimp_file_reproduces_its_number(stories_folder, name, expected):
    folder = stories_folder / "models" / name
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    file = stories_folder / "data" / "zeroshot" / "blimp" / "irregular_past_participle_verbs.jsonl"
    result = minimal_pairs(model, tokenizer, file)
    assert (round(result.accuracy, 3), result.items) == (expected, 1000)
