"""Make a model smaller while it is trained: heads and MLP channels go in stages, an ordinary checkpoint comes out.

It runs as it is, on a small model and text that are always there; `--model PATH_OR_ID --data FILE` takes yours.
"""

import argparse
import copy

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainingArguments

from hf_adaptive_sparse import (
    DistillationConfig,
    ShrinkCallback,
    ShrinkConfig,
    ShrinkTrainer,
    export_shrunk,
    load_documents,
    perplexity,
    token_windows,
)
from hf_adaptive_sparse.demo import MODEL_FOLDER, demo_documents

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--model", default=MODEL_FOLDER)
parser.add_argument("--data")
parser.add_argument("--target", type=float, default=0.9)
parser.add_argument("--steps", type=int, default=200)
parser.add_argument("--output-dir", default="out/shrunk")
options = parser.parse_args()

tokenizer = AutoTokenizer.from_pretrained(options.model)
documents = load_documents(options.data) if options.data else demo_documents("train")
windows = token_windows(documents, tokenizer, length=256, limit=4 * options.steps + 20)
held_out, train = windows.select(slice(0, 20)), windows.select(slice(20, None))
model = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32)
dense, parameters = perplexity(model, held_out).perplexity, model.num_parameters()
teacher = copy.deepcopy(model)

# Where training follows, all blocks end alike, and any program opens the result.
config = ShrinkConfig(target=options.target, stages=4, step=0.1)
shrinking = ShrinkCallback(model, train.select(slice(0, 8)), config)
arguments = TrainingArguments(
    output_dir=f"{options.output_dir}/checkpoints",
    max_steps=options.steps,
    per_device_train_batch_size=4,
    learning_rate=5e-4,
    lr_scheduler_type="linear",
    logging_steps=max(1, options.steps // 20),
    save_strategy="no",
    report_to="none",
)
trainer = ShrinkTrainer(
    model, arguments, shrink=shrinking, train_dataset=train, distillation=DistillationConfig(), teacher=teacher
)
trainer.train()
saved = export_shrunk(model, f"{options.output_dir}/shrunk", tokenizer=tokenizer, overwrite=True)

loaded = AutoModelForCausalLM.from_pretrained(saved.folder)
smaller = perplexity(loaded, held_out).perplexity
print(
    f"parameters: {parameters} dense, {loaded.num_parameters()} now, in a {saved.form} {saved.model_type} checkpoint; "
    f"perplexity: dense {dense:.2f}, smaller {smaller:.2f}"
)
