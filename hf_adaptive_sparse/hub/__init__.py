"""To a Hub: what a folder is, what its model card says, and the one commit that brings both there."""

from .push import push_to_hub
from .upload import PushedRepo

__all__ = ["PushedRepo", "push_to_hub"]
