"""`hf-adaptive-sparse inspect`: what is sparse in a folder, how much, and is it valid 2:4."""

import dataclasses
import json
from dataclasses import dataclass, field
from typing import Any, ClassVar

from ..errors import ConfigError, FormatError
from ..hf.inspection import FolderReport, inspect_folder
from ..reports import FindingRow, Report, write_report
from ..reports.text import human_bytes
from . import PROGRAM
from .arguments import CommonArguments
from .console import print_matrices, print_plan, say
from .measure import matrix_rows
from .models import find_model
from .output import check_output, clear, command_line, versions
from .verdict import print_verdict

_NEARLY = 0.45  # from here on a matrix that is not 2:4 was perhaps meant to be


@dataclass(kw_only=True)
class InspectArguments(CommonArguments):
    """List every weight matrix of a model folder: shape, dtype, zeros, whether it is 2:4, and stored bytes.

    The weights are read from the files, without building the model. A damaged packed folder is an error.
    """

    POSITIONAL: ClassVar[tuple[str, ...]] = ("path",)
    REQUIRED: ClassVar[tuple[str, ...]] = ("path",)

    path: str = field(
        default="",
        metadata={"help": "Folder of a model, of an adapter or of masks; or file or folder of another tool."},
    )
    json: bool = field(default=False, metadata={"help": "Print JSON instead of a table."})
    output_dir: str | None = field(default=None, metadata={"help": "Folder for report.json and report.html."})


ARGUMENTS = InspectArguments


def run(arguments: InspectArguments) -> int:
    """Read, print, and report if asked to."""
    source = find_model(arguments.path, "PATH", only_models=False)
    if not source.is_local:
        raise ConfigError(
            f"PATH {arguments.path}: no such folder, and inspect reads local ones. Fetch a model from the "
            f"Hub first: hf download {arguments.path} --local-dir FOLDER."
        )
    output = None if arguments.output_dir is None else check_output(arguments.output_dir, arguments.overwrite)
    plan = {
        "folder": f"{source.name} ({source.kind})",
        "output": "the screen only" if output is None else f"{output}: report.json, report.html",
    }
    print_plan(f"{PROGRAM} inspect", plan, arguments.dry_run, quiet=arguments.json)
    if arguments.dry_run:
        return 0

    found = inspect_folder(source.name)
    if found.problem is not None:
        raise FormatError(found.problem)
    report = Report(
        title=f"Inspection of {arguments.path}", command=command_line("inspect"), summary=summary(found),
        matrices=matrix_rows(found), findings=findings(found), provenance=found.provenance,
        settings=dataclasses.asdict(arguments), versions=versions(),
        sizes={"as stored": found.nbytes} | ({"as dense": found.dense_nbytes} if found.packed else {}),
    )  # fmt: skip
    if output is not None:
        clear(output, ("report.json", "report.html"))
        say(f"report: {write_report(report, output)}")
    if arguments.json:
        print(json.dumps(as_json(found), indent=2))
    else:
        print_matrices(report.matrices)
        print_verdict(report)
    return 0


def findings(found: FolderReport) -> list[FindingRow]:
    """What a person should look at, matrix by matrix."""
    rows = []

    def add(module: str, what: str, where: str, count: int) -> None:
        rows.append(FindingRow(module=module.removesuffix(".weight"), what=what, where=where, count=count))

    for matrix in found.matrices:
        name, rows_before = matrix.name, matrix.first_same_row
        if matrix.non_finite:
            add(name, "NaN or infinite values", "", matrix.non_finite)
        if matrix.violations and (name in found.claimed or matrix.sparsity >= _NEARLY):
            row, group = matrix.first_violation or (0, 0)
            first = f"the first is row {row}, group {group} (inputs {4 * group} to {4 * group + 3})"
            said = "the configuration says it is 2:4" if name in found.claimed else "half of it is zeros"
            add(name, "groups with more than two values", f"{first}; {said}", matrix.violations)
        if matrix.negative_zeros:
            add(name, "zeros stored as -0.0", "some compressors take them for values", matrix.negative_zeros)
        if matrix.zero_rows:
            where = "outputs that are 0, or the bias; of an embedding, tokens without a vector"
            add(name, "rows of zeros", where, matrix.zero_rows)
        if rows_before is not None:
            where = f"the first is row {rows_before[0]}, the same as row {rows_before[1]}"
            add(name, "rows that repeat an earlier one", where, matrix.same_rows)
        if matrix.same_as is not None:
            add(name, "is a copy", f"the same as {matrix.same_as.removesuffix('.weight')}", 1)
    for name in sorted(found.claimed - {matrix.name for matrix in found.matrices}):
        add(name, "is missing", "the configuration says it is 2:4", 1)
    return rows


def summary(found: FolderReport) -> list[str]:
    """The whole folder in a few lines."""
    lines = [
        f"{found.kind}: {found.parameters:,} parameters, {len(found.two_four)} of {len(found.matrices)} "
        f"matrices are 2:4, {len(found.packed)} are packed; {human_bytes(found.nbytes)} of tensors."
    ]
    if found.packed:
        stored = sum(matrix.nbytes for matrix in found.packed)
        dense = stored + found.dense_nbytes - found.nbytes
        lines.append(
            f"Packed matrices take {stored:,} bytes, {stored / dense:.4f} of the {dense:,} that they take as "
            f"dense matrices; all tensors together {found.nbytes / found.dense_nbytes:.4f}."
        )
    quantized = [matrix for matrix in found.packed if matrix.value_bits is not None]
    if quantized:
        bits = sorted({f"{matrix.value_bits} bits" for matrix in quantized})
        lines.append(
            f"Values of {len(quantized)} matrices are stored as codes ({' and '.join(bits)}); their scales take "
            f"{sum(matrix.scale_nbytes for matrix in quantized):,} bytes of this."
        )
    lines += [f"{found.path}: {note}." for note in found.notes]
    if found.tied:
        lines.append("The output head is the input embedding (tied), and is stored once.")
    for matrix in found.matrices:
        if matrix.non_finite:
            lines.append(f"{matrix.name}: {matrix.non_finite} of {matrix.elements} values are NaN or infinite.")
    return lines


def as_json(found: FolderReport) -> dict[str, Any]:
    """What a program may want to know, under names that stay."""
    return {
        "path": str(found.path),
        "kind": found.kind,
        "parameters": found.parameters,
        "bytes": found.nbytes,
        "dense_bytes": found.dense_nbytes,
        "notes": list(found.notes),
        "tied": found.tied,
        "provenance": found.provenance,
        "matrices": [
            {
                "name": matrix.name,
                "shape": list(matrix.shape),
                "dtype": matrix.dtype,
                "stored": matrix.stored,
                "value_bits": matrix.value_bits,
                "bytes": matrix.nbytes,
                "scale_bytes": matrix.scale_nbytes,
                "sparsity": matrix.sparsity,
                "zeros": matrix.zeros,
                "two_four": None if matrix.violations is None else matrix.is_two_four,
                "violations": matrix.violations,
                "first_violation": matrix.first_violation,
                "negative_zeros": matrix.negative_zeros,
                "non_finite": matrix.non_finite,
                "claimed_two_four": matrix.name in found.claimed,
                "zero_rows": matrix.zero_rows,
                "same_rows": matrix.same_rows,
                "first_same_row": matrix.first_same_row,
                "same_as": matrix.same_as,
            }
            for matrix in found.matrices
        ],
    }
