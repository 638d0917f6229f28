"""What becomes of a sparse model, however it was made: saved, loaded back, compared bit by bit, measured, reported."""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from ..hf.pretrained import save_dense, save_packed
from ..reports import Generation, ModelRow, Report
from .console import say
from .measure import HasWeight, bytes_in_memory, continuations, logits_of, measure_perplexity, zeros_in
from .output import clear, weight_bytes
from .text import RunText

PACKED, DENSE = "packed", "dense"
SAVE = {"packed": (PACKED,), "dense": (DENSE,), "both": (DENSE, PACKED)}


@dataclass(kw_only=True)
class Results:
    """What a run works on, and where its results go. Its phases add to `report`."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    text: RunText
    output: Path
    save: Sequence[str]  # of PACKED and DENSE
    prompts: Sequence[str]
    report: Report
    batch_size: int  # windows that are judged at the same time
    dense_bytes: int | None = None  # of the dense model's weight files; None: computed from its weights
    stored_dtype: torch.dtype | None = None  # of the results; None: as the model is in memory
    protocol_file: Path | None = None  # the model's eval_protocol.json, which its sparse copies keep
    texts: dict[str, list[str]] = field(default_factory=dict)

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """One phase: said before it starts, timed in the report."""
        say(f"{name} ...")
        started = time.perf_counter()
        yield
        self.report.seconds[name] = time.perf_counter() - started

    def measure(self, model: PreTrainedModel, name: str, pruned: Mapping[str, HasWeight], **known: int) -> None:
        """Add a row to the comparison of models, with the zeros of the matrices `pruned`."""
        result = measure_perplexity(model, self.text.evaluation, name, self.batch_size)
        self.texts[name] = continuations(model, self.tokenizer, self.prompts)
        row = ModelRow(
            name=name, perplexity=result.perplexity, bits_per_byte=result.bits_per_byte,
            sparsity=zeros_in(pruned), **known,
        )  # fmt: skip
        self.report.models.append(row)

    def measure_dense(self, pruned: Mapping[str, HasWeight]) -> None:
        """The first row: the model as it came."""
        size = self.dense_bytes or bytes_in_memory(self.model, self.stored_dtype)
        self.report.sizes["dense model"] = size
        self.measure(self.model, "dense", pruned, bytes_on_disk=size)

    def save_model(
        self, sparse: PreTrainedModel, what: str, provenance: dict[str, Any] | None = None, **packed: Any
    ) -> None:
        """Write the folders that were asked for, each whole or not at all.

        Args:
            what: what was done to the model, for the report: "trained" or "pruned".
            provenance: how it was made, for config.json.
            packed: more for `save_packed`.
        """
        for name, write, options in ((DENSE, save_dense, {}), (PACKED, save_packed, packed)):
            if name not in self.save:
                clear(self.output, (name,))
                continue
            folder = self.output / name
            write(sparse, folder, tokenizer=self.tokenizer, overwrite=True, provenance=provenance, **options)
            self.copy_protocol(folder)
            self.report.sizes[f"{what}, {'packed' if name == PACKED else 'dense-stored'}"] = weight_bytes(folder)

    def copy_protocol(self, folder: Path) -> None:
        """How the model is to be judged goes with it."""
        if self.protocol_file is not None:
            shutil.copyfile(self.protocol_file, folder / self.protocol_file.name)

    def load_back(self, sparse: PreTrainedModel, what: str) -> tuple[PreTrainedModel, Path]:
        """The model of the last folder, after each gave logits that are bit-equal to those of `sparse`."""
        expected = logits_of(sparse, self.text.evaluation)
        for name in self.save:
            folder = self.output / name
            loaded = AutoModelForCausalLM.from_pretrained(folder).to(sparse.device).eval()
            if not torch.equal(logits_of(loaded, self.text.evaluation), expected):
                raise AssertionError(f"{folder}: the model that was loaded back has other logits than the {what} one")
        say(f"loaded back with from_pretrained: logits are bit-equal to those of the {what} model")
        return loaded, folder

    def saved_line(self, what: str) -> str:
        """Where the results are, for the summary."""
        return (
            f"Saved in {' and '.join(str(self.output / name) for name in self.save)}; loaded back with "
            f"from_pretrained, the logits are bit-equal to those of the {what} model."
        )

    def finish(self) -> Report:
        """The complete report, not yet written."""
        self.report.generations = [
            Generation(prompt=prompt, texts={name: texts[index] for name, texts in self.texts.items()})
            for index, prompt in enumerate(self.prompts)
        ]
        self.report.data = self.text.facts
        return self.report
