"""Run by test_callbacks_ranks.py with Lightning's own launcher: `python two_ranks.py DIR`, on two gloo ranks."""

from __future__ import annotations

import os
import resource
import sys
from datetime import timedelta
from pathlib import Path
from typing import Any, ClassVar

import torch
from helpers import Perceptron, Plain, data, loader, seeded, trainer, weights
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.strategies import DDPStrategy
from torch.utils.data import DataLoader, DistributedSampler

import lightning_accel.callbacks.precision as precision
import lightning_accel.engines.portable as portable
from lightning_accel import (
    AutoMixedPrecision,
    Cubic,
    Distillation,
    DistillConfig,
    Export,
    Keyed,
    PruneConfig,
    Pruning,
    QuantConfig,
    QuantizationAwareTraining,
    TeacherCache,
)
from lightning_accel.precision import PrecisionChoice
from lightning_accel.quantize.ranges import static_state


class Called(Plain):
    """Its training_step calls self(...), which under DDP is where training_step itself is redirected to."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.model(x)

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        return torch.nn.functional.cross_entropy(self(batch[0]), batch[1])


class Waits(Plain):
    """Its training_step waits for the other rank: in all_gather and, where `layer` is set, within the network."""

    gathered: ClassVar[list[tuple[int, ...]]] = []  # shapes, of the copies too

    def __init__(self, layer: bool) -> None:
        super().__init__()
        self.layer = layer

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        everywhere = self.all_gather(batch[0])
        self.gathered.append(tuple(everywhere.shape))
        if self.layer:  # as SyncBatchNorm does, which torch has for GPUs only
            torch.distributed.all_reduce(torch.zeros(1))
        return super().training_step(batch, batch_idx) + 0 * everywhere.mean()


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


def two_ranks(path: Path, chosen: list[Any]) -> Any:
    return trainer(path, chosen, strategy=DDPStrategy(timeout=timedelta(seconds=100)), devices=2)


def fit(path: Path, seed: int = 0, resume: str | None = None) -> dict[str, Any]:
    chosen = callbacks(path)
    module = seeded(Called, seeded(Perceptron, dropout=0.2), seed=seed)
    runner = two_ranks(path, chosen)
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


def waiting(path: Path, callback: Any, layer: bool) -> dict[str, Any]:
    Waits.gathered.clear()
    module = seeded(Waits, layer)
    two_ranks(path, [callback]).fit(module, loader(), loader(16))
    return {"gathered": list(Waits.gathered), "weights": weights(module)}


def static(path: Path) -> dict[str, Any]:
    """Ranges that each rank finds in its own half of the data."""
    module = seeded(Plain)
    qat = QuantizationAwareTraining(QuantConfig("int8-static"), module="model")
    two_ranks(path, [qat]).fit(module, loader())
    return {"state": static_state(module.model), "weights": weights(module)}


class Buckets(Callback):
    """Bytes of the parameters whose gradients are averaged over the ranks."""

    size = 0

    def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
        self.size = trainer.model._get_ddp_logging_data()["total_parameter_size_bytes"]


DISTILL = DistillConfig(top_k=2, hidden={"second": "first"}, hidden_loss="mse")


def distilled(path: Path, cached: bool, resume: str | None = None, in_order: bool = False) -> dict[str, Any]:
    """A student whose states are projected, with a live teacher or, built by both ranks at once, a cache."""
    teacher, keyed = seeded(Perceptron, 24, dropout=0.5, seed=3), Keyed(data())
    source: Any = TeacherCache.build(path, teacher, keyed, DISTILL, progress=False) if cached else teacher
    distillation = Distillation(DISTILL, teacher=source, student="model")
    keep = ModelCheckpoint(path.parent / f"distilled{cached}", "{epoch}", save_top_k=-1)
    module = seeded(Plain, optimizer="sgd", seed=0 if resume is None else 9)
    rank = int(os.environ.get("LOCAL_RANK", "0"))
    sampler = DistributedSampler(keyed, 2, rank, shuffle=False) if in_order else None  # Lightning's own shuffles
    batches = DataLoader(keyed, batch_size=8, sampler=sampler)
    buckets = Buckets()
    two_ranks(path, [distillation, keep, buckets]).fit(module, batches, ckpt_path=resume)
    projections = distillation.projections.state_dict()
    return {"weights": weights(module), "projections": projections, "buckets": buckets.size}


def former(path: Path, resume: str | None = None) -> dict[str, Any]:
    """A student with running statistics, which differ between the ranks, as its own teacher."""
    network = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.BatchNorm1d(16), torch.nn.Linear(16, 3))
    qat, keep = QuantizationAwareTraining(begin=2, module="model"), ModelCheckpoint(path, "{epoch}", save_top_k=-1)
    distillation = Distillation(teacher="self", student="model")
    two_ranks(path, [qat, distillation, keep]).fit(seeded(Plain, network), loader(), ckpt_path=resume)
    return {"former": distillation._former}


def measured(path: Path) -> dict[str, Any]:
    """A saliency that each rank measures on its own half of the data, and a cut of networks that differ at first."""
    pruning = Pruning(PruneConfig("neurons", saliency="wanda"), Cubic(0.1, 0.6), module="model", every=1)
    module = seeded(Plain)
    two_ranks(path, [pruning]).fit(module, loader())
    x = torch.randn(2, 8, generator=torch.Generator().manual_seed(0))
    first = Pruning(PruneConfig("neurons", scope="global"), module="model", cut_first=True, example_inputs=(x,))
    fit = two_ranks(path, [first])
    cut = seeded(Plain, seed=fit.global_rank)
    fit.fit(cut, loader())
    return {"masks": pruning.masks, "weights": weights(module), "record": first.record, "cut": weights(cut)}


class Uneven(Plain):
    """Batches of the second rank are half as large."""

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        rows = len(batch[0]) // (1 + self.trainer.global_rank)
        return super().training_step([part[:rows] for part in batch], batch_idx)


def in_the_middle(path: Path, resume: str | None = None) -> dict[str, Any]:
    """A share of FLOPs, and a saliency whose measurements a checkpoint interrupts."""
    config = PruneConfig("neurons", 0.3, of="flops", saliency="wanda")
    pruning = Pruning(config, Cubic(0.1, 0.9), module="model", every=3)
    keep = ModelCheckpoint(path, "{epoch}", save_top_k=-1)
    module = seeded(Uneven, seed=0 if resume is None else 9)
    two_ranks(path, [pruning, keep]).fit(module, loader(), ckpt_path=resume)
    return {"masks": pruning.masks, "weights": weights(module), "counted": pruning.progress.counted}


def latency(path: Path) -> dict[str, Any]:
    """A share of latency where the ranks' clocks disagree, masked in training and cut first."""
    timed: list[int] = []

    def timer(models: Any, calls: Any) -> list[float]:
        timed.append(len(models))
        slow = 0.1 * len(timed) * (1 + 9 * fit.global_rank)
        return [slow + 0.02 * m.first.out_features + 0.04 * m.second.out_features for m in models]

    config = PruneConfig("neurons", 0.25, of="latency", scope="latency")
    pruning = Pruning(config, Cubic(0.1, 0.6), module="model", every=1)
    pruning.timer = timer
    module = seeded(Plain)
    fit = two_ranks(path, [pruning])
    fit.fit(module, loader())
    return {"masks": pruning.masks, "tables": pruning.progress.tables, "timed": len(timed)}


