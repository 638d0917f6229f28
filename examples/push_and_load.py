"""Publish a sparse model with its card, and load it from the Hub. Needs a token: HF_TOKEN, or `hf auth login`."""

import argparse

import torch
from huggingface_hub import whoami
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_adaptive_sparse import NMPattern, push_to_hub
from hf_adaptive_sparse.demo import MODEL_FOLDER

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--repo", help="OWNER/NAME; default: hf-adaptive-sparse-example of your own")
parser.add_argument("--output-dir", help="not read: nothing is kept on this machine")
options = parser.parse_args()
repo = options.repo or f"{whoami()['name']}/hf-adaptive-sparse-example"

# Any sparse model will do. Here: by magnitude, untrained. With the output folder of `train`, `prune` or `shrink` in the
# place of the model, the card would also say how it was made and what was measured.
tokenizer = AutoTokenizer.from_pretrained(MODEL_FOLDER)
model = AutoModelForCausalLM.from_pretrained(MODEL_FOLDER, dtype=torch.bfloat16)
with torch.no_grad():
    for name, parameter in model.named_parameters():
        if name.endswith("proj.weight"):
            parameter.mul_(NMPattern(2, 4).keep_mask(parameter.abs()))

(pushed,) = push_to_hub(model, repo, packed=True, tokenizer=tokenizer, private=True, license="apache-2.0")
print(f"{pushed.url}: {'commit' if pushed.changed else 'nothing had changed since commit'} {pushed.commit}")

# On any machine, after `import hf_adaptive_sparse`. The hash names these weights for ever; without it: the newest ones.
loaded = AutoModelForCausalLM.from_pretrained(repo, revision=pushed.commit)
tokens = AutoTokenizer.from_pretrained(repo)("def main():", return_tensors="pt")["input_ids"]
print(tokenizer.decode(loaded.generate(tokens, max_new_tokens=20, do_sample=False)[0]))
with torch.no_grad():
    same = torch.equal(model(tokens).logits, loaded(tokens).logits)
print(f"loaded from the Hub; logits bit-equal: {same}")
