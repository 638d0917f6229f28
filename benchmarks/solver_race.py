"""Seconds and layer errors of one-shot 2:4 pruning next to llm-compressor, on the same blocks and the same tokens.

    python -m venv RIVAL && RIVAL/bin/pip install torch==2.13.0 llmcompressor==0.14.0.1
    python benchmarks/solver_race.py --rival RIVAL/bin/python
    python benchmarks/solver_race.py --table

Both prune the same two Llama blocks with random weights in float32 or in bfloat16, on the CPU, with the same batches
of the same random tokens, one after the other in processes of their own, in turns. Timed is the call alone,
`one_shot(...)` here and `oneshot(...)` there: calibration, solving and propagation, without imports, loading and
saving. Tokens follow a power law and the embedding has channels of very different size, so that the Gram matrices are
as uneven as those of a trained model. The layer error is ||(W_new - W) X||^2 / ||W X||^2, X the inputs that the method
pruned the layer on (here those after the pruned layers before it in the block, there those after the dense ones),
averaged over layers; it is measured by one and the same code for both. The error of the model is that of what its last
block returns for the first calibration windows and for as many others: ||h_new - h||^2 / ||h||^2.

Seconds are those of the processor, one thread, so that other work on the machine counts as little as can be. They are
split: "statistics" are the sums over tokens, "solving" is what happens to the weights afterwards (here with the layer
errors of the report), and the rest of "all" is mostly the forward passes. "without passes" is statistics and solving.
The floor is what no program can be faster than on this machine that takes the same sums and runs every layer once on
all tokens: its multiplications, at the rate of a large matrix product that was measured beside the race; passes and
Gram matrices in the type of the model, the solver in float32.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast

RESULTS = Path(__file__).resolve().parent / "results" / "solver_race.json"
SHAPES = {1024: (2816, 16), 2048: (5632, 32)}  # hidden -> (intermediate, heads)
BLOCKS, VOCABULARY, BATCH = 2, 1024, 8
PARTS = ("all", "statistics", "solving", "without passes")
JUDGED = 8  # windows on which the error of the model is measured
OURS = {"obs": "sparsegpt", "wanda": "fast", "balanced": "balanced"}
RIVALS = {"obs": "SparseGPTModifier", "wanda": "WandaPruningModifier"}


def make_model(folder: Path, hidden: int, dtype: str) -> None:
    intermediate, heads = SHAPES[hidden]
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=hidden, intermediate_size=intermediate, num_hidden_layers=BLOCKS,
        num_attention_heads=heads, num_key_value_heads=heads, max_position_embeddings=512, initializer_range=0.02,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        model.get_input_embeddings().weight.mul_(torch.exp(torch.randn(hidden)))
    model.to(getattr(torch, dtype)).save_pretrained(folder)
    # llm-compressor wants a tokenizer, and never asks it anything.
    words = models.WordLevel({f"w{index}": index for index in range(VOCABULARY)}, unk_token="w0")
    PreTrainedTokenizerFast(tokenizer_object=Tokenizer(words), pad_token="w0").save_pretrained(folder)


def make_tokens(folder: Path, windows: int, length: int) -> None:
    save_file({"tokens": draw_tokens(windows, length, seed=0)}, folder / "tokens.safetensors")


def draw_tokens(windows: int, length: int, seed: int) -> torch.Tensor:
    odds = 1.0 / torch.arange(1, VOCABULARY + 1)
    drawn = torch.multinomial(odds, windows * length, True, generator=torch.Generator().manual_seed(seed))
    return drawn.reshape(windows, length)


class Clock:
    """Processor seconds by part of the work."""

    def __init__(self) -> None:
        self.seconds = {"all": 0.0, "statistics": 0.0, "solving": 0.0}

    def timed(self, part: str, function: Callable) -> Callable:
        def wrapper(*args, **kwargs):
            started = time.process_time()
            try:
                return function(*args, **kwargs)
            finally:
                self.seconds[part] += time.process_time() - started

        return wrapper


def load(folder: Path) -> torch.nn.Module:
    return AutoModelForCausalLM.from_pretrained(folder, dtype="auto")


def prune_ours(folder: Path, method: str) -> tuple[dict[str, float], torch.nn.Module]:
    from hf_adaptive_sparse.hf import one_shot as engine
    from hf_adaptive_sparse.hf.accumulators import StatsSum
    from hf_adaptive_sparse.methods.one_shot import OneShotConfig

    model = load(folder)
    tokens = load_file(folder / "tokens.safetensors")["tokens"]
    clock, config = Clock(), OneShotConfig(method=OURS[method], pattern="2:4")
    StatsSum.add = clock.timed("statistics", StatsSum.add)
    StatsSum.stats = clock.timed("statistics", StatsSum.stats)
    engine.prune_group = clock.timed("solving", engine.prune_group)
    clock.timed("all", engine.one_shot)(model, tokens, config, batch_size=BATCH)
    return clock.seconds, model


def prune_theirs(folder: Path, method: str) -> tuple[dict[str, float], torch.nn.Module]:
    from llmcompressor import oneshot
    from llmcompressor.modifiers.pruning import SparseGPTModifier, WandaPruningModifier
    from llmcompressor.modifiers.pruning.sparsegpt import base as sparsegpt
    from llmcompressor.modifiers.pruning.wanda import base as wanda
    from torch.utils.data import DataLoader

    modifier = {"obs": SparseGPTModifier, "wanda": WandaPruningModifier}[method]
    model = load(folder)
    tokens = load_file(folder / "tokens.safetensors")["tokens"]
    loader = DataLoader([{"input_ids": window} for window in tokens], batch_size=BATCH)
    recipe = modifier(sparsity=0.5, mask_structure="2:4", targets=["Linear"], ignore=["re:.*lm_head"])
    clock = Clock()
    sparsegpt.accumulate_hessian = clock.timed("statistics", sparsegpt.accumulate_hessian)
    wanda.accumulate_row_scalars = clock.timed("statistics", wanda.accumulate_row_scalars)
    for module in (sparsegpt, wanda):
        module.sparsify_weight = clock.timed("solving", module.sparsify_weight)
    clock.timed("all", oneshot)(model=model, dataset=loader, recipe=recipe, num_calibration_samples=len(tokens))
    return clock.seconds, model


def work(folder: Path, who: str, method: str) -> None:
    torch.set_num_threads(1)
    seconds, model = {"ours": prune_ours, "theirs": prune_theirs}[who](folder, method)
    state = {name: tensor.detach().contiguous() for name, tensor in model.state_dict().items() if ".layers." in name}
    save_file(state, folder / f"{who}_{method}.safetensors")
    print(json.dumps(seconds))


def layer_error(folder: Path, result: str, order: str) -> float:
    """Mean over layers, each on the inputs of the model that is pruned up to its block, or up to its group."""
    from hf_adaptive_sparse.hf.calibration import walk_blocks
    from hf_adaptive_sparse.patterns import parse_pattern
    from hf_adaptive_sparse.sensitivity import output_error

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokens = load_file(folder / "tokens.safetensors")["tokens"]
    pruned = load_file(folder / f"{result}.safetensors")
    errors = []
    for visit in walk_blocks(model, tokens, batch_size=BATCH, order=order):
        for group in visit.groups:
            for member in group.members:
                weight = pruned[f"{member.name}.weight"]
                violation = parse_pattern("2:4").first_violation(weight)
                assert violation is None, f"{result}, {member.name}: not 2:4 at {violation}"
                errors.append(output_error(member.weight, weight, group.stats))
                member.set_weight(weight)
    return statistics.mean(errors)


@torch.no_grad()
def model_errors(folder: Path, results: list[str]) -> dict[str, list[float]]:
    """Result -> error of the hidden states behind the last block, on calibration windows and on others."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).model
    calibration = load_file(folder / "tokens.safetensors")["tokens"][:JUDGED]
    texts = [calibration, draw_tokens(JUDGED, calibration.shape[1], seed=1)]
    hidden: list[torch.Tensor] = []
    model.layers[-1].register_forward_hook(lambda _, args, output: hidden.append(output))
    for text in texts:
        model(input_ids=text, use_cache=False)
    dense, errors = list(hidden), {}
    for result in results:
        weights = load_file(folder / f"{result}.safetensors")
        model.load_state_dict({name.removeprefix("model."): tensor for name, tensor in weights.items()}, strict=False)
        hidden.clear()
        for text in texts:
            model(input_ids=text, use_cache=False)
        errors[result] = [
            round(float((new - old).square().sum() / old.square().sum()), 5)
            for new, old in zip(hidden, dense, strict=True)
        ]
    return errors


