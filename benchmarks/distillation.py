"""What distillation gains in quality: students of trained teachers, on real data, against the same student without.

    python benchmarks/real_data.py                            # downloads, once
    python benchmarks/distillation.py --out out/distillation  # all tasks, seeds 0-2; stop it and start it again
    python benchmarks/distillation.py --out out/distillation --report
    python benchmarks/distillation.py --out out/quick --quick

A teacher is fine-tuned for each seed. Students start from its layers and slices (`student_from`); cells of a seed share
start, batches, their order, steps and random numbers. `none` learns from labels alone. Each method has the same tuning
budget: seed 0 is trained at each learning rate of the task, and the best on the validation split is used for all seeds.
Scores are of a test split that nothing was chosen on. A finished cell is a JSON file with every example's score.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from pathlib import Path
from statistics import mean
from typing import Any

import lightning.pytorch as pl
import quality_tasks as q
import torch
from quality import fit, fit_on, size
from quality_report import paired
from quality_tasks import Settings, scores
from torch import nn
from torch.utils.data import DataLoader

from lightning_accel import Distillation, DistillConfig, Keyed, TeacherCache, layer_map, student_from
from lightning_accel.measure import machine, versions

METHODS = ("none", "logits", "logits + hidden", "cached")


@dataclass(frozen=True)
class Task:
    """A teacher, a student of it, and how both are trained.

    Args:
        of: the task of `quality_tasks.py` that gives the teacher, its data and its settings.
        student: from the fine-tuned teacher.
        rates: peak learning rates that each method may choose from.
        network: where the layers of `layer_map` are, below teacher and student.
    """

    title: str
    of: str
    student: Callable[[Any], nn.Module]
    epochs: int
    rates: tuple[float, ...]
    config: DistillConfig
    network: str = ""
    top_k: int = 32
    methods: tuple[str, ...] = METHODS


def minilm_student(layers: int, width: float | None) -> Callable[[Any], nn.Module]:
    """A classifier around a smaller encoder, with the teacher's last layer where its width allows it."""

    def make(teacher: Any) -> nn.Module:
        from real_models import Classifier

        encoder = student_from(teacher.encoder, layers=layers, **({} if width is None else {"width": width}))
        student = Classifier(encoder, teacher.classifier.out_features)
        if width is None:
            student.classifier.load_state_dict(teacher.classifier.state_dict())
        return student

    return make


def smollm2_student(teacher: Any) -> nn.Module:
    """34.6 M parameters of 134.5 M: ten layers of thirty, two thirds of the width."""
    return student_from(teacher, layers=10, width=2 / 3)


TASKS = {
    "minilm-3": Task("MiniLM of 3 layers, WordNet glosses", "minilm", minilm_student(3, None), 3, (1e-4, 3e-4, 1e-3),
                     DistillConfig(temperature=2.0, alpha=0.7), "encoder", top_k=8),
    "minilm-2-half": Task("MiniLM of 2 layers, half as wide, WordNet glosses", "minilm", minilm_student(2, 0.5), 3,
                          (3e-4, 1e-3, 2e-3), DistillConfig(temperature=2.0, alpha=0.7), "encoder", top_k=8),
    "smollm2-quarter": Task("a quarter of SmolLM2-135M, Brown corpus", "smollm2", smollm2_student, 1,
                            (3e-4, 1e-3), DistillConfig(temperature=1.0, alpha=0.7), "model", methods=METHODS[:3]),
}  # fmt: skip


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


def cells(tasks: list[str], seeds: list[int]) -> Iterator[Cell]:
    """All cells: of seed 0 each method at each rate, then the other seeds."""
    for name in tasks:
        yield from (Cell(name, method, 0, lr) for method in TASKS[name].methods for lr in TASKS[name].rates)
    for seed in (seed for seed in seeds if seed):
        yield from (Cell(name, method, seed) for name in tasks for method in TASKS[name].methods)


