"""Run by test_callbacks_interrupt.py, as `python interrupted.py DIR fit|export|ranks`: waits there for Ctrl-C."""

from __future__ import annotations

import signal
import sys
import time
from pathlib import Path
from typing import Any

from helpers import Plain, loader, seeded, trainer
from lightning.pytorch.callbacks import Callback

import lightning_accel.engines.portable as portable
from lightning_accel import (
    AutoMixedPrecision,
    Constant,
    Distillation,
    Export,
    PruneConfig,
    Pruning,
    QuantizationAwareTraining,
)


def callbacks(path: Path) -> list[Any]:
    return [
        AutoMixedPrecision("fp32"),
        Distillation(teacher=seeded(Plain, seed=3).model),
        Pruning(PruneConfig("neurons", amount=0.5), Constant(2), module="model"),
        QuantizationAwareTraining(begin=3, module="model"),
        Export(path / "model", module="model", engines=("portable",), measure=False),
    ]


def wait(path: Path) -> None:
    (path / "waiting").touch()
    time.sleep(120)


class Waits(Callback):
    """Waits in the middle of the seventh step, on the first rank."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def on_before_optimizer_step(self, trainer: Any, *_: Any) -> None:
        if trainer.global_step == 6 and trainer.is_global_zero:
            wait(self.path)


def main(path: Path, where: str) -> None:
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell ignores it for what it starts in the background
    extra = [Waits(path)] if where != "export" else []
    options = {"strategy": "ddp", "devices": 2} if where == "ranks" else {}
    if where == "export":
        build = portable.build

        def waits(*args: Any, **kwargs: Any) -> Any:
            build(*args, **kwargs)
            wait(path)

        portable.build = waits
    trainer(path, [*callbacks(path), *extra], max_epochs=6, **options).fit(seeded(Plain), loader())


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
