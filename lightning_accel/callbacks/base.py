"""What the callbacks share: the module they work on, when they bind to it, their state, and the random state."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from dataclasses import asdict
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor, nn

from .. import select

_RNG = "lightning_accel_rng"


class AccelCallback(Callback):
    """Base class: binds once the module's own `setup` and `configure_model` have run, before weights are restored.

    Args:
        module: name of the submodule to work on, `None` for the whole LightningModule.
    """

    technique: str
    log: Callable[..., None]  # Lightning puts the module's own here

    def __init__(self, config: Any = None, module: str | None = None) -> None:
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

    def target(self, pl_module: pl.LightningModule) -> nn.Module:
        """The module to work on."""
        return select.get_module(pl_module, self.module)

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Lets `bind` run right after `configure_model`; Lightning has no hook between it and the checkpoint."""
        if stage != "fit":
            return
        same = [c for c in trainer.callbacks if getattr(c, "technique", None) == self.technique]  # type: ignore[attr-defined]
        self._log_module = len(same) > 1
        before = pl_module.__dict__.get("configure_model")
        configure = pl_module.configure_model

        def configure_model() -> None:
            pl_module.__dict__.pop("configure_model", None)
            if before is not None:
                pl_module.configure_model = before  # type: ignore[method-assign]
            configure()
            self.bind(trainer, pl_module)

        pl_module.configure_model = configure_model  # type: ignore[method-assign]

    def log_value(self, name: str, value: float | Tensor) -> None:
        """Logs `accel/<technique>/<name>`, with the module's name between where the fit has two of a kind."""
        where = f"{self.module}/" if self._log_module and self.module else ""
        self.log(f"accel/{self.technique}/{where}{name}", float(value))

    def saved(self, **state: Any) -> dict[str, Any]:
        """Callback state in plain types and tensors, which torch.load(weights_only=True) reads."""
        config = asdict(self.config) if self.config is not None else None
        return {"technique": self.technique, "module": self.module, "config": _plain(config), **state}

    # --- the random state: Lightning does not save it, and an exact resume needs it

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Saves the random state of every rank, once for all callbacks."""
        if _RNG in checkpoint:
            return
        states: list[Any] = [random_state()]
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            states = [None] * trainer.world_size
            torch.distributed.all_gather_object(states, random_state())
        checkpoint[_RNG] = states

    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Keeps the saved random state until training starts."""
        self._rng = checkpoint.get(_RNG)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Puts the random state back after a resume, and says where the batches cannot be resumed."""
        if self._rng is None:
            return
        if len(self._rng) == trainer.world_size:
            set_random_state(self._rng[trainer.global_rank])
        else:
            rank_zero_warn(
                f"the checkpoint was written by {len(self._rng)} processes, this fit has {trainer.world_size}: "
                "random numbers do not continue where they were"
            )
        self._rng = None
        batches = trainer.fit_loop.epoch_loop.batch_progress.current.ready
        if batches and not trainer.fit_loop.epoch_loop._is_training_done and not _stateful(trainer.train_dataloader):
            rank_zero_warn(
                "resuming in the middle of an epoch with a loader that cannot be resumed (it has no "
                "state_dict): Lightning replays other batches; use torchdata's StatefulDataLoader"
            )


def _stateful(loader: Any) -> bool:
    return hasattr(loader, "state_dict") and hasattr(loader, "load_state_dict")


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {k: _plain(v) for k, v in value.items()}
    return [_plain(v) for v in value] if isinstance(value, tuple | list) else value


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


def total_steps(trainer: pl.Trainer, pl_module: pl.LightningModule) -> float:
    """Optimizer steps of this fit, as `trainer.global_step` counts them; `inf` where the length is unknown.

    With manual optimization every optimizer is taken to step once a batch.
    """
    total = float(trainer.estimated_stepping_batches)
    if total < 0:  # an iterable dataset without a length, and no max_steps
        return float("inf")
    if not pl_module.automatic_optimization and trainer.max_steps == -1:
        total *= max(len(trainer.optimizers), 1)
    return total


class InputRecorder:
    """Keeps the inputs of the latest calls of a module, on the CPU, for tracing and verification.

    The hook is a plain function, so that copying the module copies nothing else.
    """

    def __init__(self, module: nn.Module, keep: int = 1) -> None:
        self.inputs: list[tuple[tuple, dict[str, Any]]] = []
        inputs = self.inputs

        def record(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
            if keep > 1 or not inputs:
                copied = torch.utils._pytree.tree_map_only(Tensor, lambda t: t.detach().cpu().clone(), (args, kwargs))
                inputs.append(copied)
                del inputs[:-keep]

        self._handle = module.register_forward_pre_hook(record, with_kwargs=True)

    def remove(self) -> None:
        """Takes the hook off."""
        self._handle.remove()


def example_of(recorder: InputRecorder | None, pl_module: pl.LightningModule, given: Any, whole: bool) -> Any:
    """Example inputs of the target module: given, else recorded, else the module's `example_input_array`.

    Raises:
        ValueError: none of them.
    """
    if given is not None:
        return given
    if recorder is not None and recorder.inputs:
        args, kwargs = recorder.inputs[0]
        kwargs = {k: v for k, v in kwargs.items() if v is not None and k not in ("labels", "label")}
        return args if not kwargs else kwargs if not args else (args, kwargs)
    array = pl_module.example_input_array
    if whole and array is not None:
        return array if isinstance(array, Mapping | tuple) else (array,)
    raise ValueError(
        "the module was never called as a whole during training, so its inputs are unknown; give "
        "module='name of the network', example_inputs=, or set example_input_array"
    )
