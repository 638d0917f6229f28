"""Structural pruning: perplexity of smaller models by allocation, target and schedule, at equal training tokens.

    python benchmarks/shrinking.py --model stories260K --targets 0.8 --arms adaptive uniform --seeds 0
    python benchmarks/shrinking.py --table

Each run appends one line to benchmarks/results/shrinking.jsonl; runs that are in it are skipped, and --table prints
mean and spread. Arms name the allocation, with Taylor scores: adaptive (Adapt-Pruner), uniform, global_threshold
(FLAP's search); saap is SAAP's with its own scores, magnitude uniform widths with L2 scores, flap FLAP's search with
its scores. Schedules: interleaved prunes in 10 stages between steps of training, at_once prunes before all training,
none does not train. Importance is measured on 32 windows of 256 tokens of the training text. Training:
tinystories/train.txt without its last 200 windows, cross-entropy, the schedule of `hf-adaptive-sparse shrink`.
Reported: tinystories/valid.txt by the protocol of the README.
"""

from __future__ import annotations

import argparse
import copy
import json
import platform
import statistics
import tempfile
import time
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PrinterCallback, set_seed

from hf_adaptive_sparse.cli.shrink import ShrinkArguments
from hf_adaptive_sparse.hf.blocks import block_linears, find_blocks
from hf_adaptive_sparse.hf.data import WindowDataset, load_documents, split_windows, token_windows
from hf_adaptive_sparse.hf.evaluation import perplexity
from hf_adaptive_sparse.hf.shrink import shrink
from hf_adaptive_sparse.hf.shrink_training import ShrinkCallback, ShrinkTrainer

ROOT = Path(__file__).resolve().parents[1]
SHARED = ROOT.parent / "shared"
TEXT = SHARED / "data" / "tinystories"
RESULTS = ROOT / "benchmarks" / "results" / "shrinking.jsonl"
ARMS = {
    "adaptive": {},
    "uniform": {"allocation": "uniform"},
    "global_threshold": {"allocation": "global_threshold"},
    "saap": {"allocation": "saap", "score": "fused"},
    "magnitude": {"allocation": "uniform", "score": "l2"},
    "flap": {"allocation": "global_threshold", "score": "flap"},
}
SCHEDULES = {"interleaved": {}, "at_once": {"stages": 1}, "none": {"train_tokens": 0}}
HELD_OUT, CALIBRATION = 200, 32
KEYS = ("model", "arm", "schedule", "target", "tokens", "seed", "set")


def windows(model: str, text: str) -> WindowDataset:
    tokenizer = AutoTokenizer.from_pretrained(SHARED / "models" / model)
    return token_windows(load_documents(str(TEXT / f"{text}.txt")), tokenizer, 256)


def run(arguments: ShrinkArguments, name: str, text: dict[str, WindowDataset]) -> dict:
    """Perplexity right after the last units went, and at the end."""
    model = AutoModelForCausalLM.from_pretrained(SHARED / "models" / name, dtype=torch.float32)
    set_seed(arguments.seed)
    calibration = text["train"].select(slice(0, CALIBRATION))
    started = time.perf_counter()
    if not arguments.steps:
        report = shrink(model, calibration, arguments.shrink_config())
        after = end = perplexity(model, text["valid"]).perplexity
    else:
        callback = ShrinkCallback(model, calibration, arguments.shrink_config(), judge=text["valid"].select(range(64)))
        stack = find_blocks(model)
        members = [each for index in range(len(stack.blocks)) for each in block_linears(stack, index).values()]
        more = {}
        if arguments.distill:
            more = {"distillation": arguments.distillation(), "teacher": copy.deepcopy(model)}
        with tempfile.TemporaryDirectory() as scratch:
            settings = arguments.training_arguments(Path(scratch), [each.weight for each in members], use_cpu=True)
            settings.save_strategy = "no"
            trainer = ShrinkTrainer(model, settings, shrink=callback, train_dataset=text["train"], **more)
            trainer.remove_callback(PrinterCallback)
            trainer.train()
        report, after = callback.report(), callback.history[-1]["after"]
        end = perplexity(model, text["valid"]).perplexity
    return {
        "parameters": report.parameters, "dense parameters": report.dense_parameters,
        "after the last pruning": round(after, 4), "perplexity": round(end, 4),
        "heads": [each["num_key_value_heads"] for each in report.widths],
        "channels": [each["intermediate_size"] for each in report.widths],
        "seconds": round(time.perf_counter() - started), "torch": torch.__version__, "machine": platform.machine(),
    }  # fmt: skip


def results() -> list[dict]:
    return [json.loads(line) for line in RESULTS.read_text().splitlines()] if RESULTS.is_file() else []


def print_table() -> None:
    cells: dict[tuple, list[dict]] = {}
    for row in results():
        changes = "".join(f", {name} {value}" for name, value in row["set"].items())
        key = (row["model"], row["tokens"], row["target"], row["arm"] + changes, row["schedule"])
        cells.setdefault(key, []).append(row)
    print("| model | tokens | target | arm | schedule | seeds | parameters | last pruning | in the end | spread |")
    print("|---|---:|---:|---|---|---|---:|---:|---:|---|")
    for (model, tokens, target, arm, schedule), rows in sorted(cells.items()):
        ends = [row["perplexity"] for row in rows]
        spread = f"{min(ends):.3f} to {max(ends):.3f}" if len(ends) > 1 else ""
        seeds = ", ".join(str(row["seed"]) for row in rows)
        print(
            f"| {model} | {tokens:,} | {target:.0%} | {arm} | {schedule} | {seeds} "
            f"| {rows[0]['parameters']:,} | {statistics.mean(row['after the last pruning'] for row in rows):.2f} "
            f"| {statistics.mean(ends):.3f} | {spread} |"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="stories260K")
    parser.add_argument("--targets", nargs="+", type=float, default=[0.9, 0.8, 0.6])
    parser.add_argument("--arms", nargs="+", choices=list(ARMS), default=list(ARMS))
    parser.add_argument("--schedules", nargs="+", choices=list(SCHEDULES), default=list(SCHEDULES))
    parser.add_argument("--tokens", type=int, default=409_600)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--set", nargs=2, action="append", default=[], metavar=("NAME", "VALUE"),
                        help="change an argument of `shrink`; the value is JSON")  # fmt: skip
    parser.add_argument("--table", action="store_true", help="print what there is, and stop")
    arguments = parser.parse_args()
    if arguments.table:
        print_table()
        return
    name, changes = arguments.model, {key: json.loads(value) for key, value in arguments.set}
    train, _ = split_windows(windows(name, "train"), HELD_OUT)
    text = {"train": train, "valid": windows(name, "valid").select(range(400))}
    done = {json.dumps([row[key] for key in KEYS]) for row in results()}
    RESULTS.parent.mkdir(exist_ok=True)
    for seed in arguments.seeds:
        for target in arguments.targets:
            for arm in arguments.arms:
                for schedule in arguments.schedules:
                    given = {
                        "train_tokens": arguments.tokens, "target": target, "seed": seed,
                        **ARMS[arm], **SCHEDULES[schedule], **changes,
                    }  # fmt: skip
                    shrinking = ShrinkArguments(model=name, data="train.txt", output_dir="out", **given)
                    key = dict(zip(KEYS, (name, arm, schedule, target, shrinking.tokens, seed, changes), strict=True))
                    if json.dumps(list(key.values())) in done:
                        continue
                    row = key | run(shrinking, name, text)
                    print(json.dumps(row), flush=True)
                    with RESULTS.open("a") as file:
                        file.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    main()
