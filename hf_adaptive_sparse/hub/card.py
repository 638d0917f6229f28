"""The model card: `template.md`, filled in with what is known. What is not known is left out, never guessed."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from ..reports import ModelRow, Report
from ..reports.text import DASH, human_bytes, human_count, number, percent
from .facts import Facts
from .metadata import metadata
from .methods import source
from .parents import Parent
from .privacy import without_paths
from .wording import introduction, limits

TEMPLATE = Path(__file__).with_name("template.md")
PLOTS = "plots"
# Settings of a run that did not decide its result, or that are said elsewhere in the card.
_HOUSEKEEPING = set(
    "config dry_run overwrite resume debug output_dir prompts device save offload model data eval_data split "
    "eval_split column trust_remote_code".split()
)


def render_card(facts: Facts, parent: Parent, repo_id: str, dense_repo: str | None = None) -> str:
    """The whole card, as Markdown with its metadata.

    Args:
        dense_repo: the dense-stored repository of the same model, which is pushed with it.
    """
    images = "\n\n".join(f"![{text}]({PLOTS}/{name}.png)\n\n*{text}*" for name, _, text in _plots(facts))
    layers = f"## Layer by layer\n\n{images}" if images else ""
    card = TEMPLATE.read_text(encoding="utf-8").format(
        metadata=metadata(facts, parent, repo_id, dense_repo).strip(),
        title=repo_id.partition("/")[2],
        introduction=introduction(facts, parent),
        plots=layers,
        use=_use(facts, parent, repo_id, dense_repo),
        results=_results(facts),
        size=_size(facts),
        made=_made(facts, parent),
        license=_license(parent),
        limits=limits(facts, parent),
        source=_source(facts),
    )
    return re.sub(r"\n{3,}", "\n\n", card).rstrip() + "\n"


def plot_files(facts: Facts) -> dict[str, bytes]:
    """The images of the card, by their paths in the repository."""
    # Here, since it imports matplotlib: seconds that who only loads a model need not wait.
    from ..reports import drawing, plots

    found = {
        f"{PLOTS}/{name}.png": drawing.as_png(getattr(plots, plot), data) for name, (plot, data), _ in _plots(facts)
    }
    return {path: image for path, image in found.items() if image is not None}


def protocol(report: Report | None) -> str:
    """How the perplexities were measured, as a sentence without its full stop; empty if that is not recorded."""
    if report is None:
        return ""
    data = without_paths(report.data)
    windows, length, text = (
        data.get(key) for key in ("evaluation windows", "tokens in a window", "evaluation text")
    )
    length = length or report.settings.get("window")
    if not windows or not length:
        return ""
    said = f"{windows} windows of {length} tokens"
    if text:
        said += f" of {text}" if "windows" not in str(text) else f", {text}"
    digest = data.get("evaluation text sha256") or data.get("heldout sha256")
    if digest is None:  # it is a part of the other text
        digest = data.get("training text sha256") or data.get("calibration text sha256")
    return said + (f" (sha256 of the text `{digest[:16]}...`)" if digest else "")


def _plots(facts: Facts) -> list[tuple[str, tuple[str, Any], str]]:
    """(name of the file, plot of `reports.plots` and its data, text below it): what differs between the layers."""
    report, found = facts.report, []
    if report is None:
        return []
    sparsities = [row.sparsity for row in report.pruning]
    if sparsities and max(sparsities) - min(sparsities) > 0.01:
        found.append(("sparsity", ("sparsity_map", report.pruning), "Zeros in every pruned matrix."))
    if any(row.error is not None for row in report.pruning):
        text = "Squared error of the outputs of every matrix, as a part of the dense outputs, on the calibration text."
        found.append(("errors", ("error_curves", report.pruning), text))
    if report.widths:
        found.append(("widths", ("width_bars", report.widths), "What is left of every block."))
    if report.flips:
        text = "How much of every matrix's mask changed at each of its refreshes in training."
        found.append(("masks", ("flip_map", report.flips), text))
    return found


def _use(facts: Facts, parent: Parent, repo_id: str, dense_repo: str | None) -> str:
    lines = []
    base = parent.hub_id or parent.name or "the base model"
    for line in facts.kind.use.format(repo=repo_id, base=base, tokenizer="TOKENIZER").splitlines():
        if line.endswith("  # TOKENIZER"):
            line = line.removesuffix("  # TOKENIZER")
            if not facts.has_tokenizer:
                line = line.replace(repo_id, base) if parent.hub_id else ""
        if "import hf_adaptive_sparse" in line and not facts.needs_import:
            continue
        lines.append(line)
    if facts.needs_import and not any("import hf_adaptive_sparse" in line for line in lines):
        lines.insert(0, "import hf_adaptive_sparse  # it registers the class of this model")
    code = "\n".join(lines).strip("\n")
    if "AutoTokenizer.from_pretrained" not in code:
        code = code.replace(", AutoTokenizer", "")
    install = "hf_adaptive_sparse" if facts.needs_import else facts.kind.library
    also = ""
    if dense_repo is not None:
        also = "\n\nThe same model, dense-stored, for engines without this package: "
        also += f"[{dense_repo}](https://huggingface.co/{dense_repo})."
    note = f"\n\n{facts.kind.note}" if facts.kind.note else ""
    return f"```\npip install {install}\n```\n\n```python\n{code}\n```{note}{also}"


def _results(facts: Facts) -> str:
    report = facts.report
    if report is None:
        return ""
    parts = []
    if facts.result is not None:
        parts.append(_models_table(report.models))
        said = protocol(report)
        parts.append(
            (f"Perplexity, lower is better: {said}. " if said else "Perplexity, lower is better. ")
            + "The last row is this model. Compare it with its own dense model, measured in the same run, and not with "
            "models that have another tokenizer."
        )
    if report.tasks:
        tasks = report.tasks.items()
        rows = [(task, metric, number(value)) for task, metrics in tasks for metric, value in metrics.items()]
        parts.append(_table(("task", "metric", "value"), rows))
    return "\n\n".join(["## Results", *parts]) if parts else ""


def _models_table(models: list[ModelRow]) -> str:
    columns = {
        "model": [row.name for row in models],
        "perplexity": [number(row.perplexity) for row in models],
        "bits per byte": [number(row.bits_per_byte) for row in models],
        "zeros in the sparse layers": [percent(row.sparsity) for row in models],
        "parameters": [human_count(row.parameters) for row in models],
        "tokens trained": [human_count(row.tokens) for row in models],
    }
    columns = {name: cells for name, cells in columns.items() if any(cell != DASH for cell in cells)}
    return _table(tuple(columns), list(zip(*columns.values(), strict=True)))


def _size(facts: Facts) -> str:
    stored = facts.stored
    if stored is None:
        return ""
    rows = []
    dense = None if facts.report is None else facts.report.sizes.get("dense model")
    if dense:
        rows.append(("weights of the dense model", f"{dense:,}", ""))
    part = f"{stored.nbytes / stored.dense_nbytes:.4f} of its own dense form" if stored.packed else ""
    rows.append(("tensors of this repository", f"{stored.nbytes:,}", part))
    if stored.packed:
        packed = sum(matrix.nbytes for matrix in stored.packed)
        as_dense = packed + stored.dense_nbytes - stored.nbytes
        rows.append(("of these, packed matrices", f"{packed:,}", f"{packed / as_dense:.4f} of their dense bytes"))
    head = ("what", "bytes", "") if part else ("what", "bytes")
    table = _table(head, [row[: len(head)] for row in rows])
    count = "" if facts.kind.name == "adapter" else f"\n\n{stored.parameters:,} parameters"
    count += ", zeros included." if count and facts.pruned else "." if count else ""
    return f"## Size\n\n{table}{count}"


def _made(facts: Facts, parent: Parent) -> str:
    report = facts.report
    base = parent.name if parent.hub_id is None else f"[{parent.hub_id}](https://huggingface.co/{parent.hub_id})"
    lines = [] if base is None else [f"- **Base model**: {base}"]
    if report is not None:
        data = without_paths(report.data)
        lines += [f"- **{key[0].upper()}{key[1:]}**: {_cell(value)}" for key, value in data.items()]
        if facts.result is not None and facts.result.tokens:
            lines.append(f"- **Tokens trained on**: {facts.result.tokens:,}")
        if report.versions:
            versions = ", ".join(f"{name} {version}" for name, version in report.versions.items())
            lines.append(f"- **Versions**: {versions}")
        if report.command:
            lines.append(f"- **Command**: `{without_paths(report.command)}`")
    settings = _parameters(facts)
    if settings:
        table = _table(("parameter", "value"), [(f"`{name}`", _cell(value)) for name, value in settings.items()])
        summary = f"<summary>All {len(settings)} parameters of the method</summary>"
        lines.append(f"\n<details>{summary}\n\n{table}\n\n</details>")
    if not lines:
        return ""
    return "## How it was made\n\n" + "\n".join(lines)


def _parameters(facts: Facts) -> dict[str, Any]:
    if facts.report is not None and facts.settings:
        found = {key: value for key, value in facts.settings.items() if key not in _HOUSEKEEPING}
    elif facts.kind.name == "adapter":
        found = {key: value for key, value in facts.config.items() if key != "base_model_name_or_path"}
    else:
        found = dict(facts.config.get("adaptive_sparse") or {})
        found = {key: value for key, value in found.items() if key not in ("modules", "producer")}
    return {key: value for key, value in without_paths(found).items() if value not in (None, "", [], {})}


def _license(parent: Parent) -> str:
    if not parent.license:
        return parent.said
    name: Any = parent.license.get("license_name") or parent.license["license"]
    name = ", ".join(name) if isinstance(name, list) else name
    link = parent.license.get("license_link")
    shown = f"[{name}]({link})" if link and "://" in link else f"`{name}`"
    return f"{shown}. {parent.said} It holds for the pruned weights as for those they were made of."


def _source(facts: Facts) -> str:
    paper = source(facts)
    lines = ["## Source", ""] + ([f"Method: {paper}.", ""] if paper else [])
    version = "" if facts.report is None else facts.report.versions.get("hf_adaptive_sparse", "")
    kept = " The facts of the run are in `report.json`." if facts.report is not None else ""
    return "\n".join([*lines, f"Made with `hf_adaptive_sparse`{f' {version}' if version else ''}.{kept}"])


def _table(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    line = "|---|" + "---:|" * (len(head) - 1) if head != ("parameter", "value") else "|---|---|"
    body = ["| " + " | ".join(_cell(cell) for cell in row) + " |" for row in rows]
    return "\n".join(["| " + " | ".join(head) + " |", line, *body])


def _cell(value: Any) -> str:
    if isinstance(value, list):
        value = ", ".join(map(str, value))
    if isinstance(value, dict):
        value = ", ".join(f"{key}: {entry}" for key, entry in value.items())
    return human_bytes(None) if value is None else " ".join(str(value).replace("|", "\\|").split())
