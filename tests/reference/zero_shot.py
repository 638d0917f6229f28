"""Log-probability of a continuation, one token and one forward pass at a time."""

from __future__ import annotations

import math

from .perplexity import loss_of_token


def log_probability(model, tokenizer, context, continuation):
    first = len(tokenizer(context)["input_ids"]) if context else 1
    ids = tokenizer(context + continuation)["input_ids"]
    return -math.fsum(loss_of_token(model, ids[:k], ids[k]) for k in range(first, len(ids)))