def chosen(task: str, method: str, out: Path) -> dict[str, Any]:
    """The cell of seed 0 that is best on the validation split."""
    tried = [Cell(task, method, 0, lr).path(out) for lr in TASKS[task].rates]
    found = [json.loads(path.read_text()) for path in tried if path.exists()]
    sign = -1 if q.TASKS[TASKS[task].of].loss else 1
    return max(found, key=lambda cell: sign * mean(cell["validation"])) if found else {}


# --- a cell -----------------------------------------------------------------------------------------------------------


def settings_of(task: Task, quick: bool) -> Settings:
    """Of the teacher's task."""
    return q.TASKS[task.of].quick if quick else q.TASKS[task.of].settings


@lru_cache(1)
def load(name: str, settings: Settings) -> q.Data:
    """Data of a task of `quality_tasks.py`."""
    return q.TASKS[name].load(settings)


def teacher_of(task: Task, seed: int, settings: Settings, out: Path) -> nn.Module:
    """The fine-tuned teacher of a seed, trained where it is not there yet."""
    pl.seed_everything(seed, verbose=False)
    of, path = q.TASKS[task.of], out / "teachers" / f"{task.of}-{seed}.pt"
    model = of.build().eval()
    if path.exists():
        model.load_state_dict(torch.load(path))
        return model
    fit(model, settings, load(task.of, settings), seed)
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(model.state_dict(), path.with_suffix(".part"))
    path.with_suffix(".part").rename(path)
    return model.eval()


def run(cell: Cell, task: Task, settings: Settings, out: Path) -> dict[str, Any]:
    """Trains and scores one student."""
    started = time.perf_counter()
    of = q.TASKS[task.of]
    data = load(task.of, settings)
    teacher = teacher_of(task, cell.seed, settings, out)
    pl.seed_everything(cell.seed, verbose=False)
    student = task.student(teacher)
    lr = cell.lr if cell.lr is not None else chosen(cell.task, cell.method, out)["lr"]
    training = replace(settings, epochs=task.epochs, lr=lr)
    if task.of == "minilm":
        examples: Any = q.gloss_examples(settings)[0]
        order = q.pools(examples, cell.seed, training)
        examples = Keyed(examples) if cell.method == "cached" else examples
        loader = DataLoader(examples, batch_sampler=order, collate_fn=q.collate)
    else:
        examples, loader = None, DataLoader(of.load(training).train(cell.seed), batch_size=None)
    callbacks = [] if cell.method == "none" else [distillation(cell, task, student, teacher, examples, out)]
    fit_on(student, training, loader, cell.seed, *callbacks)
    found: dict[str, Any] = {"lr": lr, "bytes": size(student), "teacher_bytes": size(teacher)}
    for part, batches in (("validation", data.validation), ("scores", data.test)):
        found[part] = [round(score, 6) for score in scores(of, student, batches).tolist()]
        found[f"teacher {part}"] = scores(of, teacher, batches).mean().item()
    return found | {"seconds": time.perf_counter() - started}


def distillation(
    cell: Cell, task: Task, student: nn.Module, teacher: nn.Module, examples: Any, out: Path
) -> Distillation:
    """The callback of a method."""
    config = task.config
    if cell.method == "logits + hidden":
        parts = (getattr(model, task.network) for model in (student, teacher))
        pairs = layer_map(*parts, "uniform")
        config = replace(config, hidden={f"{task.network}.{s}": f"{task.network}.{t}" for s, t in pairs.items()})
    if cell.method == "cached":
        config = replace(config, top_k=task.top_k)
        folder = out / "caches" / f"{task.of}-{cell.seed}"
        cache = TeacherCache.build(folder, teacher, examples, config, collate_fn=q.collate, progress=False)
        return Distillation(config, teacher=cache, student="model")
    return Distillation(config, teacher=teacher, student="model")


# --- tables -----------------------------------------------------------------------------------------------------------


def report(tasks: list[str], seeds: list[int], out: Path) -> str:
    """Markdown: a table a task, and its settings."""
    return "\n\n".join(_table(name, seeds, out) for name in tasks)


