"""Time and peak memory of converting a bitmask folder of compressed-tensors, and of masks, next to a plain export.

    python benchmarks/import_cost.py                 300 million weights in bfloat16: 0.6 GB dense
    python benchmarks/import_cost.py --blocks 1      a quick look

A random 2:4 Llama is written as an ordinary folder, as `sparse-24-bitmask`, and as masks. Each case then runs in a
fresh process: "plain export" loads the ordinary folder and saves it packed, "import" does the same from the bitmask
folder, "save masks" and "apply masks" work on loaded models. Peak is VmHWM (Linux) minus what was resident after the
imports of Python, in units of the dense weights. Results go to benchmarks/results/import_cost.json.
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
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from hf_adaptive_sparse import apply_masks, import_checkpoint, save_masks, save_packed
from hf_adaptive_sparse.patterns import NMPattern

RESULTS = Path(__file__).parent / "results" / "import_cost.json"
CASES = ("plain export", "import", "save masks", "apply masks")


def write_sources(root: Path, blocks: int, hidden: int) -> int:
    """All that the cases read. Returns the bytes of the dense weights."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=512, hidden_size=hidden, intermediate_size=hidden * 11 // 4 // 64 * 64, num_hidden_layers=blocks,
        num_attention_heads=hidden // 64,
    )  # fmt: skip
    model = LlamaForCausalLM(config).to(torch.bfloat16)
    model.save_pretrained(root / "base")
    state, bits = model.state_dict(), torch.arange(8, dtype=torch.uint8)
    stored = {}
    for name, weight in state.items():
        if not name.endswith("proj.weight"):
            stored[name] = weight
            continue
        keep = NMPattern(2, 4).keep_mask(weight.abs())
        weight.masked_fill_(~keep, 0.0)
        layer = name.removesuffix(".weight")
        stored[f"{layer}.compressed"] = weight[keep].view(weight.shape[0], -1)
        stored[f"{layer}.bitmask"] = (keep.unflatten(1, (-1, 8)).to(torch.uint8) << bits).sum(-1, dtype=torch.uint8)
        stored[f"{layer}.shape"] = torch.tensor(weight.shape).unsqueeze(1)
    model.save_pretrained(root / "plain")
    settings = {"quant_method": "compressed-tensors", "sparsity_config": {"format": "sparse-24-bitmask"}}
    (root / "bitmask").mkdir()
    save_file(stored, root / "bitmask" / "model.safetensors")
    content = config.to_dict() | {"dtype": "bfloat16", "quantization_config": settings}
    (root / "bitmask" / "config.json").write_text(json.dumps(content))
    save_masks(model, root / "masks")
    return sum(weight.nbytes for weight in state.values())


def memory(key: str) -> int:
    """Bytes of this process: VmHWM, the peak, or VmRSS, now."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key))


def run_case(case: str, root: Path) -> dict[str, float]:
    def load(name: str) -> torch.nn.Module:
        return AutoModelForCausalLM.from_pretrained(root / name, dtype="auto")

    model = load("plain") if case == "save masks" else load("base") if case == "apply masks" else None
    before, start = memory("VmRSS"), time.perf_counter()
    with tempfile.TemporaryDirectory(dir=root) as out:
        target = Path(out) / "out"
        if case == "plain export":
            save_packed(load("plain"), target)
        elif case == "import":
            import_checkpoint(root / "bitmask", target)
        elif case == "save masks":
            save_masks(model, target)
        else:
            assert apply_masks(model, root / "masks").exact is True
        seconds = time.perf_counter() - start
    return {"seconds": round(seconds, 2), "peak_bytes": memory("VmHWM") - before}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--blocks", type=int, default=6)
    parser.add_argument("--hidden", type=int, default=2048)
    parser.add_argument("--case", choices=CASES, help=argparse.SUPPRESS)
    parser.add_argument("--root", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.case:
        print(json.dumps(run_case(arguments.case, arguments.root)))
        return
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        dense = write_sources(root, arguments.blocks, arguments.hidden)
        rows = []
        for case in CASES:
            command = [sys.executable, __file__, "--case", case, "--root", name]
            result = subprocess.run(command, capture_output=True, text=True, check=True)
            found = json.loads(result.stdout.splitlines()[-1])
            rows.append({"case": case, **found, "peak_of_dense": round(found["peak_bytes"] / dense, 3)})
            print(rows[-1], flush=True)
        sizes = {part: sum(file.stat().st_size for file in (root / part).glob("*.safetensors")) for part in
                 ("plain", "bitmask", "masks")}  # fmt: skip
    for row in rows:
        row["seconds_of_plain_export"] = round(row["seconds"] / rows[0]["seconds"], 3)
    content = {
        "dense_bytes": dense, "file_bytes": sizes, "masks_of_dense": round(sizes["masks"] / dense, 4), "rows": rows,
        "threads": torch.get_num_threads(), "torch": torch.__version__, "machine": platform.machine(),
    }  # fmt: skip
    RESULTS.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
