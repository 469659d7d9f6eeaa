"""What quantization costs in quality, on trained models and real data, after training (PTQ) and in training (QAT).

    python benchmarks/real_data.py                     # downloads, once
    python benchmarks/quality.py --out out/quality     # all tasks, seeds 0-2; stop it and start it again as you like
    python benchmarks/quality.py --out out/quality --report
    python benchmarks/quality.py --out out/quick --quick

A cell is a task, a method, a scheme and a seed. Cells of a seed share initial weights, batches and their order, steps,
random numbers and, but for `Settings.taught_lr`, the learning rate: `float` trains the control, `ptq` quantizes that
control, `qat` trains again from the same start with quantization simulated, `taught` as `qat`, but by the control's
logits alone. Each is scored on the same held-out examples as the converted model, whose integer arithmetic is that of
the artifact. A finished cell is a JSON file with every example's score.
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
from pathlib import Path
from statistics import mean
from typing import Any

import lightning.pytorch as pl
import torch
from quality_report import path_of, report
from quality_tasks import TASKS, Data, Settings, Task, inputs_of, scores
from tables import config_of
from torch import nn
from torch.utils.data import DataLoader

from lightning_accel import (
    AccelModule,
    Distillation,
    DistillConfig,
    QuantizationAwareTraining,
    quantize_model,
)
from lightning_accel.measure import machine, versions
from lightning_accel.quantize import quantization_coverage
from lightning_accel.select import count_flops

TAUGHT = DistillConfig(temperature=1.0, alpha=1.0)
LEAST = 0.5  # share of FLOPs that a scheme must reach for its figures to say anything


@dataclass(frozen=True)
class Cell:
    """One training and evaluation; `scheme` is `None` for the control."""

    task: str
    method: str
    scheme: str | None
    seed: int

    def path(self, out: Path) -> Path:
        return path_of(out / self.task, self.method, self.scheme, self.seed)


def cells(tasks: list[str], seeds: list[int]) -> Iterator[Cell]:
    """All cells, a seed of all tasks before the next, each control before what depends on it."""
    for seed in seeds:
        for name in tasks:
            yield Cell(name, "float", None, seed)
            for method in TASKS[name].methods:
                yield from (Cell(name, method, scheme, seed) for scheme in TASKS[name].schemes)


def run(cell: Cell, task: Task, settings: Settings, data: Data, out: Path) -> dict[str, Any]:
    """Trains or loads, quantizes and scores; the result as it is saved."""
    started = time.perf_counter()
    pl.seed_everything(cell.seed, verbose=False)
    model = task.build().eval()
    control = Cell(cell.task, "float", None, cell.seed).path(out).with_suffix(".pt")
    found: dict[str, Any] = {}
    if cell.scheme is None:
        found["before"] = scores(task, model, data.validation).mean().item()
        flops = count_flops(model, *_arguments(data))
        found |= {"flops": flops[""], "bytes": size(model)}
        fit(model, settings, data, cell.seed)
        _save(model, control)
    else:
        found |= covered(model, cell.scheme, settings, data)
        if "unavailable" in found:
            return found
        config = config_of(cell.scheme)
        if cell.method == "ptq":
            model.load_state_dict(torch.load(control))
        else:
            callbacks: list[pl.Callback] = [QuantizationAwareTraining(config, settings.begin, module="model")]
            if cell.method == "taught":
                teacher = task.build().eval()
                teacher.load_state_dict(torch.load(control))
                callbacks.append(Distillation(TAUGHT, teacher=teacher, student="model"))
            fit(model, replace(settings, lr=settings.taught_lr or settings.lr), data, cell.seed, *callbacks)
        ranges = calibration(settings, data) if cell.method == "ptq" else None  # QAT has found its own
        model = quantize_model(model, config, calibration=ranges)
    for part, batches in (("validation", data.validation), ("scores", data.test)):
        found[part] = [round(score, 6) for score in scores(task, model, batches).tolist()]
    return found | {"seconds": time.perf_counter() - started}


def fit(model: nn.Module, settings: Settings, data: Data, seed: int, *callbacks: pl.Callback) -> None:
    """Plain Lightning over the batches of the seed, with whatever callbacks are given; trains `model` itself."""
    fit_on(model, settings, DataLoader(data.train(seed), batch_size=None), seed, *callbacks)


def fit_on(model: nn.Module, settings: Settings, loader: DataLoader, seed: int, *callbacks: pl.Callback) -> None:
    """The same over the batches of a loader."""
    pl.seed_everything(seed, verbose=False)
    model.train()  # Lightning leaves the mode as it is
    trainer = pl.Trainer(max_epochs=1, accelerator="cpu", precision=settings.precision, gradient_clip_val=1.0,
                         logger=False, enable_checkpointing=False, enable_progress_bar=False,
                         enable_model_summary=False, callbacks=list(callbacks))
    trainer.fit(AccelModule(model, lr=settings.lr), loader)
    assert trainer.global_step == len(loader)


def covered(model: nn.Module, scheme: str, settings: Settings, data: Data) -> dict[str, Any]:
    """What the scheme would quantize of the untrained model, or why the cell cannot be."""
    converted = quantize_model(model, config_of(scheme), calibration=calibration(settings, data))
    coverage = quantization_coverage(converted, count_flops(model, *_arguments(data)))
    found = {"share_of_flops": coverage.share_of_flops, "share_of_parameters": coverage.share_of_parameters,
             "bytes": size(converted), "float_bytes": size(model)}
    if (coverage.share_of_flops or 0) < LEAST:
        return {"unavailable": f"scheme reaches {coverage.share_of_flops or 0:.1%} of FLOPs", **found}
    return found


def calibration(settings: Settings, data: Data) -> list[Any]:
    """Training batches without labels; those of a seed that no cell has, so that all cells see the same."""
    return [inputs_of(batch) for batch in data.train(-1)[: settings.calibration]]


def _arguments(data: Data) -> tuple[tuple, dict[str, Any]]:
    inputs = inputs_of(data.test[-1])
    return ((), inputs) if isinstance(inputs, dict) else ((inputs,), {})


def size(model: nn.Module) -> int:
    """Bytes of parameters and buffers, each tensor once."""
    tensors = {id(t): t for t in (*model.parameters(), *model.buffers())}
    return sum(t.numel() * t.element_size() for t in tensors.values())


def _save(model: nn.Module, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(model.state_dict(), path.with_suffix(".part"))
    path.with_suffix(".part").rename(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("out/quality"))
    parser.add_argument("--tasks", nargs="+", choices=list(TASKS), default=list(TASKS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--quick", action="store_true", help="a few steps of each, for CI; the figures mean nothing")
    parser.add_argument("--report", action="store_true", help="only prints the tables of what is finished")
    options = parser.parse_args()
    warnings.filterwarnings("ignore", module="lightning|torch|copyreg")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    if not options.report:
        run_all(options.tasks, options.seeds, options.out, options.quick)
    print(report(options.out, {name: TASKS[name] for name in options.tasks}, options.seeds))


def run_all(tasks: list[str], seeds: list[int], out: Path, quick: bool) -> None:
    """Runs and saves all cells that are not there yet."""
    loaded: dict[str, Data] = {}
    for cell in cells(tasks, seeds):
        task = TASKS[cell.task]
        settings = task.quick if quick else task.settings
        settings = settings if cell.method == "taught" else replace(settings, taught_lr=None)
        if _finished(cell, settings, out):
            continue
        if cell.task not in loaded:
            loaded = {cell.task: task.load(settings)}
        print(f"{time.strftime('%H:%M:%S')} {cell}", flush=True)
        found = run(cell, task, settings, loaded[cell.task], out)
        said = found.get("unavailable") or f"{mean(found['scores']):.4f}, {found['seconds']:.0f} s"
        print(f"         {said}", flush=True)
        about = {"settings": asdict(settings), "machine": machine(), "versions": versions(),
                 "command": " ".join(sys.argv)}
        path = cell.path(out)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.with_suffix(".part").write_text(json.dumps(asdict(cell) | found | about))
        path.with_suffix(".part").rename(path)


def _finished(cell: Cell, settings: Settings, out: Path) -> bool:
    """Whether the cell is saved, with these settings; one that was not available is tried again."""
    path = cell.path(out)
    if not path.exists():
        return False
    saved = json.loads(path.read_text())
    if "unavailable" in saved:
        return False
    if Settings(**(before := saved["settings"])) != settings:
        raise SystemExit(f"{path} was made with other settings ({before}); write another --out, or remove it")
    return True


if __name__ == "__main__":
    main()
