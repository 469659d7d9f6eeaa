"""Amounts of latency, and allocation by latency and by sensitivity; seconds are made up by formulas of the widths."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import tiny
import torch
from helpers import Plain, loader, seeded, trainer
from torch import nn
from torch.nn import functional as F

from lightning_accel import Cubic, PruneConfig, Pruning, apply_masks_, prune_model_, shrink_model
from lightning_accel.prune import latency_table, loss_table, time_in_turns
from lightning_accel.prune.keep import keep_units, masks_of
from lightning_accel.prune.latency import LatencyCosts, gain, saved
from lightning_accel.prune.losses import equal_rises, share_at
from lightning_accel.prune.masks import compute_masks
from lightning_accel.prune.saliency import saliency
from lightning_accel.prune.targets import find_targets

X = (torch.randn(4, 8, generator=torch.Generator().manual_seed(0)),)


def clock(seconds: Callable[[Any], float]) -> Callable[..., list[float]]:
    """A timer by a formula."""
    return lambda models, calls: [seconds(model) for model in models]


def widths(model: Any) -> tuple[int, int]:
    return model[0].out_features, model[2].out_features


def by_widths(first: float, second: float, rest: float = 1.0) -> Callable[..., list[float]]:
    return clock(lambda model: rest + first * widths(model)[0] + second * widths(model)[1])


def seconds_left(masks: Any, model: Any, timer: Callable[..., list[float]], inputs: Any = X) -> float:
    small = shrink_model(model, masks, example_inputs=inputs)
    whole, left = timer([model, small], {})
    return left / whole


# --- the table --------------------------------------------------------------------------------------------------------


def test_the_table_holds_the_share_of_time_that_each_width_saves() -> None:
    model = tiny.mlp()  # widths of 24
    targets = find_targets(model, PruneConfig("neurons"), X)
    table = latency_table(model, targets, {"": X}, timer=by_widths(0.01, 0.03))  # 1.96 s
    for curve, each in zip(table, (0.01, 0.03), strict=True):
        assert [left for left, _ in curve] == [24, 18, 12, 6, 1]
        assert [share for _, share in curve] == pytest.approx([each * (24 - left) / 1.96 for left, _ in curve])
        assert gain(curve) == pytest.approx(each / 1.96) and saved(curve, 15) == pytest.approx(each * 9 / 1.96)
    assert widths(model) == (24, 24)


def test_groups_of_the_same_shapes_are_timed_together_and_share_what_they_save() -> None:
    model, runs = tiny.llama(num_hidden_layers=4), []

    def timer(models: Any, calls: Any) -> list[float]:
        inner = [[layer.mlp.gate_proj.out_features for layer in m.model.layers] for m in models]
        runs.append(inner)
        return [1.0 + 0.01 * sum(each) for each in inner]

    inputs = {"input_ids": tiny.ids()}
    table = latency_table(model, find_targets(model, PruneConfig("neurons"), inputs), {"": inputs}, timer=timer)
    assert runs == [[[48] * 4, [36] * 4, [24] * 4, [12] * 4, [1] * 4]]
    assert len(table) == 4 and all(curve[2] == pytest.approx([24, 0.01 * 24 / 2.92]) for curve in table)


def test_a_narrower_width_is_never_counted_as_slower() -> None:
    model = tiny.mlp()
    slow = clock(lambda m: 2.0 if widths(m)[0] == 12 else 1.0 + 0.01 * widths(m)[0])
    curve = latency_table(model, find_targets(model, PruneConfig("neurons"), X), {"": X}, timer=slow)[0]
    assert [share for _, share in curve] == sorted(share for _, share in curve)
    assert curve[2][1] == curve[1][1]


def test_a_layer_that_is_gone_takes_the_savings_of_its_neurons_along() -> None:
    model, inputs = tiny.llama(num_hidden_layers=4), {"input_ids": tiny.ids()}

    def seconds(m: Any) -> float:
        return 1.0 + sum(0.5 + 0.01 * layer.mlp.gate_proj.out_features for layer in m.model.layers)

    config = PruneConfig(("neurons", "layers"), 0.3, of="latency", saliency="random")
    targets = find_targets(model, config, inputs)
    costs = LatencyCosts(targets, latency_table(model, targets, {"": inputs}, timer=clock(seconds)))
    masks = compute_masks(model, targets, config, costs=costs)
    small = shrink_model(model, masks, example_inputs=inputs)
    gone = 1 - seconds(small) / seconds(model)
    kept = [masks[m.members[0].name].flatten() if m.kind == "neurons" else torch.tensor(
        [masks[f"{unit}.mlp.down_proj.weight"].any() for unit in m.units]) for m in targets]  # fmt: skip
    assert len(small.model.layers) < 4
    assert costs.removed(masks, kept) == pytest.approx(gone) and 0.3 <= gone < 0.45


def test_eager_forwards_are_timed_in_turns() -> None:
    calls: list[str] = []

    class Named(nn.Module):
        def __init__(self, name: str) -> None:
            super().__init__()
            self.name = name

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            calls.append(self.name)
            return x

    found = time_in_turns([Named("a"), Named("b")], {"": X}, rounds=2)
    assert calls == ["a", "b"] * 3 and len(found) == 2 and min(found) > 0


# --- amounts and scopes -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scope", ["uniform", "global", "latency"])
def test_the_share_of_latency_is_reached_and_hardly_passed(scope: str) -> None:
    model, timer = tiny.mlp(), by_widths(0.02, 0.01)
    config = PruneConfig("neurons", 0.1, of="latency", scope=scope)
    masks = prune_model_(model, config, example_inputs=X, timer=timer)
    assert 0.86 < seconds_left(masks, model, timer) <= 0.9
    before = {name: p.clone() for name, p in model.named_parameters()}
    prune_model_(model, config, example_inputs=X, timer=timer)
    assert all(torch.equal(before[name], p) for name, p in model.named_parameters())


def test_a_latency_out_of_reach_says_the_best_that_is_in_reach() -> None:
    timer = by_widths(0.01, 0.01)  # 1.48 s, of which 0.46 s are in reach
    with pytest.raises(ValueError, match=r"0.5 of latency is out of reach: .* 31\.1% are gone; write amount=0\.31"):
        prune_model_(tiny.mlp(), PruneConfig("neurons", 0.5, of="latency"), example_inputs=X, timer=timer)


def test_where_all_are_as_salient_those_that_take_the_most_time_go_first() -> None:
    model = tiny.mlp()
    with torch.no_grad():
        for layer in model[::2]:
            layer.weight.fill_(1.0), layer.bias.fill_(1.0)
    config = PruneConfig("neurons", 0.25, scope="latency")
    masks = prune_model_(copy.deepcopy(model), config, example_inputs=X, timer=by_widths(0.02, 0.001))
    assert int(masks["0.bias"].sum()) == 12 and int(masks["2.bias"].sum()) == 24
    masks = prune_model_(model, config, example_inputs=X, timer=by_widths(0.001, 0.02))
    assert int(masks["0.bias"].sum()) == 24 and int(masks["2.bias"].sum()) == 12


@pytest.mark.parametrize("scope", ["uniform", "global"])
def test_widths_are_rounded_to_the_nearest_multiple(scope: str) -> None:
    model = tiny.mlp()
    masks = prune_model_(model, PruneConfig("neurons", 0.4, scope=scope, round_to=8), example_inputs=X)
    kept = [int(masks[f"{i}.bias"].sum()) for i in (0, 2)]
    assert all(width % 8 == 0 for width in kept) and sum(kept) == 32
    norms = saliency("l2", find_targets(tiny.mlp(), PruneConfig("neurons"), X)[0], dict(tiny.mlp().named_parameters()))
    assert masks["0.bias"].equal(norms >= norms.sort().values[24 - kept[0]])


def test_heads_are_not_rounded() -> None:
    inputs = {"input_ids": tiny.ids()}
    config = PruneConfig(("neurons", "heads"), 0.5, round_to=16)
    masks = prune_model_(model := tiny.bert(), config, example_inputs=inputs)
    small = shrink_model(model, masks, example_inputs=inputs)
    layer = small.bert.encoder.layer[0]
    assert layer.intermediate.dense.out_features == 32  # 24 of 48: halves go up
    assert layer.attention.self.query.out_features == 16  # 2 heads of 4


def error(module: nn.Module, batch: Any) -> torch.Tensor:
    return F.mse_loss(module(batch[0]), batch[1])


def test_each_group_alone_raises_the_loss_by_what_the_table_says() -> None:
    model = tiny.mlp()
    batches = [(X[0], model(X[0]).detach() + 0.1)]
    targets = find_targets(model, PruneConfig("neurons"), X)
    parameters = dict(model.named_parameters())
    saliencies = [saliency("l2", target, parameters) for target in targets]
    before = {name: p.clone() for name, p in parameters.items()}
    table = loss_table(model, targets, saliencies, batches, error)
    assert all(torch.equal(before[name], p) for name, p in parameters.items())
    for target, rises in zip(targets, table, strict=True):
        assert [share for share, _ in rises] == [0, 0.25, 0.5, 0.75, 23 / 24, 1]
        alone = copy.deepcopy(model)
        kept = keep_units([target], [saliencies[targets.index(target)]], [0.5])
        apply_masks_(alone, masks_of([target], kept, parameters))
        assert rises[2][1] == pytest.approx((error(alone, batches[0]) - error(model, batches[0])).item(), abs=1e-6)


def test_by_sensitivity_the_loss_rises_alike_and_the_group_that_matters_less_loses_more() -> None:
    model = tiny.mlp()
    with torch.no_grad():
        model[2].bias.zero_(), model[2].weight[:20].mul_(0.02)  # of the second width only four units matter
    batches = [(X[0], model(X[0]).detach())]
    masks = prune_model_(model, PruneConfig("neurons", 0.5, scope="sensitivity"), example_inputs=X,
                         calibration=batches, loss=error)  # fmt: skip
    first, second = (int(masks[f"{i}.bias"].sum()) for i in (0, 2))
    assert 23 <= first + second <= 25 and second < 8 < 16 <= first


def test_shares_of_equal_rises_by_hand() -> None:
    table = [[[0.0, 0.0], [0.5, 0.1], [1.0, 1.1]], [[0.0, 0.0], [0.5, 0.6], [1.0, 1.0]]]
    shares = equal_rises(table, 0.5)
    assert sum(shares) / 2 == pytest.approx(0.5)
    most = 0.1 + 1.0 * (shares[0] - 0.5) / 0.5
    assert shares[1] == pytest.approx(0.5 * most / 0.6) and share_at(table[1], most) == pytest.approx(shares[1])
    free = [[0.0, 0.0], [1.0, 0.0]]
    assert equal_rises([free, free], 0.3) == pytest.approx([0.3, 0.3])


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"structure": "unstructured", "of": "latency"}, "zeros save no time; write structure='neurons'"),
        ({"structure": ("neurons", "hidden"), "of": "latency"}, "write of='flops'"),
        ({"structure": "neurons", "round_to": 0}, "write round_to=16"),
        ({"structure": "neurons", "scope": "layer"}, "write 'uniform' or 'global'"),
        ({"structure": "2:4", "scope": "sensitivity"}, "alone says how much goes"),
    ],
)
def test_configs_that_cannot_be_are_refused(arguments: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        PruneConfig(**arguments)


def test_what_has_to_be_measured_is_asked_for() -> None:
    with pytest.raises(ValueError, match=r"measures losses; write calibration=\[batch"):
        prune_model_(tiny.mlp(), PruneConfig("neurons", scope="sensitivity"), example_inputs=X)
    with pytest.raises(ValueError, match="Pruning\\(config, cut_first=True"):
        Pruning(PruneConfig("neurons", scope="sensitivity"))
    with pytest.raises(ValueError, match="loss of scope='sensitivity' is measured on data before training"):
        Pruning(PruneConfig("neurons", scope="sensitivity"), cut_first=True, example_inputs=X)


# --- in training ------------------------------------------------------------------------------------------------------

TIMED = PruneConfig("neurons", 0.3, of="latency", scope="latency", round_to=4)


def inner(model: Any) -> list[int]:
    return [model.first.out_features, model.second.out_features]


def timed(turns: list[int], factor: float = 1.0) -> Callable[..., list[float]]:
    def timer(models: Any, calls: Any) -> list[float]:
        turns.append(len(models))
        return [factor * (0.2 + 0.02 * inner(model)[0] + 0.04 * inner(model)[1]) for model in models]

    return timer


def test_a_share_of_latency_is_reached_in_training_and_measured_once(tmp_path: Any) -> None:
    turns: list[int] = []
    pruning = Pruning(TIMED, schedule=Cubic(begin=0.0, end=0.5), module="model", every=1)
    pruning.timer = timed(turns)
    module = seeded(Plain)
    trainer(tmp_path, [pruning]).fit(module, loader())
    small = shrink_model(module.model, pruning.masks, example_inputs=(torch.randn(2, 8),))
    whole, left = timed([])([module.model, small], {})
    assert pruning.complete and len(turns) == 2  # one of each width
    assert 0.55 < left / whole <= 0.7 and all(width % 4 == 0 for width in inner(small))
    other = Pruning(TIMED, schedule=Cubic(begin=0.0, end=0.5), module="model", every=1)
    other.load_state_dict(torch.load(_saved(pruning, tmp_path), weights_only=True))
    assert other.progress.tables == pruning.progress.tables


def _saved(pruning: Pruning, path: Any) -> Any:
    torch.save(pruning.state_dict(), path / "state.pt")
    return path / "state.pt"


def test_a_latency_out_of_reach_raises_at_the_first_step_of_the_schedule(tmp_path: Any) -> None:
    pruning = Pruning(dataclasses.replace(TIMED, amount=0.9), schedule=Cubic(begin=1, end=7), module="model", every=1)
    pruning.timer = timed([])
    module = seeded(Plain)
    run = trainer(tmp_path, [pruning])
    with pytest.raises(ValueError, match="is out of reach: with one unit left of each"):
        run.fit(module, loader())
    assert run.global_step <= 2


def test_cutting_first_reaches_a_share_of_latency(tmp_path: Any) -> None:
    pruning = Pruning(TIMED, module="model", cut_first=True, example_inputs=(torch.randn(2, 8),))
    pruning.timer = timed([])
    module = seeded(Plain)
    whole = timed([])([module.model], {})[0]
    trainer(tmp_path, [pruning]).fit(module, loader())
    assert 0.55 < timed([])([module.model], {})[0] / whole <= 0.7
