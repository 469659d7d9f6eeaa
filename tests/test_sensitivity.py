"""Sensitivity is measured one module at a time; allocation keeps its budget and is the best of its kind."""

from __future__ import annotations

import copy
import itertools
from typing import Any

import pytest
import tiny
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_accel import QuantConfig, allocate, prepare_, quantize_model, sensitivity
from lightning_accel.loss import default_loss
from lightning_accel.quantize.mixed import Sensitivity


def network() -> tuple[nn.Module, list[tuple[torch.Tensor, torch.Tensor]]]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Dropout(0.5), nn.Linear(64, 48), nn.ReLU(), nn.Linear(48, 5))
    return model, [(3 * torch.randn(64, 32), torch.randint(0, 5, (64,))) for _ in range(2)]


def test_increases_are_those_of_each_module_quantized_alone() -> None:
    model, batches = network()
    before, modes = copy.deepcopy(model.state_dict()), [m.training for m in model.modules()]
    found = sensitivity(model, batches, ("int8", "int4-int8"))
    assert {name: sorted(row) for name, row in found.increase.items()} == {
        "0": ["int4-int8", "int8"],
        "3": ["int4-int8", "int8"],
        "5": ["int8"],  # groups of 32 do not divide its 48 inputs
    }
    for name, row in found.increase.items():
        for scheme, increase in row.items():
            alone = copy.deepcopy(model).eval()
            prepare_(alone, QuantConfig(scheme, overrides={n: None for n in ("0", "3", "5") if n != name}))
            with torch.no_grad():
                loss = sum(F.cross_entropy(alone(x), y).item() for x, y in batches) / 2
            assert increase == pytest.approx(loss - found.loss, abs=1e-6)
    assert found.size["0"] == {"float": 4 * 64 * 32, "int8": 64 * 32 + 64 * 4, "int4-int8": 64 * 16 + 64 * 2}
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert [m.training for m in model.modules()] == modes
    assert list(sensitivity(model, batches, ("int4-int8",)).increase) == ["0", "3"], "the last fits no group"
    assert str(found).splitlines()[1].strip().split(":")[0] == max(
        found.increase, key=lambda name: max(found.increase[name].values())
    )


def test_a_tied_head_is_one_unit_with_its_embedding() -> None:
    model = tiny.llama(intermediate_size=64)
    batch = {"input_ids": tiny.ids(4, 12), "labels": tiny.ids(4, 12)}
    found = sensitivity(model, [batch], ("int8",))
    both = "model.embed_tokens+lm_head"
    assert both in found.increase and len(found.increase) == 1 + 7 * tiny.LAYERS
    overrides = allocate(found, size=0.9)
    assert overrides["model.embed_tokens"] == overrides["lm_head"]
    quantize_model(model, QuantConfig("int8", overrides=overrides))


def test_what_fits_no_scheme_that_was_measured_stays_in_float_and_counts() -> None:
    model, batches = network()
    found = sensitivity(model, batches, ("int4-int8",))
    assert found.unfit == {"5": 4 * 48 * 5}
    overrides = allocate(found, loss=10.0)
    assert overrides == {"0": "int4-int8", "3": "int4-int8", "5": None}
    assert isinstance(quantize_model(model, QuantConfig("int8", overrides=overrides))[5], nn.Linear)
    smallest = sum(row["int4-int8"] for row in found.size.values()) + found.unfit["5"]
    with pytest.raises(ValueError, match=rf"schemes take {smallest} \(960 of them fit none\); write size={smallest}"):
        allocate(found, size=smallest - 1)
    assert allocate(found, size=smallest) == overrides


def test_embeddings_and_tied_heads_are_measured_in_int8_static() -> None:
    model = tiny.llama(intermediate_size=64)
    batch = {"input_ids": tiny.ids(4, 12), "labels": tiny.ids(4, 12)}
    found = sensitivity(model, [batch] * 8, ("int8-static",))
    assert not found.unfit and "int8-static" in found.increase["model.embed_tokens+lm_head"]
    alone = nn.Sequential(nn.Embedding(16, 8), nn.Flatten(), nn.Linear(32, 4))
    found = sensitivity(alone, [(torch.randint(0, 16, (4, 4)), torch.arange(4))] * 8, ("int8-static",))
    assert found.size["0"]["int8-static"] == 16 * 8 + 4 * 16 and found.size["2"]["int8-static"] == 4 * 32 + 8 * 4


