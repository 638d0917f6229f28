"""Loading and verifying a packed checkpoint of 1 GB, and packing 1 GB of weights, next to safetensors' own work.

    python benchmarks/packed_files.py
    python benchmarks/packed_files.py --folder /dev/shm     # without the disk
    python benchmarks/packed_files.py --table

Random 2:4 weights of a Llama are written to a temporary folder, packed and dense; the files are in the page cache,
since they were just written. Reported are seconds of the clock and of the processor: the kinds take turns in one
process, after a tiny model was loaded in each way, so that no import is in it. And of a fresh process for each kind,
the most memory that it allocated (RssAnon of Linux, above what it had before; a file that is mapped into memory is page
cache, and does not count).

Dense loads of the same parameters:
    mapped   load_file, which maps the file and reads nothing of it
    read     the same, and one byte of every page is read, as the first forward pass would do
    copied   the same, and every tensor is copied into memory of the process
    model    from_pretrained, and one byte of every page is read
Packed loads are from_pretrained with every digest compared, and one byte of every page read.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

RESULTS = Path(__file__).resolve().parent / "results" / "packed_files.json"
HIDDEN, INTERMEDIATE, VOCABULARY = 2048, 8192, 1024
DENSE, PACKED = "model.safetensors", "model.sparse24.safetensors"
LOADS = ("mapped", "read", "copied", "model", "packed", "packed, no digests", "packed, expanded")
GB = 1e9


def make(folder: Path, layers: int, hidden: int = HIDDEN, intermediate: int = INTERMEDIATE) -> None:
    """A random 2:4 model, dense and packed."""
    from transformers import AutoModelForCausalLM, LlamaConfig

    from hf_adaptive_sparse.formats.two_four import unpack
    from hf_adaptive_sparse.hf.pretrained import save_packed

    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=hidden, intermediate_size=intermediate, num_hidden_layers=layers,
        num_attention_heads=16, num_key_value_heads=16, tie_word_embeddings=True,
    )  # fmt: skip
    torch.manual_seed(0)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.to_empty(device="cpu").tie_weights()
    legal = torch.tensor([4, 8, 9, 12, 13, 14], dtype=torch.uint8)
    for parameter in model.parameters():
        if parameter.ndim == 2 and parameter.shape[0] != VOCABULARY:
            rows, columns = parameter.shape
            low, high = legal[torch.randint(6, (2, rows, columns // 8), dtype=torch.int32)]
            # Any sign and significant bits, sizes from 2^-11 to 2^-3.
            bits = torch.randint(-(2**15), 2**15, (rows, columns // 2), dtype=torch.int16)
            values = (bits & -0x7C01 | 0x3800).view(torch.bfloat16)
            parameter.data.copy_(unpack(values, low | high << 4))
        else:
            parameter.data.fill_(0.5)
    model.save_pretrained(folder / "dense", max_shard_size="100GB")
    save_packed(model, folder / "packed", max_shard_size="100GB")


def anonymous_memory() -> int:
    """Bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    raise OSError("/proc/self/status has no RssAnon: this benchmark needs Linux 4.5 or newer.")


class Peak:
    """The largest anonymous memory while it is open, above that before, looked at every 5 ms."""

    def __enter__(self) -> Peak:
        self.start = self.bytes = anonymous_memory()
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def _watch(self) -> None:
        while not self._done.wait(0.005):
            self.bytes = max(self.bytes, anonymous_memory())

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()
        self.bytes -= self.start


def touch(tensors) -> None:
    """Read a byte of every page."""
    for tensor in tensors:
        tensor.detach().view(-1).view(torch.uint8)[:: os.sysconf("SC_PAGESIZE")].sum()


def tensors_of(model) -> list[torch.Tensor]:
    return [*model.parameters(), *model.buffers()]


