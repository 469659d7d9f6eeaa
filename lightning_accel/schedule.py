"""How much, when: a schedule maps an optimizer step to a share in [0, 1] of the final amount.

`begin` and `end` are optimizer steps when they are ints and fractions of training when they are floats, so
`Cubic(begin=0.1, end=0.6)` rises between 10 % and 60 % of training and `Linear(begin=100, end=500)` between
optimizer steps 100 and 500, however long training is.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field


class Schedule:
    """Base class: rises from 0 at `begin` to 1 at `end`; subclasses, frozen dataclasses, give the shape of the rise."""

    begin: int | float
    end: int | float

    def __post_init__(self) -> None:
        for name, value in (("begin", self.begin), ("end", self.end)):
            check_position(value, f"{type(self).__name__}({name}=...)")
        if type(self.begin) is type(self.end) and self.begin > self.end:
            raise ValueError(
                f"{self!r} ends before it begins; write {type(self).__name__}(begin={self.end}, end={self.begin})"
            )

    def value(self, step: int, total: float) -> float:
        """Share in [0, 1] at optimizer step `step` of a training of `total` optimizer steps."""
        begin, end = position(self.begin, total), position(self.end, total)
        if step < begin:
            return 0.0
        if step >= end:
            return 1.0
        return self._rise((step - begin) / (end - begin))

    def check(self, total: float) -> None:
        """Raises ValueError where the schedule does not fit a training of `total` optimizer steps."""
        begin, end = position(self.begin, total), position(self.end, total)
        if begin > end:
            raise ValueError(f"{self!r} is inverted in a training of {total:g} optimizer steps: {begin} > {end}")
        if end > total:
            raise ValueError(
                f"{self!r} ends at optimizer step {end}, past the end of training ({total:g} steps); "
                f"write end={int(total)} or a fraction such as end=0.8, or train longer"
            )

    def _rise(self, progress: float) -> float:
        raise NotImplementedError


@dataclass(frozen=True)
class Constant(Schedule):
    """0 before `begin`, the whole amount from then on.

    >>> [Constant(0.5).value(step, total=100) for step in (49, 50)]
    [0.0, 1.0]
    """

    begin: int | float = 0.0
    end: int | float = field(init=False, repr=False, default=0.0)

    def __post_init__(self) -> None:
        object.__setattr__(self, "end", self.begin)
        super().__post_init__()

    def _rise(self, progress: float) -> float:
        return 1.0


@dataclass(frozen=True)
class Linear(Schedule):
    """Rises in proportion to progress.

    >>> [Linear(begin=10, end=0.5).value(step, total=100) for step in (10, 20, 50, 99)]
    [0.0, 0.25, 1.0, 1.0]
    """

    begin: int | float = 0.0
    end: int | float = 1.0

    def _rise(self, progress: float) -> float:
        return progress


@dataclass(frozen=True)
class Cubic(Schedule):
    """1 - (1 - progress)^3: prunes fast at first and slowly at the end (Zhu & Gupta 2017, arXiv:1710.01878).

    >>> [Cubic(begin=0.0, end=0.8).value(step, total=100) for step in (0, 40, 80)]
    [0.0, 0.875, 1.0]
    """

    begin: int | float = 0.0
    end: int | float = 1.0

    def _rise(self, progress: float) -> float:
        return 1.0 - (1.0 - progress) ** 3


@dataclass(frozen=True)
class Between:
    """A value that goes from `first` to `last` along a schedule: a weight that falls, or ends elsewhere than at 1.

    >>> [Between(0.9, 0.1, Linear(0.0, 0.5)).value(step, total=100) for step in (0, 25, 50)]
    [0.9, 0.5, 0.1]
    """

    first: float
    last: float
    schedule: Schedule = field(default_factory=Linear)

    def __post_init__(self) -> None:
        for name, value in (("first", self.first), ("last", self.last)):
            if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
                raise ValueError(f"Between({name}={value!r}) is no number; write Between(0.9, 0.1, Linear(0.0, 0.5))")
        if not isinstance(self.schedule, Schedule):
            raise ValueError(
                f"Between(schedule={self.schedule!r}) is no Schedule; write Between(0.9, 0.1, Linear(0.0, 0.5))"
            )

    def value(self, step: int, total: float) -> float:
        """The value at optimizer step `step` of a training of `total` optimizer steps."""
        share = self.schedule.value(step, total)
        return (1.0 - share) * self.first + share * self.last


def check_position(value: int | float, where: str) -> None:
    """Raises ValueError unless `value` is a step (an int >= 0) or a fraction (a float in [0, 1])."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError(f"{where} got {value!r}: write an int (optimizer step) or a float in [0, 1] (fraction)")
    if isinstance(value, int) and value < 0:
        raise ValueError(f"{where} got {value}: an optimizer step is at least 0")
    if isinstance(value, float) and not 0.0 <= value <= 1.0:
        hint = f"; write {int(value)} for the optimizer step" if 1 < value < math.inf else ""
        raise ValueError(f"{where} got {value}: a fraction of training lies in [0, 1]{hint}")


def position(value: int | float, total: float) -> int:
    """Optimizer step meant by `value` (a step, or a fraction of `total` steps)."""
    if isinstance(value, int):
        return value
    if not math.isfinite(total):
        if value == 0.0:
            return 0
        raise ValueError(
            f"the fraction {value} needs a training of known length, and this one has none (max_time, max_epochs=-1 "
            "or a loader without a length); write an int, in optimizer steps, or give Trainer(max_steps=...)"
        )
    return round(value * total)
