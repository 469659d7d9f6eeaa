"""The tables and the plot of `pruning.py`."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from pruning_tasks import DENSE, FRESH, Task
from quality_report import paired
from torch import Tensor

Found = Mapping[tuple[str, float, int], dict[str, Any]]  # variant, amount, seed -> cell
Latency = dict[str, Any]


def report(task: Task, found: Found, latency: Latency | None, loss: bool) -> str:
    """Markdown: a row for each amount and variant, what the intervals say, settings and machine."""
    unit, scale, form = ("loss/token", 1, ".4f") if loss else ("accuracy %", 100, ".2f")
    heads = [task.title, "parameters", "FLOPs", *(["at the start"] if task.cut_first else []), unit, "of each seed"]
    heads += ["to dense, 95 %", "to its control, 95 %", *(["latency ms (x dense)"] if task.latency else []), "lr", "s"]
    lines = ["| " + " | ".join(heads) + " |", "|---" * len(heads) + "|"]
    said: list[str] = []
    rows = [(DENSE, task.middle), *((v, a) for a in task.amounts for v in task.variants if v != DENSE)]
    for variant, amount in rows:
        cells = {seed: cell for (v, a, seed), cell in sorted(found.items()) if (v, a) == (variant, amount)}
        title = DENSE if variant == DENSE else f"{variant}, {amount:.0%} gone"
        if not cells:
            lines.append(f"| {title} | not run |{' |' * (len(heads) - 2)}")
            continue
        first, ours = next(iter(cells.values())), _scores(cells)
        row = [title, *(f"{first['left'][x] / first['dense'][x]:.1%}" for x in ("parameters", "flops"))]
        row += [f"{scale * mean(first['start']):{form}}"] if task.cut_first else []
        row += [f"{scale * ours.mean():{form}}", ", ".join(f"{scale * x:{form}}" for x in ours.mean(1).tolist())]
        row.append("" if variant == DENSE else _gain(found, variant, amount, DENSE, task, scale, form)[0])
        text, (middle, half) = _gain(found, variant, amount, control_of(task, variant), task, scale, form)
        row.append(text)
        row += [_time(latency, variant, amount, cells)] if task.latency else []
        row += [f"{first['lr']:g}", f"{mean(c['seconds'] for c in cells.values()):.0f}"]
        lines.append("| " + " | ".join(row) + " |")
        if text:
            better = (-1 if loss else 1) * scale * middle
            verb = "beats" if better - scale * half > 0 else "**does not beat**"
            said.append(f"- {title}: {verb} {control_of(task, variant)} ({text}).")
    for cell in list(found.values())[:1]:
        about = {"schedule": str(task.schedule), "distillation": str(task.distillation), "rates": task.rates}
        lines += ["", *said, "", f"{len(cell['scores']):,} held-out examples. A single seed's interval is for that "
                  "model only.", "", json.dumps(about | cell["settings"], default=str), ""]  # fmt: skip
        lines.append(json.dumps({k: cell[k] for k in ("machine", "versions")}))
    if latency is not None:
        lines += ["", "Latency: int8 artifact, 1 thread, one interleaved run; " + json.dumps(latency["machine"])]
    return "\n".join(lines)


def control_of(task: Task, variant: str) -> str | None:
    """What a variant has to beat: the random saliency, or its own shape from random weights."""
    if variant == DENSE or variant == task.against or variant.endswith(FRESH):
        return None
    return task.against or f"{variant}{FRESH}"


def _gain(
    found: Found, variant: str, amount: float, control: str | None, task: Task, scale: int, form: str
) -> tuple[str, tuple[float, float]]:
    """The paired difference to a control over the seeds that both have, in words and as mean and half interval."""
    at = task.middle if control == DENSE else amount
    seeds = [s for v, a, s in sorted(found) if (v, a) == (variant, amount) and (control, at, s) in found]
    if control is None or not seeds:
        return "", (0.0, 0.0)
    ours, theirs = (_scores({s: found[v, a, s] for s in seeds}) for v, a in ((variant, amount), (control, at)))
    middle, half = paired(ours - theirs)
    return f"{scale * middle:+{form}} ± {scale * half:{form}}", (middle, half)


def _time(latency: Latency | None, variant: str, amount: float, cells: Mapping[int, dict[str, Any]]) -> str:
    if latency is None:
        return "not measured"
    measured = latency["amounts"].get("0" if variant == DENSE else f"{amount:g}")
    if measured is None:
        return "not measured"
    if any(cell["shapes"] != measured["shapes"] for cell in cells.values()):
        raise SystemExit(f"{variant}, {amount:g}: its shapes are not those whose latency was measured; remove latency/")
    ratio = latency["amounts"]["0"]["median"] / measured["median"]
    return f"{1e3 * measured['median']:.2f} ({ratio:.2f})"


def _scores(cells: Mapping[int, dict[str, Any]]) -> Tensor:
    """Scores [seeds, examples]."""
    return torch.tensor([cell["scores"] for _, cell in sorted(cells.items())], dtype=torch.float64)


def plot(task: Task, found: Found, latency: Latency, path: Path) -> None:
    """Accuracy against latency over that of the dense artifact, a line for each saliency; bars are ± the 95 % interval
    of the paired difference to dense."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    dense = latency["amounts"]["0"]["median"]
    for variant in task.variants:
        points = []
        for amount in task.amounts if variant != DENSE else (task.middle,):
            cells = {s: c for (v, a, s), c in found.items() if (v, a) == (variant, amount)}
            measured = latency["amounts"].get("0" if variant == DENSE else f"{amount:g}")
            if cells and measured:
                half = 0.0 if variant == DENSE else _gain(found, variant, amount, DENSE, task, 1, ".4f")[1][1]
                points.append((measured["median"] / dense, 100 * _scores(cells).mean().item(), 100 * half))
        if points:
            x, y, half = zip(*sorted(points), strict=True)
            axes.errorbar(x, y, half, label=variant, marker="o", capsize=2)
    axes.set(xlabel="latency over the dense int8 artifact, 1 thread", ylabel="accuracy %", title=task.title)
    axes.legend()
    figure.savefig(path, dpi=150)
