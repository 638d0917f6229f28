"""What the loss of the dense model says about its weights, from one backward pass: Fisher traces and gradients."""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import CalibrationError, ConfigError, DataError, TargetError
from ..sensitivity import FisherTrace
from .blocks import BlockStack, Member, block_linears, check_blocks, find_blocks
from .calibration import check_tokens
from .data import WindowDataset
from .evaluation import rows_at_once
from .experts import run_experts

# (model, tokens [windows, length]) -> (sum of the losses of all predictions, how many predictions)
Loss = Callable[[nn.Module, Tensor], tuple[Tensor, int]]
# (name, input [..., in], gradient of the output [..., out], tokens of each window, scale to a window's mean loss)
Collect = Callable[[str, Tensor, Tensor, list[int], float], None]


def causal_loss(model: nn.Module, tokens: Tensor) -> tuple[Tensor, int]:
    """Cross-entropy of every token but the first of each window, given those before it."""
    logits = model(input_ids=tokens, use_cache=False).logits[:, :-1].flatten(0, 1)
    targets = tokens[:, 1:].flatten().to(logits.device)
    return F.cross_entropy(logits.float(), targets, reduction="sum"), targets.numel()


def check_predictions(tokens: Tensor) -> None:
    """Raise DataError where no token of the windows is predicted from another."""
    if tokens.shape[1] < 2:
        raise DataError(
            f"windows of {tokens.shape[1]} token hold nothing to predict, so the model has no loss on them. Give "
            "windows of at least 2."
        )


def fisher_traces(
    model: nn.Module,
    windows: WindowDataset | Tensor,
    names: Collection[str] | None = None,
    *,
    batch_size: int = 4,
    device: torch.device | str | None = None,
    blocks: str | None = None,
    loss: Loss = causal_loss,
) -> dict[str, FisherTrace]:
    """The Fisher trace of every weight, from one forward and one backward pass of the dense model over all windows.

    Nothing of the model is changed; dropout is off. No gradient of a weight is ever formed.

    Args:
        windows: [windows, length] tokens, without padding.
        names: full names as `block_linears` gives them; default: all weights of all blocks.
        batch_size: windows in a pass, at most.
        device: on which the whole model is for the time of the pass; default: where it is.
        blocks: name of the list of blocks, for a model that has several.
        loss: for a model that is no causal language model.
    Raises:
        ConfigError: the model needs a `loss`.
        DataError, TargetError: as `walk_blocks`; or a name that no weight has.
        CalibrationError: the loss or a gradient is NaN or inf.
    """
    members = _members(model, names, blocks)
    traces = {name: FisherTrace(where=name) for name in members}

    def collect(name: str, x: Tensor, y_gradient: Tensor, sizes: list[int], scale: float) -> None:
        traces[name].update(x, y_gradient)

    _backward(model, windows, members, collect, batch_size, device, blocks, loss)
    return traces


def weight_gradients(
    model: nn.Module,
    windows: WindowDataset | Tensor,
    names: Collection[str] | None = None,
    *,
    batch_size: int = 4,
    device: torch.device | str | None = None,
    blocks: str | None = None,
    loss: Loss = causal_loss,
) -> dict[str, Tensor]:
    """Root mean square over windows of the gradient of a window's mean loss, for every weight of the dense model.

    As `fisher_traces`, with its arguments and errors; also ConfigError where windows cannot be told apart in a layer.

    Returns:
        {full name: [out, in] float32}, on the device of the model: as many bytes again as a float32 model has.
    """
    members = _members(model, names, blocks)
    squares: dict[str, Tensor] = {}

    def collect(name: str, x: Tensor, y_gradient: Tensor, sizes: list[int], scale: float) -> None:
        if len(sizes) == 0:
            raise ConfigError(
                f"{name}: reads {list(x.shape)}, in which the windows of a batch cannot be told apart. Use "
                "batch_size=1."
            )
        if name not in squares:
            squares[name] = torch.zeros(members[name].shape, dtype=torch.float32, device=x.device)
        parts = zip(y_gradient.flatten(0, -2).split(sizes), x.flatten(0, -2).split(sizes), strict=True)
        for g, x_part in parts:
            gradient = (g.float().t() @ x_part.float()).mul_(scale)
            squares[name].addcmul_(gradient, gradient)

    count = _backward(model, windows, members, collect, batch_size, device, blocks, loss)
    home = model.device
    found = {}
    for name, member in members.items():
        total = squares.pop(name, None)
        total = torch.zeros(member.shape, dtype=torch.float32) if total is None else total.div_(count).sqrt_()
        found[name] = total.to(home)
    return found


def _members(model: nn.Module, names: Collection[str] | None, blocks: str | None) -> dict[str, Member]:
    stack = find_blocks(model, blocks)
    check_blocks(model, stack)
    known: dict[str, Member] = {}
    for index in range(len(stack.blocks)):
        known |= block_linears(stack, index, refuse_unknown=names is None)
    if names is None:
        return known
    for name in names:
        if name not in known:
            close = difflib.get_close_matches(name, known, 3, cutoff=0.0)
            raise TargetError(
                f"{name}: is no weight of a block of {type(model).__name__}; the closest are {', '.join(close)}."
            )
    return {name: known[name] for name in names}


