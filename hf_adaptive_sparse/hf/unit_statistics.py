"""The probe of structural pruning: one pass over calibration text that measures what scores and allocators read."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ..errors import CalibrationError, ConfigError, TargetError
from ..unit_scores import InputMoments, UnitStats
from ..units import Axis
from .accumulators import StatsSum
from .blocks import BlockStack, check_blocks, find_blocks
from .calibration import check_tokens
from .data import WindowDataset
from .evaluation import rows_at_once
from .loss_gradients import Loss, causal_loss, check_predictions

STATISTICS = ("gradients", "inputs", "grams", "losses", "cosines")


def unit_statistics(
    model: nn.Module,
    windows: WindowDataset | Tensor,
    axes: Sequence[Axis],
    needs: Collection[str],
    *,
    batch_size: int = 4,
    device: torch.device | str | None = None,
    blocks: str | None = None,
    loss: Loss = causal_loss,
) -> UnitStats:
    """Run the model over calibration windows, and measure what is asked for; dropout is off.

    Everything of `needs` comes from the same forward pass, and gradients from its backward pass; no graph outlives its
    batch. Only "losses" takes more: one forward pass per unit and window. Afterwards the weights, their gradients,
    `requires_grad` and the mode of every module are as they were.

    Args:
        windows: [windows, length] tokens, without padding.
        axes: whose units are to be scored.
        needs: of STATISTICS, the fields of UnitStats to fill; `loss` always is. "gradients" takes four bytes for every
            weight of the axes, "grams" as many for the square of the input of every layer that reads units.
        batch_size: windows in a pass, at most.
        device: on which the whole model is for the time of the pass; default: where it is.
        blocks: name of the list of blocks, for a model that has several.
        loss: for a model that is no causal language model.
    Raises:
        ConfigError: a setting that is not known, or the model needs a `loss`.
        DataError: windows that the model cannot read.
        TargetError: a parameter that the model does not have, or inputs of units that no linear layer reads.
        CalibrationError: NaN or inf; the message names the block and the module.
    """
    for need in needs:
        if need not in STATISTICS:
            raise ConfigError(f"unknown statistic {need!r}; the probe measures {', '.join(STATISTICS)}.")
    if loss is causal_loss and not model.can_generate():
        raise ConfigError(
            f"{type(model).__name__}: is no causal language model. Pass `loss`, a function of the model and a batch of "
            "tokens that returns the sum of its losses and how many they are."
        )
    if batch_size < 1:
        raise ConfigError(f"batch_size is at least 1, got {batch_size}.")
    stack = find_blocks(model, blocks)
    check_blocks(model, stack)
    tokens = windows.tokens if isinstance(windows, WindowDataset) else windows
    check_tokens(model, tokens)
    if loss is causal_loss:
        check_predictions(tokens)
    parameters = _parameters(model, axes)
    _check_finite(parameters)
    batches = tokens.split(rows_at_once(model, batch_size, tokens.shape[1]))
    trained = parameters if "gradients" in needs else {}
    with _prepared(model, device, trained):
        probe = _Probe(model, stack, loss)
        with ExitStack() as hooks:
            if trained:
                hooks.enter_context(probe.adding_gradients(trained))
            if "inputs" in needs:
                hooks.enter_context(probe.adding_inputs(_readers(model, axes)))
            if "grams" in needs:
                hooks.enter_context(probe.adding_grams(_readers(model, axes)))
            if "cosines" in needs:
                hooks.enter_context(probe.adding_cosines())
            for number, batch in enumerate(batches):
                probe.run(number, batch, backward=bool(trained))
        stats = probe.stats(trained)
        if "losses" not in needs:
            return stats
        return replace(stats, losses={axis.name: probe.rises(axis, batches, stats.loss or 0.0) for axis in axes})


class _Probe:
    """Sums over batches. All are in float64, but gradients and Gram matrices, which are in float32."""

    def __init__(self, model: nn.Module, stack: BlockStack, loss: Loss) -> None:
        self._model, self._stack, self._loss = model, stack, loss
        self._device = model.device
        self._total, self._predictions, self._tokens = 0.0, 0, 0
        # Of the batch on its way: (windows, length), and its number of predictions.
        self._shape, self._weight = (0, 0), 0
        self._gradients: dict[str, Tensor] = {}
        self._inputs: dict[str, list[Tensor]] = {}
        self._grams: dict[str, StatsSum] = {}
        self._cosines: list[Tensor] = []

    def run(self, number: int, batch: Tensor, backward: bool) -> None:
        """One batch, with the hooks that are there."""
        self._shape = tuple(batch.shape)
        with torch.set_grad_enabled(backward):
            total, count = self._loss(self._model, batch.long().to(self._device))
            mean = total / count
        if not math.isfinite(value := total.item()):
            self._raise_for(number, batch, f"the loss is {value}")
        if backward:
            self._weight = count
            mean.backward()
        self._total += value
        self._predictions += count
        self._tokens += batch.numel()

    def stats(self, trained: dict[str, nn.Parameter]) -> UnitStats:
        """What was measured, checked."""
        gradients = {name: total.div_(self._predictions) for name, total in self._gradients.items()}
        for name, parameter in trained.items():
            gradients.setdefault(name, torch.zeros(parameter.shape, device=parameter.device))
            if not gradients[name].isfinite().all():
                raise CalibrationError(
                    f"{self._where(name.rpartition('.')[0])}: the gradient of {name.rpartition('.')[2]} holds NaN or "
                    "inf. Load the model in float32 or bfloat16, and check its loss on this text."
                )
        moments = {}
        for name, (sums, squares, magnitudes) in self._inputs.items():
            if not squares.isfinite().all():
                raise CalibrationError(
                    f"{self._where(name.rpartition('.')[0])}: reads NaN or inf. Load the model in float32 or "
                    "bfloat16, and check its loss on this text."
                )
            moments[name] = InputMoments(tokens=self._tokens, sums=sums, squares=squares, magnitudes=magnitudes)
        grams = {}
        for name, total in self._grams.items():
            grams[name] = total.stats(self._where(name.rpartition(".")[0]))
            grams[name].require_tokens("the Gram matrix")
        cosines = torch.stack(self._cosines) / self._tokens if self._cosines else None
        mean = self._total / self._predictions
        return UnitStats(gradients=gradients, inputs=moments, grams=grams, cosines=cosines, loss=mean)

    @contextmanager
    def adding_gradients(self, trained: dict[str, nn.Parameter]) -> Iterator[None]:
        """Each gradient is added as soon as it is there, and let go: one at a time exists in the model's dtype."""

        def add(name: str, parameter: nn.Parameter) -> None:
            if name not in self._gradients:
                self._gradients[name] = torch.zeros(parameter.shape, device=parameter.device)
            self._gradients[name].add_(parameter.grad, alpha=self._weight)
            parameter.grad = None

        handles = [p.register_post_accumulate_grad_hook(partial(add, name)) for name, p in trained.items()]
        with _removing(handles):
            yield

    @contextmanager
    def adding_inputs(self, readers: dict[str, nn.Module]) -> Iterator[None]:
        """Moments of what each linear layer reads, by the name of its weight."""

        @torch.no_grad()
        def add(name: str, module: nn.Module, args: tuple, kwargs: dict) -> None:
            x = self._rows(name, args, kwargs).double()
            new = [x.sum((0, 1)), x.square().sum((0, 1)), x.abs().mean(1).square().sum(0)]
            for total, part in zip(self._inputs.setdefault(name, [torch.zeros_like(n) for n in new]), new, strict=True):
                total += part

        with _removing(_before(readers, add)):
            yield

    @contextmanager
    def adding_grams(self, readers: dict[str, nn.Module]) -> Iterator[None]:
        """Gram matrices of what each linear layer reads, by the name of its weight."""

        def add(name: str, module: nn.Module, args: tuple, kwargs: dict) -> None:
            x = self._rows(name, args, kwargs)
            if name not in self._grams:
                self._grams[name] = StatsSum(x.shape[-1], {"gram"}, x.device)
            self._grams[name].add(x)

        with _removing(_before(readers, add)):
            yield

    @contextmanager
    def adding_cosines(self) -> Iterator[None]:
        """The cosine of what enters and what leaves each block, token by token."""
        self._cosines = [torch.zeros((), dtype=torch.float64, device=self._device) for _ in self._stack.blocks]

        @torch.no_grad()
        def add(index: int, block: nn.Module, args: tuple, kwargs: dict, output: Tensor | tuple) -> None:
            entered = args[0] if args else kwargs["hidden_states"]
            left = output if isinstance(output, Tensor) else output[0]
            cosine = F.cosine_similarity(entered.float(), left.to(entered.device).float(), dim=-1)
            self._cosines[index] += cosine.sum(dtype=torch.float64).to(self._device)

        handles = [
            block.register_forward_hook(partial(add, index), with_kwargs=True)
            for index, block in enumerate(self._stack.blocks)
        ]
        with _removing(handles):
            yield

    @torch.no_grad()
    def rises(self, axis: Axis, batches: Sequence[Tensor], before: float) -> Tensor:
        """[units] float64: the mean loss without each unit, minus `before`."""
        readers = _readers(self._model, [axis])
        rises = torch.zeros(axis.count, dtype=torch.float64)
        for unit in range(axis.count):
            handles = []
            for span in axis.spans:
                if span.reads:
                    hook = partial(_without, span.index[unit])
                    handles.append(readers[span.tensor].register_forward_pre_hook(hook, with_kwargs=True))
            total, predictions = 0.0, 0
            with _removing(handles):
                for batch in batches:
                    summed, count = self._loss(self._model, batch.long().to(self._device))
                    total, predictions = total + summed.item(), predictions + count
            rises[unit] = total / predictions - before
        if not rises.isfinite().all():
            raise CalibrationError(
                f"{self._where(axis.name)}: the loss without unit {int((~rises.isfinite()).nonzero()[0])} is NaN or "
                "inf. Load the model in float32 or bfloat16, and check its loss on this text."
            )
        return rises

    @torch.no_grad()
    def _raise_for(self, number: int, batch: Tensor, what: str) -> None:
        """Run a batch again, and name the first module of a block that returned NaN or inf."""
        found: list[str] = []

        def look(name: str, module: nn.Module, args: tuple, output: object) -> None:
            first = output[0] if isinstance(output, tuple) and output else output
            if not found and isinstance(first, Tensor) and not first.isfinite().all():
                found.append(name)

        handles = [
            module.register_forward_hook(partial(look, name))
            for index, block in enumerate(self._stack.blocks)
            for name, module in block.named_modules(prefix=self._stack.block_name(index))
        ]
        with _removing(handles):
            self._loss(self._model, batch.long().to(self._device))
        where = f"{self._where(found[0])} returns NaN or inf" if found else "no block returns NaN or inf"
        raise CalibrationError(
            f"{where}: {what} on batch {number} of the text. Load the model in float32 or bfloat16, and check it."
        )

    def _rows(self, name: str, args: tuple, kwargs: dict) -> Tensor:
        """[windows, length, in]: what the layer with this weight reads."""
        x = (args[0] if args else next(iter(kwargs.values()))).detach()
        windows, length = self._shape
        if x.numel() != windows * length * x.shape[-1]:
            raise TargetError(
                f"{self._where(name.rpartition('.')[0])}: reads {list(x.shape)}, which is not one row for each of "
                f"{windows} x {length} tokens. Use a score of weights, such as taylor or l2."
            )
        return x.reshape(windows, length, -1)

    def _where(self, module: str) -> str:
        """Full name of a module, with the number of its block."""
        rest = module.removeprefix(f"{self._stack.name}.")
        return module if rest == module else f"{module} (block {rest.partition('.')[0]})"


