"""`hf-adaptive-sparse`: one file per subcommand, with its arguments and `run(arguments) -> exit code`."""

from __future__ import annotations

PROGRAM = "hf-adaptive-sparse"

# Subcommand -> what `--help` says about it. Its code is the module of the same name in this folder, imported
# only when it is asked for.
SUBCOMMANDS: dict[str, str] = {
    "demo": "the whole path on an embedded model: no network, no GPU, a few minutes",
    "train": "learn 2:4 masks while retraining with distillation, then save the sparse model",
    "prune": "one shot without training: any method, any pattern, exact sparsity; then save the sparse model",
    "shrink": "remove heads and MLP channels, before or between steps of training: an ordinary, smaller model",
    "export": "save a sparse model dense-stored (loads in every engine) or packed (smaller)",
    "inspect": "what is sparse in a model, how much, and is it valid 2:4",
    "eval": "perplexity, and lm-eval tasks, of any model",
}
