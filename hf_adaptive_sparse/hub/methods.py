"""The papers behind the methods, as a card names them."""

from __future__ import annotations

from .facts import Facts

_AST = (
    'Huang et al., "Pruning Large Language Models with Semi-Structural Adaptive Sparse Training", '
    "[arXiv 2407.20584](https://arxiv.org/abs/2407.20584)"
)
_ADAPT = "Adapt-Pruner and Adapt-Accel, [arXiv 2502.03460](https://arxiv.org/abs/2502.03460)"
_SPARSEGPT = (
    'Frantar and Alistarh, "SparseGPT: Massive Language Models Can Be Accurately Pruned in One-Shot", '
    "[arXiv 2301.00774](https://arxiv.org/abs/2301.00774)"
)
_WANDA = (
    'Sun et al., "A Simple and Effective Pruning Approach for Large Language Models", '
    "[arXiv 2306.11695](https://arxiv.org/abs/2306.11695)"
)
_MIXED = (
    'Shao et al., "One-Shot Sensitivity-Aware Mixed Sparsity Pruning for Large Language Models", '
    "[arXiv 2310.09499](https://arxiv.org/abs/2310.09499)"
)

# Method of one-shot pruning -> where it is from; a method of our own, built of published parts, names none.
ONE_SHOT = {"sparsegpt": _SPARSEGPT, "isc": _MIXED, "mixed_sparsity": _MIXED, "wanda": _WANDA, "fast": _WANDA}


def source(facts: Facts) -> str | None:
    """The paper of the method that made a model; None if it is not known or has none."""
    if facts.subcommand in ("train", "demo") or facts.config.get("peft_type") == "ADAPTIVE_SPARSE":
        return _AST
    if facts.subcommand == "shrink":
        return _ADAPT
    if facts.subcommand == "prune":
        return ONE_SHOT.get(str(facts.settings.get("method")))
    return None
