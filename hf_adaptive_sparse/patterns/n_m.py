"""n:m sparsity: at most n of every m consecutive inputs of a row are not zero.

Source: Mishra et al., "Accelerating Sparse Deep Neural Networks", 2021 (2:4); Zhou et al., "Learning N:M
Fine-grained Structured Sparse Neural Networks From Scratch", ICLR 2021 (any n:m).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from ..errors import ConfigError, PatternError


@lru_cache(maxsize=64)
def _comparisons(n: int, m: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """All pairs of m positions (earlier, later), and how their results decide: keep = signs @ earlier_wins < most.

    A position starts as beaten by all later ones; each that it wins against takes one away, and each earlier one that
    wins adds one. It is kept if fewer than n beat it.
    """
    earlier, later = torch.triu_indices(m, m, offset=1, device=device)
    place = torch.arange(m, device=device)[:, None]
    signs = (later == place).float() - (earlier == place).float()
    return earlier, later, signs, (n - (m - 1 - place)).float()


@dataclass(frozen=True)
class NMPattern:
    """Keep the n best of every m consecutive input features of a row.

    Raises:
        ConfigError: unless 0 < n <= m.
    """

    n: int = 2
    m: int = 4

    def __post_init__(self) -> None:
        if not 0 < self.n <= self.m:
            raise ConfigError(f"an n:m pattern keeps n of m weights with 0 < n <= m, got {self.n}:{self.m}.")

    @property
    def name(self) -> str:
        return f"{self.n}:{self.m}"

    @property
    def sparsity(self) -> float:
        """Fraction of zeros that the pattern fixes."""
        return 1.0 - self.n / self.m

    def check_in_features(
        self, shape: tuple[int, ...] | torch.Size, where: str, leave_out: str = "exclude_modules"
    ) -> None:
        """Raise PatternError, naming `where`, unless groups fill the rows of a [out, in] weight.

        Args:
            leave_out: the setting that takes names of layers that stay dense, for the message.
        """
        if len(shape) != 2 or shape[1] % self.m:
            raise PatternError(
                f"{where}: {self.name} needs the input features to be a multiple of {self.m}, got "
                f"{shape[-1]} in a {list(shape)} weight. Add the layer to `{leave_out}`, or pad it."
            )

    def keep_mask(self, scores: Tensor, sparsity: float | None = None) -> Tensor:
        """The n largest scores of every group; equal scores are broken by the lower index.

        Args:
            scores: [out, in], any real dtype, larger = keep, `in` a multiple of m. NaN counts as infinite.
            sparsity: of no effect other than a check: the pattern fixes it.
        Returns:
            [out, in] bool, exactly n True in every group.
        Raises:
            PatternError: `in` is not a multiple of m.
            ConfigError: `sparsity` is given and is not the pattern's own.
        """
        if sparsity is not None and abs(sparsity - self.sparsity) > 1e-9:
            raise ConfigError(f"pattern {self.name} has a sparsity of {self.sparsity}, asked for {sparsity}.")
        self.check_in_features(scores.shape, "scores")
        # Not -1 for the number of groups: a rank may hold no row at all, and then it cannot be inferred.
        groups = scores.reshape(scores.shape[0], scores.shape[1] // self.m, self.m)
        if groups.is_floating_point():
            groups = groups.nan_to_num(nan=torch.inf, posinf=torch.inf, neginf=-torch.inf)
        if self.m <= 8 and groups.shape[1] == 1:
            return self._keep_of_one_group(groups[:, 0])
        if self.m <= 8:
            return self._keep_by_rank(groups).view(scores.shape)
        order = groups.argsort(dim=-1, descending=True, stable=True)
        keep = torch.zeros_like(groups, dtype=torch.bool)
        return keep.scatter_(-1, order[..., : self.n], True).view(scores.shape)

    def _keep_by_rank(self, groups: Tensor) -> Tensor:
        # m (m - 1) / 2 elementwise comparisons, about ten times faster than a sort of tiny rows. A position
        # beats a later one when it is greater or equal, so that ties go to the lower index.
        columns = groups.unbind(dim=-1)
        beaten_by = [torch.zeros_like(columns[0], dtype=torch.int8) for _ in columns]
        for i in range(self.m):
            for j in range(i + 1, self.m):
                first_wins = columns[i] >= columns[j]
                beaten_by[j] += first_wins
                beaten_by[i] += ~first_wins
        return torch.stack([count < self.n for count in beaten_by], dim=-1)

    def _keep_of_one_group(self, scores: Tensor) -> Tensor:
        # The same comparisons in few operations: sweeps ask for one group of every row, thousands of times.
        earlier, later, signs, most = _comparisons(self.n, self.m, scores.device)
        columns = scores.t()
        earlier_wins = columns.index_select(0, earlier) >= columns.index_select(0, later)
        return (signs @ earlier_wins.to(signs.dtype) < most).t()

    def first_violation(self, weight: Tensor) -> tuple[int, int] | None:
        """(row, group) of the first group of a [out, in] weight with more than n non-zeros, or None."""
        self.check_in_features(weight.shape, "weight")
        groups = weight.ne(0).view(torch.uint8).reshape(weight.shape[0], weight.shape[1] // self.m, self.m)
        counts = groups.sum(dim=-1, dtype=torch.uint8 if self.m < 256 else torch.int64)  # small ones are faster
        bad = (counts > self.n).nonzero()
        return (int(bad[0, 0]), int(bad[0, 1])) if len(bad) else None
