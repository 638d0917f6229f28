"""`push_to_hub`: a sparse model goes to a Hub, with a card that says what was done to it and what was measured."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, get_token

from ..errors import ConfigError
from ..hf.shrunk_manifest import KEY as MANIFEST
from .card import plot_files, protocol, render_card
from .facts import REPORT, Facts, gather
from .metadata import EVAL_RESULTS, eval_results_file
from .parents import REPO_ID, Parent, find_parent
from .privacy import refuse_tokens, without_paths
from .sources import Source, sources
from .upload import MAIN, PushedRepo, upload

CARD = "README.md"
PACKED_SUFFIX = "-packed"
# What lies beside a model and is not of it. Pickles are never published.
_NOT_OF_THE_MODEL = (
    ".*", "*.pt", "*.pth", "*.pkl", "*.bin", "*.ckpt", "*.partial", "*.html", "*.log", "run.json", "trainer_state.json",
    "checkpoints/*", "checkpoint-*/*", "progress/*", "runs/*", "plots/*", "packed/*", "dense/*", "shrunk/*", "masks/*",
    "*/.*", "*.lock",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class RepoPlan:
    """What goes into one repository.

    Args:
        files: content, or the path of it, by path in the repository.
        left_out: files of the folder that do not go there.
        parent: the base model, and what is known of its licence.
    """

    repo_id: str
    kind: str
    files: Mapping[str, Path | bytes]
    left_out: tuple[str, ...]
    parent: Parent

    @property
    def card(self) -> str:
        found = self.files[CARD]
        return found.decode() if isinstance(found, bytes) else found.read_text(encoding="utf-8")

    @property
    def sizes(self) -> dict[str, int]:
        """Bytes of every file."""
        return {
            name: len(file) if isinstance(file, bytes) else file.stat().st_size for name, file in self.files.items()
        }


def push_to_hub(
    model_or_folder: Any,
    repo_id: str,
    *,
    packed: bool | str | None = None,
    tokenizer: Any = None,
    private: bool | None = None,
    token: str | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    commit_message: str | None = None,
    base_model: str | None = None,
    license: str | None = None,
    report: str | os.PathLike | None = None,
    card: bool = True,
    max_shard_size: int | str = "5GB",
    endpoint: str | None = None,
) -> tuple[PushedRepo, ...]:
    """Publish a sparse model, by one commit in each repository. `from_pretrained(repo_id)` opens what was pushed.

    Args:
        model_or_folder: the output folder of a subcommand; a folder of `save_packed`, `save_dense`, `export_shrunk` or
            of an adapter; or a live model of transformers or PEFT, which is saved to a temporary folder first.
        repo_id: OWNER/NAME. It is made if it is not there.
        packed: True for the packed form, False for dense-stored, "both" for two repositories: dense-stored in
            `repo_id`, packed in `repo_id` + "-packed", whose card names the first as its base model. None: as the
            folder is, and packed where there is a choice.
        tokenizer: of a live model.
        private: of a new repository (default: public); one that is there must be so already.
        token: of the Hub; default: HF_TOKEN, or that of `hf auth login`.
        revision: branch to push to, made if it is not there; default: main.
        create_pr: propose the commit as a pull request.
        commit_message: its first line.
        base_model: Hub id of the dense model; default: by the report of the run, or the configuration.
        license: licence id for the card; default: that in the card of the base model.
        report: `report.json` of the run; default: that beside the folder.
        card: False leaves the README.md of the folder, if there is one, as it is.
        max_shard_size: of one weight file, where something is saved for the push.
        endpoint: address of the Hub; default: HF_ENDPOINT, or huggingface.co.
    Returns:
        What became of each repository, in the order in which they were pushed.
    Raises:
        ConfigError: no token, a wrong name, no model in the folder, or rights that are missing.
        OutputError: the connection or the Hub failed; each repository is as it was, or complete, and the same call
            does what is left.
    """
    check_repo_id(repo_id)
    if create_pr and revision not in (None, MAIN):
        raise ConfigError(f"a pull request is made against main, got revision={revision!r} and create_pr=True.")
    token = find_token(token)
    api = HfApi(endpoint=endpoint, token=token, library_name="hf_adaptive_sparse")
    with plan_push(
        model_or_folder, repo_id, api=api, packed=packed, tokenizer=tokenizer, base_model=base_model, license=license,
        report=report, card=card, max_shard_size=max_shard_size,
    ) as plans:  # fmt: skip
        for plan in plans:
            refuse_tokens(plan.files, token)
        return tuple(
            upload(
                api, plan.repo_id, plan.kind, plan.files, private=private, revision=revision, create_pr=create_pr,
                message=commit_message or f"Upload the {plan.kind} model",
            )
            for plan in plans
        )  # fmt: skip


@contextmanager
def plan_push(
    model_or_folder: Any,
    repo_id: str,
    *,
    api: HfApi,
    packed: bool | str | None = None,
    tokenizer: Any = None,
    base_model: str | None = None,
    license: str | None = None,
    report: str | os.PathLike | None = None,
    card: bool = True,
    max_shard_size: int | str = "5GB",
) -> Iterator[list[RepoPlan]]:
    """All files of every repository, inside the `with` block. Asked of the Hub is the base model's card alone."""
    check_repo_id(repo_id)
    with sources(model_or_folder, packed, tokenizer, None if report is None else Path(report), max_shard_size) as found:
        plans: list[RepoPlan] = []
        for source in found:
            is_second = bool(plans)
            name = repo_id + PACKED_SUFFIX if is_second else repo_id
            plans.append(_plan(source, name, api, base_model, license, card, plans[0].repo_id if is_second else None))
        yield plans


