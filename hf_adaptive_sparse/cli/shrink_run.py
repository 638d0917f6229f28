"""What one shrinking run works on."""

from __future__ import annotations

from dataclasses import dataclass

from ..hf.data import WindowDataset
from ..methods.adaptive_width.config import ShrinkConfig
from ..methods.hard_concrete import HardConcreteConfig
from ..methods.policy_gradient import PolicyGradientConfig
from .budget import BudgetArguments
from .results import Results


@dataclass(kw_only=True)
class ShrinkRun(Results):
    """What one shrinking run works on."""

    config: ShrinkConfig
    budget: BudgetArguments
    calibration: WindowDataset
    calibration_batch: int
    distill: bool
    form: str
    remote_code: bool
    parent: str
    shape: dict[str, int] | None = None  # units of each kind that stay, where gates learn which
    gates: HardConcreteConfig | None = None
    policy: PolicyGradientConfig | None = None  # learns which units stay, under the target

    @property
    def is_learned(self) -> bool:
        """Whether a learner chooses the units, and not scores."""
        return self.shape is not None or self.policy is not None
