"""Retraining quality: perplexity of 2:4 models by model, token budget, arm and seed.

    python benchmarks/retraining.py --model stories260K --tokens 409600 --arm adaptive --seed 0
    python benchmarks/retraining.py --table

Each run appends one line to benchmarks/results/retraining.jsonl; --table prints mean and spread of all lines. The
recipe is that of `hf-adaptive-sparse train` unless --set changes it. Masks start at magnitude. Training: windows of
256 tokens of tinystories/train.txt without its last 200 windows, on which every choice of the recipe was made
(--evaluate selection). Reported: tinystories/valid.txt by the protocol of the README.

--init METHOD starts from a model pruned in one shot by that method, calibrated on the first 128 windows of the
training text.

Arms: adaptive, the recipe as it is; fixed, the same with masks that never change and no decay of masked weights.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import tempfile
import time
from pathlib import Path

import torch
from peft import get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, PrinterCallback, set_seed

from hf_adaptive_sparse.cli.recipe import RecipeArguments
from hf_adaptive_sparse.hf.data import data_digest, load_documents, split_windows, token_windows
from hf_adaptive_sparse.hf.evaluation import perplexity
from hf_adaptive_sparse.hf.one_shot import one_shot
from hf_adaptive_sparse.hf.sparse_layers import sparse_layers
from hf_adaptive_sparse.hf.trainer import AdaptiveSparseTrainer
from hf_adaptive_sparse.hf.warm_start import warm_start
from hf_adaptive_sparse.methods.one_shot import METHODS, OneShotConfig

ROOT = Path(__file__).resolve().parents[1]
SHARED = ROOT.parent / "shared"
TEXT = SHARED / "data" / "tinystories"
RESULTS = ROOT / "benchmarks" / "results" / "retraining.jsonl"
ARMS = {"adaptive": {}, "fixed": {"freeze_fraction": 1.0, "decay": 0.0}}
HELD_OUT = 200


def windows(model: Path, text: str):
    tokenizer = AutoTokenizer.from_pretrained(model)
    return token_windows(load_documents(str(TEXT / f"{text}.txt")), tokenizer, 256)


def run(arguments: argparse.Namespace) -> dict:
    folder = SHARED / "models" / arguments.model
    changes = {**ARMS[arguments.arm], **{name: json.loads(value) for name, value in arguments.set}}
    recipe = RecipeArguments(train_tokens=arguments.tokens, seed=arguments.seed, **changes)
    train, selection = split_windows(windows(folder, "train"), HELD_OUT)
    evaluation = selection if arguments.evaluate == "selection" else windows(folder, "valid").select(range(400))
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    dense = perplexity(model, evaluation).perplexity
    set_seed(recipe.seed)
    adapted = get_peft_model(model, recipe.adapter_config())
    with tempfile.TemporaryDirectory() as scratch:
        weights = [layer.weight for layer in sparse_layers(adapted)]
        settings = recipe.training_arguments(Path(scratch), weights, use_cpu=True)
        settings.save_strategy = "no"
        trainer = AdaptiveSparseTrainer(
            model=adapted, args=settings, train_dataset=train, distillation=recipe.distillation()
        )
        if arguments.init != "magnitude":
            pruned = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
            config = OneShotConfig(method=arguments.init, pattern=recipe.pattern)
            one_shot(pruned, train.select(range(128)), config)
            warm_start(adapted, pruned)
        trainer.remove_callback(PrinterCallback)
        started = time.perf_counter()
        trainer.train()
    history = [entry for entry in trainer.state.log_history if "loss" in entry]
    sparse = adapted.merge_and_unload()
    return {
        "model": arguments.model,
        "arm": arguments.arm,
        "tokens": recipe.tokens,
        "init": arguments.init,
        "seed": recipe.seed,
        "set": dict(arguments.set),
        "evaluated_on": arguments.evaluate,
        "dense": round(dense, 4),
        "perplexity": round(perplexity(sparse, evaluation).perplexity, 4),
        "flips": trainer.mask_callback.flips_total,
        "from_start": history[-1].get("sparse/from_start", 0.0),
        "masked_over_kept": history[-1].get("sparse/masked_over_kept"),
        "recipe": recipe.plan(),
        "data": data_digest(str(TEXT / "train.txt")),
        "seconds": round(time.perf_counter() - started),
        "torch": torch.__version__,
        "machine": platform.machine(),
    }


def table() -> None:
    rows: dict[tuple, list[dict]] = {}
    for line in RESULTS.read_text().splitlines():
        row = json.loads(line)
        start = row.get("init", "magnitude")
        key = (row["model"], row["tokens"], row["evaluated_on"], row["arm"], start, json.dumps(row["set"]))
        rows.setdefault(key, []).append(row)
    print("| model | tokens | text | arm | start | changes | seeds | dense | perplexity | spread |")
    print("|---|---:|---|---|---|---|---|---:|---:|---:|")
    for (model, tokens, text, arm, init, changes), found in sorted(rows.items()):
        values = [row["perplexity"] for row in found]
        spread = f"{min(values):.3f} to {max(values):.3f}" if len(values) > 1 else ""
        seeds = ", ".join(str(row["seed"]) for row in found)
        print(
            f"| {model} | {tokens:,} | {text} | {arm} | {init} | {changes} | {seeds} | {found[0]['dense']:.3f} "
            f"| {statistics.mean(values):.3f} | {spread} |"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="stories260K")
    parser.add_argument("--tokens", type=int, default=409_600)
    parser.add_argument("--arm", choices=ARMS, default="adaptive")
    parser.add_argument("--init", choices=tuple(METHODS), default="magnitude")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--evaluate", choices=("validation", "selection"), default="validation")
    parser.add_argument("--set", nargs=2, action="append", default=[], metavar=("NAME", "VALUE"))
    parser.add_argument("--table", action="store_true", help="print what was measured and stop")
    arguments = parser.parse_args()
    if arguments.table:
        table()
        return
    result = run(arguments)
    print(json.dumps(result))
    RESULTS.parent.mkdir(exist_ok=True)
    with RESULTS.open("a") as file:
        file.write(json.dumps(result) + "\n")


if __name__ == "__main__":
    main()