def check_repo_id(repo_id: str) -> None:
    """Raise ConfigError unless it is OWNER/NAME."""
    if REPO_ID.fullmatch(repo_id):
        return
    if "/" not in repo_id:
        raise ConfigError(
            f"REPO {repo_id!r} has no owner: write OWNER/{repo_id}, where OWNER is your user name on the Hub or an "
            "organisation of yours. `hf auth whoami` prints your name."
        )
    raise ConfigError(f"REPO {repo_id!r} is no repository: write OWNER/NAME, with letters, digits, -, _ and . only.")


def find_token(token: str | None = None) -> str:
    """The token of the user.

    Raises:
        ConfigError: there is none.
    """
    found = token or get_token()
    if found is None:
        raise ConfigError(
            "no token: a push needs one with the role `write`. Make it in the settings of the Hub (Access Tokens), "
            "then run `hf auth login`, or set HF_TOKEN."
        )
    return found


def _plan(
    source: Source, repo_id: str, api: HfApi, base_model: str | None, license: str | None, card: bool, dense: str | None
) -> RepoPlan:
    facts = gather(source.folder, source.kind, source.report)
    shown_as = "the demo model of hf_adaptive_sparse" if facts.subcommand == "demo" else None
    parent = find_parent(facts.made_of, base_model, license, api, shown_as)
    files: dict[str, Path | bytes] = {}
    left_out = []
    for file in sorted(each for each in source.folder.rglob("*") if each.is_file()):
        name = file.relative_to(source.folder).as_posix()
        if any(fnmatch(name, pattern) for pattern in _NOT_OF_THE_MODEL):
            left_out.append(name)
        else:
            files[name] = file
    files |= _without_local_names(facts, parent)
    if source.report is not None:
        text = json.dumps(without_paths(json.loads(source.report.read_text("utf-8"))), indent=2, ensure_ascii=False)
        files[REPORT] = f"{text}\n".encode()
    if card or CARD not in files:
        files[CARD] = render_card(facts, parent, repo_id, dense).encode()
        files |= plot_files(facts)
    results = eval_results_file(facts, protocol(facts.report))
    if results is not None:
        files[EVAL_RESULTS] = results
    return RepoPlan(repo_id=repo_id, kind=source.kind.name, files=files, left_out=tuple(left_out), parent=parent)


def _without_local_names(facts: Facts, parent: Parent) -> dict[str, bytes]:
    """Configurations that name a folder of this machine, with the Hub id in its place.

    Raises:
        ConfigError: an adapter that nobody else could load.
    """
    changed = dict(facts.config)
    if facts.kind.name == "adapter":
        base = changed.get("base_model_name_or_path")
        if parent.hub_id is None:
            raise ConfigError(
                f"{facts.folder}: the adapter belongs on {base!r}, which is no Hub id, so that nobody could load it. "
                "Say which model of the Hub that is: base_model (--base-model) OWNER/NAME."
            )
        changed["base_model_name_or_path"] = parent.hub_id
    elif isinstance(changed.get(MANIFEST), dict) and "parent" in changed[MANIFEST]:
        changed[MANIFEST] = changed[MANIFEST] | {"parent": parent.hub_id or parent.name}
    if changed == facts.config:
        return {}
    return {facts.kind.settings: (json.dumps(changed, indent=2, sort_keys=True, ensure_ascii=False) + "\n").encode()}
