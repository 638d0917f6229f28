"""Mixtures of experts whose experts lie in one parameter. Their linears are no targets by name: only structures."""

from __future__ import annotations

from .structure import Structure

MIXTRAL = Structure(experts="experts", experts_field="num_local_experts")
# Some of its blocks may have an ordinary MLP.
QWEN3_MOE = Structure(head_norms=("q_norm", "k_norm"), experts="experts", experts_field="num_experts")
