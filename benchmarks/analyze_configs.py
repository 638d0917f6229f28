"""`analyze` on known models from their configs alone: sizes next to the published arithmetic, time and memory.

Each model is analyzed in a process of its own, on the machine "h100" of the table, so that nothing is measured here but
the analysis itself.

    python benchmarks/analyze_configs.py
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from transformers import AutoConfig

_LLAMA = {"hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32}
_TIED = {"tie_word_embeddings": True}
MODELS = {
    "Llama-2-7B": ("llama", {**_LLAMA, "vocab_size": 32000, "intermediate_size": 11008}),
    "Llama-3.1-8B": (
        "llama", {**_LLAMA, "vocab_size": 128256, "intermediate_size": 14336, "num_key_value_heads": 8},
    ),
    "Llama-3.2-1B": (
        "llama", {
            "vocab_size": 128256, "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16,
            "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 64, **_TIED,
        },
    ),
    "Qwen2.5-0.5B": (
        "qwen2", {
            "vocab_size": 151936, "hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 24,
            "num_attention_heads": 14, "num_key_value_heads": 2, **_TIED,
        },
    ),
    "Llama-3.1-70B": (
        "llama", {
            "vocab_size": 128256, "hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80,
            "num_attention_heads": 64, "num_key_value_heads": 8,
        },
    ),
}  # fmt: skip
# Size of the file, what a decoded token reads and caps decoding at: computed by hand from the shapes.
EXPECTED = {
    "Llama-2-7B": (0.58, 1.75),
    "Llama-3.1-8B": (0.62, 1.69),
    "Llama-3.2-1B": (0.66, 1.53),
    "Qwen2.5-0.5B": (0.68, 1.46),
}
_RUN = """
import json, resource, sys, time
from hf_adaptive_sparse.cli.main import main
before, started = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
import hf_adaptive_sparse.cli.analyze
loaded, imported = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
assert main(["analyze", *sys.argv[1:]]) == 0
after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
print(json.dumps({"cpu seconds": time.process_time() - imported, "MB on top": (after - loaded) / 1000}))
"""


def analyzed(name: str, folder: Path) -> dict:
    """One row of the table."""
    model_type, options = MODELS[name]
    AutoConfig.for_model(model_type, **options, dtype="bfloat16").save_pretrained(folder / name)
    options = ["--hardware", "h100", "--overwrite", "--output-dir", str(folder / "out")]
    command = [sys.executable, "-c", _RUN, str(folder / name), *options]
    path = os.pathsep.join(filter(None, (str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH"))))
    environment = os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    run = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    report = json.loads((folder / "out" / "report.json").read_text(encoding="utf-8"))
    form = next(row for row in report["forms"] if row["form"] == "2:4")
    costs = {row["job"]: round(row["device_bytes"] / 1e9, 2) for row in report["costs"]}
    return {
        "model": name,
        "file ratio": round(form["file_ratio"], 4),
        "decode cap": round(1 / form["token_ratio"], 3),
        "expected": EXPECTED.get(name),
        "peak of the jobs, GB": costs,
        **{key: round(value, 2) for key, value in json.loads(run.stdout.strip().splitlines()[-1]).items()},
    }


def main() -> None:
    """Analyze all models, write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "analyze_configs.json")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        rows = []
        for name in MODELS:
            rows.append(analyzed(name, Path(folder)))
            print(json.dumps(rows[-1]), flush=True)
    arguments.output.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
