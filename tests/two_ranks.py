"""Run by test_callbacks_ranks.py with Lightning's own launcher: `python two_ranks.py DIR`, on two gloo ranks."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from helpers import Perceptron, Plain, loader, seeded, trainer, weights
from lightning.pytorch.callbacks import ModelCheckpoint

import lightning_accel.callbacks.precision as precision
import lightning_accel.engines.portable as portable
from lightning_accel import (
    AutoMixedPrecision,
    Cubic,
    Distillation,
    Export,
    PruneConfig,
    Pruning,
    QuantizationAwareTraining,
)
from lightning_accel.precision import PrecisionChoice


class Called(Plain):
    """Its training_step calls self(...), which under DDP is where training_step itself is redirected to."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.model(x)

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        return torch.nn.functional.cross_entropy(self(batch[0]), batch[1])


def callbacks(path: Path) -> list[Any]:
    options: dict[str, Any] = {"engines": ("portable",), "measure": False}
    return [
        AutoMixedPrecision("auto"),
        Distillation(teacher=seeded(Perceptron, 32, seed=3)),
        Pruning(PruneConfig("neurons", amount=0.5), Cubic(0.1, 0.6), every=1),
        QuantizationAwareTraining(begin=0.6),
        ModelCheckpoint(path, "{epoch}", save_top_k=-1),
        Export(path / "network", module="model", **options),
        Export(path / "whole", **options),
    ]


def fit(path: Path, seed: int = 0, resume: str | None = None) -> dict[str, Any]:
    chosen = callbacks(path)
    module = seeded(Called, seeded(Perceptron, dropout=0.2), seed=seed)
    runner = trainer(path, chosen, strategy="ddp", devices=2)
    torch.manual_seed(seed + 100 * runner.global_rank)  # dropout differs between the ranks
    error = None
    try:
        runner.fit(module, loader(shuffle=True), loader(16), ckpt_path=resume)
    except Exception as caught:
        error = f"{type(caught).__name__}: {caught}"
    return {
        "rank": runner.global_rank,
        "world": runner.world_size,
        "choice": vars(chosen[0].choice),
        "masks": chosen[2].masks,
        "weights": weights(module),
        "prepared": chosen[3].prepared,
        "reports": [e.report is not None for e in chosen[5:]],
        "error": error,
    }


def main(path: Path) -> None:
    def choose_precision(*_: Any, **__: Any) -> PrecisionChoice:
        timed.append(1)
        return PrecisionChoice("bf16", "as the test wants it", {"fp32": 1.0})

    def build(*_: Any, **__: Any) -> None:
        raise OSError("no space left, says the test")

    timed: list[int] = []
    precision.choose_precision = choose_precision
    results = {"whole": fit(path / "first"), "timed": len(timed)}
    results["resumed"] = fit(path / "second", 5, str(path / "first" / "epoch=0.ckpt"))
    results["timed again"] = len(timed) - results["timed"]
    portable.build = build
    results["failed"] = fit(path / "third")
    torch.save(results, path / f"rank{results['whole']['rank']}.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
