"""Building the compiled kernel: once for all, safely, and with clear words where it cannot be done."""

from __future__ import annotations

import os
import shutil
import stat
import threading
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from hf_adaptive_sparse import kernels
from hf_adaptive_sparse.errors import ConfigError
from hf_adaptive_sparse.kernels import build, compiled
from hf_adaptive_sparse.layers import PackedLinear

from ..test_packed_linear import inputs, make_pair
from .compilers import needs_a_compiler

INSTALL = (
    "Install a C++ compiler (Debian, Ubuntu: apt install g++; macOS: xcode-select --install) or name one in CXX"
)
NO_COMPILER = f"the compiled kernel needs a C++ compiler: none of c++, g++, clang++ is in PATH. {INSTALL}."


@pytest.fixture
def fresh(tmp_path, monkeypatch):
    """A process that has built nothing, with an empty cache and a quick compiler."""
    monkeypatch.setattr(build, "FLAGS", ("-O0", *build.FLAGS[1:]))
    monkeypatch.setenv("HF_ADAPTIVE_SPARSE_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("HF_ADAPTIVE_SPARSE_KERNEL")
    monkeypatch.setattr(compiled, "_loaded", None)
    kernels._buildable.cache_clear()
    yield tmp_path
    kernels._buildable.cache_clear()


@pytest.fixture
def no_compiler(fresh, monkeypatch):
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PATH", str(fresh))


def script(folder: Path, text: str) -> str:
    folder.mkdir(exist_ok=True)
    path = folder / "fake-c++"
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return str(path)


def test_without_a_compiler_auto_warns_once_what_to_install_and_runs_in_torch(no_compiler):
    dense, packed = make_pair()
    packed.set_backend("packed", kernel="auto")
    with pytest.warns(UserWarning) as found:
        y = packed(inputs())
    assert [str(each.message) for each in found] == [
        f"packed layers run with the torch kernel, which expands every weight at every call and is slow: {NO_COMPILER} "
        f"Or load with backend='dense', which expands once. kernel='torch' asks for this kernel without a warning."
    ]
    assert torch.equal(y, dense(inputs()))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        packed(inputs())
        packed.set_backend("dense")
        packed(inputs())


def test_without_a_compiler_the_torch_kernel_is_silent_and_the_compiled_one_an_error(no_compiler):
    _, packed = make_pair()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        packed.set_backend("packed", kernel="torch")
        packed(inputs())
    with pytest.raises(ConfigError) as error:
        packed.set_backend("packed", kernel="compiled")
    assert str(error.value) == NO_COMPILER
    assert packed.kernel == "torch"


def test_a_compiler_in_cxx_that_is_not_there_is_named(fresh, monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler -x")
    with pytest.raises(ConfigError) as error:
        compiled.load()
    assert str(error.value) == (
        f"the compiled kernel needs a C++ compiler: CXX names 'no-such-compiler -x', which is not there. {INSTALL}."
    )


def test_a_compiler_that_fails_is_quoted_and_leaves_nothing(fresh, monkeypatch):
    command = script(fresh / "bin", "echo one >&2; echo 'error: no such standard' >&2; exit 1")
    monkeypatch.setenv("CXX", command)
    with pytest.raises(ConfigError) as error:
        compiled.load()
    assert str(error.value) == (
        f"the compiled kernel could not be built: {command} says 'error: no such standard'. {INSTALL}; it must know "
        f"C++17."
    )
    assert not list((fresh / "cache" / "kernels").iterdir())


def test_what_the_compiler_wrote_must_be_a_library(fresh, monkeypatch):
    command = script(fresh / "bin", 'for last; do :; done; echo "no library" > "$last"')
    monkeypatch.setenv("CXX", command)
    with pytest.raises(ConfigError) as error:
        compiled.load()
    path = build.library_path()
    assert str(error.value) == (
        f"the compiled kernel was built and cannot be loaded ({path}: file too short). If programs may not run from "
        f"{path.parent}, name another folder in HF_ADAPTIVE_SPARSE_CACHE."
    )


def test_a_cache_folder_that_cannot_be_written_is_named(fresh, monkeypatch):
    (fresh / "cache").write_text("a file")
    with pytest.raises(ConfigError) as error:
        compiled.load()
    folder = fresh / "cache" / "kernels"
    assert str(error.value) == (
        f"the compiled kernel could not be written to {folder} (Not a directory). Make the folder writable, or name "
        f"another in HF_ADAPTIVE_SPARSE_CACHE."
    )


def test_unknown_kernels_are_refused(fresh, monkeypatch):
    with pytest.raises(ConfigError) as error:
        make_pair()[1].set_backend("packed", kernel="cuda")
    assert str(error.value) == "unknown kernel 'cuda'; known: auto, compiled, torch."
    monkeypatch.setenv("HF_ADAPTIVE_SPARSE_KERNEL", "fast")
    with pytest.raises(ConfigError) as error:
        make_pair()[1](inputs())
    assert str(error.value) == "HF_ADAPTIVE_SPARSE_KERNEL is 'fast'; known: auto, compiled, torch."


def test_the_environment_says_what_auto_is(fresh, monkeypatch):
    monkeypatch.setenv("HF_ADAPTIVE_SPARSE_KERNEL", "torch")
    assert kernels.choose("auto", "cpu") == "torch" and kernels.choose("compiled", "cpu") == "compiled"
    assert kernels.choose("auto", "cuda") == "torch"


def test_the_place_in_the_cache_is_named_by_the_source(fresh, monkeypatch):
    before = build.library_path()
    assert before.parent == fresh / "cache" / "kernels"
    shutil.copytree(build.FOLDER, fresh / "cpu")
    monkeypatch.setattr(build, "FOLDER", fresh / "cpu")
    assert build.library_path() == before
    with open(fresh / "cpu" / "scalars.h", "a") as file:
        file.write("// changed\n")
    assert build.library_path() != before


def test_the_cache_folder_is_where_the_system_wants_it(fresh, monkeypatch):
    monkeypatch.delenv("HF_ADAPTIVE_SPARSE_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(fresh / "xdg"))
    assert build.cache_folder() == fresh / "xdg" / "hf_adaptive_sparse"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(fresh))
    assert build.cache_folder() == fresh / ".cache" / "hf_adaptive_sparse"


@needs_a_compiler
def test_what_was_built_is_used_again_without_a_compiler_and_what_is_damaged_is_built_again(fresh, monkeypatch):
    path = build.library_path()
    path.parent.mkdir(parents=True)
    path.write_bytes(b"")
    compiled.load()
    assert path.stat().st_size > 10_000 and [each.name for each in path.parent.iterdir()] == [path.name]
    monkeypatch.setattr(compiled, "_loaded", None)
    monkeypatch.setenv("PATH", "")
    compiled.load()


@needs_a_compiler
def test_a_library_that_multiplies_wrongly_is_refused(fresh, monkeypatch):
    shutil.copytree(build.FOLDER, fresh / "cpu")
    scalars = fresh / "cpu" / "scalars.h"
    scalars.write_text(scalars.read_text().replace("c.io_kind, sum);", "c.io_kind, sum + 1);"))
    monkeypatch.setattr(build, "FOLDER", fresh / "cpu")
    monkeypatch.setattr(build, "SOURCE", fresh / "cpu" / build.SOURCE.name)
    with pytest.raises(ConfigError, match="does not compute what it should on this machine") as error:
        compiled.load()
    assert str(build.library_path()) in str(error.value)


@needs_a_compiler
def test_several_may_build_at_once(fresh):
    # Each waits for the other between its build and the renaming.
    both, rename = threading.Barrier(2), os.replace
    with pytest.MonkeyPatch.context() as patch, ThreadPoolExecutor(2) as pool:
        patch.setattr(os, "replace", lambda *paths: both.wait(120) and None or rename(*paths))
        libraries = list(pool.map(lambda _: build.built_library(), range(2)))
    assert all(library.hf_adaptive_sparse_level() == compiled.load().level for library in libraries)
    assert [path.name for path in build.library_path().parent.iterdir()] == [build.library_path().name]


@needs_a_compiler
def test_auto_is_the_compiled_kernel_on_a_cpu(fresh, monkeypatch):
    _, packed = make_pair()
    calls = []
    monkeypatch.setitem(kernels.KERNELS, "compiled", lambda *a: calls.append(1) or compiled.linear(*a))
    assert type(packed) is PackedLinear and packed.kernel == "auto"
    packed(inputs())
    assert calls == [1]
