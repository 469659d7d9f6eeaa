"""What the callbacks share: the module they work on, when they bind to it, and their state."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback
from torch import Tensor, nn

from .. import select
from . import random_state
from .patches import after, unpatch


class AccelCallback(Callback):
    """Base class: binds once the module's own `setup` and `configure_model` have run, before weights are restored.

    Args:
        module: name of the submodule to work on, `None` for the whole LightningModule.
    """

    technique: str
    log: Callable[..., None]  # Lightning puts the module's own here

    def __init__(self, config: Any = None, module: str | None = None) -> None:
        if module is not None and not isinstance(module, str):
            raise ValueError(
                f"a module is named, and {type(module).__name__} is no name; write module='model' for self.model"
            )
        self.config = config
        self.module = module or ""
        self._rng: list[dict[str, Any]] | None = None
        self._log_module = False

    @property
    def state_key(self) -> str:
        """Names this callback in checkpoints, so that two of a kind with other configs or modules coexist."""
        return f"{type(self).__qualname__}(module={self.module!r}, config={self.config!r})"

    def bind(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Called when the network is built and nothing is restored yet."""

    def release(self, pl_module: pl.LightningModule) -> None:
        """Takes hooks and wrappers off; called however the fit ends, and possibly twice."""

    def target(self, pl_module: pl.LightningModule) -> nn.Module:
        """The module to work on."""
        return select.get_module(pl_module, self.module)

    def siblings(self, trainer: pl.Trainer) -> list[AccelCallback]:
        """The callbacks of this package in the fit, in the user's order."""
        return [c for c in trainer.callbacks if isinstance(c, AccelCallback)]  # type: ignore[attr-defined]

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Lets `bind` run right after `configure_model`; Lightning has no hook between it and the checkpoint."""
        if stage != "fit":
            return
        self._log_module = sum(c.technique == self.technique for c in self.siblings(trainer)) > 1
        # only after the module's own setup: other callbacks, such as WeightAveraging, call configure_model in theirs
        after(pl_module, "setup", lambda: after(pl_module, "configure_model", lambda: self.bind(trainer, pl_module)))

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Takes everything off."""
        self.release(pl_module)

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Takes everything off: Lightning calls no `teardown` after an exception."""
        for hook in ("setup", "configure_model"):
            while unpatch(pl_module, hook):
                pass
        self.release(pl_module)

    def log_value(self, name: str, value: float | Tensor) -> None:
        """Logs `accel/<technique>/<name>`, with the module's name between where the fit has two of a kind."""
        where = f"{self.module}/" if self._log_module and self.module else ""
        self.log(f"accel/{self.technique}/{where}{name}", float(value), batch_size=1)

    def saved(self, **state: Any) -> dict[str, Any]:
        """Callback state in plain types and tensors, which torch.load(weights_only=True) reads."""
        config = asdict(self.config) if self.config is not None else None
        return {"technique": self.technique, "module": self.module, "config": _plain(config), **state}

    # --- the random state is saved and put back by the first of the callbacks

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Saves the random state of every rank."""
        if self.siblings(trainer)[0] is self:
            random_state.save_random_states(trainer, checkpoint)

    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Keeps the saved random state until training starts."""
        if self.siblings(trainer)[0] is self:
            self._rng = checkpoint.get(random_state.KEY)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Puts the random state back after a resume."""
        if self._rng is not None:
            random_state.restore_random_state(trainer, self._rng)
            if random_state.at_last_batch(
                trainer
            ):  # Lightning calls no on_train_epoch_start for the epoch that follows
                random_state.renew_loader(trainer)

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Lets the first epoch after a resume draw its batches from the random state that was put back."""
        if self._rng is not None:
            self._rng = None
            random_state.renew_loader(trainer)


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {k: _plain(v) for k, v in value.items()}
    return [_plain(v) for v in value] if isinstance(value, tuple | list) else value
