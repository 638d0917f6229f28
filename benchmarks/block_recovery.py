"""Which blocks can spare units: the loss that removing them leaves at once, and after training, block by block.

    python benchmarks/block_recovery.py --model stories260K
    python benchmarks/block_recovery.py --table

From one block at a time half of the heads and of the MLP channels go, those of the lowest Taylor score; the model is
then trained with the defaults of `hf-adaptive-sparse shrink` on the text and windows of benchmarks/shrinking.py, and
judged on 200 held-out windows of the training text. Adapt-Pruner's importance of each block (`layer_importance`) stands
beside it: where it is to say which blocks training can do without, it has to rank them as the last column does. Each
run appends one line to benchmarks/results/block_recovery.jsonl; runs that are in it are skipped.
"""

from __future__ import annotations

import argparse
import copy
import json

import torch
from shrinking import CALIBRATION, HELD_OUT, ROOT, SHARED, windows
from shrinking import train as recover
from transformers import AutoModelForCausalLM, set_seed

from hf_adaptive_sparse.cli.shrink import ShrinkArguments
from hf_adaptive_sparse.hf.data import split_windows
from hf_adaptive_sparse.hf.evaluation import perplexity
from hf_adaptive_sparse.hf.shrink_training import ShrinkCallback
from hf_adaptive_sparse.hf.unit_statistics import unit_statistics
from hf_adaptive_sparse.hf.units import find_axes
from hf_adaptive_sparse.methods.adaptive_width import layer_importance
from hf_adaptive_sparse.methods.adaptive_width.config import KINDS
from hf_adaptive_sparse.unit_scores import UNIT_SCORES

RESULTS = ROOT / "benchmarks" / "results" / "block_recovery.jsonl"
KEYS = ("model", "tokens", "seed", "block")


def run(arguments: ShrinkArguments, name: str, block: int | None, train, judge) -> dict:
    """Perplexity with half of one block, or with all of them, before and after training."""
    model = AutoModelForCausalLM.from_pretrained(SHARED / "models" / name, dtype=torch.float32)
    teacher = copy.deepcopy(model)
    set_seed(arguments.seed)
    calibration = train.select(slice(0, CALIBRATION))
    axes = find_axes(model, KINDS)
    stats = unit_statistics(model, calibration, axes, {"gradients", "cosines"})
    weights = dict(model.named_parameters())
    callback = ShrinkCallback(model, calibration, arguments.shrink_config())
    keep = {name: torch.ones(len(units), dtype=torch.bool) for name, units in callback.shrinker.kept.items()}
    for axis in axes:
        if axis.block == block:
            scores = UNIT_SCORES["taylor"](axis, weights, stats)
            keep[axis.name][scores.argsort()[: axis.count // 2]] = False
    callback.shrinker.remove_learned(keep)
    before = perplexity(model, judge).perplexity
    recover(arguments, callback, teacher, train)
    importance = layer_importance(stats.cosines)
    return {
        "importance": None if block is None else round(float(importance[block]), 4),
        "removed": callback.shrinker.dense_parameters - callback.shrinker.parameters,
        "before": round(before, 4), "after": round(perplexity(model, judge).perplexity, 4),
    }  # fmt: skip


def results() -> list[dict]:
    return [json.loads(line) for line in RESULTS.read_text().splitlines()] if RESULTS.is_file() else []


def print_table() -> None:
    print("| model | tokens | seed | half of block | importance | before training | after |")
    print("|---|---:|---:|---|---:|---:|---:|")
    for row in sorted(results(), key=lambda row: [row["model"], row["tokens"], row["seed"], row["block"] or 0]):
        block = "none" if row["block"] is None else row["block"]
        print(
            f"| {row['model']} | {row['tokens']:,} | {row['seed']} | {block} | {row['importance'] or ''} "
            f"| {row['before']:.3f} | {row['after']:.3f} |"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="stories260K")
    parser.add_argument("--tokens", type=int, default=204_800)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--table", action="store_true", help="print what there is, and stop")
    arguments = parser.parse_args()
    if arguments.table:
        print_table()
        return
    name = arguments.model
    train, judge = split_windows(windows(name, "train"), HELD_OUT)
    layers = AutoModelForCausalLM.from_pretrained(SHARED / "models" / name).config.num_hidden_layers
    done = [[row[key] for key in KEYS] for row in results()]
    for seed in arguments.seeds:
        for block in (None, *range(layers)):
            values = [name, arguments.tokens, seed, block]
            if values in done:
                continue
            shrinking = ShrinkArguments(
                model=name, data="train.txt", output_dir="out", train_tokens=arguments.tokens, seed=seed
            )
            row = dict(zip(KEYS, values, strict=True)) | run(shrinking, name, block, train, judge)
            print(json.dumps(row), flush=True)
            with RESULTS.open("a") as file:
                file.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    main()
