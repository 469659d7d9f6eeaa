"""The user's own `training_step` outside of the loop: to time it, to score other networks with it, and to see what
reaches a module."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.fabric.utilities.apply_func import convert_to_tensors
from lightning.pytorch.utilities.model_helpers import is_overridden
from lightning.pytorch.utilities.signature_utils import is_param_in_hook_signature
from torch import Tensor, nn

from .. import select
from ..capture import as_inputs
from ..export import Metric
from ..inputs import ExampleInputs
from ..loaded import Output
from .inputs import InputRecorder


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
    step = getattr(type(host), name)
    takes_index = is_param_in_hook_signature(step, "batch_idx", min_args=2)
    return step(host, batch, 0) if takes_index else step(host, batch)


def reaching(pl_module: pl.LightningModule, name: str, batches: Sequence[Any]) -> list[ExampleInputs]:
    """What the submodule `name` is called with in the module's own step, for each of the batches."""
    host = copy.deepcopy(pl_module).cpu().eval()
    module = select.get_module(host, name)
    step = "training_step" if host.automatic_optimization else "validation_step"
    if not is_overridden(step, host):
        return []
    found = []
    with muted(host, pl_module.trainer), torch.no_grad(), torch.random.fork_rng(devices=[]):
        for batch in batches:
            recorder = InputRecorder(module)
            _call(host, step, batch)
            recorder.remove()
            found += [as_inputs(module, *call) for call in recorder.calls]
    return found


def training_loss(pl_module: pl.LightningModule, name: str) -> Metric:
    """A metric: the mean loss of the module's own `training_step` with another network in the place of `name`."""
    host = copy.deepcopy(pl_module).cpu().eval()
    original = select.get_module(host, name)
    trainer = pl_module.trainer

    def loss(model: Callable[..., Any], batches: Sequence[Any]) -> float:
        stand_in = StandIn(model, original)
        if name:
            parent, _, child = name.rpartition(".")
            setattr(select.get_module(host, parent), child, stand_in)
        else:
            host.forward = stand_in.forward  # type: ignore[method-assign]
        with muted(host, trainer), torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)  # a step that draws random numbers draws the same ones for each network
            return sum(float(loss_of(host, batch)) for batch in batches) / len(batches)

    return loss


def on_batches(metric: Metric, batches: Sequence[Any]) -> Metric:
    """The metric on these batches, whatever it is called with."""

    def fixed(model: Any, _: Sequence[Any]) -> float:
        return metric(model, batches)

    fixed.__name__ = getattr(metric, "__name__", type(metric).__name__)
    fixed.higher_is_better = getattr(metric, "higher_is_better", False)  # type: ignore[attr-defined]
    return fixed


class StandIn(nn.Module):
    """A network or an artifact where a LightningModule expects its own: labels are taken out, their loss put in."""

    def __init__(self, model: Callable[..., Any], original: nn.Module) -> None:
        super().__init__()
        self._model, self._original = [model], [original]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        model, original = self._model[0], self._original[0]
        if isinstance(model, nn.Module):
            return model(*args, **kwargs)
        labels = kwargs.pop("labels", None)
        entry = model.entry  # type: ignore[attr-defined]
        known = {"input_ids", "attention_mask"} if entry["cache"] else {spec["name"] for spec in entry["inputs"]}
        output = model(*args, **{k: v for k, v in kwargs.items() if k in known and v is not None})
        if entry["cache"]:
            output = Output(logits=output)
        if labels is not None and isinstance(output, dict):
            config: Any = original.config
            output["loss"] = original.loss_function(  # type: ignore[operator]
                logits=output["logits"], labels=labels, vocab_size=config.vocab_size
            )
        return output

    @property
    def stands_in_for(self) -> nn.Module:
        """The network in whose place it is."""
        return self._original[0]

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.__dict__["_original"][0], name)
