"""Learning of units that can be killed: where the loops of `unit_learning` save how far they are, and go on."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.optim import Optimizer

from ..errors import ConfigError, FormatError
from .files import atomic_file


class LearningProgress:
    """One file that holds everything a learner needs to go on with the same numbers.

    It is replaced in one step, so whenever the process is killed, the last state that was written to its end is there.

    Args:
        file: of this run alone; made when the first state is saved.
        every: steps between two states; the last one is saved in any case.
    """

    def __init__(self, file: str | os.PathLike, every: int = 100) -> None:
        if every < 1:
            raise ConfigError(f"every is a number of steps >= 1, got {every}.")
        self.file, self.every = Path(file), every

    def open(self, settings: Mapping[str, Any]) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        """(tensors, record) as they were saved; None where nothing was.

        Args:
            settings: what decides the numbers of the run; must be the same in the run that goes on.
        Raises:
            ConfigError: the file is of a run with other settings; each that differs is named.
            FormatError: the file is damaged.
        """
        self._settings = json.loads(json.dumps(settings))
        if not self.file.is_file():
            return None
        try:
            with safe_open(self.file, "pt") as stored:
                about = stored.metadata() or {}
                then, record = json.loads(about["settings"]), json.loads(about["record"])
                tensors = {name: stored.get_tensor(name) for name in stored.keys()}
        except (OSError, SafetensorError, KeyError, ValueError) as error:
            raise FormatError(f"{self.file}: cannot be read ({error}). Remove the file and start again.") from error
        if differing := [
            f"{name} was {json.dumps(then.get(name))} and is {json.dumps(self._settings.get(name))}"
            for name in sorted(then.keys() | self._settings.keys())
            if then.get(name) != self._settings.get(name)
        ]:
            raise ConfigError(
                f"{self.file}: cannot go on with other settings: {'; '.join(differing)}. Use the old ones, or another "
                "file."
            )
        return tensors, record

    def is_due(self, step: int, steps: int) -> bool:
        """Whether a state is to be saved after `step` of `steps` steps."""
        return step % self.every == 0 or step == steps

    def save(self, tensors: Mapping[str, Tensor], record: Mapping[str, Any]) -> None:
        """Replace what was saved before.

        Args:
            tensors: of any device; each of its own memory.
            record: the rest, as JSON.
        Raises:
            OutputError: it could not be written; what was saved before is as it was.
        """
        about = {"settings": json.dumps(self._settings), "record": json.dumps(record)}
        with atomic_file(self.file) as path:
            save_file({name: tensor.detach().contiguous() for name, tensor in tensors.items()}, path, about)

    def remove(self) -> None:
        """The run is finished, and its result is kept elsewhere."""
        self.file.unlink(missing_ok=True)


def training_tensors(model: nn.Module, optimizers: Sequence[Optimizer]) -> dict[str, Tensor]:
    """All that training changes: parameters, what optimizers remember, and the random numbers of dropout."""
    found = {f"weights.{name}": parameter for name, parameter in model.named_parameters()}
    for number, optimizer in enumerate(optimizers):
        for place, parameter in enumerate(_parameters(optimizer)):
            for key, value in optimizer.state.get(parameter, {}).items():
                found[f"optimizer.{number}.{place}.{key}"] = value
    found["random.cpu"] = torch.get_rng_state()
    if model.device.type == "cuda":
        found["random.cuda"] = torch.cuda.get_rng_state(model.device)
    return found


@torch.no_grad()
def restore_training(model: nn.Module, optimizers: Sequence[Optimizer], tensors: Mapping[str, Tensor]) -> None:
    """Put back what `training_tensors` gave, in place."""
    for name, parameter in model.named_parameters():
        parameter.copy_(tensors[f"weights.{name}"])
    for number, optimizer in enumerate(optimizers):
        for place, parameter in enumerate(_parameters(optimizer)):
            prefix = f"optimizer.{number}.{place}."
            for name, value in tensors.items():
                if name.startswith(prefix):
                    # Counters stay on the CPU, as the optimizers keep them.
                    device = parameter.device if value.dim() else value.device
                    optimizer.state[parameter][name.removeprefix(prefix)] = value.clone().to(device)
    torch.set_rng_state(tensors["random.cpu"])
    if "random.cuda" in tensors and model.device.type == "cuda":
        torch.cuda.set_rng_state(tensors["random.cuda"], model.device)


def _parameters(optimizer: Optimizer) -> list[Tensor]:
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]
