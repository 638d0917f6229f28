"""Speed and memory of shrunk models next to their dense selves: prefill, decoding, peak memory, on a CPU.

    python benchmarks/shrunk_speed.py                     a random Llama of 103 M parameters, and stories3M
    python benchmarks/shrunk_speed.py --models random     the first alone, which needs no files

Each model is shrunk to 80 and 60 % of its parameters, saved, and opened again as a user would. The random one gets
equal widths in multiples of 64 (its weights say nothing about which units matter), stories3M widths by block. Prefill
is one pass over a prompt; decoding is greedy, token by token, with a cache. In one process and one thread the models
take turns; seconds are those of the processor, and a ratio is the median over turns of dense seconds / shrunk seconds,
so that what else the machine does counts little and hits all alike. Memory is the peak of a process that opens one
model and does both, less what it had before it opened it (Linux). Writes benchmarks/results/shrunk_speed.json.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from hf_adaptive_sparse.hf.shrink import kv_values, shrink
from hf_adaptive_sparse.hf.shrunk_export import export_shrunk
from hf_adaptive_sparse.methods.adaptive_width.config import ShrinkConfig

ROOT = Path(__file__).resolve().parents[1]
STORIES3M = ROOT.parent / "shared" / "models" / "stories3M"
RESULTS = ROOT / "benchmarks" / "results" / "shrunk_speed.json"
SHAPE = {
    "vocab_size": 8192, "hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 8,
    "num_attention_heads": 16, "num_key_value_heads": 8, "tie_word_embeddings": True, "max_position_embeddings": 1024,
}  # fmt: skip
TARGETS = (0.8, 0.6)
PROMPT, NEW = 256, 32  # tokens
MIB = 2**20


def dense_model(name: str) -> nn.Module:
    if name == "random":
        torch.manual_seed(0)
        return LlamaForCausalLM(LlamaConfig(**SHAPE))
    return AutoModelForCausalLM.from_pretrained(STORIES3M, dtype=torch.float32)


def save_all(name: str, folder: Path) -> dict[str, Path]:
    """The dense model and its shrunk ones, by what they are called."""
    model = dense_model(name)
    model.save_pretrained(folder / "dense")
    ids = torch.randint(model.config.vocab_size, (8, 64), generator=torch.Generator().manual_seed(0))
    saved = {"dense": folder / "dense"}
    for target in TARGETS:
        model = dense_model(name)
        if name == "random":
            config = ShrinkConfig(target=target, step=1.0, score="l2", equal_widths=True, multiple_of=64)
        else:
            config = ShrinkConfig(target=target, step=0.2)
        shrink(model, ids, config)
        saved[f"{target:.0%}"] = folder / f"{target:.0%}"
        export_shrunk(model, saved[f"{target:.0%}"])
    return saved


def load(folder: Path) -> nn.Module:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


@torch.no_grad()
def prefill(model: nn.Module, ids: torch.Tensor) -> None:
    model(ids, use_cache=True, logits_to_keep=1)


@torch.no_grad()
def decode(model: nn.Module, ids: torch.Tensor) -> None:
    model.generate(ids[:, :8], max_new_tokens=NEW, min_new_tokens=NEW, do_sample=False, pad_token_id=0)


def seconds(work: Callable[..., None], model: nn.Module, ids: torch.Tensor) -> float:
    start = time.process_time()
    work(model, ids)
    return time.process_time() - start


def prompt(model: nn.Module) -> torch.Tensor:
    return torch.randint(3, model.config.vocab_size, (1, PROMPT), generator=torch.Generator().manual_seed(1))


def measure_memory(folder: Path) -> None:
    """Print the growth of the peak of this process, in bytes."""
    before = peak()
    model = load(folder)
    prefill(model, prompt(model))
    decode(model, prompt(model))
    print(peak() - before)


def peak() -> int:
    """Bytes, of this program alone: getrusage would also know what the one that started it had."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line.split()[1] for line in lines if line.startswith("VmHWM")))


def measure(name: str, turns: int) -> list[dict]:
    with tempfile.TemporaryDirectory() as scratch:
        saved = save_all(name, Path(scratch))
        peaks = {}
        for label, folder in saved.items():
            command = [sys.executable, __file__, "--memory-of", str(folder)]
            peaks[label] = int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
        models = {label: load(folder) for label, folder in saved.items()}
    ids = prompt(models["dense"])
    times: dict[tuple[str, str], list[float]] = {}
    work = {"prefill": prefill, "decode": decode}
    for turn in range(turns + 1):
        for phase, function in work.items():
            for label, model in models.items():
                spent = seconds(function, model, ids)
                if turn:  # the first warms up
                    times.setdefault((phase, label), []).append(spent)
    rows = []
    for label, model in models.items():
        row = {
            "model": name, "size": label, "parameters": model.num_parameters(), "KV values per token": kv_values(model),
            "peak MiB": round(peaks[label] / MIB, 1), "peak / dense": round(peaks[label] / peaks["dense"], 3),
        }  # fmt: skip
        for phase, tokens in (("prefill", PROMPT), ("decode", NEW)):
            own, dense = times[phase, label], times[phase, "dense"]
            ratios = [slow / fast for slow, fast in zip(dense, own, strict=True)]
            row[f"{phase} tokens/s"] = round(tokens / statistics.median(own), 1)
            row[f"{phase} speed / dense"] = round(statistics.median(ratios), 3)
            row[f"{phase} spread"] = [round(min(ratios), 3), round(max(ratios), 3)]
        rows.append(row)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=["random", "stories3M"], default=["random", "stories3M"])
    parser.add_argument("--turns", type=int, default=9)
    parser.add_argument("--memory-of", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.memory_of:
        measure_memory(Path(arguments.memory_of))
        return
    rows = []
    for name in arguments.models:
        rows += measure(name, arguments.turns)
        for row in rows[-1 - len(TARGETS) :]:
            print(json.dumps(row), flush=True)
    about = {
        "torch": torch.__version__, "machine": platform.machine(), "threads": 1,
        "turns": arguments.turns, "prompt": PROMPT, "new tokens": NEW, "dtype": "float32",
    }  # fmt: skip
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps({"about": about, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
