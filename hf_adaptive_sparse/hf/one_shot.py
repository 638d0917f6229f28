"""One-shot pruning of a transformers model: allocate, walk over its blocks, prune, verify, report."""

from __future__ import annotations

import resource
import time
from collections import Counter
from collections.abc import Callable, Collection
from dataclasses import asdict

import torch
from torch import Tensor, nn

from ..errors import ConfigError, PatternError, TargetError
from ..methods.one_shot import Goal, OneShotConfig, Pruned, prune_group
from ..patterns import NMPattern
from ..products import without_autocast
from ..quantizers import RTN
from .blocks import BlockStack, Member, block_linears, find_blocks, is_skipped
from .calibration import walk_blocks
from .data import WindowDataset
from .loss_gradients import weight_gradients
from .one_shot_goals import check_budget, check_loss, choose_goals
from .one_shot_report import MatrixResult, OneShotReport, QuantizedMatrix
from .visits import BlockVisit, WalkState
from .walk_progress import PruningProgress
from .walk_state import weights_digest, windows_digest

BUDGET_TOLERANCE = 1e-4


@without_autocast()
@torch.inference_mode(False)
def one_shot(
    model: nn.Module,
    windows: WindowDataset | Tensor,
    config: OneShotConfig | None = None,
    *,
    batch_size: int = 8,
    device: torch.device | str | None = None,
    offload: str = "none",
    skip: Collection[str] | None = (),
    seed: int = 0,
    progress: PruningProgress | None = None,
    on_block: Callable[[int, int], None] | None = None,
) -> OneShotReport:
    """Prune the linears of all blocks in place; embeddings and head stay as they are.

    Args:
        model: a causal language model of transformers, without adapters or packed layers. Or an encoder, or a model
            without a head, for what does not read the loss: see `one_shot_goals.check_loss`.
        windows: [windows, length] calibration tokens.
        config: how; default `OneShotConfig()`.
        batch_size: windows in a forward pass.
        device: on which blocks are computed, one at a time; default: where the model is.
        offload: "none", "cpu" or "disk": where blocks and activations wait.
        skip: modules that stay dense, by full name or by the end of it; None: no module.
        seed: of random probes and of the evolutionary search.
        progress: where finished blocks are saved, and an interrupted run goes on.
        on_block: called with (finished blocks, all blocks).
    Raises:
        ConfigError, PatternError, TargetError, CalibrationError, DataError: before the first weight is changed, if it
            can be known by then.
    """
    config = config or OneShotConfig()
    started = time.perf_counter()
    skip = () if skip is None else skip
    stack = find_blocks(model)
    _check_writable(model)
    windows = _outside_inference_mode(windows)
    check_skip(model, stack, skip)
    members = prunable_members(stack, skip)
    check_shapes(members, config)
    check_budget(members, config)
    # Looks at windows, device and blocks alone: what cannot be walked is refused before anything is written.
    walk_blocks(model, windows, batch_size=batch_size, device=device, offload=offload, skip=skip)
    check_loss(model, windows.tokens if isinstance(windows, WindowDataset) else windows, config)
    _check_finite(members)
    seconds: dict[str, float] = {}
    chosen = None
    if progress is not None:
        settings = {"config": asdict(config), "batch_size": batch_size, "skip": sorted(skip), "seed": seed}
        settings |= {"dtype": _dtypes(members), "digest of the windows": windows_digest(windows)}
        chosen = progress.open(settings, weights_digest(model))
    if chosen is None:
        chosen = choose_goals(
            model, windows, members, config, batch_size=batch_size, device=device, offload=offload, skip=skip, seed=seed
        )
        if progress is not None:
            progress.begin(chosen)
    gradients = None
    if "gradient" in config.needs:  # of the dense model, so before finished blocks are put back
        gradients = weight_gradients(model, windows, list(members), batch_size=batch_size, device=device)
    seconds["sensitivity and allocation"] = time.perf_counter() - started
    state: WalkState | None = None
    results: list[MatrixResult] = []
    quantized: dict[str, QuantizedMatrix] = {}
    if progress is not None:
        state, results, quantized = progress.restore(stack, windows)
    walked = time.perf_counter()
    walk = walk_blocks(
        model,
        windows,
        needs=(config.needs - {"gradient"}) or {"squares"},  # a score that reads nothing still counts tokens
        order=config.resolved.order,
        batch_size=batch_size,
        device=device,
        offload=offload,
        skip=skip,
        damping=config.damping,
        to_end=False,  # nothing reads what the last block returns
        start_block=0 if state is None else state.next_block,
        hidden=state,
    )
    for visit in walk:
        found = _prune_block(visit, chosen.goals, chosen.sensitivity, config, gradients, quantized)
        results += found
        if progress is not None:
            progress.save(visit, windows, found, quantized)
        if on_block is not None:
            on_block(visit.index + 1, len(stack.blocks))
    seconds["pruning"] = time.perf_counter() - walked
    _check_rows(results, members)
    total = sum(row.shape[0] * row.shape[1] for row in results)
    realised = sum(round(row.sparsity * row.shape[0] * row.shape[1]) for row in results) / total
    if abs(realised - config.target) > BUDGET_TOLERANCE + 1.0 / total:
        raise PatternError(
            f"the pruned model has a sparsity of {realised:.6f}, asked for {config.target}. It must not be used: check "
            "that no module was pruned before, and report this."
        )
    return OneShotReport(
        target=config.target,
        realised=realised,
        matrices=results,
        seconds=seconds,
        peak_bytes=_peak_bytes(device),
        quantized=quantized,
    )


