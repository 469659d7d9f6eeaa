"""Pruned weights stay zero, whatever the training loop does."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers import Perceptron, Plain, assert_same, loader, seeded, trainer, weights
from lightning.pytorch.callbacks import Callback, GradientAccumulationScheduler
from torch.nn import functional as F

from lightning_accel import Constant, Cubic, Linear, PruneConfig, Pruning, QuantConfig, QuantizationAwareTraining

HALF = PruneConfig("unstructured", amount=0.5)
NEURONS = PruneConfig("neurons", amount=0.5)


class Watch(Callback):
    """After each batch: that what the masks drop is exactly zero."""

    def __init__(self, *prunings: Pruning) -> None:
        self.prunings = prunings
        self.checked = 0

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        parameters = dict(pl_module.named_parameters())
        for pruning in self.prunings:
            for name, mask in pruning.full_masks().items():
                assert not parameters[name][~mask.expand_as(parameters[name])].any()
                self.checked += 1


def zeros(module: torch.nn.Module) -> float:
    """Share of zeros in the weight."""
    return (module.weight == 0).float().mean().item()


@pytest.mark.parametrize("optimizer", ["adam", "sgd"])
@pytest.mark.parametrize("config", [HALF, NEURONS], ids=["unstructured", "neurons"])
def test_pruned_weights_stay_zero_after_every_step_with_momentum(tmp_path, optimizer, config):
    module = seeded(Plain, optimizer=optimizer)
    pruning = Pruning(config, schedule=Linear(begin=0.25, end=0.75), module="model", every=1)
    watch = Watch(pruning)
    trainer(tmp_path, [watch, pruning], max_epochs=3).fit(module, loader())
    assert watch.checked > 20
    assert zeros(module.model.first) == 0.5
    assert 0 < pruning.full_masks()["model.first.weight"].float().mean() == 0.5


def test_neurons_are_found_from_the_first_training_batch(tmp_path):
    module = seeded(Plain)
    pruning = Pruning(NEURONS, module="model")
    trainer(tmp_path, [pruning], max_epochs=1).fit(module, loader())
    assert set(pruning.masks) == {
        "first.weight", "first.bias", "second.weight", "second.bias", "head.weight"
    }  # fmt: skip
    assert int(pruning.masks["first.bias"].sum()) == 8


@pytest.mark.parametrize(
    "options",
    [
        {"accumulate_grad_batches": 2},
        {"gradient_clip_val": 0.1},
        {"limit_train_batches": 3},
        {"val_check_interval": 2},
        {"max_steps": 6},
        {"accumulate_grad_batches": 3, "max_steps": 4},
    ],
    ids=lambda options: "-".join(options),
)
def test_masks_hold_and_the_schedule_ends_under_trainer_options(tmp_path, options):
    module = seeded(Plain)
    pruning = Pruning(HALF, schedule=Linear(begin=0.0, end=0.9), module="model", every=1)
    watch = Watch(pruning)
    fit = trainer(tmp_path, [pruning, watch], **options)
    fit.fit(module, loader(), loader(16))
    assert pruning.complete and watch.checked
    assert pruning.total == fit.global_step
    assert zeros(module.model.first) == 0.5


def test_gradient_accumulation_that_changes_from_epoch_to_epoch_is_counted(tmp_path):
    pruning, qat = Pruning(HALF, Linear(0.0, 1.0), module="model", every=1), QuantizationAwareTraining(begin=0.6)
    changing = GradientAccumulationScheduler({0: 4, 1: 2})
    fit = trainer(tmp_path, [changing, pruning, qat], max_epochs=4)
    fit.fit(seeded(Plain), loader())
    assert fit.global_step == pruning.total == 7  # one, and three times two
    assert pruning.complete and qat.complete


def test_steps_work_and_fractions_raise_where_max_time_leaves_the_length_unknown(tmp_path):
    short = {"days": 0, "seconds": 1}
    with pytest.raises(ValueError, match=r"the fraction 0.5 needs a training of known length.*write an int"):
        trainer(tmp_path, [Pruning(HALF, Constant(0.5), module="model")], max_time=short).fit(seeded(Plain), loader())
    with pytest.raises(ValueError, match=r"the fraction 0.5 needs a training of known length.*write an int"):
        qat = QuantizationAwareTraining(begin=0.5, module="model")
        trainer(tmp_path, [qat], max_time=short).fit(seeded(Plain), loader())
    module = seeded(Plain)
    pruning = Pruning(HALF, Linear(begin=1, end=3), module="model", every=1)
    trainer(tmp_path, [pruning], max_time=short).fit(module, loader())
    assert pruning.complete
    assert zeros(module.model.second) == 0.5


class TwoOptimizers(Plain):
    """Manual optimization; one optimizer a layer, each stepping once a batch."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> None:
        x, y = batch
        for optimizer in self.optimizers():
            optimizer.zero_grad()
            self.manual_backward(F.cross_entropy(self.model(x), y))
            optimizer.step()

    def configure_optimizers(self) -> Any:
        first = torch.optim.SGD(self.model.first.parameters(), lr=0.1, momentum=0.9)
        rest = [*self.model.second.parameters(), *self.model.head.parameters()]
        return [first, torch.optim.Adam(rest, lr=0.01)]


