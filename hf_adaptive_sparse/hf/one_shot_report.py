"""What one-shot pruning found: one record per matrix, and the report of a run."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class MatrixResult:
    """One pruned matrix.

    Attributes:
        name: full name of the module.
        shape: (out, in).
        pattern, sparsity: what it became; `sparsity` counts the zeros that the mask made.
        error: ||(W - W_dense) X||^2 / ||W_dense X||^2 on the pruned model's inputs; None without a Gram matrix.
        sensitivity: what the allocator read; None for uniform.
        tokens: calibration tokens that reached it. For an expert, those that were routed to it.
        shrinkage: for an expert, the part of the statistics of all tokens that was mixed into its own.
        rung: what it took to factor the Gram matrix; empty where nothing was factored.
        seconds: of solving, shared evenly by matrices that were solved together.
    """

    name: str
    shape: tuple[int, int]
    pattern: str
    sparsity: float
    error: float | None
    sensitivity: float | None
    tokens: int
    shrinkage: float
    rung: str
    seconds: float


@dataclass(frozen=True, eq=False)
class QuantizedMatrix:
    """codes [out, in] int8 and scales [out, groups] float32; weight = codes * scales. See `save_packed`."""

    codes: Tensor
    scales: Tensor
    bits: int
    group: int


@dataclass(kw_only=True)
class OneShotReport:
    """What a run did.

    Attributes:
        target, realised: fraction of zeros over all pruned weights, asked for and counted.
        matrices: in the order in which they were pruned.
        seconds: phase -> wall time.
        peak_bytes: largest memory of the process (of the GPU, where the blocks were computed on one).
        quantized: where values were rounded, what `save_packed(quantized=...)` takes; else empty. Weights that are
            not packed are stored dense there, with the same values.
    """

    target: float
    realised: float
    matrices: list[MatrixResult]
    seconds: dict[str, float]
    peak_bytes: int
    quantized: dict[str, QuantizedMatrix] = field(default_factory=dict, repr=False)