def load(folder: Path, kind: str) -> None:
    """Everything is dropped at the end."""
    if kind in ("mapped", "read", "copied"):
        tensors = list(load_file(folder / "dense" / DENSE).values())
        if kind == "copied":
            tensors = [tensor.clone() for tensor in tensors]
        elif kind == "read":
            touch(tensors)
        return
    from transformers import AutoModelForCausalLM

    from hf_adaptive_sparse.hf.quantizer import loading_options

    if kind == "model":
        touch(tensors_of(AutoModelForCausalLM.from_pretrained(folder / "dense")))
        return
    backend = "dense" if kind.endswith("expanded") else "packed"
    with loading_options(backend=backend, verify="no digests" not in kind):
        touch(tensors_of(AutoModelForCausalLM.from_pretrained(folder / "packed")))


def write(folder: Path, kind: str) -> None:
    """From one file to another."""
    target = folder / "written"
    if kind == "pack":
        from transformers import AutoModelForCausalLM

        from hf_adaptive_sparse.hf.pretrained import save_packed

        save_packed(AutoModelForCausalLM.from_pretrained(folder / "dense"), target, overwrite=True)
        return
    target.mkdir(exist_ok=True)
    save_file(load_file(folder / "dense" / DENSE), target / DENSE)
    if kind == "copy, flushed":
        with open(target / DENSE, "rb") as file:
            os.fsync(file.fileno())


RATIOS = {  # (over, under, target)
    "load": {
        "packed load, verified / dense load, read": ("packed", "read", 1.3),
        "packed load, verified / dense load, copied": ("packed", "copied", 1.3),
        "packed load, verified / from_pretrained of dense": ("packed", "model", 1.3),
        "packed load, expanded / from_pretrained of dense": ("packed, expanded", "model", None),
    },
    "write": {
        "pack / plain copy": ("pack", "copy", 3.0),
        "pack / plain copy, flushed": ("pack", "copy, flushed", 3.0),
    },
}
STEPS = {"load": load, "write": write}
KINDS = {"load": LOADS, "write": ("copy", "copy, flushed", "pack")}


def times(step: str, folder: Path, repeats: int) -> dict[str, list[dict[str, float]]]:
    """Of every kind and repetition, the seconds."""
    found: dict[str, list[dict[str, float]]] = {kind: [] for kind in KINDS[step]}
    for kind in KINDS[step]:
        STEPS[step](folder / "tiny", kind)
    for _ in range(repeats):
        for kind in KINDS[step]:
            shutil.rmtree(folder / "written", ignore_errors=True)
            clock, processor = time.perf_counter(), time.process_time()
            STEPS[step](folder, kind)
            found[kind].append({"seconds": time.perf_counter() - clock, "cpu": time.process_time() - processor})
            print(step, kind, found[kind][-1], file=sys.stderr, flush=True)
    return found


def memory(step: str, folder: Path, kind: str) -> float:
    """Bytes allocated at most."""
    STEPS[step](folder / "tiny", kind)
    with Peak() as peak:
        STEPS[step](folder, kind)
    return peak.bytes


def in_a_process(step: str, folder: Path, *arguments: object):
    command = [sys.executable, __file__, "--step", step, str(folder), *map(str, arguments)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, env={**os.environ, "HF_HUB_OFFLINE": "1"})
    if done.returncode:
        sys.exit(f"{' '.join(command)} failed")
    return json.loads(done.stdout.splitlines()[-1])


def run_step(step: str, folder: Path, arguments: list[str]):
    torch.set_num_threads(1)
    if step == "make":
        make(folder, int(arguments[0]))
        if not (folder / "tiny").exists():
            make(folder / "tiny", 1, 64, 64)
        return None
    if step.startswith("memory "):
        return memory(step.removeprefix("memory "), folder, arguments[0])
    return times(step, folder, int(arguments[0]))


