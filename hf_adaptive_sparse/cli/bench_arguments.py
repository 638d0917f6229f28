"""What `bench` is asked."""

from dataclasses import dataclass, field
from typing import ClassVar

from ..backend_forwards import BACKENDS
from ..errors import ConfigError
from ..hf.bench_shapes import ROWS
from ..hf.bench_worker import MODEL_BACKENDS
from .arguments import CommonArguments
from .export import ONE_SHOT
from .models import DTYPES


@dataclass(kw_only=True)
class BenchArguments(CommonArguments):
    """Measure a 2:4 model on this machine, next to the same model dense: every shape of its layers, then the whole.

    Whole models are loaded in processes of their own, in turns. With --save the times of the shapes are kept, and
    use_measured_backends(model) sets up models by them. A folder with config.json alone gets the table of shapes.
    """

    POSITIONAL: ClassVar[tuple[str, ...]] = ("path",)
    REQUIRED: ClassVar[tuple[str, ...]] = ("path",)

    path: str = field(
        default="", metadata={"help": "Folder of a 2:4 model, packed or dense-stored; or a folder with config.json."}
    )
    dense: str | None = field(
        default=None, metadata={"help": "Folder of the same model dense-stored (made for the time of the run)."}
    )
    one_shot: str | None = field(
        default=None,
        metadata={
            "help": f"Measure a copy that is pruned first, where the model is not 2:4: {', '.join(ONE_SHOT)}. Times do "
            "not depend on the values."
        },
    )
    backends: list[str] = field(
        default_factory=lambda: list(MODEL_BACKENDS),
        metadata={"help": f"Of the whole model, besides dense: {', '.join(MODEL_BACKENDS)}."},
    )
    layer_backends: list[str] | None = field(
        default=None,
        metadata={"help": f"Of every shape, besides dense: {', '.join(BACKENDS)} (all that run on the device)."},
    )
    rows: list[int] | None = field(
        default=None,
        metadata={
            "help": "Tokens that go through a layer together "
            f"({', '.join(map(str, ROWS['cpu']))}; on CUDA {', '.join(map(str, ROWS['cuda']))})."
        },
    )
    repetitions: int = field(default=5, metadata={"help": "How often every shape is measured."})
    rounds: int = field(default=3, metadata={"help": "How often every whole model is loaded and run; 0: not at all."})
    prompt: int = field(default=128, metadata={"help": "Tokens of a prompt."})
    sequences: int = field(default=1, metadata={"help": "Prompts that are run together."})
    new_tokens: int = field(default=16, metadata={"help": "Tokens that are decoded after it."})
    save: bool = field(
        default=False, metadata={"help": "Keep the times of the shapes, for use_measured_backends(model)."}
    )
    json: bool = field(default=False, metadata={"help": "Print the report as JSON instead of tables."})
    output_dir: str | None = field(default=None, metadata={"help": "Folder for report.json and report.html."})
    dtype: str = field(default="auto", metadata={"help": f"To load in: {', '.join(DTYPES)} (as stored)."})
    device: str = field(default="auto", metadata={"help": "auto, cpu, cuda, ..."})
    trust_remote_code: bool = field(default=False, metadata={"help": "Run code that comes with the model."})

    def __post_init__(self) -> None:
        for name in ("repetitions", "prompt", "sequences", "new_tokens"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} is at least 1, got {getattr(self, name)}.")
        if self.rounds < 0:
            raise ConfigError(f"rounds is at least 0, got {self.rounds}.")
        if self.rows is not None and (not self.rows or min(self.rows) < 1):
            raise ConfigError(f"rows are numbers of at least 1, got {', '.join(map(str, self.rows)) or 'none'}.")
        if self.dtype not in DTYPES:
            raise ConfigError(f"unknown dtype {self.dtype!r}; known: {', '.join(DTYPES)}.")
        if self.one_shot is not None and self.one_shot not in ONE_SHOT:
            raise ConfigError(f"unknown one_shot {self.one_shot!r}; known: {', '.join(ONE_SHOT)}.")
        for names, known in ((self.backends, MODEL_BACKENDS), (self.layer_backends or (), BACKENDS)):
            for name in names:
                if name not in known:
                    raise ConfigError(f"unknown backend {name!r}; known: {', '.join(known)}.")
