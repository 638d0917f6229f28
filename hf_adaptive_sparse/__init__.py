"""Sparse language models: learn 2:4 masks while retraining, save packed, load with `from_pretrained`.

Importing this package registers the PEFT method "adaptive_sparse", the loader of packed folders, and the classes of
models whose blocks have different widths.
"""

from .errors import (
    CalibrationError,
    ConfigError,
    DataError,
    FormatError,
    OutputError,
    PatternError,
    SparsityError,
    TargetError,
    TrainingError,
)
from .hf.adapter import (
    AdaptiveSparseConfig,
    AdaptiveSparseModel,
    dense_teacher,
    learned_masks_config,
    sparse_layers,
)
from .hf.callbacks import AdaptiveSparseCallback
from .hf.data import load_documents, token_windows
from .hf.domain_sampler import DomainSampler, DomainWeightsCallback, domain_losses
from .hf.evaluation import Perplexity, perplexity
from .hf.learning_progress import LearningProgress
from .hf.one_shot import one_shot
from .hf.one_shot_report import OneShotReport
from .hf.pretrained import save_dense, save_packed
from .hf.shrink import ShrinkReport, shrink
from .hf.shrink_training import ShrinkCallback, ShrinkTrainer
from .hf.shrunk_export import export_shrunk
from .hf.shrunk_manifest import shrunk_manifest
from .hf.surgery import block_widths, remove_units
from .hf.trainer import AdaptiveSparseTrainer, DistillationConfig, DistillationMixin
from .hf.unit_learning import learn_by_policy, learn_to_shape
from .hf.units import find_axes
from .hf.walk_progress import PruningProgress
from .hf.warm_start import warm_start
from .losses import DistillationLoss
from .methods.adaptive_width.config import ShrinkConfig
from .methods.hard_concrete import HardConcreteConfig
from .methods.learned_masks import MaskTrack, refresh_masks, suggested_learning_rate
from .methods.one_shot import OneShotConfig
from .methods.policy_gradient import PolicyGradientConfig
from .optim import SparseAdamW
from .patterns import NMPattern

__all__ = [
    "AdaptiveSparseCallback",
    "AdaptiveSparseConfig",
    "AdaptiveSparseModel",
    "AdaptiveSparseTrainer",
    "CalibrationError",
    "ConfigError",
    "DataError",
    "DistillationConfig",
    "DistillationLoss",
    "DistillationMixin",
    "DomainSampler",
    "DomainWeightsCallback",
    "FormatError",
    "HardConcreteConfig",
    "LearningProgress",
    "MaskTrack",
    "NMPattern",
    "OneShotConfig",
    "OneShotReport",
    "OutputError",
    "PatternError",
    "Perplexity",
    "PolicyGradientConfig",
    "PruningProgress",
    "ShrinkCallback",
    "ShrinkConfig",
    "ShrinkReport",
    "ShrinkTrainer",
    "SparseAdamW",
    "SparsityError",
    "TargetError",
    "TrainingError",
    "block_widths",
    "dense_teacher",
    "domain_losses",
    "export_shrunk",
    "find_axes",
    "learn_by_policy",
    "learn_to_shape",
    "learned_masks_config",
    "load_documents",
    "one_shot",
    "perplexity",
    "refresh_masks",
    "remove_units",
    "save_dense",
    "save_packed",
    "shrink",
    "shrunk_manifest",
    "sparse_layers",
    "suggested_learning_rate",
    "token_windows",
    "warm_start",
]
