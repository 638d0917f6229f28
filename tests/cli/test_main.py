"""Exit codes and messages: 0 done, 1 a fault of ours, 2 a user's mistake, 130 interrupted."""

from __future__ import annotations

import re

import pytest

from hf_adaptive_sparse.cli import SUBCOMMANDS, inspect
from hf_adaptive_sparse.errors import FormatError
from tests.cli.runs import run_process, start_process


def test_help_lists_every_subcommand_on_a_line_of_its_own(command):
    outcome = command("--help")
    assert (outcome.code, outcome.err) == (0, "")
    for name, text in SUBCOMMANDS.items():
        assert re.search(rf"^  {name} +{re.escape(text)}$", outcome.out, flags=re.MULTILINE)
    assert command().code == 2
    assert command().out == outcome.out == command("help").out


def test_version_names_what_a_report_of_a_fault_should_name(command):
    outcome = command("--version")
    assert (outcome.code, outcome.err) == (0, "")
    assert re.fullmatch(
        r"hf-adaptive-sparse [^ ]+( installed)? \(python 3\.\d+\.\d+, torch [^,]+, transformers [^,]+, "
        r"peft [^,]+, accelerate [^,]+, datasets [^,]+, safetensors [^,]+\)\n",
        outcome.out,
    )


@pytest.mark.parametrize("name", SUBCOMMANDS)
def test_every_subcommand_has_help(command, name):
    outcome = command(name, "--help")
    assert (outcome.code, outcome.err) == (0, "")
    assert outcome.out.startswith(f"usage: hf-adaptive-sparse {name}")
    assert "--dry-run" in outcome.out and "--config" in outcome.out and "--seed" in outcome.out


@pytest.mark.parametrize("arguments, message", [
    (["trian"], "hf-adaptive-sparse: error: unknown subcommand 'trian'. Did you mean 'train'?"),
    (["zzz"],
     "hf-adaptive-sparse: error: unknown subcommand 'zzz'. Known: demo, analyze, train, prune, shrink, export, push, "
     "inspect, bench, eval."),
    (["inspect"],
     "hf-adaptive-sparse inspect: error: PATH is missing. See hf-adaptive-sparse inspect --help."),
    (["export", "m"],
     "hf-adaptive-sparse export: error: OUT is missing. See hf-adaptive-sparse export --help."),
])  # fmt: skip
def test_a_mistake_on_the_command_line_is_one_paragraph_and_exit_code_2(command, arguments, message):
    outcome = command(*arguments)
    assert (outcome.code, outcome.out, outcome.err) == (2, "", message + "\n")


@pytest.fixture
def failing(monkeypatch, tiny_llama_folder):
    """Make `inspect` raise what it is given."""

    def prepare(problem: BaseException) -> tuple[str, ...]:
        def run(arguments):
            raise problem

        monkeypatch.setattr(inspect, "run", run)
        return "inspect", str(tiny_llama_folder)

    return prepare


def test_our_fault_is_exit_code_1_and_says_how_to_report_it(command, failing):
    outcome = command(*failing(ZeroDivisionError("division by zero")))
    assert outcome.code == 1
    assert outcome.err == (
        "hf-adaptive-sparse inspect: failed, and this is a fault of hf-adaptive-sparse, not yours: "
        "ZeroDivisionError: division by zero. Run it again with --debug to see the traceback, and report it "
        "in the project's issue tracker, with the command and the output of hf-adaptive-sparse --version.\n"
    )


@pytest.mark.parametrize("how", ["argument", "environment"])
def test_a_traceback_is_shown_only_when_asked_for(command, failing, monkeypatch, how):
    arguments = failing(ZeroDivisionError("division by zero"))
    if how == "argument":
        arguments += ("--debug",)
    else:
        monkeypatch.setenv("HF_ADAPTIVE_SPARSE_DEBUG", "1")
    outcome = command(*arguments)
    assert outcome.code == 1
    assert outcome.err.startswith("Traceback (most recent call last):\n")
    assert outcome.message == (
        "hf-adaptive-sparse inspect: failed, and this is a fault of hf-adaptive-sparse, not yours: "
        "ZeroDivisionError: division by zero. Please report it in the project's issue tracker, with the "
        "command and the output of hf-adaptive-sparse --version."
    )


class OutOfMemoryError(RuntimeError):
    """As torch's, which cannot be raised without an accelerator."""


@pytest.mark.parametrize("problem, message", [
    (FormatError("file x:\n  is damaged."), "file x: is damaged."),
    (OSError(28, "No space left on device", "a/b"),
     "a/b: cannot be read or written: No space left on device. What is complete is kept."),
    (PermissionError(13, "Permission denied", "a/b"),
     "a/b: cannot be read or written: Permission denied. What is complete is kept."),
    (RuntimeError("I/O error: No space left on device (os error 28)"),
     "the output: cannot be read or written: No space left on device. What is complete is kept."),
    (OutOfMemoryError("CUDA out of memory"),
     "the device ran out of memory. Lower --batch-size or --window, or take a smaller model."),
])  # fmt: skip
def test_what_the_user_can_mend_is_exit_code_2(command, failing, problem, message):
    outcome = command(*failing(problem))
    assert (outcome.code, outcome.err) == (2, f"hf-adaptive-sparse inspect: error: {message}\n")


def test_an_interrupt_is_exit_code_130(command, failing, monkeypatch):
    outcome = command(*failing(KeyboardInterrupt()))
    assert (outcome.code, outcome.err) == (130, "hf-adaptive-sparse inspect: interrupted.\n")


def test_an_interrupted_training_says_how_to_go_on(command, monkeypatch, tiny_llama_folder, tiny_text_file, tmp_path):
    from hf_adaptive_sparse.cli import train

    def interrupted(run):
        raise KeyboardInterrupt

    monkeypatch.setattr(train, "retrain", interrupted)
    outcome = command("train", tiny_llama_folder, "--data", tiny_text_file, "--output-dir", tmp_path / "out")
    assert (outcome.code, outcome.message) == (
        130,
        "hf-adaptive-sparse train: interrupted. Checkpoints are kept: the same command with --resume goes on.",
    )


def test_a_reader_that_has_seen_enough_is_no_error(tiny_llama_folder):
    process = start_process("inspect", tiny_llama_folder, "--json")
    process.stdout.close()
    _, err = process.communicate(timeout=280)
    assert process.returncode == 0, err
    assert "BrokenPipe" not in err


@pytest.mark.parametrize("module", ["hf_adaptive_sparse", "hf_adaptive_sparse.cli.main"])
def test_the_package_and_its_main_module_both_run(module, tiny_llama_folder):
    outcome = run_process("inspect", tiny_llama_folder, "--dry-run", module=module)
    assert outcome.code == 0, outcome.err
    assert outcome.out.startswith("hf-adaptive-sparse inspect: would do this, and writes nothing now\n")
    assert "Warning" not in outcome.err


def test_a_mistake_in_a_process_of_its_own_has_no_traceback(tmp_path):
    outcome = run_process("inspect", tmp_path / "absent")
    assert outcome.code == 2
    assert outcome.err == (
        f"hf-adaptive-sparse inspect: error: PATH {tmp_path}/absent: no such folder. {tmp_path} holds no folders.\n"
    )
