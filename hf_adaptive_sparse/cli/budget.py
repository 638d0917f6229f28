"""The budget of a training run: tokens, batches, optimizer, schedule and teacher."""

from collections.abc import Iterable
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import ClassVar

from torch import Tensor
from transformers import TrainingArguments

from ..errors import ConfigError, DataError
from ..hf.trainer import DistillationConfig
from ..methods.learned_masks import LEARNING_RATE_PER_RMS, suggested_learning_rate
from .arguments import CommonArguments, TokenCount, borrowed

# transformers is renaming it.
_NAMES = {entry.name for entry in fields(TrainingArguments)}
_CHECKPOINTING = next(name for name in ("activation_checkpointing", "gradient_checkpointing") if name in _NAMES)

# What transformers calls them. The last one: constant, then linear to 0 over the last tenth.
SCHEDULES = {
    "linear": "linear", "cosine": "cosine", "constant": "constant_with_warmup", "wsd": "warmup_stable_decay"
}  # fmt: skip
_WSD_DECAY = 0.1


@dataclass(kw_only=True)
class BudgetArguments(CommonArguments):
    """Tokens, batches, optimizer, schedule and teacher of a training run."""

    LEAST_TOKENS: ClassVar[int] = 1  # 0: the run may go without training

    train_tokens: TokenCount = field(
        default=TokenCount("1.6M"), metadata={"help": "Tokens to train on: 400000, 410k, 1.6M, 2G."}
    )
    window: int = field(default=256, metadata={"help": "Tokens in one window of text."})
    batch_size: int = field(default=4, metadata={"help": "Windows that are computed at the same time."})
    gradient_accumulation: int = field(default=1, metadata={"help": "Batches in one optimizer step."})
    learning_rate: float | None = field(
        default=None,
        metadata={
            "help": f"Peak learning rate (default: {LEARNING_RATE_PER_RMS} x the root mean square of the weights of "
            "the linear layers, which suits budgets of some million tokens)."
        },
    )
    schedule: str = field(
        default="linear",
        metadata={
            "help": "Learning rate after the warm-up: linear or cosine to 0, constant, or wsd (constant, then linear "
            "to 0 over the last tenth)."
        },
    )
    warmup_fraction: float = field(default=0.05, metadata={"help": "Part of the steps of the linear warm-up."})
    weight_decay: float = field(default=0.0, metadata={"help": "Decoupled weight decay."})
    max_grad_norm: float = field(default=1.0, metadata={"help": "Gradients are clipped to this norm; 0 = never."})

    kd_weight: float = borrowed(DistillationConfig, "kd_weight")
    ce_weight: float = borrowed(DistillationConfig, "ce_weight")
    temperature: float = borrowed(DistillationConfig, "temperature")
    hidden_weight: float = borrowed(DistillationConfig, "hidden_weight")
    kind: str = borrowed(DistillationConfig, "kind", help="Distillation: forward_kl, or reverse_kl.")

    gradient_checkpointing: bool = field(default=False, metadata={"help": "Compute activations twice to save memory."})
    compile: bool = field(default=False, metadata={"help": "torch.compile the model."})
    save_steps: int = field(default=0, metadata={"help": "Steps between two checkpoints; 0 = a tenth of the run."})

    def __post_init__(self) -> None:
        super().__post_init__()
        least = {"train_tokens": self.LEAST_TOKENS, "batch_size": 1, "gradient_accumulation": 1}
        for name, value in least.items():
            if getattr(self, name) < value:
                raise ConfigError(f"{name} is at least {value}, got {getattr(self, name)}.")
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
        if 0 < self.train_tokens < self.tokens_per_step:
            raise ConfigError(
                f"train_tokens is {self.train_tokens}, and one optimizer step takes {self.tokens_per_step} "
                f"({self.batch_size} x {self.gradient_accumulation} windows of {self.window}). Train on "
                "more tokens, or lower batch_size or window."
            )
        self.distillation()  # building it checks it

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

    def distillation(self) -> DistillationConfig:
        config = DistillationConfig(
            kd_weight=self.kd_weight, ce_weight=self.ce_weight, temperature=self.temperature,
            kind=self.kind, hidden_weight=self.hidden_weight,
        )  # fmt: skip
        config.loss()
        return config

    def training_arguments(self, folder: Path, weights: Iterable[Tensor], use_cpu: bool) -> TrainingArguments:
        """As the Trainer wants them; its checkpoints go into `folder`.

        Args:
            weights: from whose size the default learning rate follows.
        """
        learning_rate = suggested_learning_rate(weights) if self.learning_rate is None else self.learning_rate
        decay = {"num_decay_steps": max(1, round(_WSD_DECAY * self.steps))}
        arguments = TrainingArguments(
            output_dir=str(folder),
            max_steps=self.steps,
            per_device_train_batch_size=self.batch_size,
            gradient_accumulation_steps=self.gradient_accumulation,
            learning_rate=learning_rate,
            lr_scheduler_type=SCHEDULES[self.schedule],
            lr_scheduler_kwargs=decay if self.schedule == "wsd" else {},
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
            use_cpu=use_cpu,
            **({_CHECKPOINTING: True} if self.gradient_checkpointing else {}),
        )
        arguments._n_gpu = min(1, arguments.n_gpu)  # several would be DataParallel, and another batch size
        return arguments
