"""The user's own `training_step` outside of the loop: to time it, to score other networks with it, and to see what
reaches a module."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.fabric.utilities.apply_func import convert_to_tensors
from lightning.pytorch.utilities.model_helpers import is_overridden
from lightning.pytorch.utilities.signature_utils import is_param_in_hook_signature
from torch import Tensor

from .. import select
from ..capture import as_inputs
from ..distill.keyed import split_key
from ..export import Metric
from ..inputs import ExampleInputs
from .inputs import InputRecorder, in_float32
from .stand_in import Itself, StandIn


@contextmanager
def muted(host: pl.LightningModule, trainer: pl.Trainer, alone: bool = True) -> Iterator[pl.LightningModule]:
    """A copy of a LightningModule with its trainer, and with logging that does nothing.

    Where it runs `alone`, on one rank, `all_gather` gives its data back, as with one process: nobody else would answer.
    """

    def all_gather(data: Any, *_: Any, **__: Any) -> Any:
        return convert_to_tensors(data, device=host.device)

    host.trainer = trainer
    host.__dict__.update(log=_nothing, log_dict=_nothing)
    if alone:
        host.__dict__["all_gather"] = all_gather
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield host
    finally:
        host.trainer = None


def _nothing(*_: Any, **__: Any) -> None: ...


def loss_of(host: pl.LightningModule, batch: Any) -> Tensor:
    """The loss of the class's own `training_step`, without what callbacks wrapped around it.

    Raises:
        ValueError: it returns none, or the module optimizes by hand.
    """
    if not host.automatic_optimization:
        raise ValueError("a manual training_step has no loss to reuse")
    output = _call(host, "training_step", batch)
    loss = output["loss"] if isinstance(output, dict) else output
    if loss is None:
        raise ValueError("training_step returned no loss")
    return loss


def _call(host: pl.LightningModule, name: str, batch: Any) -> Any:
    step, (batch, _) = getattr(type(host), name), split_key(batch)
    takes_index = is_param_in_hook_signature(step, "batch_idx", min_args=2)
    return step(host, batch, 0) if takes_index else step(host, batch)


def _copy(pl_module: pl.LightningModule) -> pl.LightningModule:
    """A copy on the CPU in float32, as the exported copies of the network are."""
    return select.copy_model(pl_module).cpu().float().eval()


def reaching(pl_module: pl.LightningModule, name: str, batches: Sequence[Any]) -> list[ExampleInputs]:
    """What the submodule `name` is called with in the module's own step, for each of the batches (in float32)."""
    host = _copy(pl_module)
    module = select.get_module(host, name)
    step = "training_step" if host.automatic_optimization else "validation_step"
    if not is_overridden(step, host):
        return []
    found = []
    with muted(host, pl_module.trainer), torch.no_grad(), torch.random.fork_rng(devices=[]):
        for batch in batches:
            recorder = InputRecorder(module)
            _call(host, step, in_float32(batch))
            recorder.remove()
            found += [as_inputs(module, *call) for call in recorder.calls]
    return found


def training_loss(pl_module: pl.LightningModule, name: str, batch: Any, inputs: ExampleInputs) -> Metric:
    """A metric: the mean loss of the module's own `training_step` with another network in the place of `name`.

    Args:
        batch, inputs: a batch, and what reaches the network in it, to try the metric on.

    Raises:
        ValueError: a stand-in that gives the network's own outputs does not give its loss, or any outputs give it.
    """
    host = _copy(pl_module)
    original = select.get_module(host, name)
    call = original if name else original.forward
    if getattr(config := getattr(original, "config", None), "use_cache", False):
        config.use_cache = False  # type: ignore[union-attr]  # as in the capture: a cache is no output of an artifact
    trainer = pl_module.trainer

    def loss(model: Callable[..., Any], batches: Sequence[Any]) -> float:
        stand_in = StandIn(model, original, call)
        if name:
            parent, _, child = name.rpartition(".")
            setattr(select.get_module(host, parent), child, stand_in)
        else:
            host.forward = stand_in.forward  # type: ignore[method-assign]
        return mean_loss(batches)

    def mean_loss(batches: Sequence[Any]) -> float:
        with muted(host, trainer), torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)  # a step that draws random numbers draws the same ones for each network
            return sum(float(loss_of(host, batch)) for batch in batches) / len(batches)

    with torch.no_grad():
        expected = mean_loss([in_float32(batch)])
        if not math.isfinite(expected):
            raise ValueError(f"training_step returns {expected} for a held-out batch")
        again, other = (loss(Itself(original, call, inputs, noise), [in_float32(batch)]) for noise in (0.0, 1.0))
    if not abs(again - expected) <= 1e-4 * abs(expected) + 1e-7:
        raise ValueError(f"from the network's outputs alone training_step returns {again:.5g}, not {expected:.5g}")
    if other == expected != 0:
        raise ValueError("what training_step returns does not depend on the network's outputs")
    return loss


def on_batches(metric: Metric, batches: Sequence[Any]) -> Metric:
    """The metric on copies of these batches, whatever it is called with: steps may write to theirs."""

    def fixed(model: Any, _: Sequence[Any]) -> float:
        return metric(model, [in_float32(batch) for batch in batches])

    fixed.__name__ = getattr(metric, "__name__", type(metric).__name__)
    fixed.higher_is_better = getattr(metric, "higher_is_better", False)  # type: ignore[attr-defined]
    return fixed
