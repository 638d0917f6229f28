"""Time of an optimizer step: dense AdamW, sparse without a teacher, sparse with its dense self as the teacher.

    python benchmarks/step_cost.py                                   stories3M, or a random model of its shape
    python benchmarks/step_cost.py --profile "sparse, self-teacher"  where the time of one arm goes
    python benchmarks/step_cost.py --device cuda --random-llama-1b [--compile]

Every arm is a Trainer whose steps are taken one by one: loss, backward, clipping, optimizer, callbacks. On a CPU the
arms take turns step by step, a block is `mask_interval` steps (one choice of masks in each), and a ratio is the
median over blocks of sparse / dense, so that whatever else the machine does hits all arms alike. On a GPU the arms
run one after the other, and peak memory is reported too.

"dense" trains the weights that are sparse in the other arms, and no others; "dense, all weights" trains the
embeddings, head and norms as well; "and its states" adds the distance of hidden states to the loss. Results go to
benchmarks/results/step_cost[_cuda][_compiled].json.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import tempfile
import time
from pathlib import Path

import torch
from peft import get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

from hf_adaptive_sparse.hf.adapter_config import AdaptiveSparseConfig
from hf_adaptive_sparse.hf.sparse_layers import sparse_layers
from hf_adaptive_sparse.hf.trainer import AdaptiveSparseTrainer, DistillationConfig

ROOT = Path(__file__).resolve().parents[1]
STORIES3M = ROOT.parent / "shared" / "models" / "stories3M"
SHAPES = {
    "3m": {"vocab_size": 4096, "hidden_size": 192, "intermediate_size": 512, "num_hidden_layers": 6,
           "num_attention_heads": 6, "num_key_value_heads": 2, "tie_word_embeddings": True},
    "1b": {"vocab_size": 32_000, "hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 22,
           "num_attention_heads": 32, "num_key_value_heads": 4, "max_position_embeddings": 2048},
}  # fmt: skip
DENSE, DENSE_ALL = "dense", "dense, all weights"
SPARSE, TAUGHT, STATES = "sparse, no teacher", "sparse, self-teacher", "sparse, self-teacher and its states"
LOSSES = {
    SPARSE: DistillationConfig(ce_weight=1.0, kd_weight=0.0, hidden_weight=0.0),
    TAUGHT: DistillationConfig(hidden_weight=0.0),
    STATES: DistillationConfig(hidden_weight=1.0),
}
ARMS = (DENSE, DENSE_ALL, *LOSSES)
TARGETS = {SPARSE: 1.10, TAUGHT: 1.45, STATES: 1.45}  # of `dense`
WARM_UP = 3


def load(arguments: argparse.Namespace) -> tuple[nn.Module, str]:
    """(a dense model, what it is)"""
    if arguments.random_llama_1b:
        torch.manual_seed(0)
        return LlamaForCausalLM(LlamaConfig(**SHAPES["1b"])), "random weights, 1.1 B parameters"
    folder = arguments.model or STORIES3M
    if arguments.model is None and not folder.is_dir():
        torch.manual_seed(0)
        return LlamaForCausalLM(LlamaConfig(**SHAPES["3m"])), "random weights in the shape of stories3M"
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32), folder.name


class Arm:
    """A Trainer that takes one step when asked to."""

    def __init__(self, name: str, arguments: argparse.Namespace, scratch: str) -> None:
        cuda = arguments.device == "cuda"
        settings = TrainingArguments(
            output_dir=scratch,
            max_steps=10 * arguments.blocks * arguments.mask_interval,
            learning_rate=1e-5,
            bf16=cuda,
            torch_compile=arguments.compile,
            use_cpu=not cuda,
            save_strategy="no",
            logging_strategy="no",
            report_to="none",
            disable_tqdm=True,
        )
        model, _ = load(arguments)
        always = {"start_fraction": 0.0, "freeze_fraction": 0.0}  # masks may change in every block
        config = AdaptiveSparseConfig(mask_interval=arguments.mask_interval, task_type="CAUSAL_LM", **always)
        if name in LOSSES:
            # The frozen base, which is the teacher, in bfloat16 on a GPU; the latent weights are float32 anywhere.
            model = get_peft_model(model.bfloat16() if cuda else model, config)
            self.trainer = AdaptiveSparseTrainer(model=model, args=settings, distillation=LOSSES[name])
        else:
            if name == DENSE:
                sparse = {layer.name for layer in sparse_layers(get_peft_model(model, config))}
                model, _ = load(arguments)
                model.requires_grad_(False)
                for module_name, module in model.named_modules():
                    if any(each.endswith(module_name) for each in sparse) and isinstance(module, nn.Linear):
                        module.requires_grad_(True)
            self.trainer = Trainer(model=model, args=settings)
        self.name = name
        trainer = self.trainer
        trainer.create_optimizer()
        trainer.current_gradient_accumulation_steps = 1
        trainer.model_wrapped, trainer.optimizer = trainer.accelerator.prepare(trainer.model, trainer.optimizer)
        trainer.state.max_steps = settings.max_steps
        self.events = trainer.callback_handler
        self.events.model, self.events.optimizer = trainer.model, trainer.optimizer
        self.events.on_train_begin(settings, trainer.state, trainer.control)
        self.trained = [each for each in trainer.model.parameters() if each.requires_grad]

    def step(self, batch: dict[str, torch.Tensor]) -> None:
        trainer = self.trainer
        state = (trainer.args, trainer.state, trainer.control)
        items = (batch["labels"][..., 1:] != -100).sum()
        self.events.on_step_begin(*state)
        trainer.training_step(trainer.model_wrapped, dict(batch), items)
        trainer.accelerator.clip_grad_norm_(self.trained, trainer.args.max_grad_norm)
        self.events.on_pre_optimizer_step(*state)
        trainer.optimizer.step()
        trainer.optimizer.zero_grad()
        trainer.state.global_step += 1
        self.events.on_step_end(*state)


def timed(arm: Arm, batch: dict[str, torch.Tensor], cuda: bool) -> tuple[float, float]:
    """(wall, CPU) seconds of one step."""
    wall, cpu = time.perf_counter(), time.process_time()
    arm.step(batch)
    if cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - wall, time.process_time() - cpu


def measure(names: tuple[str, ...], arguments: argparse.Namespace, batch: dict[str, torch.Tensor]) -> dict[str, dict]:
    """Per arm the seconds of every block, per step, and on a GPU its peak memory."""
    cuda = arguments.device == "cuda"
    with tempfile.TemporaryDirectory() as scratch:
        if cuda:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        arms = [Arm(name, arguments, scratch) for name in names]
        parameters = {arm.name: sum(each.numel() for each in arm.trained) for arm in arms}
        for _ in range(WARM_UP):
            for arm in arms:
                arm.step(batch)
        for arm in arms:
            arm.trainer.state.global_step = 0  # blocks end with a choice of masks
        seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in names}
        for _ in range(arguments.blocks):
            sums = {name: [0.0, 0.0] for name in names}
            for _ in range(arguments.mask_interval):
                for arm in arms:
                    for i, taken in enumerate(timed(arm, batch, cuda)):
                        sums[arm.name][i] += taken / arguments.mask_interval
            for name, (wall, cpu) in sums.items():
                seconds[name].append((wall, cpu))
    peak = torch.cuda.max_memory_allocated() if cuda else None
    return {name: {"blocks": seconds[name], "parameters": parameters[name], "peak": peak} for name in names}


def profile(arguments: argparse.Namespace, batch: dict[str, torch.Tensor]) -> None:
    with tempfile.TemporaryDirectory() as scratch:
        arm = Arm(arguments.profile, arguments, scratch)
        for _ in range(WARM_UP):
            arm.step(batch)
        with torch.profiler.profile() as found:
            for _ in range(arguments.mask_interval):
                arm.step(batch)
    order = "self_device_time_total" if arguments.device == "cuda" else "self_cpu_time_total"
    print(found.key_averages().table(sort_by=order, row_limit=40, max_name_column_width=60))


def report(found: dict[str, dict], description: str, arguments: argparse.Namespace) -> dict:
    rows = []
    print(f"{description}; {arguments.batch} x {arguments.window} tokens, {torch.get_num_threads()} CPU threads\n")
    print("| arm | trained | ms | CPU ms | of dense | of dense, CPU | target | peak GiB |")
    print("|---|---:|---:|---:|---:|---:|---:|---:|")
    for name, each in found.items():
        wall, cpu = (statistics.median(block[i] for block in each["blocks"]) * 1e3 for i in (0, 1))
        ratios = [
            statistics.median(b[i] / a[i] for a, b in zip(found[DENSE]["blocks"], each["blocks"], strict=True))
            for i in (0, 1)
        ]
        target, peak = TARGETS.get(name), each["peak"]
        rows.append(
            {
                "arm": name,
                "parameters_trained": each["parameters"],
                "ms": round(wall, 2),
                "cpu_ms": round(cpu, 2),
                "ratio": round(ratios[0], 3),
                "cpu_ratio": round(ratios[1], 3),
                "target": target,
                "peak_bytes": peak,
            }
        )
        print(
            f"| {name} | {each['parameters']:,} | {wall:.1f} | {cpu:.1f} | {ratios[0]:.3f} | {ratios[1]:.3f} "
            f"| {target or ''} | {'' if peak is None else f'{peak / 2**30:.2f}'} |"
        )
    return {
        "model": description,
        "device": torch.cuda.get_device_name() if arguments.device == "cuda" else platform.machine(),
        "compiled": arguments.compile,
        "batch": arguments.batch,
        "window": arguments.window,
        "mask_interval": arguments.mask_interval,
        "blocks": arguments.blocks,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "met": all(row["ratio"] <= row["target"] for row in rows if row["target"]),
        "rows": rows,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="folder of a causal language model")
    parser.add_argument("--random-llama-1b", action="store_true", help="a random Llama of 1.1 B parameters")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--compile", action="store_true", help="torch.compile the model of every arm")
    parser.add_argument("--batch", type=int, help="windows in a batch (8; 4 with --random-llama-1b)")
    parser.add_argument("--window", type=int, help="tokens in a window (256; 2048 with --random-llama-1b)")
    parser.add_argument("--mask-interval", type=int, default=10, help="steps in a block")
    parser.add_argument("--blocks", type=int, default=8)
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=ARMS)
    parser.add_argument("--profile", choices=ARMS, help="print where the time of this arm goes, and stop")
    arguments = parser.parse_args()
    large = arguments.random_llama_1b
    arguments.batch = arguments.batch or (4 if large else 8)
    arguments.window = arguments.window or (2048 if large else 256)

    model, description = load(arguments)
    vocab = model.config.vocab_size
    del model
    tokens = torch.randint(0, vocab, (arguments.batch, arguments.window), generator=torch.Generator().manual_seed(0))
    tokens = tokens.to(arguments.device)
    batch = {"input_ids": tokens, "labels": tokens}
    if arguments.profile:
        profile(arguments, batch)
        return
    names = tuple(dict.fromkeys((DENSE, *arguments.arms)))
    # Arms that are in memory together can take turns, but have one peak.
    together = [(name,) for name in names] if arguments.device == "cuda" else [names]
    found: dict[str, dict] = {}
    for each in together:
        found.update(measure(each, arguments, batch))
    result = report(found, description, arguments)
    suffix = ("_cuda" if arguments.device == "cuda" else "") + ("_compiled" if arguments.compile else "")
    path = ROOT / "benchmarks" / "results" / f"step_cost{suffix}.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(result, indent=2) + "\n")
    print(f"\n{'met' if result['met'] else 'NOT met'}; written to {path.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
