"""What the callbacks cost in a training step: pruning's masks, a live teacher, a cached one, over plain Lightning.

    lightning-accel run benchmarks/callback_step.py --threads 2

Steps vary less where glibc keeps its memory (docs/methods/precision.md).

MiniLM's shape with a classifier of 1,000 classes, 32 x 128 tokens, AdamW, random weights. Each turn is a fit of a few
steps of `AccelModule`; the first, in which callbacks find what they work on, is not counted. The teacher has the
student's shape; its cache is built beforehand. Goals: masks at most 1.02 x, a cached top-32 at most 1.05 x, and a live
teacher no more than its own forward. A row is compared with plain's turn of the same round; `+-` is half of the 95 %
interval of the mean of these ratios (Student's t).
"""

from __future__ import annotations

import argparse
import logging
import tempfile
import time
import warnings
from collections.abc import Callable
from statistics import mean, stdev
from typing import Any

import lightning.pytorch as pl
import torch
from encoders import SHAPES
from scipy.stats import t as student_t
from tables import PAUSE, provenance, steps
from torch.utils.data import DataLoader
from transformers import BertConfig, BertForSequenceClassification

from lightning_accel import AccelModule, Distillation, DistillConfig, Keyed, PruneConfig, Pruning, TeacherCache
from lightning_accel.distill import guest
from lightning_accel.measure import Target, compare

CLASSES, STEPS = 1000, 3
GOALS = {"masks": 1.02, "cached top-32": 1.05, "live teacher": 1.02}  # the last without the teacher's forward
ROWS = ("plain", "masks", "cached top-32", "live teacher")


class Clock(pl.Callback):
    """Seconds between the end of the first step and that of the last."""

    def __init__(self) -> None:
        self.ends: list[float] = []

    def on_train_batch_end(self, *_: Any) -> None:
        self.ends.append(time.perf_counter())


def network(seed: int) -> BertForSequenceClassification:
    torch.manual_seed(seed)
    return BertForSequenceClassification(BertConfig(**SHAPES["minilm"], num_labels=CLASSES))


def workloads(row: str, batch: int, length: int) -> dict[str, Callable[[], float]]:
    """Seconds of a step, of the teacher's forward alone, and of a sample in building a cache; timed in a worker."""
    warnings.filterwarnings("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    generator = torch.Generator().manual_seed(0)
    samples = [
        {"input_ids": torch.randint(0, 30522, (length,), generator=generator), "labels": torch.tensor(i % CLASSES)}
        for i in range((STEPS + 1) * batch)
    ]
    mask = torch.ones(length, dtype=torch.long)
    data: Any = [{**sample, "attention_mask": mask} for sample in samples]
    teacher = network(1).eval()
    more: dict[str, Callable[[], float]] = {}
    if row == "cached top-32":
        data = Keyed(data)

        def build() -> float:
            start = time.perf_counter()
            TeacherCache.build(tempfile.mkdtemp(), teacher, data, DistillConfig(top_k=32), progress=False)
            return (time.perf_counter() - start) / len(data)

        cache = TeacherCache.build(tempfile.mkdtemp(), teacher, data, DistillConfig(top_k=32), progress=False)
        more["build"] = build
    callbacks: dict[str, Callable[[], list[pl.Callback]]] = {
        "plain": lambda: [],
        "masks": lambda: [Pruning(PruneConfig("neurons", 0.5), module="model")],
        "cached top-32": lambda: [Distillation(DistillConfig(top_k=32), teacher=cache, student="model")],
        "live teacher": lambda: [Distillation(DistillConfig(), teacher=teacher, student="model")],
    }
    module, loader = AccelModule(network(0), lr=1e-5), DataLoader(data, batch_size=batch)

    def step() -> float:
        clock = Clock()
        trainer = pl.Trainer(
            max_epochs=1, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
            enable_model_summary=False, callbacks=[*callbacks[row](), clock],
        )  # fmt: skip
        trainer.fit(module, loader)
        return (clock.ends[-1] - clock.ends[0]) / STEPS

    first = {name: tensor for name, tensor in next(iter(loader)).items() if name in ("input_ids", "attention_mask")}

    def forward() -> float:
        start = time.perf_counter()
        with guest(teacher) as asked:
            asked(**first)
        return time.perf_counter() - start

    return {"step": step, "forward": forward, **more}


def mean_and_interval(ratios: list[float]) -> tuple[float, float]:
    """The mean, and half of its 95 % interval."""
    half = float(student_t.ppf(0.975, len(ratios) - 1)) * stdev(ratios) / len(ratios) ** 0.5
    return mean(ratios), half


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    shape = {"batch": options.batch, "length": options.length}
    targets = {row: Target("callback_step:workloads", {"row": row, **shape}) for row in ROWS}
    measured = compare(targets, threads=options.threads, rounds=options.rounds, pause=PAUSE)
    plain, forward = measured["plain"].seconds["step"], measured["live teacher"].seconds["forward"]
    build = measured["cached top-32"].seconds["build"].median
    print(steps(f"minilm, {options.batch} x {options.length}", measured))
    explained = (plain.median + forward.median) / plain.median
    print(f"\nthe teacher's forward alone: {1e3 * forward.median:.0f} ms, which explains {explained:.3f} x")
    print(f"building the cache: {1e3 * build:.1f} ms a sample, once")
    least = [f"{row} {measured[row].seconds['step'].least / plain.least:.3f}" for row in ROWS[1:]]
    explained = 1 + forward.least / plain.least
    print(f"the fastest steps over plain's fastest: {', '.join(least)}; explained {explained:.3f}\n")
    alone = measured["live teacher"].rounds["forward"]
    for row, goal in GOALS.items():
        own, others = measured[row].rounds["step"], measured["plain"].rounds["step"]
        if row == "live teacher":  # the step without what the teacher's forward took in the same round
            own = [step - asked for step, asked in zip(own, alone, strict=True)]
        middle, half = mean_and_interval([a / b for a, b in zip(own, others, strict=True)])
        what = f"{row}, without the teacher's forward" if row == "live teacher" else row
        verdict = "met" if middle + half <= goal else "missed" if middle - half > goal else "not decided"
        print(f"{what}: {middle:.3f} +- {half:.3f} x plain; goal {goal} x: {verdict}")
    print()
    print(provenance(options.threads))


if __name__ == "__main__":
    main()
