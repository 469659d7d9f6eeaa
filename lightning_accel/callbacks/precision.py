"""When to choose the precision: before the first step, by timing real steps; and watching its gradients."""

from __future__ import annotations

import copy
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.plugins import MixedPrecision, Precision
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn
from torch.optim import Optimizer

from ..precision import PRECISIONS, PrecisionChoice, choose_precision, first_nonfinite_gradient
from .base import AccelCallback
from .random_state import random_state, set_random_state
from .step import loss_of, muted


class AutoMixedPrecision(AccelCallback):
    """Trains in the precision that is fastest here, says why, and stops where gradients stay non-finite.

    Autocast and loss scaling are Lightning's own plugins. `"auto"` times one real training step on a copy of the module
    in each candidate; on a CPU without AMX, bf16 is usually slower, and then it stays in fp32 and says so. The choice
    is saved and reused on resume. Logs `accel/precision/skipped_steps`, and `accel/precision/loss_scale` with fp16.

    Args:
        precision: `"auto"`, `"bf16"`, `"fp16"` or `"fp32"`. fp16 on a CPU is real fp16 with a loss scaler, for tests;
            Lightning's own `precision="16-mixed"` silently becomes bf16 there.
        patience: optimizer steps in a row with non-finite gradients after which training stops, naming the module.

    Raises:
        ValueError: unknown precision; or `Trainer(precision=...)` is set as well.

    Example:
        >>> from lightning_accel import AutoMixedPrecision
        >>> AutoMixedPrecision("auto").precision
        'auto'
    """

    technique = "precision"

    def __init__(self, precision: str = "auto", patience: int = 20) -> None:
        super().__init__()
        if precision not in PRECISIONS:
            raise ValueError(f"unknown precision {precision!r}; write one of {PRECISIONS}")
        self.precision, self.patience = precision, patience
        self.choice: PrecisionChoice | None = None
        self._timed: pl.LightningModule | None = None  # what "auto" chose for
        self.skipped = 0
        self._in_a_row = 0
        self._nonfinite: str | None = None

    @property
    def state_key(self) -> str:
        """One precision a fit."""
        return "AutoMixedPrecision"

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Sets a fixed precision; refuses a second opinion of the Trainer's."""
        if stage != "fit":
            return
        plugin = trainer.strategy.precision_plugin
        if not getattr(plugin, "_set_by_lightning_accel", False) and plugin.precision != "32-true":
            renamed = plugin.precision == "bf16-mixed" and trainer.strategy.root_device.type == "cpu"
            raise ValueError(
                f"Trainer(precision={plugin.precision!r}) and AutoMixedPrecision({self.precision!r}) both set the "
                "precision; leave one out" + " (on a CPU, Lightning turns '16-mixed' into 'bf16-mixed')" * renamed
            )
        if self._timed is not None and self._timed is not pl_module:
            self.choice, self._timed = None, None
        if self.precision != "auto":
            self.choice = PrecisionChoice(self.precision, f"trains in {self.precision}, as asked for")
            self._set(trainer, self.precision)
        elif self.choice is not None:
            self._set(trainer, self.choice.precision)

    def _set(self, trainer: pl.Trainer, precision: str) -> None:
        device = trainer.strategy.root_device.type
        plugin: Precision = Precision()
        if precision == "bf16":
            plugin = MixedPrecision("bf16-mixed", device)
        elif precision == "fp16":
            plugin = MixedPrecision("16-mixed", device, scaler=torch.amp.GradScaler(device))
            if device == "cpu":
                rank_zero_warn("fp16 on a CPU is slow and for tests; write AutoMixedPrecision('bf16') or 'fp32'")
        plugin._set_by_lightning_accel = True  # type: ignore[attr-defined]
        trainer.strategy.precision_plugin = plugin

    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Sets the saved choice before the loss scaler's state is restored."""
        super().on_load_checkpoint(trainer, pl_module, checkpoint)
        state = checkpoint.get("callbacks", {}).get(self.state_key)
        if state is not None and self.precision == "auto" and state["choice"] is not None:
            self.choice = PrecisionChoice(**state["choice"])
            self._set(trainer, self.choice.precision)

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Says what was chosen, where that is known."""
        if self.choice is not None:
            rank_zero_info(f"AutoMixedPrecision: {self.choice.reason}")

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Times the candidates on the first batch, on a copy; every rank takes part, rank 0 decides.

        Here and not in `on_fit_start`: taking a batch from the loader there would move its order on.
        """
        if self.choice is None:
            self.choice = trainer.strategy.broadcast(self._time(trainer, pl_module, batch))
            self._timed = pl_module
            self._set(trainer, self.choice.precision)
            rank_zero_info(f"AutoMixedPrecision: {self.choice.reason}")

    def _time(self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any) -> PrecisionChoice:
        state = random_state()
        # a step may wait for the other ranks (all_gather, SyncBatchNorm): each must run as many of them
        budget: dict[str, Any] = {"budget": 0.0} if trainer.world_size > 1 else {}

        def step(trial: Any) -> torch.Tensor:
            with muted(trial, trainer, alone=False):
                return loss_of(trial, copy.deepcopy(batch))

        try:
            return choose_precision(pl_module, step, trainer.strategy.root_device, **budget)
        except Exception as error:
            return PrecisionChoice(
                "fp32",
                f"stays in fp32: a step could not be timed ({type(error).__name__}: {error}); write "
                "AutoMixedPrecision('bf16') to have it anyway",
            )
        finally:
            set_random_state(state)

    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Optimizer
    ) -> None:
        """Looks for non-finite gradients; says where they begin, stops after `patience` steps with them in a row."""
        self._nonfinite = first_nonfinite_gradient(pl_module)
        if self._nonfinite is None:
            self._in_a_row = 0
            return
        skips = self._scaler(trainer) is not None  # without a scaler the step is taken all the same
        self.skipped += skips
        self._in_a_row += 1
        if self._in_a_row == 1:
            rank_zero_info(
                f"AutoMixedPrecision: the gradient of {self._nonfinite!r} is not finite at optimizer step "
                f"{trainer.global_step}, which is {'skipped' if skips else 'taken all the same'}"
            )
        if self._in_a_row >= self.patience:
            raise FloatingPointError(
                f"the gradient of {self._nonfinite!r} was not finite for {self._in_a_row} optimizer steps in a "
                "row; lower the learning rate, clip gradients, or write AutoMixedPrecision('fp32')"
            )

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        """Logs the skipped steps and the loss scale."""
        self.log_value("skipped_steps", self.skipped)
        if (scaler := self._scaler(trainer)) is not None:
            self.log_value("loss_scale", scaler.get_scale())

    def _scaler(self, trainer: pl.Trainer) -> Any:
        return getattr(trainer.strategy.precision_plugin, "scaler", None)

    def state_dict(self) -> dict[str, Any]:
        """The choice, its timings, and the number of skipped steps."""
        choice = vars(self.choice) if self.choice is not None and self.precision == "auto" else None
        return self.saved(choice=choice, skipped=self.skipped)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continues counting; the choice was set in `on_load_checkpoint`."""
        self.skipped = state_dict["skipped"]