@pytest.mark.parametrize("config", [HALF, NEURONS], ids=["unstructured", "neurons"])
def test_masks_hold_with_two_optimizers_and_manual_optimization(tmp_path, config):
    module = seeded(TwoOptimizers)
    pruning = Pruning(config, schedule=Linear(begin=0.2, end=0.8), module="model", every=1)
    watch = Watch(pruning)
    fit = trainer(tmp_path, [pruning, watch])
    fit.fit(module, loader())
    assert fit.global_step == pruning.total == 16  # two optimizers, four batches, two epochs
    assert pruning.complete and watch.checked
    assert zeros(module.model.first) == 0.5


def test_taylor_of_a_group_that_two_optimizers_share_raises(tmp_path):
    pruning = Pruning(PruneConfig("neurons", 0.5, saliency="taylor"), Linear(0.2, 0.8), module="model", every=1)
    with pytest.raises(ValueError, match="gradients of 'first' in one step, and two optimizers have them"):
        trainer(tmp_path, [pruning]).fit(seeded(TwoOptimizers), loader())


def test_the_share_follows_the_cubic_schedule_step_by_step(tmp_path):
    class Shares(Callback):
        seen: list[float] = []  # noqa: RUF012

        def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
            self.seen.append(zeros(pl_module.model.second))

    shares = Shares()
    pruning = Pruning(HALF, Cubic(begin=2, end=6), module="model.second", every=1)
    trainer(tmp_path, [pruning, shares]).fit(seeded(Plain), loader())
    expected = [0.5 * (1 - (1 - min(max((step - 2) / 4, 0), 1)) ** 3) for step in range(1, 9)]
    assert shares.seen == pytest.approx(expected, abs=1 / 256)


class TwoNetworks(Plain):
    """Two networks, both trained."""

    def __init__(self) -> None:
        super().__init__()
        self.other = Perceptron(8)

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        x, y = batch
        return F.cross_entropy(self.model(x), y) + F.cross_entropy(self.other(x), y)


def test_two_prunings_on_two_modules_have_states_and_logs_of_their_own(tmp_path):
    module = seeded(TwoNetworks)
    one = Pruning(HALF, Constant(2), module="model")
    two = Pruning(PruneConfig("neurons", amount=0.25), Constant(3), module="other")
    fit = trainer(tmp_path, [one, two])
    fit.fit(module, loader())
    assert one.state_key != two.state_key
    assert zeros(module.model.first) == 0.5 and zeros(module.other.first) == 0.25
    states = fit._checkpoint_connector.dump_checkpoint()["callbacks"]
    assert set(states[one.state_key]["masks"]) == {"first.weight", "second.weight", "head.weight"}
    assert "first.bias" in states[two.state_key]["masks"]
    assert fit.callback_metrics["accel/pruning/model/amount"] == 0.5
    assert fit.callback_metrics["accel/pruning/other/amount"] == 0.25


def test_fast_dev_run_runs_every_callback_once(tmp_path):
    module = seeded(Plain)
    pruning = Pruning(NEURONS, Cubic(begin=0.1, end=0.6), module="model")
    qat = QuantizationAwareTraining(QuantConfig("int8"), begin=0.6, module="model")
    fit = trainer(tmp_path, [pruning, qat], fast_dev_run=True)
    fit.fit(module, loader(), loader(16))
    assert fit.global_step == 1 and pruning.total == 1 and pruning.complete and not qat.prepared
    assert int(pruning.masks["first.bias"].sum()) == 8


def test_a_second_fit_goes_on_with_the_masked_fake_quantized_model(tmp_path):
    module = seeded(Plain)
    pruning = Pruning(NEURONS, Linear(0.1, 0.5), module="model", every=1)
    qat = QuantizationAwareTraining(QuantConfig("int8"), begin=0.5, module="model")
    watch = Watch(pruning)
    trainer(tmp_path, [pruning, qat, watch]).fit(module, loader())
    masks = {name: mask.clone() for name, mask in pruning.masks.items()}
    before = weights(module)
    second = trainer(tmp_path, [pruning, qat, watch], max_epochs=1)
    second.fit(module, loader())
    assert second.global_step == 4
    assert_same(pruning.masks, masks)
    assert type(module.model.first).__name__ == "FakeQuantizedLinear"
    assert not torch.equal(before["model.first.weight"], module.model.first.weight)


