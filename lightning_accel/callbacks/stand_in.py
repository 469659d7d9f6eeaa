"""Another network in the place of a LightningModule's own, so that its `training_step` scores an artifact."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map_only

from ..calls import Output, structure
from ..capture import flatten_output, input_names, is_causal_lm, is_seq2seq
from ..distill import logits_of
from ..inputs import ExampleInputs, split_inputs, with_decoder_inputs, without_labels


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
        known = set(model.input_names)  # type: ignore[attr-defined]
        given = with_decoder_inputs(original, kwargs)
        output = model(*args, **{k: v for k, v in given.items() if k in known and v is not None})
        if model.entry["cache"]:  # type: ignore[attr-defined]
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


class Itself:
    """The network as an artifact of it would answer: tensors in, tensors out; and with noise in them."""

    def __init__(self, original: nn.Module, call: Callable[..., Any], inputs: ExampleInputs, noise: float) -> None:
        args, kwargs = split_inputs(inputs)
        names = input_names(original, args, kwargs)
        self.entry = {"cache": is_causal_lm(original) or is_seq2seq(original)}
        self.input_names = ["input_ids", "attention_mask"] if is_causal_lm(original) else names
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
