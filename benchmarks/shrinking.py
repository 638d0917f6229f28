"""Structural pruning: perplexity of smaller models by allocation, target and schedule, at equal training tokens.

    python benchmarks/shrinking.py --model stories260K --targets 0.8 --arms adaptive uniform --seeds 0
    python benchmarks/shrinking.py --table

Each run appends one line to benchmarks/results/shrinking.jsonl; runs that are in it are skipped, and --table prints
mean and spread. Arms name the allocation, with Taylor scores: adaptive (Adapt-Pruner), equal (the same widths in all
blocks), uniform (to one unit), global_threshold (FLAP's search); saap is SAAP's with its own scores, magnitude uniform
widths with L2 scores, flap FLAP's search with its scores. Two ask why: recovery is adaptive, but blocks are as
important as benchmarks/block_recovery.py found that their loss is after training, and channels_first is adaptive with
heads as more important than channels, all blocks alike. Schedules: at_once prunes before all training; interleaved
prunes in 10 stages in the first 30 % of the run, paper in 10 stages over the whole run; none does not train.
Importance is measured on 32 windows of 256 tokens of the training text. Training: tinystories/train.txt without its
last 200 windows, with the defaults of `hf-adaptive-sparse shrink` (the dense model teaches); --held-out judges on
those windows instead, to choose between recipes. Otherwise reported: tinystories/valid.txt by the protocol of the
README, right after the last units went and in the end (in rows with "schedule wsd" the first of the two was measured
on 64 windows).
"""

from __future__ import annotations

import argparse
import copy
import json
import platform
import statistics
import tempfile
import time
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from unittest import mock

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PrinterCallback, TrainerCallback, set_seed

import hf_adaptive_sparse.hf.shrink as shrink_module
from hf_adaptive_sparse.cli.shrink import ShrinkArguments
from hf_adaptive_sparse.hf.blocks import block_linears, find_blocks
from hf_adaptive_sparse.hf.data import WindowDataset, load_documents, split_windows, token_windows
from hf_adaptive_sparse.hf.evaluation import perplexity
from hf_adaptive_sparse.hf.shrink import shrink
from hf_adaptive_sparse.hf.shrink_training import ShrinkCallback, ShrinkTrainer
from hf_adaptive_sparse.methods.adaptive_width import layer_importance

ROOT = Path(__file__).resolve().parents[1]
SHARED = ROOT.parent / "shared"
TEXT = SHARED / "data" / "tinystories"
RESULTS = ROOT / "benchmarks" / "results" / "shrinking.jsonl"
ARMS = {
    "adaptive": {"allocation": "adaptive"},
    "equal": {"allocation": "uniform", "equal_widths": True},
    "uniform": {"allocation": "uniform"},
    "global_threshold": {"allocation": "global_threshold"},
    "saap": {"allocation": "saap", "score": "fused"},
    "magnitude": {"allocation": "uniform", "score": "l2"},
    "flap": {"allocation": "global_threshold", "score": "flap"},
    "recovery": {"allocation": "adaptive", "amplitude": 0.5},
    "channels_first": {"allocation": "adaptive"},
}
SCHEDULES = {
    "at_once": {"stages": 1},
    "interleaved": {"stages": 10, "prune_fraction": 0.3},
    "paper": {"stages": 10, "prune_fraction": 1.0},
    "none": {"train_tokens": 0},
}
HELD_OUT, CALIBRATION = 200, 32
KEYS = ("model", "arm", "schedule", "target", "tokens", "seed", "set", "text")


def windows(model: str, text: str) -> WindowDataset:
    tokenizer = AutoTokenizer.from_pretrained(SHARED / "models" / model)
    return token_windows(load_documents(str(TEXT / f"{text}.txt")), tokenizer, 256)


class AfterPruning(TrainerCallback):
    """The perplexity right after the last stage."""

    def __init__(self, shrinking: ShrinkCallback, stages: int, judge: WindowDataset) -> None:
        self.shrinking, self.stages, self.judge = shrinking, stages, judge
        self.perplexity: float | None = None

    def on_step_begin(self, args, state, control, **kwargs) -> None:
        if self.perplexity is None and len(self.shrinking.history) == self.stages:
            self.perplexity = perplexity(self.shrinking.shrinker.model, self.judge).perplexity


def recovery_importance(model: str) -> torch.Tensor:
    """Of every block, in [-1, 1]: how much perplexity is lost for good with half of it."""
    rows = [json.loads(line) for line in (RESULTS.parent / "block_recovery.jsonl").read_text().splitlines()]
    lost = {row["block"]: row["after"] for row in rows if row["model"] == model and row["seed"] == 0}
    return layer_importance(-torch.tensor([lost[block] for block in sorted(lost.keys() - {None})]))


def other_importance(arm: str, model: str) -> AbstractContextManager:
    """What `shrink` takes for the importance of blocks, or of heads and channels, in the arms that ask why."""
    if arm == "recovery":
        found = recovery_importance(model)
        return mock.patch.object(shrink_module, "layer_importance", lambda cosines: found)
    if arm == "channels_first":
        by_kind = lambda axes, importance: {axis.name: float(axis.kind == "kv_head") for axis in axes}  # noqa: E731
        return mock.patch.object(shrink_module, "axis_importance", by_kind)
    return nullcontext()


