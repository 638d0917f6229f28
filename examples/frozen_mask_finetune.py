"""Fine-tune a model that is sparse already, and keep its zeros: mask_policy="frozen".

Ordinary fine-tuning fills the zeros of a pruned model within a step. Here the zeros that the model comes with
are its mask, and every one of them stays where it is.
"""

import argparse

import torch
from peft import get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainingArguments

from hf_adaptive_sparse import (
    AdaptiveSparseConfig,
    AdaptiveSparseTrainer,
    DistillationConfig,
    NMPattern,
    sparse_layers,
    suggested_learning_rate,
    token_windows,
)
from hf_adaptive_sparse.demo import MODEL_FOLDER, demo_documents

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--steps", type=int, default=100)
parser.add_argument("--output-dir", default="out/frozen_mask_finetune")
options = parser.parse_args()

tokenizer = AutoTokenizer.from_pretrained(MODEL_FOLDER)
model = AutoModelForCausalLM.from_pretrained(MODEL_FOLDER, dtype=torch.float32)
with torch.no_grad():  # stands for a model that someone pruned
    for name, parameter in model.named_parameters():
        if name.endswith("proj.weight"):
            parameter.mul_(NMPattern(2, 4).keep_mask(parameter.abs()))
zeros = {name: parameter == 0 for name, parameter in model.named_parameters() if name.endswith("proj.weight")}

windows = token_windows(demo_documents("train"), tokenizer, length=256, limit=8 * options.steps)
model = get_peft_model(model, AdaptiveSparseConfig(mask_policy="frozen"))
arguments = TrainingArguments(
    output_dir=options.output_dir,
    max_steps=options.steps,
    per_device_train_batch_size=8,
    learning_rate=suggested_learning_rate(layer.weight for layer in sparse_layers(model)),
    logging_steps=max(1, options.steps // 20),
    save_strategy="no",
    report_to="none",
)
# Its own pruned self has nothing to teach: plain cross-entropy.
plain = DistillationConfig(kd_weight=0.0, hidden_weight=0.0, ce_weight=1.0)
AdaptiveSparseTrainer(model=model, args=arguments, train_dataset=windows, distillation=plain).train()

tuned = dict(model.merge_and_unload().named_parameters())
before = sum(int(zero.sum()) for zero in zeros.values())
after = sum(int((tuned[name] == 0).sum()) for name in zeros)
moved = sum(int((zero & (tuned[name] != 0)).sum()) for name, zero in zeros.items())
print(f"zeros before {before}, after {after}, moved {moved}")
