"""Make peft know a method that is not part of it.

`peft.register_peft_method` asks for a member of the `PeftType` enum, and an enum has no official way to grow.
So the member is built as `enum` itself would build it, and entered wherever `enum` looks members up: in three
tables and, from Python 3.12 on, among the attributes of the class.
"""

from __future__ import annotations

from enum import Enum
from typing import TypeVar

from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from peft.utils import PeftType, register_peft_method

StringEnum = TypeVar("StringEnum", bound=Enum)


def extend_enum(enum_class: type[StringEnum], name: str) -> StringEnum:
    """Add a member whose value is its name to a `(str, Enum)` class, unless it is there; return it.

    It behaves as one that was written in the class body: attribute, item and value look-up, iteration,
    `isinstance`, pickle and deepcopy identity.
    """
    if name in enum_class.__members__:
        return enum_class[name]
    member = str.__new__(enum_class, name)
    member._name_ = name
    member._value_ = name
    member.__objclass__ = enum_class
    member._sort_order_ = len(enum_class._member_names_)
    enum_class._member_map_[name] = member
    enum_class._value2member_map_[name] = member
    enum_class._member_names_.append(name)
    if name not in enum_class.__dict__:
        # Not setattr: EnumMeta refuses it for a name that is a member.
        type.__setattr__(enum_class, name, member)
    return member


def register_method(name: str, config_class: type, model_class: type) -> PeftType:
    """Register a PEFT method, once per process: a second call, as after a reload, replaces nothing.

    Args:
        name: lower case; the `PeftType` member is its upper case, the prefix of its tensors is `name_`.
        config_class: a `PeftConfig`.
        model_class: a `BaseTuner`.
    """
    member = extend_enum(PeftType, name.upper())
    if member not in PEFT_TYPE_TO_CONFIG_MAPPING:
        register_peft_method(name=name, config_cls=config_class, model_cls=model_class)
    return member


NAME = "adaptive_sparse"
PREFIX = NAME + "_"
PEFT_TYPE = extend_enum(PeftType, NAME.upper())
