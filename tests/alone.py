"""Processes that have nothing but the installed package and a few others, as on a server."""

from __future__ import annotations

import importlib.util
import json
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

import lightning_accel

PACKAGE = Path(lightning_accel.__file__).parent
TORCH = ("torch", "torchgen", "functorch", "typing_extensions", "filelock", "sympy", "mpmath", "networkx", "jinja2")
TORCH += ("markupsafe", "fsspec")  # what torch itself needs to be imported; numpy is no part of it

START = """
import json, sys
sys.path += json.loads(sys.argv.pop(1))
import torch  # it warns that there is no numpy
import warnings
warnings.simplefilter("error")
import lightning_accel
"""


@pytest.fixture(scope="session")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The package as `pip install --no-deps` installs it, a folder for `sys.path`."""
    source, package = (tmp_path_factory.mktemp(name) for name in ("source", "package"))
    shutil.copytree(PACKAGE, source / PACKAGE.name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):  # a copy, so that the build leaves nothing in the checkout
        shutil.copy(PACKAGE.parent / name, source)
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation", "--target"]
    done = subprocess.run([*pip, package, source], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return package


def run_alone(installed: Path, folder: Path, code: str, *arguments: Any, beside: Sequence[str] = ()) -> Any:
    """What `code` prints as JSON in a process with torch, the installed package and the packages `beside` them alone.

    Args:
        folder: gets links to the packages.
        arguments: `sys.argv` from 1 on.
    """
    links = folder / "packages"
    links.mkdir()
    for name in (*TORCH, *beside):
        origin = Path(importlib.util.find_spec(name).origin)  # type: ignore[union-attr,arg-type]
        origin = origin.parent if origin.name == "__init__.py" else origin
        (links / origin.name).symlink_to(origin)
    command = [sys.executable, "-I", "-S", "-c", START + code, json.dumps([str(installed), str(links)])]
    done = subprocess.run([*command, *map(str, arguments)], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)
