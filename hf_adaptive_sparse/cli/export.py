"""`hf-adaptive-sparse export`: save a sparse model packed (smaller) or dense-stored (opens everywhere)."""

import dataclasses
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

from peft import PeftModel

from ..errors import ConfigError
from ..hf.adapter_config import AdaptiveSparseConfig
from ..hf.inspection import inspect_folder
from ..hf.pretrained import save_dense, save_packed
from ..hf.targets import resolve_targets
from ..patterns import NMPattern, parse_pattern
from ..reports import Report, write_report
from ..reports.text import human_bytes
from . import PROGRAM
from .arguments import CommonArguments, borrowed
from .console import print_matrices, print_plan, say
from .measure import matrix_rows, prune_by_magnitude
from .models import find_model, load_model, load_tokenizer
from .output import check_output, command_line, versions, weight_bytes

FORMATS = {"packed": {"packed": save_packed}, "dense": {"dense": save_dense}}
FORMATS["both"] = FORMATS["dense"] | FORMATS["packed"]
ONE_SHOT = ("magnitude",)


@dataclass(kw_only=True)
class ExportArguments(CommonArguments):
    """Save a model whose linears are 2:4: packed (0.5625 of the bytes in 16 bit), dense-stored, or both.

    An adapter is merged into its base model first. With --format both, OUT gets dense/ and packed/.
    """

    POSITIONAL: ClassVar[tuple[str, ...]] = ("model", "out")
    REQUIRED: ClassVar[tuple[str, ...]] = ("model", "out")

    model: str = field(default="", metadata={"help": "Folder, adapter folder or Hub id."})
    out: str = field(default="", metadata={"help": "Folder to write."})
    format: str = field(default="packed", metadata={"help": f"One of {', '.join(FORMATS)}."})
    one_shot: str | None = field(
        default=None, metadata={"help": f"Prune the model first, without training: {', '.join(ONE_SHOT)}."}
    )
    pattern: str = borrowed(AdaptiveSparseConfig, "pattern", help="Pattern of --one-shot.")
    target_modules: list[str] | None = field(
        default=None,
        metadata={"help": "Names of the linears that --one-shot prunes, or all-linear."},
    )
    dtype: str = field(default="auto", metadata={"help": "To save in: auto (as stored), float32, bfloat16, float16."})
    max_shard_size: str = field(default="5GB", metadata={"help": "Largest weight file."})
    trust_remote_code: bool = field(default=False, metadata={"help": "Run code that comes with the model."})

    def __post_init__(self) -> None:
        if self.format not in FORMATS:
            raise ConfigError(f"unknown format {self.format!r}; known: {', '.join(FORMATS)}.")
        if self.one_shot is not None and self.one_shot not in ONE_SHOT:
            raise ConfigError(f"unknown one_shot {self.one_shot!r}; known: {', '.join(ONE_SHOT)}.")
        if not isinstance(parse_pattern(self.pattern), NMPattern):
            raise ConfigError(f"export writes n:m patterns such as 2:4, got {self.pattern!r}.")
        if self.one_shot is None and self.target_modules is not None:
            raise ConfigError("target_modules says what one_shot prunes, which is not set. Set one_shot too.")


ARGUMENTS = ExportArguments


def run(arguments: ExportArguments) -> int:
    """Load, merge or prune if asked to, save, look at what was saved."""
    source = find_model(arguments.model)
    output = check_output(arguments.out, arguments.overwrite)
    saves = FORMATS[arguments.format]
    folders = {name: output / name if len(saves) > 1 else output for name in saves}
    plan = {
        "model": f"{source.name} ({source.kind})",
        "first": f"one-shot {arguments.one_shot} pruning to {arguments.pattern}" if arguments.one_shot
        else "merge the adapter" if source.kind == "adapter" else "nothing: weights are saved as they are",
        "output": ", ".join(f"{folder} ({name})" for name, folder in folders.items()),
    }  # fmt: skip
    print_plan(f"{PROGRAM} export", plan, arguments.dry_run)
    if arguments.dry_run:
        return 0

    # On the CPU: nothing is computed, and a model that is only copied need not fit the accelerator.
    model = load_model(source, arguments.dtype, "cpu", arguments.trust_remote_code)
    tokenizer = load_tokenizer(source, arguments.trust_remote_code)
    if isinstance(model, PeftModel):
        model = model.merge_and_unload()
    if arguments.one_shot is not None:
        targets = arguments.target_modules
        config = AdaptiveSparseConfig(target_modules="all-linear" if targets == ["all-linear"] else targets)
        prune_by_magnitude(resolve_targets(model, config), parse_pattern(arguments.pattern))
    report = Report(
        title=f"Export of {arguments.model}", command=command_line("export"),
        settings=dataclasses.asdict(arguments), versions=versions(),
    )  # fmt: skip
    for name, folder in folders.items():
        saved = saves[name](
            model, folder, tokenizer, max_shard_size=arguments.max_shard_size, overwrite=arguments.overwrite
        )
        protocol = Path(source.name) / "eval_protocol.json"
        if protocol.is_file():
            shutil.copyfile(protocol, folder / protocol.name)
        report.sizes[name] = weight_bytes(folder)
        report.summary.append(
            f"{folder}: {len(saved.modules)} matrices are 2:4, and take {human_bytes(saved.module_bytes)} "
            f"({saved.module_bytes / max(1, saved.module_dense_bytes):.4f} of the dense bytes); "
            f"linear layers that stay dense: {len(saved.skipped)}."
        )
    report.matrices = matrix_rows(inspect_folder(folder))
    print_matrices(report.matrices)
    print("\n".join(["", *report.summary]))
    say(f"report: {write_report(report, output)}")
    return 0