def _check_writable(model: nn.Module) -> None:
    for name, parameter in model.named_parameters():
        if parameter.is_inference():
            raise ConfigError(
                f"{name}: was made in torch.inference_mode(), and cannot be written to outside of it. Load the model "
                "outside of it; one_shot may be called inside."
            )


def _outside_inference_mode(windows: WindowDataset | Tensor) -> WindowDataset | Tensor:
    """Tokens that gradients can be computed with."""
    tokens = windows.tokens if isinstance(windows, WindowDataset) else windows
    return tokens.clone() if isinstance(tokens, Tensor) and tokens.is_inference() else windows


def check_skip(model: nn.Module, stack: BlockStack, skip: Collection[str]) -> None:
    """Raise ConfigError for names that leave out nothing: with a typo, what was to stay dense would be pruned."""
    if isinstance(skip, str):
        raise ConfigError(f"skip is a list of names, got the string {skip!r}. Write [{skip!r}].")
    weights: dict[str, str] = {}  # of what is pruned: name of the parameter -> that of its module
    known = [name for name, _ in model.named_modules() if name]
    for index in range(len(stack.blocks)):
        for name, member in block_linears(stack, index, refuse_unknown=False).items():
            if member.expert is None:
                weights[f"{name}.{member.key}"] = name
            else:
                known += [name.partition("[")[0], name]
    known += [name for name, _ in model.named_parameters() if name not in weights]
    for end in skip:
        if not isinstance(end, str):
            raise ConfigError(f"skip is a list of names, got {end!r} in it. Write names of modules.")
        found = [name for name in known if is_skipped(name, [end])]
        pruned = next((module for name, module in weights.items() if is_skipped(name, [end])), None)
        if not found and pruned is not None:
            short = end.rpartition(".")[0] or pruned
            raise ConfigError(
                f"skip: {end!r} is a parameter of {pruned}, and modules are skipped as a whole. Write {short!r}."
            )
        if not found:
            raise ConfigError(f"skip: no module of the model is called {end!r}, and none ends with .{end}.")
        around = next((name for name in found if f"{stack.name}.".startswith(f"{name}.")), None)
        if around is not None:
            raise ConfigError(f"skip: {around} holds all blocks. Name modules in them, such as {stack.block_name(0)}.")


def prunable_members(stack: BlockStack, skip: Collection[str] = ()) -> dict[str, Member]:
    """Every weight that would be pruned, by full name.

    Raises:
        TargetError: `skip` leaves nothing.
    """
    members: dict[str, Member] = {}
    for index in range(len(stack.blocks)):
        members |= block_linears(stack, index, skip)
    if not members:
        raise TargetError(f"{stack.name}: no linear layer is left to prune. Skip fewer modules: {', '.join(skip)}.")
    return members


