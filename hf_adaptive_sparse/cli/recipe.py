"""The recipe of a retraining run: what can be said about it, and what follows from it."""

from dataclasses import dataclass, field, fields
from pathlib import Path

from peft import PeftModel
from transformers import TrainingArguments

from ..errors import ConfigError, DataError
from ..hf.adapter_config import AdaptiveSparseConfig
from ..hf.sparse_layers import sparse_layers
from ..hf.trainer import DistillationConfig
from ..methods.learned_masks import LEARNING_RATE_PER_RMS, suggested_learning_rate
from ..methods.one_shot import METHODS
from .arguments import CommonArguments, TokenCount, borrowed

# transformers is renaming it.
_NAMES = {entry.name for entry in fields(TrainingArguments)}
_CHECKPOINTING = next(name for name in ("activation_checkpointing", "gradient_checkpointing") if name in _NAMES)

ONE_SHOT_STARTS = tuple(name for name in METHODS if name != "magnitude")
SCHEDULES = ("linear", "cosine", "constant")


@dataclass(kw_only=True)
class RecipeArguments(CommonArguments):
    """Retraining: its budget, its optimizer, its masks and its teacher."""

    train_tokens: TokenCount = field(
        default=TokenCount("1.6M"), metadata={"help": "Tokens to train on: 400000, 410k, 1.6M, 2G."}
    )
    window: int = field(default=256, metadata={"help": "Tokens in one window of text."})
    batch_size: int = field(default=4, metadata={"help": "Windows that are computed at the same time."})
    gradient_accumulation: int = field(default=1, metadata={"help": "Batches in one optimizer step."})
    learning_rate: float | None = field(
        default=None,
        metadata={
            "help": f"Peak learning rate (default: {LEARNING_RATE_PER_RMS} x the root mean square of the weights "
            "that become sparse, which suits budgets of some million tokens)."
        },
    )
    schedule: str = field(
        default="linear",
        metadata={"help": "Learning rate after the warm-up: linear or cosine to 0, or constant."},
    )
    warmup_fraction: float = field(default=0.05, metadata={"help": "Part of the steps of the linear warm-up."})
    weight_decay: float = field(default=0.0, metadata={"help": "Decoupled weight decay, of kept and masked alike."})
    max_grad_norm: float = field(default=1.0, metadata={"help": "Gradients are clipped to this norm; 0 = never."})

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

    kd_weight: float = borrowed(DistillationConfig, "kd_weight")
    ce_weight: float = borrowed(DistillationConfig, "ce_weight")
    temperature: float = borrowed(DistillationConfig, "temperature")
    hidden_weight: float = borrowed(DistillationConfig, "hidden_weight")
    kind: str = borrowed(DistillationConfig, "kind", help="Distillation: forward_kl, or reverse_kl.")

    gradient_checkpointing: bool = field(default=False, metadata={"help": "Compute activations twice to save memory."})
    compile: bool = field(default=False, metadata={"help": "torch.compile the model."})
    save_steps: int = field(default=0, metadata={"help": "Steps between two checkpoints; 0 = a tenth of the run."})

    def __post_init__(self) -> None:
        for name in ("train_tokens", "batch_size", "gradient_accumulation"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} is at least 1, got {getattr(self, name)}.")
        if self.window < 2:
            raise ConfigError(f"window is at least 2 tokens, to predict one from the other, got {self.window}.")
        if self.learning_rate is not None and not 0.0 < self.learning_rate < float("inf"):
            raise ConfigError(f"learning_rate is a positive number, got {self.learning_rate}.")
        if self.schedule not in SCHEDULES:
            raise ConfigError(f"unknown schedule {self.schedule!r}; known: {', '.join(SCHEDULES)}.")
        if not 0.0 <= self.warmup_fraction < 1.0:
            raise ConfigError(f"warmup_fraction is a part of the run in [0, 1), got {self.warmup_fraction}.")
        for name in ("weight_decay", "max_grad_norm", "save_steps"):
            if not 0.0 <= getattr(self, name) < float("inf"):
                raise ConfigError(f"{name} is a number >= 0, got {getattr(self, name)}.")
        if self.train_tokens < self.tokens_per_step:
            raise ConfigError(
                f"train_tokens is {self.train_tokens}, and one optimizer step takes {self.tokens_per_step} "
                f"({self.batch_size} x {self.gradient_accumulation} windows of {self.window}). Train on "
                "more tokens, or lower batch_size or window."
            )
        self._check_start()
        self.adapter_config()  # building them checks them
        self.distillation()

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

    @property
    def tokens_per_step(self) -> int:
        return self.window * self.batch_size * self.gradient_accumulation

    @property
    def steps(self) -> int:
        """Optimizer steps: as many as the budget of tokens pays for."""
        return self.train_tokens // self.tokens_per_step

    @property
    def tokens(self) -> int:
        """Tokens that the run trains on."""
        return self.steps * self.tokens_per_step

    @property
    def windows(self) -> int:
        """Windows that the run trains on, repeated ones counted each time."""
        return self.steps * self.batch_size * self.gradient_accumulation

    def check_text(self, found: int) -> None:
        """Raise DataError unless `found` windows fill one batch."""
        if found < self.batch_size:
            raise DataError(
                f"the training text fills {found} windows of {self.window} tokens, and one batch takes "
                f"{self.batch_size}. Give more text, or lower --batch-size or --window."
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

    def distillation(self) -> DistillationConfig:
        config = DistillationConfig(
            kd_weight=self.kd_weight, ce_weight=self.ce_weight, temperature=self.temperature,
            kind=self.kind, hidden_weight=self.hidden_weight,
        )  # fmt: skip
        config.loss()
        return config

    def training_arguments(self, folder: Path, model: PeftModel) -> TrainingArguments:
        """As the Trainer wants them; its checkpoints go into `folder`."""
        learning_rate = self.learning_rate
        if learning_rate is None:
            learning_rate = suggested_learning_rate(layer.weight for layer in sparse_layers(model))
        arguments = TrainingArguments(
            output_dir=str(folder),
            max_steps=self.steps,
            per_device_train_batch_size=self.batch_size,
            gradient_accumulation_steps=self.gradient_accumulation,
            learning_rate=learning_rate,
            lr_scheduler_type=self.schedule if self.schedule != "constant" else "constant_with_warmup",
            warmup_steps=round(self.warmup_fraction * self.steps),
            weight_decay=self.weight_decay,
            max_grad_norm=self.max_grad_norm,
            seed=self.seed,
            torch_compile=self.compile,
            dataloader_drop_last=True,  # so that every step takes the same number of tokens
            save_strategy="steps",
            save_steps=self.save_steps or max(1, self.steps // 10),
            # Two: while the newest is written, the one before it is complete.
            save_total_limit=2,
            logging_strategy="steps",
            logging_steps=max(1, self.steps // 100),
            logging_nan_inf_filter=False,
            report_to="none",
            disable_tqdm=True,
            use_cpu=model.device.type == "cpu",
            **({_CHECKPOINTING: True} if self.gradient_checkpointing else {}),
        )
        arguments._n_gpu = min(1, arguments.n_gpu)  # several would be DataParallel, and another batch size
        return arguments

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
