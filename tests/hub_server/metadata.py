"""What the Hub checks of a model card before it takes it: the YAML at its head."""

from __future__ import annotations

import re
from typing import Any

import yaml

_HEAD = re.compile(r"\A---[ \t]*\r?\n(.*?)^---[ \t]*$", re.DOTALL | re.MULTILINE)
_REPO = re.compile(r"[\w.-]+(/[\w.-]+)?")
_RELATIONS = ("adapter", "merge", "quantized", "finetune")
_LICENSES = set(
    "apache-2.0 mit openrail bigscience-openrail-m creativeml-openrail-m bigscience-bloom-rail-1.0 bigcode-openrail-m "
    "afl-3.0 artistic-2.0 bsl-1.0 bsd bsd-2-clause bsd-3-clause c-uda cc cc0-1.0 cc-by-2.0 cc-by-3.0 cc-by-4.0 "
    "cc-by-sa-3.0 cc-by-sa-4.0 cc-by-nc-4.0 cc-by-nc-sa-4.0 cc-by-nc-nd-4.0 ecl-2.0 epl-2.0 gpl gpl-2.0 gpl-3.0 "
    "lgpl lgpl-3.0 agpl-3.0 isc llama2 llama3 llama3.1 llama3.2 llama3.3 llama4 gemma mpl-2.0 ms-pl odbl pddl "
    "unlicense wtfpl zlib unknown other".split()
)


def card_data(card: str) -> dict[str, Any]:
    """The metadata of a card; empty where it has none or they cannot be read."""
    match = _HEAD.match(card)
    try:
        found = yaml.safe_load(match[1]) if match else None
    except yaml.YAMLError:
        return {}
    return found if isinstance(found, dict) else {}


def complaints(card: str) -> tuple[list[str], list[str]]:
    """(errors, warnings) about a card."""
    match = _HEAD.match(card)
    if match is None:
        return [], ["empty or missing yaml metadata in repo card"]
    try:
        data = yaml.safe_load(match[1])
    except yaml.YAMLError as problem:
        return [f"YAML Metadata Error: {problem}"], []
    if not isinstance(data, dict):
        return ["YAML Metadata Error: must be an object"], []
    return [*_wrong_values(data), *_wrong_index(data.get("model-index"))], []


def _wrong_values(data: dict[str, Any]) -> list[str]:
    found = []
    licenses = data.get("license", [])
    for each in licenses if isinstance(licenses, list) else [licenses]:
        if each not in _LICENSES:
            found.append(f'"license" must be one of the known ones, got {each!r}')
    bases = data.get("base_model", [])
    for each in bases if isinstance(bases, list) else [bases]:
        if not isinstance(each, str) or _REPO.fullmatch(each) is None:
            found.append(f'"base_model" with value {each!r} is not valid. Use a model id from the Hub')
    if data.get("base_model_relation", "finetune") not in _RELATIONS:
        found.append(f'"base_model_relation" must be one of {_RELATIONS}')
    tags = data.get("tags", [])
    if not isinstance(tags, list) or not all(isinstance(tag, str) for tag in tags):
        found.append('"tags" must be a list of strings')
    for key in ("library_name", "pipeline_tag"):
        if key in data and not isinstance(data[key], str):
            found.append(f'"{key}" must be a string')
    return found


def _wrong_index(index: Any) -> list[str]:
    if index is None:
        return []
    try:
        for model in index:
            assert isinstance(model["name"], str)
            for result in model["results"]:
                assert isinstance(result["task"]["type"], str)
                assert isinstance(result["dataset"]["type"], str)
                assert isinstance(result["dataset"]["name"], str)
                for metric in result["metrics"]:
                    assert isinstance(metric["type"], str) and metric["value"] is not None
    except (AssertionError, KeyError, TypeError) as problem:
        return [f'"model-index" is not valid: {problem!r}']
    return []


def wrong_eval_results(path: str, text: str) -> list[str]:
    """What is wrong with a file below `.eval_results`."""
    try:
        for entry in yaml.safe_load(text):
            assert isinstance(entry["dataset"]["id"], str) and _REPO.fullmatch(entry["dataset"]["id"])
            assert isinstance(entry["dataset"]["task_id"], str)
            assert entry["value"] is not None
            if "source" in entry:
                assert entry["source"]["url"].startswith("https://")
    except (AssertionError, KeyError, TypeError, yaml.YAMLError) as problem:
        return [f"{path}: {problem!r}"]
    return []
