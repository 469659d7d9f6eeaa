"""The tables of `quality.py`: paired differences to the float control, with 95 % intervals."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from quality_tasks import Task
from scipy.stats import t
from tables import file_name
from torch import Tensor

LABELS = {"ptq": "PTQ", "qat": "QAT", "taught": "QAT, taught by the control"}
Saved = dict[int, dict[str, Any]]  # seed -> cell as saved


def paired(differences: Tensor) -> tuple[float, float]:
    """Mean and half the 95 % interval of `differences` [seeds, examples] between two cells of each seed.

    variance = var over examples of the mean over seeds / examples + var over seeds of the mean over examples / seeds

    The second term counts what training with another seed changes (some of the first again, so it is wide rather
    than narrow); with one seed it is left out, and the interval is for that model only. The interval is that many
    standard errors wide as Student's t has it with Satterthwaite's degrees of freedom (1946, Biometrics Bulletin 2),
    variance^2 / sum(term^2 / degrees of the term): with few seeds that differ, more than 1.96.

    >>> paired(torch.tensor([[1.0, 0.0, 0.0, 0.0]]))[0]
    0.25
    """
    seeds, examples = differences.shape
    terms = [(differences.mean(0).var().item() / examples, examples - 1)]
    if seeds > 1:
        terms.append((differences.mean(1).var().item() / seeds, seeds - 1))
    variance, spread = sum(term for term, _ in terms), sum(term**2 / degrees for term, degrees in terms)
    width = t.ppf(0.975, variance**2 / spread) if spread else 0.0
    return differences.mean().item(), width * variance**0.5


def recovered(ptq: Tensor, qat: Tensor, draws: int = 2000) -> tuple[float, float, float]:
    """Share of PTQ's increase that QAT does not have, 1 - sum(qat) / sum(ptq), and its 95 % bootstrap interval.

    Both are differences to the control [seeds, examples]; examples are drawn with replacement, the same for both.
    """
    generator = torch.Generator().manual_seed(0)
    picked = torch.randint(ptq.shape[1], (draws, ptq.shape[1]), generator=generator)
    shares = 1 - qat.mean(0)[picked].sum(1) / ptq.mean(0)[picked].sum(1)
    low, high = shares.quantile(torch.tensor([0.025, 0.975], dtype=shares.dtype)).tolist()
    return 1 - (qat.sum() / ptq.sum()).item(), low, high


def report(out: Path, tasks: Mapping[str, Task], seeds: list[int]) -> str:
    """Markdown: a table a task, and the settings and machine under it."""
    return "\n\n".join(_table(out / name, task, seeds) for name, task in tasks.items())


def _table(folder: Path, task: Task, seeds: list[int]) -> str:
    control = _read(folder, "float", None, seeds)
    unit, scale, form = ("loss/token", 1, ".4f") if task.loss else ("accuracy %", 100, ".2f")
    heads = [task.title, unit, "difference, 95 %", "of each seed"]
    heads += ["recovered of PTQ's loss"] * task.loss + ["FLOPs quantized", "parameters quantized", "bytes of float's"]
    lines = ["| " + " | ".join(heads) + " |", "|---" * len(heads) + "|"]
    if not control:
        return "\n".join([*lines, f"| float | not run |{' |' * (len(heads) - 2)}"])
    each = ", ".join(f"{scale * _scores(control)[i].mean():{form}}" for i in range(len(control)))
    lines.append(f"| float | {scale * _scores(control).mean():{form}} | | {each} |{' |' * (len(heads) - 4)}")
    trained: list[dict[str, Any]] = []
    for scheme in task.schemes:
        apart: dict[str, tuple[list[int], Tensor]] = {}
        for method in task.methods:
            label = f"{scheme} {LABELS[method]}"
            saved = {s: cell for s, cell in _read(folder, method, scheme, seeds).items() if s in control}
            done = {s: cell for s, cell in saved.items() if "unavailable" not in cell}
            if not done:
                why = next((cell["unavailable"] for cell in saved.values()), "not run")
                lines.append(f"| {label} | {why} |{' |' * (len(heads) - 2)}")
                continue
            trained += done.values()
            ours = _scores(done)
            differences = ours - _scores({s: control[s] for s in done})
            apart[method] = (sorted(done), differences)
            mean, half = paired(differences)
            row = [label, f"{scale * ours.mean():{form}}",
                   f"{scale * mean:+{form}} ± {scale * half:{form}}",
                   ", ".join(f"{scale * d:+{form}}" for d in differences.mean(1).tolist())]
            cell = next(iter(done.values()))
            row += [_share(apart, method)] * task.loss
            row += [f"{100 * cell['share_of_flops']:.1f} %", f"{100 * cell['share_of_parameters']:.1f} %",
                    f"{cell['bytes'] / cell['float_bytes']:.3f}"]
            lines.append("| " + " | ".join(row) + " |")
    cell = next(iter(control.values()))
    settings = dict.fromkeys(json.dumps(one["settings"]) for one in [cell, *trained])
    return "\n".join([*lines, "", *_notes(task, control), *settings, "",
                      json.dumps({"machine": cell["machine"], "versions": cell["versions"]})])


def _notes(task: Task, control: Saved) -> list[str]:
    n = len(next(iter(control.values()))["scores"])
    what = "blocks of text" if task.loss else "examples"
    cell = next(iter(control.values()))
    before, after = cell["before"], sum(cell["validation"]) / len(cell["validation"])
    return [f"{n:,} held-out {what}, seeds {sorted(control)}; on the validation split the control went from "
            f"{before:.4f} before training to {after:.4f} (seed {min(control)}).", ""]


def _share(apart: dict[str, tuple[list[int], Tensor]], method: str) -> str:
    """The share that a method recovers, once PTQ and the method were run with the same seeds."""
    if method == "ptq" or apart.get("ptq", ([], None))[0] != apart[method][0]:
        return ""
    share, low, high = recovered(apart["ptq"][1], apart[method][1])
    by_seed = (1 - apart[method][1].sum(1) / apart["ptq"][1].sum(1)).tolist()
    return f"{share:.0%} ({low:.0%} to {high:.0%}; {', '.join(f'{s:.0%}' for s in by_seed)})"


def path_of(folder: Path, method: str, scheme: str | None, seed: int) -> Path:
    """Where a cell of the task in `folder` is saved."""
    return folder / f"seed{seed}" / file_name(f"{method if scheme is None else f'{method}-{scheme}'}.json")


def _read(folder: Path, method: str, scheme: str | None, seeds: list[int]) -> Saved:
    paths = {seed: path_of(folder, method, scheme, seed) for seed in sorted(seeds)}
    return {seed: json.loads(path.read_text()) for seed, path in paths.items() if path.exists()}


def _scores(cells: Saved) -> Tensor:
    """Scores [seeds, examples]."""
    return torch.tensor([cell["scores"] for _, cell in sorted(cells.items())], dtype=torch.float64)
