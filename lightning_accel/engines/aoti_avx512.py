"""As `aoti`, for every x86-64 CPU with AVX512-VNNI: of Intel since Cascade Lake, of AMD since Zen 4."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import aoti
from .aoti import lower, open, unusable
from .aoti_avx2 import ISA

if TYPE_CHECKING:
    from ..capture import Capture

__all__ = ["build", "lower", "open", "unusable"]

AVX512 = ("avx512_f", "avx512_bw", "avx512_cd", "avx512_dq", "avx512_vl", "avx512_vnni")
PROCESSOR = aoti.Processor("cascadelake", 512, (*ISA, *AVX512))


def build(capture: Capture, directory: Path, name: str) -> dict[str, Any]:
    """`aoti.build` for that kind of CPU, whichever compiles it."""
    return aoti.build(capture, directory, f"{name}.avx512", PROCESSOR)
