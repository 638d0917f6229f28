"""What can go wrong, as a tree. Every message says where, what is wrong, what was found and what to do.

    SparsityError
    ├── ConfigError       a setting, or a combination of settings, that cannot be used    (also a ValueError)
    ├── PatternError      a weight or a shape that does not fit a sparsity pattern        (also a ValueError)
    ├── FormatError       a packed tensor or folder that is damaged or of unknown version (also a ValueError)
    ├── DataError         text, datasets or tokens that cannot be used                    (also a ValueError)
    ├── CalibrationError  calibration that cannot carry what is asked of it               (also a ValueError)
    ├── TargetError       modules that do not exist or cannot be made sparse              (also a ValueError)
    ├── TrainingError     a training run that must stop                                   (also a RuntimeError)
    └── OutputError       a result that could not be written; nothing half-written stays  (also an OSError)
"""


class SparsityError(Exception):
    """Base of every error that this package raises on purpose."""


class ConfigError(SparsityError, ValueError):
    """A setting, or a combination of settings, that cannot be used."""


class PatternError(SparsityError, ValueError):
    """A weight or a shape that does not fit a sparsity pattern."""


class FormatError(SparsityError, ValueError):
    """A packed tensor or folder that is damaged or of an unknown version."""


class DataError(SparsityError, ValueError):
    """Text, datasets or tokens that cannot be used."""


class CalibrationError(SparsityError, ValueError):
    """Calibration inputs that cannot carry what is asked of them: none, NaN, or too few for a full rank."""


class TargetError(SparsityError, ValueError):
    """Modules that were asked for and do not exist, or cannot be made sparse."""


class TrainingError(SparsityError, RuntimeError):
    """A training run that must stop: NaN loss, a missing gradient, a schedule that does not fit."""


class OutputError(SparsityError, OSError):
    """A result that could not be written. Nothing half-written is left behind."""
