"""Row shards of a parameter: what a rank holds of it under FSDP2 and other DTensor layouts.

Groups of a sparsity pattern run along a row, and a latent weight is stored [out, in], so a shard of whole rows holds
whole groups: masks, decay and optimizer state are computed on the local rows alone.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Shard

from .errors import TrainingError


def local_rows(tensor: Tensor) -> Tensor:
    """The part of a tensor that this rank holds: the tensor itself unless it is a DTensor. Shares memory with it."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def row_range(parameter: Tensor) -> slice:
    """Which rows of the full parameter this rank holds.

    Raises:
        TrainingError: the parameter is split along its input features, which would cut groups apart.
    """
    if not isinstance(parameter, DTensor):
        return slice(0, parameter.shape[0])
    start, rows = 0, parameter.shape[0]
    for mesh_dim, placement in enumerate(parameter.placements):
        if not isinstance(placement, Shard):
            continue
        if placement.dim != 0:
            raise TrainingError(
                f"a latent weight of shape {list(parameter.shape)} is sharded along dimension {placement.dim}: groups "
                "of a sparsity pattern would be cut apart. Shard it along dimension 0 (the default of fully_shard)."
            )
        # As torch.chunk cuts: every rank but the last ones holds ceil(rows / ranks).
        ranks, rank = parameter.device_mesh.size(mesh_dim), parameter.device_mesh.get_local_rank(mesh_dim)
        chunk = -(-rows // ranks)
        offset = min(rank * chunk, rows)
        start, rows = start + offset, min(chunk, rows - offset)
    return slice(start, start + rows)


def gather_rows(local: Tensor, parameter: Tensor) -> Tensor:
    """The full tensor of which every rank computed the rows that it holds of `parameter`; a collective call.

    Args:
        local: [rows held here, in], any dtype.
        parameter: the (possibly sharded) parameter whose layout `local` follows.
    Returns:
        [out, in], the same on every rank.
    """
    if not isinstance(parameter, DTensor):
        return local
    # bool has no all-gather in gloo; bytes have one everywhere.
    payload = local.to(torch.uint8) if local.dtype == torch.bool else local
    full = DTensor.from_local(
        payload.contiguous(),
        parameter.device_mesh,
        parameter.placements,
        run_check=False,
        shape=parameter.shape,
        stride=parameter.stride(),
    ).full_tensor()
    return full.to(local.dtype)


def sums_over_shards(values: Tensor, parameter: Tensor) -> Tensor:
    """Add per-parameter sums over the ranks that share `parameter`; the tensor itself when nothing is sharded."""
    if not isinstance(parameter, DTensor):
        return values
    for mesh_dim, placement in enumerate(parameter.placements):
        if isinstance(placement, Shard):
            torch.distributed.all_reduce(values, group=parameter.device_mesh.get_group(mesh_dim))
    return values
