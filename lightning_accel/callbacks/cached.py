"""A teacher's cache in a fit: the keys of the batch, and whether the student is called with their samples."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
from torch import Tensor

from ..distill import Answer, TeacherCache
from ..distill.given import check_given, samples_of
from .calls import Call


class CachedTeacher:
    """Answers to the batch that is trained on.

    Attributes:
        keys: of that batch; `None` where it has none.
    """

    def __init__(self, cache: TeacherCache, trainer: pl.Trainer) -> None:
        self.cache = cache
        self.keys: Tensor | None = None
        self._trainer = trainer
        self._seen = False  # a batch of this epoch was compared with the data
        self._given: Any = None  # what the data give for the keys

    @property
    def _loader(self) -> Any:
        """The DataLoader of training; `None` of several, which a cache does not work with."""
        loaders = self._trainer.fit_loop._combined_loader
        return loaders.flattened[0] if loaders is not None and len(loaders.flattened) == 1 else None

    def check_loader(self) -> None:
        """Raises ValueError where the loader gives other data than those of the cache."""
        self.cache.check_loader(self._loader)

    def begin_epoch(self) -> None:
        """Has the next batch that the teacher is asked about compared with the data."""
        self._seen = False

    def begin_batch(self) -> None:
        """Reads the samples of such a batch once more; outside of the step, whose precision is not the loader's."""
        self._given = None if self._seen else samples_of(self._loader, self.keys)

    def ask(self, pl_module: pl.LightningModule, call: Call, calls: int) -> Answer:
        """The teacher's answer to the student's only call."""
        if calls != 1:
            raise ValueError(
                f"training_step calls the student {calls} times, and a cache holds one answer a sample; call it once, "
                "or give the teacher itself"
            )
        answer = self.cache.read(self.keys)
        if self._given is not None:
            check_given(self._given, call.network, call.named, [*pl_module.buffers(), *pl_module.parameters()])
            self._seen, self._given = True, None
        return answer
