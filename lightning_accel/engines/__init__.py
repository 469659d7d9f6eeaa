"""Engines: one file each, with the same few functions.

    lower(model)                          modules in the form that is fast in the engine; returns the model
    build(capture, directory, name)       writes one program into `directory`; returns its manifest entry
    unusable(entry)                       why this machine cannot run the program, or None
    open(path, entry, weights)            a function from flat inputs to flat outputs; of a decoder that keeps keys and
                                          values itself (openvino), an object whose `begin()` is one for one caller
    reference(model)                      of `FILES` only: the model with activations as the engine rounds them, or None

`unusable` and `open` of `TORCH` import torch only; the other engines' packages are extras of this one, imported where
they are needed. Loading takes one of `TORCH`, in the order in which the export named them, unless another is asked for.
`FILES` are for other runtimes, which round activations by rules of their own.
"""

from __future__ import annotations

import importlib
import importlib.util
import platform
from collections.abc import Sequence
from types import ModuleType
from typing import Any

VARIANTS = ("aoti_avx512", "aoti_avx2")  # of `aoti`, for other CPUs than the one that exports
TORCH = ("aoti", *VARIANTS, "portable")
OWN = ("aoti", "portable")  # what goes wrong there fails an export ("auto" may leave `aoti` out); others are left out
NEEDS = {  # packages that building takes, of the extra of the same name
    "onnx": ("onnx", "onnxscript", "onnxruntime"),
    "openvino": ("openvino", "onnx", "onnxscript"),
    "transformers": ("transformers", "torchao", "safetensors"),
    "gguf": ("gguf",),
}
FILES = ("transformers", "gguf")
UNTIMED = {"gguf": "not timed: llama.cpp runs it, and it is only read back here"}
NAMES = (*TORCH, *NEEDS)


def get(name: str) -> ModuleType:
    """The engine's module.

    Raises:
        ValueError: unknown engine.
    """
    if name not in NAMES:
        raise ValueError(f"unknown engine {name!r}; write one of {NAMES}")
    return importlib.import_module(f".{name}", __name__)


def reference(name: str, model: Any) -> Any:
    """A deployed model with activations as an engine of `FILES` rounds them; `None` where they are as trained."""
    return get(name).reference(model) if name in FILES else None


def not_installed(name: str) -> str | None:
    """What an engine lacks to be built here, and the command that installs it."""
    if name in VARIANTS and platform.machine() not in ("x86_64", "AMD64"):
        return f"it is compiled on x86-64 only, this is {platform.machine()}"
    if name in VARIANTS:
        lacking = sorted(set(get(name).PROCESSOR.isa) - set(get("aoti").isa()))
        return f"it is verified where it is compiled, and this CPU lacks {', '.join(lacking)}" if lacking else None
    missing = [package for package in NEEDS.get(name, ()) if importlib.util.find_spec(package) is None]
    return f"{', '.join(missing)} not installed: pip install 'lightning-accel[{name}]'" if missing else None


def chosen(engines: Sequence[str] | str) -> tuple[tuple[str, ...], dict[str, str]]:
    """The engines to build, those of torch first, and of `"auto"` the reason for each that is left out.

    Raises:
        ValueError: no, unknown, or named engines that are not installed.
    """
    if engines == "auto":
        names = [name for name in NAMES if name not in VARIANTS]
        left_out = {name: reason for name in names if (reason := not_installed(name)) is not None}
        return tuple(name for name in names if name not in left_out), left_out
    if not engines or isinstance(engines, str):
        raise ValueError(
            f"engines={engines!r} is no list of engines; write engines=('aoti', 'portable'), or 'auto' for all that "
            "are installed"
        )
    for name in engines:
        get(name)
        if (reason := not_installed(name)) is not None:
            raise ValueError(f"engines={tuple(engines)!r}: {name} cannot be built: {reason}")
    return tuple(dict.fromkeys(sorted(engines, key=lambda name: name not in TORCH))), {}
