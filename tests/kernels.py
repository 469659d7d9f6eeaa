"""Kernels compiled for several kinds of CPU into small shared libraries, whose inner functions tests can call."""

from __future__ import annotations

import platform
import subprocess
from pathlib import Path

import torch

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