def rate(dtype: str) -> float:
    """Operations in a second of one large product."""
    square, taken = torch.randn(2048, 2048, dtype=getattr(torch, dtype)), []
    for _ in range(5):
        started = time.process_time()
        square @ square
        taken.append(time.process_time() - started)
    return 2 * 2048**3 / min(taken)


def floor_seconds(hidden: int, dtype: str, tokens: int, method: str) -> float:
    """What the multiplications of one pass, of half a Gram matrix per input and of the solver take at least."""
    inner = SHAPES[hidden][0]
    inputs = [(hidden, 3 * hidden), (hidden, hidden), (hidden, 2 * inner), (inner, hidden)]  # features, rows
    exact = BLOCKS * sum(2 * tokens * features * rows for features, rows in inputs)
    exact -= 2 * tokens * inner * hidden  # nothing reads what the last block returns
    single = 0.0
    if method != "wanda":
        exact += BLOCKS * sum(tokens * n**2 for n, _ in inputs)  # Gram
        single = BLOCKS * sum(n**3 / 3 + rows * n**2 for n, rows in inputs)  # Cholesky factor, sweep
    return exact / rate(dtype) + single / rate("float32")


def start(python: str, folder: Path, who: str, method: str) -> dict[str, float]:
    command = [python, __file__, "--work", str(folder), who, method]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    if done.returncode:
        sys.exit(f"{who} {method} failed:\n{done.stderr[-3000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def race(hidden: int, dtype: str, arguments: argparse.Namespace) -> list[dict]:
    from hf_adaptive_sparse.methods.one_shot import OneShotConfig

    torch.set_num_threads(1)
    rows = []
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        make_model(folder, hidden, dtype)
        make_tokens(folder, arguments.windows, arguments.length)
        for method in arguments.methods:
            # `balanced` has no counterpart there; its line says what the better result costs.
            rival = "wanda" if method == "wanda" else "obs"
            ours, theirs = [], []
            for _ in range(arguments.repeats):
                ours.append(start(sys.executable, folder, "ours", method))
                theirs.append(start(arguments.rival, folder, "theirs", rival))
            row = {"hidden": hidden, "dtype": dtype, "method": OURS[method], "rival": RIVALS[rival]}
            for run in (*ours, *theirs):
                run["without passes"] = run["statistics"] + run["solving"]
            for part in ours[0]:
                medians = [statistics.median(run[part] for run in runs) for runs in (ours, theirs)]
                row[part] = {
                    "seconds": [round(run[part], 2) for run in ours],
                    "rival's seconds": [round(run[part], 2) for run in theirs],
                    "times faster": round(medians[1] / medians[0], 2),
                }
            if method in RIVALS:
                seconds = floor_seconds(hidden, dtype, arguments.windows * arguments.length, method)
                row["floor"] = {"seconds": round(seconds, 2)}
            results = [f"ours_{method}", f"theirs_{rival}"]
            order = OneShotConfig(method=OURS[method]).resolved.order
            errors = model_errors(folder, results)
            row["layer error"] = round(layer_error(folder, results[0], order), 5)
            row["rival's layer error"] = round(layer_error(folder, results[1], "block"), 5)
            row["error of the model, calibration and other tokens"] = errors[results[0]]
            row["rival's error of the model"] = errors[results[1]]
            row |= {
                "tokens": arguments.windows * arguments.length, "blocks": BLOCKS, "threads": 1,
                "torch": torch.__version__, "machine": platform.machine(),
            }  # fmt: skip
            rows.append(row)
            print(json.dumps(row), flush=True)
    return rows


def results() -> list[dict]:
    return json.loads(RESULTS.read_text()) if RESULTS.is_file() else []


def write(row: dict) -> None:
    """In place of the row of the same race."""
    race = ("hidden", "dtype", "method")
    rows = [old for old in results() if any(old[name] != row[name] for name in race)]
    rows = sorted([*rows, row], key=lambda row: [row[name] for name in race])
    RESULTS.write_text(json.dumps(rows, indent=1) + "\n")


def print_table() -> None:
    print("| hidden | dtype | method | rival | all | statistics | solving | without passes | layer error | rival's |")
    print("|---:|---|---|---|---:|---:|---:|---:|---:|---:|")
    for row in results():
        theirs = row["rival's layer error"]
        ratios = " | ".join(f"{row[part]['times faster']:.2f}" for part in PARTS)
        print(
            f"| {row['hidden']} | {row['dtype']} | {row['method']} | {row['rival']} | {ratios} "
            f"| {row['layer error']:.4f} | {theirs:.4f} |"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rival", help="the Python of an environment with llm-compressor")
    parser.add_argument("--hidden", nargs="+", type=int, default=list(SHAPES), choices=list(SHAPES))
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"], choices=["float32", "bfloat16"])
    parser.add_argument("--methods", nargs="+", default=list(OURS), choices=list(OURS))
    parser.add_argument("--windows", type=int, default=32)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--table", action="store_true", help="print what there is, and stop")
    parser.add_argument("--work", nargs=3, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.work:
        work(Path(arguments.work[0]), *arguments.work[1:])
    elif arguments.table:
        print_table()
    elif not arguments.rival:
        parser.error("--rival is needed: the Python of an environment with llm-compressor")
    else:
        RESULTS.parent.mkdir(exist_ok=True)
        for hidden in arguments.hidden:
            for dtype in arguments.dtypes:
                for row in race(hidden, dtype, arguments):
                    write(row)


if __name__ == "__main__":
    main()
