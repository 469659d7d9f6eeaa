"""Ranges of activations for static quantization: which values the input of a layer is taken to have.

Three ways to choose a range [low, high] (Krishnamoorthi 2018, arXiv:1806.08342, section 3; Migacz 2017):

    minmax       all values seen
    percentile   all but a share of 1 - PERCENTILE at each end: an outlier costs the others no resolution
    mse          f * [least, most] with the f in (0, 1] for which rounding and clamping cost least in mean square

Calibration looks at a sample of all batches. Training follows the data: the range of each batch, averaged with the
weight MOMENTUM for the newest (Jacob et al. 2018, arXiv:1712.05877, section 3.1).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .static import affine_parameters, affine_round

PERCENTILE = 0.9999
MOMENTUM = 0.05
PER_BATCH, AT_MOST = 1 << 14, 1 << 20  # values kept of a batch, and of all batches
_FACTORS = 40  # candidates of mse


def find_range(x: Tensor, ends: Tensor, observer: str) -> Tensor:
    """[low, high] as float32 [2] for the values `x` [n], a sample of values whose least and most are `ends` [2].

    >>> x = torch.arange(10_001.0)
    >>> find_range(x, torch.stack(x.aminmax()), "percentile")
    tensor([1.0000e+00, 9.9990e+03])
    """
    if observer == "minmax":
        return ends
    if observer == "percentile":
        ordered, last = x.sort().values, len(x) - 1
        return torch.stack([ordered[round((1 - PERCENTILE) * last)], ordered[round(PERCENTILE * last)]])
    candidates = ends * torch.linspace(1 / _FACTORS, 1, _FACTORS, device=x.device)[:, None]
    error = affine_round(x, *affine_parameters(candidates[:, :1], candidates[:, 1:])) - x
    return candidates[error.square().mean(-1).argmin()]


def batch_range(x: Tensor, observer: str) -> Tensor:
    """The range of one batch, float32 [2]."""
    return find_range(_thinned(x, PER_BATCH), _ends(x), observer)


class NonFinite(ValueError):
    """Calibration data that gives no range."""


class Sample:
    """What calibration keeps of the inputs of the module `name`: the least, the most, and some between.

    Of all that it was shown, every `stride`-th value, so many that they fit. Each batch is shuffled before: a stride
    that shares a factor with the number of features would never see some of them.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self.ends = torch.tensor([torch.inf, -torch.inf])
        self.parts: list[Tensor] = []
        self._stride, self._shown = 1, 0
        self._generator = torch.Generator().manual_seed(0)

    def add(self, x: Tensor) -> None:
        """Takes note of a batch.

        Raises:
            NonFinite: it holds NaN or infinite values.
        """
        low, high = _ends(x).cpu()
        if not (torch.isfinite(low) and torch.isfinite(high)):
            raise NonFinite(f"brings NaN or infinite values to {self.name!r}")
        self.ends = torch.stack([torch.minimum(self.ends[0], low), torch.maximum(self.ends[1], high)])
        some = _thinned(x, PER_BATCH).cpu()
        some = some[torch.randperm(len(some), generator=self._generator)]
        self.parts.append(some[-self._shown % self._stride :: self._stride])
        self._shown += len(some)
        if sum(map(len, self.parts)) > AT_MOST:
            self.parts, self._stride = [torch.cat(self.parts)[::2]], 2 * self._stride

    def find_range(self, observer: str) -> Tensor:
        """The range of all that was shown, float32 [2]."""
        return find_range(torch.cat(self.parts), self.ends, observer)


def _ends(x: Tensor) -> Tensor:
    return torch.stack(x.detach().float().aminmax())


def _thinned(x: Tensor, most: int) -> Tensor:
    """At most `most` values of `x`, evenly spaced, flat; every feature is among them as often as the others."""
    x = x.detach().flatten()
    stride = -(-x.numel() // most)
    while math.gcd(stride, x.numel()) > 1:
        stride += 1
    return x[::stride].float()
