"""Load one model, run it, and say how long it took and how much memory: in a process of its own.

`python -m hf_adaptive_sparse.hf.bench_worker` reads a `WorkerTask` as JSON from stdin, and prints a `WorkerResult` as
the last line of stdout.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import re
import resource
import statistics
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.utils import logging

from ..backend_timing import Clock, device_clock
from ..errors import ConfigError
from .measured_backends import use_measured_backends
from .quantizer import loading_options

MODEL_BACKENDS: dict[str, str] = {
    "dense": "the dense-stored folder, as plain transformers loads it",
    "expanded": "the packed folder, every weight expanded once when it is loaded",
    "packed": "the packed folder, kept packed, and expanded at every call",
    "chosen": "the packed folder, every layer with the backend that was measured fastest for its rows",
}
_PACKED = {"expanded": "dense", "packed": "packed", "chosen": "dense"}  # -> how the folder is loaded


@dataclass(frozen=True, kw_only=True)
class WorkerTask:
    """What to measure.

    Attributes:
        folder: of the model.
        backend: one of MODEL_BACKENDS.
        prompt, sequences, new_tokens: tokens of a prompt, prompts at the same time, tokens decoded after it.
        passes: prompts that are timed.
        dtype: "auto" or a name.
        threads: of torch on the CPU.
    """

    folder: str
    backend: str
    prompt: int
    sequences: int
    new_tokens: int
    passes: int
    dtype: str
    device: str
    threads: int
    trust_remote_code: bool = False


@dataclass(frozen=True, kw_only=True)
class WorkerResult:
    """What was measured.

    Attributes:
        load_seconds: from the call of `from_pretrained` until the weights are on the device.
        peak_bytes: largest resident memory of the process on top of what it had before loading; on an accelerator, of
            what was allocated there.
        prefill, decode: tokens per second.
    """

    load_seconds: float
    peak_bytes: int
    prefill: float
    decode: float


def measure(task: WorkerTask, load: Callable[[WorkerTask], PreTrainedModel] | None = None) -> WorkerResult:
    """Load and run the model in this process.

    Args:
        load: in the place of `load_model`, for tests.
    """
    torch.set_num_threads(task.threads)
    device = torch.device(task.device)
    clock = device_clock(device)
    before = start_memory(device)
    started = clock()
    model = (load or load_model)(task)
    load_seconds = clock() - started
    generator = torch.Generator().manual_seed(0)
    vocabulary = model.config.get_text_config().vocab_size
    prompt = torch.randint(vocabulary, (task.sequences, task.prompt), generator=generator).to(device)
    with torch.inference_mode():
        _run(model, prompt, 1, clock)  # what happens only once is not measured
        runs = [_run(model, prompt, task.new_tokens, clock) for _ in range(task.passes)]
    prefill, decode = (statistics.median(times) for times in zip(*runs, strict=True))
    return WorkerResult(
        load_seconds=load_seconds,
        peak_bytes=max(1, peak_bytes(device) - before),
        prefill=task.sequences * task.prompt / prefill,
        decode=task.sequences * task.new_tokens / decode,
    )


def load_model(task: WorkerTask) -> PreTrainedModel:
    """The model on its device, in evaluation mode."""
    if task.backend not in MODEL_BACKENDS:
        raise ConfigError(f"unknown backend {task.backend!r}; known: {', '.join(MODEL_BACKENDS)}.")
    packed = _PACKED.get(task.backend)
    options = contextlib.nullcontext() if packed is None else loading_options(backend=packed)
    with options:
        model = AutoModelForCausalLM.from_pretrained(
            task.folder, dtype=task.dtype, trust_remote_code=task.trust_remote_code
        )
    model = model.to(task.device).eval()
    if task.backend == "chosen":
        use_measured_backends(model)
    return model


def start_memory(device: torch.device) -> int:
    """Begin a new peak where that can be done; the memory that is in use now."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return 0
    with contextlib.suppress(OSError):  # only Linux has it, and its peak is from the start of the process otherwise
        Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")
    return _status("VmRSS") or 0


def peak_bytes(device: torch.device) -> int:
    """The largest memory until now."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    # Not ru_maxrss on Linux, where it begins with what the parent had when it forked.
    unit = 1 if sys.platform == "darwin" else 1024
    return _status("VmHWM") or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _status(key: str) -> int | None:
    status = Path("/proc/self/status")
    text = status.read_text(encoding="utf-8") if status.exists() else ""
    match = re.search(rf"{key}:\s+(\d+) kB", text)
    return None if match is None else int(match[1]) * 1024


def _run(model: PreTrainedModel, prompt: torch.Tensor, new_tokens: int, clock: Clock) -> tuple[float, float]:
    """Seconds of the prompt, and of the tokens decoded after it."""
    started = clock()
    result = model(input_ids=prompt, use_cache=True, logits_to_keep=1)
    between = clock()
    for _ in range(new_tokens):
        token = result.logits[:, -1:].argmax(-1)
        result = model(input_ids=token, past_key_values=result.past_key_values, use_cache=True)
    return between - started, clock() - between


def main() -> None:
    """Read a task, measure, print."""
    logging.disable_progress_bar()
    result = measure(WorkerTask(**json.load(sys.stdin)))
    print(json.dumps(dataclasses.asdict(result)))


if __name__ == "__main__":
    main()
