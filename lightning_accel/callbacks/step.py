"""The user's own `training_step` outside of the loop: to time it, to score other networks with it, and to see what
reaches a module."""

from __future__ import annotations

import copy
import math
import warnings
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.fabric.utilities.apply_func import convert_to_tensors
from lightning.pytorch.utilities.model_helpers import is_overridden
from lightning.pytorch.utilities.signature_utils import is_param_in_hook_signature
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map_only

from .. import select
from ..capture import as_inputs, flatten_output, input_names, is_causal_lm
from ..distill import logits_of
from ..export import Metric
from ..inputs import ExampleInputs, split_inputs, without_labels
from ..loaded import Output, structure
from .inputs import InputRecorder, in_float32, with_decoder_inputs


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


def _copy(pl_module: pl.LightningModule) -> pl.LightningModule:
    """A copy on the CPU in float32, as the exported copies of the network are."""
    return copy.deepcopy(pl_module).cpu().float().eval()


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
        again, other = (loss(_Itself(original, call, inputs, noise), [in_float32(batch)]) for noise in (0.0, 1.0))
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


class StandIn(nn.Module):
    """A network or an artifact where a LightningModule expects its own: labels are taken out, their loss put in.

    Args:
        call: the original's forward, where the original itself leads to the stand-in.
    """

    def __init__(self, model: Callable[..., Any], original: nn.Module, call: Callable[..., Any] | None = None) -> None:
        super().__init__()
        self._model, self._original, self._call = [model], [original], [call or original]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        model, original = self._model[0], self._original[0]
        if isinstance(model, nn.Module):
            return model(*args, **kwargs)
        entry = model.entry  # type: ignore[attr-defined]
        known = {"input_ids", "attention_mask"} if entry["cache"] else {spec["name"] for spec in entry["inputs"]}
        given = with_decoder_inputs(original, kwargs)
        output = model(*args, **{k: v for k, v in given.items() if k in known and v is not None})
        if entry["cache"]:
            output = Output(logits=output)
        named = kwargs.get("return_dict")
        named = getattr(getattr(original, "config", None), "return_dict", True) if named is None else named
        if isinstance(output, Mapping) and not named:
            output = tuple(output.values())
        labels = kwargs.keys() - without_labels(kwargs)
        return output if all(kwargs[k] is None for k in labels) else _with_loss(output, self._call[0], args, kwargs)

    @property
    def stands_in_for(self) -> nn.Module:
        """The network in whose place it is."""
        return self._original[0]

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.__dict__["_original"][0], name)


class _Itself:
    """The network as an artifact of it would answer: tensors in, tensors out; and with noise in them."""

    def __init__(self, original: nn.Module, call: Callable[..., Any], inputs: ExampleInputs, noise: float) -> None:
        args, kwargs = split_inputs(inputs)
        names = input_names(original, args, kwargs)
        self.entry = {"cache": is_causal_lm(original), "inputs": [{"name": name} for name in names]}
        self._constants = {name: value for name, value in kwargs.items() if not isinstance(value, Tensor)}
        self._call, self._noise = call, noise

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        output = self._call(*args, **{**self._constants, **kwargs})
        if self.entry["cache"]:
            output = output[0]
        tensors, spec = flatten_output(output)
        floats, generator = [t for t in tensors if t.is_floating_point()], torch.Generator().manual_seed(0)
        for tensor in floats if self._noise else ():
            tensor.add_(self._noise * torch.randn(tensor.shape, generator=generator))
        return structure(spec, tensors)


# --- the loss that a network computes from labels itself --------------------------------------------------------------


class _Results(TorchFunctionMode):
    """Numbers the tensors that torch's functions give, and overwrites some of them in place."""

    def __init__(self, overwrite: Mapping[int, Tensor] | None = None) -> None:
        super().__init__()
        self.made: list[weakref.ref[Tensor]] = []
        self._overwrite = overwrite or {}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if isinstance(result, Tensor):
            if (ours := self._overwrite.get(len(self.made))) is not None:
                if ours.shape != result.shape:
                    raise ValueError(f"an output has shape {tuple(ours.shape)}, the network's {tuple(result.shape)}")
                result.copy_(ours)
            self.made.append(weakref.ref(result))
        return result


@torch.no_grad()
def _with_loss(output: Any, call: Callable[..., Any], args: tuple, kwargs: dict[str, Any]) -> Any:
    """`output` with the loss that the network would compute from its labels had it put out `output`, as it puts it.

    However it computes it: the network runs, and runs again with its outputs overwritten as soon as it has made them.
    """

    def run(overwrite: Mapping[int, Tensor]) -> tuple[Any, _Results]:
        copies = tree_map_only(Tensor, Tensor.clone, (args, kwargs))
        with torch.random.fork_rng(devices=[]), _Results(overwrite) as results:
            return call(*copies[0], **copies[1]), results

    own, results = run({})
    if _loss_in(own) is None:
        return output
    pairs = _outputs(output, own)
    overwrite = {i: ours for i, made in enumerate(results.made) for ours, theirs in pairs if made() is theirs}
    if not overwrite:
        raise ValueError("where the network makes the outputs of which it computes its loss was not found")
    loss = _loss_in(run(overwrite)[0])
    if isinstance(output, Mapping):
        return Output(loss=loss, **output)
    return (loss, *output) if isinstance(output, list | tuple) else (loss, output)


def _loss_in(output: Any) -> Tensor | None:
    if isinstance(output, Mapping):
        return output.get("loss")
    first = output[0] if isinstance(output, list | tuple) and output else None
    return first if isinstance(first, Tensor) and not first.dim() else None


def _outputs(output: Any, own: Any) -> list[tuple[Tensor, Tensor]]:
    """Tensors of an output without a loss, and the same ones of the network's output with a loss."""
    if isinstance(output, Mapping) and isinstance(own, Mapping):
        pairs = [(value, own.get(name)) for name, value in output.items()]
    elif isinstance(own, Mapping):
        pairs = [(output, logits_of(own))]
    else:
        pairs = list(zip(output if isinstance(output, list | tuple) else (output,), own[1:], strict=False))
    return [(a, b) for a, b in pairs if isinstance(a, Tensor) and isinstance(b, Tensor)]
