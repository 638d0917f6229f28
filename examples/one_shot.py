"""Prune a model to 2:4 in one shot, without training; save it packed; load it back."""

import argparse

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_adaptive_sparse import OneShotConfig, one_shot, perplexity, save_packed, token_windows
from hf_adaptive_sparse.demo import MODEL_FOLDER, demo_documents

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--method", default="balanced", help="fast, balanced, best, or the name of a paper's method")
parser.add_argument("--output-dir", default="out/one_shot")
options = parser.parse_args()

tokenizer = AutoTokenizer.from_pretrained(MODEL_FOLDER)
model = AutoModelForCausalLM.from_pretrained(MODEL_FOLDER, dtype=torch.float32)
calibration = token_windows(demo_documents("train"), tokenizer, 256, limit=32)
judge = token_windows(demo_documents("heldout"), tokenizer, 256, limit=16)
found = {"dense": perplexity(model, judge).perplexity}

magnitude = AutoModelForCausalLM.from_pretrained(MODEL_FOLDER, dtype=torch.float32)
one_shot(magnitude, calibration, OneShotConfig(method="magnitude"))
found["magnitude 2:4"] = perplexity(magnitude, judge).perplexity

report = one_shot(model, calibration, OneShotConfig(method=options.method, pattern="2:4"))  # in place
for row in report.matrices:
    error = "" if row.error is None else f"{row.error:.4f}"
    print(f"{row.name:<36} {row.shape[0]:>4} x {row.shape[1]:<4} {row.pattern} {row.sparsity:.0%} {error}")

packed = save_packed(model, f"{options.output_dir}/packed", tokenizer=tokenizer, overwrite=True)
loaded = AutoModelForCausalLM.from_pretrained(f"{options.output_dir}/packed")  # needs: import hf_adaptive_sparse
found[f"{options.method} 2:4"] = perplexity(loaded, judge).perplexity
with torch.no_grad():
    same = torch.equal(model(judge.tokens[:1].long()).logits, loaded(judge.tokens[:1].long()).logits)
print(f"{len(packed.modules)} layers packed, zeros {report.realised:.4f}, logits bit-equal: {same}")
print("perplexity: " + ", ".join(f"{name} {value:.2f}" for name, value in found.items()))
