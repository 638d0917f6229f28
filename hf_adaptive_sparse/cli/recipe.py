"""The recipe of a retraining run: what can be said about it, and what follows from it."""

from dataclasses import dataclass, field
from pathlib import Path

from ..errors import ConfigError
from ..hf.adapter_config import AdaptiveSparseConfig
from ..methods.learned_masks import LEARNING_RATE_PER_RMS
from ..methods.one_shot import METHODS
from .arguments import borrowed
from .budget import BudgetArguments

ONE_SHOT_STARTS = tuple(name for name in METHODS if name != "magnitude")


@dataclass(kw_only=True)
class RecipeArguments(BudgetArguments):
    """2:4 retraining: where it starts, its masks, and the budget."""

    init: str = field(
        default="magnitude",
        metadata={
            "help": "Where training starts: magnitude (the dense weights, the largest of each group kept), a one-shot "
            f"method ({', '.join(ONE_SHOT_STARTS)}), or the folder of a pruned copy of the model."
        },
    )
    pattern: str = borrowed(AdaptiveSparseConfig, "pattern")
    saliency: str = borrowed(AdaptiveSparseConfig, "saliency")
    init_mask: str = borrowed(AdaptiveSparseConfig, "init_mask")
    mask_policy: str = borrowed(AdaptiveSparseConfig, "mask_policy")
    mask_interval: int = borrowed(AdaptiveSparseConfig, "mask_interval")
    decay: float = borrowed(AdaptiveSparseConfig, "decay")
    decay_norm: str = borrowed(AdaptiveSparseConfig, "decay_norm")
    decay_fraction: float = borrowed(AdaptiveSparseConfig, "decay_fraction")
    start_fraction: float = borrowed(AdaptiveSparseConfig, "start_fraction")
    freeze_fraction: float = borrowed(AdaptiveSparseConfig, "freeze_fraction")
    target_modules: list[str] | None = field(
        default=None, metadata={"help": "Ends of the names of the linears to make sparse, or all-linear."}
    )
    exclude_modules: list[str] | None = field(default=None, metadata={"help": "Names of linears that stay dense."})

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_start()
        self.adapter_config()  # building it checks it

    def _check_start(self) -> None:
        if self.init == "magnitude":
            return
        if self.init not in ONE_SHOT_STARTS and not (Path(self.init).expanduser() / "config.json").is_file():
            raise ConfigError(
                f"init {self.init!r} is neither the folder of a model nor one of magnitude, "
                f"{', '.join(ONE_SHOT_STARTS)}."
            )
        if self.mask_policy == "frozen":
            raise ConfigError(
                f"mask_policy 'frozen' keeps the zeros that MODEL has, and init {self.init!r} starts from others. "
                "Prune the model first and train that, or fix the masks from the start with freeze_fraction 1."
            )

    def check_format(self, packed: bool) -> None:
        """Raise ConfigError if the results could not be saved in the packed format and are to be."""
        if packed and self.pattern not in ("2:4", "1:4"):
            raise ConfigError(
                f"the packed format holds 2:4 weights, and pattern is {self.pattern}. Use train with --save dense."
            )

    def adapter_config(self) -> AdaptiveSparseConfig:
        targets = "all-linear" if self.target_modules == ["all-linear"] else self.target_modules
        return AdaptiveSparseConfig(
            pattern=self.pattern, saliency=self.saliency, init_mask=self.init_mask,
            mask_policy=self.mask_policy, mask_interval=self.mask_interval, decay=self.decay,
            decay_norm=self.decay_norm, decay_fraction=self.decay_fraction,
            start_fraction=self.start_fraction, freeze_fraction=self.freeze_fraction, target_modules=targets,
            exclude_modules=self.exclude_modules, task_type="CAUSAL_LM",
        )  # fmt: skip

    def plan(self) -> dict[str, object]:
        """The recipe in words."""
        masks = (
            f"chosen anew every {self.mask_interval} steps by {self.saliency}, fixed for the first "
            f"{self.start_fraction:.0%} and the last {self.freeze_fraction:.0%} of the run"
        )
        rate = f"{LEARNING_RATE_PER_RMS} x rms of the weights" if self.learning_rate is None else self.learning_rate
        hidden = f" + {self.hidden_weight:g} distance of hidden states" if self.hidden_weight else ""
        start = "the dense weights" if self.init == "magnitude" else f"the model pruned by {self.init}"
        if self.init not in ("magnitude", *ONE_SHOT_STARTS):
            start = f"the pruned model in {self.init}"
        return {
            "weights": f"start from {start}",
            "budget": f"{self.tokens:,} tokens = {self.steps} steps of {self.tokens_per_step:,}",
            "optimizer": f"SparseAdamW, learning rate {rate}, {self.schedule}, "
            f"{self.warmup_fraction:.0%} warm-up, decay of masked weights {self.decay:g} ({self.decay_norm})",
            "masks": masks if self.mask_policy == "adaptive" else "frozen: the zeros that the model has",
            "loss": f"{self.ce_weight:g} cross-entropy + {self.kd_weight:g} {self.kind} at "
            f"T = {self.temperature:g}{hidden}",
        }
