"""What a width costs in time on this machine: groups are cut to a few widths, timed in turns, and put in a table.

With s_g(w) the share of the whole model's time that group g saves at width w, measured at some widths and linear
between them, the masks save sum_g s_g(w_g): groups follow each other in a forward, so their times add up. What lies in
a layer that is gone saves nothing more than the layer does.
"""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from .. import select
from ..capture import call_example
from ..inputs import ExampleInputs
from . import cut
from .groups import Group, plain_copy
from .keep import masks_of, rounded
from .layers import block_of

Calls = Mapping[str, ExampleInputs]
Timer = Callable[[Sequence[nn.Module], Calls], Sequence[float]]  # seconds of the calls of each model
Curve = list[list[float]]  # [units left, share of the model's time that is saved], from the whole width down
_SHARES = (0.75, 0.5, 0.25, 0.0)  # of a group's units, at which it is timed


def time_in_turns(models: Sequence[nn.Module], calls: Calls, rounds: int = 9) -> list[float]:
    """Median seconds of an eager forward of each model, in float32, with the threads that torch has; they take turns,
    and the first round is warm-up.

    Args:
        calls: example inputs of the model (under `""`) or of its parts.
    """
    seconds: list[list[float]] = [[] for _ in models]
    for turn in range(rounds + 1):
        for model, found in zip(models, seconds, strict=True):
            started = time.perf_counter()
            for part, inputs in calls.items():
                call_example(select.get_module(model, part), inputs)
            if turn:
                found.append(time.perf_counter() - started)
    return [statistics.median(found) for found in seconds]


def latency_table(
    model: nn.Module, targets: list[Group], calls: Calls, round_to: int = 1, timer: Timer = time_in_turns
) -> list[Curve]:
    """For each target a curve: what share of the model's time is saved with how many of its units left.

    Targets of the same kind and shapes are cut and timed together, and share what they save. Widths are timed at a
    quarter, half, three quarters and all but one unit (or `round_to`) gone; a narrower one never counts as slower.

    Raises:
        ValueError: a cut model does not run.
    """
    model = plain_copy(model)
    calls = torch.utils._pytree.tree_map_only(Tensor, Tensor.cpu, dict(calls))
    parameters = select.named_parameters(model)
    alike: dict[Any, list[int]] = {}
    for i, target in enumerate(targets):
        members = (
            (m.unit, m.dim, tuple(m.index.shape), tuple(parameters[m.name].shape))
            for m in target.members
            if m.name in parameters
        )
        alike.setdefault((target.kind, target.width, *members), []).append(i)
    curves: list[Curve] = [[] for _ in targets]
    for same in alike.values():
        target = targets[same[0]]
        lefts = {rounded(max(1, round(share * target.width)), target, round_to) for share in _SHARES}
        widths = sorted(lefts - {target.width}, reverse=True)
        models = [model, *(_cut(model, [targets[i] for i in same], left) for left in widths)]
        try:
            whole, *seconds = timer(models, calls)
        except ValueError as error:
            raise ValueError(
                f"cutting {target.kind} out of {target.name!r} leaves a model that does not run ({error}); exclude it: "
                f"overrides={{{target.name!r}: None}}"
            ) from error
        curve, most = [[float(target.width), 0.0]], 0.0
        for left, taken in zip(widths, seconds, strict=True):
            most = max(most, (whole - taken) / whole / len(same))
            curve.append([float(left), most])
        for i in same:
            curves[i] = curve
    return curves


def _cut(model: nn.Module, targets: list[Group], left: int) -> nn.Module:
    """A copy with the first `left` units of each target."""
    small = copy.deepcopy(model)
    masks = masks_of(targets, [torch.arange(t.width) < left for t in targets], select.named_parameters(small))
    cut.replay_(small, cut.plan(small, masks, [t for t in targets if t.kind != "layers"]))
    return small


def saved(curve: Curve, left: float) -> float:
    """The share of time saved with `left` units, linear between what was measured.

    >>> saved([[100.0, 0.0], [50.0, 0.2], [1.0, 0.3]], 75)
    0.1
    """
    for (more, least), (fewer, most) in pairwise(curve):
        if left >= fewer:
            return least + (most - least) * (more - left) / (more - fewer)
    return curve[-1][1]


def gain(curve: Curve) -> float:
    """The share of time that a unit saves, on average over the curve."""
    left, share = curve[-1]
    return share / (curve[0][0] - left) if len(curve) > 1 else 0.0


class LatencyCosts:
    """What masks save of a model's time, by a table that `latency_table` made; a stand-in for `Costs`."""

    def __init__(self, targets: list[Group], table: list[Curve]) -> None:
        self.curves = table
        self._inside: dict[int, tuple[int, int]] = {}  # target -> the list of layers and the layer that it lies in
        for i, target in enumerate(targets):
            for j, layers in enumerate(targets):
                unit = block_of(target.members[0].name, layers.units) if target.kind != "layers" else None
                if unit is not None:
                    self._inside[i] = j, unit

    def removed(self, masks: Mapping[str, Tensor], kept: list[Tensor]) -> float:
        """Share in [0, 1] of the time that is gone where `kept` of the units of each target stay."""
        gone = 0.0
        for i, (curve, keep) in enumerate(zip(self.curves, kept, strict=True)):
            j, unit = self._inside.get(i, (-1, -1))
            if j < 0 or bool(kept[j][unit]):
                gone += saved(curve, int(keep.sum()))
        return gone
