"""Targets that workers load as `"toys:NAME"`; the seconds that they report are made up, so that tests know them."""

from __future__ import annotations

import itertools
import sys

import torch

from lightning_accel._worker import Workloads


def counting(start: int = 0) -> Workloads:
    """Reports 1, 2, 3, ... seconds for "first", always `start` for "second"."""
    numbers = itertools.count(1)
    return {"first": lambda: float(next(numbers)), "second": lambda: float(start)}


def threads() -> Workloads:
    """Reports the number of threads."""
    return {"threads": lambda: float(torch.get_num_threads())}


def talkative() -> Workloads:
    """Prints more than a pipe holds, to both streams, while loading and while running."""

    def talk() -> float:
        print("x" * 300_000)
        print("y" * 300_000, file=sys.stderr)
        return 1.0

    talk()
    return {"talk": talk}


def hungry() -> Workloads:
    """Holds 300 MB."""
    held = torch.ones(75_000_000)
    return {"sum": lambda: float(held[0])}


def broken() -> Workloads:
    """Fails while loading."""
    raise LookupError("no weights of that name")


def failing() -> Workloads:
    """Fails at the second run."""
    runs = iter([1.0])
    return {"work": lambda: next(runs)}
