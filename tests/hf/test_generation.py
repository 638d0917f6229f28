import warnings

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, GPT2LMHeadModel

from hf_adaptive_sparse.errors import ConfigError, DataError
from hf_adaptive_sparse.hf.data import load_documents, token_windows
from hf_adaptive_sparse.hf.evaluation import perplexity
from hf_adaptive_sparse.hf.generation import sample_texts
from hf_adaptive_sparse.hf.pretrained import save_packed
from hf_adaptive_sparse.patterns import NMPattern


@pytest.fixture
def model(tiny_llama_folder):
    return AutoModelForCausalLM.from_pretrained(tiny_llama_folder)


def greedy(model, tokenizer, prompt, count):
    """The likeliest token, again and again, without a cache."""
    ids = tokenizer(prompt)["input_ids"]
    for _ in range(count):
        with torch.no_grad():
            ids.append(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax().item())
        if ids[-1] == tokenizer.eos_token_id:
            break
    return tokenizer.decode(ids, skip_special_tokens=True)


@pytest.mark.parametrize("count", [1, 7])
def test_texts_are_their_prompts_with_the_likeliest_tokens(model, tiny_tokenizer, count):
    prompts = ["the cat", "a much longer prompt", ""]
    expected = [greedy(model, tiny_tokenizer, prompt, count) for prompt in prompts]
    texts = sample_texts(model, tiny_tokenizer, prompts, max_new_tokens=count)
    assert texts == expected
    assert all(text.startswith(prompt) for text, prompt in zip(texts, prompts, strict=True))


def test_a_text_does_not_depend_on_the_prompts_beside_it(model, tiny_tokenizer):
    together = sample_texts(model, tiny_tokenizer, ["one", "another longer"], 5)
    assert together == sample_texts(model, tiny_tokenizer, ["one"], 5) + sample_texts(
        model, tiny_tokenizer, ["another longer"], 5
    )


def test_sampling_settings_of_the_model_do_not_matter(model, tiny_tokenizer):
    expected = sample_texts(model, tiny_tokenizer, ["the cat"], 8)
    model.generation_config.update(do_sample=True, temperature=50.0, top_k=5, num_beams=2)
    assert [sample_texts(model, tiny_tokenizer, ["the cat"], 8) for _ in range(3)] == [expected] * 3


def test_a_tokenizer_without_a_pad_token_gives_no_warning(tiny_tokenizer, caplog):
    torch.manual_seed(0)
    model = GPT2LMHeadModel(
        GPT2Config(vocab_size=260, n_embd=16, n_layer=2, n_head=2, n_positions=64, bos_token_id=0, eos_token_id=1)
    )
    before, tiny_tokenizer.pad_token = tiny_tokenizer.pad_token, None
    try:
        expected = greedy(model.eval(), tiny_tokenizer, "the cat", 8)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            assert sample_texts(model, tiny_tokenizer, ["the cat"], 8) == [expected]
    finally:
        tiny_tokenizer.pad_token = before
    assert [str(warning.message) for warning in caught] == []
    assert caplog.messages == []


def test_an_adapter_changes_the_text_and_the_mode_is_kept(model, tiny_tokenizer):
    dense = sample_texts(model, tiny_tokenizer, ["the cat"], 12)
    torch.manual_seed(0)
    adapted = get_peft_model(model, LoraConfig(r=8, init_lora_weights=False, target_modules="all-linear")).train()
    inside = sample_texts(adapted, tiny_tokenizer, ["the cat"], 12)
    assert inside == [greedy(adapted.eval(), tiny_tokenizer, "the cat", 12)]
    assert inside != dense
    adapted.train()
    with adapted.disable_adapter():
        assert sample_texts(adapted, tiny_tokenizer, ["the cat"], 12) == dense
    assert adapted.training


def test_a_packed_model_gives_the_texts_and_the_perplexity_of_the_sparse_one(
    model, tiny_tokenizer, tiny_text_file, tmp_path
):
    with torch.no_grad():
        for block in model.model.layers:
            for linear in (module for module in block.modules() if isinstance(module, torch.nn.Linear)):
                linear.weight.mul_(NMPattern(2, 4).keep_mask(linear.weight.abs()))
    save_packed(model, tmp_path / "packed", tokenizer=tiny_tokenizer)
    packed = AutoModelForCausalLM.from_pretrained(tmp_path / "packed")
    prompts = ["the cat", "Lily"]
    assert sample_texts(packed, tiny_tokenizer, prompts, 8) == sample_texts(model, tiny_tokenizer, prompts, 8)
    windows = token_windows(load_documents(tiny_text_file), tiny_tokenizer, 64, limit=4)
    assert perplexity(packed, windows).nll == perplexity(model, windows).nll


def test_what_cannot_be_continued_is_refused(model, tiny_tokenizer):
    with pytest.raises(ConfigError) as caught:
        sample_texts(model, tiny_tokenizer, ["a"], 0)
    assert str(caught.value) == "max_new_tokens must be at least 1, got 0."
    with pytest.raises(ConfigError) as caught:
        sample_texts(model, tiny_tokenizer, ["a" * 100], 40)
    assert str(caught.value) == (
        "a prompt of 101 tokens and max_new_tokens=40 do not fit the 128 positions of the model. Shorten one of them."
    )
    backend, before = tiny_tokenizer.backend_tokenizer, tiny_tokenizer.backend_tokenizer.post_processor
    from tokenizers import processors

    try:
        backend.post_processor = processors.ByteLevel()
        with pytest.raises(DataError) as caught:
            sample_texts(model, tiny_tokenizer, ["a", ""], 4)
    finally:
        backend.post_processor = before
    assert str(caught.value) == "the prompt '' has no tokens: there is nothing to continue."


def test_stories260k_tells_its_published_story(stories_folder):
    folder = stories_folder / "models" / "stories260K"
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    assert sample_texts(model, tokenizer, ["Once upon a time"], 70)[0].startswith(
        "Once upon a time, there was a little girl named Lily. She loved to play outside in the park. "
        "One day, she saw a big, red ball. She wanted to play with it, but it was too high."
    )
