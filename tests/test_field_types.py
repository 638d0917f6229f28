"""Values of another type than a config is annotated with, and what is said of them."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest
import torch

from hf_adaptive_sparse.errors import ConfigError
from hf_adaptive_sparse.field_types import check_field_types
from hf_adaptive_sparse.methods.one_shot import OneShotConfig


@dataclass
class Config:
    name: str = "dense"
    part: float | None = 0.5
    count: int = 3
    loud: bool = False
    others: list[int] = field(default_factory=list)


@pytest.mark.parametrize("settings", [
    {}, {"name": ""}, {"part": None}, {"part": 1}, {"part": 0.25}, {"count": 0}, {"loud": True}, {"others": "anything"},
], ids=str)  # fmt: skip
def test_what_the_annotations_allow_is_accepted(settings):
    check_field_types(Config(**settings))


@pytest.mark.parametrize("settings, message", [
    ({"name": ["a", "b"]}, "name is a string, got ['a', 'b']. Write 'a,b'."),
    ({"name": None}, "name is a string, got None. Leave it out for 'dense'."),
    ({"name": 24}, "name is a string, got 24. Leave it out for 'dense'."),
    ({"part": "0.5"}, "part is a number, got '0.5'. Write 0.5."),
    ({"part": "half"}, "part is a number, got 'half'. Leave it out for 0.5."),
    ({"part": True}, "part is a number, got True. Leave it out for 0.5."),
    ({"part": torch.tensor(0.25)}, "part is a number, got tensor(0.2500). Write 0.25."),
    ({"count": 2.5}, "count is a whole number, got 2.5. Write 2 or 3."),
    ({"count": 2.0}, "count is a whole number, got 2.0. Write 2."),
    ({"count": "4"}, "count is a whole number, got '4'. Write 4."),
    ({"count": float("inf")}, "count is a whole number, got inf. Leave it out for 3."),
    ({"count": None}, "count is a whole number, got None. Leave it out for 3."),
    ({"loud": 1}, "loud is True or False, got 1. Leave it out for False."),
])  # fmt: skip
def test_a_value_of_another_type_is_refused_with_what_was_meant(settings, message):
    with pytest.raises(ConfigError) as error:
        check_field_types(Config(**settings))
    assert str(error.value) == message


def test_fields_can_be_left_out():
    check_field_types(Config(part="half"), but=("part",))


@pytest.mark.parametrize("settings, message", [
    ({"sparsity": "0.5", "pattern": "unstructured"}, "sparsity is a number, got '0.5'. Write 0.5."),
    ({"pattern": "mixed", "levels": ["dense", "2:4"]}, "levels is a string, got ['dense', '2:4']. Write 'dense,2:4'."),
    ({"refine_iterations": 2.5}, "refine_iterations is a whole number, got 2.5. Write 2 or 3."),
    ({"pattern": (2, 4)}, "unknown pattern (2, 4); known: 2:4, 1:4, 4:8, unstructured, or any n:m such as '2:8'."),
    ({"pattern": ["2:4"]}, "unknown pattern ['2:4']; known: 2:4, 1:4, 4:8, unstructured, or any n:m such as '2:8'."),
    ({"bits": None}, "bits is a whole number, got None. Leave it out for 0."),
])  # fmt: skip
def test_one_shot_settings_of_another_type_are_refused(settings, message):
    with pytest.raises(ConfigError) as error:
        OneShotConfig(**settings)
    assert str(error.value) == message
