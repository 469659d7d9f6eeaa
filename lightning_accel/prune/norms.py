"""RMSNorm over a width that is cut: with its gain rescaled it puts out what it did while the units were zero.

RMSNorm(x) = g x / sqrt(sum(x^2) / n + eps). With k of n units left and the others zero, the sum stays and n becomes k;
so g sqrt(n / k) in place of g, and eps n / k in place of eps, give the same.
LayerNorm also subtracts the mean over the width, which no gain makes up for.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from .. import select

_EPS = ("variance_epsilon", "eps")  # of norms of transformers, and of torch
_CONFIGURED = ("rms_norm_eps", "layer_norm_epsilon")  # in configurations


@torch.no_grad()
def is_rms_norm(module: nn.Module) -> bool:
    """Whether a module puts out weight * x / sqrt(mean of x^2), with its one parameter, whatever its class."""
    parameters = dict(module.named_parameters())
    if list(parameters) != ["weight"] or parameters["weight"].dim() != 1:
        return False
    weight = parameters["weight"]
    x = torch.linspace(-1.0, 3.0, len(weight), dtype=weight.dtype, device=weight.device)[None]
    try:
        found = module(x)
    except Exception:  # it takes other inputs
        return False
    expected = weight * x * x.square().mean().rsqrt()
    return (
        isinstance(found, Tensor) and found.shape == x.shape and torch.allclose(found, expected, rtol=1e-2, atol=1e-3)
    )


def rescaled_gains(model: nn.Module, left: Iterable[tuple[str, Tensor]]) -> list[tuple[str, float]]:
    """(name, sqrt(n / k)) of the weights of RMSNorms among `left`, names with the positions [n] that stay."""
    found = []
    for name, stays in left:
        owner, _, leaf = name.rpartition(".")
        if leaf == "weight" and not stays.all() and is_rms_norm(select.get_module(model, owner)):
            found.append((name, (len(stays) / int(stays.sum())) ** 0.5))
    return found


@torch.no_grad()
def rescale_gains_(model: nn.Module, gains: Iterable[tuple[str, float]]) -> None:
    """Multiplies weights of RMSNorms by their factor, and their eps by its square, in place.

    The configuration's eps follows where all norms of the model have it.
    """
    config: Any = getattr(model, "config", None)
    factors = set()
    for name, factor in gains:
        norm: Any = select.get_module(model, name.rpartition(".")[0])
        norm.weight.mul_(factor)
        for field in _EPS:
            if isinstance(getattr(norm, field, None), float):
                setattr(norm, field, getattr(norm, field) * factor**2)
                factors.add(factor**2)
    of_all = {getattr(m, f) for m in model.modules() for f in _EPS if isinstance(getattr(m, f, None), float)}
    for field in _CONFIGURED if len(factors) == len(of_all) == 1 else ():
        if isinstance(getattr(config, field, None), float):
            setattr(config, field, next(iter(of_all)))
