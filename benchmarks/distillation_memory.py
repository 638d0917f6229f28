"""Peak memory of the distillation loss, chunked against naive, forward and backward.

    python benchmarks/distillation_memory.py                                  4096 tokens, 128,000 entries: 16 GiB
    python benchmarks/distillation_memory.py --tokens 256 --vocab 32000       a quick look

Each case runs in a fresh process. Its peak is VmHWM (Linux) minus what was resident once the inputs were there. Two
inputs, all float32: logits of student and teacher, or their last hidden states and heads. Naive is what one writes
with torch.nn.functional: cross_entropy, and kl_div of two log_softmax. "difference" is |chunked - naive| / |naive|,
2-norms, over all gradients. Results go to benchmarks/results/distillation_memory.json.
"""

from __future__ import annotations

import argparse
import gc
import json
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional

from hf_adaptive_sparse.losses import DistillationLoss

RESULTS = Path(__file__).parent / "results" / "distillation_memory.json"
CASES = ("logits naive", "logits chunked", "hidden naive", "hidden chunked")
LOSS = DistillationLoss(temperature=2.0, kd_weight=0.67, ce_weight=0.33)
TARGET = 0.25  # of the naive peak
TOLERANCE = 1e-5
NAIVE_COPIES = 8  # of [tokens, vocab] in float32, inputs included, for the check before a naive run


