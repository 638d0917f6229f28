"""To a Hub: what a folder is, what its model card says, and the one commit that brings both there."""

from .push import PushedRepo, push_to_hub

__all__ = ["PushedRepo", "push_to_hub"]