def _backward(
    model: nn.Module,
    windows: WindowDataset | Tensor,
    members: dict[str, Member],
    collect: Collect,
    batch_size: int,
    device: torch.device | str | None,
    blocks: str | None,
    loss: Loss,
) -> int:
    """Run the model forwards and backwards; `collect` is called for every product. Returns the number of windows."""
    if loss is causal_loss and not model.can_generate():
        raise ConfigError(
            f"{type(model).__name__}: is no causal language model. Pass `loss`, a function of the model and a batch of "
            "tokens that returns the sum of its losses and how many they are."
        )
    if batch_size < 1:
        raise ConfigError(f"batch_size is at least 1, got {batch_size}.")
    tokens = windows.tokens if isinstance(windows, WindowDataset) else windows
    check_tokens(model, tokens)
    if loss is causal_loss:
        check_predictions(tokens)
    rows = rows_at_once(model, batch_size, tokens.shape[1])
    with frozen(model, device), _Watcher(members, collect).watching(find_blocks(model, blocks)) as watcher:
        for number, batch in enumerate(tokens.split(rows)):
            watcher.shape = tuple(batch.shape)
            with torch.enable_grad():
                total, count = loss(model, batch.long().to(model.device))
            watcher.scale = len(batch) / count
            if not math.isfinite(total.item()):
                raise CalibrationError(
                    f"the loss of the dense model is {total.item()} on batch {number} of the text. Load the model in "
                    "float32 or bfloat16, and check it."
                )
            total.backward()
    return len(tokens)


class _Watcher:
    """Calls `collect` for every weight with what it read and the gradient of what it returned.

    Attributes:
        shape: (windows, length) of the batch on its way.
        scale: from the sum of the losses of a window to their mean.
    """

    def __init__(self, members: dict[str, Member], collect: Collect) -> None:
        self._members, self._collect = members, collect
        self.shape, self.scale = (0, 0), 1.0

    @contextmanager
    def watching(self, stack: BlockStack) -> Iterator[_Watcher]:
        handles = [stack.blocks[0].register_forward_pre_hook(_cut_graph, with_kwargs=True)]
        fused: dict[nn.Module, dict[tuple[str, int], str]] = {}
        for name, member in self._members.items():
            if member.expert is None:
                handles.append(member.module.register_forward_hook(partial(self._linear, name), with_kwargs=True))
            else:
                fused.setdefault(member.module, {})[member.key, member.expert] = name
        try:
            for module, names in fused.items():
                module.forward = partial(run_experts, module, watch=partial(self._expert, names))
            yield self
        finally:
            for handle in handles:
                handle.remove()
            for module in fused:
                vars(module).pop("forward", None)

    def _linear(self, name: str, module: nn.Module, args: tuple, kwargs: dict, output: Tensor) -> None:
        x = args[0] if args else next(iter(kwargs.values()))
        windows, length = self.shape
        count = x.numel() // x.shape[-1]
        if (x.dim() > 2 and len(x) == windows) or (x.dim() == 2 and count == windows * length):
            sizes = [count // windows] * windows
        else:
            sizes = [count] if windows == 1 else []
        self._watch(name, x, output, sizes)

    def _expert(
        self, names: dict[tuple[str, int], str], parameter: str, expert: int, tokens: Tensor, x: Tensor, y: Tensor
    ) -> None:
        if (name := names.get((parameter, expert))) is not None:
            windows, length = self.shape
            self._watch(name, x, y, torch.bincount(tokens // length, minlength=windows).tolist())

    def _watch(self, name: str, x: Tensor, y: Tensor, sizes: list[int]) -> None:
        """Wait for the gradient of y, whose tokens are those of one window after another; `sizes` [] if unknown."""
        x = x.detach()
        if y.requires_grad:
            y.register_hook(lambda gradient: self._collect(name, x, gradient.detach(), sizes, self.scale))


def _cut_graph(module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
    """Gradients start at what the first block reads, and need no weight to do so."""
    if args:
        return (args[0].detach().requires_grad_(), *args[1:]), kwargs
    return args, {**kwargs, "hidden_states": kwargs["hidden_states"].detach().requires_grad_()}


@contextmanager
def frozen(model: nn.Module, device: torch.device | str | None) -> Iterator[None]:
    """The model on a device, without gradients of weights and without dropout; afterwards all is as it was."""
    home = model.device
    training = [module for module in model.modules() if module.training]
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    model.eval()
    try:
        for parameter in trained:
            parameter.requires_grad = False
        if device is not None:
            model.to(device)
        yield
    finally:
        if device is not None:
            model.to(home)
        for parameter in trained:
            parameter.requires_grad = True
        for module in training:
            module.training = True
