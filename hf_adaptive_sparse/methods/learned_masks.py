"""Adaptive Sparse Trainer: masks that are learned while the model is retrained.

Source: Huang et al., "Pruning Large Language Models with Semi-Structural Adaptive Sparse Training" (AST, arXiv
2407.20584). A dense latent weight is trained through a straight-through gradient; its mask is chosen anew every
`mask_interval` optimizer steps; an annealed decay pulls masked weights towards zero (see optim.SparseAdamW).

Departures from the published recipe, measured in benchmarks/README.md: the decay is relative to each layer's
gradient and weights and reaches its full strength early, and masks are fixed for a first and a last part of the run.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..errors import ConfigError
from ..optim import DECAY_NORMS
from ..patterns import NMPattern, parse_pattern
from ..saliency import NEEDS, SALIENCY
from ..shards import gather_rows, local_rows, row_range

# Scores that read the weights alone: while training nothing is calibrated.
TRAINING_SALIENCY = tuple(name for name in SALIENCY if not NEEDS[name])
MASK_POLICIES = ("adaptive", "frozen")

# Peak learning rate in units of the weights' own size: measured on models whose weights differ five times in size
# (benchmarks/README.md). For budgets of a few million tokens; billions of tokens want a smaller one.
LEARNING_RATE_PER_RMS = 0.025


@dataclass(frozen=True, kw_only=True)
class LearnedMasksConfig:
    """When masks change, by which score, and how hard masked weights are pulled to zero."""

    pattern: str = field(default="2:4", metadata={"help": "Which weights may be zero: 2:4, or any n:m."})
    saliency: str = field(
        default="magnitude",
        metadata={"help": f"Score by which weights are kept. One of {', '.join(TRAINING_SALIENCY)}."},
    )
    mask_policy: str = field(
        default="adaptive",
        metadata={"help": "adaptive: choose masks anew while training. frozen: keep the zeros that are there."},
    )
    mask_interval: int = field(default=10, metadata={"help": "Optimizer steps between two choices of the masks."})
    decay: float = field(default=0.7, metadata={"help": "Pull of masked weights towards zero (lambda); 0 = none."})
    decay_norm: str = field(
        default="relative",
        metadata={"help": "relative: scaled by each layer's gradient and weights. absolute: the paper's number."},
    )
    decay_fraction: float = field(
        default=0.05, metadata={"help": "Part of the run, from its start, in which the decay grows to its full value."}
    )
    start_fraction: float = field(
        default=0.2, metadata={"help": "First part of the run in which masks do not change yet, while decay acts."}
    )
    freeze_fraction: float = field(
        default=0.2, metadata={"help": "Last part of the run in which masks no longer change. 0 = they always may."}
    )

    def __post_init__(self) -> None:
        pattern = parse_pattern(self.pattern)
        if not isinstance(pattern, NMPattern):
            raise ConfigError(f"masks are learned for n:m patterns such as '2:4', got {self.pattern!r}.")
        if self.saliency not in TRAINING_SALIENCY:
            raise ConfigError(f"unknown saliency {self.saliency!r}; known: {', '.join(TRAINING_SALIENCY)}.")
        if self.mask_policy not in MASK_POLICIES:
            raise ConfigError(f"unknown mask_policy {self.mask_policy!r}; known: {', '.join(MASK_POLICIES)}.")
        if self.mask_interval < 1:
            raise ConfigError(f"mask_interval is a number of optimizer steps >= 1, got {self.mask_interval}.")
        if self.decay < 0.0:
            raise ConfigError(f"decay is >= 0, got {self.decay}. 0 switches it off.")
        if self.decay_norm not in DECAY_NORMS:
            raise ConfigError(f"unknown decay_norm {self.decay_norm!r}; known: {', '.join(DECAY_NORMS)}.")
        for name in ("decay_fraction", "start_fraction", "freeze_fraction"):
            value = getattr(self, name)
            if not 0.0 <= value <= 1.0:
                raise ConfigError(
                    f"{name} is a fraction of the run in [0, 1], got {value}. For half the run write 0.5."
                )

    def decay_steps(self, total_steps: int) -> int:
        """Optimizer steps in which the decay grows linearly to its full value."""
        return round(self.decay_fraction * total_steps)

    def is_refresh(self, step: int, total_steps: int) -> bool:
        """Whether masks are chosen anew after optimizer step `step` (1-based) of a run of `total_steps`."""
        if self.mask_policy == "frozen" or step % self.mask_interval:
            return False
        return self.start_fraction * total_steps <= step <= (1.0 - self.freeze_fraction) * total_steps


def suggested_learning_rate(weights: Iterable[Tensor]) -> float:
    """A peak learning rate for retraining sparse weights on a small budget: 0.025 x their root mean square.

    An Adam step moves every weight by about the learning rate, whatever its gradient; what a model bears is a
    part of the size of its weights, and that differs more between models than any fixed default allows for.

    Args:
        weights: of the sparse layers, any shapes.
    """
    squares = numel = 0.0
    for weight in weights:
        squares += weight.detach().double().square().sum().item()
        numel += weight.numel()
    return LEARNING_RATE_PER_RMS * (squares / numel) ** 0.5


@dataclass(frozen=True)
class MaskChange:
    """What one choice of masks changed in one layer. All are counts of weights, except `ratio`.

    Attributes:
        numel: weights in the layer.
        flipped: entries of keep that changed.
        returned: of these, entries that went back to what they were before the last change (oscillation).
        from_start: entries that differ from the mask the run started with.
        ratio: mean |masked weight| / mean |kept weight|. 0.05 to 0.2 is healthy; above 0.4 masks keep oscillating.
    """

    numel: int
    flipped: int
    returned: int
    from_start: int
    ratio: float


@dataclass
class MaskTrack:
    """One sparse layer under training: its latent weight, its keep and what keep was before.

    Attributes:
        name: of the module, for messages and logs.
        weight: [out, in] latent parameter; may be a DTensor sharded by rows.
        keep: [out, in] bool, full on every rank, written in place.
        start: [out, in] bool, keep at the start of the run.
        previous: [out, in] bool, keep before the last refresh.
    """

    name: str
    weight: Tensor
    keep: Tensor
    start: Tensor
    previous: Tensor


@torch.no_grad()
def refresh_masks(tracks: Iterable[MaskTrack], config: LearnedMasksConfig) -> dict[str, MaskChange]:
    """Choose every keep anew from its latent weight, in place, and count what changed.

    Masks come from the latent weights, never from the masked ones, so that a masked weight can come back. All counts
    go to the host in one transfer.
    """
    pattern, score = parse_pattern(config.pattern), SALIENCY[config.saliency]
    assert isinstance(pattern, NMPattern)  # the config saw to it
    names, numels, counts = [], [], []
    for track in tracks:
        local = local_rows(track.weight)
        rows = row_range(track.weight)
        keep = gather_rows(pattern.keep_mask(score(local)), track.weight) if local.numel() else None
        if keep is None:  # this rank holds no row of a small layer; it still takes part in the gather
            keep = gather_rows(torch.zeros(local.shape, dtype=torch.bool, device=local.device), track.weight)
        flips = keep ^ track.keep
        counts.append(
            torch.stack(
                [
                    flips.sum().double(),
                    (flips & (keep == track.previous)).sum().double(),
                    (keep ^ track.start).sum().double(),
                    *_mean_magnitudes(local, keep[rows]),
                ]
            )
        )
        track.previous.copy_(track.keep)
        track.keep.copy_(keep)
        names.append(track.name)
        numels.append(track.keep.numel())
    if not names:
        return {}
    return {
        name: MaskChange(numel, int(flipped), int(returned), int(from_start), masked / kept if kept else 0.0)
        for name, numel, (flipped, returned, from_start, masked, kept) in zip(
            names, numels, torch.stack(counts).tolist(), strict=True
        )
    }


def _mean_magnitudes(weight: Tensor, keep: Tensor) -> tuple[Tensor, Tensor]:
    magnitude = weight.detach().abs().double()
    kept = (magnitude * keep).sum()
    masked = magnitude.sum() - kept
    return masked / (~keep).sum().clamp(min=1), kept / keep.sum().clamp(min=1)


@torch.no_grad()
def add_masked_decay(gradient: Tensor, weight: Tensor, keep: Tensor, decay: float, decay_norm: str) -> None:
    """Add the pull on masked weights to a gradient, in place: for optimizers that are not SparseAdamW.

    Source: SR-STE (Zhou et al., ICLR 2021; Hu et al., arXiv 2404.01847), the form of AST's LLaMA code: the pull passes
    through the optimizer's own moments. Relative decay is measured on the gradient at hand, so that nothing has
    to be remembered between steps.

    Args:
        gradient, weight: [out, in]; both DTensors of one layout, or both plain.
        keep: [out, in] bool, full.
        decay: lambda of this step.
        decay_norm: "relative" scales by rms(gradient) / rms(weight).
    """
    local_gradient, local_weight = local_rows(gradient), local_rows(weight.detach())
    if decay_norm == "relative":
        norms = torch.stack([gradient.detach().norm(), weight.detach().norm()])
        norms = norms.full_tensor() if hasattr(norms, "full_tensor") else norms
        decay = decay * (norms[0] / norms[1].clamp(min=torch.finfo(norms.dtype).tiny)).item()
    masked = torch.where(keep[row_range(weight)], local_weight.new_zeros(()), local_weight)
    local_gradient.add_(masked.to(local_gradient.dtype), alpha=decay)


@torch.no_grad()
def magnitude_one_shot(weight: Tensor, pattern: NMPattern) -> Tensor:
    """The weight with all but its largest entries set to +0.0, the baseline of every table.

    Args:
        weight: [out, in], any float dtype.
    Returns:
        A new tensor of the same shape and dtype.
    """
    keep = pattern.keep_mask(SALIENCY["magnitude"](weight))
    return torch.where(keep, weight, weight.new_zeros(()))
