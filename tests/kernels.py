"""Kernels compiled for several kinds of CPU into small shared libraries, whose inner functions tests can call."""

from __future__ import annotations

import platform
import subprocess
from pathlib import Path

import torch
from torch import Tensor

from lightning_accel.engines import aoti

X86 = platform.machine() in ("x86_64", "AMD64")
PATHS: dict[str, list[str]] = {"this machine": []}  # compiler flags
if X86:
    PATHS |= {"no AMX": ["-mno-amx-int8"], "AVX2": ["-march=x86-64-v3"], "plain": ["-march=x86-64"]}
if X86 and torch.cpu.get_capabilities()["avx_vnni"]:
    PATHS["AVX-VNNI"] = ["-march=x86-64-v3", "-mavxvnni"]


def source_of(kernel: str) -> Path:
    """The file of a kernel, to be included."""
    return aoti._KERNELS / f"{kernel}.cpp"


def compiled(code: str, path: str, directory: Path, name: str = "kernel") -> Path:
    """A shared library of C++ `code`, compiled for one of `PATHS`."""
    source, library = directory / f"{name}.cpp", directory / f"{name}.so"
    source.write_text(code)
    libraries = Path(torch.__file__).parent / "lib"
    link = ["-shared", f"-L{libraries}", f"-Wl,-rpath,{libraries}", "-ltorch_cpu"]
    flags = [*aoti.kernel_flags(), *PATHS[path]]
    subprocess.run([aoti._compiler(), *flags, str(source), *link, "-o", str(library)], check=True)
    return library


def linear_bound(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Of the difference of two float32 sums of the same exact terms: n additions round by 2^-24 of what is added up.

    `x` [..., n] and `weight` [out, n] are the rounded ones.
    """
    terms = x.abs().double() @ weight.abs().double().T + (0.0 if bias is None else bias.abs().double())
    return 2 * (x.shape[-1] + 2) * 2.0**-24 * terms + 1e-37
