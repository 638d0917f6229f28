"""AdaptiveSparseConfig: everything that a saved adapter has to remember about itself."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Any

from peft import PeftConfig

from ..errors import ConfigError
from ..families import FAMILIES
from ..methods.learned_masks import LearnedMasksConfig
from ..methods.slorb import SLORB_INITS
from .peft_registry import PEFT_TYPE

INIT_MASKS = ("magnitude", "dense")
LAYOUTS = ("copy", "inplace")
BIASES = ("none", "all", "adaptive_sparse_only")
_LEARNED_MASKS_FIELDS = {entry.name: entry for entry in fields(LearnedMasksConfig)}


def _as_in_learned_masks(name: str) -> Any:
    """The field of that name of LearnedMasksConfig: same default, same help."""
    entry = _LEARNED_MASKS_FIELDS[name]
    return field(default=entry.default, metadata=entry.metadata)


@dataclass
class AdaptiveSparseConfig(PeftConfig):
    """A sparse weight next to each target linear of a frozen dense model. A config that exists is valid.

    Raises:
        ConfigError: a value, or a combination of values, cannot be used.
    """

    pattern: str = _as_in_learned_masks("pattern")
    saliency: str = _as_in_learned_masks("saliency")
    init_mask: str = field(
        default="magnitude",
        metadata={"help": "'magnitude' starts sparse; 'dense' keeps every weight until the first refresh."},
    )
    layout: str = field(
        default="copy",
        metadata={
            "help": "'copy' trains a copy next to the frozen dense weight, which stays as the teacher; "
            "'inplace' trains the weight of the model itself: less memory, no self-teacher, one adapter only."
        },
    )
    target_modules: list[str] | str | None = field(
        default=None,
        metadata={
            "help": "Names of the linears, a regular expression over full names, or 'all-linear'. Default: "
            f"attention and MLP of {', '.join(sorted(FAMILIES))}."
        },
    )
    exclude_modules: list[str] | str | None = field(
        default=None, metadata={"help": "Names, or a regular expression over full names, that stay dense."}
    )
    modules_to_save: list[str] | None = field(
        default=None, metadata={"help": "Other modules to train and save in full, such as norms or the head."}
    )
    layers_to_transform: list[int] | int | None = field(
        default=None, metadata={"help": "Numbers of the decoder blocks to make sparse; others stay dense."}
    )
    layers_pattern: list[str] | str | None = field(
        default=None, metadata={"help": "Name of the list of blocks, where it is not found by itself."}
    )
    bias: str = field(
        default="none",
        metadata={
            "help": f"Which biases train, in place: one of {', '.join(BIASES)}. Any but 'none' ends the self-teacher."
        },
    )
    init_weights: bool = field(
        default=True, metadata={"help": "Start from the weights of the model; False is random, for tests."}
    )
    trainable_token_indices: list[int] | dict[str, list[int]] | None = field(
        default=None, metadata={"help": "Tokens whose embeddings train, as everywhere in peft."}
    )
    mask_policy: str = _as_in_learned_masks("mask_policy")
    mask_interval: int = _as_in_learned_masks("mask_interval")
    decay: float = _as_in_learned_masks("decay")
    decay_norm: str = _as_in_learned_masks("decay_norm")
    decay_fraction: float = _as_in_learned_masks("decay_fraction")
    start_fraction: float = _as_in_learned_masks("start_fraction")
    freeze_fraction: float = _as_in_learned_masks("freeze_fraction")
    slorb_k: int | None = field(
        default=None,
        metadata={"help": "Inputs per block of the dense branch (SLoRB); 16 in the paper. None: no branch."},
    )
    slorb_init: str = field(default="mean", metadata={"help": f"Start of the branch: one of {', '.join(SLORB_INITS)}."})
    slorb_train_projection: bool = field(
        default=True, metadata={"help": "Train the projection too; False sums blocks, and costs less."}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        # Only json gives a plain string here. The layers then wait for the tensors of the same file.
        self.is_from_file = type(self.peft_type) is str
        self.peft_type = PEFT_TYPE
        if isinstance(self.target_modules, list):
            self.target_modules = set(self.target_modules)
        if isinstance(self.exclude_modules, list):
            self.exclude_modules = set(self.exclude_modules)
        _ = self.learned_masks  # building it checks it
        self._check_names()
        self._check_combinations()

    @property
    def learned_masks(self) -> LearnedMasksConfig:
        """The part of this config that says when and how masks change."""
        return LearnedMasksConfig(**{name: getattr(self, name) for name in _LEARNED_MASKS_FIELDS})

    def _check_names(self) -> None:
        known = {
            "init_mask": INIT_MASKS,
            "layout": LAYOUTS,
            "bias": BIASES,
            "slorb_init": SLORB_INITS,
        }
        for name, values in known.items():
            if getattr(self, name) not in values:
                raise ConfigError(f"unknown {name} {getattr(self, name)!r}; known: {', '.join(values)}.")
        if self.slorb_k is not None and self.slorb_k < 2:
            raise ConfigError(f"slorb_k is a number of inputs per block and at least 2, got {self.slorb_k}.")

    def _check_combinations(self) -> None:
        if self.target_modules is not None and not self.target_modules:
            raise ConfigError(
                "target_modules is empty. Leave it out for the default of the model family, or name modules."
            )
        if self.mask_policy == "frozen" and self.init_mask == "dense":
            raise ConfigError(
                "mask_policy='frozen' takes its mask from the zeros of the model, so init_mask='dense' "
                "can have no effect. Leave init_mask out, or write mask_policy='adaptive'."
            )
        if isinstance(self.target_modules, str) and self.target_modules.lower() != "all-linear":
            for name in ("layers_to_transform", "layers_pattern"):
                if getattr(self, name) is not None:
                    raise ConfigError(
                        f"{name} has no effect with a regular expression as target_modules. Put the layers "
                        "into the expression, or give target_modules as a list of names."
                    )
        if self.layers_pattern is not None and self.layers_to_transform is None:
            raise ConfigError("layers_pattern says where to look for layers_to_transform, which is not set. Set both.")
