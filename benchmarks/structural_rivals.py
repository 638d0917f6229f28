"""Structural pruning next to Torch-Pruning and LLM-Pruner: perplexity at equal parameters, before and after recovery.

    python -m venv VENV && VENV/bin/pip install torch transformers torch-pruning
    python benchmarks/structural_rivals.py --torch-pruning VENV/bin/python
    python benchmarks/structural_rivals.py --table

Arms, each pruned in one go to --target of the parameters of --model:

    adaptive             ours, in steps of 2 % (Adapt-Pruner: Taylor, importance of blocks)
    uniform              ours, in steps of 2 %, the same part of every block
    LLM-Pruner           first-order Taylor, one step, the same part of every block but the first and the last
    LLM-Pruner, its fold the same with the GQA fold of its code, which credits query head h to KV head h mod kv_heads,
                         where it reads h // (heads / kv_heads)
    Torch-Pruning        group L2 (mean), local, hidden channels, heads and MLP channels by one ratio, rounded to 4, as
                         its example for language models; the ratio is the smallest in steps of 0.005 that meets the
                         target. The model first gets a KV head of its own for every query head (the same function
                         with more parameters): with shared ones the graph of version 1.6.1 is never finished, with
                         transformers 5.23 on a Llama of one layer. Runs with the Python of --torch-pruning

Taylor scores are measured on 32 windows of 256 tokens for every arm (LLM-Pruner takes 10 of 64). Recovery is the same
for all: --tokens of tinystories/train.txt without its last 200 windows, cross-entropy and the logits of the dense model
(not its states, for Torch-Pruning changes their width), the optimizer and schedule of `hf-adaptive-sparse shrink`.
Judged on tinystories/valid.txt by the protocol of the README. Appends to benchmarks/results/structural_rivals.jsonl.
"""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, MistralConfig, MistralForCausalLM

ROOT = Path(__file__).resolve().parents[1]
SHARED = ROOT.parent / "shared"
TEXT = SHARED / "data" / "tinystories"
RESULTS = ROOT / "benchmarks" / "results" / "structural_rivals.jsonl"
TORCH_PRUNING = "Torch-Pruning"
ARMS = ("adaptive", "uniform", "LLM-Pruner", "LLM-Pruner, its fold", TORCH_PRUNING)
HELD_OUT, CALIBRATION, WINDOW = 200, 32, 256


