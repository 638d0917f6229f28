"""How much pruning one layer would hurt, as one number: larger = prune less. And what pruning it did hurt.

Of the loss: `FisherTrace` from one backward pass, `hutchinson_traces` from double backward. Of the layer alone:
`output_error`, `outlier_ratio`, and `tail_heaviness`, which needs no data.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from .errors import CalibrationError, ConfigError
from .products import float32_products
from .saliency import wanda_score
from .stats import LayerStats

# Columns of a Gram matrix, and rows of a weight, multiplied together.
_TILE, _ROWS = 256, 2048

_NO_SECOND_DERIVATIVE = ("is not implemented", "not twice differentiable", "does not support double backward")


@dataclass(kw_only=True)
class FisherTrace:
    """Sums over tokens for the trace of the Fisher matrix of one linear layer y = W x, per token.

    The trace of the empirical Fisher matrix with every token an example of its own: its gradient is the outer product
    of dL/dy_t and x_t, whose squared norm is the product of theirs. In a language model dL/dy_t also holds what token t
    does to the loss of later tokens. Stands in for the trace of the Hessian of arXiv 2310.09499 (eq. 5 and 6): never
    negative, of low variance, and one backward pass.

    Attributes:
        tokens: how many were seen.
        weights: sum over tokens of ||x_t||^2 * ||dL/dy_t||^2.
        outputs: sum over tokens of ||dL/dy_t||^2.
        where: name of the layer, for messages.
    """

    tokens: int = 0
    weights: float = 0.0
    outputs: float = 0.0
    where: str = "layer"

    def update(self, inputs: Tensor, output_gradient: Tensor) -> None:
        """Count more tokens, in place.

        Args:
            inputs: [tokens, in] (more leading dimensions are tokens too), any float dtype.
            output_gradient: [tokens, out], of the SUM of the losses of all tokens: from the gradient of their mean
                it comes out smaller by the square of their number.
        Raises:
            CalibrationError: NaN or inf in one of them.
        """
        x = inputs.detach().flatten(0, -2).float().square().sum(-1).double()
        g = output_gradient.detach().flatten(0, -2).float().square().sum(-1).double()
        weights, outputs = torch.stack([(x * g).sum(), g.sum()]).tolist()
        if not math.isfinite(weights + outputs):
            raise CalibrationError(
                f"{self.where}: the inputs or the gradients of its outputs hold NaN or inf. Load the model in float32 "
                "or bfloat16, and check the dense model's loss on this text."
            )
        self.tokens += len(x)
        self.weights += weights
        self.outputs += outputs

    def __add__(self, other: FisherTrace) -> FisherTrace:
        """Of the tokens of both."""
        return FisherTrace(
            tokens=self.tokens + other.tokens,
            weights=self.weights + other.weights,
            outputs=self.outputs + other.outputs,
            where=self.where,
        )

    @property
    def trace(self) -> float:
        """Mean over tokens of ||x_t||^2 * ||dL/dy_t||^2."""
        return self.weights / self._some_tokens()

    @property
    def output_gradient(self) -> float:
        """Mean over tokens of ||dL/dy_t||^2: divided by `out`, what a squared error of y weighs in the loss."""
        return self.outputs / self._some_tokens()

    def _some_tokens(self) -> int:
        if not self.tokens:
            raise CalibrationError(
                f"{self.where}: the Fisher trace needs calibration tokens, and none reached this layer. Calibrate on "
                "more text."
            )
        return self.tokens


@dataclass(frozen=True, kw_only=True)
class TraceEstimate:
    """Mean of `probes` random estimates of a trace, and its standard error. The mean may be negative."""

    mean: float
    standard_error: float
    probes: int


def hutchinson_traces(
    loss_closure: Callable[[], Tensor],
    parameters: dict[str, Tensor],
    probes: int = 32,
    generator: torch.Generator | None = None,
) -> dict[str, TraceEstimate]:
    """Tr(H_g) = E[z^T H_g z], with H_g the Hessian of the loss with respect to one parameter and z random signs.

    Source: Hutchinson, "A Stochastic Estimator of the Trace of the Influence Matrix", 1989; the sensitivity of arXiv
    2310.09499, eq. 5. Signs, where that paper has normal numbers, because their estimate varies less. One product with
    the Hessian serves all parameters: the terms between different parameters have mean 0 and are part of the standard
    error. Traces keep their sign, where that paper's code takes the absolute value.

    Args:
        loss_closure: runs the model and returns its loss, [] or one number. Called once per probe, so that it may take
            the next batch every time; the standard error then covers the choice of batches as well.
        parameters: name -> leaf tensor with requires_grad that the loss depends on. Their .grad is left alone.
        probes: how many, at least 2.
        generator: of the signs; the signs are drawn on its device.
    Raises:
        ConfigError: fewer than 2 probes, or a loss that does not depend on a parameter or has no second derivative.
        CalibrationError: an estimate is NaN or inf.
    """
    if probes < 2:
        raise ConfigError(f"a standard error needs at least 2 probes, got {probes}. 32 are a good start.")
    for name, parameter in parameters.items():
        if not parameter.requires_grad:
            raise ConfigError(
                f"{name}: has no requires_grad, so its trace cannot be taken. Switch it on, or leave it out."
            )
    drawn: dict[str, list[float]] = {name: [] for name in parameters}
    tensors = list(parameters.values())
    for _ in range(probes):
        signs = [_signs(tensor, generator) for tensor in tensors]
        products = _hessian_products(loss_closure(), parameters, signs)
        for name, sign, product in zip(parameters, signs, products, strict=True):
            drawn[name].append(float((sign.double() * product.double()).sum()))
    for name, values in drawn.items():
        if not all(math.isfinite(value) for value in values):
            raise CalibrationError(
                f"{name}: the trace of its Hessian comes out as NaN or inf. Load the model in float32, and check the "
                "dense model's loss on this text."
            )
    return {name: _estimate(values) for name, values in drawn.items()}


def _signs(like: Tensor, generator: torch.Generator | None) -> Tensor:
    device = like.device if generator is None else generator.device
    return torch.randint(2, like.shape, generator=generator, device=device).to(like).mul_(2).sub_(1)


def _hessian_products(loss: Tensor, parameters: dict[str, Tensor], vectors: list[Tensor]) -> list[Tensor]:
    tensors = list(parameters.values())
    gradients = torch.autograd.grad(loss, tensors, create_graph=True, allow_unused=True)
    for name, gradient in zip(parameters, gradients, strict=True):
        if gradient is None:
            raise ConfigError(f"{name}: the loss does not depend on it, so it has no trace. Leave it out.")
    product = torch.stack([(g * v).sum() for g, v in zip(gradients, vectors, strict=True)]).sum()
    if not product.requires_grad:  # the loss is linear in all of them
        return [torch.zeros_like(tensor) for tensor in tensors]
    try:
        return list(torch.autograd.grad(product, tensors, allow_unused=True, materialize_grads=True))
    except RuntimeError as error:
        if not any(words in str(error) for words in _NO_SECOND_DERIVATIVE):
            raise
        raise ConfigError(
            f"the loss cannot be differentiated twice ({str(error).splitlines()[0]}). Load the model with "
            "attn_implementation='eager', or take the Fisher trace, which needs one backward pass."
        ) from error


def _estimate(values: list[float]) -> TraceEstimate:
    mean = math.fsum(values) / len(values)
    variance = math.fsum((value - mean) ** 2 for value in values) / (len(values) - 1)
    return TraceEstimate(mean=mean, standard_error=math.sqrt(variance / len(values)), probes=len(values))


def output_error(dense_weight: Tensor, weight: Tensor, stats: LayerStats, *, relative: bool = True) -> float:
    """||(W - W_dense) X||_F^2, as a part of ||W_dense X||_F^2 or, if not `relative`, as a mean over tokens.

    Args:
        dense_weight, weight: [out, in], any float dtype.
        stats: of the layer; reads `gram` [in, in].
    Returns:
        >= 0. Where the dense output is always 0: 0.0 if the other is too, else inf.
    Raises:
        CalibrationError: no tokens, or no Gram matrix.
    """
    gram = stats.require_gram("output_error")
    error = _energy(weight.detach().float() - dense_weight.detach().float(), gram)
    if not relative:
        return error / stats.tokens
    return relative_error(error, dense_weight, stats)


def relative_error(error: float, dense_weight: Tensor, stats: LayerStats) -> float:
    """A squared error of the outputs, summed over all tokens, as a part of ||W_dense X||_F^2; see output_error.

    The latter is summed from products in the dtype of a dense weight of 16 bits, which is exact to 1e-4.
    """
    gram = stats.require_gram("output_error")
    with float32_products(dense_weight.dtype):
        dense = _energy(dense_weight, gram)
    if dense == 0.0:
        return 0.0 if error == 0.0 else math.inf
    return error / dense


def _energy(weight: Tensor, gram: Tensor) -> float:
    """||W X||^2 = tr(W G W^T), G = X X^T: tiles below the diagonal count twice, those above are not computed.

    The diagonal of G, which a massive input can dominate, is left out of the products and always exact.
    """
    gram, total = gram.float(), torch.zeros((), dtype=torch.float64, device=weight.device)
    diagonal = gram.diagonal()
    for rows in weight.detach().split(_ROWS):
        rows = rows.float()
        for start in range(0, len(gram), _TILE):
            end = start + _TILE
            own, tile = rows[:, start:end], gram[start:end, start:end]
            product = own @ (tile - tile.diagonal().diag())
            if end < len(gram):
                product.addmm_(rows[:, end:], gram[end:, start:end], alpha=2.0)
            total += product.addcmul_(own, diagonal[start:end]).mul_(own).sum(dtype=torch.float64)
    # It is >= 0 up to rounding; a Gram matrix of few tokens can make it slightly negative.
    return float(total.clamp(min=0.0))


def outlier_ratio(weight: Tensor, stats: LayerStats, threshold: float = 5.0) -> float:
    """Fraction of the weights of a layer whose Wanda score is above `threshold` times the mean score.

    Source: Yin et al., "Outlier Weighed Layerwise Sparsity (OWL)", ICML 2024, eq. 1 and 2; there in percent, and over
    all matrices of a block, which matrices stacked along their rows give if they share the input.

    Raises:
        CalibrationError: no tokens were seen, or not all of them were finite.
        ConfigError: threshold is not a positive number.
    """
    if not 0.0 < threshold < math.inf:
        raise ConfigError(f"threshold of an outlier is a number > 0, got {threshold}. OWL takes 5.")
    stats.require_tokens("outlier_ratio")
    scores = wanda_score(weight, stats)
    return float((scores > threshold * scores.mean(dtype=torch.float64)).double().mean())


def tail_heaviness(weight: Tensor, where: str = "layer") -> float:
    """Minus the Hill exponent of the eigenvalues of W^T W: the heavier their tail, the larger. Needs no data.

    The exponent is alpha = 1 + k / sum_{i=1..k} ln(lambda_{n-i+1} / lambda_{n-k}), with the n eigenvalues in ascending
    order and k = n / 2. Small exponents are those of well-trained matrices, which AlphaPruning prunes less.

    Source: Lu et al., "AlphaPruning: Using Heavy-Tailed Self Regularization Theory for Improved Layer-wise Pruning of
    Large Language Models", NeurIPS 2024, eq. 3. Eigenvalues that are 0 up to rounding are left out, which the paper
    does not have to say: its matrices have full rank.

    Args:
        weight: [out, in], any float dtype.
        where: name of the layer, for messages.
    Returns:
        <= -1; -inf where all eigenvalues of the upper half are equal.
    Raises:
        CalibrationError: fewer than 2 eigenvalues are not 0, or the weight is not finite.
    """
    if not weight.isfinite().all():
        raise CalibrationError(f"{where}: the weight holds NaN or inf, so it has no spectrum. Load a sound checkpoint.")
    singular = torch.linalg.svdvals(weight.detach().float()).double()  # descending
    noise = max(weight.shape) * torch.finfo(torch.float32).eps * singular.amax()
    eigenvalues = singular[singular > noise].square()
    if len(eigenvalues) < 2:
        raise CalibrationError(
            f"{where}: a power law needs at least 2 eigenvalues, and a {list(weight.shape)} weight of rank "
            f"{len(eigenvalues)} has no more. Leave the layer out, or allocate by another measure."
        )
    k = len(eigenvalues) // 2
    spread = float((eigenvalues[:k] / eigenvalues[k]).log().sum())
    return -1.0 - k / spread if spread > 0.0 else -math.inf
