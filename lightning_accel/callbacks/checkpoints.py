"""Which checkpoint is the best of those that hold a finished model."""

from __future__ import annotations

import pickle
from collections.abc import Iterable
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from ..export import ExportError


def monitored(trainer: pl.Trainer) -> list[ModelCheckpoint]:
    """The checkpoint callbacks that rank checkpoints by a metric.

    Raises:
        ValueError: no checkpoint callback of the Trainer ranks by a metric.
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
        ExportError: no checkpoint of a finished model is left, or one holds what is not safe to load.
    """
    for callback in monitored(trainer):
        sign = 1.0 if callback.mode == "min" else -1.0
        for path, _ in sorted(callback.best_k_models.items(), key=lambda item: sign * float(item[1])):
            states = _load(path).get("callbacks", {})
            if all(states.get(key, {}).get("complete", False) for key in scheduled):
                return path
    raise ExportError(
        "no checkpoint written after the schedules ended is left; write ModelCheckpoint(monitor=..., save_top_k=-1) "
        "to keep them all (with save_weights_only=True none says what it is), or Export(weights='last')"
    )


def _load(path: str) -> dict[str, Any]:
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise ExportError(
            f"the checkpoint {path} holds objects that are not safe to load, often hyperparameters; save plain types "
            "(numbers, strings, lists, dicts) and leave the others out, self.save_hyperparameters(ignore=['config']), "
            "or write Export(weights='last')"
        ) from error
