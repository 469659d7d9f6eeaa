"""Cutting before training: when the network is built, before weights are restored and optimizers made."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import lightning.pytorch as pl
from torch import nn

from ..prune.cut import Record, is_done, note_in_config, replay_


def before_restore(trainer: pl.Trainer, then: Callable[[dict[str, Any] | None], None]) -> None:
    """Calls `then` with the loaded checkpoint, or `None`, right before Lightning restores weights, or would."""
    connector: Any = trainer._checkpoint_connector
    restore = connector.restore_model

    def around() -> None:
        connector.__dict__.pop("restore_model", None)
        then(connector._loaded_checkpoint or None)
        restore()

    connector.restore_model = around


def agreed(trainer: pl.Trainer, make: Callable[[], Record]) -> Record:
    """What rank 0 makes, on all ranks; an error of its is everybody's."""
    record, error = None, None
    if trainer.is_global_zero:
        try:
            record = make()
        except ValueError as caught:
            error = caught
    record, message = trainer.strategy.broadcast((record, None if error is None else str(error)))
    if message is not None:
        raise ValueError(message) from error
    assert record is not None
    return record


def cut_(module: nn.Module, record: Record) -> None:
    """Cuts, in place, unless it is done."""
    if not is_done(module, record):
        replay_(module, record)
        note_in_config(module, record)
