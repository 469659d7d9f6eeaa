"""What distillation gains in quality: students of trained teachers, on real data, against the same student without.

    python benchmarks/real_data.py                            # downloads, once
    python benchmarks/distillation.py --out out/distillation  # all tasks, seeds 0-2; stop it and start it again
    python benchmarks/distillation.py --out out/distillation --tasks one-fit --latency  # on a quiet machine
    python benchmarks/distillation.py --out out/distillation --report
    python benchmarks/distillation.py --out out/quick --quick

Students start from the teacher's layers and slices (`student_from`) where they have some; cells of a seed share start,
batches, their order, steps and random numbers. `none` learns from labels alone. Each method has the same tuning
budget: seed 0 is trained at each learning rate of the task, and the best on the validation split is used for all seeds.
Scores are of a test split that nothing was chosen on. A finished cell is a JSON file with every example's score.

The task `one-fit` prunes, quantizes and distils in one fit, in three fits of the same total length, and each alone; its
models are scored as they are deployed, cut and in integers. `--latency` exports those of seed 0 and times them.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
import time
import warnings
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from pathlib import Path
from statistics import mean
from typing import Any

import lightning.pytorch as pl
import torch
from distillation_cells import Cell, cells, chosen
from distillation_report import report
from distillation_tasks import Examples, Fit, Task, tasks
from quality import fit_on, size
from quality_tasks import Settings, inputs_of
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

from lightning_accel import (
    AccelModule,
    Cubic,
    Distillation,
    DistillConfig,
    Keyed,
    Pruning,
    QuantizationAwareTraining,
    TeacherCache,
    distillation_loss,
    layer_map,
    quantize_model,
    shrink_model,
)
from lightning_accel.measure import machine, versions

CACHED = {"cached", "drawn"}  # ways of teaching
SCHEDULE, BEGIN = Cubic(0.1, 0.6), 0.6  # of a fit that does both, as the README's example has them


# --- a cell -----------------------------------------------------------------------------------------------------------


def settings_of(task: Task, quick: bool) -> Settings:
    """Of the teacher."""
    return task.source.quick if quick else task.source.settings


@lru_cache(1)
def _load(load: Any, settings: Settings) -> Examples:
    return load(settings)


def load(task: Task, settings: Settings) -> Examples:
    """The task's data; what was read last is kept."""
    return _load(task.source.load, settings)


def loader(data: Examples, batches: list[list[int]], keyed: bool = False) -> DataLoader:
    """These batches of the training examples, with keys for a cache."""
    examples: Any = Keyed(data.train) if keyed else data.train
    return DataLoader(examples, batch_sampler=batches, collate_fn=data.collate)


def teacher_of(task: Task, seed: int, settings: Settings, out: Path) -> nn.Module:
    """The teacher of a seed, fine-tuned where it is not there yet."""
    source = task.source
    pl.seed_everything(seed, verbose=False)
    model = source.build().eval()
    if not source.tuned:
        return model
    path = out / "teachers" / f"{source.name}-{seed}.pt"
    if path.exists():
        saved = torch.load(path)
        _check_settings(path, saved["settings"], asdict(settings))
        model.load_state_dict(saved["weights"])
        return model
    data = load(task, settings)
    fit_on(model, settings, loader(data, data.order(seed, settings)), seed)
    _save({"settings": asdict(settings), "weights": model.state_dict()}, path)
    return model.eval()


@dataclass(frozen=True)
class Lesson:
    """What the fits of a cell share."""

    task: Task
    teacher: nn.Module
    data: Examples
    seed: int
    out: Path

    def cache(self, teach: str) -> TeacherCache:
        """The teacher's cache, built where it is not there yet."""
        name = f"{self.task.source.name}-{self.seed}" + ("-drawn" if teach == "drawn" else "")
        options = {"batch_size": 8, "collate_fn": self.data.collate, "progress": False}
        return TeacherCache.build(
            self.out / "caches" / name, self.teacher, Keyed(self.data.train), config_of(self.task, teach), **options
        )


