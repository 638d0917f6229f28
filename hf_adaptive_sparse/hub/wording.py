"""The sentences of a card that depend on what was done to the model."""

from __future__ import annotations

from ..reports.text import human_bytes, number, percent
from .facts import Facts
from .parents import Parent


def introduction(facts: Facts, parent: Parent) -> str:
    """What the model is and how it was made, in one paragraph."""
    base = "A language model" if parent.name is None else parent.name
    if parent.hub_id is not None:
        base = f"[{parent.hub_id}](https://huggingface.co/{parent.hub_id})"
    sentences = [f"{base}, {_done(facts)}."]
    if facts.subcommand != "shrink" and facts.kind.name != "shrunk":
        sentences += _sparse(facts)
    if facts.dense is not None and facts.result is not None:
        before, after = facts.dense.perplexity, facts.result.perplexity
        if before is not None and after is not None:
            sentences.append(f"Perplexity on the same held-out text: dense {number(before)}, now {number(after)}.")
    sentences.append(f"This repository is {facts.kind.words}.")
    text = " ".join(sentences)
    return text[0].upper() + text[1:] if text.startswith("the ") else text


def limits(facts: Facts, parent: Parent) -> str:
    """What the reader should not expect."""
    lines = [
        "Pruning costs quality where nobody measured it: check the abilities that you need before you rely on them."
    ]
    if parent.name is not None:
        lines.append(f"What is said about bias and risks of {parent.name} holds for this model too.")
    if facts.result is not None and facts.result.tokens:
        lines.append("It was retrained on the text named above only, and may have forgotten what that text lacks.")
    if facts.pruned and facts.kind.name in ("packed", "dense"):
        lines.append(
            "A sparse model is not faster by itself: whether 2:4 weights run faster depends on the hardware, the "
            "kernels and the number of rows. Measure it where it will run."
            if facts.is_two_four
            else "A sparse model is not faster by itself: most hardware multiplies the zeros as well."
        )
    return " ".join(lines)


def _done(facts: Facts) -> str:
    settings, result = facts.settings, facts.result
    if facts.subcommand in ("train", "demo"):
        tokens = f" for {result.tokens:,} tokens" if result is not None and result.tokens else ""
        teacher = settings.get("teacher", "self")
        by = "its dense self" if teacher == "self" else "another model"
        kept = str(settings.get("pattern", "2:4"))
        return f"made {kept} sparse: the masks were learned while it was retrained{tokens} with {by} as the teacher"
    if facts.subcommand == "prune":
        pattern, bits = settings.get("pattern", ""), settings.get("bits") or 16
        rounded = f", and the kept values rounded to {bits} bits" if isinstance(bits, int) and bits < 16 else ""
        return f"pruned in one shot to {pattern} by the method `{settings.get('method')}`, without training{rounded}"
    if facts.subcommand == "shrink" or facts.kind.name == "shrunk":
        before = None if facts.dense is None else facts.dense.parameters
        after = None if result is None else result.parameters
        sizes = f" from {before:,} to {after:,} parameters ({after / before:.1%})" if before and after else ""
        trained = result is not None and result.tokens
        when = "interleaved with" if (settings.get("stages") or 1) > 1 else "followed by"
        how = f", {when} training on {result.tokens:,} tokens" if trained else ""
        return f"made smaller{sizes} by removing attention heads and MLP channels{how}"
    if facts.kind.name == "adapter":
        method = str(facts.config.get("peft_type", "")).replace("_", " ").lower()
        return f"with an adapter ({method})" if method else "with an adapter"
    made = facts.config.get("adaptive_sparse") or {}
    one_shot = made.get("one_shot") if isinstance(made, dict) else None
    if isinstance(one_shot, dict):
        pattern, method = one_shot.get("pattern"), one_shot.get("method")
        return f"pruned in one shot to {pattern} by the method `{method}`, without training"
    return "made sparse; how is not recorded" if facts.pruned else "as it is"


def _sparse(facts: Facts) -> list[str]:
    if not facts.pruned or facts.stored is None:
        return []
    every, pruned = facts.stored.matrices, facts.pruned
    zeros = sum(matrix.zeros for matrix in pruned) / sum(matrix.elements for matrix in pruned)
    if facts.is_two_four:
        what = "of every four weights along the inputs of each at most two are not zero"
    else:
        what = f"{percent(zeros)} of their weights are zero"
    said = [f"{len(pruned)} of its {len(every)} weight matrices are sparse: {what}; the others are dense."]
    codes = [matrix for matrix in pruned if matrix.value_bits is not None]
    if codes:
        bits = " and ".join(sorted({f"{matrix.value_bits}" for matrix in codes}))
        scales = human_bytes(sum(matrix.scale_nbytes for matrix in codes))
        said.append(f"The kept values of {len(codes)} are stored with {bits} bits each, with {scales} of scales.")
    return said
