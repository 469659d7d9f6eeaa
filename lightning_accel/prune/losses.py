"""Allocation by sensitivity: how much the loss rises when each group alone is pruned, and equal rises for all.

Each group g is masked alone, at some shares a of its units, which gives its curve d_g(a) = loss - loss of the whole
model (as in Li et al. 2017, arXiv:1608.08710, section 3.2). The share of a group is then the largest with
d_g(a_g) <= t, with t the same for all, found by bisection: mean of a_g = amount.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from .. import select
from .groups import Group
from .keep import keep_units, masks_of

Rises = list[list[float]]  # [share of units that goes, what the loss rises by], from [0, 0] up
Loss = Callable[[nn.Module, Any], Tensor]
_WORST = 1e6  # in place of a rise that is infinite or NaN
_SHARES = (0.25, 0.5, 0.75, 1.0)  # of units that are masked; one stays


@torch.no_grad()
def loss_table(
    model: nn.Module, targets: list[Group], saliencies: list[Tensor], batches: Iterable[Any], loss: Loss
) -> list[Rises]:
    """For each target the rise of the mean loss with a quarter, half, three quarters and all but one of its units
    masked alone, the least salient, in eval mode; a rise never falls with the share.

    Args:
        loss: (model, batch) -> scalar.
    """
    batches = list(batches)
    parameters = select.all_parameters(model)
    with select.evaluating(model):
        whole = mean_loss(model, batches, loss)
        if not math.isfinite(whole):
            raise ValueError(f"the loss of the calibration batches is {whole}; look at the batches and the model")
        return [_rises(model, t, s, parameters, lambda: mean_loss(model, batches, loss) - whole)
                for t, s in zip(targets, saliencies, strict=True)]  # fmt: skip


def _rises(
    model: nn.Module, target: Group, saliency: Tensor, parameters: dict[str, Any], rise: Callable[[], float]
) -> Rises:
    found, most = [[0.0, 0.0]], 0.0
    for share in _SHARES:
        (keep,) = keep_units([target], [saliency], [share])
        gone = 1.0 - keep.double().mean().item()
        if gone <= found[-1][0]:
            continue  # of few units, the same as before
        masks = masks_of([target], [keep], parameters)
        before = {name: parameters[name].detach().clone() for name in masks}
        try:
            for name, mask in masks.items():
                parameters[name].mul_(mask)
            rises = rise()
            most = max(most, rises if math.isfinite(rises) else _WORST)
        finally:
            for name, value in before.items():
                parameters[name].copy_(value)
        found.append([gone, most])
    (a, low), (b, high) = found[-2:] if len(found) > 1 else ([0.0, 0.0], [1.0, 0.0])
    return [*found, [1.0, high + (high - low) * (1.0 - b) / (b - a)]] if b < 1.0 else found


def mean_loss(model: nn.Module, batches: list[Any], loss: Loss) -> float:
    """The mean over batches of `loss(model, batch)`."""
    return sum(loss(model, batch).item() for batch in batches) / len(batches)


def share_at(rises: Rises, most: float) -> float:
    """The largest share of a group whose loss rises by at most `most`.

    >>> share_at([[0.0, 0.0], [0.5, 0.2], [1.0, 1.0]], 0.6)
    0.75
    """
    share = 0.0
    for (a, low), (b, high) in pairwise(rises):
        if high > most:
            return a + (b - a) * max(most - low, 0.0) / (high - low)
        share = b
    return share


def equal_rises(table: Sequence[Rises], amount: float) -> list[float]:
    """A share for each group, their mean `amount`, at which the loss rises alike.

    >>> steep, flat = [[0.0, 0.0], [1.0, 3.0]], [[0.0, 0.0], [1.0, 1.0]]
    >>> [round(share, 3) for share in equal_rises([steep, flat], 0.5)]
    [0.25, 0.75]
    """

    def mean(most: float) -> float:
        return sum(share_at(rises, most) for rises in table) / len(table)

    low, high = 0.0, max((rises[-1][1] for rises in table), default=0.0)
    if (free := mean(0.0)) >= amount:  # enough goes without any rise
        return [share_at(rises, 0.0) * (amount / free if free else 0.0) for rises in table]
    for _ in range(50):
        middle = (low + high) / 2
        low, high = (low, middle) if mean(middle) >= amount else (middle, high)
    return [share_at(rises, high) for rises in table]
