"""Time per token of layers that do not fit in the cache of a CPU, dense and packed; and tokens per second of a model.

    python benchmarks/packed_decode.py
    python benchmarks/packed_decode.py --table

A layer is multiplied with 1 to 64 rows of activations, in bfloat16, by one and by two threads:

    dense       nn.Linear
    dense fp32  nn.Linear in float32
    expanded    PackedLinear, backend "dense": the default
    compiled    PackedLinear, backend "packed", kernel "compiled": reads the packed bytes once
    torch       PackedLinear, backend "packed", kernel "torch": expands a tile, and multiplies it

The kinds take turns within one run, so that what else the machine does strikes all of them. Times are of the clock, and
of the processor (of all threads together), which other programs that run at the same time lengthen less. Bytes are
computed from the shapes: what is read of the weight, and with the kernel "torch" also what is written and read again.
`read GB/s` is how fast torch adds up float32 numbers that do not fit in the cache, in the same run, to compare with.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig

from hf_adaptive_sparse.formats.two_four import unpack
from hf_adaptive_sparse.kernels import compiled
from hf_adaptive_sparse.layers import PackedLinear

RESULTS = Path(__file__).resolve().parent / "results" / "packed_decode.json"
SHAPES = ((8192, 8192), (14336, 4096))  # out, in
ROWS = (1, 4, 16, 64)
# Bytes moved per weight of the dense matrix.
BYTES = {"dense": 2, "dense fp32": 4, "expanded": 2, "compiled": 1.125, "torch": 1.125 + 2 + 2}
BACKENDS = {"expanded": ("dense", "auto"), "compiled": ("packed", "compiled"), "torch": ("packed", "torch")}
SLOW, SLOW_REPEATS = ("dense fp32", "torch"), 2
LEGAL = torch.tensor([4, 8, 9, 12, 13, 14], dtype=torch.uint8)


def random_weight(out: int, width: int) -> torch.Tensor:
    low, high = LEGAL[torch.randint(6, (2, out, width // 8))]
    return unpack(torch.randn(out, width // 2).bfloat16() * width**-0.5, low | high << 4)


def packed_layer(weight: torch.Tensor, kind: str) -> PackedLinear:
    layer = PackedLinear.from_weight(weight)
    backend, kernel = BACKENDS[kind]
    layer.set_backend(backend, kernel=kernel)
    return layer


def layers_of(out: int, width: int, kinds: list[str]) -> dict[str, nn.Linear]:
    weight = random_weight(out, width)
    dense = nn.Linear(width, out, bias=False, device="meta")
    dense.weight = nn.Parameter(weight, requires_grad=False)
    wide = nn.Linear(width, out, bias=False, device="meta")
    wide.weight = nn.Parameter(weight.float(), requires_grad=False)
    made = {"dense": dense, "dense fp32": wide, **{kind: packed_layer(weight, kind) for kind in BACKENDS}}
    return {kind: made[kind] for kind in BYTES if kind in kinds}


Times = list[tuple[float, float]]


def seconds(call: Callable[[], object]) -> tuple[float, float]:
    """Of the clock, and of the processor."""
    clock, processor = time.perf_counter(), time.process_time()
    call()
    return time.perf_counter() - clock, time.process_time() - processor


def middle(times: Times, which: int) -> float:
    return statistics.median(each[which] for each in times)


def ratio(over: Times, under: Times, which: int) -> float:
    """The median of the ratios of calls that followed each other."""
    return round(statistics.median(a[which] / b[which] for a, b in zip(over, under, strict=False)), 2)


def take_turns(calls: dict[str, Callable[[], object]], repeats: int) -> dict[str, Times]:
    """The slow kinds take part in the first turns only."""
    for call in calls.values():
        call()
    found: dict[str, Times] = {kind: [] for kind in calls}
    for turn in range(repeats):
        for kind, call in calls.items():
            if turn < SLOW_REPEATS or kind not in SLOW:
                found[kind].append(seconds(call))
    return found


@torch.inference_mode()
def measure_layer(out: int, width: int, threads: int, repeats: int, kinds: list[str]) -> list[dict]:
    torch.set_num_threads(threads)
    layers, rows_found = layers_of(out, width, kinds), []
    numbers = torch.ones(1 << 26)
    for rows in ROWS:
        x = torch.randn(rows, width).bfloat16()
        inputs = {kind: x.float() if kind == "dense fp32" else x for kind in layers}
        calls = {kind: partial(layer, inputs[kind]) for kind, layer in layers.items()}
        found = take_turns({**calls, "read": numbers.sum}, repeats)
        read = numbers.nbytes / middle(found.pop("read"), 1) / 1e9
        for kind, times in found.items():
            nbytes, clock = BYTES[kind] * out * width, [each[0] for each in times]
            rows_found.append({
                "layer": f"{out} x {width}", "threads": threads, "rows": rows, "kind": kind,
                "ms": round(middle(times, 0) * 1e3, 2), "fastest ms": round(min(clock) * 1e3, 2),
                "slowest ms": round(max(clock) * 1e3, 2), "processor ms": round(middle(times, 1) * 1e3, 2),
                "MB moved": round(nbytes / 1e6, 1),
                "GB per processor second": round(nbytes / middle(times, 1) / 1e9, 1),
                "read GB per processor second": round(read, 1),
                "times as fast as dense": ratio(found["dense"], times, 0),
                "times as fast as dense, processor": ratio(found["dense"], times, 1),
            })  # fmt: skip
            print(rows_found[-1], flush=True)
    return rows_found


def models(hidden: int, blocks: int, kinds: list[str]) -> dict[str, nn.Module]:
    config = LlamaConfig(
        vocab_size=4096, hidden_size=hidden, intermediate_size=11 * hidden // 4, num_hidden_layers=blocks,
        num_attention_heads=hidden // 64, num_key_value_heads=hidden // 64, max_position_embeddings=256,
    )  # fmt: skip
    made: dict[str, nn.Module] = {}
    for kind in (each for each in ("dense", *BACKENDS) if each in kinds):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()
        for name, module in list(model.named_modules()):
            if type(module) is nn.Linear and name != "lm_head":
                weight = random_weight(*module.weight.shape)
                module.weight.data.copy_(weight)
                if kind != "dense":
                    model.set_submodule(name, packed_layer(weight, kind))
        made[kind] = model
    return made


@torch.inference_mode()
def measure_model(hidden: int, blocks: int, threads: int, repeats: int, kinds: list[str]) -> list[dict]:
    tokens = 16
    torch.set_num_threads(threads)
    prompt = torch.randint(4096, (1, 8), generator=torch.Generator().manual_seed(1))
    options = {"max_new_tokens": tokens, "min_new_tokens": tokens, "do_sample": False, "pad_token_id": 0}
    made = models(hidden, blocks, kinds)
    calls = {kind: partial(model.generate, prompt, **options) for kind, model in made.items()}
    found, rows = take_turns(calls, repeats), []
    for kind, times in found.items():
        held = sum(each.nbytes for each in (*made[kind].parameters(), *made[kind].buffers()))
        clock = [each[0] for each in times]
        rows.append({
            "model": f"Llama, hidden {hidden}, {blocks} blocks", "threads": threads, "kind": kind,
            "tokens/s": round(tokens / middle(times, 0), 2), "slowest tokens/s": round(tokens / max(clock), 2),
            "fastest tokens/s": round(tokens / min(clock), 2),
            "tokens per processor second": round(tokens / middle(times, 1), 2), "MB held": round(held / 1e6, 1),
            "times as fast as dense": ratio(found["dense"], times, 0),
            "times as fast as dense, processor": ratio(found["dense"], times, 1),
        })  # fmt: skip
        print(rows[-1], flush=True)
    return rows


def print_table() -> None:
    results = json.loads(RESULTS.read_text())
    print(f"{results['processor']}; kernel {results['instruction set']}; torch {results['torch']}\n")
    keys = ("layer", "threads", "rows")
    kinds = [kind for kind in BYTES if any(row["kind"] == kind for row in results["layers"])]
    print("Processor milliseconds of all threads; how much faster the compiled kernel is, by processor and by clock.\n")
    print(f"| layer | threads | rows | {' | '.join(kinds)} | by processor | by clock | GB/s | read GB/s |")
    print("|---|---:|---:|" + "---:|" * (len(kinds) + 4))
    for place in dict.fromkeys(tuple(row[key] for key in keys) for row in results["layers"]):
        own = {row["kind"]: row for row in results["layers"] if tuple(row[key] for key in keys) == place}
        times = " | ".join(f"{own[kind]['processor ms']:.1f}" if kind in own else "" for kind in kinds)
        fast = own["compiled"]
        print(
            f"| {' | '.join(map(str, place))} | {times} | {fast['times as fast as dense, processor']} "
            f"| {fast['times as fast as dense']} | {fast['GB per processor second']} "
            f"| {fast['read GB per processor second']} |"
        )
    print("\n| model | threads | kind | tokens/s (slowest to fastest) | of processor time | MB held | by processor |")
    print("|---|---:|---|---:|---:|---:|---:|")
    for row in results["models"]:
        spread = f"{row['tokens/s']} ({row['slowest tokens/s']} to {row['fastest tokens/s']})"
        print(
            f"| {row['model']} | {row['threads']} | {row['kind']} | {spread} | {row['tokens per processor second']} "
            f"| {row['MB held']} | {row['times as fast as dense, processor']} |"
        )


def processor() -> str:
    """Its name and its cache, as far as Linux tells."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    name = next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    cache = Path("/sys/devices/system/cpu/cpu0/cache/index3/size")
    return name + (f", L3 {cache.read_text().strip()}" if cache.exists() else "")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--threads", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--kinds", nargs="+", choices=tuple(BYTES), default=list(BYTES), help="with dense")
    parser.add_argument("--table", action="store_true", help="print what there is, and stop")
    arguments = parser.parse_args()
    if not arguments.table:
        # What is measured now replaces what there is of as many threads.
        before = json.loads(RESULTS.read_text()) if RESULTS.exists() else {"layers": [], "models": []}
        rest = {
            key: [row for row in before[key] if row["threads"] not in arguments.threads] for key in ("layers", "models")
        }
        torch.manual_seed(0)
        for threads in arguments.threads:
            for out, width in SHAPES:
                rest["layers"] += measure_layer(out, width, threads, arguments.repeats, arguments.kinds)
            rest["models"] += measure_model(1024, 8, threads, arguments.repeats, arguments.kinds)
        results = {
            "processor": processor(),
            "instruction set": compiled.LEVELS[compiled.load().level],
            "torch": torch.__version__,
            "layers": rest["layers"],
            "models": rest["models"],
        }
        RESULTS.write_text(json.dumps(results, indent=2) + "\n")
    print_table()


if __name__ == "__main__":
    main()
