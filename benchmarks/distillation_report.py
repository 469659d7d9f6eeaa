"""The tables of `distillation.py`: paired gains over the control, with 95 % intervals."""

from __future__ import annotations

import json
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from distillation_cells import Cell, chosen, rates
from distillation_tasks import DRAWN, WER, Task, Unit
from quality_report import paired

Saved = dict[int, dict[str, Any]]  # seed -> cell as saved

WORST = 3  # clips of 140
GOAL = 0.005  # of the loss of training with a live teacher, that from a cache may end apart


def report(tasks: dict[str, Task], seeds: list[int], out: Path) -> str:
    """Markdown: a table a task, and its settings."""
    return "\n\n".join(_table(name, task, seeds, out) for name, task in tasks.items())


def _table(name: str, task: Task, seeds: list[int], out: Path) -> str:
    unit = task.source.unit
    picked = {method: chosen(name, task, method, out) for method in task.methods}
    found = {method: _read(out / name, method, cell, seeds) for method, cell in picked.items()}
    control = found[task.control]
    heads = [task.title, unit.name, f"gain over {task.control}, 95 %", "beyond it", "of each seed", "learning rate",
             "bytes of the teacher's", "s of fits", "CPU s"]  # fmt: skip
    lines = ["| " + " | ".join(heads) + " |", "|---" * len(heads) + "|"]
    if some := next((saved for saved in found.values() if saved), None):
        teachers = [cell["teacher scores"] for cell in some.values()]
        lines.append(f"| teacher | {_show(mean(teachers), unit)} | | | {_each(teachers, unit)} | | 1 | | |")
    for method, saved in found.items():
        if not saved:
            lines.append(f"| {method} | not run |{' |' * (len(heads) - 2)}")
        else:
            lines.append("| " + " | ".join(_row(method, saved, control, unit, method == task.control)) + " |")
    lines += [""] + [f"{line}\n" for line in latencies(out / name)]
    lines += objectives(out / name)
    if unit is WER:
        lines += trimmed(found)
    if some:
        lines += tried(name, task, out) + spent(out / name)
        lines += _notes(task, some)
    return "\n".join(lines)


def _row(method: str, saved: Saved, control: Saved, unit: Unit, own: bool) -> list[str]:
    """Of the seeds that the control has too; before it has any, without a gain."""
    common = sorted(saved.keys() & control.keys()) or sorted(saved)
    ours = torch.tensor([saved[s]["scores"] for s in common], dtype=torch.float64)
    row = [method, _show(ours.mean().item(), unit)]
    if own or not control:
        row += ["", "", _each(ours.mean(1).tolist(), unit)]
    else:
        theirs = torch.tensor([control[s]["scores"] for s in common], dtype=torch.float64)
        gains = (theirs - ours) if unit.lower else (ours - theirs)
        middle, half = paired(gains)
        row += [f"{_show(middle, unit, '+')} ± {_show(half, unit)}", "yes" if abs(middle) > half else "no"]
        row += [_each(gains.mean(1).tolist(), unit, "+")]
    cell, cells = saved[common[0]], [saved[s] for s in common]
    row += [f"{cell['lr']:g}", f"{cell['bytes'] / cell['teacher_bytes']:.3f}"]
    return row + [f"{mean(c[name] for c in cells):.0f}" for name in ("fit_seconds", "cpu_seconds")]


def objectives(folder: Path) -> list[str]:
    """How training from a cache ends, against that with the teacher itself, of all pairs of cells."""
    found = [json.loads(path.read_text()) for path in sorted(folder.glob("seed*/*.json"))]
    live = {(cell["seed"], cell["lr"]): cell for cell in found if cell["method"] == "logits" and "objective" in cell}
    lines = []
    for method in ("cached", DRAWN):
        cells = [c for c in found if c["method"] == method and (c["seed"], c["lr"]) in live and "objective" in c]
        ratios = {(c["seed"], c["lr"]): c["objective"] / live[c["seed"], c["lr"]]["objective"] - 1 for c in cells}
        each = ", ".join(f"{ratio:+.2%} (seed {seed}, {lr:g})" for (seed, lr), ratio in ratios.items())
        within = f"within the goal of {GOAL:.1%}: {sum(abs(r) <= GOAL for r in ratios.values())} of {len(ratios)}"
        said = f"Loss at the end, of all classes, on the last tenth of the batches, {method} against logits"
        lines += [f"{said}: {each}; {within}.", ""] if ratios else []
    return lines


def trimmed(found: dict[str, Saved]) -> list[str]:
    """Means of each seed without the worst clips: a decoder that repeats itself to the end outweighs all others."""
    said = []
    for method, saved in found.items():
        kept = [sorted(cell["scores"])[:-WORST] for cell in saved.values()]
        said.append(f"{method} " + (", ".join(_show(mean(scores), WER) for scores in kept) or "not run"))
    return [f"Without the {WORST} worst clips of each cell: {'; '.join(said)}.", ""]


def tried(name: str, task: Task, out: Path) -> list[str]:
    """The mean on the validation split at each rate that a method could choose, of seed 0."""
    said = []
    for method in task.methods:
        paths = [Cell(name, method, 0, lr).path(out) for lr in rates(task, method)]
        means = [mean(json.loads(path.read_text())["validation"]) if path.exists() else None for path in paths]
        said.append(f"{method} " + ", ".join("not yet" if m is None else _show(m, task.source.unit) for m in means))
    rated = ", ".join(f"{lr:g}" for lr in task.rates)
    return [f"Validation split, seed 0, at rates of {rated}: {'; '.join(said)}.", ""]


def spent(folder: Path) -> list[str]:
    """The longest cell, and all of them."""
    seconds = [json.loads(path.read_text())["seconds"] for path in folder.glob("seed*/*.json")]
    if not seconds:
        return []
    longest, whole = max(seconds) / 60, sum(seconds) / 3600
    return [f"{len(seconds)} cells, the longest {longest:.0f} minutes, {whole:.1f} hours of a core in all.", ""]


def latencies(folder: Path) -> list[str]:
    """What `--latency` measured, a table for each number of threads."""
    return [json.loads(path.read_text())["table"] for path in sorted(folder.glob("latency-*.json"))]


def _notes(task: Task, saved: Saved) -> list[str]:
    cell = next(iter(saved.values()))
    about = {"epochs": cell["epochs"], "rates": task.rates, "distillation": cell["distillation"], **cell["settings"]}
    where = {name: cell[name] for name in ("machine", "versions")}
    return [f"{len(cell['scores']):,} test examples, seeds {sorted(saved)}.", "", json.dumps(about), "",
            json.dumps(where)]  # fmt: skip


def _show(value: float, unit: Unit, sign: str = "") -> str:
    return f"{unit.scale * value:{sign}{unit.form}}"


def _each(values: list[float], unit: Unit, sign: str = "") -> str:
    return ", ".join(_show(value, unit, sign) for value in values)


def _read(folder: Path, method: str, picked: dict[str, Any], seeds: list[int]) -> Saved:
    """The cells of a method: of seed 0 the one that was chosen."""
    found = {0: picked} if picked and 0 in seeds else {}
    for seed in (seed for seed in sorted(seeds) if seed):
        path = folder / f"seed{seed}" / f"{method.replace(' ', '')}.json"
        if path.exists():
            found[seed] = json.loads(path.read_text())
    return found
