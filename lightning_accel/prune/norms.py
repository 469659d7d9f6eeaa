"""RMSNorm over a width that is cut: with its gain rescaled it puts out what it did while the units were zero.

RMSNorm(x) = g x / sqrt(sum(x^2) / n + eps). With k of n units left and the others zero, the sum stays and n becomes k;
so g sqrt(n / k) in place of g, and eps n / k in place of eps, give the same.
LayerNorm also subtracts the mean over the width, which no gain makes up for.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .. import select
from .widths import HIDDEN

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


def rescaled_gains(model: nn.Module, left: Iterable[tuple[str, Tensor]]) -> list[tuple[str, float, float | None]]:
    """(name, sqrt(n / k), eps n / k) of weights of RMSNorms among `left`, names with the positions [n] that stay."""
    found = []
    for name, stays in left:
        owner, _, leaf = name.rpartition(".")
        if leaf == "weight" and not stays.all() and is_rms_norm(norm := select.get_module(model, owner)):
            square = len(stays) / int(stays.sum())
            found.append((name, square**0.5, None if (eps := _eps(norm)) is None else eps * square))
    return found


def _eps(norm: Any) -> float | None:
    field = next((field for field in _EPS if hasattr(norm, field)), None)
    eps = None if field is None else getattr(norm, field)
    return torch.finfo(norm.weight.dtype).eps if field is not None and eps is None else eps  # as torch.nn.RMSNorm


@torch.no_grad()
def rescale_gains_(model: nn.Module, gains: Iterable[Sequence[Any]], changed: set[str]) -> None:
    """Sets eps of RMSNorms, and multiplies the weights of those that were `changed` just now by their factor, in place.

    Args:
        gains: as from `rescaled_gains`.
    """
    for name, factor, *eps in gains:
        norm: Any = select.get_module(model, name.rpartition(".")[0])
        if name in changed:
            norm.weight.mul_(factor)
        for field in (field for field in _EPS if eps and eps[0] is not None and hasattr(norm, field)):
            setattr(norm, field, eps[0])


def record_eps(model: nn.Module, gains: Iterable[Sequence[Any]]) -> None:
    """Writes eps into the configuration where it says the new width, and all norms of the model have the same."""
    config: Any = getattr(model, "config", None)
    widths = {len(select.get_module(model, name.rpartition(".")[0]).weight) for name, *_ in gains}  # type: ignore[arg-type]
    said = {getattr(config, field, None) for field in HIDDEN}
    of_all = {getattr(m, f) for m in model.modules() for f in _EPS if isinstance(getattr(m, f, None), float)}
    for field in _CONFIGURED if len(of_all) == 1 and widths and widths <= said else ():
        if isinstance(getattr(config, field, None), float):
            setattr(config, field, next(iter(of_all)))
