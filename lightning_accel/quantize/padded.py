"""Subclasses of torch's convolutions that only pad with zeros and convolve, as in ports of TensorFlow's "same" padding.

0 has an exact code, so it is the same whether zeros are put around an input or around its codes.
"""

from __future__ import annotations

import copy
from typing import Any

from torch import fx, nn
from torch.nn import functional as F

_CONV = {1: F.conv1d, 2: F.conv2d}
_ARGUMENTS = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")


class _Tracer(fx.Tracer):
    """Looks into all modules."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return False


def zero_padding(conv: Any) -> tuple[int, ...] | None:
    """Zeros that a subclass of a convolution puts around its input: (left, right) or (left, right, top, bottom).

    `None` where its forward does anything but pad with zeros and convolve with its own weight, bias and geometry.

    >>> class Same(nn.Conv2d):
    ...     def forward(self, x):
    ...         return super().forward(F.pad(x, (0, 1, 0, 1)))
    >>> zero_padding(Same(3, 8, 3, stride=2, padding=(1, 0)))
    (0, 1, 1, 2)
    """
    if "forward" in vars(conv) or any(m._forward_hooks or m._forward_pre_hooks for m in conv.children()):
        return None
    training, evaluated = _trace(conv, True), _trace(conv, False)
    return training if training == evaluated else None


def _trace(conv: Any, training: bool) -> tuple[int, ...] | None:
    traced = copy.copy(conv)  # its forward may set attributes
    traced.training = training
    before = {name: id(value) for name, value in vars(traced).items()}
    try:
        nodes = list(_Tracer().trace(traced).nodes)
    except Exception:  # whatever a forward does that cannot be traced
        return None
    if {name: id(value) for name, value in vars(traced).items()} != before:
        return None
    given, *steps, output = [node for node in nodes if node.op != "get_attr"]
    around, at = [0] * 2 * (conv.weight.dim() - 2), given
    for node in steps[:-1]:
        pads = _zeros(node, at)
        if pads is None or len(pads) > len(around):
            return None
        around = [a + p for a, p in zip(around, (*pads, *[0] * (len(around) - len(pads))), strict=True)]
        at = node
    own = _own_padding(conv, steps[-1], at) if steps else None
    if own is None or output.args != (steps[-1],):
        return None
    return tuple(a + p for a, p in zip(around, own, strict=True))


def _zeros(node: fx.Node, x: fx.Node) -> tuple[int, ...] | None:
    """What `F.pad` puts around `x`, if `node` is that call and pads with zeros."""
    call = dict(zip(("input", "pad", "mode", "value"), node.args, strict=False)) | node.kwargs
    if node.target is not F.pad or call["input"] is not x or call.get("mode", "constant") != "constant":
        return None
    pads: Any = call["pad"]
    ints = isinstance(pads, tuple | list) and all(isinstance(p, int) and p >= 0 for p in pads)
    return tuple(pads) if ints and call.get("value") in (None, 0) else None


def _own_padding(conv: Any, node: fx.Node, x: fx.Node) -> list[int] | None:
    """The padding of a convolution of `x` with the parameters and the geometry of `conv`, if `node` is that call."""
    dims = conv.weight.dim() - 2
    defaults: dict[str, Any] = {"bias": None, "stride": 1, "padding": 0, "dilation": 1, "groups": 1}
    call = defaults | dict(zip(_ARGUMENTS, node.args, strict=False)) | node.kwargs
    bias = call["bias"] is None if conv._parameters.get("bias") is None else _is_parameter(call["bias"], "bias")
    own = node.target is _CONV[dims] and call["input"] is x and _is_parameter(call["weight"], "weight") and bias
    geometry = all(_tuple(call[name], dims) == tuple(getattr(conv, name)) for name in ("stride", "dilation"))
    if not (own and geometry and call["groups"] == conv.groups):
        return None
    if call["padding"] == "same":
        total = [d * (k - 1) for d, k in zip(conv.dilation, conv.kernel_size, strict=True)]
        ends = [(t // 2, t - t // 2) for t in total]
    else:
        ends = [(p, p) for p in _tuple(0 if call["padding"] == "valid" else call["padding"], dims)]
    return [p for pair in reversed(ends) for p in pair]


def _is_parameter(node: Any, name: str) -> bool:
    return isinstance(node, fx.Node) and node.op == "get_attr" and node.target == name


def _tuple(value: Any, dims: int) -> tuple:
    value = (value,) if isinstance(value, int) else tuple(value)
    return value * dims if len(value) == 1 else value
