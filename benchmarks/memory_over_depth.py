"""Peak memory of one-shot pruning over the depth of the model: one block and the activations, however many blocks.

    python benchmarks/memory_over_depth.py
    python benchmarks/memory_over_depth.py --table

Llama models with random weights and 4, 8, 16 and 32 equal blocks are pruned to 2:4, each in a process of its own, with
and without --offload disk. Reported is the largest anonymous memory (RssAnon of Linux: what the process allocated, not
files mapped into it, which the system drops when it needs the room), above what it was when the model was loaded.
"""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from hf_adaptive_sparse.hf.one_shot import one_shot
from hf_adaptive_sparse.methods.one_shot import OneShotConfig

RESULTS = Path(__file__).resolve().parent / "results" / "memory_over_depth.json"
HIDDEN, INTERMEDIATE, VOCABULARY = 512, 1408, 512
WINDOWS, LENGTH = 8, 256
MB = 1e6


def anonymous_memory() -> int:
    """Bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    raise OSError("/proc/self/status has no RssAnon: this benchmark needs Linux 4.5 or newer.")


class Peak:
    """The largest anonymous memory while it is open, looked at every 5 ms."""

    def __enter__(self) -> Peak:
        self.bytes, self._done = anonymous_memory(), threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def _watch(self) -> None:
        while not self._done.wait(0.005):
            self.bytes = max(self.bytes, anonymous_memory())

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()


def prune(folder: str, method: str, offload: str) -> None:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokens = torch.randint(VOCABULARY, (WINDOWS, LENGTH), generator=torch.Generator().manual_seed(0))
    start = anonymous_memory()
    with Peak() as peak:
        one_shot(model, tokens, OneShotConfig(method=method), offload=offload, batch_size=4)
    print(json.dumps({"peak": (peak.bytes - start) / MB, "start": start / MB}))


def measure(blocks: int, method: str, offload: str) -> dict:
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=HIDDEN, intermediate_size=INTERMEDIATE, num_hidden_layers=blocks,
        num_attention_heads=8, num_key_value_heads=8, max_position_embeddings=LENGTH,
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        model.save_pretrained(folder)
        size = 4 * model.num_parameters() / MB
        del model
        command = [sys.executable, __file__, "--prune", folder, method, offload]
        done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        sys.exit(done.stderr[-3000:])
    found = json.loads(done.stdout.splitlines()[-1])
    return {
        "blocks": blocks, "method": method, "offload": offload, "model MB": round(size),
        "MB when loaded": round(found["start"]), "MB on top": round(found["peak"]), "tokens": WINDOWS * LENGTH,
        "hidden": HIDDEN, "torch": torch.__version__, "machine": platform.machine(),
    }  # fmt: skip


def print_table() -> None:
    rows = json.loads(RESULTS.read_text())
    depths = sorted({row["blocks"] for row in rows})
    print(f"| method | offload | {' | '.join(f'{depth} blocks' for depth in depths)} |")
    print(f"|---|---|{'---:|' * len(depths)}")
    for method, offload in dict.fromkeys((row["method"], row["offload"]) for row in rows):
        own = [row for row in rows if (row["method"], row["offload"]) == (method, offload)]
        found = {row["blocks"]: row["MB on top"] for row in own}
        print(f"| {method} | {offload} | {' | '.join(f'{found[depth]} MB' for depth in depths)} |")
    sizes = {row["blocks"]: row["model MB"] for row in rows}
    print(f"| weights of the model | | {' | '.join(f'{sizes[depth]} MB' for depth in depths)} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--blocks", nargs="+", type=int, default=[4, 8, 16, 32])
    parser.add_argument("--methods", nargs="+", default=["fast", "balanced", "best"])
    parser.add_argument("--offload", nargs="+", default=["none", "disk"])
    parser.add_argument("--table", action="store_true", help="print what there is, and stop")
    parser.add_argument("--prune", nargs=3, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.prune:
        prune(*arguments.prune)
        return
    if arguments.table:
        print_table()
        return
    rows = []
    for method in arguments.methods:
        for offload in arguments.offload:
            for blocks in arguments.blocks:
                rows.append(measure(blocks, method, offload))
                print(json.dumps(rows[-1]), flush=True)
                RESULTS.parent.mkdir(exist_ok=True)
                RESULTS.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