def naive(student: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
    temperature = LOSS.temperature
    kd = functional.kl_div(
        functional.log_softmax(student / temperature, -1),
        functional.log_softmax(teacher / temperature, -1),
        reduction="batchmean",
        log_target=True,
    )
    ce = functional.cross_entropy(student, labels)
    return LOSS.ce_weight * ce + LOSS.kd_weight * temperature**2 * kd


def inputs_of(case: str, tokens: int, vocab: int, width: int) -> tuple[dict[str, Tensor], Tensor]:
    """(what wants a gradient and what the teacher gives, labels), the same for naive and chunked."""
    torch.manual_seed(0)
    labels = torch.randint(0, vocab, (tokens,))
    if case.startswith("logits"):
        student = torch.randn(tokens, vocab).mul_(3.0)
        teacher = torch.randn(tokens, vocab).add_(student)
        return {"student": student.requires_grad_(), "teacher": teacher}, labels
    student, head = torch.randn(tokens, width), torch.randn(vocab, width).mul_(3.0 / width**0.5)
    teacher, teacher_head = student + 0.3 * torch.randn(tokens, width), head.clone()
    named = {"student": student.requires_grad_(), "head": head.requires_grad_()}
    return {**named, "teacher": teacher, "teacher_head": teacher_head}, labels


def loss_of(case: str, tensors: dict[str, Tensor], labels: Tensor) -> Tensor:
    if case == "logits naive":
        return naive(tensors["student"], tensors["teacher"], labels)
    if case == "logits chunked":
        return LOSS(tensors["student"], tensors["teacher"], labels, labels_are_shifted=True).loss
    if case == "hidden naive":
        with torch.no_grad():
            teacher = tensors["teacher"] @ tensors["teacher_head"].T
        return naive(tensors["student"] @ tensors["head"].T, teacher, labels)
    return LOSS.fused(
        tensors["student"],
        tensors["head"],
        tensors["teacher"],
        tensors["teacher_head"],
        labels,
        labels_are_shifted=True,
    ).loss


def memory(field: str) -> int:
    """Bytes: VmRSS (resident now) or VmHWM (its peak) of this process."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise SystemExit(f"/proc/self/status has no {field}: this benchmark needs Linux.")


def measure(case: str, tokens: int, vocab: int, width: int, gradients: Path) -> dict:
    # If memory runs out after all, this process goes, and no other.
    Path("/proc/self/oom_score_adj").write_text("1000")
    tensors, labels = inputs_of(case, 8, 16, 4)
    loss_of(case, tensors, labels).backward()  # loads what torch loads at first use
    tensors, labels = inputs_of(case, tokens, vocab, width)
    gc.collect()
    before = memory("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts here
    started = time.perf_counter()
    loss = loss_of(case, tensors, labels)
    loss.backward()
    seconds = time.perf_counter() - started
    peak = memory("VmHWM") - before
    torch.save({name: x.grad for name, x in tensors.items() if x.grad is not None}, gradients)
    return {"case": case, "peak_bytes": peak, "loss": float(loss.detach()), "seconds": round(seconds, 2)}


def difference(chunked: Path, plain: Path) -> float:
    """|chunked - naive| / |naive| over all gradients, read a few rows at a time."""
    pair = [torch.load(path, mmap=True, weights_only=True) for path in (chunked, plain)]
    distance = size = 0.0
    for name, expected in pair[1].items():
        for rows, wanted in zip(pair[0][name].split(64), expected.split(64), strict=True):
            distance += float((rows.double() - wanted.double()).square().sum())
            size += float(wanted.double().square().sum())
    return (distance / size) ** 0.5


def available() -> int:
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return 0


def run(case: str, arguments: argparse.Namespace, gradients: Path) -> dict:
    needed = NAIVE_COPIES * 4 * arguments.tokens * arguments.vocab
    if "naive" in case and available() < needed:
        raise SystemExit(
            f"{case}: needs about {needed / 2**30:.1f} GiB, and {available() / 2**30:.1f} GiB are available. Free "
            "memory, or measure fewer --tokens."
        )
    sizes = [str(each) for each in (arguments.tokens, arguments.vocab, arguments.width)]
    command = [sys.executable, __file__, "--case", case, "--gradients", str(gradients)]
    for name, size in zip(("--tokens", "--vocab", "--width"), sizes, strict=True):
        command += [name, size]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        raise SystemExit(f"{case}: the process ended with {done.returncode} (-9: out of memory).")
    return json.loads(done.stdout)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--vocab", type=int, default=128_000)
    parser.add_argument("--width", type=int, default=256, help="of the hidden states")
    parser.add_argument("--case", choices=CASES, help=argparse.SUPPRESS)
    parser.add_argument("--gradients", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.case:
        sizes = (arguments.tokens, arguments.vocab, arguments.width)
        print(json.dumps(measure(arguments.case, *sizes, arguments.gradients)))
        return

    rows = []
    print(f"{arguments.tokens} tokens, vocabulary {arguments.vocab}, float32, forward and backward\n")
    print("| from | naive, GiB | chunked, GiB | ratio | target | difference | naive, s | chunked, s |")
    print("|---|---:|---:|---:|---:|---:|---:|---:|")
    for source in ("logits", "hidden"):
        with tempfile.TemporaryDirectory() as scratch:
            files = {kind: Path(scratch) / kind for kind in ("chunked", "naive")}
            found = {kind: run(f"{source} {kind}", arguments, files[kind]) for kind in files}
            error = difference(files["chunked"], files["naive"])
        ratio = found["chunked"]["peak_bytes"] / found["naive"]["peak_bytes"]
        rows.append({"from": source, **found, "ratio": round(ratio, 4), "gradient_difference": error})
        gib = {kind: found[kind]["peak_bytes"] / 2**30 for kind in found}
        print(
            f"| {source} | {gib['naive']:.2f} | {gib['chunked']:.2f} | {ratio:.3f} | {TARGET} | {error:.1e} "
            f"| {found['naive']['seconds']} | {found['chunked']['seconds']} |"
        )
    met = all(row["ratio"] <= TARGET and row["gradient_difference"] <= TOLERANCE for row in rows)
    RESULTS.parent.mkdir(exist_ok=True)
    result = {
        "tokens": arguments.tokens,
        "vocab": arguments.vocab,
        "width": arguments.width,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "machine": platform.machine(),
        "target_ratio": TARGET,
        "target_difference": TOLERANCE,
        "met": met,
        "rows": rows,
    }
    RESULTS.write_text(json.dumps(result, indent=2) + "\n")
    print(f"\n{'met' if met else 'NOT met'}; written to {RESULTS.relative_to(Path(__file__).parents[1])}")


if __name__ == "__main__":
    main()
