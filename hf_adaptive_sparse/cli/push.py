"""`hf-adaptive-sparse push`: publish a sparse model on a Hub, with its filled-in model card."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

from huggingface_hub import HfApi

from ..errors import ConfigError
from ..hub.push import PACKED_SUFFIX, RepoPlan, check_repo_id, find_token, plan_push, push_to_hub
from ..hub.sources import model_folders
from ..reports.text import human_bytes
from . import PROGRAM
from .arguments import CommonArguments
from .console import print_plan, say

FORMATS: dict[str, bool | str | None] = {"auto": None, "packed": True, "dense": False, "both": "both"}
_LOOKING = "looking at the weights, and for the card of the base model ..."


@dataclass(kw_only=True)
class PushArguments(CommonArguments):
    """Publish a model on a Hub: all files in one commit, with a card that says what was done and what was measured.

    The token comes from HF_TOKEN or `hf auth login`; HF_ENDPOINT names another Hub. A push that was cut short leaves
    the repository as it was: the same command does what is left, and nothing where nothing has changed.
    """

    POSITIONAL: ClassVar[tuple[str, ...]] = ("path", "repo")
    REQUIRED: ClassVar[tuple[str, ...]] = ("path", "repo")

    path: str = field(
        default="", metadata={"help": "Output folder of train, prune, shrink or export, or a model or adapter folder."}
    )
    repo: str = field(default="", metadata={"help": "OWNER/NAME; made if it is not there."})
    format: str = field(
        default="auto",
        metadata={
            "help": f"One of {', '.join(FORMATS)}. auto: as PATH is, packed where there is a choice. both: "
            f"dense-stored in REPO, packed in REPO{PACKED_SUFFIX}."
        },
    )
    private: bool = field(default=False, metadata={"help": "Make a new repository private; one that is there must be."})
    token: str | None = field(
        default=None,
        metadata={"help": "Access token (of `hf auth login`). Better set HF_TOKEN: a command line is seen and kept."},
    )
    revision: str | None = field(default=None, metadata={"help": "Branch, made if it is not there (main)."})
    create_pr: bool = field(default=False, metadata={"help": "Propose the change as a pull request."})
    message: str | None = field(default=None, metadata={"help": "First line of the commit."})
    base_model: str | None = field(
        default=None, metadata={"help": "Hub id of the dense model (as the report or the configuration says)."}
    )
    license: str | None = field(
        default=None, metadata={"help": "Licence id for the card, such as apache-2.0 (that of the base model's card)."}
    )
    report: str | None = field(default=None, metadata={"help": "report.json of the run (that beside the model)."})
    keep_card: bool = field(default=False, metadata={"help": "Push the README.md of the folder and write no card."})

    def __post_init__(self) -> None:
        if self.format not in FORMATS:
            raise ConfigError(f"unknown format {self.format!r}; known: {', '.join(FORMATS)}.")


ARGUMENTS = PushArguments


def run(arguments: PushArguments) -> int:
    """Show what goes where; then bring it there."""
    check_repo_id(arguments.repo)
    model_folders(Path(arguments.path).expanduser())
    token = None if arguments.dry_run else find_token(arguments.token)
    options = {
        "packed": FORMATS[arguments.format], "base_model": arguments.base_model, "license": arguments.license,
        "report": arguments.report, "card": not arguments.keep_card,
    }  # fmt: skip
    api = HfApi()
    if arguments.dry_run:
        say(_LOOKING)
        with plan_push(arguments.path, arguments.repo, api=api, **options) as plans:
            for plan in plans:
                _show(plan, api.endpoint, arguments)
        return 0
    print_plan(f"{PROGRAM} push", _settings(arguments, api.endpoint), dry_run=False)
    say(_LOOKING)
    pushed = push_to_hub(
        arguments.path, arguments.repo, private=arguments.private or None, token=token, revision=arguments.revision,
        create_pr=arguments.create_pr, commit_message=arguments.message, **options,
    )  # fmt: skip
    for repo in pushed:
        print(f"{repo.url}: {repo.kind}, commit {repo.commit}{'' if repo.changed else ' (nothing had changed)'}")
    return 0


def _settings(arguments: PushArguments, endpoint: str) -> dict[str, object]:
    seen = "private" if arguments.private else "everybody sees a new repository"
    where = "as a pull request" if arguments.create_pr else f"branch {arguments.revision or 'main'}"
    return {
        "model": arguments.path,
        "to": f"{endpoint}/{arguments.repo}, {where}; {seen}",
        "format": arguments.format,
    }


def _show(plan: RepoPlan, endpoint: str, arguments: PushArguments) -> None:
    sizes = plan.sizes
    lines: dict[str, object] = _settings(arguments, endpoint) | {
        "to": f"{endpoint}/{plan.repo_id}",
        "format": plan.kind,
        "files": f"{len(sizes)}, {human_bytes(sum(sizes.values()))}",
    }
    lines |= {f"- {name}": f"{size:,} bytes" for name, size in sizes.items()}
    if plan.left_out:
        lines["left out"] = ", ".join(plan.left_out)
    print_plan(f"{PROGRAM} push", lines, dry_run=True)
    print(f"\n{plan.card}")
    if not plan.parent.license:
        say(f"the card names no licence. {plan.parent.said} Or say which: --license.")
