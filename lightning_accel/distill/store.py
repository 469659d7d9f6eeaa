"""The files of a teacher's cache, mapped into memory.

    cache.json            what it is of: fingerprints of teacher, data and preprocessing; temperature, top_k, drawn,
                          layers
    keys                  int64, of each sample, with a hash of it
    logits.lengths        int32, positions of each sample, in the order of the keys
    logits.values/.indices/.tail          float32 [positions, k + drawn], int32 the same, float32 [positions]
    hidden0.lengths, hidden0.values ...   the states of a layer, in the teacher's dtype [positions, width]

Samples follow each other in the order of their keys, padding left out, so that lengths may vary. A batch is complete
once its lengths are on disk: they are written last, and what lies behind them is cut off when a build is resumed.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

FORMAT = 2


def read_manifest(directory: Path) -> dict[str, Any]:
    """What `cache.json` says.

    Raises:
        ValueError: there is none, it is damaged, or of another format.
    """
    try:
        manifest = json.loads((directory / "cache.json").read_text())
    except FileNotFoundError:
        raise ValueError(
            f"{directory} holds no cache; write TeacherCache.build({str(directory)!r}, teacher, data, config)"
        ) from None
    except ValueError as error:
        raise ValueError(
            f"{directory / 'cache.json'} is damaged ({error}); delete the directory, build again"
        ) from None
    if manifest.get("format") != FORMAT:
        raise ValueError(f"the cache {directory} has format {manifest.get('format')}, this version reads {FORMAT}")
    return manifest


def write_manifest(directory: Path, manifest: Mapping[str, Any]) -> None:
    """Replaces `cache.json` at once."""
    beside = directory / "cache.json.new"
    beside.write_text(json.dumps(manifest, indent=1))
    os.replace(beside, directory / "cache.json")


@contextmanager
def locked(directory: Path) -> Iterator[None]:
    """One process builds, the others wait; the lock goes with the process."""
    import fcntl

    with open(directory / "lock", "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


class Stream:
    """The files of one output: lengths, and parts with a row a position."""

    def __init__(self, directory: Path, index: int, spec: Mapping[str, Any]) -> None:
        self.spec = spec
        stem = "logits" if "classes" in spec else f"hidden{index}"
        self.lengths_file = directory / f"{stem}.lengths"
        self.parts = [
            (directory / f"{stem}.{name}", width, getattr(torch, dtype)) for name, width, dtype in spec["parts"]
        ]

    def files(self, lengths: Tensor) -> dict[Path, int]:
        """The size in bytes that each file must have."""
        positions = int(lengths.sum())
        sizes = {file: positions * (width or 1) * dtype.itemsize for file, width, dtype in self.parts}
        return {self.lengths_file: 4 * len(lengths)} | sizes

    def written_lengths(self) -> Tensor:
        """Lengths of the samples that are complete, int64."""
        size = self.lengths_file.stat().st_size if self.lengths_file.exists() else 0
        if size < 4:
            return torch.zeros(0, dtype=torch.int64)
        return torch.from_file(str(self.lengths_file), size=size // 4, dtype=torch.int32).long()

    def open(self, samples: int) -> None:
        """Maps the files into memory.

        Raises:
            ValueError: they are not as long as they must be.
        """
        self.lengths = self.written_lengths()
        for file, size in (self.files(self.lengths) | {self.lengths_file: 4 * samples}).items():
            check_size(file, size)
        self.starts = self.lengths.cumsum(0) - self.lengths
        self.rows = [mapped(file, width, dtype) for file, width, dtype in self.parts]

    def read(self, indices: Tensor) -> tuple[list[Tensor], Tensor]:
        """Rows of the samples, one after the other, and how many belong to each."""
        lengths = self.lengths[indices]
        before = lengths.cumsum(0) - lengths
        offset = torch.arange(int(lengths.sum())) - before.repeat_interleave(lengths)
        rows = self.starts[indices].repeat_interleave(lengths) + offset
        return [part[rows] for part in self.rows], lengths


def check_size(file: Path, size: int) -> None:
    """Raises ValueError unless the file has `size` bytes."""
    found = file.stat().st_size if file.exists() else 0
    if found != size:
        raise ValueError(
            f"the cache's {file} has {found} bytes, expected {size}: it is truncated or damaged; delete "
            f"{file.parent} and build it again"
        )


def mapped(file: Path, width: int | None, dtype: torch.dtype) -> Tensor:
    """[positions, width], or [positions] where there is no width."""
    size = file.stat().st_size // dtype.itemsize
    flat = torch.from_file(str(file), size=size, dtype=dtype) if size else torch.zeros(0, dtype=dtype)
    return flat if width is None else flat.view(-1, width)