def load(folder: Path) -> nn.Module:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def count(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


# --- the rivals -----------------------------------------------------------------------------------------------


def with_own_kv_heads(model: nn.Module) -> nn.Module:
    """The same function, with keys and values repeated for every query head that reads them."""
    config = model.config
    for layer in model.model.layers:
        attention = layer.self_attn
        for name in ("k_proj", "v_proj"):
            weight = getattr(attention, name).weight.detach()
            heads = weight.view(config.num_key_value_heads, config.head_dim, -1)
            repeated = heads.repeat_interleave(attention.num_key_value_groups, dim=0).flatten(0, 1)
            linear = nn.Linear(repeated.shape[1], repeated.shape[0], bias=False)
            linear.weight.data = repeated.contiguous()
            setattr(attention, name, linear)
        attention.num_key_value_groups = 1
    config.num_key_value_heads = config.num_attention_heads
    return model


def prune_with_torch_pruning(name: str, target: float, folder: Path) -> None:
    """Runs where torch_pruning is installed; needs nothing of this package."""
    import torch_pruning

    dense = count(load(SHARED / "models" / name))

    def prune(step: int) -> nn.Module:
        model = with_own_kv_heads(load(SHARED / "models" / name))
        config, heads, ratio = model.config, {}, 0.005 * step
        for layer in model.model.layers:
            for linear in (layer.self_attn.q_proj, layer.self_attn.k_proj, layer.self_attn.v_proj):
                heads[linear] = config.num_attention_heads
        pruner = torch_pruning.pruner.BasePruner(
            model, example_inputs={"input_ids": torch.ones(1, 11, dtype=torch.int64), "use_cache": False},
            ignored_layers=[model.lm_head],
            importance=torch_pruning.importance.GroupMagnitudeImportance(p=2, group_reduction="mean"),
            global_pruning=False, pruning_ratio=ratio, head_pruning_ratio=ratio, prune_num_heads=True,
            prune_head_dims=False, num_heads=heads, round_to=4, output_transform=lambda output: output.logits,
        )  # fmt: skip
        for group in pruner.step(interactive=True):
            group.prune()
        if config.tie_word_embeddings:
            model.lm_head.weight = model.model.embed_tokens.weight
        return model

    low, high = 0, 199  # steps of the ratio: one that leaves too much, and one that does not
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if count(prune(middle)) <= target * dense else (middle, high)
    model, config = prune(high), prune(0).config
    first = model.model.layers[0]
    shape = MistralConfig(  # LlamaConfig refuses a hidden size that the heads do not divide
        vocab_size=config.vocab_size, hidden_size=model.lm_head.in_features,
        intermediate_size=first.mlp.gate_proj.out_features, num_hidden_layers=config.num_hidden_layers,
        num_attention_heads=first.self_attn.q_proj.out_features // config.head_dim,
        num_key_value_heads=first.self_attn.k_proj.out_features // config.head_dim, head_dim=config.head_dim,
        max_position_embeddings=config.max_position_embeddings, rms_norm_eps=config.rms_norm_eps,
        rope_parameters=config.rope_parameters, tie_word_embeddings=config.tie_word_embeddings, sliding_window=None,
        bos_token_id=config.bos_token_id, eos_token_id=config.eos_token_id,
    )  # fmt: skip
    smaller = MistralForCausalLM(shape)
    smaller.load_state_dict(model.state_dict())
    smaller.save_pretrained(folder)
    print(json.dumps({"version": torch_pruning.__version__, "ratio": 0.005 * high}))


def prune_as_llm_pruner(model: nn.Module, calibration: Tensor, target: float, fold: bool) -> None:
    from hf_adaptive_sparse.hf.surgery import remove_units
    from hf_adaptive_sparse.hf.unit_statistics import unit_statistics
    from hf_adaptive_sparse.hf.units import find_axes
    from hf_adaptive_sparse.methods.adaptive_width import WidthProblem, WidthState, uniform_widths, unit_costs
    from hf_adaptive_sparse.unit_scores import taylor_unit_score

    last = model.config.num_hidden_layers - 1
    axes = [axis for axis in find_axes(model) if axis.block not in (0, last)]
    weights = dict(model.named_parameters())
    stats = unit_statistics(model, calibration, axes, {"gradients"})
    scores = {axis.name: taylor_unit_score(axis, weights, stats) for axis in axes}
    if fold:
        scores |= {axis.name: folded_scores(axis, weights, stats) for axis in axes if axis.kind == "kv_head"}
    costs = unit_costs(axes, {name: weight.shape for name, weight in weights.items()})
    remove = count(model) - round(target * count(model))
    problem = WidthProblem(axes=axes, costs=costs, scores=scores, remove=remove)
    remove_units(model, uniform_widths(problem, WidthState.start(axes)).keep)


def folded_scores(axis, weights: dict[str, Tensor], stats) -> Tensor:
    """Taylor scores of KV heads, queries and outputs folded as [heads / kv_heads, kv_heads * head_dim]."""
    total = torch.zeros(axis.count)
    for span in axis.spans:
        salience = (weights[span.tensor].detach() * stats.gradients[span.tensor]).abs().movedim(span.dim, 0)
        channels = salience.reshape(len(salience), -1).sum(1)
        size = next(len(each.index[0]) for each in axis.spans if "k_proj" in each.tensor)
        total += channels.view(-1, axis.count * size).sum(0).view(axis.count, size).sum(1)
    return total


# --- one arm --------------------------------------------------------------------------------------------------


def pruned(arm: str, arguments: argparse.Namespace, calibration: Tensor) -> tuple[nn.Module, dict]:
    """(the model, what else is known)"""
    from hf_adaptive_sparse.hf.shrink import shrink
    from hf_adaptive_sparse.methods.adaptive_width.config import ShrinkConfig

    if arm == TORCH_PRUNING:
        with tempfile.TemporaryDirectory() as folder:
            own = ["--prune-into", folder, "--model", arguments.model, "--target", str(arguments.target)]
            command = [arguments.torch_pruning, __file__, *own]
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, timeout=arguments.limit)
            return load(Path(folder)), json.loads(done.stdout.splitlines()[-1])
    model = load(SHARED / "models" / arguments.model)
    if arm.startswith("LLM-Pruner"):
        prune_as_llm_pruner(model, calibration, arguments.target, fold="fold" in arm)
    else:
        shrink(model, calibration, ShrinkConfig(target=arguments.target, allocation=arm))
    return model, {}


