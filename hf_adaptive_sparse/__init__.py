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
from .hf.import_checkpoint import import_checkpoint
from .hf.learning_progress import LearningProgress
from .hf.mask_application import apply_masks, load_with_masks
from .hf.mask_folder import is_mask_folder
from .hf.masks import save_masks
from .hf.measured_backends import use_measured_backends
from .hf.one_shot import one_shot
from .hf.one_shot_report import OneShotReport
from .hf.packed_modules import set_packed_backend
from .hf.pretrained import save_dense, save_packed
from .hf.quantizer import loading_options
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
from .hub import PushedRepo, push_to_hub
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
    "PushedRepo",
    "ShrinkCallback",
    "ShrinkConfig",
    "ShrinkReport",
    "ShrinkTrainer",
    "SparseAdamW",
    "SparsityError",
    "TargetError",
    "TrainingError",
    "apply_masks",
    "block_widths",
    "dense_teacher",
    "domain_losses",
    "export_shrunk",
    "find_axes",
    "import_checkpoint",
    "is_mask_folder",
    "learn_by_policy",
    "learn_to_shape",
    "learned_masks_config",
    "load_documents",
    "load_with_masks",
    "loading_options",
    "one_shot",
    "perplexity",
    "push_to_hub",
    "refresh_masks",
    "remove_units",
    "save_dense",
    "save_masks",
    "save_packed",
    "set_packed_backend",
    "shrink",
    "shrunk_manifest",
    "sparse_layers",
    "suggested_learning_rate",
    "token_windows",
    "use_measured_backends",
    "warm_start",
]
