"""Layers: which of the student's belong to which of the teacher's, what they put out, and widths that differ."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .. import select

_CHANNELS_FIRST = (nn.Conv1d, nn.ConvTranspose1d, nn.BatchNorm1d)  # of [batch, channels, length]


def layer_map(student: nn.Module, teacher: nn.Module, layers: Mapping[str, str] | str) -> dict[str, str]:
    """Name of a module of the student -> name of the teacher's that it learns from.

    Of a student with n layers and a teacher with N, layer i (from 0) learns from (Sun et al. 2019, arXiv:1908.09355)

        uniform   ceil((i + 1) N / n) - 1        last   N - n + i

    Args:
        layers: `"uniform"`, `"last"`, or such a mapping, which is checked. Layers are found where modules of one class,
            made of modules themselves, stand in an `nn.ModuleList`; encoder and decoder are mapped each on its own.

    Raises:
        ValueError: no layers are found, the student has more than the teacher, a name does not exist.

    >>> layer = nn.TransformerEncoderLayer(8, 2, batch_first=True)
    >>> student, teacher = (nn.TransformerEncoder(layer, n) for n in (2, 6))
    >>> layer_map(student, teacher, "uniform")
    {'layers.0': 'layers.2', 'layers.1': 'layers.5'}
    """
    if isinstance(layers, Mapping):
        for model, names, where in ((student, layers.keys(), "student"), (teacher, layers.values(), "teacher")):
            check_names(model, names, where)
        return dict(layers)
    stacks, theirs = _stacks(student), _stacks(teacher)
    if not stacks or len(stacks) != len(theirs):
        raise ValueError(
            f"{layers!r} needs as many stacks of layers in student and teacher, and there are {len(stacks)} in the "
            f"{type(student).__name__} and {len(theirs)} in the {type(teacher).__name__}; name the layers: "
            "hidden={'student.layer': 'teacher.layer'}"
        )
    pairs: dict[str, str] = {}
    for own, other in zip(stacks, theirs, strict=True):
        n, total = len(own), len(other)
        if n > total:
            raise ValueError(
                f"the student has {n} layers ({own[0]}, ...), the teacher {total} ({other[0]}, ...); {layers!r} needs "
                "a teacher of no fewer. Name them: hidden={'student.layer': 'teacher.layer'}"
            )
        for i, name in enumerate(own):
            pairs[name] = other[-(-(i + 1) * total // n) - 1 if layers == "uniform" else total - n + i]
    return pairs


def check_names(model: nn.Module, names: Iterable[str], where: str) -> None:
    """Raises ValueError where the model, called `where` in the message, has no module of a name."""
    known = [name for name, _ in select.named_modules(model)]
    for name in names:
        if name not in known:
            depth = name.count(".")
            near = [k for k in known if k and k.count(".") == depth][:12] or [k for k in known if k][:12]
            raise ValueError(
                f"the {where}, a {type(model).__name__}, has no module {name!r}; names are relative to it, for "
                f"example {', '.join(near)}"
            )


def _stacks(model: nn.Module) -> list[list[str]]:
    """Names of the layers in each outermost `nn.ModuleList` of modules of one class, made of modules themselves."""
    found: list[tuple[str, list[str]]] = []
    for name, module in select.named_modules(model):
        inside = any(name.startswith(f"{outer}.") for outer, _ in found)
        alike = isinstance(module, nn.ModuleList) and len({type(m) for m in module}) == 1
        if alike and not inside and any(list(child.children()) for child in module.children()):
            found.append((name, [f"{name}.{i}" for i, _ in enumerate(module.children())]))
    return [layers for _, layers in found]


# --- what layers put out ----------------------------------------------------------------------------------------------


def state_of(output: Any) -> Tensor | None:
    """The hidden state in a module's output: the tensor, the first of a tuple, or `last_hidden_state`.

    Feature maps [batch, channels, height, width] are given as [batch, height, width, channels]. Of [batch, channels,
    length], which may as well be [batch, length, width], it is known from the module alone (`Taps`).
    """
    if isinstance(output, Mapping):
        output = output.get("last_hidden_state", output.get("hidden_states"))
    elif isinstance(output, tuple | list):
        output = next(iter(output), None)
    if not isinstance(output, Tensor) or not output.is_floating_point() or output.dim() < 2:
        return None
    return output.movedim(1, -1) if output.dim() == 4 else output


def attention_of(output: Any) -> Tensor | None:
    """The attention map [batch, heads, queries, keys] in an attention module's output, beside what it computes."""
    maps = output[1:] if isinstance(output, tuple | list) else ()
    return next((m for m in maps if isinstance(m, Tensor) and m.dim() == 4 and m.is_floating_point()), None)


