"""When to train with quantization: from `begin` on, the forward pass rounds as the exported kernel will."""

from __future__ import annotations

from functools import partial
from typing import Any

import lightning.pytorch as pl
from torch import nn

from .. import select
from ..quantize import QuantConfig, freeze_, is_prepared, prepare_
from ..quantize.norms import NormWatch, fold_
from ..quantize.ranges import affine_quantizers, average_, load_static_state_, static_state, thaw_
from ..schedule import check_position, position
from ..select import Coverage
from .base import AccelCallback
from .length import total_steps


class QuantizationAwareTraining(AccelCallback):
    """Fake-quantizes a module from `begin` on; Export turns it into integers.

    Parameters and state_dict keys stay what they were. `int8-static` follows the ranges of activations from `begin` to
    `freeze`, and its convolutions see the BatchNorm that they will absorb; the other schemes have nothing to freeze.
    A second fit with the same object and network goes on quantized, and follows ranges until its own `freeze`.
    Logs `accel/quantization/active`, 0 or 1.

    Args:
        config: the scheme and its exceptions.
        begin: an int is an optimizer step, a float a fraction of training.
        module: submodule to quantize, default the whole LightningModule.
        freeze: from when on ranges, and the statistics of absorbed BatchNorms, stay as they are; read as `begin` is.

    Example:
        >>> from lightning_accel import QuantConfig, QuantizationAwareTraining
        >>> qat = QuantizationAwareTraining(QuantConfig("int8", overrides={"*.lm_head": None}), begin=0.6)
    """

    technique = "quantization"

    def __init__(
        self,
        config: QuantConfig | None = None,
        begin: int | float = 0.0,
        module: str | None = None,
        freeze: int | float = 0.9,
    ) -> None:
        if not isinstance(config, QuantConfig | None):
            raise ValueError(f"config is {config!r}, expected a QuantConfig; write QuantConfig('int8')")
        super().__init__(config if config is not None else QuantConfig(), module)
        check_position(begin, "QuantizationAwareTraining(begin=...)")
        check_position(freeze, "QuantizationAwareTraining(freeze=...)")
        self.begin, self.freeze = begin, freeze
        self.total: float | None = None
        self.prepared = False
        self._network: nn.Module | None = None  # once it is prepared
        self._watch: NormWatch | None = None
        self._static: dict[str, Any] | None = None  # of a checkpoint
        self.coverage: Coverage | None = None
        self._resumed = False

    @property
    def complete(self) -> bool:
        """Whether fake quantization has begun."""
        return self.prepared

    def bind(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Fails now, not at `begin`, where nothing could be quantized."""
        same = [c for c in self.siblings(trainer) if isinstance(c, QuantizationAwareTraining) and c is not self]
        for other in same:
            if f"{self.module}.".startswith(other._prefix) or f"{other.module}.".startswith(self._prefix):
                raise ValueError(
                    f"two QuantizationAwareTraining callbacks, on module={other.module!r} and module={self.module!r}; "
                    "keep one, with overrides={'pattern': scheme} for the exceptions"
                )
        self._refuse_neurons(trainer)
        if self._network is not None and self._network is not self.target(pl_module):  # begun for another network
            self.prepared, self._network, self._static = False, None, None
        self.coverage = prepare_(select.copy_model(self.target(pl_module)), self.config)
        self._prepare_again(pl_module)  # a second fit with the same callback

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
        if not self.prepared:
            return
        self._prepare(pl_module)  # where it is prepared already, nothing changes
        if self._static is not None:
            load_static_state_(self.target(pl_module), self._static, self._prefix)
            self._static = None

    def _prepare(self, pl_module: pl.LightningModule) -> None:
        self._network, self.prepared = self.target(pl_module), True
        self.coverage = prepare_(self._network, self.config)

    @property
    def _follows_ranges(self) -> bool:
        return self.coverage is not None and any(e.done == "int8-static" for e in self.coverage.entries)

    @property
    def _prefix(self) -> str:
        return f"{self.module}." if self.module else ""

    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Raises where the checkpoint was fake-quantized by another config, which it would go on without."""
        super().on_load_checkpoint(trainer, pl_module, checkpoint)
        keys = {callback.state_key for callback in self.siblings(trainer)}
        for key, state in checkpoint.get("callbacks", {}).items():
            own = isinstance(state, dict) and state.get("technique") == self.technique
            if not own or key in keys or not state["prepared"]:
                continue
            theirs = f"{state['module']}." if state["module"] else ""
            if theirs.startswith(self._prefix) or self._prefix.startswith(theirs):
                raise ValueError(
                    f"the checkpoint was trained by {key}, which this fit does not have: it has {self.state_key}. "
                    "Resume with the config of then; to change it, load the weights and start a new fit"
                )

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Checks `begin` against the length of training."""
        super().on_train_start(trainer, pl_module)
        if not self._resumed:
            self.total = total_steps(trainer, pl_module)
            thaw_(self.target(pl_module))  # a fit before may have frozen it
            if not self.prepared:
                self._check_begin(self.total, self.target(pl_module), trainer.fast_dev_run)  # type: ignore[attr-defined]
        self._resumed = False

    def _check_begin(self, total: float, network: nn.Module, short: bool) -> None:
        """Raises where `begin` would not come, comes after `freeze`, or has come in another fit."""
        begin = position(self.begin, total)
        if begin >= total and not short:
            raise ValueError(
                f"QuantizationAwareTraining(begin={self.begin}) is past the end of training "
                f"({total:g} optimizer steps); write begin=0.6, or train longer"
            )
        if self._follows_ranges and position(self.freeze, total) <= begin:
            raise ValueError(
                f"QuantizationAwareTraining(begin={self.begin}, freeze={self.freeze}) freezes ranges before there "
                f"are any; in a training of {total:g} optimizer steps, write for example begin=0.5, freeze=0.9"
            )
        if begin > 0 and is_prepared(network):
            raise ValueError(
                f"QuantizationAwareTraining(begin={self.begin}) would begin with what is fake-quantized already, by a "
                "fit before; write begin=0 to go on, or unprepare_(network) first, to train in float until then"
            )

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        """Swaps the classes when `begin` is reached, and freezes at `freeze`."""
        assert self.total is not None
        if not self.prepared and trainer.global_step >= position(self.begin, self.total):
            self._prepare(pl_module)
            self._watch = NormWatch(self.target(pl_module)) if self._follows_ranges else None
        elif self.prepared and self._follows_ranges and trainer.global_step >= position(self.freeze, self.total):
            freeze_(self.target(pl_module))

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        """Absorbs the BatchNorms that the first batch has shown; logs whether quantization is simulated."""
        if self._watch is not None:
            fold_(self.target(pl_module), self._watch.stop())
            self._watch = None
        if self.prepared and trainer.world_size > 1:
            self._agree(trainer, pl_module)
        self.log_value("active", float(self.prepared))

    def _agree(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Gives every rank the mean of the ranges that the ranks have found (contract 10)."""
        if ranges := [quantizer.range for quantizer in affine_quantizers(self.target(pl_module)).values()]:
            average_(ranges, partial(trainer.strategy.reduce, reduce_op="sum"))

    def release(self, pl_module: pl.LightningModule) -> None:
        """Takes the hooks off."""
        if self._watch is not None:
            self._watch.stop()
            self._watch = None

    def state_dict(self) -> dict[str, Any]:
        """Whether it has begun, what it reaches, its ranges, and the length of training that fractions refer to."""
        entries = self.coverage.entries if self.coverage else ()
        schemes = {select.join(self.module, entry.name): entry.done for entry in entries if entry.done}
        static = self._static if self._network is None else static_state(self._network, self._prefix)
        return self.saved(
            prepared=self.prepared, quantized=schemes, static=static, total=self.total, complete=self.complete
        )

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continues where `state_dict` was taken."""
        self.prepared, self.total = state_dict["prepared"], state_dict["total"]
        self._static, self._network = state_dict["static"], None
        self._resumed = True
