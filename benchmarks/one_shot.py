"""One-shot pruning quality: perplexity by model, method, pattern and seed, with the dense model in every table.

    python benchmarks/one_shot.py --models stories260K --methods sparsegpt balanced --patterns 2:4 0.5 --seeds 0
    python benchmarks/one_shot.py --table

Each run appends one line to benchmarks/results/one_shot.jsonl; runs that are in it already are skipped, and --table
prints mean and spread of all lines. A pattern is an n:m name, mixed (dense, 2:4 or 1:4 a matrix, 50 % in all), or a
fraction for unstructured sparsity. Calibration: 128 windows of 256 tokens of tinystories/train.txt, the first ones for
seed 0, others drawn at random, none of them among its last 200 windows, on which the presets were chosen (--evaluate
selection). Reported: tinystories/valid.txt by the protocol of the README.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_adaptive_sparse.hf.data import WindowDataset, load_documents, split_windows, token_windows
from hf_adaptive_sparse.hf.evaluation import perplexity
from hf_adaptive_sparse.hf.one_shot import one_shot
from hf_adaptive_sparse.methods.one_shot import METHODS, OneShotConfig

ROOT = Path(__file__).resolve().parents[1]
SHARED = ROOT.parent / "shared"
TEXT = SHARED / "data" / "tinystories"
RESULTS = ROOT / "benchmarks" / "results" / "one_shot.jsonl"
WINDOWS = 128
HELD_OUT = 200
KEYS = ("model", "method", "pattern", "sparsity", "seed", "set", "evaluated on")


def windows(model: str, text: str) -> WindowDataset:
    tokenizer = AutoTokenizer.from_pretrained(SHARED / "models" / model)
    return token_windows(load_documents(str(TEXT / f"{text}.txt")), tokenizer, 256)


def calibration(train: WindowDataset, seed: int) -> WindowDataset:
    if seed == 0:
        return train.select(range(WINDOWS))
    order = torch.randperm(len(train), generator=torch.Generator().manual_seed(seed))
    return train.select(order[:WINDOWS].tolist())


def config_of(method: str, pattern: str, changes: dict) -> OneShotConfig:
    if ":" in pattern or pattern == "mixed":
        return OneShotConfig(method=method, pattern=pattern, **changes)
    return OneShotConfig(method=method, pattern="unstructured", sparsity=float(pattern), **changes)


def run(name: str, text: dict[str, WindowDataset], method: str, pattern: str, seed: int, changes: dict) -> dict:
    """`text`: "train", and the one to judge by."""
    model = AutoModelForCausalLM.from_pretrained(SHARED / "models" / name, dtype=torch.float32)
    config = config_of(method, pattern, changes)
    started = time.perf_counter()
    report = one_shot(model, calibration(text["train"], seed), config, seed=seed)
    seconds = time.perf_counter() - started
    (judge,) = set(text) - {"train"}
    found = perplexity(model, text[judge]).perplexity
    errors = [row.error for row in report.matrices if row.error is not None]
    return {
        "model": name, "method": method, "pattern": config.pattern, "sparsity": config.target, "seed": seed,
        "set": changes, "evaluated on": judge, "perplexity": round(found, 4), "realised": round(report.realised, 6),
        "mean layer error": round(statistics.mean(errors), 5) if errors else None,
        "seconds": round(seconds, 1), "calibration tokens": WINDOWS * 256,
        "threads": torch.get_num_threads(), "torch": torch.__version__, "machine": platform.machine(),
    }  # fmt: skip


def results() -> list[dict]:
    return [json.loads(line) for line in RESULTS.read_text().splitlines()] if RESULTS.is_file() else []


def dense(text: WindowDataset, name: str) -> float:
    model = AutoModelForCausalLM.from_pretrained(SHARED / "models" / name, dtype=torch.float32)
    return round(perplexity(model, text).perplexity, 4)


def print_table(evaluated_on: str) -> None:
    cells: dict[tuple, list[float]] = {}
    reference: dict[str, float] = {}
    for row in results():
        if row["evaluated on"] != evaluated_on:
            continue
        if row["method"] == "dense":
            reference[row["model"]] = row["perplexity"]
            continue
        shown = row["pattern"] if row["pattern"] != "unstructured" else f"{row['sparsity']:.0%}"
        changes = "".join(f", {name} {value}" for name, value in row["set"].items())
        cells.setdefault((row["model"], row["method"] + changes, shown), []).append(row["perplexity"])
    patterns = sorted({key[2] for key in cells}, key=lambda shown: (":" not in shown, shown))
    for model in sorted({key[0] for key in cells}):
        print(f"\n| {model} (dense {reference.get(model, float('nan')):.3f}) | {' | '.join(patterns)} |")
        print(f"|---|{'---:|' * len(patterns)}")
        for method in dict.fromkeys(key[1] for key in cells if key[0] == model):
            shown = []
            for pattern in patterns:
                values = cells.get((model, method, pattern), [])
                spread = f" ({min(values):.4g} to {max(values):.4g})" if len(values) > 1 else ""
                shown.append(f"{statistics.mean(values):.4g}{spread}" if values else "")
            print(f"| {method} | {' | '.join(shown)} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["stories3M"])
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=list(METHODS))
    parser.add_argument("--patterns", nargs="+", default=["2:4", "0.5", "0.6", "0.7"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--set", nargs=2, action="append", default=[], metavar=("NAME", "VALUE"),
                        help="change a field of OneShotConfig; the value is JSON")  # fmt: skip
    parser.add_argument("--evaluate", choices=("validation", "selection"), default="validation")
    parser.add_argument("--table", action="store_true", help="print what there is, and stop")
    arguments = parser.parse_args()
    if arguments.table:
        print_table(arguments.evaluate)
        return
    changes = {name: json.loads(value) for name, value in arguments.set}
    RESULTS.parent.mkdir(exist_ok=True)
    done = {json.dumps([row.get(key) for key in KEYS]) for row in results()}
    for name in arguments.models:
        train, selection = split_windows(windows(name, "train"), HELD_OUT)
        judged = selection if arguments.evaluate == "selection" else windows(name, "valid").select(range(400))
        text = {"train": train, arguments.evaluate: judged}
        with RESULTS.open("a") as file:
            known = [row for row in results() if row["method"] == "dense" and row["model"] == name]
            if not any(row["evaluated on"] == arguments.evaluate for row in known):
                row = {"model": name, "method": "dense", "evaluated on": arguments.evaluate}
                file.write(json.dumps(row | {"perplexity": dense(judged, name)}) + "\n")
            for seed in arguments.seeds:
                for pattern in arguments.patterns:
                    for method in arguments.methods:
                        config = config_of(method, pattern, changes)
                        parts = [name, method, config.pattern, config.target, seed, changes, arguments.evaluate]
                        key = json.dumps(parts)
                        if key in done:
                            continue
                        row = run(name, text, method, pattern, seed, changes)
                        print(json.dumps(row), flush=True)
                        file.write(json.dumps(row) + "\n")
                        file.flush()


if __name__ == "__main__":
    main()
