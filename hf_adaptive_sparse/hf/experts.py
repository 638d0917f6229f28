"""Fused experts: mixture-of-experts layers of transformers whose experts lie in one parameter [experts, out, in]."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..stats import LayerStats
from .accumulators import StatsSum

# An expert that saw fewer tokens than this for each of its input features also gets the statistics of all tokens.
TOKENS_PER_FEATURE = 4

# Tokens that go through an expert at a time.
_TOKENS = 8192


def is_fused_experts(module: nn.Module) -> bool:
    """Whether it is one of the modules that transformers marks with `use_experts_implementation`."""
    return hasattr(module, "_apply_gate") and hasattr(module, "is_transposed") and hasattr(module, "num_experts")


def expert_projections(module: nn.Module) -> tuple[str, str]:
    """Names of its two parameters: the one that reads the hidden state, and the one that writes to it."""
    return ("gate_up_proj" if module.has_gate else "up_proj"), "down_proj"


def project(module: nn.Module, parameter: str, expert: int, x: Tensor) -> Tensor:
    """One expert's linear map, [tokens, in] -> [tokens, out]."""
    weight = getattr(module, parameter)[expert]
    bias = getattr(module, f"{parameter}_bias")[expert] if module.has_bias else None
    return F.linear(x, weight.t() if module.is_transposed else weight, bias)


def activate(module: nn.Module, first: Tensor) -> Tensor:
    """What the second projection of an expert reads, given what the first one returned."""
    return module._apply_gate(first) if module.has_gate else module.act_fn(first)


class ExpertInputs:
    """What one fused experts module read during calibration, and which token went to which expert.

    Its statistics are computed from here, a few experts at a time: the Gram matrices of all experts together may be
    larger than the model.

    Args:
        total: tokens that will come.
        new_buffer: (shape, dtype) -> a tensor to keep them in.
        device: on which to compute.
    """

    def __init__(
        self,
        module: nn.Module,
        total: int,
        new_buffer: Callable[[tuple[int, ...], torch.dtype], Tensor],
        device: torch.device,
    ) -> None:
        self._module, self._total, self._new_buffer, self._device = module, total, new_buffer, device
        self._seen = 0
        self._inputs: Tensor | None = None
        self._dense: Tensor | None = None
        self._index: Tensor | None = None
        self._tokens: list[Tensor] | None = None
        self._shared: StatsSum | LayerStats | None = None

    def capture(self, inputs: Tensor, index: Tensor, dense: Tensor | None) -> None:
        """Keep the inputs of one call.

        Args:
            inputs: [tokens, features].
            index: [tokens, experts per token].
            dense: [tokens, features], what the dense model has in the place of `inputs`, if that is another.
        """
        inputs, index = inputs.flatten(0, -2), index.flatten(0, -2)
        if self._inputs is None:
            self._inputs = self._new_buffer((self._total, inputs.shape[1]), inputs.dtype)
            self._index = torch.empty(self._total, index.shape[1], dtype=torch.int64)
            if dense is not None:
                self._dense = self._new_buffer((self._total, inputs.shape[1]), dense.dtype)
        rows = slice(self._seen, self._seen + len(inputs))
        self._inputs[rows], self._index[rows] = inputs, index.to("cpu")
        if dense is not None:
            self._dense[rows] = dense.flatten(0, -2)
        self._seen += len(inputs)

    def tokens_of(self, expert: int) -> Tensor:
        """Which tokens were routed to an expert: [tokens] of indices, ascending."""
        if self._tokens is None:
            flat = self._index.flatten()
            order = flat.argsort(stable=True) // self._index.shape[1]
            counts = torch.bincount(flat, minlength=self._module.num_experts)
            self._tokens = list(order.split(counts.tolist()))
        return self._tokens[expert]

    def stats(
        self,
        expert: int,
        second: bool,
        needs: Collection[str],
        dense_module: nn.Module | None,
        where: str,
        damping: float,
    ) -> tuple[LayerStats, int, float]:
        """Statistics of what one projection of an expert reads.

        With fewer than TOKENS_PER_FEATURE tokens for each of its n0 input features they are H_e + tau H_shared, both
        per token, with tau = n0 / (n0 + n_e): H_e over the n_e tokens that were routed to it; H_shared over all tokens
        of the layer, of which the second projection takes an even sample, sent through this expert. Without any token
        of its own H_shared stands alone.

        Args:
            second: whether it is the second projection of the expert.
            dense_module: the same experts in the dense model, where `cross` is of two different inputs.
        Returns:
            Statistics, tokens routed to the expert, tau (0 where it saw enough).
        """
        tokens = self.tokens_of(expert)
        own = self._sums(tokens, expert, second, needs, dense_module).stats(where, damping)
        features = own.squares.numel()
        if len(tokens) >= TOKENS_PER_FEATURE * features:
            return own, len(tokens), 0.0
        tau = features / (features + len(tokens))
        return shrink(own, self._shared_stats(expert, second, needs, dense_module, features), tau), len(tokens), tau

    def _shared_stats(
        self, expert: int, second: bool, needs: Collection[str], dense_module: nn.Module | None, features: int
    ) -> LayerStats:
        if second:
            count = min(self._total, TOKENS_PER_FEATURE * features)
            sample = torch.arange(count) * self._total // count
            return self._sums(sample, expert, True, needs, dense_module).stats("shared")
        if self._shared is None:
            self._shared = self._sums(torch.arange(self._total), expert, False, needs, dense_module).stats("shared")
        return self._shared

    def _sums(
        self, tokens: Tensor, expert: int, second: bool, needs: Collection[str], dense_module: nn.Module | None
    ) -> StatsSum:
        parameter = expert_projections(self._module)[second]
        weight = getattr(self._module, parameter)
        sums = StatsSum(weight.shape[1 if self._module.is_transposed else 2], needs, self._device)
        for part in tokens.split(_TOKENS):
            x = self._read(self._inputs, part, self._module if second else None, expert)
            dense = None
            if self._dense is not None:
                dense = self._read(self._dense, part, dense_module if second else None, expert)
            sums.add(x, dense)
        return sums

    def _read(self, buffer: Tensor, tokens: Tensor, through: nn.Module | None, expert: int) -> Tensor:
        x = buffer[tokens.to(buffer.device)].to(self._device)
        if through is None:
            return x
        return activate(through, project(through, expert_projections(through)[0], expert, x))


