"""`push` on the command line: what it shows before it does anything, and what it says to a newcomer."""

from __future__ import annotations

import pytest

import hf_adaptive_sparse.cli.push as push_command
from hf_adaptive_sparse.hub.upload import PushedRepo


@pytest.fixture
def nobody(monkeypatch):
    """No token anywhere."""
    monkeypatch.setattr("hf_adaptive_sparse.hub.push.get_token", lambda: None)


def test_a_dry_run_shows_files_sizes_and_the_card_and_needs_no_token(command, trained, nobody):
    outcome = command("push", trained, "me/model", "--dry-run")
    assert outcome.code == 0, outcome.err
    size = (trained / "packed" / "model.sparse24.safetensors").stat().st_size
    shown = " ".join(outcome.out.split())
    assert "push: would do this, and writes nothing now" in shown
    assert f"- model.sparse24.safetensors {size:,} bytes" in shown and "- README.md" in shown
    assert "# model\n" in outcome.out and "## Results" in outcome.out
    assert outcome.out.index("library_name: transformers") < outcome.out.index("## Licence")
    assert "the card names no licence. Not known: " in outcome.err and "Or say which: --license." in outcome.err


def test_a_dry_run_of_both_shows_two_repositories(command, trained):
    outcome = command("push", trained, "me/model", "--format", "both", "--dry-run", "--license", "mit")
    assert outcome.code == 0, outcome.err
    assert "/me/model " in outcome.out and "/me/model-packed " in outcome.out
    assert "base_model: me/model\n" in outcome.out and "names no licence" not in outcome.err


def test_what_was_pushed_is_printed_and_the_arguments_go_through(command, trained, monkeypatch):
    seen = {}

    def push(path, repo, **options):
        seen.update(options, path=path, repo=repo)
        common = {"kind": "packed", "url": "https://hub/me/model", "commit": "c" * 40, "revision": "main"}
        return (PushedRepo(repo_id=repo, changed=True, **common), PushedRepo(repo_id=repo, changed=False, **common))

    monkeypatch.setattr(push_command, "push_to_hub", push)
    monkeypatch.setenv("HF_TOKEN", "hf_of_the_environment")
    outcome = command("push", trained, "me/model", "--private", "--create-pr", "--message", "x", "--base-model", "a/b")
    assert outcome.out == (
        f"https://hub/me/model: packed, commit {'c' * 40}\n"
        f"https://hub/me/model: packed, commit {'c' * 40} (nothing had changed)\n"
    )
    assert seen == {
        "path": str(trained), "repo": "me/model", "token": "hf_of_the_environment", "packed": None, "private": True,
        "revision": None, "create_pr": True,
        "commit_message": "x", "base_model": "a/b", "license": None, "report": None, "card": True,
    }  # fmt: skip


def test_mistakes_of_a_newcomer(refused, trained, nobody, tmp_path):
    assert refused("push", trained, "model") == (
        "REPO 'model' has no owner: write OWNER/model, where OWNER is your user name on the Hub or an organisation of "
        "yours. `hf auth whoami` prints your name."
    )
    assert refused("push", trained, "me/model") == (
        "no token: a push needs one with the role `write`. Make it in the settings of the Hub (Access Tokens), then "
        "run `hf auth login`, or set HF_TOKEN."
    )
    assert refused("push", tmp_path, "me/model", "--dry-run") == (
        f"PATH {tmp_path}: the folder holds no model: neither config.json nor adapter_config.json, nor a folder "
        "packed, dense, shrunk, masks with one."
    )
    (tmp_path / "run").symlink_to(trained)
    assert refused("push", tmp_path, "me/model", "--dry-run").endswith(
        f"with one. There is one in {tmp_path / 'run' / 'dense'}."
    )
    assert refused("push", tmp_path / "absent", "me/model", "--dry-run") == (
        f"PATH {tmp_path / 'absent'}: there is no such folder. Give the output folder of train, prune, shrink or "
        "export, or a model folder."
    )
    assert refused("push", trained) == "REPO is missing. See hf-adaptive-sparse push --help."
    assert refused("push", trained, "me/model", "--format", "zip") == (
        "unknown format 'zip'; known: auto, packed, dense, both."
    )
    assert refused("push", trained, "me/model", "--dry-run", "--base-model", "x") == (
        "base_model is the Hub id OWNER/NAME of the dense model, got 'x'."
    )


def test_a_token_of_the_command_line_is_used_and_not_shown(command, trained, monkeypatch, nobody):
    seen = []
    monkeypatch.setattr(push_command, "push_to_hub", lambda *_, **options: seen.append(options["token"]) or ())
    outcome = command("push", trained, "me/model", "--token", "hf_secret")
    assert (outcome.code, seen) == (0, ["hf_secret"])
    assert "hf_secret" not in outcome.out + outcome.err
