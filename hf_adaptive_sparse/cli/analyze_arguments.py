"""What `analyze` is asked."""

from dataclasses import dataclass, field
from typing import ClassVar

from ..errors import ConfigError
from ..hardware import HARDWARE
from .arguments import CommonArguments, TokenCount
from .models import DTYPES

THIS, GIVEN = "this", "given"


@dataclass(kw_only=True)
class AnalyzeArguments(CommonArguments):
    """Which matrices of a model can be 2:4, how large it becomes, how fast it can be at most, and what the jobs cost.

    Reads config.json alone, so it takes seconds for a model of any size. With --data the weights are loaded, and how
    much every matrix suffers is measured on a little text.
    """

    POSITIONAL: ClassVar[tuple[str, ...]] = ("model",)
    REQUIRED: ClassVar[tuple[str, ...]] = ("model",)

    model: str = field(default="", metadata={"help": "Folder (config.json is enough) or Hub id."})
    hardware: list[str] = field(
        default_factory=lambda: [THIS],
        metadata={
            "help": f"Machines to predict for: {THIS} (measured in two seconds), {', '.join(HARDWARE)}, or {GIVEN}: "
            "two numbers, see below."
        },
    )
    gb_per_second: float | None = field(
        default=None, metadata={"help": f"Of --hardware {GIVEN}: what its memory reads, in GB (10^9 bytes) per second."}
    )
    gflop_per_second: float | None = field(
        default=None, metadata={"help": f"Of --hardware {GIVEN}: what its products do, in GFLOP per second."}
    )
    dtype: str = field(
        default="auto", metadata={"help": f"Of the model on disk and of its products: {', '.join(DTYPES)} (as stored)."}
    )
    context: int = field(default=2048, metadata={"help": "Tokens that a decoded token attends to."})
    prompt: int = field(default=2048, metadata={"help": "Tokens of a prompt."})
    sequences: int = field(default=1, metadata={"help": "Sequences that are decoded together."})
    window: int = field(default=256, metadata={"help": "Tokens in a window of calibration and training."})
    calibration_windows: int = field(default=128, metadata={"help": "Windows that pruning is calibrated on."})
    train_tokens: TokenCount = field(
        default=TokenCount("1.6M"), metadata={"help": "Tokens to train or shrink on: 410k, 1.6M, 2G."}
    )
    batch_size: int = field(default=8, metadata={"help": "Windows in one step, and in one pass of calibration."})
    skip: list[str] | None = field(
        default=None, metadata={"help": "Names of modules that stay dense, whole or the end of them."}
    )
    data: str | None = field(
        default=None,
        metadata={"help": "Text to measure sensitivity on: .txt, .jsonl, .parquet, a folder, or a Hub dataset."},
    )
    split: str = field(default="train", metadata={"help": "Split of a Hub dataset or folder."})
    column: str | None = field(default=None, metadata={"help": "Column that holds the text (text if not given)."})
    sensitivity_windows: int = field(default=16, metadata={"help": "The first so many windows of --data."})
    measure_loss: bool = field(
        default=False,
        metadata={"help": "With --data: run the model once for every matrix instead of predicting its loss."},
    )
    json: bool = field(default=False, metadata={"help": "Print the report as JSON instead of tables."})
    output_dir: str | None = field(default=None, metadata={"help": "Folder for report.json and report.html."})
    device: str = field(default="auto", metadata={"help": f"Of --hardware {THIS} and of --data: auto, cpu, cuda, ..."})
    trust_remote_code: bool = field(default=False, metadata={"help": "Run code that comes with the model."})

    def __post_init__(self) -> None:
        least = {"window": 2} | dict.fromkeys(
            ("context", "prompt", "sequences", "calibration_windows", "train_tokens", "batch_size",
             "sensitivity_windows"), 1,
        )  # fmt: skip
        for name, value in least.items():
            if getattr(self, name) < value:
                raise ConfigError(f"{name} is at least {value}, got {getattr(self, name)}.")
        if self.dtype not in DTYPES:
            raise ConfigError(f"unknown dtype {self.dtype!r}; known: {', '.join(DTYPES)}.")
        if self.measure_loss and self.data is None:
            raise ConfigError("measure_loss runs the model on a text. Give --data.")
        for name in self.hardware:
            if name not in (THIS, GIVEN, *HARDWARE):
                raise ConfigError(f"unknown hardware {name!r}; known: {', '.join((THIS, GIVEN, *HARDWARE))}.")
        numbers = (self.gb_per_second, self.gflop_per_second)
        if (GIVEN in self.hardware) != (None not in numbers) or numbers.count(None) == 1:
            raise ConfigError(
                f"--hardware {GIVEN} is described by --gb-per-second and --gflop-per-second: give all three or none."
            )
