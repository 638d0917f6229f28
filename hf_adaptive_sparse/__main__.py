"""`python -m hf_adaptive_sparse` is `hf-adaptive-sparse`."""

import sys

from .cli.main import main

if __name__ == "__main__":
    sys.exit(main())
