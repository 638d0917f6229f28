"""What `import hf_adaptive_sparse` gives, and what it sets up."""

from __future__ import annotations

import subprocess
import sys

import hf_adaptive_sparse

PUBLIC = {
    # methods and their training
    "AdaptiveSparseCallback",
    "AdaptiveSparseConfig",
    "AdaptiveSparseModel",
    "AdaptiveSparseTrainer",
    "DistillationConfig",
    "DistillationLoss",
    "DistillationMixin",
    "MaskTrack",
    "NMPattern",
    "OneShotConfig",
    "OneShotReport",
    "PruningProgress",
    "SparseAdamW",
    "dense_teacher",
    "learned_masks_config",
    "one_shot",
    "refresh_masks",
    "sparse_layers",
    "suggested_learning_rate",
    "warm_start",
    # smaller models
    "DomainSampler",
    "DomainWeightsCallback",
    "HardConcreteConfig",
    "LearningProgress",
    "PolicyGradientConfig",
    "ShrinkCallback",
    "ShrinkConfig",
    "ShrinkReport",
    "ShrinkTrainer",
    "block_widths",
    "domain_losses",
    "find_axes",
    "learn_by_policy",
    "learn_to_shape",
    "remove_units",
    "shrink",
    # export and import
    "PushedRepo",
    "apply_masks",
    "export_shrunk",
    "import_checkpoint",
    "is_mask_folder",
    "load_with_masks",
    "push_to_hub",
    "loading_options",
    "save_dense",
    "save_masks",
    "save_packed",
    "set_packed_backend",
    "shrunk_manifest",
    # speed
    "use_measured_backends",
    # text and evaluation
    "Perplexity",
    "load_documents",
    "perplexity",
    "token_windows",
    # errors
    "CalibrationError",
    "ConfigError",
    "DataError",
    "FormatError",
    "OutputError",
    "PatternError",
    "SparsityError",
    "TargetError",
    "TrainingError",
}


def test_the_public_names_are_these():
    assert set(hf_adaptive_sparse.__all__) == PUBLIC
    assert list(hf_adaptive_sparse.__all__) == sorted(hf_adaptive_sparse.__all__)
    assert all(hasattr(hf_adaptive_sparse, name) for name in PUBLIC)


def test_every_error_is_public():
    from hf_adaptive_sparse import errors

    kinds = {name for name, kind in vars(errors).items() if isinstance(kind, type)}
    assert kinds == {name for name in PUBLIC if name.endswith("Error")}
    assert all(issubclass(getattr(errors, name), errors.SparsityError) for name in kinds)


def test_importing_registers_the_peft_method_and_the_packed_loader_once():
    code = """
import importlib
import sys
from peft import PeftType
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING
assert "ADAPTIVE_SPARSE" not in PeftType.__members__ and "adaptive_sparse" not in AUTO_QUANTIZER_MAPPING
import hf_adaptive_sparse as package
importlib.reload(package)
assert PEFT_TYPE_TO_CONFIG_MAPPING[PeftType.ADAPTIVE_SPARSE] is package.AdaptiveSparseConfig
assert PEFT_TYPE_TO_TUNER_MAPPING[PeftType.ADAPTIVE_SPARSE] is package.AdaptiveSparseModel
assert "adaptive_sparse" in AUTO_QUANTIZER_MAPPING and "adaptive_sparse" in AUTO_QUANTIZATION_CONFIG_MAPPING
assert "matplotlib" not in sys.modules  # seconds that are for reports alone
print("registered")
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=240)
    assert result.stdout == "registered\n", result.stderr
