import json
import math
import shutil
import sys

import evaluate
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from torch.nn import functional
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
)

from hf_adaptive_sparse.errors import ConfigError, DataError, TrainingError
from hf_adaptive_sparse.hf import evaluation
from hf_adaptive_sparse.hf.data import WindowDataset, eval_protocol, load_documents, token_windows
from hf_adaptive_sparse.hf.evaluation import Perplexity, evaluation_mode, lm_eval_tasks, perplexity
from tests.reference import perplexity as reference

VOCABULARY = 50


def tiny_model(**settings):
    """A random model whose predictions differ much from each other."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=16, intermediate_size=32, num_hidden_layers=2,
        num_attention_heads=2, max_position_embeddings=32, tie_word_embeddings=False, initializer_range=0.3,
        **settings,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def random_windows(count, length, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return WindowDataset(torch.randint(VOCABULARY, (count, length), generator=generator, dtype=torch.int32))


@pytest.fixture(scope="module")
def model():
    return tiny_model()


def message(error, function, *arguments, **settings):
    with pytest.raises(error) as caught:
        function(*arguments, **settings)
    return str(caught.value)


# The number


@settings(max_examples=25)
@given(seed=st.integers(0, 99), count=st.integers(1, 5), length=st.integers(2, 9), batch_size=st.integers(1, 6))
def test_perplexity_matches_a_loop_over_tokens(model, seed, count, length, batch_size):
    windows = random_windows(count, length, seed)
    result = perplexity(model, windows, batch_size=batch_size)
    expected = reference.nll(model, windows.tokens.tolist())
    assert math.isclose(result.nll, expected, rel_tol=1e-5)
    assert result.perplexity == math.exp(result.nll)
    assert (result.tokens, result.predictions) == (count * length, count * (length - 1))
    assert result.seconds > 0


@settings(max_examples=25)
@given(seed=st.integers(0, 99), count=st.integers(1, 4), length=st.integers(2, 8), data=st.data())
def test_sliding_perplexity_matches_a_loop_over_tokens(model, seed, count, length, data):
    stride = data.draw(st.integers(1, length - 1))
    windows = random_windows(count, length, seed)
    result = perplexity(model, windows, stride=stride, batch_size=3)
    expected = reference.sliding_nll(model, windows.tokens.tolist(), stride)
    assert math.isclose(result.nll, expected, rel_tol=1e-5)
    assert (result.tokens, result.predictions) == (count * length, count * length - 1)


def test_a_stride_of_a_whole_window_is_the_protocol_without_a_stride(model):
    windows = random_windows(4, 8)
    assert perplexity(model, windows, stride=8).nll == perplexity(model, windows).nll


def test_a_gpt2_is_measured_too():
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=VOCABULARY, n_embd=16, n_layer=2, n_head=2, n_positions=16)).eval()
    windows = random_windows(3, 8)
    expected = reference.nll(model, windows.tokens.tolist())
    assert math.isclose(perplexity(model, windows).nll, expected, rel_tol=1e-5)


def test_a_plain_tensor_of_tokens_gives_the_same_without_bits_per_byte(model):
    windows = random_windows(3, 8)
    windows.tokens_per_byte = 0.25
    with_bytes, without = perplexity(model, windows), perplexity(model, windows.tokens.long())
    assert with_bytes.nll == without.nll
    assert without.bits_per_byte is None
    assert math.isclose(with_bytes.bits_per_byte, with_bytes.nll / math.log(2) * 0.25)


def test_only_the_first_windows_count(model):
    windows = random_windows(9, 8)
    first = perplexity(model, windows, max_windows=4)
    assert first.nll == perplexity(model, windows.select(slice(0, 4))).nll
    assert first.tokens == 32
    assert perplexity(model, windows, max_windows=None).tokens == 72


def test_four_hundred_windows_are_the_default(model):
    assert perplexity(model, random_windows(401, 2)).tokens == 800


def test_an_adapter_counts_and_can_be_switched_off():
    model = tiny_model()
    windows = random_windows(3, 8)
    dense = perplexity(model, windows).nll
    adapted = get_peft_model(model, LoraConfig(r=4, init_lora_weights=False, target_modules="all-linear"))
    inside = perplexity(adapted, windows).nll
    assert not math.isclose(inside, dense, rel_tol=1e-3)
    with adapted.disable_adapter():
        assert perplexity(adapted, windows).nll == dense
    assert math.isclose(perplexity(adapted.merge_and_unload(), windows).nll, inside, rel_tol=1e-5)


def test_losses_of_a_bfloat16_model_are_summed_in_float32():
    model = tiny_model().bfloat16()
    windows = random_windows(8, 32)
    logits = model(input_ids=windows.tokens.long()).logits[:, :-1].double()
    expected = functional.cross_entropy(logits.flatten(0, 1), windows.tokens[:, 1:].long().flatten()).item()
    assert math.isclose(perplexity(model, windows).nll, expected, rel_tol=1e-6)


def test_float32_logits_exist_in_small_pieces_only(model, monkeypatch):
    windows = random_windows(4, 8)
    expected = perplexity(model, windows).nll
    sizes = []
    original = functional.cross_entropy

    def cross_entropy(logits, *arguments, **settings):
        sizes.append(logits.numel())
        return original(logits, *arguments, **settings)

    monkeypatch.setattr(functional, "cross_entropy", cross_entropy)
    monkeypatch.setattr(evaluation, "_FLOAT32_AT_ONCE", 3 * VOCABULARY)
    assert math.isclose(perplexity(model, windows).nll, expected, rel_tol=1e-6)
    assert max(sizes) == 3 * VOCABULARY


def test_a_batch_shrinks_to_the_logits_that_fit(model, monkeypatch):
    windows = random_windows(5, 8)
    expected = perplexity(model, windows).nll
    rows = []
    handle = model.register_forward_hook(lambda *call: rows.append(call[-1].logits.shape[0]))
    try:
        perplexity(model, windows, batch_size=4)
        assert rows == [4, 1]
        rows.clear()
        monkeypatch.setattr(evaluation, "_LOGITS_AT_ONCE", 2 * 8 * VOCABULARY)
        assert math.isclose(perplexity(model, windows, batch_size=4).nll, expected, rel_tol=1e-6)
        assert rows == [2, 2, 1]
        rows.clear()
        monkeypatch.setattr(evaluation, "_LOGITS_AT_ONCE", 1)
        perplexity(model, windows, batch_size=4)
        assert rows == [1] * 5
    finally:
        handle.remove()


def test_a_perplexity_beyond_float_is_infinite():
    model = tiny_model()
    with torch.no_grad():
        model.lm_head.weight.mul_(1e4)
    result = perplexity(model, random_windows(2, 8))
    assert math.isfinite(result.nll)
    assert result.perplexity == math.inf


def test_progress_is_told_after_every_batch(model):
    calls = []
    perplexity(model, random_windows(5, 8), batch_size=2, progress=lambda *call: calls.append(call))
    assert calls == [(2, 5), (4, 5), (5, 5)]


# The state of the model


def test_modes_of_all_modules_are_as_before_also_after_an_error():
    model = tiny_model(attention_dropout=0.9).train()
    model.model.layers[0].eval()
    modes = [module.training for module in model.modules()]
    windows = random_windows(3, 8)
    first, second = perplexity(model, windows).nll, perplexity(model, windows).nll
    assert first == second
    assert [module.training for module in model.modules()] == modes
    with pytest.raises(KeyError), evaluation_mode(model):
        assert not any(module.training for module in model.modules())
        assert not torch.is_grad_enabled()
        raise KeyError
    assert [module.training for module in model.modules()] == modes
    assert torch.is_grad_enabled()


def test_a_model_that_computes_nan_is_named_with_its_batch():
    model = tiny_model()
    tokens = random_windows(5, 8).tokens % (VOCABULARY - 1)
    tokens[3, 2] = VOCABULARY - 1
    with torch.no_grad():
        model.get_input_embeddings().weight[VOCABULARY - 1] = math.nan
    model.train()
    assert message(TrainingError, perplexity, model, tokens, batch_size=2) == (
        "batch 1 (windows 2 to 3): the loss is nan. Some weight or activation of the model is not finite, "
        "or too large for float32."
    )
    assert model.training


# Wrong arguments


@pytest.mark.parametrize(
    ("shape", "settings", "error", "expected"),
    [
        ((0, 8), {}, DataError, "perplexity needs a [windows, length] tensor of tokens, got [0, 8]."),
        ((8,), {}, DataError, "perplexity needs a [windows, length] tensor of tokens, got [8]."),
        ((2, 1), {}, DataError, "a window needs 2 tokens or more, to predict one from another; got 1."),
        ((2, 33), {}, DataError, "windows of 33 tokens are longer than the 32 positions of the model."),
        ((2, 8), {"stride": 9}, ConfigError, "stride is from 1 to the 8 tokens of a window, got 9."),
        ((2, 8), {"stride": 0}, ConfigError, "stride is from 1 to the 8 tokens of a window, got 0."),
        ((2, 8), {"batch_size": 0}, ConfigError, "batch_size is a number of windows, at least 1; got 0."),
        (
            (2, 8),
            {"max_windows": 0},
            ConfigError,
            "max_windows is a number of windows, at least 1, or None; got 0.",
        ),
    ],
)
def test_what_cannot_be_measured_is_refused(model, shape, settings, error, expected):
    assert message(error, perplexity, model, torch.zeros(shape, dtype=torch.int64), **settings) == expected


def test_tokens_of_another_tokenizer_are_refused(model):
    tokens = torch.tensor([[1, 2, VOCABULARY]])
    assert message(DataError, perplexity, model, tokens) == (
        "the windows hold token 50, the model knows 50 tokens. Use the tokenizer that belongs to the model."
    )


# The metric


@pytest.fixture(scope="module")
def texts(tiny_text_file):
    return load_documents(tiny_text_file)["text"][:20]


def test_the_metric_measures_a_model_in_memory(tiny_llama_folder, tiny_tokenizer, texts):
    model = AutoModelForCausalLM.from_pretrained(tiny_llama_folder)
    metric = Perplexity()
    assert isinstance(metric, evaluate.Metric)
    assert metric.description and metric.citation and metric.inputs_description
    arguments = {"texts": texts, "model": model, "tokenizer": tiny_tokenizer}
    result = metric.compute(**arguments, length=64, batch_size=3)
    expected = perplexity(model, token_windows(texts, tiny_tokenizer, 64), batch_size=3, max_windows=None)
    assert set(result) == {"nll", "perplexity", "tokens", "predictions", "seconds", "bits_per_byte"}
    for name in set(result) - {"seconds"}:
        assert result[name] == getattr(expected, name)
    sliding = metric.compute(**arguments, length=64, stride=32, max_windows=2)
    assert (sliding["tokens"], sliding["predictions"]) == (128, 127)


def test_the_metric_loads_a_folder_and_follows_its_protocol(tiny_llama_folder, tiny_tokenizer, texts, tmp_path):
    folder = shutil.copytree(tiny_llama_folder, tmp_path / "model")
    protocol = {"prefix": "<s>", "suffix": "</s>", "window": 32}
    (folder / "eval_protocol.json").write_text(json.dumps(protocol), encoding="utf-8")
    model = AutoModelForCausalLM.from_pretrained(folder)
    result = Perplexity().compute(texts=texts, model_id=str(folder))
    expected = perplexity(model, token_windows(texts, tiny_tokenizer, 32, "<s>", "</s>"), max_windows=None)
    assert (result["nll"], result["tokens"]) == (expected.nll, expected.tokens)
    plain = Perplexity().compute(texts=texts, model_id=str(folder), length=64, prefix="", suffix="")
    expected = perplexity(model, token_windows(texts, tiny_tokenizer, 64), max_windows=None)
    assert (plain["nll"], plain["tokens"]) == (expected.nll, expected.tokens)


@pytest.mark.parametrize("given", [(), ("model",), ("tokenizer",), ("model", "model_id"), ("model_id", "tokenizer")])
def test_the_metric_needs_one_model(given, model, tiny_tokenizer):
    known = {"model": model, "tokenizer": tiny_tokenizer, "model_id": "x"}
    arguments = {name: known[name] for name in given}
    assert message(ConfigError, Perplexity().compute, texts=["one"], **arguments) == (
        "Perplexity needs either `model` with its `tokenizer`, or `model_id` alone."
    )


# Tasks of lm-eval


def test_tasks_without_lm_eval_say_how_to_install_it(model, tiny_tokenizer, monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    assert message(ConfigError, lm_eval_tasks, model, tiny_tokenizer, ["arc_easy"]) == (
        "lm-eval tasks need the package lm-eval, which cannot be imported "
        "(import of lm_eval halted; None in sys.modules). "
        'Install it: pip install "hf_adaptive_sparse[eval]"'
    )


def test_lm_eval_runs_a_local_task_on_a_model_in_memory(tiny_llama_folder, tiny_tokenizer, tmp_path):
    pytest.importorskip("lm_eval", reason="needs the extra [eval]: lm-eval")
    from hf_adaptive_sparse.hf.zero_shot import cloze

    file = tmp_path / "items.jsonl"
    rows = [{"context": f"{n} and", "choices": [f" {n + 1}", f" {n * 7}"], "label": n % 2} for n in range(10)]
    file.write_text("\n".join(json.dumps(row) for row in rows), encoding="utf-8")
    task = {
        "task": "local_cloze",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(file)}},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "{{context}}",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "{{label}}",
        "target_delimiter": "",
        "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
    }
    model = AutoModelForCausalLM.from_pretrained(tiny_llama_folder).train()
    adapted = get_peft_model(model, LoraConfig(r=4, init_lora_weights=False, target_modules="all-linear"))
    results = lm_eval_tasks(adapted, tiny_tokenizer, [task], bootstrap_iters=0)
    expected = cloze(adapted, tiny_tokenizer, file)
    assert results["local_cloze"]["acc,none"] == expected.accuracy
    assert results["local_cloze"]["acc_norm,none"] == expected.accuracy_norm
    assert adapted.training


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_an_unknown_lm_eval_task_names_the_nearest(model, tiny_tokenizer):
    pytest.importorskip("lm_eval", reason="needs the extra [eval]: lm-eval")
    assert message(ConfigError, lm_eval_tasks, model, tiny_tokenizer, ["arc_eazy"]).startswith(
        "lm-eval knows no task 'arc_eazy'; nearest: arc_easy, "
    )


# Real models


def stories(folder, name):
    path = folder / "models" / name
    return (
        AutoModelForCausalLM.from_pretrained(path),
        AutoTokenizer.from_pretrained(path),
        eval_protocol(path),
    )


def test_stories260k_matches_a_loop_over_tokens(stories_folder):
    model, tokenizer, protocol = stories(stories_folder, "stories260K")
    documents = load_documents(stories_folder / "data" / "tinystories" / "valid.txt")
    windows = token_windows(documents, tokenizer, protocol.window, protocol.prefix, protocol.suffix, limit=40)
    result = perplexity(model, windows)
    assert math.isclose(result.nll, reference.nll_by_window(model, windows.tokens.tolist()), rel_tol=1e-6)
    assert f"{result.perplexity:.4f}" == "3.7765"


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("stories260K", ("1.3881", "4.0071", "0.9762")),
        ("babyllama-char105", ("0.7750", "2.1705", "1.1199")),
        ("stories3M", ("1.3554", "3.8782", "0.5054")),
    ],
)
def test_dense_reference_numbers_are_reproduced(stories_folder, name, expected):
    model, tokenizer, protocol = stories(stories_folder, name)
    documents = load_documents(stories_folder / "data" / "tinystories" / "valid.txt")
    windows = token_windows(documents, tokenizer, protocol.window, protocol.prefix, protocol.suffix)
    result = perplexity(model, windows, max_windows=protocol.windows)
    assert (result.tokens, result.predictions) == (102_400, 102_000)
    assert tuple(f"{value:.4f}" for value in (result.nll, result.perplexity, result.bits_per_byte)) == expected