def recover(model: nn.Module, arguments: argparse.Namespace, train) -> None:
    from transformers import PrinterCallback, Trainer, set_seed

    from hf_adaptive_sparse.cli.shrink import ShrinkArguments
    from hf_adaptive_sparse.hf.blocks import block_linears, find_blocks
    from hf_adaptive_sparse.hf.trainer import DistillationMixin

    class Recovery(DistillationMixin, Trainer):
        pass

    set_seed(arguments.seed)
    dense = load(SHARED / "models" / arguments.model)
    stack = find_blocks(dense)
    weights = [each.weight for block in range(len(stack.blocks)) for each in block_linears(stack, block).values()]
    budget = ShrinkArguments(
        model="model", data="text", output_dir="out", train_tokens=arguments.tokens, stages=1, seed=arguments.seed,
        hidden_weight=0.0,
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as scratch:
        settings = budget.training_arguments(Path(scratch), weights, use_cpu=True)
        settings.save_strategy = "no"
        trainer = Recovery(model, settings, train_dataset=train, distillation=budget.distillation(), teacher=dense)
        trainer.remove_callback(PrinterCallback)
        trainer.train()


def widths(model: nn.Module) -> dict:
    from hf_adaptive_sparse.hf.surgery import block_widths

    found = block_widths(model)
    return {
        "hidden": model.config.hidden_size,
        "heads": [block["num_attention_heads"] for block in found],
        "KV heads": [block["num_key_value_heads"] for block in found],
        "channels": [block["intermediate_size"] for block in found],
    }


def measure(arguments: argparse.Namespace) -> None:
    from hf_adaptive_sparse.hf.data import load_documents, split_windows, token_windows
    from hf_adaptive_sparse.hf.evaluation import perplexity

    tokenizer = AutoTokenizer.from_pretrained(SHARED / "models" / arguments.model)
    train, _ = split_windows(token_windows(load_documents(TEXT / "train.txt"), tokenizer, WINDOW), HELD_OUT)
    valid = token_windows(load_documents(TEXT / "valid.txt"), tokenizer, WINDOW).select(range(400))
    for arm in arguments.arms:
        if arm == TORCH_PRUNING and arguments.torch_pruning is None:
            continue
        started = time.perf_counter()
        try:
            model, more = pruned(arm, arguments, train.tokens[:CALIBRATION])
        except subprocess.TimeoutExpired:
            print(f"{arm}: not finished after {arguments.limit} s, so it has no row", flush=True)
            continue
        row = {
            "model": arguments.model, "arm": arm, "target": arguments.target, "tokens": arguments.tokens,
            "seed": arguments.seed, "parameters": count(model), **more, **widths(model),
            "before recovery": round(perplexity(model, valid).perplexity, 3),
        }  # fmt: skip
        if arguments.tokens:
            recover(model, arguments, train)
            row["after recovery"] = round(perplexity(model, valid).perplexity, 3)
        row |= {"seconds": round(time.perf_counter() - started), "torch": torch.__version__}
        row["machine"] = platform.machine()
        print(json.dumps(row), flush=True)
        RESULTS.parent.mkdir(exist_ok=True)
        with RESULTS.open("a") as file:
            file.write(json.dumps(row) + "\n")


def print_table() -> None:
    print("| model | target | arm | parameters | before recovery | tokens | after |")
    print("|---|---:|---|---:|---:|---:|---:|")
    for row in (json.loads(line) for line in RESULTS.read_text().splitlines()):
        after = row.get("after recovery", "")
        print(
            f"| {row['model']} | {row['target']:.0%} | {row['arm']} | {row['parameters']:,} | {row['before recovery']} "
            f"| {row['tokens']:,} | {after} |"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="stories260K")
    parser.add_argument("--target", type=float, default=0.8)
    parser.add_argument("--tokens", type=int, default=102_400)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--torch-pruning", help="the Python that has torch_pruning")
    parser.add_argument("--limit", type=int, default=600, help="seconds that Torch-Pruning may take")
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=ARMS)
    parser.add_argument("--table", action="store_true", help="print what there is, and stop")
    parser.add_argument("--prune-into", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.table:
        print_table()
    elif arguments.prune_into:
        prune_with_torch_pruning(arguments.model, arguments.target, Path(arguments.prune_into))
    else:
        sys.path.insert(0, str(ROOT))
        measure(arguments)


if __name__ == "__main__":
    main()
