"""The embedded model and its text: what is in the folder, how good it is, and how it was made."""

from __future__ import annotations

import json
import math
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch.nn import functional
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_adaptive_sparse.demo import (
    MODEL_FOLDER,
    PROMPTS,
    demo_documents,
    demo_files,
    documents_digest,
    split_of,
)
from hf_adaptive_sparse.demo.corpus import PACKAGES
from hf_adaptive_sparse.errors import ConfigError, DataError
from hf_adaptive_sparse.patterns import NMPattern

REPOSITORY = Path(__file__).parents[1]
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
HELDOUT = (
    "_threading_local cmd collections dis imaplib importlib json logging modulefinder nturl2path operator pydoc queue"
).split()
END, WINDOW, FIRST_WINDOWS = "<|endoftext|>", 256, 64


@pytest.fixture(scope="module")
def model():
    return AutoModelForCausalLM.from_pretrained(MODEL_FOLDER, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(MODEL_FOLDER)


@pytest.fixture(scope="module")
def results():
    return json.loads((REPOSITORY / "benchmarks" / "demo_pretraining.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def windows(tokenizer):
    """The first windows of the held-out text of this interpreter."""
    tokens, documents = [], iter(demo_documents("heldout"))
    while len(tokens) < FIRST_WINDOWS * WINDOW:
        tokens += tokenizer(next(documents))["input_ids"]
    return torch.tensor(tokens[: FIRST_WINDOWS * WINDOW]).view(FIRST_WINDOWS, WINDOW)


@pytest.fixture
def small_stdlib(tmp_path):
    """A folder laid out as a standard library: a short file for every package, and what must not be read."""
    folder = tmp_path / "stdlib"
    for package in PACKAGES:
        path = folder / package / "__init__.py" if package in ("json", "email") else folder / f"{package}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f'"""The module {package}."""\n' + f"def {package}(x):\n    return x + 1\n" * 20)
    (folder / "json" / "decoder.py").write_bytes(b"# -*- coding: latin-1 -*-\r\nname = '\xe9'\r\n\r\n")
    for extra in ("json/tests/test_json.py", "email/test/data.py", "somewhere/else.py", "turtle.py"):
        (folder / extra).parent.mkdir(exist_ok=True)
        (folder / extra).write_text("never = 'read'\n")
    return folder


@torch.no_grad()
def perplexity(model, windows):
    logits = model(input_ids=windows).logits[:, :-1]
    return math.exp(functional.cross_entropy(logits.flatten(0, 1), windows[:, 1:].flatten()))


def run(command: list[str], check: bool = True) -> subprocess.CompletedProcess:
    return subprocess.run(command, check=check, capture_output=True, text=True, env=ENVIRONMENT)


def pretraining(folder: Path, stdlib: Path, steps: int) -> list[str]:
    """The command of a run that takes seconds."""
    options = dict(
        vocab_size=300, hidden_size=16, intermediate_size=16, layers=1, heads=2, kv_heads=1, window=16,
        windows_per_step=2, warmup_steps=5, decay_steps=9, log_every=10, checkpoint_every=20, steps=steps,
        stdlib=stdlib, model_folder=folder / "model", work_folder=folder / "work",
        results=folder / "results.json",
    )  # fmt: skip
    script = str(REPOSITORY / "scripts" / "pretrain_demo.py")
    return [
        sys.executable,
        script,
        *(f"--{name.replace('_', '-')}={value}" for name, value in options.items()),
    ]


# -- the folder ---


def test_the_folder_holds_a_complete_model_below_two_mebibytes():
    files = {path.name: path.stat().st_size for path in MODEL_FOLDER.iterdir()}
    assert set(files) == {
        "README.md",
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    assert sum(files.values()) < 2 * 2**20


def test_the_model_is_a_tied_llama_in_bfloat16_whose_linear_widths_are_multiples_of_eight(model):
    assert type(model).__name__ == "LlamaForCausalLM"
    assert model.lm_head.weight is model.model.embed_tokens.weight
    for weight in load_file(MODEL_FOLDER / "model.safetensors").values():
        assert weight.dtype == torch.bfloat16 and weight.isfinite().all()
    linears = [module for module in model.model.modules() if isinstance(module, torch.nn.Linear)]
    assert len(linears) == 7 * model.config.num_hidden_layers
    assert all(width % 8 == 0 for module in linears for width in module.weight.shape)


@given(text=st.text())
def test_the_tokenizer_gives_back_every_text_and_opens_it_with_the_end_token(text):
    tokenizer = AutoTokenizer.from_pretrained(MODEL_FOLDER)
    tokens = tokenizer(text)["input_ids"]
    assert tokenizer.bos_token == tokenizer.eos_token == tokenizer.convert_ids_to_tokens(tokens[0]) == END
    assert tokenizer.decode(tokens[1:]) == text


def test_the_card_and_the_results_are_about_the_model_in_the_folder(model, results):
    settings, config = results["settings"], model.config
    assert results["parameters"] == model.num_parameters()
    assert (settings["vocab_size"], settings["hidden_size"]) == (config.vocab_size, config.hidden_size)
    assert settings["layers"] == config.num_hidden_layers
    assert settings["window"] == config.max_position_embeddings
    assert results["training_tokens"] == settings["steps"] * settings["windows_per_step"] * settings["window"]
    card = (MODEL_FOLDER / "README.md").read_text(encoding="utf-8")
    assert f"{results['parameters']:,} parameters" in card and f"{results['training_tokens']:,} in all" in card
    for figures in results["heldout"]:
        assert f"| {figures['python']} | {figures['tokens']:,} | {figures['perplexity']:.3f} |" in card


# -- quality ---


def test_perplexity_on_packages_never_seen_is_far_from_that_of_noise(model, windows):
    assert perplexity(model, windows) < 30  # of 1024 tokens; their frequencies alone give 391


def test_perplexity_is_the_recorded_one_where_the_text_is_the_recorded_one(model, windows, results):
    digest = documents_digest(demo_documents("heldout"))
    recorded = {figures["digest"]: figures["perplexity_first_windows"] for figures in results["heldout"]}
    if digest not in recorded:
        pytest.skip(f"no figure was recorded for the standard library of Python {sys.version.split()[0]}")
    assert perplexity(model, windows) == pytest.approx(recorded[digest], rel=1e-3)


def test_one_shot_magnitude_pruning_visibly_hurts(model, windows):
    dense = perplexity(model, windows)
    pruned = AutoModelForCausalLM.from_pretrained(MODEL_FOLDER, dtype=torch.float32).eval()
    with torch.no_grad():
        for module in pruned.model.modules():
            if isinstance(module, torch.nn.Linear):
                module.weight *= NMPattern(2, 4).keep_mask(module.weight.abs())
    assert perplexity(pruned, windows) > 1.25 * dense


def test_there_are_three_prompts_and_the_model_continues_each(model, tokenizer):
    assert len(set(PROMPTS)) == 3
    for prompt in PROMPTS:
        assert prompt == prompt.rstrip()
        inputs = tokenizer(prompt, return_tensors="pt")
        output = model.generate(**inputs, max_new_tokens=32, do_sample=False)[0]
        written = tokenizer.decode(output[inputs["input_ids"].shape[1] :])
        assert len(set(written.split())) >= 4, written  # neither empty nor one word over and over


# -- text ---


def test_the_held_out_packages_are_the_same_everywhere():
    assert [package for package in PACKAGES if split_of(package) == "heldout"] == HELDOUT


def test_no_file_is_in_both_splits_and_every_held_out_package_is_there():
    train, heldout = demo_files("train"), demo_files("heldout")
    assert not set(train) & set(heldout)
    assert set(HELDOUT) <= {part.removesuffix(".py") for path in heldout for part in path.parts}
    sizes = {split: sum(map(len, demo_documents(split))) for split in ("train", "heldout")}
    assert 4e6 < sizes["train"] < 9e6 and 0.05 < sizes["heldout"] / sizes["train"] < 0.2


@pytest.mark.slow
def test_the_text_is_the_same_in_another_process():
    code = (
        "from hf_adaptive_sparse.demo import demo_documents, documents_digest;"
        "print(documents_digest(demo_documents('heldout')))"
    )
    printed = run([sys.executable, "-c", code]).stdout.strip()
    assert printed == documents_digest(demo_documents("heldout"))


def test_documents_are_whole_files_in_order_without_tests_and_other_packages(small_stdlib):
    files = [path.relative_to(small_stdlib).as_posix() for path in demo_files("heldout", small_stdlib)]
    plain = [f"{package}.py" for package in HELDOUT if package != "json"]
    assert files == sorted([*plain, "json/__init__.py", "json/decoder.py"])
    documents = demo_documents("heldout", small_stdlib)
    assert documents[files.index("json/decoder.py")] == "# -*- coding: latin-1 -*-\nname = 'é'"
    assert documents[files.index("cmd.py")].startswith('"""The module cmd."""\ndef cmd(x):\n')
    assert "never" not in "".join(documents + demo_documents("train", small_stdlib))


def test_the_digest_sees_text_order_and_borders():
    assert len({documents_digest(texts) for texts in (["ab", "c"], ["a", "bc"], ["c", "ab"], ["abc"])}) == 4
    assert documents_digest(["ab", "c"]) == documents_digest(iter(["ab", "c"]))


def test_an_unknown_split_is_refused():
    expected = "unknown split 'valid' of the demo text; known: train, heldout."
    with pytest.raises(ConfigError, match=f"^{re.escape(expected)}$"):
        demo_documents("valid")


def test_an_installation_without_source_files_is_refused(tmp_path):
    (tmp_path / "abc.py").write_text("x = 1\n")
    expected = (
        f"{tmp_path}: the demo reads the source files of Python's standard library, and found those of 1 of "
        f"{len(PACKAGES)} packages. Run it with a Python that has its .py files: those from python.org, "
        f"conda, uv and apt have them."
    )
    with pytest.raises(DataError, match=f"^{re.escape(expected)}$"):
        demo_documents("train", tmp_path)


# -- the script ---


def files_of(folder: Path) -> dict[str, bytes]:
    """All files but the card, which tells the minutes of the run."""
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != "README.md"}


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_a_killed_pretraining_started_again_ends_with_the_same_weights(small_stdlib, tmp_path):
    straight, killed = tmp_path / "straight", tmp_path / "killed"
    run(pretraining(straight, small_stdlib, steps=400))
    command = pretraining(killed, small_stdlib, steps=400)
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=ENVIRONMENT)
    while process.poll() is None and not (killed / "work" / "checkpoint.safetensors").is_file():
        time.sleep(0.01)
    process.kill()
    assert process.wait() == -signal.SIGKILL and not (killed / "model").exists()
    run(command)
    assert files_of(straight / "model") == files_of(killed / "model")
    assert files_of(straight / "model").keys() == files_of(MODEL_FOLDER).keys()
    logs = [json.loads((folder / "results.json").read_text())["log"] for folder in (straight, killed)]
    assert logs[0] == logs[1] and [entry["step"] for entry in logs[0]] == list(range(10, 401, 10))


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_pretraining_refuses_to_continue_a_run_with_other_settings(small_stdlib, tmp_path):
    run(pretraining(tmp_path, small_stdlib, steps=10))
    refused = run(pretraining(tmp_path, small_stdlib, steps=20), check=False)
    assert refused.returncode == 1
    assert refused.stderr.splitlines()[-1] == (
        f"{tmp_path / 'work'} holds a run with other settings or another text. Remove it, or pass --work-folder."
    )
