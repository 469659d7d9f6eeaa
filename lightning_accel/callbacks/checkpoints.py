"""Which checkpoint is the best of those that hold a finished model."""

from __future__ import annotations

from collections.abc import Iterable

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from ..export import ExportError


def monitored(trainer: pl.Trainer) -> list[ModelCheckpoint]:
    """The checkpoint callbacks that rank checkpoints by a metric.

    Raises:
        ValueError: none.
    """
    found = [c for c in trainer.checkpoint_callbacks if isinstance(c, ModelCheckpoint) and c.monitor is not None]
    if not found:
        raise ValueError(
            "weights='best' needs checkpoints to choose from; add ModelCheckpoint(monitor='val_loss', save_top_k=-1), "
            "with the name of a metric that you log"
        )
    return found


def best_checkpoint(trainer: pl.Trainer, scheduled: Iterable[str]) -> str:
    """The best checkpoint written after every schedule had ended.

    Args:
        scheduled: state keys of the callbacks that have a schedule.

    Raises:
        ExportError: none is left.
    """
    for callback in monitored(trainer):
        sign = 1.0 if callback.mode == "min" else -1.0
        for path, _ in sorted(callback.best_k_models.items(), key=lambda item: sign * float(item[1])):
            states = torch.load(path, map_location="cpu", weights_only=True).get("callbacks", {})
            if all(states.get(key, {}).get("complete", False) for key in scheduled):
                return path
    raise ExportError(
        "no checkpoint written after the schedules ended is left; write ModelCheckpoint(monitor=..., save_top_k=-1) "
        "to keep them all (with save_weights_only=True none says what it is), or Export(weights='last')"
    )
