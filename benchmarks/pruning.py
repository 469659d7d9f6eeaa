"""What pruning costs in quality and gains in speed: trained networks, real data, several amounts and saliencies.

    python benchmarks/real_data.py                             # downloads, once
    python benchmarks/pruning.py --out out/pruning             # trains all cells; stop it and start it again
    python benchmarks/pruning.py --out out/pruning --latency   # on a quiet machine: int8 artifacts, one thread
    python benchmarks/pruning.py --out out/pruning --report    # tables, and the plot out/pruning/minilm/latency.png
    python benchmarks/pruning.py --out out/quick --quick

A cell starts from the dense network that was fine-tuned for its seed, and goes on training with that as its teacher
while `Pruning` masks what it drops; it is scored once that is cut out. `dense` trains as long, with the same teacher,
batches and random numbers. Each variant has the same tuning budget, the random saliency included: seed 0 is trained at
each learning rate of the task at the middle amount, and the best on the validation split is used for all amounts and
seeds. SmolLM2 is cut first, then trained, and the same shapes are trained from random weights. Scores are of a test
split that nothing was chosen on. A finished cell is a JSON file with every example's score.

Latency is that of the int8 artifact's forward at 1 x 128 on one thread, over the dense artifact's in the same
interleaved run. With a uniform scope an amount decides the widths, whatever the saliency; so each amount is measured
once, and the report refuses cells whose shapes are others than those measured.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
import time
import warnings
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from statistics import mean
from typing import Any

import quality_tasks as q
from pruning_report import plot, report
from pruning_tasks import DENSE, TASKS, Cell, Task, cut, example, load, run, shapes
from quality_tasks import Settings
from tables import PAUSE

from lightning_accel import QuantConfig, export_model
from lightning_accel.artifact import MANIFEST
from lightning_accel.measure import Target, compare, machine, versions


def path_of(cell: Cell, out: Path) -> Path:
    """Where a cell is saved."""
    name = cell.variant.replace(", ", "-").replace(" ", "-")
    name += "" if cell.variant == DENSE else f"-{cell.amount:g}"
    return out / cell.task / f"seed{cell.seed}" / f"{name}{'' if cell.lr is None else f'-lr{cell.lr:g}'}.json"


def cells(tasks: list[str], seeds: list[int]) -> Iterator[Cell]:
    """All cells: of seed 0 each variant at each rate and the middle amount, the other seeds, the other amounts."""
    for name in tasks if 0 in seeds else ():
        task = TASKS[name]
        yield from (Cell(name, v, task.middle, 0, lr) for v in task.variants for lr in task.rates)
    for seed in (seed for seed in seeds if seed):
        several = (name for name in tasks if TASKS[name].against)  # depth against width is one seed's
        yield from (Cell(name, v, TASKS[name].middle, seed) for name in several for v in TASKS[name].variants)
    for name in tasks if 0 in seeds else ():
        task = TASKS[name]
        others = (amount for amount in task.amounts if amount != task.middle)
        yield from (Cell(name, v, amount, 0) for amount in others for v in task.variants if v != DENSE)


def chosen(task: str, variant: str, out: Path) -> dict[str, Any]:
    """The cell of seed 0 and the middle amount that is best on the validation split."""
    tried = [path_of(Cell(task, variant, TASKS[task].middle, 0, lr), out) for lr in TASKS[task].rates]
    found = [json.loads(path.read_text()) for path in tried if path.exists()]
    sign = -1 if q.TASKS[TASKS[task].of].loss else 1
    return max(found, key=lambda cell: sign * mean(cell["validation"])) if found else {}


def saved(task: str, variant: str, amount: float, seed: int, out: Path) -> dict[str, Any]:
    """A finished cell, or nothing."""
    if variant == DENSE or amount == TASKS[task].middle:
        amount = TASKS[task].middle
        if seed == 0:
            return chosen(task, variant, out)
    path = path_of(Cell(task, variant, amount, seed), out)
    return json.loads(path.read_text()) if path.exists() else {}


def settings_of(task: Task, quick: bool) -> Settings:
    return task.quick if quick else task.settings


def run_all(tasks: list[str], seeds: list[int], out: Path, quick: bool) -> None:
    """Runs and saves all cells that are not there yet."""
    for cell in cells(tasks, seeds):
        path, task = path_of(cell, out), TASKS[cell.task]
        settings = settings_of(task, quick)
        if path.exists():
            before = json.loads(path.read_text())["settings"]
            if Settings(**before) != settings:
                raise SystemExit(f"{path} was made with other settings ({before}); write another --out, or remove it")
            continue
        best = chosen(cell.task, cell.variant, out) if cell.lr is None else {"lr": cell.lr}
        if not best:
            raise SystemExit(f"{cell} needs the learning rate that seed 0 chooses; run it first, --seeds 0")
        print(f"{time.strftime('%H:%M:%S')} {cell}", flush=True)
        found = run(replace(cell, lr=best["lr"]), task, settings, out)
        print(f"         {mean(found['scores']):.4f}, {found['seconds']:.0f} s", flush=True)
        save(path, asdict(cell) | found | {"lr": best["lr"], "settings": asdict(settings)} | about())


def measure_latency(name: str, out: Path, quick: bool, rounds: int = 15) -> None:
    """Builds the artifact of each amount that is not there yet, and times all of them together, unless it is done."""
    task, folder = TASKS[name], out / name / "latency"
    result, of = folder / "latency.json", q.TASKS[task.of]
    if result.exists():
        return
    inputs = example(task, load(task.of, settings_of(task, quick)))
    config = next(c for c in task.variants.values() if c is not None)
    found: dict[str, Any] = {}
    for amount in (0.0, *task.amounts):
        model = of.build().eval()
        model = cut(model, replace(config, amount=amount, saliency="l2"), inputs) if amount else model
        found[f"{amount:g}"] = {"shapes": shapes(model)}
        if not (folder / f"{amount:g}" / MANIFEST).exists():
            print(f"{time.strftime('%H:%M:%S')} building {name} {amount:g}", flush=True)
            engines = ("portable",) if quick else ("aoti",)
            export_model(model, folder / f"{amount:g}", example_inputs=inputs, quantize=QuantConfig("int8"),
                         engines=engines, measure=False)  # fmt: skip
    targets = {amount: Target(str(folder / amount)) for amount in found}
    measured = compare(targets, threads=1, rounds=1 if quick else rounds, pause=0.0 if quick else PAUSE)
    for amount, measurement in measured.items():
        found[amount] |= asdict(measurement.seconds["forward"])
    save(result, {"amounts": found} | about(threads=1))


def about(threads: int | None = None) -> dict[str, Any]:
    return {"machine": machine(threads), "versions": versions(), "command": " ".join(sys.argv)}


def save(path: Path, found: dict[str, Any]) -> None:
    """Writes all of a file or nothing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.with_suffix(".part").write_text(json.dumps(found))
    path.with_suffix(".part").rename(path)