def train(arguments: ShrinkArguments, callback: ShrinkCallback, teacher, windows: WindowDataset, *watching) -> None:
    """Train the model of a callback with the recipe of `shrink`; `teacher` is the dense one. Nothing is saved."""
    model = callback.shrinker.model
    stack = find_blocks(model)
    members = [each for index in range(len(stack.blocks)) for each in block_linears(stack, index).values()]
    more = {}
    if arguments.distill:
        more = {"distillation": arguments.distillation(), "teacher": teacher}
    with tempfile.TemporaryDirectory() as scratch:
        settings = arguments.training_arguments(Path(scratch), [each.weight for each in members], use_cpu=True)
        settings.save_strategy = "no"
        trainer = ShrinkTrainer(model, settings, shrink=callback, train_dataset=windows, **more)
        trainer.remove_callback(PrinterCallback)
        for each in watching:
            trainer.add_callback(each)
        trainer.train()


def run(arguments: ShrinkArguments, name: str, text: dict[str, WindowDataset]) -> dict:
    """Perplexity right after the last units went, and at the end."""
    model = AutoModelForCausalLM.from_pretrained(SHARED / "models" / name, dtype=torch.float32)
    set_seed(arguments.seed)
    calibration = text["train"].select(slice(0, CALIBRATION))
    started = time.perf_counter()
    if not arguments.steps:
        report = shrink(model, calibration, arguments.shrink_config())
        after = end = perplexity(model, text["judge"]).perplexity
    else:
        callback = ShrinkCallback(model, calibration, arguments.shrink_config())
        watch = AfterPruning(callback, arguments.stages, text["judge"])
        train(arguments, callback, copy.deepcopy(model), text["train"], watch)
        report, after = callback.report(), watch.perplexity
        end = perplexity(model, text["judge"]).perplexity
    return {
        "parameters": report.parameters, "dense parameters": report.dense_parameters,
        "after the last pruning": None if after is None else round(after, 4), "perplexity": round(end, 4),
        "heads": [each["num_key_value_heads"] for each in report.widths],
        "channels": [each["intermediate_size"] for each in report.widths],
        "pruning seconds": round(report.seconds), "seconds": round(time.perf_counter() - started),
        "torch": torch.__version__, "machine": platform.machine(),
    }  # fmt: skip


def results() -> list[dict]:
    return [json.loads(line) for line in RESULTS.read_text().splitlines()] if RESULTS.is_file() else []


def print_table() -> None:
    cells: dict[tuple, list[dict]] = {}
    for row in results():
        changes = "".join(f", {name} {value}" for name, value in row["set"].items())
        key = (row["model"], row["text"], row["tokens"], row["target"], row["arm"] + changes, row["schedule"])
        cells.setdefault(key, []).append(row)
    print("| model | judged by | tokens | target | arm | schedule | seeds | parameters | last pruning | end | spread |")
    print("|---|---|---:|---:|---|---|---|---:|---:|---:|---|")
    for (model, judged_by, tokens, target, arm, schedule), rows in sorted(cells.items()):
        ends = [row["perplexity"] for row in rows]
        spread = f"{min(ends):.3f} to {max(ends):.3f}" if len(ends) > 1 else ""
        seeds = ", ".join(str(row["seed"]) for row in rows)
        afters = [row["after the last pruning"] for row in rows if row["after the last pruning"] is not None]
        after = f"{statistics.mean(afters):.2f}" if afters else ""
        print(
            f"| {model} | {judged_by} | {tokens:,} | {target:.0%} | {arm} | {schedule} | {seeds} "
            f"| {rows[0]['parameters']:,} | {after} | {statistics.mean(ends):.3f} | {spread} |"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="stories260K")
    parser.add_argument("--targets", nargs="+", type=float, default=[0.9, 0.8, 0.6])
    parser.add_argument("--arms", nargs="+", choices=list(ARMS), default=list(ARMS)[:7])
    parser.add_argument("--schedules", nargs="+", choices=list(SCHEDULES), default=["none", "at_once", "interleaved"])
    parser.add_argument("--tokens", type=int, default=409_600)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--set", nargs=2, action="append", default=[], metavar=("NAME", "VALUE"),
                        help="change an argument of `shrink`; the value is JSON")  # fmt: skip
    parser.add_argument("--held-out", action="store_true", help="judge on the last 200 windows of the training text")
    parser.add_argument("--table", action="store_true", help="print what there is, and stop")
    arguments = parser.parse_args()
    if arguments.table:
        print_table()
        return
    name, changes = arguments.model, {key: json.loads(value) for key, value in arguments.set}
    train, held_out = split_windows(windows(name, "train"), HELD_OUT)
    judge = held_out if arguments.held_out else windows(name, "valid").select(range(400))
    text, judged_by = {"train": train, "judge": judge}, "held out" if arguments.held_out else "valid"
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
                    values = (name, arm, schedule, target, shrinking.tokens, seed, changes, judged_by)
                    key = dict(zip(KEYS, values, strict=True))
                    if json.dumps(list(key.values())) in done:
                        continue
                    with other_importance(arm, name):
                        row = key | run(shrinking, name, text)
                    print(json.dumps(row), flush=True)
                    with RESULTS.open("a") as file:
                        file.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    main()
