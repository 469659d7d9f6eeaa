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
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from pathlib import Path
from statistics import mean
from typing import Any

import lightning.pytorch as pl
import torch
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

SCHEDULE, BEGIN = Cubic(0.1, 0.6), 0.6  # of a fit that does both, as the README's example has them


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


def run(cell: Cell, task: Task, settings: Settings, out: Path) -> dict[str, Any]:
    """Trains and scores one student."""
    started = time.perf_counter()
    data = load(task, settings)
    teacher = teacher_of(task, cell.seed, settings, out)
    pl.seed_everything(cell.seed, verbose=False)
    student = task.student(teacher)
    lr = cell.lr if cell.lr is not None else chosen(cell.task, task, cell.method, out)["lr"]
    training = replace(settings, epochs=task.epochs, lr=lr)
    found: dict[str, Any] = {"lr": lr, "teacher_bytes": size(teacher)}
    fits = task.methods[cell.method]
    batches = data.order(cell.seed, training)
    if any(fit.teach == "cached" for fit in fits):
        begun = time.process_time()
        cache_of(task, teacher, data, cell.seed, out)
        found["cache_seconds"] = time.process_time() - begun  # of a cell that finds it there: only of opening it
    begun = time.perf_counter(), time.process_time()
    for i, fit in enumerate(fits):
        part = batches[i * len(batches) // len(fits) : (i + 1) * len(batches) // len(fits)]
        student = train(student, fit, task, training, teacher, data, part, cell.seed, out)
    found["fit_seconds"], found["cpu_seconds"] = time.perf_counter() - begun[0], time.process_time() - begun[1]
    if "cached" in task.methods and fits:
        found["objective"] = objective(student, teacher, task, data, batches[-max(1, len(batches) // 10) :])
    if task.example and cell.seed == 0:
        _save(student, cell.path(out).with_suffix(".pt"))
    if any(fit.quantize for fit in fits):
        student = quantize_model(student, task.quantize)
    found["bytes"] = size(student)
    for part, held_out in (("validation", data.validation), ("scores", data.test)):
        found[part] = [round(score, 6) for score in task.source.scores(student, held_out).tolist()]
    found |= teacher_scores(task, teacher, data, cell.seed, out)
    return found | {"seconds": time.perf_counter() - started}


def teacher_scores(task: Task, teacher: nn.Module, data: Examples, seed: int, out: Path) -> dict[str, float]:
    """Means of the teacher of a seed, which its first cell finds for all."""
    path = out / "teachers" / f"{task.source.name}-{seed}.json"
    if not path.exists():
        held_out = {"teacher validation": data.validation, "teacher scores": data.test}
        found = {name: task.source.scores(teacher, batches).mean().item() for name, batches in held_out.items()}
        _write(found, path)
    return json.loads(path.read_text())


def train(
    student: nn.Module, fit: Fit, task: Task, training: Settings, teacher: nn.Module, data: Examples,
    batches: list[list[int]], seed: int, out: Path,
) -> nn.Module:  # fmt: skip
    """The student after one fit, without the neurons that were pruned in it."""
    callbacks: list[pl.Callback] = []
    if fit.teach:
        callbacks.append(distillation(fit.teach, task, student, teacher, data, seed, out))
    if fit.prune:
        callbacks.append(Pruning(task.prune, SCHEDULE, module="model"))
    if fit.quantize:
        begin = BEGIN if fit.prune else 0.0  # a fit that only quantizes does so in all of its steps
        callbacks.append(QuantizationAwareTraining(task.quantize, begin, module="model"))
    fit_on(student, training, loader(data, batches, fit.teach == "cached"), seed, *callbacks)
    pruned = [callback for callback in callbacks if isinstance(callback, Pruning)]
    example = inputs_of(next(iter(loader(data, batches[:1]))))
    return shrink_model(student, pruned[0].masks, example_inputs=example) if pruned else student


@torch.no_grad()
def objective(student: nn.Module, teacher: nn.Module, task: Task, data: Examples, batches: list[list[int]]) -> float:
    """What `logits` minimizes, over all classes and in float32, on these batches: the same for all methods."""
    alpha, found = task.config.alpha, []
    student.eval()
    for batch in loader(data, batches):
        logits, targets = AccelModule(student).logits_and_targets(batch)
        answers, _ = AccelModule(teacher).logits_and_targets(batch)
        taught = distillation_loss(logits, answers, task.config.temperature, targets != -100)
        found.append((alpha * taught + (1 - alpha) * F.cross_entropy(logits, targets)).item())
    return mean(found)


def distillation(
    teach: str, task: Task, student: nn.Module, teacher: nn.Module, data: Examples, seed: int, out: Path
) -> Distillation:
    """The callback of a fit."""
    config = task.config
    if teach == "hidden":
        parts = (getattr(model, task.network) if task.network else model for model in (student, teacher))
        prefix = f"{task.network}." if task.network else ""
        pairs = layer_map(*parts, "uniform")
        config = replace(config, hidden={f"{prefix}{own}": f"{prefix}{other}" for own, other in pairs.items()})
    if teach == "cached":
        cache = cache_of(task, teacher, data, seed, out)
        return Distillation(replace(config, top_k=task.top_k), teacher=cache, student="model")
    return Distillation(config, teacher=teacher, student="model")


def cache_of(task: Task, teacher: nn.Module, data: Examples, seed: int, out: Path) -> TeacherCache:
    """The cache of the teacher of a seed, built where it is not there yet."""
    config, folder = replace(task.config, top_k=task.top_k), out / "caches" / f"{task.source.name}-{seed}"
    options = {"batch_size": 8, "collate_fn": data.collate, "progress": False}
    return TeacherCache.build(folder, teacher, Keyed(data.train), config, **options)


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
        config = str(replace(task.config, top_k=task.top_k if cell.method == "cached" else None))
        training = {"settings": asdict(settings), "epochs": task.epochs, "distillation": config}
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
