"""The same training without a Trainer: DistillationLoss, SparseAdamW and two calls for the masks."""

import argparse

import torch
from peft import get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_adaptive_sparse import (
    AdaptiveSparseConfig,
    DistillationLoss,
    MaskTrack,
    SparseAdamW,
    dense_teacher,
    learned_masks_config,
    refresh_masks,
    save_packed,
    sparse_layers,
    suggested_learning_rate,
    token_windows,
)
from hf_adaptive_sparse.demo import MODEL_FOLDER, demo_documents

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--steps", type=int, default=100)
parser.add_argument("--output-dir", default="out/plain_torch_loop")
options = parser.parse_args()

tokenizer = AutoTokenizer.from_pretrained(MODEL_FOLDER)
windows = token_windows(demo_documents("train"), tokenizer, length=256, limit=8 * options.steps)
model = AutoModelForCausalLM.from_pretrained(MODEL_FOLDER, dtype=torch.float32)
model = get_peft_model(model, AdaptiveSparseConfig())

masks = learned_masks_config(model)  # when and how masks change
layers = sparse_layers(model)
tracks = [MaskTrack(one.name, one.weight, one.keep, one.keep.clone(), one.keep.clone()) for one in layers]
trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
learning_rate = suggested_learning_rate(layer.weight for layer in layers)
optimizer = SparseAdamW(trained, lr=learning_rate, decay=masks.decay, decay_steps=masks.decay_steps(options.steps))
optimizer.bind((layer.weight, layer.keep) for layer in layers)
loss_of = DistillationLoss(temperature=2.0, kd_weight=0.67, ce_weight=0.33)

for step in range(1, options.steps + 1):
    batch = windows.tokens[8 * (step - 1) : 8 * step].long()
    with dense_teacher(model):  # the frozen dense weights under the adapter; no second model
        teacher_logits = model(batch).logits
    result = loss_of(model(batch).logits, teacher_logits, batch)
    result.loss.backward()
    torch.nn.utils.clip_grad_norm_(trained, 1.0)
    optimizer.step()
    optimizer.zero_grad()
    if masks.is_refresh(step, options.steps):
        changes = refresh_masks(tracks, masks)
        flipped = sum(change.flipped for change in changes.values())
        print(f"step {step}: {flipped} weights of {sum(change.numel for change in changes.values())} flipped")
    print(f"step {step}: loss {result.loss:.3f}, ce {result.ce:.3f}, kd {result.kd:.3f}")

save_packed(model.merge_and_unload(), options.output_dir, tokenizer=tokenizer, overwrite=True)
