"""Learn 2:4 masks while retraining, with the dense model itself as the teacher.

It runs as it is, on a small model and text that are always there; `--model PATH_OR_ID --data FILE` takes yours.
"""

import argparse

import torch
from peft import get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainingArguments

from hf_adaptive_sparse import (
    AdaptiveSparseConfig,
    AdaptiveSparseTrainer,
    load_documents,
    perplexity,
    save_packed,
    sparse_layers,
    suggested_learning_rate,
    token_windows,
)
from hf_adaptive_sparse.demo import MODEL_FOLDER, demo_documents

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--model", default=MODEL_FOLDER)
parser.add_argument("--data")
parser.add_argument("--steps", type=int, default=200)
parser.add_argument("--output-dir", default="out/learn_masks")
options = parser.parse_args()

tokenizer = AutoTokenizer.from_pretrained(options.model)
documents = load_documents(options.data) if options.data else demo_documents("train")
windows = token_windows(documents, tokenizer, length=256, limit=8 * options.steps + 20)
held_out, train = windows.select(slice(0, 20)), windows.select(slice(20, None))
model = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32)
dense = perplexity(model, held_out).perplexity

# From here on: five lines.
model = get_peft_model(model, AdaptiveSparseConfig())
one_shot = perplexity(model, held_out).perplexity  # the masks of the start: by magnitude
arguments = TrainingArguments(
    output_dir=f"{options.output_dir}/checkpoints",
    max_steps=options.steps,
    per_device_train_batch_size=8,
    learning_rate=suggested_learning_rate(layer.weight for layer in sparse_layers(model)),
    lr_scheduler_type="linear",
    logging_steps=max(1, options.steps // 20),
    save_strategy="no",
    report_to="none",
)
AdaptiveSparseTrainer(model=model, args=arguments, train_dataset=train).train()
sparse = model.merge_and_unload()  # an ordinary transformers model, exactly 2:4
save_packed(sparse, f"{options.output_dir}/packed", tokenizer=tokenizer, overwrite=True)

loaded = AutoModelForCausalLM.from_pretrained(f"{options.output_dir}/packed")
trained = perplexity(loaded, held_out).perplexity
print(f"perplexity: dense {dense:.2f}, one-shot magnitude 2:4 {one_shot:.2f}, trained 2:4 {trained:.2f}")
