"""Random numbers across a resume: Lightning saves no generator's state, and an exact resume needs it."""

from __future__ import annotations

import random
from collections.abc import Mapping
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from lightning.pytorch.trainer.states import TrainerStatus
from lightning.pytorch.utilities.rank_zero import rank_zero_warn

KEY = "lightning_accel_rng"  # in the checkpoint; one state a rank


def random_state() -> dict[str, Any]:
    """The state of Python's, NumPy's and torch's generators, in plain types and tensors."""
    state: Any = np.random.get_state()
    name, keys, position, has_gauss, cached = state
    return {
        "python": random.getstate(),
        "numpy": (name, torch.from_numpy(keys.astype(np.int64)), position, has_gauss, cached),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }


def set_random_state(state: Mapping[str, Any]) -> None:
    """Puts back what `random_state` gave."""
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    name, keys, position, has_gauss, cached = state["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), position, has_gauss, cached))
    torch.set_rng_state(state["torch"].cpu())
    if state["cuda"] and torch.cuda.is_available():
        torch.cuda.set_rng_state_all([s.cpu() for s in state["cuda"]])


def save_random_states(trainer: pl.Trainer, checkpoint: dict[str, Any]) -> None:
    """Puts the state of every rank into a checkpoint; called on all ranks, after an interrupt possibly on one only."""
    states: list[Any] = [random_state()]
    if trainer.world_size > 1 and trainer.state.status != TrainerStatus.INTERRUPTED:
        states = [None] * trainer.world_size
        torch.distributed.all_gather_object(states, random_state())
    checkpoint[KEY] = states


def restore_random_state(trainer: pl.Trainer, states: list[dict[str, Any]]) -> None:
    """Puts this rank's state back; warns where the number of ranks has changed."""
    if len(states) == trainer.world_size:
        set_random_state(states[trainer.global_rank])
    else:
        rank_zero_warn(
            f"the checkpoint was written by {len(states)} processes, this fit has {trainer.world_size}: "
            "random numbers do not continue where they were"
        )


def renew_loader(trainer: pl.Trainer) -> None:
    """Starts the epoch's loader anew, from the random state that was put back.

    A loader draws a seed when its iterator is made. After a resume Lightning uses the iterator that it made before the
    random state was restored, so the epoch would begin one draw behind. Loaders that can be resumed hold their own
    state and are left alone.
    """
    loop = trainer.fit_loop
    loader, fetcher = loop._combined_loader, loop._data_fetcher
    if not loop.is_resuming or loader is None or fetcher is None:
        return  # Lightning makes a new iterator itself
    if not any(hasattr(one, "load_state_dict") for one in loader.flattened):
        iter(fetcher)


def at_last_batch(trainer: pl.Trainer) -> bool:
    """Whether the fit was resumed from a checkpoint written in the last batch of an epoch."""
    loop = trainer.fit_loop
    return loop.restarted_mid_epoch and loop.epoch_loop.batch_progress.is_last_batch
