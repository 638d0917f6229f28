"""The YAML at the head of a card, and the files below `.eval_results`: what a Hub reads, searches and ranks by."""

from __future__ import annotations

import math
from typing import Any

import yaml
from huggingface_hub import EvalResult, EvalResultEntry, ModelCardData, eval_result_entries_to_yaml

from .facts import Facts
from .parents import Parent

EVAL_RESULTS = ".eval_results/hf_adaptive_sparse.yaml"
_TASK = "text-generation"
_ALWAYS = ("hf_adaptive_sparse", "pruning")


def metadata(facts: Facts, parent: Parent, repo_id: str, dense_repo: str | None = None) -> str:
    """The metadata of a card, as YAML.

    Args:
        dense_repo: the dense-stored repository of the same model, which a packed one is a quantised form of.
    """
    results = eval_results(facts)
    base = dense_repo or parent.hub_id
    licenses: dict[str, Any] = dict(parent.license) or {"license": "unknown"}
    data = ModelCardData(
        base_model=base,
        **({"base_model_relation": facts.kind.relation} if base else {}),
        datasets=_datasets(facts) or None,
        library_name=facts.kind.library,
        pipeline_tag=_TASK,
        tags=tags(facts),
        model_name=repo_id.partition("/")[2] if results else None,
        eval_results=results or None,
        **licenses,
    )
    return data.to_yaml()


def tags(facts: Facts) -> list[str]:
    """How the model can be found."""
    found = [*_ALWAYS, *facts.kind.tags]
    if facts.pruned:
        found.append("weight-sparsity")
    if facts.is_two_four:
        found.append("2:4")
    quantized = {matrix.value_bits for matrix in facts.pruned if matrix.value_bits is not None}
    found += [f"int{bits}" for bits in sorted(quantized)]
    return list(dict.fromkeys(found))


def eval_results(facts: Facts) -> list[EvalResult]:
    """What was measured, for `model-index`."""
    row, found = facts.result, []
    if row is not None and facts.report is not None:
        name = facts.hub_dataset("eval_data") or facts.hub_dataset("data")
        text = name or "local text"
        values = {"perplexity": row.perplexity, "bits_per_byte": row.bits_per_byte}
        for metric, value in values.items():
            if value is not None and math.isfinite(value):
                found.append(
                    EvalResult(
                        task_type=_TASK, dataset_type=name or "text", dataset_name=f"{text}, held out",
                        metric_type=metric, metric_name=metric.replace("_", " "), metric_value=round(value, 6),
                    )
                )  # fmt: skip
    for task, metrics in ({} if facts.report is None else facts.report.tasks).items():
        for metric, value in metrics.items():
            if isinstance(value, (int, float)) and math.isfinite(value):
                found.append(
                    EvalResult(
                        task_type=_TASK, dataset_type=task, dataset_name=task, metric_type=metric, metric_value=value
                    )
                )  # fmt: skip
    return found


def eval_results_file(facts: Facts, protocol: str) -> bytes | None:
    """The results on a dataset of the Hub, as a file of `.eval_results`; None where the text was no such dataset."""
    row, dataset = facts.result, facts.hub_dataset("eval_data") or facts.hub_dataset("data")
    if row is None or dataset is None or row.perplexity is None or not math.isfinite(row.perplexity):
        return None
    entry = EvalResultEntry(
        dataset_id=dataset, task_id="perplexity", value=round(row.perplexity, 6), notes=protocol or None
    )
    return yaml.safe_dump(eval_result_entries_to_yaml([entry]), sort_keys=False, allow_unicode=True).encode()


def _datasets(facts: Facts) -> list[str]:
    return [name for name in (facts.hub_dataset("data"),) if name is not None]
