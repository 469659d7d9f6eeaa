"""The speed of what `distillation.py` trained: the chosen models of seed 0, exported and timed side by side."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from distillation_cells import chosen
from distillation_tasks import Task
from tables import LENGTHS, PAUSE, engine_loads, provenance, table

from lightning_accel import export_model
from lightning_accel.artifact import MANIFEST
from lightning_accel.measure import Target, compare


def measure(
    name: str, task: Task, out: Path, threads: int, engines: Sequence[str] = ("aoti",), rounds: int = 7
) -> list[Path]:
    """Times the artifacts of all methods through all engines, and writes a table for each size of input.

    Artifacts and tables that are there are kept: remove a table to measure it again.

    Raises:
        FileNotFoundError: a method's cells of seed 0 are not all there.
    """
    written = []
    for size, example in task.example.items():
        path = out / name / f"latency-{size.replace(' ', '')}-{threads}.json"
        if not path.exists():
            first = "none" if "none" in task.methods else task.control  # ratios are to it
            methods = sorted(task.methods, key=lambda method: method != first)
            folders = {method: build(name, task, method, size, example, out, engines) for method in methods}
            targets, sizes = {}, {}
            for method, folder in folders.items():
                for engine, load in engine_loads(folder).items():
                    row = method if len(engines) == 1 else f"{method} {engine}"
                    targets[row], sizes[row] = Target(str(folder), LENGTHS, engine), load
            measured = compare(targets, threads=threads, rounds=rounds, pause=PAUSE)
            text = table(f"{task.title}, {size}, threads {threads}", measured, sizes)
            path.with_suffix(".part").write_text(json.dumps({"table": f"{text}\n\n{provenance(threads)}"}))
            path.with_suffix(".part").rename(path)
        written.append(path)
    return written


def build(
    name: str, task: Task, method: str, size: str, example: dict[str, Any], out: Path, engines: Sequence[str]
) -> Path:
    """The artifact of a method's chosen model of seed 0 for inputs of this size, unless it is there."""
    folder = out / name / "artifacts" / f"{method.replace(' ', '')}-{size.replace(' ', '')}"
    if not (folder / MANIFEST).exists():
        cell = chosen(name, task, method, out)
        if not cell:
            raise FileNotFoundError(
                f"{method!r} of {name} has not been trained at all of its rates; run: "
                f"python benchmarks/distillation.py --out {out} --tasks {name} --seeds 0"
            )
        saved = cell["path"].with_suffix(".pt")
        if not saved.exists():
            raise FileNotFoundError(
                f"the model {saved} is not there, only its scores; remove {cell['path']}, and run: "
                f"python benchmarks/distillation.py --out {out} --tasks {name} --seeds 0"
            )
        model = task.deployed(torch.load(saved, weights_only=False))  # of distillation.py
        quantize = task.quantize if any(fit.quantize for fit in task.methods[method]) else None
        export_model(model, folder, example_inputs=example, quantize=quantize, engines=engines, measure=False)
    return folder
