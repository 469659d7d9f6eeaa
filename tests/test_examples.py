"""Examples in docstrings, the README and the documentation do what they show."""

from __future__ import annotations

import doctest
import importlib
import pkgutil
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

import lightning_accel

ROOT = Path(__file__).parent.parent
FENCE = re.compile(r"^(?P<indent> *)```(?P<language>\w*).*?\n(?P<code>.*?)^(?P=indent)```", re.MULTILINE | re.DOTALL)
NOT_RUN = re.compile(r"<!-- not run: \S.* -->")


@dataclass(frozen=True)
class Block:
    """A fenced block of Python in a Markdown file."""

    file: Path
    line: int
    code: str
    runs: bool

    def __str__(self) -> str:
        return f"{self.file.name}:{self.line}"


def blocks(file: Path) -> Iterator[Block]:
    """The Python blocks of a file; one runs unless the line before says `<!-- not run: reason -->`."""
    text = file.read_text()
    for match in FENCE.finditer(text):
        if match["language"] in ("python", "py"):
            before = text[: match.start()].splitlines()
            runs = not (before and NOT_RUN.fullmatch(before[-1].strip()))
            code = "\n".join(line.removeprefix(match["indent"]) for line in match["code"].splitlines())
            yield Block(file, len(before) + 1, code, runs)


def documents() -> list[Path]:
    """README.md and docs/, whichever are there."""
    return [file for file in (ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))) if file.is_file()]


BLOCKS = [block for file in documents() for block in blocks(file)]
MODULES = sorted(
    module.name
    for module in pkgutil.walk_packages(lightning_accel.__path__, f"{lightning_accel.__name__}.")
    if not module.name.endswith("_worker")
)


@pytest.mark.parametrize("name", MODULES)
def test_docstring_examples_give_what_they_show(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    result = doctest.testmod(importlib.import_module(name), optionflags=doctest.NORMALIZE_WHITESPACE)
    assert result.failed == 0, f"{result.failed} of {result.attempted} examples in {name}; see the output above"


@pytest.mark.parametrize("block", [block for block in BLOCKS if block.runs], ids=str)
@pytest.mark.filterwarnings("ignore")
def test_blocks_of_the_documentation_run(block, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    code = "\n" * block.line + block.code  # so that a traceback shows the file's own line numbers
    exec(compile(code, str(block.file), "exec"), {"__name__": "__main__"})


def test_every_public_name_has_an_example():
    without = {name for name in lightning_accel.__all__ if ">>>" not in getattr(lightning_accel, name).__doc__}
    assert without == {"ArtifactError", "DriftError", "ExportError"}


def test_a_block_is_left_out_only_with_a_reason(tmp_path):
    text = (
        "```python\na = 1\n```\n\n<!-- not run: takes an hour -->\n```python\nb = 2\n```\n\n<!-- not run: -->\n"
        "```python\nc = 3\n```\n```sh\nd\n```\n1. in a list\n\n   ```python\n   if True:\n       e = 5\n   ```\n"
    )
    (tmp_path / "page.md").write_text(text)
    found = [(block.line, block.code, block.runs) for block in blocks(tmp_path / "page.md")]
    assert found == [(1, "a = 1", True), (6, "b = 2", False), (11, "c = 3", True), (19, "if True:\n    e = 5", True)]