def _without(index: Tensor, module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
    """Some columns of the input as zeros."""
    if args:
        return (args[0].index_fill(-1, index.to(args[0].device), 0.0), *args[1:]), kwargs
    name, x = next(iter(kwargs.items()))
    return args, {**kwargs, name: x.index_fill(-1, index.to(x.device), 0.0)}


def _parameters(model: nn.Module, axes: Sequence[Axis]) -> dict[str, nn.Parameter]:
    """Every parameter that the axes name."""
    known = dict(model.named_parameters())
    for axis in axes:
        for span in axis.spans:
            if span.tensor not in known:
                raise TargetError(
                    f"{axis.name}: names {span.tensor}, which is no parameter of {type(model).__name__}. Find the axes "
                    "of this model."
                )
    return {span.tensor: known[span.tensor] for axis in axes for span in axis.spans}


def _check_finite(parameters: dict[str, nn.Parameter]) -> None:
    """Some attention kernels return finite numbers for keys that are NaN, so the loss alone does not show them."""
    for name, parameter in parameters.items():
        if not parameter.isfinite().all():
            raise CalibrationError(f"{name}: the weight holds NaN or inf. Load a model without them.")


def _readers(model: nn.Module, axes: Sequence[Axis]) -> dict[str, nn.Module]:
    """The linear layers that read the units, by the names of their weights."""
    readers = {}
    for axis in axes:
        names = [span.tensor for span in axis.spans if span.reads]
        if not names or any(not name.endswith(".weight") for name in names):
            raise TargetError(
                f"{axis.name}: no linear layer reads units of kind {axis.kind} alone, so their inputs are not "
                "measured. Use a score of weights, such as taylor or l2."
            )
        for name in names:
            readers[name] = model.get_submodule(name.removesuffix(".weight"))
    return readers


def _before(modules: dict[str, nn.Module], add: Callable[..., None]) -> list[RemovableHandle]:
    """`add(name, module, args, kwargs)` is called before each of the modules."""
    return [module.register_forward_pre_hook(partial(add, name), with_kwargs=True) for name, module in modules.items()]


@contextmanager
def _removing(handles: Sequence[RemovableHandle]) -> Iterator[None]:
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def _prepared(model: nn.Module, device: torch.device | str | None, trained: dict[str, nn.Parameter]) -> Iterator[None]:
    """The model on a device, without dropout, with gradients of `trained` alone; afterwards all is as it was."""
    home = model.device
    training = [module for module in model.modules() if module.training]
    before = [(parameter, parameter.requires_grad, parameter.grad) for parameter in model.parameters()]
    wanted = {id(parameter) for parameter in trained.values()}
    model.eval()
    try:
        for parameter, _, _ in before:
            parameter.grad = None
            parameter.requires_grad = id(parameter) in wanted
        if device is not None:
            model.to(device)
        yield
    finally:
        if device is not None:
            model.to(home)
        for parameter, required, gradient in before:
            parameter.requires_grad = required
            parameter.grad = gradient
        for module in training:
            module.training = True
