"""The choice of a precision leaves no trace, and a non-finite gradient is found by name."""

from __future__ import annotations

import copy
import math
import re
from typing import Any

import pytest
import tiny
import torch
from torch import nn
from torch.nn import functional as F

from lightning_accel import precision
from lightning_accel.precision import autocast, candidates, choose_precision, first_nonfinite_gradient

CPU = torch.device("cpu")


def step(model: nn.Module) -> torch.Tensor:
    """A loss that depends on the global random state."""
    x = torch.randn(4, 8)
    return F.cross_entropy(F.dropout(model(x), 0.5), torch.tensor([0, 1, 2, 0]))


def test_choosing_leaves_the_model_and_the_random_state_alone() -> None:
    model = nn.Sequential(tiny.mlp(), nn.BatchNorm1d(3)).train()
    model(torch.randn(4, 8)).sum().backward()
    state, gradients = copy.deepcopy(model.state_dict()), [p.grad.clone() for p in model.parameters()]
    modes, random = [m.training for m in model.modules()], torch.get_rng_state()
    choose_precision(model, step, CPU, repeats=1)
    assert torch.equal(torch.get_rng_state(), random)
    assert all(torch.equal(state[n], t) for n, t in model.state_dict().items())
    assert all(torch.equal(g, p.grad) for g, p in zip(gradients, model.parameters(), strict=True))
    assert [m.training for m in model.modules()] == modes


def test_every_candidate_is_timed_in_its_own_format() -> None:
    seen: list[torch.dtype] = []

    def loss(model: Any) -> torch.Tensor:
        y = model(torch.randn(4, 8))
        seen.append(y.dtype)
        return y.float().sum()

    choice = choose_precision(tiny.mlp(), loss, CPU, ("fp32", "bf16"), repeats=2, budget=0.0)
    assert seen == [torch.float32, torch.bfloat16] * 3, "in turns, the first round to warm up"
    assert set(choice.seconds) == {"fp32", "bf16"} and choice.precision in choice.seconds


class Clock:
    """A clock under which a step takes the seconds that `costs` says for its format."""

    def __init__(self, costs: dict[torch.dtype, float]) -> None:
        self.now, self.costs = 0.0, costs

    def perf_counter(self) -> float:
        return self.now

    def step(self, model: Any) -> torch.Tensor:
        y = model(torch.randn(4, 8))
        self.now += self.costs[y.dtype]
        return y.float().sum()


@pytest.mark.parametrize(
    ("bf16", "chosen", "said"),
    [(0.5, "bf16", "trains in bf16: .*bf16 2.00 x"), (0.97, "fp32", "stays in fp32: .*bf16 1.03 x"),
     (1.7, "fp32", "stays in fp32: .*bf16 0.59 x")],
)  # fmt: skip
def test_fp32_is_left_only_for_a_format_that_is_five_percent_faster(
    monkeypatch: pytest.MonkeyPatch, bf16: float, chosen: str, said: str
) -> None:
    clock = Clock({torch.float32: 1.0, torch.bfloat16: bf16})
    monkeypatch.setattr(precision, "time", clock)
    choice = choose_precision(tiny.mlp(), clock.step, CPU)
    assert choice.precision == chosen and choice.seconds["bf16"] == pytest.approx(bf16)
    assert re.search(said, choice.reason)


def test_fp32_is_always_among_the_candidates() -> None:
    assert "fp32" in choose_precision(tiny.mlp(), step, CPU, ("bf16",), repeats=1).seconds
    assert candidates(CPU) == ("fp32", "bf16")


def test_autocast_of_each_precision() -> None:
    layer, x = nn.Linear(4, 4), torch.randn(2, 4)
    formats = {}
    for name in ("fp32", "bf16", "fp16"):
        with autocast(name, CPU):
            formats[name] = layer(x).dtype
    assert formats == {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def test_the_first_parameter_with_a_non_finite_gradient_is_named() -> None:
    model = tiny.mlp()
    assert first_nonfinite_gradient(model) is None, "there are no gradients yet"
    model(torch.randn(4, 8)).sum().backward()
    assert first_nonfinite_gradient(model) is None
    for bad in (math.nan, math.inf, -math.inf):
        model[4].bias.grad[1] = bad
        assert first_nonfinite_gradient(model) == "4.bias"
    model[2].weight.grad[3, 3] = math.nan
    assert first_nonfinite_gradient(model) == "2.weight"


def test_a_large_finite_half_precision_gradient_is_no_overflow() -> None:
    layer = nn.Linear(64, 64).half()
    layer.weight.grad = torch.full((64, 64), 6e4, dtype=torch.float16)
    assert first_nonfinite_gradient(layer) is None, "its L2 norm would be infinite"


def test_sparse_and_empty_gradients_are_looked_at() -> None:
    model = nn.ModuleDict({"embedding": nn.Embedding(5, 3, sparse=True), "none": nn.ParameterList([torch.zeros(0)])})
    (model["embedding"](torch.tensor([1, 1])).sum() + model["none"][0].sum()).backward()
    assert first_nonfinite_gradient(model) is None
    (model["embedding"](torch.tensor([4])).sum() * math.inf).backward()
    assert first_nonfinite_gradient(model) == "embedding.weight"