def shrink(own: LayerStats, shared: LayerStats, tau: float) -> LayerStats:
    """Per token H + tau H_shared, as sums over the tokens of `own`; `shared` itself where it has none."""
    if not own.tokens:
        return replace(shared, damping=own.damping, where=own.where)
    factor = tau * own.tokens / shared.tokens

    def merge(one: Tensor | None, other: Tensor | None) -> Tensor | None:
        return None if one is None or other is None else one + factor * other

    return replace(
        own,
        squares=own.squares + factor * shared.squares,
        gram=merge(own.gram, shared.gram),
        cross=merge(own.cross, shared.cross),
    )


def run_experts(
    module: nn.Module,
    hidden: Tensor,
    index: Tensor,
    weights: Tensor,
    watch: Callable[[str, int, Tensor, Tensor, Tensor], None],
) -> Tensor:
    """What the module returns, computed expert by expert, so that every product can be watched.

    Args:
        hidden: [tokens, features].
        index: [tokens, experts per token].
        weights: likewise: what each expert counts.
        watch: called with (parameter, expert, which tokens, input, output) of every product.
    """
    first, second = expert_projections(module)
    result = torch.zeros_like(hidden)
    for expert in range(module.num_experts):
        tokens, place = (index == expert).nonzero(as_tuple=True)
        if not len(tokens):
            continue
        x = hidden[tokens]
        for parameter in (first, second):
            y = project(module, parameter, expert, x)
            watch(parameter, expert, tokens, x, y)
            x = activate(module, y) if parameter == first else y
        if module.has_post_expert_norm:
            x = module.post_expert_norm(x)
        result = result.index_add(0, tokens, (x * weights[tokens, place, None]).to(result.dtype))
    return result
