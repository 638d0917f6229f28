"""What damping costs or brings a 2:4 sweep: relative to each input's own size, or to the mean over inputs.

    python benchmarks/damping.py

The first block of the random Llama of benchmarks/solver_race.py, width 1024, 8,192 tokens: every group of layers is
swept with the same Gram matrix, with damping added to the unit diagonal of the scaled matrix ("own", the package's),
or as a part of the mean of the diagonal of the unscaled one ("mean", that of SparseGPT and llm-compressor). The error
is ||(W_new - W) X||^2 / ||W X||^2 on the tokens of the calibration, and on 4,096 others. Writes
benchmarks/results/damping.json.
"""

from __future__ import annotations

import dataclasses
import json
import tempfile
from pathlib import Path

import torch
from solver_race import draw_tokens, load, make_model

from hf_adaptive_sparse.hf.calibration import walk_blocks
from hf_adaptive_sparse.methods.one_shot import Goal, OneShotConfig, prune_group
from hf_adaptive_sparse.patterns import parse_pattern
from hf_adaptive_sparse.sensitivity import output_error
from hf_adaptive_sparse.stats import LayerStats

RESULTS = Path(__file__).resolve().parent / "results" / "damping.json"
DAMPINGS = (("own", 0.01), ("own", 0.02), ("own", 0.04), ("mean", 0.01), ("mean", 0.03))


def damped(stats: LayerStats, relative_to: str, amount: float) -> LayerStats:
    if relative_to == "own":
        return dataclasses.replace(stats, damping=amount)
    # Undamped but for what is added here, to the Gram matrix itself.
    gram = stats.gram.clone()
    gram.diagonal().add_(amount * gram.diagonal().mean())
    return dataclasses.replace(stats, gram=gram, squares=gram.diagonal().clone(), damping=1e-9)


def groups(model: torch.nn.Module, tokens: torch.Tensor) -> list[tuple[list, LayerStats]]:
    for visit in walk_blocks(model, tokens, batch_size=8):
        return [(group.members, group.stats) for group in visit.groups]
    raise AssertionError("the model has no block")


def main() -> None:
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as scratch:
        make_model(Path(scratch), 1024, "float32")
        model = load(Path(scratch))
    goal, config = Goal(parse_pattern("2:4"), 0.5), OneShotConfig(method="sparsegpt")
    others = [stats for _, stats in groups(model, draw_tokens(16, 256, seed=1))]
    rows = []
    for (members, stats), other in zip(groups(model, draw_tokens(32, 256, seed=0)), others, strict=True):
        for relative_to, amount in DAMPINGS:
            weights = [member.weight for member in members]
            pruned = prune_group(weights, damped(stats, relative_to, amount), [goal] * len(weights), config)
            for member, old, new in zip(members, weights, pruned, strict=True):
                errors = [output_error(old, new.weight, each) for each in (stats, other)]
                rows.append({
                    "layer": member.name, "relative to": relative_to, "damping": amount,
                    "error": round(errors[0], 6), "on other tokens": round(errors[1], 6),
                })  # fmt: skip
    RESULTS.write_text(json.dumps(rows, indent=1) + "\n")
    print("| damping | mean error of the layers | on other tokens |\n|---|---:|---:|")
    for relative_to, amount in DAMPINGS:
        own = [row for row in rows if (row["relative to"], row["damping"]) == (relative_to, amount)]
        means = [sum(row[name] for row in own) / len(own) for name in ("error", "on other tokens")]
        of = "the input" if relative_to == "own" else "the mean"
        print(f"| {amount:g} of {of} | {means[0]:.5f} | {means[1]:.5f} |")


if __name__ == "__main__":
    main()
