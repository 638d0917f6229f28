"""The text of the demo: the source code of the standard library of the interpreter that runs it.

Every machine with Python has this text, so nothing is downloaded and nothing is shipped. One file is one
document. Only packages that exist in Python 3.10 to 3.13 under the same name are used; tables of data, such
as codecs and entities, and what distributions package apart, such as tests and tkinter, are left out. Python
versions differ a little in this text: `documents_digest` says which one a figure is about.
"""

from __future__ import annotations

import hashlib
import sysconfig
import tokenize
from collections.abc import Iterable
from pathlib import Path

from ..errors import ConfigError, DataError

SPLITS = ("train", "heldout")

PACKAGES = tuple(
    """
        __future__ _aix_support _collections_abc _compression _markupbase _osx_support _py_abc _pydecimal
    _pyio     _sitebuiltins _strptime _threading_local _weakrefset abc argparse ast asyncio base64 bdb
    bisect bz2 cProfile     calendar cmd code codecs codeop collections colorsys compileall concurrent
    configparser contextlib copy copyreg     csv ctypes curses dataclasses dbm difflib dis doctest email
    enum filecmp fileinput fnmatch fractions ftplib     functools genericpath getopt getpass gettext glob
    graphlib gzip hashlib heapq hmac http imaplib importlib inspect     io ipaddress json linecache logging
    lzma mailbox mimetypes modulefinder multiprocessing netrc ntpath nturl2path     numbers operator
    optparse os pathlib pdb pickle pickletools pkgutil platform plistlib poplib posixpath pprint     profile
    pstats pty py_compile pyclbr pydoc queue quopri random reprlib rlcompleter runpy sched secrets selectors
    shelve shlex shutil signal site smtplib socket socketserver sqlite3 ssl stat statistics string
    subprocess symtable     sysconfig tabnanny tarfile tempfile textwrap threading timeit tokenize trace
    traceback tracemalloc tty types     typing unittest urllib uuid warnings wave weakref webbrowser wsgiref
    xml xmlrpc zipapp zipfile zipimport zoneinfo
    """.split()
)

_HELDOUT_BELOW = 20  # of 256 values of the first byte of the hash
_FEWEST_PACKAGES = 120  # a trimmed installation may lack a few; one without source files lacks nearly all


def split_of(package: str) -> str:
    """`train` or `heldout`, from the hash of the name of a top-level package: the same on every machine.

    The unit is the top-level package, not the file, because files of one package share much of their text and
    move about between Python versions (`pathlib.py` became `pathlib/_local.py`).
    """
    first_byte = hashlib.sha256(package.encode()).digest()[0]
    return "heldout" if first_byte < _HELDOUT_BELOW else "train"


def demo_files(split: str, stdlib: Path | None = None) -> list[Path]:
    """The source files of one split, ordered by their path inside the standard library.

    Args:
        split: `train` or `heldout`.
        stdlib: folder of a standard library (default: that of the running interpreter).
    Raises:
        ConfigError: an unknown split.
        DataError: the folder holds no standard library with its source files.
    """
    if split not in SPLITS:
        raise ConfigError(f"unknown split {split!r} of the demo text; known: {', '.join(SPLITS)}.")
    stdlib = Path(sysconfig.get_paths()["stdlib"]) if stdlib is None else stdlib
    found = {package: _package_files(stdlib, package) for package in PACKAGES}
    present = sum(map(bool, found.values()))
    if present < _FEWEST_PACKAGES:
        raise DataError(
            f"{stdlib}: the demo reads the source files of Python's standard library, and found those of "
            f"{present} of {len(PACKAGES)} packages. Run it with a Python that has its .py files: those from "
            f"python.org, conda, uv and apt have them."
        )
    files = [path for package, paths in found.items() if split_of(package) == split for path in paths]
    return sorted(files, key=lambda path: path.relative_to(stdlib).as_posix())


def demo_documents(split: str, stdlib: Path | None = None) -> list[str]:
    """The text of one split, one document for each source file, in the order of `demo_files`.

    A package belongs to one split as a whole, so no held-out file was seen in training.
    """
    documents = []
    for path in demo_files(split, stdlib):
        with tokenize.open(path) as source:  # honours the coding line; line ends become \n
            text = source.read().strip()
        if text:
            documents.append(text)
    return documents


def documents_digest(documents: Iterable[str]) -> str:
    """sha256 over documents, with their borders: names the exact text that a figure was measured on."""
    digest = hashlib.sha256()
    for document in documents:
        encoded = document.encode()
        digest.update(len(encoded).to_bytes(8, "little"))
        digest.update(encoded)
    return digest.hexdigest()


def _package_files(stdlib: Path, package: str) -> list[Path]:
    module = stdlib / f"{package}.py"
    if module.is_file():
        return [module]
    folder = stdlib / package
    return [
        path
        for path in folder.rglob("*.py")
        if not any(part.startswith("test") for part in path.relative_to(folder).parts[:-1])
    ]
