"""The shapes of Llama-2-7B on this machine: dense next to every backend, the crossing points, and what is chosen.

On a CPU with 1 to 256 rows, on CUDA with 1 to 4096 and with cuSPARSELt. Prints one table and writes it, with the rule
that it shows: a backend is chosen only where it was faster than dense in every repetition. With one thread on a CPU,
seconds are those of the processor, so that other programs on the machine count less.

    python benchmarks/never_slower.py --dtype bfloat16
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import torch

from hf_adaptive_sparse.backend_choice import choose, crossing_points
from hf_adaptive_sparse.backend_forwards import competes
from hf_adaptive_sparse.backend_timing import cautious_seconds, device_clock
from hf_adaptive_sparse.hf.backend_times import device_name
from hf_adaptive_sparse.hf.bench_shapes import ROWS, LayerShape, time_shape

SHAPES = ((4096, 4096), (11008, 4096), (4096, 11008))


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", default="bfloat16" if torch.cuda.is_available() else "float32")
    parser.add_argument("--rows", type=int, nargs="+", default=None)
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "never_slower.jsonl")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    device = torch.device(arguments.device)
    rows = arguments.rows or list(ROWS["cuda" if device.type == "cuda" else "cpu"])
    on_one_thread = device.type == "cpu" and arguments.threads == 1
    clock = time.process_time if on_one_thread else device_clock(device)
    found = []
    for shape in SHAPES:
        measured = time_shape(
            LayerShape(shape, arguments.dtype), rows, device, repetitions=arguments.repetitions, clock=clock
        )
        seconds = cautious_seconds({name: each for name, each in measured.items() if competes(name)})
        chosen = choose(seconds)
        for count in rows:
            entry = {
                "device": device_name(device), "torch": torch.__version__, "shape": list(shape),
                "dtype": arguments.dtype, "rows": count,
                "dense ms": round(1000 * measured["dense"][count].median, 4),
                "time next to dense": {
                    name: [round(value, 3) for value in vars(each[count].ratio_to(measured["dense"][count])).values()]
                    for name, each in measured.items()
                    if name != "dense"
                },
                "chosen": chosen[count].backend,
            }  # fmt: skip
            assert seconds[chosen[count].backend][count] <= seconds["dense"][count]
            found.append(entry)
            print(json.dumps(entry), flush=True)
        for name in seconds:
            for first, second, faster in crossing_points(seconds, name) if name != "dense" else ():
                print(f"{shape} {name}: between {first} and {second} rows {faster} becomes the faster one", flush=True)
    kept = []
    if arguments.output.exists():
        kept = [json.loads(line) for line in arguments.output.read_text(encoding="utf-8").splitlines()]
    mine = {(entry["device"], entry["dtype"]) for entry in found}
    kept = [entry for entry in kept if (entry["device"], entry["dtype"]) not in mine] + found
    arguments.output.write_text("".join(json.dumps(entry) + "\n" for entry in kept), encoding="utf-8")


if __name__ == "__main__":
    main()
