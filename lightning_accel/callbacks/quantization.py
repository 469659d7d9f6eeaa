"""When to train with quantization: from `begin` on, the forward pass rounds as the exported kernel will."""

from __future__ import annotations

import copy
from typing import Any

import lightning.pytorch as pl

from ..quantize import QuantConfig, prepare_
from ..schedule import check_position, position
from ..select import Coverage
from .base import AccelCallback
from .length import total_steps


class QuantizationAwareTraining(AccelCallback):
    """Fake-quantizes a module from `begin` on; Export turns it into integers.

    Parameters and state_dict keys stay what they were. Logs `accel/quantization/active`, 0 or 1.

    Args:
        config: the scheme and its exceptions.
        begin: an int is an optimizer step, a float a fraction of training.
        module: submodule to quantize, default the whole LightningModule.

    Example:
        >>> from lightning_accel import QuantConfig, QuantizationAwareTraining
        >>> qat = QuantizationAwareTraining(QuantConfig("int8", overrides={"*.lm_head": None}), begin=0.6)
    """

    technique = "quantization"

    def __init__(self, config: QuantConfig | None = None, begin: int | float = 0.0, module: str | None = None) -> None:
        if not isinstance(config, QuantConfig | None):
            raise ValueError(f"config is {config!r}, expected a QuantConfig; write QuantConfig('int8')")
        super().__init__(config if config is not None else QuantConfig(), module)
        check_position(begin, "QuantizationAwareTraining(begin=...)")
        self.begin = begin
        self.total: float | None = None
        self.prepared = False
        self.coverage: Coverage | None = None
        self._resumed = False

    @property
    def complete(self) -> bool:
        """Whether fake quantization has begun."""
        return self.prepared

    def bind(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Fails now, not at `begin`, where nothing could be quantized."""
        same = [c for c in self.siblings(trainer) if isinstance(c, QuantizationAwareTraining)]
        if sum(c.module == self.module for c in same) > 1:
            raise ValueError(
                f"two QuantizationAwareTraining callbacks on module={self.module!r}; keep one, with "
                "overrides={'pattern': scheme} for the exceptions"
            )
        self._refuse_neurons(trainer)
        self.coverage = prepare_(copy.deepcopy(self.target(pl_module)), self.config)
        if self.prepared:  # a second fit with the same callback
            prepare_(self.target(pl_module), self.config)

    def _refuse_neurons(self, trainer: pl.Trainer) -> None:
        """Raises where neurons would be cut out of inputs in int4; with overrides the export looks at each layer."""
        if self.config.overrides or not self.config.scheme.startswith("int4"):
            return
        for other in self.siblings(trainer):
            apart = self.module and other.module and self.module.split(".")[0] != other.module.split(".")[0]
            if getattr(other.config, "structure", None) == "neurons" and not apart:
                raise ValueError(
                    "cutting neurons out changes which inputs share a scale in int4, so what was trained would not be "
                    "exported; keep the layers after them in int8, for example QuantConfig("
                    f"{self.config.scheme!r}, overrides={{'*.down_proj': 'int8'}}), or prune in a fit before"
                )

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """After a resume past `begin`, quantizes before anything runs."""
        self._prepare_again(pl_module)

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """With a checkpoint from past `begin`, scores the network that was trained."""
        self._prepare_again(pl_module)

    def on_test_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """As `on_validation_start`."""
        self._prepare_again(pl_module)

    def on_predict_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """As `on_validation_start`."""
        self._prepare_again(pl_module)

    def _prepare_again(self, pl_module: pl.LightningModule) -> None:
        if self.prepared:  # where it is prepared already, nothing changes
            self.coverage = prepare_(self.target(pl_module), self.config)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Checks `begin` against the length of training."""
        super().on_train_start(trainer, pl_module)
        if not (self._resumed or self.prepared):
            self.total = total_steps(trainer, pl_module)
            if position(self.begin, self.total) >= self.total and not trainer.fast_dev_run:  # type: ignore[attr-defined]
                raise ValueError(
                    f"QuantizationAwareTraining(begin={self.begin}) is past the end of training "
                    f"({self.total:g} optimizer steps); write begin=0.6, or train longer"
                )
        self._resumed = False

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        """Swaps the classes when `begin` is reached."""
        assert self.total is not None
        if not self.prepared and trainer.global_step >= position(self.begin, self.total):
            self.coverage = prepare_(self.target(pl_module), self.config)
            self.prepared = True

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        """Logs whether quantization is simulated."""
        self.log_value("active", float(self.prepared))

    def state_dict(self) -> dict[str, Any]:
        """Whether it has begun, what it reaches, and the length of training that fractions refer to."""
        prefix = f"{self.module}." if self.module else ""
        entries = self.coverage.entries if self.coverage else ()
        schemes = {prefix + entry.name: entry.done for entry in entries if entry.done}
        return self.saved(prepared=self.prepared, quantized=schemes, total=self.total, complete=self.complete)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continues where `state_dict` was taken."""
        self.prepared, self.total = state_dict["prepared"], state_dict["total"]
        self._resumed = True