def config_of(task: Task, teach: str) -> DistillConfig:
    """What is learnt from the teacher's logits in one fit; both caches hold as many classes."""
    half = task.top_k // 2
    kept: dict[str, dict[str, Any]] = {"cached": {"top_k": task.top_k}, "drawn": {"top_k": half, "drawn": half}}
    return replace(task.config, **kept.get(teach, {}))


def run(cell: Cell, task: Task, settings: Settings, out: Path) -> dict[str, Any]:
    """Trains and scores one student."""
    started = time.perf_counter()
    data = load(task, settings)
    lesson = Lesson(task, teacher_of(task, cell.seed, settings, out), data, cell.seed, out)
    pl.seed_everything(cell.seed, verbose=False)
    student = task.student(lesson.teacher)
    lr = cell.lr if cell.lr is not None else chosen(cell.task, task, cell.method, out)["lr"]
    training = replace(settings, epochs=task.epochs, lr=lr)
    found: dict[str, Any] = {"lr": lr, "teacher_bytes": size(lesson.teacher)}
    fits = task.methods[cell.method]
    batches = data.order(cell.seed, training)
    for teach in {fit.teach for fit in fits} & CACHED:
        begun = time.process_time()
        lesson.cache(teach)
        found["cache_seconds"] = time.process_time() - begun  # of a cell that finds it there: only of opening it
    begun = time.perf_counter(), time.process_time()
    for i, fit in enumerate(fits):
        part = batches[i * len(batches) // len(fits) : (i + 1) * len(batches) // len(fits)]
        student = train(lesson, student, fit, training, part)
    found["fit_seconds"], found["cpu_seconds"] = time.perf_counter() - begun[0], time.process_time() - begun[1]
    if "cached" in task.methods and fits:
        found["objective"] = objective(lesson, student, batches[-max(1, len(batches) // 10) :])
    if task.example and cell.seed == 0:
        _save(student, cell.path(out).with_suffix(".pt"))
    if any(fit.quantize for fit in fits):
        student = quantize_model(student, task.quantize)
    found["bytes"] = size(student)
    for part, held_out in (("validation", data.validation), ("scores", data.test)):
        found[part] = [round(score, 6) for score in task.source.scores(student, held_out).tolist()]
    found |= teacher_scores(lesson)
    return found | {"seconds": time.perf_counter() - started}


def teacher_scores(lesson: Lesson) -> dict[str, float]:
    """Means of the teacher of a seed, which its first cell finds for all."""
    source, data = lesson.task.source, lesson.data
    path = lesson.out / "teachers" / f"{source.name}-{lesson.seed}.json"
    if not path.exists():
        held_out = {"teacher validation": data.validation, "teacher scores": data.test}
        found = {name: source.scores(lesson.teacher, batches).mean().item() for name, batches in held_out.items()}
        _write(found, path)
    return json.loads(path.read_text())


def train(lesson: Lesson, student: nn.Module, fit: Fit, training: Settings, batches: list[list[int]]) -> nn.Module:
    """The student after one fit, without the neurons that were pruned in it."""
    task, data = lesson.task, lesson.data
    callbacks: list[pl.Callback] = []
    if fit.teach:
        callbacks.append(distillation(lesson, student, fit.teach))
    if fit.prune:
        callbacks.append(Pruning(task.prune, SCHEDULE, module="model"))
    if fit.quantize:
        begin = BEGIN if fit.prune else 0.0  # a fit that only quantizes does so in all of its steps
        callbacks.append(QuantizationAwareTraining(task.quantize, begin, module="model"))
    fit_on(student, training, loader(data, batches, fit.teach in CACHED), lesson.seed, *callbacks)
    pruned = [callback for callback in callbacks if isinstance(callback, Pruning)]
    example = inputs_of(next(iter(loader(data, batches[:1]))))
    return shrink_model(student, pruned[0].masks, example_inputs=example) if pruned else student


@torch.no_grad()
def objective(lesson: Lesson, student: nn.Module, batches: list[list[int]]) -> float:
    """What `logits` minimizes, over all classes and in float32, on these batches: the same for all methods."""
    config, found = lesson.task.config, []
    student.eval()
    for batch in loader(lesson.data, batches):
        logits, targets = AccelModule(student).logits_and_targets(batch)
        answers, _ = AccelModule(lesson.teacher).logits_and_targets(batch)
        taught = distillation_loss(logits, answers, config.temperature, targets != -100)
        found.append((config.alpha * taught + (1 - config.alpha) * F.cross_entropy(logits, targets)).item())
    return mean(found)


def distillation(lesson: Lesson, student: nn.Module, teach: str) -> Distillation:
    """The callback of a fit."""
    task, config = lesson.task, lesson.task.config
    if teach in CACHED:
        return Distillation(config_of(task, teach), teacher=lesson.cache(teach), student="model")
    if teach == "hidden":
        parts = (getattr(model, task.network) if task.network else model for model in (student, lesson.teacher))
        prefix = f"{task.network}." if task.network else ""
        pairs = layer_map(*parts, "uniform")
        config = replace(config, hidden={f"{prefix}{own}": f"{prefix}{other}" for own, other in pairs.items()})
    return Distillation(config, teacher=lesson.teacher, student="model")


def _save(value: Any, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(value, path.with_suffix(".part"))
    path.with_suffix(".part").rename(path)


def _write(found: dict[str, Any], path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.with_suffix(".json.part").write_text(json.dumps(found))
    path.with_suffix(".json.part").rename(path)


def run_all(chosen_tasks: dict[str, Task], seeds: list[int], out: Path, quick: bool) -> None:
    """Runs and saves all cells that are not there yet."""
    for cell in cells(chosen_tasks, seeds):
        path, task = cell.path(out), chosen_tasks[cell.task]
        settings = settings_of(task, quick)
        teach = next((fit.teach for fit in task.methods[cell.method] if fit.teach), "")
        training = {"settings": asdict(settings), "epochs": task.epochs, "distillation": str(config_of(task, teach))}
        if finished(path, training):
            continue
        print(f"{time.strftime('%H:%M:%S')} {cell}", flush=True)
        found = run(cell, task, settings, out)
        print(f"         {mean(found['scores']):.4f}, {found['seconds']:.0f} s", flush=True)
        about = {"machine": machine(), "versions": versions(), "command": " ".join(sys.argv)}
        _write(asdict(cell) | found | training | about, path)


def finished(path: Path, training: dict[str, Any]) -> bool:
    """Whether the cell is saved, trained so."""
    if not path.exists():
        return False
    saved = json.loads(path.read_text())
    _check_settings(path, {name: saved[name] for name in training}, training)
    return True


def _check_settings(path: Path, before: dict[str, Any], now: dict[str, Any]) -> None:
    if before != now:
        raise SystemExit(f"{path} was made with other settings ({before}); write another --out, or remove it")


def main() -> None:
    every = tasks()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("out/distillation"))
    parser.add_argument("--tasks", nargs="+", choices=list(every), default=list(every))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--quick", action="store_true", help="a few steps of each, for CI; the figures mean nothing")
    parser.add_argument("--latency", action="store_true", help="only exports and times what is finished")
    parser.add_argument("--threads", type=int, default=1, help="of --latency")
    parser.add_argument("--report", action="store_true", help="only prints the tables of what is finished")
    options = parser.parse_args()
    warnings.filterwarnings("ignore", module="lightning|torch|copyreg")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    some = {name: every[name] for name in options.tasks}
    if options.quick:
        some = {name: replace(task, epochs=1, rates=task.rates[:1]) for name, task in some.items()}
    if options.latency:
        from distillation_latency import measure

        for name in (name for name, task in some.items() if task.example):
            measure(name, some[name], options.out, options.threads)
    elif not options.report:
        run_all(some, options.seeds, options.out, options.quick)
    print(report(some, options.seeds, options.out))


if __name__ == "__main__":
    main()