def check_shapes(members: dict[str, Member], config: OneShotConfig) -> None:
    """Raise PatternError or ConfigError, naming the layer, where groups do not fill the rows of a weight.

    Groups are those of an n:m pattern, and of inputs that share a scale.
    """
    for name, member in members.items():
        for pattern in _patterns(config):
            pattern.check_in_features(member.shape, name, "skip")
        if config.bits:
            RTN(config.bits, config.group_size).check_in_features(member.shape, name)


def _patterns(config: OneShotConfig) -> list[NMPattern]:
    if config.pattern == "unstructured":
        return []
    return list(config.level_patterns().values()) if config.pattern == "mixed" else [config.fixed_pattern]


def _check_finite(members: dict[str, Member]) -> None:
    """Raise TargetError, naming the layer, where a dense weight is NaN or inf: no solver can make up for it."""
    for name, member in members.items():
        if _is_finite(member.weight):
            continue
        if broken := int((~member.weight.isfinite()).sum()):
            raise TargetError(
                f"{name}: the dense weight holds {broken} NaN or infinite values of {member.weight.numel()}. Load an "
                "intact copy of the model, in float32 or bfloat16."
            )


def _dtypes(members: dict[str, Member]) -> str:
    return ", ".join(sorted({str(member.weight.dtype).removeprefix("torch.") for member in members.values()}))


def _is_finite(tensor: Tensor) -> bool:
    # A sum takes a third of the time of asking every value, and only NaN, inf or huge values make it inf.
    return bool(tensor.sum(dtype=torch.float32).isfinite()) or bool(tensor.isfinite().all())


def _prune_block(
    visit: BlockVisit,
    goals: dict[str, Goal],
    sensitivity: dict[str, float],
    config: OneShotConfig,
    gradients: dict[str, Tensor] | None,
    quantized: dict[str, QuantizedMatrix],
) -> list[MatrixResult]:
    rows = []
    for group in visit.groups:
        stats = group.stats
        started = time.perf_counter()
        names = [member.name for member in group.members]
        pruned = prune_group(
            [member.weight for member in group.members],
            stats,
            [goals[name] for name in names],
            config,
            None if gradients is None else [gradients[name].to(stats.squares.device) for name in names],
        )
        for member, result in zip(group.members, pruned, strict=True):
            _check_pattern(member, result, goals[member.name])
            member.set_weight(result.weight)
            if result.codes is not None and result.scales is not None:
                quantized[member.name] = QuantizedMatrix(
                    result.codes.cpu(), result.scales.cpu(), config.bits, config.group_size
                )
        spent = (time.perf_counter() - started) / len(names)
        factored = "scaled" in vars(stats)
        for member, result in zip(group.members, pruned, strict=True):
            rows.append(
                MatrixResult(
                    name=member.name,
                    shape=member.shape,
                    pattern=goals[member.name].pattern.name,
                    sparsity=1.0 - int(result.keep.count_nonzero()) / result.keep.numel(),
                    error=result.error,
                    sensitivity=sensitivity.get(member.name),
                    tokens=group.tokens,
                    shrinkage=group.shrinkage,
                    rung=stats.scaled.rung if factored else "",
                    seconds=spent,
                )
            )
    return rows


def _check_pattern(member: Member, result: Pruned, goal: Goal) -> None:
    """A last look before anything is written: rounding and solving must not have broken the pattern."""
    if not _is_finite(result.weight):
        raise PatternError(
            f"{member.name}: the solved weight holds NaN or inf. Raise damping, or calibrate on more text."
        )
    if isinstance(goal.pattern, NMPattern):
        violation = goal.pattern.first_violation(result.weight)
        if violation is not None:
            raise PatternError(f"{member.name}: row {violation[0]}, group {violation[1]} is not {goal.pattern.name}.")


def _check_rows(results: list[MatrixResult], members: dict[str, Member]) -> None:
    """A last look at the whole: a matrix that the walk left out would stay dense, and no sum would show it."""
    counts = Counter(row.name for row in results)
    wrong = [name for name in {**members, **counts} if counts[name] != (name in members)]
    if wrong:
        raise PatternError(
            f"{wrong[0]}: was pruned {counts[wrong[0]]} times, and {int(wrong[0] in members)} was asked for (the first "
            f"of {len(wrong)} such weights). The model must not be used; report this."
        )


def _peak_bytes(device: torch.device | str | None) -> int:
    if device is not None and torch.device(device).type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
