"""The sequential engine of one-shot pruning: block after block, on the activations of what is pruned already.

Source: the layer-wise scheme of Frantar and Alistarh, "SparseGPT", ICML 2023, section 4; the intra-layer correction
(order "group", with `cross`) of FISTAPruner (arXiv 2408.03728), section 3.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Iterator

import torch
from torch import Tensor, nn

from ..errors import ConfigError, DataError, TargetError
from ..stats import DAMPING
from .accumulators import check_needs
from .block_calls import record_calls
from .blocks import BlockStack, check_blocks, find_blocks
from .data import WindowDataset
from .finished_parts import KEPT_BYTES
from .measuring import Stream
from .offload import OFFLOADS, Store, check_device
from .visits import BlockVisit, Journey, WalkSettings, WalkState

ORDERS = ("block", "group")
PROPAGATIONS = ("sparse", "dense")


def walk_blocks(
    model: nn.Module,
    windows: WindowDataset | Tensor,
    *,
    needs: Collection[str] = ("gram",),
    order: str = "block",
    propagate: str = "sparse",
    batch_size: int = 8,
    device: torch.device | str | None = None,
    offload: str = "none",
    offload_folder: str | os.PathLike | None = None,
    start_block: int = 0,
    hidden: WalkState | None = None,
    blocks: str | None = None,
    skip: Collection[str] = (),
    experts_at_once: int | None = None,
    kept_bytes: int = KEPT_BYTES,
    to_end: bool = True,
    damping: float = DAMPING,
) -> BlockWalk:
    """Visit the blocks of a model one after another, each with statistics of the inputs of its weights.

    `for visit in walk_blocks(model, windows): ...`: the caller writes new weights with `member.set_weight`, and when
    the loop goes on, the hidden states are sent through the block as it is then. Dropout is off, no gradients are
    kept; the mode of every module is as it was when the loop ends, however it ends.

    Args:
        model: of transformers, with one list of blocks. Its weights may lie in memory while `device` is another.
        windows: [windows, length] tokens, without padding.
        needs: statistics, of "squares", "gram" and "cross". Without "gram" and "cross" no Gram matrix is computed;
            empty: no statistics at all.
        order: "block": all statistics of a block are taken before any of its weights changes. "group": those of a
            group when they are asked for, so after the groups before it were written.
        propagate: "sparse": blocks read what the pruned blocks before them return; "dense": what the dense ones do.
        batch_size: windows in a forward pass, at most.
        device: on which blocks are computed, one at a time; default: where the model is.
        offload: what lies elsewhere meanwhile, see `offload.Store`.
        offload_folder: for the temporary files of "disk".
        start_block: the first one to visit.
        hidden: a state that was saved when the block before `start_block` was finished; None: the earlier blocks are
            run again, as they are.
        blocks: name of the list of blocks, for a model that has several.
        skip: modules that stay dense, by full name or by the end of it.
        experts_at_once: how many experts have their Gram matrices in memory; default: as many as fit 2 GiB.
        kept_bytes: with order "group", of activations that are kept (where `offload` says) so that finished parts of a
            block are not run again for every group: for a decoder the inputs of the output projection and of the down
            projection. Results do not depend on it; 0 keeps nothing.
        to_end: whether the hidden states go through the last block too; without, `state.hidden` stays what it reads.
        damping: of the LayerStats.
    Raises:
        ConfigError: a setting that is not known or does not fit another; a model with adapters.
        DataError: windows that the model cannot read.
        TargetError: a model, or a module in it, that is not known.
        CalibrationError: while walking: inputs that are NaN or inf, or a weight that no token reached.
    """
    for name, value, known in (
        ("order", order, ORDERS), ("propagate", propagate, PROPAGATIONS), ("offload", offload, OFFLOADS),
    ):  # fmt: skip
        if value not in known:
            raise ConfigError(f"unknown {name} {value!r}; known: {', '.join(known)}.")
    for name, value in (("batch_size", batch_size), ("experts_at_once", experts_at_once)):
        if value is not None and value < 1:
            raise ConfigError(f"{name} is at least 1, got {value}.")
    if kept_bytes < 0:
        raise ConfigError(f"kept_bytes is a number of bytes >= 0, got {kept_bytes}. 0 keeps nothing.")
    check_device(device)
    stack = find_blocks(model, blocks)
    if not 0 <= start_block <= len(stack.blocks):
        raise ConfigError(f"start_block is from 0 to the {len(stack.blocks)} blocks of the model, got {start_block}.")
    check_blocks(model, stack)
    tokens = windows.tokens if isinstance(windows, WindowDataset) else windows
    check_tokens(model, tokens)
    settings = WalkSettings(
        needs=check_needs(needs),
        order=order,
        propagate=propagate,
        skip=tuple(skip),
        experts_at_once=experts_at_once,
        kept_bytes=kept_bytes,
        to_end=to_end,
        damping=damping,
    )
    _check_state(hidden, start_block, tokens, settings)
    batches = [slice(start, start + batch_size) for start in range(0, len(tokens), batch_size)]
    place = (offload, torch.device(model.device if device is None else device), offload_folder)
    return BlockWalk(model, stack, tokens, batches, settings, start_block, hidden, place)


class BlockWalk:
    """What `walk_blocks` returns: iterate over it once.

    Attributes:
        stack: the blocks.
        state: where it stands. After the last block `state.hidden` is what the model's final norm reads.
    """

    def __init__(
        self,
        model: nn.Module,
        stack: BlockStack,
        tokens: Tensor,
        batches: list[slice],
        settings: WalkSettings,
        start: int,
        state: WalkState | None,
        place: tuple,
    ) -> None:
        self.stack, self.state = stack, state
        self._model, self._tokens, self._batches, self._settings = model, tokens, batches, settings
        self._start, self._place = start, place

    def __iter__(self) -> Iterator[BlockVisit]:
        store = Store(*self._place)
        training = [module for module in self._model.modules() if module.training]
        self._model.eval()
        try:
            journey = self._begin(store)
            for index in range(self.state.next_block, len(self.stack.blocks)):
                store.fetch(self.stack.blocks[index])
                try:
                    if index < self._start:
                        journey.pass_on(index, journey.pruned)
                        self.state = journey.state(index + 1)
                        continue
                    visit = BlockVisit(journey, self._settings, index)
                    try:
                        yield visit
                        self.state = visit.finish()
                    finally:
                        visit.close()
                finally:
                    store.put_back(self.stack.blocks[index])
        finally:
            store.close()
            for module in training:
                module.training = True

    @torch.no_grad()
    def _begin(self, store: Store) -> Journey:
        """Run what stands in front of the blocks; the hidden states are those of `state` where there is one."""
        hidden: list[Tensor] = []

        def keep(number: int, first: Tensor) -> None:
            if not hidden:
                hidden.append(store.empty((*self._tokens.shape, first.shape[-1]), first.dtype))
            if number < len(self._batches):
                hidden[0][self._batches[number]] = first

        # One window more, for Journey.run_one_window.
        batches = [*(self._tokens[rows] for rows in self._batches), self._tokens[:1]]
        calls = record_calls(self._model, self.stack, batches, keep)
        given = self.state
        if given is not None:
            hidden[0].copy_(given.hidden)
        if self._settings.two_streams:
            hidden.append(store.empty(tuple(hidden[0].shape), hidden[0].dtype))
            hidden[1].copy_(hidden[0] if given is None else given.dense)
        journey = Journey(
            self.stack, calls, store, [Stream(tensor, self._batches, self._place[1]) for tensor in hidden]
        )
        self.state = journey.state(0 if given is None else given.next_block)
        return journey


def check_tokens(model: nn.Module, tokens: Tensor) -> None:
    """Raise DataError unless `tokens` are [windows, length] of ids and positions that the model knows.

    TargetError, for a model that reads no tokens.
    """
    if not isinstance(tokens, Tensor) or tokens.dim() != 2 or 0 in tokens.shape:
        found = list(tokens.shape) if isinstance(tokens, Tensor) else type(tokens).__name__
        raise DataError(f"calibration needs a [windows, length] tensor of tokens, got {found}.")
    if tokens.is_floating_point() or tokens.dtype == torch.bool:
        raise DataError(f"calibration needs the whole numbers that a tokenizer returns, got {tokens.dtype}.")
    known = getattr(_input_embeddings(model), "num_embeddings", None)
    if known is None:
        raise TargetError(f"{type(model).__name__}: reads no tokens, and calibration is on tokens alone.")
    if not 0 <= int(tokens.min()) <= int(tokens.max()) < known:
        raise DataError(
            f"the windows hold tokens from {int(tokens.min())} to {int(tokens.max())}, the model knows 0 to "
            f"{known - 1}. Use the tokenizer that belongs to the model."
        )
    positions = _positions(model)
    if positions is not None and tokens.shape[1] > positions:
        raise DataError(f"windows of {tokens.shape[1]} tokens are longer than the {positions} positions of the model.")


def _positions(model: nn.Module) -> int | None:
    """The longest window that the model can read; None where its config names no limit."""
    config = model.config.get_text_config()
    named = (getattr(config, name, None) for name in ("max_position_embeddings", "max_seq_len"))
    limit = next((value for value in named if isinstance(value, int)), -1)
    if limit < 1:  # some say -1 for none
        return None
    for name, module in model.named_modules():
        if isinstance(module, nn.Embedding) and "position" in name.rpartition(".")[2]:
            # RoBERTa and its kin count positions from the one after that of padding.
            if module.num_embeddings == limit and module.padding_idx is not None:
                return limit - module.padding_idx - 1
    return limit


def _input_embeddings(model: nn.Module) -> nn.Module | None:
    try:
        return model.get_input_embeddings()
    except RuntimeError:  # that it is not implemented, for a model without any
        return None


def _check_state(state: WalkState | None, start: int, tokens: Tensor, settings: WalkSettings) -> None:
    if state is None:
        if start and settings.two_streams:
            raise ConfigError(
                f"start_block={start} with cross needs the dense model's hidden states, which pruned blocks cannot "
                "give. Pass `hidden`, as saved by the run that pruned them."
            )
        return
    if state.next_block != start:
        raise ConfigError(f"hidden is the input of block {state.next_block}, not of start_block={start}.")
    if state.hidden.shape[:2] != tokens.shape:
        raise ConfigError(
            f"hidden is of windows {list(state.hidden.shape[:2])}, got windows {list(tokens.shape)}. Resume with the "
            "same windows."
        )
    if settings.two_streams and state.dense is None:
        raise ConfigError("cross needs the dense model's hidden states too, which this saved state does not have.")
