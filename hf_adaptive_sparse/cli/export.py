"""`hf-adaptive-sparse export`: save a sparse model packed, dense-stored or as masks; also one of another tool."""

import dataclasses
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from ..errors import ConfigError
from ..hf.adapter_config import AdaptiveSparseConfig
from ..hf.import_checkpoint import BRANCH_FOLDER, BRANCHES, check_branch, save_branch
from ..hf.inspection import inspect_folder
from ..hf.mask_application import apply_masks
from ..hf.masks import save_masks
from ..hf.pretrained import save_dense, save_packed
from ..hf.targets import resolve_targets
from ..patterns import NMPattern, parse_pattern
from ..reports import Report, write_report
from ..reports.text import human_bytes, percent
from . import PROGRAM
from .arguments import CommonArguments, borrowed
from .console import print_matrices, print_plan, say
from .export_source import ExportSource, Opened, find_source, open_source
from .measure import matrix_rows, prune_by_magnitude
from .output import check_inputs, check_output, command_line, versions, weight_bytes

FORMATS = {"packed": ("packed",), "dense": ("dense",), "both": ("dense", "packed"), "masks": ("masks",)}
ONE_SHOT = ("magnitude",)


@dataclass(kw_only=True)
class ExportArguments(CommonArguments):
    """Save a model whose linears are 2:4: packed (0.5625 of the bytes in 16 bit), dense-stored, or both.

    An adapter is merged into its base model first. MODEL may be a checkpoint of compressed-tensors, ModelOpt or the AST
    release, which is recognised and converted. With --format both, OUT gets dense/ and packed/. With --format masks it
    gets the masks alone, which --apply-masks puts on the base model again.
    """

    POSITIONAL: ClassVar[tuple[str, ...]] = ("model", "out")
    REQUIRED: ClassVar[tuple[str, ...]] = ("model", "out")

    model: str = field(
        default="", metadata={"help": "Folder, adapter folder or Hub id; or file or folder of another tool."}
    )
    out: str = field(default="", metadata={"help": "Folder to write."})
    format: str = field(default="packed", metadata={"help": f"One of {', '.join(FORMATS)}."})
    base: str | None = field(
        default=None,
        metadata={
            "help": "Folder or Hub id of the dense model that MODEL was made from: --format masks compares with it, "
            "and some checkpoints of other tools lack its configuration and tokenizer."
        },
    )
    apply_masks: str | None = field(
        default=None,
        metadata={
            "help": "Set weights of MODEL to zero first, by masks: folder or Hub id of --format masks, .npz archive of "
            "MaskLLM, or .safetensors or .pt file of 0 and 1."
        },
    )
    check_base: bool = field(
        default=True, metadata={"help": "Refuse masks of --apply-masks that were saved for another model."}
    )
    branch: str = field(
        default="keep",
        metadata={"help": "A SLoRB branch of the AST release: keep it as a LoRA adapter in OUT/slorb, or fold it in."},
    )
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
        for name, value, known in (("format", self.format, FORMATS), ("branch", self.branch, BRANCHES)):
            if value not in known:
                raise ConfigError(f"unknown {name} {value!r}; known: {', '.join(known)}.")
        if self.one_shot is not None and self.one_shot not in ONE_SHOT:
            raise ConfigError(f"unknown one_shot {self.one_shot!r}; known: {', '.join(ONE_SHOT)}.")
        if not isinstance(parse_pattern(self.pattern), NMPattern):
            raise ConfigError(f"export writes n:m patterns such as 2:4, got {self.pattern!r}.")
        if self.one_shot is None and self.target_modules is not None:
            raise ConfigError("target_modules says what one_shot prunes, which is not set. Set one_shot too.")
        if self.apply_masks is not None and self.one_shot is not None:
            raise ConfigError("apply_masks and one_shot both say what is pruned. Set one of them.")


ARGUMENTS = ExportArguments


