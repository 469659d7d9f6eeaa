"""Cutting before training: when the network is built, before weights are restored and optimizers made."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import lightning.pytorch as pl
from torch import nn

from .. import select
from ..prune import PruneConfig
from ..prune.calibrate import needed
from ..prune.cut import Record, is_done, note_in_configs, replay_
from ..prune.groups import KINDS


def before_restore(trainer: pl.Trainer, then: Callable[[dict[str, Any] | None], None]) -> None:
    """Calls `then` with the loaded checkpoint, or `None`, right before Lightning restores weights, or would."""
    connector: Any = trainer._checkpoint_connector
    restore = connector.restore_model

    def around() -> None:
        connector.__dict__.pop("restore_model", None)
        then(connector._loaded_checkpoint or None)
        restore()

    connector.restore_model = around


def agreed(trainer: pl.Trainer, make: Callable[[], Any]) -> Any:
    """What rank 0 makes, on all ranks; an error of its is everybody's."""
    record, error = None, None
    if trainer.is_global_zero:
        try:
            record = make()
        except Exception as caught:  # a user's model or loss may raise any, and the other ranks wait
            error = caught
    record, message = trainer.strategy.broadcast((record, None if error is None else str(error)))
    if error is not None:
        raise error
    if message is not None:
        raise ValueError(message)
    assert record is not None
    return record


def cut_(root: nn.Module, at: str, record: Record) -> None:
    """Cuts the module called `at`, in place, unless it is done."""
    module = select.get_module(root, at)
    if not is_done(module, record):
        replay_(module, record)
        note_in_configs(root, at, record)


def check_cut_first(config: PruneConfig, schedule: Any, cut_first: bool, calibration: Any, loss: Any) -> None:
    """Raises ValueError for arguments that do not go together."""
    if not cut_first:
        if config.scope == "sensitivity":
            raise ValueError(
                "scope='sensitivity' measures losses before training; write Pruning(config, cut_first=True, "
                "example_inputs=x, calibration=[batch, ...]), or prune_model_ with a loss of your own"
            )
        if calibration is not None:
            raise ValueError("calibration= is for cut_first=True; else the training batches serve, leave it out")
        if loss is not None:
            raise ValueError("loss= is for cut_first=True; else the gradients of training serve, leave it out")
        return
    if schedule is not None:
        raise ValueError(f"cut_first=True cuts before training and has no schedule; leave out schedule={schedule!r}")
    if zeros := [s for s in config.structures if s not in KINDS]:
        raise ValueError(f"{zeros[0]} zeros have no physical form to cut; leave cut_first=True out, or write {KINDS}")
    if (needed(config) or config.scope == "sensitivity") and calibration is None:
        what = "the saliency is" if needed(config) else "the loss of scope='sensitivity' is"
        raise ValueError(f"{what} measured on data before training; write calibration=[batch, ...]")


def record_in(checkpoint: dict[str, Any], key: str) -> Record:
    """What the callback called `key` had cut when `checkpoint` was written."""
    state = checkpoint.get("callbacks", {}).get(key)
    if state is None or state["record"] is None:
        raise ValueError(
            "the checkpoint was not cut by this Pruning(cut_first=True), so its weights do not fit; resume with the "
            f"callbacks that it was written with (it has {sorted(checkpoint.get('callbacks', {}))})"
        )
    return state["record"]
