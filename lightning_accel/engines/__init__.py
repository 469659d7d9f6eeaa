"""Engines: one file each, with the same few functions.

    lower(model)                          modules in the form that is fast in the engine; returns the model
    build(capture, directory, name)       writes one program into `directory`; returns its manifest entry
    unusable(entry)                       why this machine cannot run the program, or None
    open(path, entry, weights)            a function from flat inputs to flat outputs

`unusable` and `open` import torch only. The order is that of preference at load.
"""

from __future__ import annotations

import importlib
from types import ModuleType

NAMES = ("aoti", "portable")


def get(name: str) -> ModuleType:
    """The engine's module.

    Raises:
        ValueError: unknown engine.
    """
    if name not in NAMES:
        raise ValueError(f"unknown engine {name!r}; write one of {NAMES}")
    return importlib.import_module(f".{name}", __name__)
