"""Convolutions with fake quantization, and the BatchNorm that each absorbs when it is deployed.

With running statistics m and v, a convolution w * x + b followed by BatchNorm (weight g, bias h) is the convolution

    (f w) * x + f (b - m) + h        f = g / sqrt(v + eps)

so it is f w that is rounded, in training as when deployed. In training, the convolution's output is divided by f again
and the BatchNorm runs as always, on the statistics of the batch; near the end of training it is frozen and uses the
running ones, as the deployed model does (Krishnamoorthi 2018, arXiv:1806.08342, section 3.2.2; Jacob et al. 2018,
arXiv:1712.05877, section 3.2).

Which BatchNorm follows which convolution is seen in a forward pass: it is given the very tensor that the other put out.
Where anything else is given that tensor too, as in norm(y) + y, the convolution must go on to put it out.
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Mapping
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from .. import select


class _FakeQuantizedConv:
    """What the fake-quantized convolutions share.

    Attributes:
        norm: the BatchNorm to be absorbed, or `None`.
        around: of a subclass, the zeros that it puts around its input (`padded.zero_padding`); else `None`.
    """

    activation_fake_quantizer: nn.Module
    weight_fake_quantizer: nn.Module
    weight: Tensor
    bias: Tensor | None
    norm: Any
    around: tuple[int, ...] | None

    def forward(self, x: Tensor) -> Tensor:
        factor = norm_factor(self.norm)
        weight = folded_weight(self)
        rounded = self.weight_fake_quantizer(weight.flatten(1)).view_as(weight)
        y = self._convolve(self.activation_fake_quantizer(x), rounded)
        shape = (-1, *[1] * (weight.dim() - 2))
        y = y if factor is None else y / factor.view(shape).to(y.dtype)
        return y if self.bias is None else y + self.bias.view(shape).to(y.dtype)

    def _convolve(self, x: Tensor, weight: Tensor) -> Tensor:
        conv: Any = self
        if self.around is None:
            return conv._conv_forward(x, weight, None)
        function, ends = F.conv1d if weight.dim() == 3 else F.conv2d, self.around[::2]
        if ends == self.around[1::2]:
            return function(x, weight, None, conv.stride, ends[::-1], conv.dilation, conv.groups)
        return function(F.pad(x, self.around), weight, None, conv.stride, 0, conv.dilation, conv.groups)


class FakeQuantizedConv1d(_FakeQuantizedConv, nn.Conv1d):
    """nn.Conv1d with fake-quantized activations and weights."""


class FakeQuantizedConv2d(_FakeQuantizedConv, nn.Conv2d):
    """nn.Conv2d with fake-quantized activations and weights."""


def norm_factor(norm: Any) -> Tensor | None:
    """f of each channel, [channels], without a gradient: BatchNorm's weight learns from its own place.

    Where it is 0, 1: the BatchNorm makes nothing of such a channel.
    """
    if norm is None:
        return None
    factor = torch.rsqrt(norm.running_var.detach() + norm.eps)
    factor = factor if norm.weight is None else factor * norm.weight.detach()
    return torch.where(factor == 0, 1.0, factor)


def folded_weight(conv: Any) -> Tensor:
    """f w, [out, in, ...]."""
    factor = norm_factor(conv.norm)
    return conv.weight if factor is None else conv.weight * factor.view(-1, *[1] * (conv.weight.dim() - 1))


def folded_bias(conv: Any) -> tuple[Tensor, Tensor]:
    """What the outputs of a folded convolution are multiplied by, and the bias that is then added; both [out].

    The first is 1, or 0 for a channel of which the BatchNorm makes nothing.
    """
    ones = torch.ones(len(conv.weight))
    bias = torch.zeros(len(conv.weight)) if conv.bias is None else conv.bias.detach()
    norm = conv.norm
    if norm is None:
        return ones, bias
    factor = torch.rsqrt(norm.running_var + norm.eps) * (1.0 if norm.weight is None else norm.weight.detach())
    shift = 0.0 if norm.bias is None else norm.bias.detach()
    return torch.where(factor == 0, 0.0, ones), factor * (bias - norm.running_mean) + shift


class _Frozen:
    """A BatchNorm that uses its running statistics in training too."""

    def forward(self, x: Tensor) -> Tensor:
        n: Any = self
        return F.batch_norm(x, n.running_mean, n.running_var, n.weight, n.bias, False, 0.0, n.eps)


class FrozenBatchNorm1d(_Frozen, nn.BatchNorm1d):
    """nn.BatchNorm1d with fixed statistics."""


class FrozenBatchNorm2d(_Frozen, nn.BatchNorm2d):
    """nn.BatchNorm2d with fixed statistics."""


class FrozenSyncBatchNorm(_Frozen, nn.SyncBatchNorm):
    """nn.SyncBatchNorm with fixed statistics."""


_FROZEN: dict[type, type] = {
    nn.BatchNorm1d: FrozenBatchNorm1d,
    nn.BatchNorm2d: FrozenBatchNorm2d,
    nn.SyncBatchNorm: FrozenSyncBatchNorm,
}
_THAWED = {frozen: norm for norm, frozen in _FROZEN.items()}
_CONVS = (FakeQuantizedConv1d, FakeQuantizedConv2d)


class _Output:
    """What a convolution put out in one call, and whether anything but a BatchNorm took it."""

    def __init__(self, conv: str, y: Tensor) -> None:
        self.conv, self.tensor, self.used = conv, weakref.ref(y), False


_watches: list[NormWatch] = []  # those that run; compiled code runs uncompiled while there is one
_uncompiled = ExitStack()


class NormWatch(TorchFunctionMode):
    """Sees, from now to `stop`, which BatchNorm takes the output of which fake-quantized convolution, and alone.

    What torch.compile compiled runs uncompiled in the meantime, as torch cannot look into it.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self._outputs: list[_Output] = []
        self._by_id: dict[int, _Output] = {}
        self._pairs: set[tuple[str | None, str]] = set()
        self._in_norm = False
        self._hooks = [model.register_forward_hook(lambda module, args, result: self._use(result))]
        for name, module in select.named_modules(model):
            if type(module) in _CONVS:  # before hooks of the user, which may use what it puts out
                self._hooks.append(module.register_forward_hook(partial(self._put_out, name), prepend=True))
            elif type(module) in _FROZEN and module.running_var is not None:
                self._hooks.append(module.register_forward_pre_hook(partial(self._taken, name)))
                self._hooks.append(module.register_forward_hook(self._done, prepend=True, always_call=True))
        if not _watches:
            _uncompiled.enter_context(torch.compiler.set_stance("force_eager"))
        _watches.append(self)
        self.__enter__()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        asks = result is not None and not any(isinstance(leaf, Tensor) for leaf in tree_leaves(result))  # for a shape
        if not (self._in_norm or asks):
            self._use((args, kwargs))
        return result

    def _use(self, tensors: Any) -> None:
        for leaf in tree_leaves(tensors):
            if (output := self._of(leaf)) is not None:
                output.used = True

    def _of(self, y: Any) -> _Output | None:
        output = self._by_id.get(id(y))
        return output if output is not None and output.tensor() is y else None

    def _put_out(self, conv: str, module: nn.Module, args: tuple, y: Tensor) -> None:
        self._by_id[id(y)] = output = _Output(conv, y)
        self._outputs.append(output)

    def _taken(self, norm: str, module: nn.Module, args: tuple) -> None:
        output = self._of(args[0])
        self._pairs.add((None if output is None else output.conv, norm))
        self._in_norm = True

    def _done(self, *_: Any) -> None:
        self._in_norm = False

    def stop(self) -> dict[str, str]:
        """Convolution -> BatchNorm, by name, where each has no other partner and nothing else uses what is between."""
        if self in _watches:
            _watches.remove(self)
            self.__exit__(None, None, None)
        if not _watches:  # whichever of several stops last
            _uncompiled.close()
        for hook in self._hooks:
            hook.remove()
        convs, norms = (Counter(pair[i] for pair in self._pairs) for i in (0, 1))
        used = {output.conv for output in self._outputs if output.used}
        pairs = [(c, n) for c, n in sorted(self._pairs, key=str) if c is not None and c not in used]
        return {c: n for c, n in pairs if convs[c] == norms[n] == 1}


def fold_(model: nn.Module, norms: Mapping[str, str]) -> None:
    """Tells each fake-quantized convolution which BatchNorm it absorbs, by their names."""
    modules: dict[str, Any] = dict(select.named_modules(model))
    for conv, norm in norms.items():
        if conv in modules and type(modules[conv]) in _CONVS:
            modules[conv].__dict__["norm"] = modules[norm]  # not registered as its child


def norms_of(model: nn.Module) -> dict[str, str]:
    """Name of each convolution with a BatchNorm to absorb -> name of that."""
    names = {id(module): name for name, module in select.named_modules(model)}
    convs = [(name, m) for name, m in select.named_modules(model) if type(m) in _CONVS]
    return {name: names[id(conv.norm)] for name, conv in convs if conv.norm is not None}


def freeze_norms_(model: nn.Module) -> None:
    """The BatchNorms that convolutions absorb use their running statistics in training too."""
    for name in norms_of(model).values():
        norm = select.get_module(model, name)
        norm.__class__ = _FROZEN.get(type(norm), type(norm))


def thaw_norm_(norm: nn.Module) -> None:
    """Undoes `freeze_norms_`."""
    norm.__class__ = _THAWED.get(type(norm), type(norm))
