"""The method is a member of peft like any other, on every Python that we support."""

from __future__ import annotations

import copy
import importlib
import pickle
import shutil
import subprocess
import sys
from pathlib import Path

import peft
import pytest
from peft import PeftConfig
from peft.mapping import (
    PEFT_TYPE_TO_CONFIG_MAPPING,
    PEFT_TYPE_TO_PREFIX_MAPPING,
    PEFT_TYPE_TO_TUNER_MAPPING,
)
from peft.utils import PeftType

from hf_adaptive_sparse.hf import peft_registry
from hf_adaptive_sparse.hf.adapter import AdaptiveSparseConfig, AdaptiveSparseModel

REGISTRY = Path(peft_registry.__file__)

# Runs the function alone, without peft, which other interpreters do not have.
PROBE = """
import ast, copy, enum, json, pickle, sys
tree = ast.parse(open(sys.argv[1], encoding="utf-8").read())
function = next(node for node in tree.body if getattr(node, "name", "") == "extend_enum")
names = {}
exec("from __future__ import annotations\\n" + ast.unparse(function), names)

class Kind(str, enum.Enum):
    LORA = "LORA"
    IA3 = "IA3"

new = names["extend_enum"](Kind, "NEW")
assert names["extend_enum"](Kind, "NEW") is new
assert names["extend_enum"](Kind, "LORA") is Kind.LORA
assert Kind.NEW is new and Kind["NEW"] is new and Kind("NEW") is new and Kind.__members__["NEW"] is new
assert list(Kind) == [Kind.LORA, Kind.IA3, new] and len(Kind) == 3 and new in Kind
assert isinstance(new, Kind) and isinstance(new, str) and new == "NEW" and hash(new) == hash("NEW")
assert new.name == "NEW" and new.value.lower() == "new" and {new: 1}["NEW"] == 1
for spell in (repr, str):
    assert spell(new) == spell(Kind.LORA).replace("LORA", "NEW")
assert copy.copy(new) is new and copy.deepcopy(new) is new and json.dumps(new) == '"NEW"'
for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
    assert pickle.loads(pickle.dumps(new, protocol)) is new
try:
    Kind.NEW = "other"
except AttributeError:
    print("passed")
"""


def interpreter(version: str) -> str | None:
    """The path of a Python `version` ("3.10"): this one, one of pyenv, or one on the path."""
    if version == f"{sys.version_info.major}.{sys.version_info.minor}":
        return sys.executable
    installed = sorted((Path.home() / ".pyenv" / "versions").glob(f"{version}.*/bin/python"))
    return str(installed[-1]) if installed else shutil.which(f"python{version}")


@pytest.mark.parametrize("version", ["3.10", "3.11", "3.12", "3.13"])
def test_an_added_member_behaves_as_one_from_the_class_body(version):
    python = interpreter(version)
    if python is None:
        pytest.skip(f"no Python {version} on this machine")
    result = subprocess.run([python, "-c", PROBE, str(REGISTRY)], capture_output=True, text=True, timeout=60)
    assert (result.stdout, result.stderr) == ("passed\n", "")


def test_peft_finds_our_classes_under_our_name():
    """Fails when peft changes how methods are registered."""
    member = PeftType.ADAPTIVE_SPARSE
    assert member in list(PeftType) and PeftType("ADAPTIVE_SPARSE") is member
    assert PEFT_TYPE_TO_CONFIG_MAPPING[member] is AdaptiveSparseConfig
    assert PEFT_TYPE_TO_TUNER_MAPPING[member] is AdaptiveSparseModel
    # transformers takes the prefix to be this, without asking the table.
    assert PEFT_TYPE_TO_PREFIX_MAPPING[member] == member.value.lower() + "_" == AdaptiveSparseModel.prefix


def test_the_member_survives_pickle_and_deepcopy():
    config = AdaptiveSparseConfig()
    for other in (pickle.loads(pickle.dumps(config)), copy.deepcopy(config)):
        assert other == config and other.peft_type is PeftType.ADAPTIVE_SPARSE


def test_a_second_import_registers_nothing_anew():
    before = list(PeftType), dict(PEFT_TYPE_TO_CONFIG_MAPPING), dict(PEFT_TYPE_TO_TUNER_MAPPING)
    importlib.reload(peft_registry)
    peft_registry.register_method("adaptive_sparse", AdaptiveSparseConfig, AdaptiveSparseModel)
    assert (list(PeftType), PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING) == before
    with pytest.raises(KeyError):  # what the guard is there for
        peft.utils.register_peft_method(
            name="adaptive_sparse", config_cls=AdaptiveSparseConfig, model_cls=AdaptiveSparseModel
        )


def test_a_saved_config_comes_back_as_ours(tmp_path):
    config = AdaptiveSparseConfig(target_modules=["q_proj", "up_proj"], slorb_k=8, decay=0.25)
    config.save_pretrained(str(tmp_path))
    loaded = PeftConfig.from_pretrained(str(tmp_path))
    assert loaded == config and type(loaded) is AdaptiveSparseConfig
    assert loaded.target_modules == {"q_proj", "up_proj"}


def test_opening_an_adapter_without_our_import_fails_and_says_its_type(tmp_path):
    AdaptiveSparseConfig().save_pretrained(str(tmp_path))
    script = f"from peft import PeftConfig; PeftConfig.from_pretrained({str(tmp_path)!r})"
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=280)
    assert result.returncode == 1 and result.stderr.splitlines()[-1] == "KeyError: 'ADAPTIVE_SPARSE'"
