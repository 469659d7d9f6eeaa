"""The cells of `distillation.py`: a student each, where it is saved, and the learning rate that was chosen for it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Any

from distillation_tasks import Task


@dataclass(frozen=True)
class Cell:
    """One student; `lr` is `None` for the rate that was chosen."""

    task: str
    method: str
    seed: int
    lr: float | None = None

    def path(self, out: Path) -> Path:
        name = self.method.replace(" ", "") + ("" if self.lr is None else f"-{self.lr:g}")
        return out / self.task / f"seed{self.seed}" / f"{name}.json"


def cells(chosen: dict[str, Task], seeds: list[int]) -> Iterator[Cell]:
    """All cells: of seed 0 each method at each rate, then the other seeds."""
    for name, task in chosen.items():
        for method in task.methods:
            yield from (Cell(name, method, 0, lr) for lr in rates(task, method))
    for seed in (seed for seed in seeds if seed):
        yield from (Cell(name, method, seed) for name, task in chosen.items() for method in task.methods)


def rates(task: Task, method: str) -> tuple[float, ...]:
    """Learning rates that the method chooses from: one where nothing is trained."""
    return task.rates if task.methods[method] else task.rates[:1]


def chosen(name: str, task: Task, method: str, out: Path) -> dict[str, Any]:
    """The cell of seed 0 that is best on the validation split, and its path; nothing before all rates were tried."""
    tried = [Cell(name, method, 0, lr).path(out) for lr in rates(task, method)]
    if not all(path.exists() for path in tried):
        return {}
    found = [json.loads(path.read_text()) | {"path": path} for path in tried]
    sign = -1 if task.source.unit.lower else 1
    return max(found, key=lambda cell: sign * mean(cell["validation"]))
