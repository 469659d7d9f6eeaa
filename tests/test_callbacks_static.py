"""int8-static in a fit: ranges are followed, frozen, saved, resumed and exported."""

from __future__ import annotations

from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from helpers import Plain, assert_same, seeded, trainer, weights
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_accel import Export, QuantConfig, QuantizationAwareTraining, export_model, load
from lightning_accel.quantize import freeze_, is_prepared, prepare_
from lightning_accel.quantize.norms import norms_of
from lightning_accel.quantize.observers import MOMENTUM, batch_range
from lightning_accel.quantize.ranges import affine_quantizers, static_state

STATIC = QuantConfig("int8-static")
QUIET = {"engines": ("portable",), "measure": False}


class Images(nn.Module):
    """Two convolutions with BatchNorm, dropout and a head, for [batch, 2, 6, 6]."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(2, 6, 3, bias=False), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 6, 3), nn.BatchNorm2d(6)
        )
        self.dropout = nn.Dropout(0.2)
        self.head = nn.Linear(24, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.dropout(self.features(x).relu().flatten(1)))


def images(seed: int = 0) -> DataLoader:
    """Two batches of eight."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(16, 2, 6, 6, generator=generator)
    return DataLoader(TensorDataset(x, (x.mean((1, 2, 3)) > 0).long()), batch_size=8)


def module(seed: int = 0) -> Plain:
    return seeded(lambda: Plain(Images()), seed=seed)


def qat(begin: Any = 0.25, freeze: Any = 0.75) -> QuantizationAwareTraining:
    return QuantizationAwareTraining(STATIC, begin=begin, freeze=freeze, module="model")


class Watch(Callback):
    """Ranges and running means after each step."""

    def __init__(self) -> None:
        self.seen: list[Any] = []

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        state = static_state(pl_module.model) if is_prepared(pl_module.model) else None
        self.seen.append((state, pl_module.model.features[1].running_mean.clone()))


EPOCHS = 8  # of two steps: quantization from step 4, frozen from step 12


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Any:
    path = tmp_path_factory.mktemp("static")
    watch, trained = Watch(), module()
    keep = ModelCheckpoint(path, "{step}", save_top_k=-1, every_n_train_steps=2)
    fit = trainer(path, [qat(), Export(path / "model", module="model", **QUIET), watch, keep], max_epochs=EPOCHS)
    keys, parameters = list(trained.state_dict()), [id(p) for p in trained.parameters()]
    torch.manual_seed(7)
    fit.fit(trained, images())
    assert list(trained.state_dict()) == keys and [id(p) for p in trained.parameters()] == parameters
    return path, trained, watch.seen


def test_ranges_and_statistics_move_from_begin_to_freeze_and_then_stay(whole: Any) -> None:
    _, trained, seen = whole
    assert [state is not None for state, _ in seen] == [False] * 4 + [True] * 12
    ranges = [state["ranges"] for state, _ in seen[4:]]
    moved = [before != after for before, after in pairwise(ranges)]
    assert moved == [True] * 7 + [False] * 4
    means = [mean for _, mean in seen]
    assert [torch.equal(a, b) for a, b in pairwise(means)] == [False] * 11 + [True] * 4
    assert norms_of(trained.model) == {"features.0": "features.1", "features.3": "features.4"}
    assert set(ranges[-1]) == {f"{n}.activation_fake_quantizer" for n in ("features.0", "features.3", "head")}


@pytest.mark.parametrize("step", [2, 4, 6, 10, 12, 14])
def test_a_fit_resumes_bitwise_before_within_and_after_each_phase(whole: Any, tmp_path: Any, step: int) -> None:
    path, trained, seen = whole
    (saved,) = path.glob(f"*step={step}.ckpt")
    watch, resumed = Watch(), module(seed=5)
    torch.manual_seed(8)
    fit = trainer(tmp_path, [qat(), watch], max_epochs=EPOCHS)
    fit.fit(resumed, images(), ckpt_path=str(saved))
    assert fit.global_step == 16
    assert_same(weights(resumed), weights(trained))
    assert [state for state, _ in watch.seen] == [state for state, _ in seen[step:]]


def test_the_artifact_is_what_was_trained_and_the_checkpoint_exports_the_same(whole: Any, tmp_path: Any) -> None:
    path, trained, _ = whole
    x = torch.randn(16, 2, 6, 6)
    with torch.no_grad():
        expected = trained.eval().model(x)
    exported = load(path / "model")
    torch.testing.assert_close(exported(x), expected, atol=1e-5, rtol=1e-5)
    for name in ("model.ckpt", next(p.name for p in path.glob("*step=16.ckpt"))):
        report = export_model(Images(), tmp_path / name, checkpoint=path / name, example_inputs=(x,), **QUIET)
        assert torch.equal(load(tmp_path / name)(x), exported(x))
        (coverage,) = report.manifest["coverage"]
        assert coverage["share_of_flops"] == 1.0 and coverage["technique"] == "int8-static quantization"


def test_checkpoints_hold_plain_types_and_names_of_the_lightning_module(whole: Any) -> None:
    path, _, _ = whole
    saved = torch.load(path / "model.ckpt", weights_only=True)
    (state,) = [s for s in saved["callbacks"].values() if s.get("technique") == "quantization"]
    assert state["static"]["norms"]["model.features.0"] == "model.features.1" and state["static"]["frozen"]
    low, high = state["static"]["ranges"]["model.head.activation_fake_quantizer"]
    assert low == 0.0 < high
    assert not any("fake" in name or "range" in name for name in saved["state_dict"])