def _table(name: str, seeds: list[int], out: Path) -> str:
    task = TASKS[name]
    loss = q.TASKS[task.of].loss
    unit, scale, form = ("loss/token", 1, ".4f") if loss else ("accuracy %", 100, ".2f")
    heads = [task.title, unit, "gain over none, 95 %", "of each seed", "learning rate", "bytes of the teacher's", "s"]
    lines = ["| " + " | ".join(heads) + " |", "|---" * len(heads) + "|"]
    found = {m: {s: c for s in seeds if (c := _cell(name, m, s, out))} for m in task.methods}
    control = found["none"]
    if control:
        teachers = [c["teacher scores"] for c in control.values()]
        lines.append(f"| teacher | {scale * mean(teachers):{form}} | | {_each(teachers, scale, form)} | | 1 | |")
    for method, saved in found.items():
        common = sorted(saved.keys() & control.keys())
        if not common:
            lines.append(f"| {method} | not run |{' |' * (len(heads) - 2)}")
            continue
        ours, theirs = (torch.tensor([cells_[s]["scores"] for s in common]) for cells_ in (saved, control))
        gains = (theirs - ours) if loss else (ours - theirs)
        middle, half = paired(gains.double())
        cell = saved[common[0]]
        row = [method, f"{scale * ours.mean():{form}}"]
        row += ["", _each(ours.mean(1).tolist(), scale, form)] if method == "none" else [
            f"{scale * middle:+{form}} ± {scale * half:{form}}", _each(gains.mean(1).tolist(), scale, "+" + form)
        ]  # fmt: skip
        row += [f"{cell['lr']:g}", f"{cell['bytes'] / cell['teacher_bytes']:.3f}"]
        row += [f"{mean(c['seconds'] for c in saved.values()):.0f}"]
        lines.append("| " + " | ".join(row) + " |")
    for cell in list(control.values())[:1]:
        about = {"epochs": task.epochs, "rates": task.rates, "distillation": str(task.config), **cell["settings"]}
        lines += ["", json.dumps(about, default=str), "", json.dumps({k: cell[k] for k in ("machine", "versions")})]
    return "\n".join(lines)


def _each(values: list[float], scale: int, form: str) -> str:
    return ", ".join(f"{scale * value:{form}}" for value in values)


def _cell(task: str, method: str, seed: int, out: Path) -> dict[str, Any]:
    if seed == 0:
        return chosen(task, method, out)
    path = Cell(task, method, seed).path(out)
    return json.loads(path.read_text()) if path.exists() else {}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("out/distillation"))
    parser.add_argument("--tasks", nargs="+", choices=list(TASKS), default=list(TASKS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--quick", action="store_true", help="a few steps of each, for CI; the figures mean nothing")
    parser.add_argument("--report", action="store_true", help="only prints the tables of what is finished")
    options = parser.parse_args()
    warnings.filterwarnings("ignore", module="lightning|torch|copyreg")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    if options.quick:
        TASKS.update({name: replace(task, epochs=1, rates=task.rates[:1]) for name, task in TASKS.items()})
    if not options.report:
        run_all(options.tasks, options.seeds, options.out, options.quick)
    print(report(options.tasks, options.seeds, options.out))


def run_all(tasks: list[str], seeds: list[int], out: Path, quick: bool) -> None:
    """Runs and saves all cells that are not there yet."""
    for cell in cells(tasks, seeds):
        path = cell.path(out)
        if path.exists():
            continue
        task = TASKS[cell.task]
        settings = settings_of(task, quick)
        print(f"{time.strftime('%H:%M:%S')} {cell}", flush=True)
        found = run(cell, task, settings, out)
        print(f"         {mean(found['scores']):.4f}, {found['seconds']:.0f} s", flush=True)
        about = {"settings": asdict(settings), "machine": machine(), "versions": versions(),
                 "command": " ".join(sys.argv)}  # fmt: skip
        path.parent.mkdir(parents=True, exist_ok=True)
        path.with_suffix(".part").write_text(json.dumps(asdict(cell) | found | about))
        path.with_suffix(".part").rename(path)


if __name__ == "__main__":
    main()