class FillsTheDisk(Callback):
    """No file of more than 1000 bytes, on the first rank."""

    def on_train_end(self, trainer: Any, *_: Any) -> None:
        if trainer.is_global_zero:
            resource.setrlimit(resource.RLIMIT_FSIZE, (1000, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))


def unsaved(path: Path) -> str | None:
    exporting = Export(path / "model", engines=("portable",), module="model", measure=False)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        two_ranks(path, [exporting, FillsTheDisk()]).fit(seeded(Plain), loader())
    except Exception as caught:
        return f"{type(caught).__name__}: {caught}"
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    return None


def main(path: Path) -> None:
    def choose_precision(*_: Any, **__: Any) -> PrecisionChoice:
        timed.append(1)
        here = "fp32" if int(os.environ.get("LOCAL_RANK", "0")) else "bf16"
        return PrecisionChoice(here, "as the test wants it", {"fp32": 1.0})

    def build(*_: Any, **__: Any) -> None:
        raise OSError("no space left, says the test")

    timed: list[int] = []
    auto = AutoMixedPrecision("auto")
    results: dict[str, Any] = {"timing waits": waiting(path, auto, layer=True), "auto": vars(auto.choice)}
    alone = Export(path / "alone", engines=("portable",), module="model", measure=False)
    results["export alone"] = waiting(path, alone, layer=False)
    precision.choose_precision = choose_precision
    results |= {"whole": fit(path / "first"), "timed": len(timed)}
    results["resumed"] = fit(path / "second", 5, str(path / "first" / "epoch=0.ckpt"))
    results["timed again"] = len(timed) - results["timed"]
    portable.build = build
    results["failed"] = fit(path / "third")
    results["static"] = static(path / "static")
    results["distilled"] = distilled(path / "cache", cached=False)
    results["in order"] = distilled(path / "cache", cached=False, in_order=True)
    results["cached"] = distilled(path / "cache", cached=True)
    results["distilled again"] = distilled(path / "cache", True, str(path / "distilledTrue" / "epoch=0.ckpt"))
    results["former"] = former(path / "former")
    results["former again"] = former(path / "former again", str(path / "former" / "epoch=0.ckpt"))
    results["measured"] = measured(path / "measured")
    results["middle"] = in_the_middle(path / "middle")
    results["middle again"] = in_the_middle(path / "again", str(path / "middle" / "epoch=0.ckpt"))
    results["latency"] = latency(path / "latency")
    results["unsaved"] = unsaved(path / "fourth")
    torch.save(results, path / f"rank{results['whole']['rank']}.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
