"""What the student is called with and puts out in a training step."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor, nn

from .. import select
from ..distill import Answer, Taps, logits_of
from ..distill.losses import outputs_of
from ..distill.teacher import stale, tensors_of


@dataclass
class Call:
    """One call of the student, and its layers' states and maps in it."""

    name: str
    module: nn.Module
    args: tuple
    kwargs: dict[str, Any]
    logits: Tensor | None
    version: int  # of the logits
    changed: bool  # it wrote to its inputs
    hidden: dict[str, Tensor] = field(default_factory=dict)
    attention: dict[str, Tensor] = field(default_factory=dict)

    @property
    def answer(self) -> Answer:
        """What is compared with the teacher's."""
        return Answer(self.logits, self.hidden, self.attention)

    @cached_property
    def network(self) -> nn.Module:
        """The one transformers model in the module, which knows what its logits mean; else the module itself."""
        return network_in(self.module)

    @property
    def named(self) -> dict[str, Any]:
        """The arguments by name, those that were given by position too."""
        try:
            bound = inspect.signature(select.unwrap(self.module).forward).bind_partial(*self.args)
        except TypeError:
            return self.kwargs
        return {**bound.arguments, **self.kwargs}


class StudentCalls:
    """Hooks on the student and its layers, which keep what passes while `recording`.

    Args:
        name: of the student in the LightningModule; `None` finds the one module whose output has logits.
        hidden, attention: names of layers, relative to the student, or to the LightningModule where it has no name.
    """

    def __init__(
        self, pl_module: pl.LightningModule, name: str | None, hidden: Iterable[str], attention: Iterable[str]
    ) -> None:
        self._root, self._name, self._layers = pl_module, name, (list(hidden), list(attention))
        self._recording = self._wanted = False
        self._calls: list[Call] = []
        self._inputs: dict[str, list[tuple[Tensor, int]]] = {}  # of the calls that are running
        self._handles: list[Any] = []
        self._attach()

    def _attach(self) -> None:
        names = [self._name] if self._name is not None else ["", *(name for name, _ in self._root.named_children())]
        modules = {name: select.get_module(self._root, name) for name in names}
        self._handles = [
            module.register_forward_hook(self._keep(name), with_kwargs=True) for name, module in modules.items()
        ] + [
            module.register_forward_pre_hook(self._begin(name), with_kwargs=True) for name, module in modules.items()
        ]
        self._taps = Taps(select.get_module(self._root, self._name), *self._layers)
        ours = {id(m) for m in (*modules.values(), *self._taps.modules.values())}
        self._hooked = {name: module for name, module in self._root.named_modules() if id(module) in ours}

    def _begin(self, name: str) -> Any:
        def begin(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
            self._taps.open = self._wanted and torch.is_grad_enabled()  # layers are kept in the calls that are kept
            if self._recording:
                self._inputs[name] = tensors_of((args, kwargs))

        return begin

    def _keep(self, name: str) -> Any:
        def keep(module: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> None:
            if not self._recording or not torch.is_grad_enabled():
                return
            changed = any(tensor._version != version for tensor, version in self._inputs.pop(name, []))
            logits = logits_of(output) if self._name is None else outputs_of(output, (args, kwargs))
            if logits is not None or self._name is not None:
                version = -1 if logits is None else logits._version
                self._calls.append(Call(name, module, args, kwargs, logits, version, changed))

        return keep

    def remove(self) -> None:
        """Takes the hooks off."""
        for handle in self._handles:
            handle.remove()
        self._taps.remove()
        self._handles = []

    @contextmanager
    def recording(self, layers: bool) -> Iterator[None]:
        """Keeps the calls within, and with `layers` what they put out; hooks modules again that were replaced."""
        if any(_missing(self._root, name, module) for name, module in self._hooked.items()):
            self.remove()
            self._attach()
        self._calls, self._recording, self._wanted, self._taps.open = [], True, layers, layers
        try:
            yield
        finally:
            self._recording = self._wanted = self._taps.open = False

    def take(self, need_logits: bool, hidden: Iterable[str], attention: Iterable[str]) -> list[Call]:
        """The student's calls that were kept, which are let go of.

        Raises:
            ValueError: no module or several may be the student; a layer put out nothing, or several times in a call.
        """
        try:
            calls = self._students(need_logits)
            self._taps.check()
            if need_logits and any(call.logits._version != call.version for call in calls if call.logits is not None):
                raise ValueError(
                    "training_step changes the student's logits in place; write logits = logits / 2, not logits /= 2"
                )
            for names, kept, kind in (
                (hidden, self._taps.hidden, "hidden"),
                (attention, self._taps.attention, "attention"),
            ):
                for name in names:
                    _check_once(name, len(kept[name]), len(calls), kind, self._root)
                    for call, tensor in zip(calls, kept[name], strict=True):
                        getattr(call, kind)[name] = tensor
            return calls
        finally:
            self.clear()

    def clear(self) -> None:
        """Lets go of what was kept."""
        self._calls, self._inputs = [], {}
        self._taps.clear()

    def _students(self, need_logits: bool) -> list[Call]:
        calls = [call for call in self._calls if call.logits is not None or not need_logits]
        if self._name is not None and not calls:
            if not self._calls:
                raise ValueError(f"training_step never called {self._name!r} with gradients; name what it calls")
            raise ValueError(
                f"the student {self._name!r} puts out no logits: they are a tensor, or the `logits` of a mapping or an "
                "object, not an item of a tuple; name a module that gives them so, or write alpha=0.0"
            )
        names = list(dict.fromkeys(call.name for call in calls))
        if self._name is None and "" in names:
            names = [""]
        if len(names) != 1:
            found = (
                f"several modules put out logits: {names}"
                if names
                else "neither the LightningModule nor a direct part of it puts out logits in training_step"
            )
            raise ValueError(
                f"{found}; name the student, for example Distillation(..., student={(names or ['model'])[0]!r})"
            )
        return [call for call in calls if call.name == names[0]]


def network_in(module: nn.Module) -> nn.Module:
    """The one transformers model in a module; else the module itself."""
    found = _transformers_models(module)
    return found[0] if len(found) == 1 else select.unwrap(module)


def _transformers_models(module: nn.Module) -> list[nn.Module]:
    """The outermost ones in a module."""
    if any(base.__name__ == "PreTrainedModel" for base in type(module).__mro__):
        return [module]
    return [found for child in module.children() for found in _transformers_models(child)]


def _missing(root: nn.Module, name: str, module: nn.Module) -> bool:
    """Whether another module stands where the hooked one stood."""
    try:
        return root.get_submodule(name) is not module
    except AttributeError:
        return True


def _check_once(name: str, found: int, calls: int, kind: str, root: nn.Module) -> None:
    if found == calls:
        return
    if found:
        raise ValueError(
            f"the student's {name!r} was called {found} times in {calls} call(s) of the student, as layers that share "
            "weights are; name a module that is called once"
        )
    if kind == "attention":
        raise ValueError(
            f"the student's {name!r} gave no attention map; fused attention computes none. Load it with "
            "from_pretrained(path, attn_implementation='eager'), or call model.set_attn_implementation('eager')"
        )
    raise ValueError(
        f"the student's {name!r} gave no hidden state in training_step: it was not called, or puts out no tensor "
        f"[..., width]; name a layer that is called{stale(root)}"
    )
