"""`hf-adaptive-sparse demo`: the whole path on an embedded model, without a network and without a GPU."""

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import ClassVar

import torch

from ..demo import MODEL_FOLDER, PROMPTS, demo_documents, documents_digest
from ..errors import ConfigError
from ..hf.data import eval_protocol, token_windows
from ..reports import Report, write_report
from . import PROGRAM
from .arguments import TokenCount
from .console import print_matrices, print_plan, print_report, say
from .models import find_model, load_config, load_model, load_tokenizer, size_on_disk, stored_dtype
from .output import check_inputs, check_output, clear, command_line, remove_leftovers, versions
from .recipe import RecipeArguments
from .results import DENSE, PACKED
from .retraining import RESULTS, Run, load_start, retrain
from .text import RunText


@dataclass(kw_only=True)
class DemoArguments(RecipeArguments):
    """Dense model, one-shot magnitude pruning, 2:4 retraining, packed folder, loaded back: in a few minutes.

    The model is a small Llama that continues Python source code; the text is Python's own standard library.
    """

    REQUIRED: ClassVar[tuple[str, ...]] = ("output_dir",)

    output_dir: str = field(default="hf-adaptive-sparse-demo", metadata={"help": "Folder of the results."})
    train_tokens: TokenCount = field(default=TokenCount("300k"), metadata={"help": "Tokens to train on."})
    eval_windows: int = field(default=100, metadata={"help": "Windows of held-out text to judge by."})

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_format(packed=True)
        if self.eval_windows < 1:
            raise ConfigError(f"eval_windows is at least 1, got {self.eval_windows}.")


ARGUMENTS = DemoArguments


def run(arguments: DemoArguments) -> int:
    """The path of `train`, with everything it needs from the package itself."""
    output = check_output(arguments.output_dir, arguments.overwrite)
    check_inputs([output / name for name in RESULTS], {"--config": arguments.config, "--init": arguments.init})
    source = find_model(str(MODEL_FOLDER))
    plan = {
        "model": "the embedded Llama, pretrained on Python's standard library",
        "text": "Python's standard library; perplexity on packages that were not trained on",
        **arguments.plan(),
        "teacher": "the dense model itself",
        "output": f"{output}: packed, dense, report.json, report.html",
    }
    print_plan(f"{PROGRAM} demo", plan, arguments.dry_run)
    if arguments.dry_run:
        return 0

    model = load_model(source, "float32", "cpu")
    start = load_start(arguments, model)
    remove_leftovers(output)
    clear(output, RESULTS)
    report = Report(
        title="hf-adaptive-sparse demo: a small Llama made 2:4", command=command_line("demo"),
        settings=dataclasses.asdict(arguments), versions=versions(),
    )  # fmt: skip
    say("reading the text ...")
    tokenizer = load_tokenizer(source)
    with _one_thread():
        retrain(
            Run(
                model=model, start=start, tokenizer=tokenizer,
                text=_text(arguments, tokenizer), recipe=arguments, batch_size=arguments.batch_size,
                output=output, save=(DENSE, PACKED), prompts=PROMPTS, report=report, dense_bytes=size_on_disk(source),
                stored_dtype=stored_dtype(load_config(source)),
            )
        )  # fmt: skip
    print_matrices(report.matrices)
    print_report(report, write_report(report, output))
    return 0


@contextmanager
def _one_thread() -> Iterator[None]:
    # Matrices this small gain little from a second thread, and lose much where another program uses the processor.
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _text(arguments: DemoArguments, tokenizer) -> RunText:
    protocol = eval_protocol(MODEL_FOLDER)
    parts, facts = [], {}
    for split, limit in (("train", None), ("heldout", arguments.eval_windows)):
        documents = demo_documents(split)
        parts.append(token_windows(documents, tokenizer, arguments.window, protocol.prefix, protocol.suffix, limit))
        facts |= {f"{split} files": len(documents), f"{split} sha256": documents_digest(documents)}
    arguments.check_text(len(parts[0]))
    facts |= {"training windows to draw from": len(parts[0]), "evaluation windows": len(parts[1])}
    return RunText(*parts, facts)