def tables(tasks: list[str], seeds: list[int], out: Path) -> str:
    """The tables of what is finished; a plot beside the cells of tasks with latencies."""
    found = []
    for name in tasks:
        task, latency = TASKS[name], out / name / "latency" / "latency.json"
        got = {
            (v, a, s): cell
            for v in task.variants for a in (task.amounts if v != DENSE else (task.middle,)) for s in seeds
            if (cell := saved(name, v, a, s, out))
        }  # fmt: skip
        times = json.loads(latency.read_text()) if latency.exists() else None
        found.append(report(task, got, times, q.TASKS[task.of].loss))
        if times is not None and got:
            plot(task, got, times, out / name / "latency.png")
    return "\n\n".join(found)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("out/pruning"))
    parser.add_argument("--tasks", nargs="+", choices=list(TASKS), default=list(TASKS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--quick", action="store_true", help="a few steps of each, for CI; the figures mean nothing")
    parser.add_argument("--latency", action="store_true", help="builds and times artifacts in place of training")
    parser.add_argument("--report", action="store_true", help="only prints the tables of what is finished")
    options = parser.parse_args()
    warnings.filterwarnings("ignore", module="lightning|torch|copyreg")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    if options.quick:
        TASKS.update({n: replace(t, amounts=(t.middle,), rates=t.rates[:1]) for n, t in TASKS.items()})
    if options.latency:
        for name in (name for name in options.tasks if TASKS[name].latency):
            measure_latency(name, options.out, options.quick)
    elif not options.report:
        run_all(options.tasks, options.seeds, options.out, options.quick)
    print(tables(options.tasks, options.seeds, options.out))


if __name__ == "__main__":
    main()
