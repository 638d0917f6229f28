"""Windows and perplexity with loops over tokens, to compare with."""

from __future__ import annotations

import math

import torch


def windows(documents, tokenizer, length, prefix="", suffix=""):
    stream = []
    for document in documents:
        if document.strip():
            for token in tokenizer(prefix + document.strip() + suffix)["input_ids"]:
                stream.append(token)
    cut = []
    while len(stream) >= length:
        cut.append(stream[:length])
        stream = stream[length:]
    return cut, stream


def loss_of_token(model, context, token):
    """-log p(token | context), from the logits of the last position alone."""
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([context])).logits[0, -1].double()
    return (logits.logsumexp(0) - logits[token]).item()


def nll(model, tokens):
    """Mean over all predictions inside the windows: token k of a window from the tokens 0 .. k - 1 of it."""
    losses = [loss_of_token(model, window[:k], window[k]) for window in tokens for k in range(1, len(window))]
    return math.fsum(losses) / len(losses)


def nll_by_window(model, tokens):
    """The same with one forward pass for a window: fast enough for real models."""
    losses = []
    for window in tokens:
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([window])).logits[0].double()
        losses += [(row.logsumexp(0) - row[token]).item() for row, token in zip(logits, window[1:], strict=False)]
    return math.fsum(losses) / len(losses)


def sliding_nll(model, tokens, stride):
    """Each token of the stream but the first, from all before it in the first window that reaches it."""
    stream = [token for window in tokens for token in window]
    length = len(tokens[0])
    starts = list(range(0, len(stream) - length, stride)) + [len(stream) - length]
    losses = []
    for position in range(1, len(stream)):
        start = next(start for start in starts if start + length > position)
        losses.append(loss_of_token(model, stream[start:position], stream[position]))
    return math.fsum(losses) / len(losses)
