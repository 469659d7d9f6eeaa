"""As `aoti`, for every x86-64 CPU of the last ten years: AVX2, FMA and what came with them (x86-64-v3)."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import aoti
from .aoti import open, unusable

if TYPE_CHECKING:
    import torch

    from ..capture import Capture

__all__ = ["build", "lower", "open", "unusable"]

ISA = ("avx2", "fma3", "f16c", "bmi", "bmi2", "lzcnt", "popcnt")
PROCESSOR = aoti.Processor("x86-64-v3", 256, ISA)


def lower(model: torch.nn.Module) -> torch.nn.Module:
    """`aoti.lower` for that kind of CPU."""
    return aoti.lower(model, PROCESSOR)


def build(capture: Capture, directory: Path, name: str) -> dict[str, Any]:
    """`aoti.build` for that kind of CPU, whichever compiles it."""
    return aoti.build(capture, directory, f"{name}.avx2", PROCESSOR)
