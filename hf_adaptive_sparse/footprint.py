"""How many bytes a linear layer takes, dense and packed, and how many one decoded token makes a machine read.

A packed 2:4 layer keeps half of its values, and 4 bits for every four weights: in 16 bits 0.5625 of the dense bytes,
in 8 bits 0.625, in 4 bits 0.75 of what dense codes of as many bits take, scales left out.
"""

from __future__ import annotations

from dataclasses import dataclass

from .errors import ConfigError

VALUE_BITS = (8, 4)
SCALE_BYTES = 4  # float32, as the package stores them


@dataclass(frozen=True)
class Stored:
    """How the values of linear layers are stored.

    Attributes:
        sparse: packed 2:4, or dense.
        bits: of codes, 8 or 4; None: values as they are.
        group_size: inputs that share a scale; None: all of a row. Only with `bits`.
    """

    sparse: bool = False
    bits: int | None = None
    group_size: int | None = None

    def __post_init__(self) -> None:
        if self.bits is not None and self.bits not in VALUE_BITS:
            raise ConfigError(f"bits of stored values are {' or '.join(map(str, VALUE_BITS))}, got {self.bits}.")
        if self.group_size is not None and (self.group_size < 4 or self.group_size % 4):
            raise ConfigError(f"group_size is a multiple of 4 inputs, got {self.group_size}.")

    @property
    def name(self) -> str:
        """ "dense", "2:4", "dense int8", "2:4 int4": how it is called in tables."""
        return ("2:4" if self.sparse else "dense") + ("" if self.bits is None else f" int{self.bits}")

    def weight_bytes(self, rows: int, columns: int, width: int) -> int:
        """Of one weight [rows, columns] whose values take `width` bytes where they are not codes.

        Rows whose inputs the groups do not fill have one more scale.
        """
        kept = rows * columns // 2 if self.sparse else rows * columns
        values = kept * width if self.bits is None else -(-kept * self.bits // 8)
        positions = rows * columns // 8 if self.sparse else 0
        groups = 1 if self.group_size is None else -(-columns // self.group_size)
        scales = 0 if self.bits is None else SCALE_BYTES * rows * groups
        return values + positions + scales


STORED: dict[str, Stored] = {
    stored.name: stored
    for stored in (
        Stored(), Stored(sparse=True), Stored(bits=8, group_size=128), Stored(sparse=True, bits=8, group_size=128),
        Stored(bits=4, group_size=128), Stored(sparse=True, bits=4, group_size=128),
    )
}  # fmt: skip
"""What is compared: 16-bit values, and codes of 8 and 4 bits with a float32 scale for every 128 inputs."""


@dataclass(frozen=True, kw_only=True)
class Footprint:
    """Bytes of a whole model in one form.

    Attributes:
        file_bytes: of all weights on disk; shared ones once.
        token_bytes: of the weights that one decoding step reads: all but the input embedding, of which it reads a row
            for every sequence. Experts that are not chosen are counted in full where `all_experts`.
    """

    file_bytes: int
    token_bytes: int


def kv_bytes_per_token(layers: int, kv_heads: int, head_dim: int, width: int) -> int:
    """Of keys and values that one token adds to the cache."""
    return 2 * layers * kv_heads * head_dim * width