def test_a_checkpoint_is_scored_with_the_ranges_that_were_trained(whole: Any, tmp_path: Any) -> None:
    path, trained, _ = whole
    expected = trainer(tmp_path, [qat()]).validate(trained, images(), verbose=False)
    found = trainer(tmp_path, [qat()]).validate(module(3), images(), ckpt_path=str(path / "model.ckpt"), verbose=False)
    assert found == expected


def test_freezing_before_there_are_ranges_is_refused_and_other_schemes_do_not_mind(tmp_path: Any) -> None:
    with pytest.raises(ValueError, match=r"freezes ranges before there are any; .*write for example begin=0.5"):
        trainer(tmp_path, [qat(begin=0.5, freeze=0.5)]).fit(module(), images())
    with pytest.raises(ValueError, match=r"QuantizationAwareTraining\(freeze=\.\.\.\) got 1.5"):
        qat(freeze=1.5)
    dynamic = QuantizationAwareTraining(QuantConfig("int8"), begin=0.75, freeze=0.5, module="model.head")
    trainer(tmp_path, [dynamic]).fit(module(), images())


def test_it_commutes_with_itself_as_functions(tmp_path: Any) -> None:
    """The callback does what prepare_, fold_ and freeze_ do, at the steps that it says."""
    from lightning_accel.quantize import prepare_
    from lightning_accel.quantize.norms import NormWatch, fold_

    class ByHand(Callback):
        def on_train_batch_start(self, trainer: Any, pl_module: Any, *_: Any) -> None:
            if trainer.global_step == 2:
                prepare_(pl_module.model, STATIC)
                self.watch = NormWatch(pl_module.model)
            if trainer.global_step == 6:
                freeze_(pl_module.model)

        def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
            if trainer.global_step == 3:
                fold_(pl_module.model, self.watch.stop())

    by_hand, by_callback = module(), module()
    for network, callback in ((by_hand, ByHand()), (by_callback, qat(2, 6))):
        torch.manual_seed(1)
        trainer(tmp_path, [callback], max_epochs=4).fit(network, images())
    assert_same(weights(by_hand), weights(by_callback))
    ranges = [static_state(network.model) for network in (by_hand, by_callback)]
    assert ranges[0] == ranges[1] and len(affine_quantizers(by_hand.model)) == 3


def test_a_second_fit_goes_on_with_the_ranges(tmp_path: Any) -> None:
    network, callback = module(), qat(0, 1.0)
    trainer(tmp_path, [callback]).fit(network, images())
    far = torch.tensor([-100.0, 100.0])
    for quantizer in affine_quantizers(network.model).values():
        quantizer.range.copy_(far)
    before = static_state(network.model)["norms"]
    trainer(tmp_path, [callback], max_epochs=1, limit_train_batches=1).fit(network, images())
    assert static_state(network.model)["norms"] == before
    first, (x, _) = affine_quantizers(network.model)["features.0.activation_fake_quantizer"], next(iter(images()))
    torch.testing.assert_close(first.range, far + MOMENTUM * (batch_range(x, "minmax") - far))
    for quantizer in affine_quantizers(network.model).values():
        assert (quantizer.range.abs() > 90).all(), "moved on, not begun anew"


def test_a_later_fit_thaws_or_says_that_the_network_is_quantized_already(tmp_path: Any) -> None:
    network, callback = module(), qat(0.25, 0.75)
    for again in (callback, callback, qat(0, 0.75)):
        watch = Watch()
        trainer(tmp_path, [again, watch], max_epochs=2).fit(network, images())
        states = [state for state, _ in watch.seen if state is not None]
        assert [state["frozen"] for state in states[-2:]] == [False, True]
        assert all(a["ranges"] != b["ranges"] for a, b in pairwise(states[:-1]))
    with pytest.raises(ValueError, match=r"begin=0.25\) would begin with what is fake-quantized already.*begin=0 to"):
        trainer(tmp_path, [qat(0.25, 0.75)], max_epochs=2).fit(network, images())


def test_a_callback_begins_anew_for_another_network(tmp_path: Any) -> None:
    def fit(callback: QuantizationAwareTraining) -> Any:
        network, watch = module(seed=1), Watch()
        torch.manual_seed(1)
        trainer(tmp_path, [callback, watch], max_epochs=4).fit(network, images())
        return network, watch.seen

    used = qat()
    trainer(tmp_path, [used], max_epochs=2).fit(module(), images())
    (found, seen), (expected, states) = fit(used), fit(qat())
    assert [state for state, _ in seen] == [state for state, _ in states]
    assert_same(weights(found), weights(expected))
    assert norms_of(found.model) == {"features.0": "features.1", "features.3": "features.4"}


def test_a_range_that_one_rank_alone_has_found_is_everyones() -> None:
    """Two ranks, of which the first has run the first layer only: an expert without tokens on it."""
    callback, network = qat(), nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4))
    prepare_(network, STATIC)
    first, second, third = (quantizer.range for quantizer in affine_quantizers(network).values())
    first.copy_(torch.tensor([-1.0, 3.0]))
    other = torch.tensor([[-3.0, 5.0, 1.0], [-2.0, 2.0, 1.0], [0.0, 0.0, 0.0]])

    def reduce(own: Tensor, reduce_op: str) -> Tensor:
        assert reduce_op == "sum"
        return own + other

    ranks: Any = SimpleNamespace(strategy=SimpleNamespace(reduce=reduce))
    whole: Any = nn.ModuleDict({"model": network})
    callback._agree(ranks, whole)
    assert first.tolist() == [-2.0, 4.0] and second.tolist() == [-2.0, 2.0]
    assert third.tolist() == [torch.inf, -torch.inf], "not yet found by any"
