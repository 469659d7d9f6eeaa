"""Schedules by hand: values, steps and fractions, and what is refused."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightning_accel import Constant, Cubic, Linear
from lightning_accel.schedule import Schedule, check_position, position


@pytest.mark.parametrize(
    ("step", "linear", "cubic"),
    [
        (0, 0.0, 0.0),
        (10, 0.0, 0.0),
        (20, 0.25, 1 - 0.75**3),
        (30, 0.5, 0.875),
        (40, 0.75, 1 - 0.25**3),
        (50, 1.0, 1.0),
        (99, 1.0, 1.0),
    ],
)
def test_values_by_hand_between_steps_10_and_50(step: int, linear: float, cubic: float) -> None:
    assert Linear(10, 50).value(step, 100) == linear
    assert Cubic(10, 50).value(step, 100) == cubic


def test_constant_is_a_step() -> None:
    assert [Constant(0.25).value(step, 8) for step in range(4)] == [0.0, 0.0, 1.0, 1.0]
    assert Constant(3) == replace(Constant(0.5), begin=3)


def test_constant_has_no_end_to_give() -> None:
    with pytest.raises(TypeError, match="end"):
        Constant(0.3, end=0.5)  # type: ignore[call-arg]


@pytest.mark.parametrize("kind", [Linear, Cubic])
def test_an_int_is_a_step_and_a_float_a_fraction(kind: type[Schedule]) -> None:
    in_steps, in_fractions = kind(20, 60), kind(0.1, 0.3)
    assert [in_steps.value(s, 200) for s in range(200)] == [in_fractions.value(s, 200) for s in range(200)]
    assert kind(1, 5).value(3, 10**9) == kind(1, 5).value(3, 10), "steps do not depend on the length of training"
    assert kind(0.0, 1.0).value(1, 4) == kind(0, 4).value(1, 4), "1.0 is the end of training, 1 its first step"


@given(
    st.sampled_from([Linear, Cubic]),
    st.integers(0, 50),
    st.integers(0, 50),
    st.integers(1, 200),
)
def test_a_schedule_rises_from_0_to_1_and_never_falls(
    kind: type[Schedule], begin: int, length: int, total: int
) -> None:
    schedule = kind(begin, begin + length)
    values = [schedule.value(step, total) for step in range(begin + length + 2)]
    assert values == sorted(values)
    assert all(v == 0.0 for v in values[:begin])
    assert values[begin + length :] == [1.0, 1.0]


def test_training_of_unknown_length_takes_steps_and_refuses_fractions() -> None:
    assert Linear(2, 6).value(4, math.inf) == 0.5
    Linear(2, 6).check(math.inf)
    assert Constant(0.0).value(0, math.inf) == 1.0, "the very beginning needs no length"
    with pytest.raises(ValueError, match=r"known length.*write an int"):
        Cubic(0.1, 0.6).value(1, math.inf)
    with pytest.raises(ValueError, match="known length"):
        Cubic(0, 0.6).check(math.inf)


def test_inverted_is_refused_when_built_or_when_the_length_is_known() -> None:
    with pytest.raises(ValueError, match=r"write Cubic\(begin=0.1, end=0.6\)"):
        Cubic(0.6, 0.1)
    with pytest.raises(ValueError, match="ends before it begins"):
        Linear(9, 8)
    mixed = Linear(50, 0.1)
    mixed.check(1000)
    with pytest.raises(ValueError, match="inverted in a training of 100 optimizer steps: 50 > 10"):
        mixed.check(100)


def test_past_the_end_is_refused_and_the_last_step_is_not() -> None:
    Cubic(0, 100).check(100)
    Cubic(0.0, 1.0).check(7)
    with pytest.raises(ValueError, match=r"ends at optimizer step 101, past the end of training \(100 steps\)"):
        Cubic(0, 101).check(100)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (-1, "at least 0"),
        (1.5, "write 1 for the optimizer step"),
        (-0.1, r"lies in \[0, 1\]"),
        (math.nan, r"lies in \[0, 1\]"),
        (math.inf, r"lies in \[0, 1\]"),
        (True, "write an int"),
        ("0.5", "write an int"),
        (None, "write an int"),
    ],
)
def test_a_bad_position_is_named_with_the_line_to_write(value: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_position(value, "Linear(end=...)")
    with pytest.raises(ValueError, match=r"Linear\(end=\.\.\.\) got"):
        Linear(end=value)


def test_position_rounds_a_fraction_to_the_nearest_step() -> None:
    assert [position(f, 10) for f in (0.0, 0.04, 0.06, 0.5, 1.0)] == [0, 0, 1, 5, 10]
    assert position(7, 3) == 7
