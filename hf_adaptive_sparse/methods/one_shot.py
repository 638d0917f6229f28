"""One-shot pruning of the weights that share an input: mask, solved weights, rounding. No training.

Sources: Sun et al., "A Simple and Effective Pruning Approach for Large Language Models" (Wanda, ICLR 2024); Frantar and
Alistarh, "SparseGPT" (ICML 2023); Shao et al., "One-Shot Sensitivity-Aware Mixed Sparsity Pruning" (arXiv 2310.09499);
Meng et al., "ALPS" (NeurIPS 2024); the target that makes up for pruned inputs is the least-squares solution of the
problem that FISTAPruner (arXiv 2408.03728) states for the layers of one block, here across blocks as well.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, fields

import torch
from torch import Tensor

from ..allocation import ALLOCATORS
from ..errors import ConfigError
from ..field_types import check_field_types
from ..mask_choice import Goal, MaskChooser, Member
from ..patterns import NMPattern, parse_pattern
from ..products import without_autocast
from ..quantizers import QUANTIZERS, RTN
from ..saliency import NEEDS, SALIENCY
from ..sensitivity import output_error, relative_error
from ..solvers import SOLVERS, pcg_refine, sweep_with_errors
from ..stats import DAMPING, LayerStats

MIXED = "mixed"
MEASURED_ALLOCATIONS = ("error_curves", "evolutionary")
ALLOCATIONS = (*sorted(ALLOCATORS), *MEASURED_ALLOCATIONS)
SENSITIVITIES = ("fisher", "hutchinson")
UNITS = ("matrix", "block")
SECOND_ORDER_SOLVERS = frozenset(SOLVERS) - {"zero_fill"}


@dataclass(frozen=True, kw_only=True)
class Parts:
    """What a method is made of; see the fields of the same names in OneShotConfig."""

    saliency: str
    solver: str = "zero_fill"
    refine_iterations: int = 0
    correction: float = 0.0
    order: str = "block"
    allocation: str = "uniform"
    scope: str = "matrix"


METHODS: dict[str, Parts] = {
    "fast": Parts(saliency="wanda", scope="row"),
    "balanced": Parts(saliency="obs", solver="obs_sweep", refine_iterations=10, correction=1.0, order="group"),
    "best": Parts(
        saliency="wanda", solver="admm", refine_iterations=20, correction=1.0, order="group", allocation="error_curves"
    ),
    "magnitude": Parts(saliency="magnitude"),
    "wanda": Parts(saliency="wanda", scope="row"),
    "ria": Parts(saliency="ria"),
    "taylor": Parts(saliency="taylor"),
    "sparsegpt": Parts(saliency="obs", solver="obs_sweep", order="group"),
    "isc": Parts(saliency="isc", solver="obs_sweep"),
    "mixed_sparsity": Parts(saliency="isc", solver="obs_sweep", allocation="ranked"),
    "alps": Parts(saliency="wanda", solver="admm"),
    "fista": Parts(saliency="wanda", solver="fista", correction=1.0, order="group"),
    "thanos": Parts(saliency="wanda", solver="thanos"),
}


@dataclass(frozen=True, kw_only=True)
class OneShotConfig:
    """How a model is pruned in one pass over it. None means: as the method has it."""

    method: str = field(
        default="balanced",
        metadata={"help": f"Preset (fast, balanced, best) or a paper's method. One of {', '.join(METHODS)}."},
    )
    pattern: str = field(
        default="2:4",
        metadata={"help": "Which weights may be zero: 2:4, any n:m, unstructured, or mixed (--levels, a matrix each)."},
    )
    sparsity: float | None = field(
        default=None, metadata={"help": "Fraction of zeros of all pruned weights, 0 = none (the pattern's; else 0.5)."}
    )
    levels: str = field(
        default="dense,2:4,1:4", metadata={"help": "What a matrix can become with --pattern mixed, by commas."}
    )
    saliency: str | None = field(
        default=None, metadata={"help": f"Score by which weights are kept. One of {', '.join(sorted(SALIENCY))}."}
    )
    solver: str | None = field(
        default=None, metadata={"help": f"What the kept weights become. One of {', '.join(sorted(SOLVERS))}."}
    )
    refine_iterations: int | None = field(
        default=None, metadata={"help": "Conjugate gradient steps on the final mask. 0 = none."}
    )
    correction: float | None = field(
        default=None,
        metadata={"help": "How much of the error of the pruned inputs a layer makes up for, 0 to 1."},
    )
    order: str | None = field(
        default=None,
        metadata={"help": "group: layers are measured after those before them in the block were pruned; or block."},
    )
    allocation: str | None = field(
        default=None, metadata={"help": f"How sparse each matrix becomes. One of {', '.join(ALLOCATIONS)}."}
    )
    allocation_unit: str = field(
        default="matrix", metadata={"help": "What gets a sparsity of its own: matrix, or block."}
    )
    spread: float | None = field(
        default=None,
        metadata={"help": "How far a unit may be from the mean (ranked 0.1 or what fits, owl 0.08, alpha 0.3 of it)."},
    )
    sensitivity: str = field(
        default="fisher", metadata={"help": "What ranked allocation ranks: fisher, or hutchinson (slower)."}
    )
    generations: int = field(default=20, metadata={"help": "Of the evolutionary search."})
    probes: int = field(default=32, metadata={"help": "Random vectors of the Hutchinson trace."})
    damping: float = field(default=DAMPING, metadata={"help": "Added to the unit diagonal of every Gram matrix."})
    bits: int = field(default=0, metadata={"help": "Round what is kept to 8 or 4 bits. 0 = do not."})
    group_size: int = field(default=0, metadata={"help": "Inputs that share a scale. 0 = one per output channel."})
    rounding: str = field(
        default="gptq", metadata={"help": f"How values are rounded. One of {', '.join(sorted(QUANTIZERS))}."}
    )

    def __post_init__(self) -> None:
        known: dict[str, tuple[str | None, Sequence[str]]] = {
            "method": (self.method, tuple(METHODS)),
            "saliency": (self.saliency, sorted(SALIENCY)),
            "solver": (self.solver, sorted(SOLVERS)),
            "order": (self.order, ("block", "group")),
            "allocation": (self.allocation, ALLOCATIONS),
            "allocation_unit": (self.allocation_unit, UNITS),
            "sensitivity": (self.sensitivity, SENSITIVITIES),
            "rounding": (self.rounding, sorted(QUANTIZERS)),
        }
        own = {"saliency", "solver", "order", "allocation"}  # of the method, where they are None
        for name, (value, names) in known.items():
            if value not in names and not (value is None and name in own):
                raise ConfigError(f"unknown {name} {value!r}; known: {', '.join(names)}.")
        check_field_types(self, but=("pattern",))  # of which _check_pattern names those that are known
        if self.refine_iterations is not None and self.refine_iterations < 0:
            raise ConfigError(f"refine_iterations is >= 0, got {self.refine_iterations}. 0 switches it off.")
        if self.correction is not None and not 0.0 <= self.correction <= 1.0:
            raise ConfigError(f"correction is a part in [0, 1], got {self.correction}. 0 switches it off.")
        if self.spread is not None and not 0.0 <= self.spread <= 1.0:
            raise ConfigError(f"spread is a part in [0, 1], got {self.spread}. Papers take 0.08 to 0.3.")
        if not 0.0 <= self.damping < math.inf:
            raise ConfigError(f"damping is a finite number >= 0, got {self.damping}. Papers take 0.01.")
        if self.generations < 0:
            raise ConfigError(f"generations is >= 0, got {self.generations}. 0 takes what the error curves say.")
        if self.probes < 2:
            raise ConfigError(f"probes is at least 2, for a standard error, got {self.probes}. 32 are a good start.")
        if self.bits:
            RTN(self.bits, self.group_size)
        if self.sparsity is not None and not 0.0 <= self.sparsity < 1.0:
            raise ConfigError(f"sparsity is a fraction of zeros in [0, 1), got {self.sparsity}. For 50 % write 0.5.")
        self._check_pattern()
        self._check_effects()

    def _check_pattern(self) -> None:
        if self.pattern == MIXED:
            if self.resolved.allocation not in MEASURED_ALLOCATIONS:
                raise ConfigError(
                    f"pattern 'mixed' chooses one of {self.levels} for every matrix by measured errors; allocation "
                    f"{self.resolved.allocation!r} does not. Use allocation={' or '.join(MEASURED_ALLOCATIONS)}."
                )
            self.level_patterns()
            return
        pattern = parse_pattern(self.pattern)
        if not isinstance(pattern, NMPattern):
            return
        if self.sparsity is not None and abs(self.sparsity - pattern.sparsity) > 1e-9:
            raise ConfigError(
                f"pattern {pattern.name} has a sparsity of {pattern.sparsity}, asked for {self.sparsity}. Leave "
                "sparsity out, or use pattern 'mixed' or 'unstructured'."
            )
        if self.allocation not in (None, "uniform"):
            raise ConfigError(
                f"pattern {pattern.name} fixes the sparsity of every matrix, so allocation {self.allocation!r} has "
                "nothing to decide. Use pattern 'mixed' or 'unstructured'."
            )

    def _check_effects(self) -> None:
        """Raise ConfigError for a field that was changed, and that nothing reads: it was meant to do something."""
        allocation = self.resolved.allocation
        spreads = sorted({*ALLOCATORS} - {"uniform"})
        traces = allocation == "ranked" and self.sensitivity == "hutchinson"
        gram = "gram" in self.needs or allocation in MEASURED_ALLOCATIONS
        read = {  # field -> whether it is read, and what to change for it to be
            "levels": (self.pattern == MIXED, "pattern 'mixed'"),
            "allocation_unit": (allocation != "uniform", "an allocation other than uniform"),
            "spread": (allocation in spreads, f"allocation {' or '.join(spreads)}"),
            "sensitivity": (allocation == "ranked", "allocation ranked"),
            "probes": (traces, "allocation ranked and sensitivity hutchinson"),
            "generations": (allocation == "evolutionary", "allocation evolutionary"),
            "damping": (gram, "a method that measures Gram matrices"),
            "group_size": (self.bits > 0, "bits 8 or 4"),
            "rounding": (self.bits > 0, "bits 8 or 4"),
        }
        for entry in fields(self):
            is_read, needed = read.get(entry.name, (True, ""))
            if not is_read and getattr(self, entry.name) != entry.default:
                raise ConfigError(
                    f"{entry.name}={getattr(self, entry.name)!r} has no effect here: only with {needed}. Add that, or "
                    "leave it out."
                )

    @property
    def resolved(self) -> Parts:
        """The parts of the method, with those that were set here instead of its own."""
        own = METHODS[self.method]
        fixed = self.pattern not in (MIXED, "unstructured")
        allocation = self.allocation or ("uniform" if fixed else own.allocation)
        if self.pattern == MIXED and self.allocation is None:
            allocation = "error_curves"
        return Parts(
            saliency=own.saliency if self.saliency is None else self.saliency,
            solver=own.solver if self.solver is None else self.solver,
            refine_iterations=own.refine_iterations if self.refine_iterations is None else self.refine_iterations,
            correction=own.correction if self.correction is None else self.correction,
            order=own.order if self.order is None else self.order,
            allocation=allocation,
            scope=own.scope,
        )

    @property
    def target(self) -> float:
        """Fraction of zeros over all pruned weights."""
        if self.sparsity is not None:
            return self.sparsity
        pattern = None if self.pattern == MIXED else parse_pattern(self.pattern)
        return pattern.sparsity if isinstance(pattern, NMPattern) else 0.5

    @property
    def fixed_pattern(self) -> NMPattern:
        """The pattern of every matrix, where it is one n:m pattern."""
        pattern = parse_pattern(self.pattern)
        assert isinstance(pattern, NMPattern)
        return pattern

    def level_patterns(self) -> dict[float, NMPattern]:
        """Sparsity -> pattern of every level of pattern "mixed"; dense is 1:1.

        Raises:
            ConfigError: a level that is no n:m pattern, or two of one sparsity.
        """
        found: dict[float, NMPattern] = {}
        for name in self.levels.split(","):
            pattern = NMPattern(1, 1) if name.strip() == "dense" else parse_pattern(name.strip())
            if not isinstance(pattern, NMPattern):
                raise ConfigError(f"levels are 'dense' or n:m patterns such as '2:4', got {name.strip()!r}.")
            if pattern.sparsity in found:
                raise ConfigError(f"levels: {self.levels} has two of sparsity {pattern.sparsity}. Leave one out.")
            found[pattern.sparsity] = pattern
        return dict(sorted(found.items()))

    @property
    def needs(self) -> frozenset[str]:
        """Which statistics have to be collected: of "squares", "gram", "cross" and "gradient"."""
        parts = self.resolved
        needs = set(NEEDS[parts.saliency])
        if parts.solver in SECOND_ORDER_SOLVERS or parts.refine_iterations or (self.bits and self.rounding == "gptq"):
            needs.add("gram")
        if parts.correction:
            needs |= {"gram", "cross"}
        return frozenset(needs)


@dataclass(frozen=True, eq=False)
class Pruned:
    """One matrix after pruning.

    Attributes:
        weight: [out, in], the new weight.
        keep: [out, in] bool.
        error: ||(W - W_dense) X||^2 / ||W_dense X||^2 on the inputs it was calibrated on; None without a Gram matrix.
        codes: [out, in] int8 and `scales` [out, groups] where the weight was rounded: weight = codes * scales.
    """

    weight: Tensor
    keep: Tensor
    error: float | None
    codes: Tensor | None = None
    scales: Tensor | None = None


def corrected_target(weight: Tensor, stats: LayerStats, amount: float) -> Tensor:
    """The weight whose outputs on the pruned model's inputs are closest to what the dense model has there.

    Solves min_T ||T X - W X_dense||^2 with the damping of `stats`, and goes the part `amount` of the way there from W.
    Solvers then get T as the weight to stay close to, so that each of them makes up for what was lost before its layer.

    Args:
        weight: [out, in] of the dense model.
        stats: reads `gram` = sum of x x^T and `cross` = sum of x_dense x^T.
        amount: 0 to 1.
    Returns:
        [out, in] float32 (float64 stays).
    """
    scaled = stats.scaled
    assert stats.gram is not None and stats.cross is not None
    wide = weight.detach().to(torch.float64 if weight.dtype == torch.float64 else torch.float32)
    drift = (stats.cross - stats.gram).to(wide.dtype) / stats.tokens
    upper, scale = scaled.upper.to(wide.dtype), scaled.scale.to(wide.dtype)
    # H^-1 = U^T U in the scaled basis.
    shift = (wide @ drift / scale) @ upper.T @ upper / scale
    return wide + amount * shift.masked_fill(scaled.dead, 0.0)


@without_autocast()
@torch.no_grad()
def prune_group(
    weights: Sequence[Tensor],
    stats: LayerStats,
    goals: Sequence[Goal],
    config: OneShotConfig,
    gradients: Sequence[Tensor] | None = None,
) -> list[Pruned]:
    """Prune the matrices that read one input, together: one factorisation, one sweep.

    Args:
        weights: each [out, in] of the dense model.
        stats: of their input.
        goals: pattern and sparsity of each.
        gradients: [out, in] of each, for the Taylor score.
    Returns:
        One result per matrix, weights in the dtype they came in.
    """
    parts = config.resolved
    members, start = [], 0
    for index, (weight, goal) in enumerate(zip(weights, goals, strict=True)):
        own = stats if gradients is None else stats.with_gradient(gradients[index])
        members.append(Member(slice(start, start + len(weight)), goal, own))
        start += len(weight)
    stacked = torch.cat([weight.detach() for weight in weights]).float()
    target = corrected_target(stacked, stats, parts.correction) if parts.correction else stacked
    chooser = MaskChooser(target, stats, members, parts.saliency)
    lost = None
    if parts.solver == "obs_sweep" and target is stacked and not (parts.refine_iterations or config.bits):
        solved, keep, lost = sweep_with_errors(target, stats, chooser)
    else:
        solved, keep = SOLVERS[parts.solver](target, stats, chooser)
    if parts.refine_iterations:
        solved = pcg_refine(target, stats, keep, solved, parts.refine_iterations)
    results = []
    for member, weight in zip(members, weights, strict=True):
        new, kept, codes, scales = solved[member.rows], keep[member.rows], None, None
        if config.bits:
            grid = RTN(config.bits, config.group_size, search=config.bits < 8).fit(new, kept)
            new = QUANTIZERS[config.rounding](new, stats, kept, grid)
            codes, scales = grid.codes(new), grid.scales
        exact, new = new, new.to(weight.dtype)
        error: float | None = None
        if lost is not None:
            error = float(lost[member.rows].sum(dtype=torch.float64))
            if new is not exact:
                # What rounding to 16 bits adds is noise of no direction: the diagonal of the Gram matrix does.
                rounding = new.float().sub_(exact).square_() @ stats.squares
                error += float(rounding.sum(dtype=torch.float64))
            error = relative_error(error, weight, stats)
        elif stats.gram is not None:
            error = output_error(weight, new, stats)
        results.append(Pruned(new, kept, error, codes, scales))
    return results