def run(arguments: ExportArguments) -> int:
    """Load, convert, merge or prune if asked to, save, look at what was saved."""
    masks_only = arguments.format == "masks"
    source = find_source(arguments.model, arguments.base)
    if source.foreign is not None:
        check_branch(source.foreign, arguments.branch, packed=arguments.format in ("packed", "both"))
    output = check_output(arguments.out, arguments.overwrite)
    if source.foreign is None and arguments.base is not None and not masks_only:
        raise ConfigError("base is for --format masks, and for checkpoints of other tools. Leave it out.")
    keeps_branch = source.has_branch and arguments.branch == "keep"
    if keeps_branch and masks_only:
        raise ConfigError(
            f"{arguments.model}: has a SLoRB branch, which masks do not hold. Write --format packed or dense."
        )
    names = FORMATS[arguments.format]
    folders = {name: output / name if len(names) > 1 or keeps_branch else output for name in names}
    written = {**folders, **({BRANCH_FOLDER: output / BRANCH_FOLDER} if keeps_branch else {})}
    inputs = {
        "MODEL": arguments.model, "--base": arguments.base, "--apply-masks": arguments.apply_masks,
        "--config": arguments.config,
    }  # fmt: skip
    check_inputs(written.values(), inputs)
    plan = {
        "model": source.about,
        "first": _first(arguments, source),
        "output": ", ".join(f"{folder} ({name})" for name, folder in written.items()),
    }
    print_plan(f"{PROGRAM} export", plan, arguments.dry_run)
    if arguments.dry_run:
        return 0

    opened = open_source(source, arguments.branch, arguments.dtype, arguments.trust_remote_code)
    report = Report(
        title=f"Export of {arguments.model}", command=command_line("export"),
        settings=dataclasses.asdict(arguments), versions=versions(),
        summary=[f"{source.about}: {note}." for note in opened.notes],
    )  # fmt: skip
    _prune(arguments, opened, report)
    if keeps_branch:
        model_folder = next(iter(folders.values()))
        save_branch(opened.model, opened.factors, output / BRANCH_FOLDER, model_folder, arguments.overwrite)
        report.summary.append(
            f"{output / BRANCH_FOLDER}: the SLoRB branches of {len(opened.factors)} layers, as a LoRA adapter."
        )
    for name, folder in folders.items():
        _SAVE[name](arguments, opened, folder, report)
        protocol = Path(arguments.model) / "eval_protocol.json"
        if protocol.is_file():
            shutil.copyfile(protocol, folder / protocol.name)
        report.sizes[name] = weight_bytes(folder)
    report.matrices = matrix_rows(inspect_folder(folder))
    print_matrices(report.matrices)
    print("\n".join(["", *report.summary]))
    say(f"report: {write_report(report, output)}")
    return 0


def _first(arguments: ExportArguments, source: ExportSource) -> str:
    """What happens before anything is saved, for the plan."""
    steps = []
    if source.foreign is not None:
        steps.append("convert it")
        if source.has_branch:
            steps.append(f"{arguments.branch} its SLoRB branch")
    elif source.model is not None and source.model.kind == "adapter":
        steps.append("merge the adapter")
    if arguments.one_shot:
        steps.append(f"one-shot {arguments.one_shot} pruning to {arguments.pattern}")
    if arguments.apply_masks is not None:
        steps.append(f"apply the masks of {arguments.apply_masks}")
    return ", ".join(steps) or "nothing: weights are saved as they are"


def _prune(arguments: ExportArguments, opened: Opened, report: Report) -> None:
    if arguments.one_shot is not None:
        targets = arguments.target_modules
        config = AdaptiveSparseConfig(target_modules="all-linear" if targets == ["all-linear"] else targets)
        prune_by_magnitude(resolve_targets(opened.model, config), parse_pattern(arguments.pattern))
    if arguments.apply_masks is not None:
        applied = apply_masks(opened.model, arguments.apply_masks, check=arguments.check_base)
        result = {
            True: "The weights are those of the sparse model, to the last bit.",
            False: "The kept weights are not those of the sparse model: it was trained, or made from another base.",
            None: "Whether the weights are those of the sparse model cannot be told from such masks.",
        }[applied.exact]
        count = len(applied.masks)
        report.summary.append(f"{arguments.apply_masks} ({applied.format}): {count} masks applied. {result}")


def _save_packed(arguments: ExportArguments, opened: Opened, folder: Path, report: Report) -> None:
    _save_model(save_packed, arguments, opened, folder, report, quantized=opened.quantized)


def _save_dense(arguments: ExportArguments, opened: Opened, folder: Path, report: Report) -> None:
    _save_model(save_dense, arguments, opened, folder, report)


def _save_model(
    save: Callable[..., Any], arguments: ExportArguments, opened: Opened, folder: Path, report: Report, **options: Any
) -> None:
    saved = save(
        opened.model, folder, opened.tokenizer, max_shard_size=arguments.max_shard_size, overwrite=arguments.overwrite,
        provenance=opened.provenance, **options,
    )  # fmt: skip
    report.summary.append(
        f"{folder}: {len(saved.modules)} matrices are 2:4, and take {human_bytes(saved.module_bytes)} "
        f"({saved.module_bytes / max(1, saved.module_dense_bytes):.4f} of the dense bytes); "
        f"linear layers that stay dense: {len(saved.skipped)}."
    )


def _save_masks(arguments: ExportArguments, opened: Opened, folder: Path, report: Report) -> None:
    saved = save_masks(opened.model, folder, base=arguments.base, overwrite=arguments.overwrite)
    sparsity = sum(saved.masks.values()) / len(saved.masks)
    report.summary.append(
        f"{folder}: the masks of {len(saved.masks)} matrices, {percent(sparsity)} zeros on average, take "
        f"{human_bytes(saved.bits_bytes)}."
    )
    report.summary.append(
        f"{folder}: {saved.caution or 'the base model and these masks give this model back, to the last bit'}."
    )


_SAVE: dict[str, Callable[[ExportArguments, Opened, Path, Report], None]] = {
    "packed": _save_packed, "dense": _save_dense, "masks": _save_masks,
}  # fmt: skip
