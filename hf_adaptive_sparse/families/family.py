"""What we know about one family of models: where it keeps its linears, by name."""

from __future__ import annotations

from dataclasses import dataclass

from .structure import Structure


@dataclass(frozen=True, kw_only=True)
class ModelFamily:
    """Names of the modules of one architecture.

    Args:
        name: `config.model_type` of the models it describes.
        attention: last parts of the names of the attention linears of a decoder block.
        mlp: last parts of the names of the linears of its MLP.
        blocks: name of the list that holds the decoder blocks, from the root of the causal language model.
        norms: last parts of the names of every normalisation layer, final one included.
        scope: a part of the name that every decoder linear has, where other towers of the model use the same
            last parts (default: none needed).
        structure: which linears make and read its heads and channels; None: not declared, so nothing can be removed
            from its models.
    """

    name: str
    attention: tuple[str, ...]
    mlp: tuple[str, ...]
    blocks: str
    norms: tuple[str, ...]
    scope: str = ""
    structure: Structure | None = None

    @property
    def targets(self) -> tuple[str, ...]:
        """The linears that become sparse by default. Never an embedding, never the head."""
        return self.attention + self.mlp

    def is_target(self, name: str) -> bool:
        """Whether the module called `name` is one of the linears of a decoder block."""
        in_scope = not self.scope or f".{self.scope}." in f".{name}."
        return in_scope and any(f".{name}".endswith(f".{target}") for target in self.targets)