def test_a_second_fit_after_an_interrupted_one_counts_the_schedule_anew(tmp_path):
    class Stop(Callback):
        def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
            if trainer.global_step == 3:
                raise RuntimeError("stopped")

    module = seeded(Plain)
    pruning = Pruning(HALF, Linear(0.0, 0.5), module="model", every=1)
    with pytest.raises(RuntimeError, match="stopped"):
        trainer(tmp_path, [pruning, Stop()], max_epochs=100).fit(module, loader())
    assert 0 < pruning.share < 0.02
    trainer(tmp_path, [pruning], max_epochs=1).fit(module, loader())
    assert pruning.complete and zeros(module.model.first) == 0.5


def test_testing_after_the_fit_sees_the_masked_fake_quantized_model(tmp_path):
    module = seeded(Plain)
    pruning = Pruning(NEURONS, Constant(2), module="model")
    qat = QuantizationAwareTraining(QuantConfig("int8"), begin=4, module="model")
    fit = trainer(tmp_path, [pruning, qat])
    fit.fit(module, loader())
    measured = fit.test(module, loader(16), verbose=False)[0]["val_loss"]
    with torch.no_grad():
        losses = [F.cross_entropy(module.model(x), y) for x, y in loader(16)]
        expected = torch.stack(losses).mean()
        assert type(module.model.head).__name__ == "FakeQuantizedLinear"
        assert zeros(module.model.first) == 0.5
    assert measured == pytest.approx(expected.item(), rel=1e-6)


@pytest.mark.parametrize("first", [True, False], ids=["ema-first", "ema-last"])
def test_averaged_weights_end_masked(tmp_path, first):
    from lightning.pytorch.callbacks import EMAWeightAveraging

    module = seeded(Plain)
    pruning = Pruning(HALF, Constant(6), module="model")  # late: the average still holds what is pruned
    average = EMAWeightAveraging(decay=0.9)
    trainer(tmp_path, [average, pruning] if first else [pruning, average]).fit(module, loader())
    mask = pruning.masks["first.weight"]
    averaged = average._average_model.module.model.first.weight
    assert averaged[~mask].abs().max() > 0
    assert torch.equal(module.model.first.weight, averaged * mask)


def test_masks_of_overlapping_prunings_are_those_of_both(tmp_path):
    module = seeded(Plain)
    one = Pruning(PruneConfig("unstructured", amount=0.25), Constant(2), module="model")
    two = Pruning(NEURONS, Constant(6), module="model")
    trainer(tmp_path, [one, two]).fit(module, loader())
    dropped = ~(one.masks["first.weight"] & two.masks["first.weight"])
    assert not module.model.first.weight[dropped].any()
    assert dropped.float().mean() > 0.5


def test_two_equal_prunings_on_one_module_raise(tmp_path):
    with pytest.raises(ValueError, match="two equal Pruning callbacks on module='model'; remove one"):
        pair = [Pruning(HALF, Constant(0.1), module="model"), Pruning(HALF, Constant(0.2), module="model")]
        trainer(tmp_path, pair).fit(seeded(Plain), loader())


def test_a_network_built_in_setup_or_configure_model_is_pruned(tmp_path):
    class Late(Plain):
        def __init__(self, hook: str) -> None:
            super().__init__()
            self.model = None  # type: ignore[assignment]
            self.hook = hook

        def setup(self, stage: str) -> None:
            if self.hook == "setup":
                self.model = seeded(Perceptron)

        def configure_model(self) -> None:
            if self.hook == "configure_model" and self.model is None:
                self.model = seeded(Perceptron)

    trained = []
    for hook in ("setup", "configure_model"):
        module = Late(hook)
        callbacks = [Pruning(HALF, Constant(2), module="model"), QuantizationAwareTraining(begin=3, module="model")]
        trainer(tmp_path, callbacks).fit(module, loader())
        assert zeros(module.model.first) == 0.5
        assert not {"setup", "configure_model", "training_step"} & set(module.__dict__)
        trained.append(weights(module))
    assert_same(*trained)


def test_a_second_fit_goes_on_with_its_model_and_begins_anew_with_another(tmp_path):
    def pruning() -> Pruning:
        return Pruning(PruneConfig("unstructured", amount=0.5), Constant(2), module="model", every=1)

    once, fresh = pruning(), pruning()
    first, second, alone = seeded(Plain), seeded(Plain, seed=5), seeded(Plain, seed=5)
    trainer(tmp_path, [once]).fit(first, loader())
    trainer(tmp_path, [once]).fit(second, loader())
    trainer(tmp_path, [fresh]).fit(alone, loader())
    assert_same(weights(second), weights(alone))
    zeros = {name: weight == 0 for name, weight in weights(second.model).items()}
    trainer(tmp_path, [once]).fit(second, loader())
    assert once.share == 1.0
    assert all(bool((weights(second.model)[name] == 0)[mask].all()) for name, mask in zeros.items())
