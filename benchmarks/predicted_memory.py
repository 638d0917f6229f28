"""Peak memory of prune, train and shrink as `analyze` predicts it, next to what the jobs took, on a CPU.

A random Llama of width 1024 with 4 blocks, float32: large enough for its weights and activations to be most of it. Each
job is a process of its own; what it had before it began (Python and the libraries) is taken off. The jobs also measure
perplexity, save and load back, which the prediction does not count.

    python benchmarks/predicted_memory.py --tokenizer FOLDER --data FILE
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

_RUN = """
import json, sys, torch
from hf_adaptive_sparse.cli.main import main
import hf_adaptive_sparse.cli.prune, hf_adaptive_sparse.cli.train, hf_adaptive_sparse.cli.shrink
from hf_adaptive_sparse.hf.bench_worker import peak_bytes, start_memory
torch.set_num_threads(1)
before = start_memory(torch.device("cpu"))
assert main(sys.argv[1:]) == 0
print(json.dumps(peak_bytes(torch.device("cpu")) - before))
"""
_STEPS = 2
_COMMON = ["--device", "cpu", "--batch-size", "8", "--window", "256", "--eval-windows", "2"]
JOBS = {
    "prune --method fast": ["prune", "--method", "fast", "--offload", "disk", "--calibration-windows", "32"],
    "train": ["train", "--mask-interval", "1", "--train-tokens", str(_STEPS * 8 * 256)],
    "shrink": ["shrink", "--train-tokens", str(_STEPS * 8 * 256), "--stages", "1"],
}


def run(arguments: list[str]) -> str:
    """The last line that the job prints."""
    path = os.pathsep.join(filter(None, (str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH"))))
    environment = os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", _RUN, *arguments], capture_output=True, text=True, env=environment, check=False
    )
    if done.returncode:
        raise SystemExit(done.stderr)
    return done.stdout.strip().splitlines()[-1]


def main() -> None:
    """Predict, run, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokenizer", required=True)
    parser.add_argument("--data", required=True)
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "predicted_memory.json")
    parser.add_argument("--jobs", nargs="+", default=list(JOBS), choices=JOBS)
    arguments = parser.parse_args()
    rows = {}
    if arguments.output.exists():
        rows = {row["job"]: row for row in json.loads(arguments.output.read_text(encoding="utf-8"))}
    with tempfile.TemporaryDirectory() as folder:
        model = str(Path(folder, "llama-1024x4"))
        tokenizer = AutoTokenizer.from_pretrained(arguments.tokenizer)
        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=len(tokenizer), hidden_size=1024, intermediate_size=2816, num_hidden_layers=4,
            num_attention_heads=16, tie_word_embeddings=True,
        )  # fmt: skip
        LlamaForCausalLM(config).save_pretrained(model)
        tokenizer.save_pretrained(model)
        given = ["--hardware", "given", "--gb-per-second", "1", "--gflop-per-second", "1", "--dtype", "float32"]
        run(["analyze", model, *given, "--calibration-windows", "32", "--output-dir", f"{folder}/analysis"])
        report = json.loads(Path(folder, "analysis", "report.json").read_text(encoding="utf-8"))
        predicted = {row["job"]: row["device_bytes"] for row in report["costs"]}
        for number, job in enumerate(arguments.jobs):
            options = JOBS[job]
            output = ["--data", arguments.data, "--output-dir", f"{folder}/{number}"]
            taken = int(run([options[0], model, *options[1:], *_COMMON, *output]))
            rows[job] = {
                "model": Path(model).name, "job": job, "predicted MB": round(predicted[job] / 1e6, 1),
                "measured MB": round(taken / 1e6, 1), "measured / predicted": round(taken / predicted[job], 2),
            }  # fmt: skip
            print(json.dumps(rows[job]), flush=True)
            arguments.output.write_text(json.dumps(list(rows.values()), indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