class Taps:
    """Forward hooks on named modules, which keep what they put out while `open`.

    Args:
        root: names are relative to it.
        hidden, attention: names of the modules whose states, or attention maps, are kept.

    Attributes:
        hidden, attention: name -> one tensor a call, in order.
    """

    def __init__(self, root: nn.Module, hidden: Iterable[str] = (), attention: Iterable[str] = ()) -> None:
        self.open = False
        self._versions: dict[tuple[str, int], int] = {}  # of a name's n-th state, when it was kept
        self.hidden: dict[str, list[Tensor]] = {name: [] for name in hidden}
        self.attention: dict[str, list[Tensor]] = {name: [] for name in attention}
        self.modules = {name: select.get_module(root, name) for name in (*self.hidden, *self.attention)}
        self._handles: list[Any] = []
        for name in self.hidden:
            self._handles.append(self.modules[name].register_forward_hook(self._keep_state(name)))
        for name in self.attention:
            self._watch_maps(name)

    def _keep_state(self, name: str) -> Callable[..., None]:
        def keep(module: nn.Module, args: Any, output: Any) -> None:
            if self.open and (state := state_of(output)) is not None:
                channels_first = isinstance(module, _CHANNELS_FIRST) and state.dim() == 3
                self.hidden[name].append(state.movedim(1, -1) if channels_first else state)
                self._versions[name, len(self.hidden[name])] = state._version

        return keep

    def _watch_maps(self, name: str) -> None:
        """The first map that a call of the module, or of a module below it, puts out."""
        waiting = [False]

        def begin(module: nn.Module, args: Any) -> None:
            waiting[0] = self.open

        def keep(module: nn.Module, args: Any, output: Any) -> None:
            if waiting[0] and (found := attention_of(output)) is not None:
                self.attention[name].append(found)
                waiting[0] = False

        self._handles.append(self.modules[name].register_forward_pre_hook(begin))
        self._handles += [module.register_forward_hook(keep) for module in self.modules[name].modules()]

    def check(self) -> None:
        """Raises ValueError where a state was written over after it was kept."""
        for (name, count), version in self._versions.items():
            if self.hidden[name][count - 1]._version != version:
                raise ValueError(
                    f"the state that {name!r} puts out is changed in place after it, as by ReLU(inplace=True); write "
                    "inplace=False there, or name the module that changes it"
                )

    def clear(self) -> None:
        """Lets go of what was kept."""
        self._versions = {}
        for kept in (*self.hidden.values(), *self.attention.values()):
            kept.clear()

    def remove(self) -> None:
        """Takes the hooks off."""
        self.clear()
        for handle in self._handles:
            handle.remove()
        self._handles = []


# --- widths that differ -----------------------------------------------------------------------------------------------


class Projections:
    """Linear maps from the student's widths to the teacher's, W [teacher, student], made when they are first needed.

    They are trained with the student and belong to nobody's `state_dict`. Each begins at random numbers that depend on
    its layer's name and widths only, so that all ranks, and a second fit, begin at the same ones.

    Attributes:
        weights: student's layer -> weight, in the order in which they were made.
    """

    def __init__(self) -> None:
        self.weights: dict[str, nn.Parameter] = {}

    def __call__(self, name: str, state: Tensor, width: int) -> Tensor:
        """`state` [..., student width] as [..., width]; itself where it has that width."""
        if state.shape[-1] == width:
            return state
        if name not in self.weights:
            self.weights[name] = self._make(name, state, width)
        weight = self.weights[name]
        if weight.shape != (width, state.shape[-1]):
            raise ValueError(
                f"the projection of {name!r} is {tuple(weight.shape)}, the widths of teacher and student are "
                f"{(width, state.shape[-1])}; the checkpoint is of another student or teacher"
            )
        return F.linear(state.to(weight.dtype), weight)

    @staticmethod
    def _make(name: str, state: Tensor, width: int) -> nn.Parameter:
        shape = width, state.shape[-1]
        generator = torch.Generator().manual_seed(zlib.crc32(f"{name} {shape}".encode()))
        weight = torch.randn(shape, generator=generator, dtype=torch.float32) / shape[1] ** 0.5
        return nn.Parameter(weight.to(state.device))

    def state_dict(self) -> dict[str, Tensor]:
        """Copies of the weights on the CPU."""
        return {name: weight.detach().cpu().clone() for name, weight in self.weights.items()}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Makes the projections that `state_dict` held."""
        self.weights = {name: nn.Parameter(weight.clone()) for name, weight in state.items()}
