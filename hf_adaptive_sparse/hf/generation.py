"""A few greedy continuations, to set models side by side."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from ..errors import ConfigError, DataError
from .data import encode_open
from .evaluation import evaluation_mode

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def sample_texts(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    max_new_tokens: int = 40,
) -> list[str]:
    """Each prompt with its most likely continuation: greedy, so the same at every call.

    One prompt at a time, so that no padding is needed and a text does not depend on the prompts beside it.

    Args:
        model: any `transformers` causal language model, also packed or inside a PeftModel.
        max_new_tokens: how many tokens to add, at most; fewer if the model ends the text.
    Raises:
        ConfigError: no tokens are to be added, or more than the model has positions for.
        DataError: a prompt has no tokens.
    """
    if max_new_tokens < 1:
        raise ConfigError(f"max_new_tokens must be at least 1, got {max_new_tokens}.")
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    texts = []
    with evaluation_mode(model):
        for prompt in prompts:
            ids = encode_open(tokenizer, prompt)
            if not ids:
                raise DataError(f"the prompt {prompt!r} has no tokens: there is nothing to continue.")
            if positions is not None and len(ids) + max_new_tokens > positions:
                raise ConfigError(
                    f"a prompt of {len(ids)} tokens and max_new_tokens={max_new_tokens} do not fit the "
                    f"{positions} positions of the model. Shorten one of them."
                )
            batch = torch.tensor([ids], device=model.device)
            output = model.generate(
                input_ids=batch,
                attention_mask=torch.ones_like(batch),
                max_new_tokens=max_new_tokens,
                do_sample=False,
                num_beams=1,
            )
            texts.append(tokenizer.decode(output[0], skip_special_tokens=True))
    return texts
