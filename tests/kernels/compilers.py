"""Whether this machine can build the compiled kernel."""

from __future__ import annotations

import pytest

from hf_adaptive_sparse.errors import ConfigError
from hf_adaptive_sparse.kernels.build import find_compiler


def has_compiler() -> bool:
    try:
        find_compiler()
    except ConfigError:
        return False
    return True


needs_a_compiler = pytest.mark.skipif(not has_compiler(), reason="no C++ compiler in PATH")
