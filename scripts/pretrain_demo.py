"""Pretrain the model that `hf-adaptive-sparse demo` starts from: tokenizer and weights, from nothing.

    python scripts/pretrain_demo.py                       writes hf_adaptive_sparse/demo/model
                                                          and benchmarks/demo_pretraining.json
    python scripts/pretrain_demo.py --steps 300 --model-folder out/model --results out/results.json

The text is the standard library of the interpreter that runs the script (see hf_adaptive_sparse/demo).
The data order is a function of seed and step alone. Killed and started again with the same settings, the
script continues from its last checkpoint in `--work-folder` and ends with the weights of an unbroken run.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import os
import platform
import shutil
import time
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import Tensor
from torch.nn import functional
from torch.optim import AdamW, Optimizer
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from hf_adaptive_sparse.demo import MODEL_FOLDER, PROMPTS, SPLITS, demo_documents, documents_digest

REPOSITORY = Path(__file__).resolve().parents[1]
FIRST_WINDOWS = 64  # a quick second figure, for tests and for the log
END = "<|endoftext|>"  # opens every document, as in GPT-2; the model writes it where a document ends


@dataclass(frozen=True)
class Settings:
    """Everything that the weights depend on, next to the text and the library versions."""

    seed: int = field(default=0, metadata={"help": "Of the initial weights and of the data order."})
    vocab_size: int = field(default=1024, metadata={"help": "Byte-level BPE tokens."})
    hidden_size: int = field(default=128, metadata={"help": "Width; a multiple of 8, as every linear layer."})
    intermediate_size: int = field(default=336, metadata={"help": "Width of the MLP."})
    layers: int = field(default=4, metadata={"help": "Decoder layers."})
    heads: int = field(default=4, metadata={"help": "Attention heads."})
    kv_heads: int = field(default=2, metadata={"help": "Key-value heads."})
    initial_std: float = field(default=0.05, metadata={"help": "Standard deviation of the initial weights."})
    window: int = field(default=256, metadata={"help": "Tokens in one training window."})
    windows_per_step: int = field(default=8, metadata={"help": "Windows in one optimizer step."})
    steps: int = field(default=1700, metadata={"help": "Optimizer steps."})
    learning_rate: float = field(default=3e-3, metadata={"help": "Peak learning rate of AdamW."})
    warmup_steps: int = field(default=100, metadata={"help": "Linear warm-up, from zero."})
    decay_steps: int = field(default=900, metadata={"help": "Linear decay to zero, at the end."})
    beta2: float = field(default=0.95, metadata={"help": "AdamW's second beta; the first is 0.9."})
    weight_decay: float = field(default=0.1, metadata={"help": "Decoupled, on matrices only."})
    clip: float = field(default=1.0, metadata={"help": "Largest norm of the gradient."})


def train_tokenizer(documents: list[str], settings: Settings) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer that puts `END` in front of every document."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=settings.vocab_size,
        special_tokens=[END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(documents, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{END} $A", pair=f"{END} $A {END} $B", special_tokens=[(END, tokenizer.token_to_id(END))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=END,
        eos_token=END,
        pad_token=END,
        clean_up_tokenization_spaces=False,
    )


def build_model(settings: Settings, end_id: int) -> LlamaForCausalLM:
    """The random initial model: float32, tied embeddings, output projections of each block scaled down."""
    torch.manual_seed(settings.seed)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=settings.vocab_size,
            hidden_size=settings.hidden_size,
            intermediate_size=settings.intermediate_size,
            num_hidden_layers=settings.layers,
            num_attention_heads=settings.heads,
            num_key_value_heads=settings.kv_heads,
            head_dim=settings.hidden_size // settings.heads,
            max_position_embeddings=settings.window,
            initializer_range=settings.initial_std,
            tie_word_embeddings=True,
            bos_token_id=end_id,
            eos_token_id=end_id,
            pad_token_id=None,
        )
    )
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(("o_proj.weight", "down_proj.weight")):
                parameter /= math.sqrt(2 * settings.layers)
    return model


def token_stream(documents: list[str], tokenizer: PreTrainedTokenizerFast) -> Tensor:
    """All documents, each with its opening token, one after the other."""
    encodings = tokenizer.backend_tokenizer.encode_batch_fast(documents)
    return torch.tensor([token for encoding in encodings for token in encoding.ids])


def batch_of_step(stream: Tensor, step: int, settings: Settings) -> Tensor:
    """[windows_per_step, window] tokens: every epoch has its own offset of the cuts and its own order."""
    window, batch = settings.window, settings.windows_per_step
    steps_per_epoch = (len(stream) // window - 1) // batch
    epoch, position = divmod(step, steps_per_epoch)
    generator = torch.Generator().manual_seed(settings.seed * 100_003 + epoch)
    offset = int(torch.randint(window, (1,), generator=generator))
    order = torch.randperm(steps_per_epoch * batch, generator=generator)
    chosen = order[position * batch : (position + 1) * batch]
    return stream[offset + chosen[:, None] * window + torch.arange(window)]


def learning_rate_at(step: int, settings: Settings) -> float:
    """Linear warm-up, then the peak, then a straight line to zero over the last `decay_steps`."""
    warmup = (step + 1) / settings.warmup_steps
    decay = (settings.steps - step) / settings.decay_steps
    return settings.learning_rate * min(1.0, warmup, decay)


def next_token_loss(model: LlamaForCausalLM, batch: Tensor, reduction: str = "mean") -> Tensor:
    """Cross-entropy of each token but the first of a window, given those before it."""
    logits = model(input_ids=batch, use_cache=False).logits[:, :-1]
    return functional.cross_entropy(logits.flatten(0, 1).float(), batch[:, 1:].flatten(), reduction=reduction)


@torch.no_grad()
def evaluate(model: LlamaForCausalLM, stream: Tensor, window: int) -> dict[str, float | int]:
    """Mean loss and perplexity of the stream, cut into whole windows; window - 1 predictions in each."""
    model.eval()
    windows = stream[: len(stream) // window * window].view(-1, window)
    total = sum(next_token_loss(model, chunk, "sum").item() for chunk in windows.split(16))
    model.train()
    predictions = windows.shape[0] * (window - 1)
    nll = total / predictions
    return {"windows": windows.shape[0], "nll": nll, "perplexity": math.exp(nll)}


def build_optimizer(model: LlamaForCausalLM, settings: Settings) -> AdamW:
    """AdamW with weight decay on matrices, embeddings among them, and none on the gains of the norms."""
    matrices = [parameter for parameter in model.parameters() if parameter.ndim == 2]
    vectors = [parameter for parameter in model.parameters() if parameter.ndim < 2]
    groups = [
        {"params": matrices, "weight_decay": settings.weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    return AdamW(groups, lr=settings.learning_rate, betas=(0.9, settings.beta2), fused=True)


def save_checkpoint(folder: Path, progress: dict, model: LlamaForCausalLM, optimizer: Optimizer) -> None:
    """One file, written beside the old one and renamed over it: a kill leaves the old or the new, whole."""
    tensors = {f"model.{name}": parameter.detach() for name, parameter in model.named_parameters()}
    for index, state in optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer.{index}.{key}": value for key, value in state.items()}
    save_file(tensors, folder / "new.safetensors", metadata={"progress": json.dumps(progress)})
    os.replace(folder / "new.safetensors", folder / "checkpoint.safetensors")


def load_checkpoint(folder: Path, model: LlamaForCausalLM, optimizer: Optimizer) -> dict:
    """Put back the last checkpoint, if there is one, and return the progress it was written with."""
    path = folder / "checkpoint.safetensors"
    if not path.is_file():
        return {"step": 0, "processor_seconds": 0.0, "wall_seconds": 0.0, "recent": [], "log": []}
    with safe_open(path, "pt") as file:
        progress = json.loads(file.metadata()["progress"])
        tensors = {name: file.get_tensor(name) for name in file.keys()}
    state: dict[int, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        if name.startswith("optimizer."):
            _, index, key = name.split(".")
            state.setdefault(int(index), {})[key] = tensor
    optimizer.load_state_dict({**optimizer.state_dict(), "state": state})
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(tensors[f"model.{name}"])
    return progress


def train(model: LlamaForCausalLM, stream: Tensor, heldout: Tensor, settings: Settings, arguments) -> dict:
    """The loop, from the last checkpoint to the end. Returns the progress: times of all runs, and the log."""
    optimizer = build_optimizer(model, settings)
    progress = load_checkpoint(arguments.work_folder, model, optimizer)
    processor = progress["processor_seconds"] - time.process_time()
    wall = progress["wall_seconds"] - time.time()
    model.train()
    for step in range(progress["step"], settings.steps):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate_at(step, settings)
        loss = next_token_loss(model, batch_of_step(stream, step, settings))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), settings.clip)
        optimizer.step()
        optimizer.zero_grad()
        progress["step"] = step + 1
        progress["recent"].append(loss.item())
        progress["processor_seconds"] = round(processor + time.process_time(), 1)
        progress["wall_seconds"] = round(wall + time.time(), 1)
        if progress["step"] % arguments.log_every == 0 or progress["step"] == settings.steps:
            recent = progress["recent"]
            first = evaluate(model, heldout[: FIRST_WINDOWS * settings.window], settings.window)
            entry = {
                "step": progress["step"],
                "loss": round(sum(recent) / len(recent), 4),
                "heldout_nll_first_windows": round(first["nll"], 4),
            }
            progress["recent"] = []
            progress["log"].append(entry)
            print(json.dumps({**entry, "processor_seconds": progress["processor_seconds"]}), flush=True)
        if progress["step"] % arguments.checkpoint_every == 0:
            save_checkpoint(arguments.work_folder, progress, model, optimizer)
    return progress


@torch.no_grad()
def samples(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, length: int = 96) -> dict[str, str]:
    """The greedy continuation of each prompt."""
    model.eval()
    texts = {}
    for prompt in PROMPTS:
        inputs = tokenizer(prompt, return_tensors="pt")
        output = model.generate(**inputs, max_new_tokens=length, do_sample=False)[0]
        texts[prompt] = tokenizer.decode(output[inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    return texts


def heldout_figures(
    label: str, stdlib: Path | None, model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, window: int
) -> dict:
    """Perplexity on the held-out text of one standard library, and which text that was."""
    documents = demo_documents("heldout", stdlib)
    stream = token_stream(documents, tokenizer)
    size = sum(len(document.encode()) for document in documents)
    figures = evaluate(model, stream, window)
    return {
        "python": label,
        "digest": documents_digest(documents),
        "bytes": size,
        "tokens": len(stream),
        **figures,
        "bits_per_byte": figures["nll"] / math.log(2) * len(stream) / size,
        "perplexity_first_windows": evaluate(model, stream[: FIRST_WINDOWS * window], window)["perplexity"],
    }


def store_model(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, folder: Path) -> LlamaForCausalLM:
    """Write the model in bfloat16 and return it as a user loads it, for computation in float32."""
    shutil.rmtree(folder, ignore_errors=True)
    special = {name: tokenizer.eos_token_id for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    model.generation_config = GenerationConfig(**special)
    model.to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    for path in folder.iterdir():
        path.chmod(0o644)  # safetensors writes files that only their owner can read, and wheels keep the mode
    return LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)


def build_report(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, settings: Settings, arguments, data: dict
) -> dict:
    """What is known about the stored model, but for the course of its training."""
    others = [item.split("=", 1) for item in arguments.also_evaluate]
    texts = [(data["python"], arguments.stdlib), *((label, Path(folder)) for label, folder in others)]
    return {
        "script": "scripts/pretrain_demo.py",
        "machine": f"{platform.machine()}, 1 thread of {os.cpu_count()}, torch {torch.__version__}",
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "settings": dataclasses.asdict(settings),
        "data": data,
        "training_tokens": settings.steps * settings.windows_per_step * settings.window,
        "protocol": f"documents concatenated, windows of {settings.window} tokens, {settings.window - 1} "
        f"predictions in each; weights stored in bfloat16, computed in float32; 'first windows' are the "
        f"first {FIRST_WINDOWS}",
        "heldout": [heldout_figures(label, path, model, tokenizer, settings.window) for label, path in texts],
        "samples": samples(model, tokenizer),
    }


def model_card(report: dict) -> str:
    """The text of the card, from the template beside this script and the figures of the report."""
    rows = [
        f"| {item['python']} | {item['tokens']:,} | {item['perplexity']:.3f} | {item['bits_per_byte']:.3f} "
        f"| `{item['digest'][:16]}` |"
        for item in report["heldout"]
    ]
    template = Path(__file__).with_name("demo_model_card.md").read_text(encoding="utf-8")
    return template.format(
        **report["settings"],
        **report["data"],
        parameters=report["parameters"],
        training_tokens=report["training_tokens"],
        minutes=report["processor_seconds"] / 60,
        predictions=report["settings"]["window"] - 1,
        end=END,
        rows="\n".join(rows),
    )


def parse_arguments() -> tuple[argparse.Namespace, Settings]:
    """Where to read and write, and the settings."""
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=formatter)
    add = parser.add_argument
    add("--model-folder", type=Path, default=MODEL_FOLDER, help="Replaced as a whole.")
    add("--results", type=Path, default=REPOSITORY / "benchmarks" / "demo_pretraining.json")
    add("--work-folder", type=Path, default=REPOSITORY / "out" / "pretrain_demo", help="For checkpoints.")
    add("--log-every", type=int, default=500, help="Steps between two lines of the log.")
    add("--checkpoint-every", type=int, default=100, help="Steps between two checkpoints.")
    add("--stdlib", type=Path, help="Folder with the text (default: of the running interpreter).")
    add("--also-evaluate", nargs="*", default=[], metavar="LABEL=FOLDER", help="More standard libraries.")
    fields = dataclasses.fields(Settings)
    for item in fields:
        name = "--" + item.name.replace("_", "-")
        add(name, type=type(item.default), default=item.default, help=item.metadata["help"])
    arguments = parser.parse_args()
    return arguments, Settings(**{item.name: getattr(arguments, item.name) for item in fields})


def main() -> None:
    """Train, or continue; then store the model, measure it and write its card."""
    arguments, settings = parse_arguments()
    torch.set_num_threads(1)
    documents, heldout_documents = (demo_documents(split, arguments.stdlib) for split in SPLITS)
    tokenizer = train_tokenizer(documents, settings)
    stream, heldout = token_stream(documents, tokenizer), token_stream(heldout_documents, tokenizer)
    data = {
        "python": arguments.stdlib.name if arguments.stdlib else platform.python_version(),
        "train_digest": documents_digest(documents),
        "train_bytes": sum(len(document.encode()) for document in documents),
        "train_tokens": len(stream),
    }
    model = build_model(settings, tokenizer.eos_token_id)
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters, {json.dumps(data)}", flush=True)

    work = arguments.work_folder
    work.mkdir(parents=True, exist_ok=True)
    recipe = json.dumps({"settings": dataclasses.asdict(settings), "data": data}, indent=1)
    if (work / "recipe.json").is_file() and (work / "recipe.json").read_text() != recipe:
        raise SystemExit(f"{work} holds a run with other settings or another text. Remove it, or pass --work-folder.")
    (work / "recipe.json").write_text(recipe)
    progress = train(model, stream, heldout, settings, arguments)

    new = arguments.model_folder.with_name(arguments.model_folder.name + ".new")
    stored = store_model(model, tokenizer, new)
    report = build_report(stored, tokenizer, settings, arguments, data)
    report |= {name: progress[name] for name in ("processor_seconds", "wall_seconds")}
    (new / "README.md").write_text(model_card(report), encoding="utf-8")
    shutil.rmtree(arguments.model_folder, ignore_errors=True)
    new.rename(arguments.model_folder)
    print(json.dumps(report, indent=1))
    arguments.results.parent.mkdir(parents=True, exist_ok=True)
    report["log"] = progress["log"]
    arguments.results.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
