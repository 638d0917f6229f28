"""Running subcommands as a user does, and the small models that they work on."""

from __future__ import annotations

from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM

from hf_adaptive_sparse.cli.main import main
from tests.cli.runs import TRAIN, Outcome


@pytest.fixture
def command(capsys):
    """`command("inspect", folder)`: the subcommand, run in this process."""

    def run(*arguments: object) -> Outcome:
        capsys.readouterr()
        code = main([str(argument) for argument in arguments])
        captured = capsys.readouterr()
        return Outcome(code, captured.out, captured.err)

    return run


@pytest.fixture
def refused(command):
    """`refused("inspect", folder)`: the message of a subcommand that ends with exit code 2 and no traceback."""

    def run(*arguments: object) -> str:
        outcome = command(*arguments)
        assert outcome.code == 2, outcome.err
        assert "Traceback" not in outcome.err
        prefix = f"hf-adaptive-sparse {arguments[0]}: error: "
        assert outcome.message.startswith(prefix), outcome.err
        return outcome.message.removeprefix(prefix)

    return run


@pytest.fixture(scope="session")
def trained(tiny_llama_folder, tiny_text_file, tmp_path_factory) -> Path:
    """The output folder of one `train` run of 20 steps."""
    output = tmp_path_factory.mktemp("train") / "out"
    files = ["--data", str(tiny_text_file), "--output-dir", str(output)]
    assert main(["train", str(tiny_llama_folder), *files, *TRAIN]) == 0
    return output


@pytest.fixture(scope="session")
def broken_folder(tiny_llama_folder, tmp_path_factory) -> Path:
    """The tiny model with one NaN among its weights."""
    folder = tmp_path_factory.mktemp("models") / "broken"
    model = AutoModelForCausalLM.from_pretrained(tiny_llama_folder)
    model.model.layers[1].mlp.up_proj.weight.data[3, 5] = float("nan")
    model.save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_bytes((tiny_llama_folder / name).read_bytes())
    return folder
