"""Pack a sparse model, load it with from_pretrained, see that nothing changed but the size; then LoRA on top."""

import argparse

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_adaptive_sparse import NMPattern, loading_options, save_dense, save_packed
from hf_adaptive_sparse.demo import MODEL_FOLDER

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--steps", type=int, help="not read: there is no training here")
parser.add_argument("--output-dir", default="out/pack_and_load")
options = parser.parse_args()

tokenizer = AutoTokenizer.from_pretrained(MODEL_FOLDER)
model = AutoModelForCausalLM.from_pretrained(MODEL_FOLDER, dtype=torch.bfloat16)

# Any model whose linears are exactly 2:4 can be packed, whoever made it so. Here: by magnitude, untrained.
with torch.no_grad():
    for name, parameter in model.named_parameters():
        if name.endswith("proj.weight"):
            parameter.mul_(NMPattern(2, 4).keep_mask(parameter.abs()))

packed = save_packed(model, f"{options.output_dir}/packed", tokenizer=tokenizer, overwrite=True)
save_dense(model, f"{options.output_dir}/dense", tokenizer=tokenizer, overwrite=True)  # for engines without us

loaded = AutoModelForCausalLM.from_pretrained(f"{options.output_dir}/packed")  # needs: import hf_adaptive_sparse
tokens = tokenizer("def main():", return_tensors="pt")["input_ids"]
with torch.no_grad():
    same = torch.equal(model(tokens).logits, loaded(tokens).logits)
print(tokenizer.decode(loaded.generate(tokens, max_new_tokens=20, do_sample=False)[0]))

# Kept packed in memory as well, and multiplied as it is stored: by a C++ kernel, where there is a compiler to build it.
with loading_options(backend="packed"), torch.no_grad():
    small = AutoModelForCausalLM.from_pretrained(f"{options.output_dir}/packed")
    difference = (small(tokens).logits - loaded(tokens).logits).abs().max().item()
bytes_held, before = small.get_memory_footprint(), loaded.get_memory_footprint()
print(f"in memory {bytes_held} bytes of {before}, logits within {difference:.2g}")

# A packed layer is an nn.Linear: LoRA trains on top of it, and the sparse weights under it do not move.
tuned = get_peft_model(loaded, LoraConfig(target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"))
tuned(input_ids=tokens, labels=tokens).loss.backward()
tuned.print_trainable_parameters()

for name, reason in packed.skipped.items():
    print(f"stays dense: {name} {reason}")
print(
    f"packed layers: {packed.module_bytes} bytes of {packed.module_dense_bytes} dense ones, "
    f"ratio {packed.module_bytes / packed.module_dense_bytes:.4f}; logits bit-equal: {same}"
)
