"""What a module is called with, recorded while it trains, for tracing and verification."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities import CombinedLoader
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor, nn
from torch._subclasses import FakeTensor
from torch.utils._pytree import tree_leaves, tree_map_only

from .. import select
from ..capture import as_inputs
from ..inputs import ExampleInputs, with_decoder_inputs

_Call = tuple[tuple, dict[str, Any]]


class InputRecorder:
    """Keeps the inputs of the first calls of a module, on the CPU.

    The hook is a plain function, so that copying the module copies nothing else.
    """

    def __init__(self, module: nn.Module, keep: int = 1) -> None:
        self.calls: list[_Call] = []
        calls = self.calls

        def record(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
            if len(calls) < keep and not _is_redirected(module) and not _is_traced((args, kwargs)):
                call = args, with_decoder_inputs(module, kwargs)
                calls.append(tree_map_only(Tensor, lambda t: t.detach().cpu().clone(), call))

        self._handle = module.register_forward_pre_hook(record, with_kwargs=True)

    def remove(self) -> None:
        """Takes the hook off."""
        self._handle.remove()


def _is_redirected(module: nn.Module) -> bool:
    """Whether a LightningModule's `forward` is a stand-in for `training_step`, as under DDP."""
    return getattr(module.__dict__.get("forward"), "__name__", "") == "wrapped_forward"


def _is_traced(inputs: _Call) -> bool:
    return any(isinstance(leaf, FakeTensor) for leaf in tree_leaves(inputs))


def record_parts(module: nn.Module) -> dict[str, InputRecorder]:
    """Recorders on the module itself (`""`) and on its direct parts, for where it is never called as a whole."""
    parts = {"": module}
    for name, child in module.named_children():
        inside = child.named_children() if isinstance(child, nn.ModuleList | nn.ModuleDict) else ()
        parts |= {f"{name}.{deeper}": part for deeper, part in inside} or {name: child}
    return {name: InputRecorder(part) for name, part in parts.items()}


def calls_of(recorders: Mapping[str, InputRecorder], module: nn.Module) -> dict[str, ExampleInputs]:
    """Recorded inputs of the module under `""`, or where it was not called as a whole, of its parts by name.

    Raises:
        ValueError: nothing was called.
    """
    called = {
        name: as_inputs(select.get_module(module, name), *recorder.calls[0])
        for name, recorder in recorders.items()
        if recorder.calls
    }
    if not called:
        raise ValueError(
            f"the {type(module).__name__} was never called during training, so its inputs are unknown; give "
            "module='name of the network' or example_inputs=(x,)"
        )
    return {"": called[""]} if "" in called else called


def example_of(recorder: InputRecorder | None, pl_module: pl.LightningModule, module: nn.Module, given: Any) -> Any:
    """Example inputs of `module`: given, else recorded, else the LightningModule's `example_input_array`.

    Raises:
        ValueError: none of them.
    """
    if given is not None:
        return given
    if recorder is not None and recorder.calls:
        return as_inputs(module, *recorder.calls[0])
    array = pl_module.example_input_array
    if module is pl_module and array is not None:
        return array if isinstance(array, Mapping | tuple) else (array,)
    raise ValueError(
        f"the {type(module).__name__} was never called during training, so its inputs are unknown; give "
        "module='name of the network', example_inputs=(x,), or set example_input_array"
    )


def held_out_batches(trainer: pl.Trainer) -> Iterator[Any]:
    """Batches of the (first) validation loader, else of the training loader."""
    if (loader := _validation_loader(trainer)) is not None:
        return iter(loader)
    loaders = trainer.train_dataloader
    if isinstance(loaders, Mapping | list | tuple):
        return (batch for batch, _, _ in CombinedLoader(loaders, "max_size_cycle"))
    return iter(loaders if loaders is not None else ())  # a loader's truth value is its length, which may be unknown


def in_float32(batch: Any) -> Any:
    """A copy of the batch on the CPU, in float32 where it is floating-point, as the exported copies of the network."""

    def convert(tensor: Tensor) -> Tensor:
        return tensor.detach().to("cpu", torch.float32 if tensor.is_floating_point() else tensor.dtype, copy=True)

    return apply_to_collection(batch, Tensor, convert, allow_frozen=True)


def held_out_split(trainer: pl.Trainer) -> str:
    """What `held_out_batches` takes them from, as the manifest says it."""
    return "validation" if _validation_loader(trainer) is not None else "training"


def _validation_loader(trainer: pl.Trainer) -> Any:
    return next((loader for loader in tree_leaves(trainer.val_dataloaders) if loader is not None), None)
