"""The logits of a model, a chunk of tokens at a time: as they are given, or made from hidden states.

Both classes write the logits of some rows with `fill`, and take dloss/dlogits of the rows filled last with
`add_gradient`. `inputs` are the tensors that may want a gradient, and `gradients` what they get, in the same
order, still to be multiplied by `factor`.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .errors import ConfigError


def _room(make: Callable[..., Tensor], tensor: Tensor | None, **options: torch.dtype) -> Tensor | None:
    """What `make` makes in the shape of `tensor`, if that requires a gradient."""
    wanted = tensor is not None and tensor.requires_grad and torch.is_grad_enabled()
    return make(tensor, **options) if wanted else None


class GivenLogits:
    """Logits [..., vocab] that exist already. Their gradient is the only tensor of that size that is made."""

    factor = 1.0

    def __init__(self, logits: Tensor) -> None:
        logits = logits.flatten(0, -2)
        self.device, (self.tokens, self.vocab) = logits.device, logits.shape
        self.arithmetic = torch.promote_types(logits.dtype, torch.float32)
        self.inputs: tuple[Tensor | None, ...] = (logits,)
        self.gradients: list[Tensor | None] = [None]
        self._logits = logits.detach()

    def want_gradients(self) -> None:
        """Make room for the gradients of the inputs that require one."""
        self.gradients = [_room(torch.empty_like, self.inputs[0])]

    def fill(self, rows: slice, ignored: Tensor, scale: float, out: Tensor) -> None:
        """Write `scale` times the logits of `rows` to `out` [n, vocab]."""
        out.copy_(self._logits[rows])
        if scale != 1.0:
            out.mul_(scale)

    def add_gradient(self, rows: slice, ignored: Tensor, gradient: Tensor) -> None:
        """Take, and overwrite, dloss/dlogits [n, vocab] of `rows`; those `ignored` [n, 1] give none."""
        to_logits = self.gradients[0]
        if to_logits is not None:
            # A fill, and not a product: an ignored row may hold NaN, and NaN * 0 is NaN.
            to_logits[rows] = gradient.masked_fill_(ignored, 0.0)


class LogitsFromHidden:
    """logits = softcap * tanh(logit_scale * (hidden @ weight.T + bias) / softcap), never all of them at once.

    Args:
        hidden: [..., width], after the final norm.
        weight: [vocab, width].
        bias: [vocab].
        softcap, logit_scale: None where the model has none.
        cast: `weight` in the dtype of the product, where somebody has it already.
    Raises:
        ConfigError: the weight does not fit the hidden states.
    """

    def __init__(
        self,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None = None,
        softcap: float | None = None,
        logit_scale: float | None = None,
        cast: Tensor | None = None,
    ) -> None:
        hidden = hidden.flatten(0, -2)
        width = hidden.shape[1]
        if weight.dim() != 2 or weight.shape[1] != width:
            raise ConfigError(
                f"a head for hidden states of width {width} has a [vocab, {width}] weight, got "
                f"{list(weight.shape)}. If the head is sharded over devices, gather it first."
            )
        # As nn.Linear does it: the product runs in the dtype of its input, or of autocast.
        device = hidden.device.type
        autocast = torch.is_autocast_enabled(device)
        self._dtype = torch.get_autocast_dtype(device) if autocast else hidden.dtype
        self.device, self.tokens, self.vocab = hidden.device, hidden.shape[0], weight.shape[0]
        self.arithmetic = torch.promote_types(self._dtype, torch.float32)
        self.inputs: tuple[Tensor | None, ...] = (hidden, weight, bias)
        self.gradients: list[Tensor | None] = [None, None, None]
        self.factor = 1.0 if logit_scale is None else logit_scale
        self.cast = weight.detach().to(self._dtype) if cast is None or cast.dtype != self._dtype else cast
        self._hidden = hidden.detach()
        self._bias = None if bias is None else bias.detach().to(self._dtype)
        self._softcap = softcap

    def want_gradients(self) -> None:
        """Make room for the gradients of the inputs that require one."""
        hidden, weight, bias = self.inputs
        self.gradients = [
            _room(torch.empty_like, hidden),
            # Sums over chunks: in bfloat16 the later ones would be lost in its 8 bits.
            _room(torch.zeros_like, weight, dtype=self.arithmetic),
            _room(torch.zeros_like, bias, dtype=self.arithmetic),
        ]

    def fill(self, rows: slice, ignored: Tensor, scale: float, out: Tensor) -> None:
        """Write `scale` times the logits of `rows` to `out` [n, vocab]; those `ignored` [n, 1] are finite."""
        # Zeroed here, where a row is `width` long, ignored rows need no care where it is `vocab` long.
        self._chunk = self._hidden[rows].to(self._dtype).masked_fill(ignored, 0.0)
        product = out if out.dtype == self._dtype else torch.empty_like(out, dtype=self._dtype)
        # The matrix product applies the scale for nothing.
        alpha = self.factor * scale if self._softcap is None else self.factor / self._softcap
        if self._bias is None:
            torch.addmm(product, self._chunk, self.cast.t(), beta=0.0, alpha=alpha, out=product)
        else:
            torch.addmm(self._bias, self._chunk, self.cast.t(), beta=alpha, alpha=alpha, out=product)
        if product is not out:
            out.copy_(product)
        if self._softcap is not None:
            out.tanh_()
            if any(gradient is not None for gradient in self.gradients):
                self._slope = 1.0 - out * out
            out.mul_(self._softcap * scale)

    def add_gradient(self, rows: slice, ignored: Tensor, gradient: Tensor) -> None:
        """Take, and overwrite, dloss/dlogits [n, vocab] of `rows`; those `ignored` [n, 1] give none."""
        to_hidden, to_weight, to_bias = self.gradients
        if to_hidden is None and to_weight is None and to_bias is None:
            return
        if self._softcap is not None:
            gradient.mul_(self._slope)
        if to_bias is not None:
            to_bias.addmv_(gradient.t(), (~ignored[:, 0]).to(gradient.dtype))
        gradient = gradient.to(self._dtype)
        if to_hidden is not None:
            to_hidden[rows] = (gradient @ self.cast).masked_fill_(ignored, 0.0)
        if to_weight is not None and to_weight.dtype == self._dtype:
            to_weight.addmm_(gradient.t(), self._chunk)
        elif to_weight is not None:
            to_weight.add_(gradient.t() @ self._chunk)
