"""Every test runs offline, on one torch thread, and leaves the caches of the person who runs it alone."""

from __future__ import annotations

import os
import random
import shutil
import tempfile
from pathlib import Path

# Before anything imports torch or huggingface_hub, which read these once. Subprocesses of tests inherit them.
_CACHE = tempfile.mkdtemp(prefix="hf_adaptive_sparse_tests_")
os.environ.update(
    HF_HOME=_CACHE,
    HF_HUB_OFFLINE="1",
    HF_HUB_DISABLE_TELEMETRY="1",
    MPLBACKEND="Agg",
    TOKENIZERS_PARALLELISM="false",
    OMP_NUM_THREADS="1",
    # Equal to the dense layer to the last bit, as many tests ask; those of the compiled kernel name it.
    HF_ADAPTIVE_SPARSE_KERNEL="torch",
    HF_ADAPTIVE_SPARSE_CACHE=_CACHE,
)

import pytest  # noqa: E402
import torch  # noqa: E402
from hypothesis import HealthCheck, settings  # noqa: E402

torch.set_num_threads(1)

# The first torch call of a process takes longer than any deadline. The parent keeps hypothesis' own "ci"
# profile (the same examples at every run) where it has chosen it.
# A busy machine makes examples slowly: no reason to fail.
settings.register_profile("project", parent=settings(), deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("project")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs an accelerator"))


@pytest.fixture(scope="session", autouse=True)
def _remove_cache():
    yield
    shutil.rmtree(_CACHE, ignore_errors=True)


@pytest.fixture(scope="session")
def tiny_tokenizer():
    """One token per UTF-8 byte, with <s> in front of every text: 260 tokens, no training, any text."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: index for index, token in enumerate(["<s>", "</s>", "<unk>", "<pad>", *letters])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>", pad_token="<pad>"
    )


@pytest.fixture(scope="session")
def tiny_llama_folder(tmp_path_factory, tiny_tokenizer):
    """A random Llama of two blocks with 14 linear layers, and its tokenizer, as `save_pretrained` writes."""
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("models") / "tiny-llama"
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tiny_tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=128, tie_word_embeddings=True,
        bos_token_id=0, eos_token_id=1, pad_token_id=3,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    tiny_tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_text_file(tmp_path_factory):
    """200 short made-up stories, separated as the text files of the project are: about 24,000 bytes."""
    draw = random.Random(0)
    who, what, where = (
        ("the cat", "a bird", "old Tom", "Lily"),
        ("saw", "found", "wanted", "lost"),
        ("park", "sea"),
    )
    stories = [
        " ".join(f"{draw.choice(who)} {draw.choice(what)} a ball in the {draw.choice(where)}." for _ in range(3))
        for _ in range(200)
    ]
    file = tmp_path_factory.mktemp("data") / "stories.txt"
    file.write_text("\n<|endoftext|>\n".join(stories), encoding="utf-8")
    return file


@pytest.fixture(scope="session")
def stories_folder():
    """The folder of shared models and texts beside the repository; without it a test is skipped."""
    folder = Path(__file__).parents[1].parent / "shared"
    if not (folder / "models" / "stories260K").is_dir():
        pytest.skip("the folder `shared` with models and texts is not beside the repository")
    return folder