class NamedLikePatterns(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleDict({name: nn.Linear(32, 32) for name in ("a*", "ab", "c[0]")})

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers.values():
            x = layer(x).relu()
        return x


def test_names_that_read_like_patterns_are_names() -> None:
    batches = [(torch.randn(4, 32), torch.randint(0, 32, (4,)))]
    found = sensitivity(NamedLikePatterns(), batches, ("int8", "int4-int8"))
    increase = {"layers.a*": {"int8": 1.0}, "layers.ab": {"int4-int8": 0.0}, "layers.c[0]": {"int8": 0.0}}
    overrides = allocate(Sensitivity(found.loss, increase, found.size), loss=0.1)
    converted = quantize_model(NamedLikePatterns(), QuantConfig("int8", overrides=overrides))
    assert [type(m).__name__ for m in converted.layers.values()] == ["Linear", "Int4Linear", "Int8Linear"]


def made_up(seed: int) -> Sensitivity:
    generator = torch.Generator().manual_seed(seed)
    sizes = {f"m{i}": 1000 * int(torch.randint(1, 9, (), generator=generator)) for i in range(5)}
    draw = torch.rand(5, 2, generator=generator)
    increase = {
        name: {"int8": 0.01 * float(draw[i, 0]), "int4-int8": 0.01 + 0.2 * float(draw[i, 1])}
        for i, name in enumerate(sizes)
    }
    return Sensitivity(1.0, increase, {n: {"float": s, "int8": s // 4, "int4-int8": s // 7} for n, s in sizes.items()})


def totals(found: Sensitivity, overrides: dict[str, str | None]) -> tuple[float, int]:
    chosen = [(found.increase[n].get(s, 0.0) if s else 0.0, found.size[n][s or "float"]) for n, s in overrides.items()]
    return sum(loss for loss, _ in chosen), sum(size for _, size in chosen)


@pytest.mark.parametrize("seed", range(10))
def test_budgets_are_kept_and_no_change_of_one_module_is_better(seed: int) -> None:
    found = made_up(seed)
    every = [
        totals(found, dict(zip(found.increase, choice, strict=True)))
        for choice in itertools.product([None, "int8", "int4-int8"], repeat=5)
    ]
    whole = sum(row["float"] for row in found.size.values())
    for share in (0.15, 0.2, 0.3, 0.5, 1.0):
        chosen = allocate(found, size=share)
        loss, size = totals(found, chosen)
        best = min(other[0] for other in every if other[1] <= share * whole)
        assert size <= share * whole and loss <= best + 0.01, "near the best of all 3^5"
        for name, scheme in itertools.product(chosen, (None, "int8", "int4-int8")):
            other = totals(found, {**chosen, name: scheme})
            assert other[1] > share * whole or other[0] >= loss
    for most in (0.0, 0.02, 0.1, 1.0):
        chosen = allocate(found, loss=most)
        loss, size = totals(found, chosen)
        assert loss <= most
        for name, scheme in itertools.product(chosen, (None, "int8", "int4-int8")):
            other = totals(found, {**chosen, name: scheme})
            assert other[0] > most or other[1] >= size


def test_modules_alike_share_a_budget() -> None:
    alike = Sensitivity(1.0, {n: {"int8": 0.1} for n in "abcd"}, {n: {"float": 400, "int8": 100} for n in "abcd"})
    assert sorted(map(str, allocate(alike, loss=0.2).values())) == ["None", "None", "int8", "int8"]
    assert sorted(map(str, allocate(alike, size=0.8).values())) == ["None", "None", "int8", "int8"]


def test_ample_and_tight_budgets() -> None:
    found = made_up(0)
    assert set(allocate(found, size=1.0).values()) == {None} and set(allocate(found, loss=0.0).values()) == {None}
    assert set(allocate(found, loss=9.0).values()) == {"int4-int8"}
    smallest = sum(row["int4-int8"] for row in found.size.values())
    assert set(allocate(found, size=smallest).values()) == {"int4-int8"}
    with pytest.raises(ValueError, match=rf"size={smallest - 1} is {smallest - 1} bytes, the smallest schemes take"):
        allocate(found, size=smallest - 1)


def test_wrong_calls_say_what_to_write() -> None:
    model, batches = network()
    for budget in ({}, {"size": 0.5, "loss": 0.1}):
        with pytest.raises(ValueError, match="give one budget"):
            allocate(made_up(0), **budget)
    with pytest.raises(ValueError, match="the loader gives no batches"):
        sensitivity(model, [])
    for schemes in ((), "int8"):
        with pytest.raises(ValueError, match="is no list of schemes"):
            sensitivity(model, batches, schemes)
    with pytest.raises(ValueError, match=r"Sequential fits \('int4-int8',\), groups of 128; add 'int8'"):
        sensitivity(model, batches, ("int4-int8",), group_size=128)
    with pytest.raises(ValueError, match="the loss of the float model is nan"):
        sensitivity(model, [(x * float("nan"), y) for x, y in batches])
    assert sensitivity(model, batches, ("int8",), loss=lambda m, b: default_loss(m, b).item()).loss > 0
    with pytest.raises(ValueError, match="unknown scheme 'int3'"):
        sensitivity(model, batches, ("int3",))
    with pytest.raises(ValueError, match=r"the model gives none for \['input_ids'\]"):
        default_loss(tiny.llama(), {"input_ids": tiny.ids()})
    x, y = batches[0]
    for other, target, reason in ((model, y.float(), "float32 are no classes"), (Nothing(), y, "puts out no logits")):
        with pytest.raises(ValueError, match=f"a loss is needed, and .*{reason}; write loss="):
            default_loss(other, (x, target))


class Nothing(nn.Module):
    def forward(self, x: Any) -> dict[str, Any]:
        return {"hidden": x}


def test_static_ranges_are_left_out_where_no_batch_comes() -> None:
    class Idle(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.idle = nn.Linear(8, 4), nn.Linear(8, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.used(x)

    batches = [(torch.randn(16, 8), torch.zeros(16).long()) for _ in range(8)]
    found = sensitivity(Idle(), batches, ("int8", "int8-static"))
    assert {name: set(row) for name, row in found.increase.items()} == {
        "used": {"int8", "int8-static"},
        "idle": {"int8"},
    }


@pytest.mark.parametrize(
    "budget", [{"size": 1.5}, {"size": 0.0}, {"size": -3}, {"size": "0.2"}, {"size": True}, {"loss": "x"}]
)
def test_budgets_that_are_none_are_refused(budget: dict[str, Any]) -> None:
    found = Sensitivity(1.0, {"a": {"int8": 0.001}}, {"a": {"float": 400, "int8": 101}})
    with pytest.raises(ValueError, match=r"write size=0.2"):
        allocate(found, **budget)
