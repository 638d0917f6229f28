"""`hf-adaptive-sparse`: one file per subcommand, with its arguments and `run(arguments) -> exit code`."""

from __future__ import annotations

PROGRAM = "hf-adaptive-sparse"

# Subcommand -> what `--help` says about it. Its code is the module of the same name in this folder, imported
# only when it is asked for.
SUBCOMMANDS: dict[str, str] = {
    "demo": "the whole path on an embedded model: no network, no GPU, a few minutes",
    "analyze": "before any work: what qualifies, predicted size, caps on speed, memory and time",
    "train": "learn 2:4 masks while retraining with distillation, then save the sparse model",
    "prune": "one shot without training: any method, any pattern, exact sparsity; then save the sparse model",
    "shrink": "remove heads and MLP channels, before or between steps of training: an ordinary, smaller model",
    "export": "save a sparse model dense-stored (loads in every engine) or packed (smaller)",
    "push": "publish a sparse model on a Hub, with its model card",
    "inspect": "what is sparse in a model, how much, and is it valid 2:4",
    "bench": "size, loading, memory and speed next to dense, on this machine",
    "eval": "perplexity, and lm-eval tasks, of any model",
}