def summary(runs: list[dict[str, float]], nbytes: float) -> dict[str, float | list[float]]:
    middle = {key: round(statistics.median(run[key] for run in runs), 3) for key in runs[0]}
    return {**middle, "all seconds": [round(run["seconds"], 3) for run in runs], "memory GB": round(nbytes / GB, 3)}


def print_table() -> None:
    results = json.loads(RESULTS.read_text())
    sizes = results["sizes GB"]
    print(", ".join(f"{name} {size:.2f} GB" for name, size in sizes.items()))
    print(f"{results['folder']}; {results['threads']} thread\n")
    print("| | seconds | processor seconds | memory GB |\n|---|---:|---:|---:|")
    for step in ("load", "write"):
        for kind, row in results[step].items():
            print(f"| {step}: {kind} | {row['seconds']:.2f} | {row['cpu']:.2f} | {row['memory GB']:.2f} |")
    print("\n| ratio | by the clock | by the processor | target |\n|---|---:|---:|---:|")
    for name, row in results["ratios"].items():
        print(f"| {name} | {row['seconds']:.2f} | {row['cpu']:.2f} | {row.get('target') or ''} |")


def ratio(found: dict, over: str, under: str, target: float | None) -> dict:
    """The median of the ratios of runs that followed each other."""
    pairs = list(zip(found[over], found[under], strict=True))
    middle = {
        key: round(statistics.median(a[key] / max(b[key], 1e-9) for a, b in pairs), 3) for key in ("seconds", "cpu")
    }
    return {**middle, "target": target}


def measure(step: str, folder: Path, arguments: argparse.Namespace, results: dict) -> dict:
    """The summaries of a step; sizes and ratios are added to `results`."""
    in_a_process("make", folder, arguments.layers if step == "load" else 8)
    dense, packed = folder / "dense" / DENSE, folder / "packed" / PACKED
    if step == "load":
        results["sizes GB"] |= {"packed": packed.stat().st_size / GB, "dense": dense.stat().st_size / GB}
    else:
        results["sizes GB"]["written"] = dense.stat().st_size / GB
    found = in_a_process(step, folder, arguments.repeats)
    held = {kind: in_a_process(f"memory {step}", folder, kind) for kind in KINDS[step]}
    for path in ("packed", "dense"):
        shutil.rmtree(folder / path)
    for name, (over, under, target) in RATIOS[step].items():
        results["ratios"][name] = ratio(found, over, under, target)
    if step == "load":
        module = 2 * 0.5625 * HIDDEN * INTERMEDIATE / GB
        results["memory of a packed load, GB"] = round(held["packed"] / GB, 3)
        results["memory allowed, GB"] = round(1.1 * results["sizes GB"]["packed"] + module, 3)
    return {kind: summary(runs, held[kind]) for kind, runs in found.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", default=tempfile.gettempdir(), help="where the temporary folder is made")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--layers", type=int, default=14, help="of the model that is loaded; 14 are 1.06 GB packed")
    parser.add_argument("--steps", nargs="+", choices=tuple(KINDS), default=list(KINDS))
    parser.add_argument("--table", action="store_true", help="print what there is, and stop")
    parser.add_argument("--step", nargs="+", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.step:
        print(json.dumps(run_step(arguments.step[0], Path(arguments.step[1]), arguments.step[2:])))
        return
    if arguments.table:
        print_table()
        return
    # What is measured now replaces what there is of the same steps.
    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {"sizes GB": {}, "ratios": {}}
    with tempfile.TemporaryDirectory(dir=arguments.folder) as name:
        folder = Path(name)
        kind = subprocess.run(["stat", "-f", "-c", "%T", name], capture_output=True, text=True).stdout.strip()
        for step in arguments.steps:
            results |= {"folder": f"files on {kind}", "threads": 1, "torch": torch.__version__}
            results |= {"machine": platform.machine(), step: measure(step, folder, arguments, results)}
    RESULTS.write_text(json.dumps(results, indent=2) + "\n")
    print_table()


if __name__ == "__main__":
    main()
