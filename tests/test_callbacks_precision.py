"""AutoMixedPrecision: chooses once, disturbs nothing, counts what overflows and stops where it does not end."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers import Perceptron, Plain, assert_same, data, loader, seeded, trainer, weights
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from torch.nn import functional as F
from torch.utils.data import DataLoader, IterableDataset

from lightning_accel import AutoMixedPrecision, Constant, PruneConfig, Pruning
from lightning_accel.precision import PrecisionChoice


class Overflows(Plain):
    """The loss is multiplied by infinity in the batches with these indices."""

    def __init__(self, at: set[int], value: float = float("inf")) -> None:
        super().__init__()
        self.at, self.value = at, value

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        loss = super().training_step(batch, batch_idx)
        return loss * self.value if batch_idx in self.at else loss


class History(Callback):
    """Weights and loss scale after each batch."""

    def __init__(self) -> None:
        self.weights: list[dict[str, torch.Tensor]] = []
        self.scales: list[float] = []
        self.logged: list[float] = []

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        self.weights.append(weights(pl_module))
        scaler = getattr(trainer.precision_plugin, "scaler", None)
        self.scales.append(scaler.get_scale() if scaler is not None else 1.0)
        self.logged.append(float(trainer.callback_metrics["accel/precision/skipped_steps"]))


def test_an_overflow_in_fp16_skips_the_step_and_lowers_the_scale(tmp_path):
    module, history = seeded(Overflows, {2}), History()
    precision = AutoMixedPrecision("fp16")
    pruning = Pruning(PruneConfig("unstructured", amount=0.5), Constant(1), module="model")
    with pytest.warns(UserWarning, match="fp16 on a CPU is slow and for tests"):
        fit = trainer(tmp_path, [precision, pruning, history], max_epochs=1)
        fit.fit(module, loader())
    assert_same(history.weights[2], history.weights[1])  # the step was skipped
    assert not torch.equal(history.weights[3]["model.first.weight"], history.weights[2]["model.first.weight"])
    assert history.scales == [65536.0, 65536.0, 32768.0, 32768.0]
    assert precision.skipped == 1 and history.logged == [0, 0, 1, 1]
    assert fit.callback_metrics["accel/precision/loss_scale"] == 32768.0
    dropped = ~pruning.masks["first.weight"]
    assert dropped.float().mean() == 0.5
    assert all(not step["model.first.weight"][dropped].any() for step in history.weights)


def test_the_schedule_waits_for_a_step_that_is_taken(tmp_path):
    module, history = seeded(Overflows, {1}), History()
    pruning = Pruning(PruneConfig("unstructured", amount=0.5), Constant(2), module="model")
    with pytest.warns(UserWarning, match="fp16 on a CPU"):
        trainer(tmp_path, [AutoMixedPrecision("fp16"), pruning, history], max_epochs=1).fit(module, loader())
    shares = [(step["model.first.weight"] == 0).float().mean().item() for step in history.weights]
    assert shares == [0.0, 0.0, 0.5, 0.5]


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
@pytest.mark.filterwarnings("ignore:fp16 on a CPU")
def test_nonfinite_gradients_in_a_row_stop_training_and_name_the_parameter(tmp_path, precision):
    module = seeded(Overflows, {1, 2, 3}, float("nan"))
    callback = AutoMixedPrecision(precision, patience=3)
    with pytest.raises(FloatingPointError, match=r"'model\.first\.weight' was not finite for 3 optimizer steps"):
        trainer(tmp_path, [callback], max_epochs=1).fit(module, loader())
    assert callback.skipped == (3 if precision == "fp16" else 0)  # without a scaler nothing is skipped


@pytest.mark.parametrize(("precision", "then"), [("fp16", "skipped"), ("bf16", "taken all the same")])
@pytest.mark.filterwarnings("ignore:fp16 on a CPU")
def test_nonfinite_gradients_are_said_once_where_they_begin(tmp_path, monkeypatch, precision, then):
    import lightning_accel.callbacks.precision as where

    said: list[str] = []
    monkeypatch.setattr(where, "rank_zero_info", said.append)

    class Zeroed(Overflows):
        """Where there is no scaler, the gradient is zeroed after it was seen, so that the weights stay finite."""

        def on_before_optimizer_step(self, optimizer: Any) -> None:
            if precision == "bf16":
                self.zero_grad()

    trainer(tmp_path, [AutoMixedPrecision(precision)], max_epochs=1).fit(seeded(Zeroed, {1, 2, 4}), loader(48))
    begin = "AutoMixedPrecision: the gradient of 'model.first.weight' is not finite at optimizer step"
    assert said[1:] == [f"{begin} {step}, which is {then}" for step in (1, 4)]


def test_nonfinite_gradients_that_end_do_not_stop_training(tmp_path):
    module, callback = seeded(Overflows, {1, 2}), AutoMixedPrecision("fp16", patience=3)
    with pytest.warns(UserWarning, match="fp16 on a CPU"):
        fit = trainer(tmp_path, [callback], max_epochs=3)
        fit.fit(module, loader())
    assert fit.global_step == 12 and callback.skipped == 6


def test_the_loss_scale_and_the_count_continue_after_a_resume(tmp_path):
    def run(name: str, resume: str | None = None) -> tuple[Any, Any]:
        module, callback = seeded(Overflows, {2}), AutoMixedPrecision("fp16")
        keep = ModelCheckpoint(tmp_path / name, "{epoch}", save_top_k=-1)
        with pytest.warns(UserWarning, match="fp16 on a CPU"):
            fit = trainer(tmp_path, [callback, keep], max_epochs=3)
            fit.fit(module, loader(), ckpt_path=resume)
        return module, (callback.skipped, fit.precision_plugin.scaler.get_scale())

    whole, counted = run("whole")
    resumed, counted_again = run("resumed", str(tmp_path / "whole" / "epoch=0.ckpt"))
    assert counted == counted_again == (3, 8192.0)
    assert_same(weights(resumed), weights(whole))


def test_bf16_computes_in_bf16_and_keeps_the_weights_in_fp32(tmp_path):
    class Seen(Plain):
        def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
            self.seen = self.model(batch[0]).dtype
            return super().training_step(batch, batch_idx)

    module = seeded(Seen)
    trainer(tmp_path, [AutoMixedPrecision("bf16")]).fit(module, loader())
    assert module.seen == torch.bfloat16
    assert module.model.first.weight.dtype == torch.float32


@pytest.mark.parametrize("asked", ["auto", "bf16", "fp32"])
def test_a_precision_given_to_the_trainer_too_raises(tmp_path, asked):
    fit = trainer(tmp_path, [AutoMixedPrecision(asked)], precision="bf16-mixed")
    with pytest.raises(ValueError, match=r"Trainer\(precision='bf16-mixed'\) and AutoMixedPrecision.*leave one out"):
        fit.fit(seeded(Plain), loader())


def test_the_precision_that_lightning_turned_into_another_is_named(tmp_path):
    with pytest.warns(UserWarning, match="AMP with fp16 is not supported on CPU"):
        fit = trainer(tmp_path, [AutoMixedPrecision("fp16")], precision="16-mixed")
    with pytest.raises(ValueError, match=r"leave one out \(on a CPU, Lightning turns '16-mixed' into 'bf16-mixed'\)"):
        fit.fit(seeded(Plain), loader())
    fit = trainer(tmp_path, [AutoMixedPrecision("fp16")], precision="64-true")
    with pytest.raises(ValueError, match=r"leave one out$"):
        fit.fit(seeded(Plain), loader())


def test_unknown_precisions_raise_when_they_are_written():
    with pytest.raises(ValueError, match=r"unknown precision '16-mixed'; write one of \('auto', 'bf16'"):
        AutoMixedPrecision("16-mixed")


def stay(monkeypatch: Any, answer: str = "fp32") -> list[int]:
    """Times as ever, but answers the same on every machine; returns where the number of calls is counted."""
    import lightning_accel.callbacks.precision as where

    calls, choose = [], where.choose_precision

    def choose_precision(*args: Any, **kwargs: Any) -> PrecisionChoice:
        calls.append(1)
        assert set(choose(*args, **kwargs).seconds) == {"fp32", "bf16"}
        return PrecisionChoice(answer, "as the test wants it", {"fp32": 1.0})

    monkeypatch.setattr(where, "choose_precision", choose_precision)
    return calls


class Normalized(Perceptron):
    """With state that a forward pass changes, and dropout."""

    def __init__(self) -> None:
        super().__init__(dropout=0.2)
        self.norm = torch.nn.BatchNorm1d(3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm(super().forward(x))


class Stream(IterableDataset):
    """Gives every sample once and no sample twice, like a socket."""

    def __init__(self) -> None:
        self.samples = iter(data(64))

    def __iter__(self) -> Any:
        return self.samples


def loaders(kind: str) -> Any:
    if kind == "generator":
        return DataLoader(data(), batch_size=8, shuffle=True, generator=torch.Generator().manual_seed(3))
    return DataLoader(Stream(), batch_size=8) if kind == "stream" else loader(shuffle=True)


@pytest.mark.parametrize("kind", ["shuffled", "generator", "stream"])
def test_auto_leaves_weights_random_state_and_batches_as_they_are_without_it(tmp_path, monkeypatch, kind):
    class Batches(Callback):
        def __init__(self) -> None:
            self.seen: list[torch.Tensor] = []

        def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, _: int) -> None:
            self.seen.append(batch[0])

    def run(*callbacks: Any) -> tuple[dict[str, torch.Tensor], torch.Tensor, list[torch.Tensor]]:
        module, batches = seeded(Plain, seeded(Normalized)), Batches()
        torch.manual_seed(4)
        trainer(tmp_path, [*callbacks, batches], max_steps=8).fit(module, loaders(kind))
        return weights(module), torch.rand(4), batches.seen

    calls = stay(monkeypatch)
    (one, drawn, seen), (other, drawn_again, seen_again) = run(), run(AutoMixedPrecision("auto"))
    assert calls == [1]
    assert_same(other, one)
    assert torch.equal(drawn, drawn_again)
    assert len(seen) == 8 and all(torch.equal(a, b) for a, b in zip(seen, seen_again, strict=True))


def test_the_choice_of_auto_is_saved_and_taken_again_on_resume(tmp_path, monkeypatch):
    calls = stay(monkeypatch, "bf16")
    keep = ModelCheckpoint(tmp_path, "{epoch}", save_top_k=-1)
    module = seeded(Plain)
    trainer(tmp_path, [AutoMixedPrecision("auto"), keep], max_epochs=3).fit(module, loader())
    assert calls == [1]
    callback, resumed = AutoMixedPrecision("auto"), seeded(Plain)
    fit = trainer(tmp_path, [callback], max_epochs=3)
    fit.fit(resumed, loader(), ckpt_path=str(tmp_path / "epoch=0.ckpt"))
    assert calls == [1]  # nothing was timed again
    assert callback.choice == PrecisionChoice("bf16", "as the test wants it", {"fp32": 1.0})
    assert fit.precision_plugin.precision == "bf16-mixed"
    assert_same(weights(resumed), weights(module))


def test_auto_times_another_module_anew_and_the_same_one_once(tmp_path, monkeypatch):
    timed = []

    def time(self, trainer, module, batch):
        timed.append(module)
        return PrecisionChoice("fp32", "as the test wants it")

    monkeypatch.setattr(AutoMixedPrecision, "_time", time)
    callback, first, second = AutoMixedPrecision("auto"), Plain(), Plain()
    for module in (first, first, second):
        trainer(tmp_path, [callback]).fit(module, loader())
    assert timed == [first, second]


def test_auto_says_what_it_measured(tmp_path):
    callback = AutoMixedPrecision("auto")
    trainer(tmp_path, [callback], max_steps=1).fit(seeded(Plain), loader())
    assert set(callback.choice.seconds) == {"fp32", "bf16"}
    assert all(seconds > 0 for seconds in callback.choice.seconds.values())
    assert "speed of a training step over fp32, measured here: bf16" in callback.choice.reason


class Demanding(Plain):
    """Its training_step takes no index, reads the trainer and logs."""

    def training_step(self, batch: Any) -> torch.Tensor:  # type: ignore[override]
        x, y = batch
        loss = F.cross_entropy(self.model(x), y) * (1 + self.trainer.current_epoch)
        self.log_dict({"loss_twice": 2 * loss, "rate": self.optimizers().param_groups[0]["lr"]})
        return loss


def test_auto_times_steps_that_use_the_trainer_and_take_no_index(tmp_path):
    callback = AutoMixedPrecision("auto")
    trainer(tmp_path, [callback]).fit(seeded(Demanding), loader())
    assert set(callback.choice.seconds) == {"fp32", "bf16"}


def test_auto_stays_in_fp32_and_says_why_where_a_step_cannot_be_timed(tmp_path):
    class Manual(Plain):
        automatic_optimization = False

        def training_step(self, batch: Any, batch_idx: int) -> None:
            optimizer = self.optimizers()
            optimizer.zero_grad()
            self.manual_backward(super().training_step(batch, batch_idx))
            optimizer.step()

    callback, module = AutoMixedPrecision("auto"), seeded(Manual)
    fit = trainer(tmp_path, [callback])
    fit.fit(module, loader())
    assert fit.global_step == 8
    assert callback.choice.precision == "fp32"
    assert (
        "manual training_step" in callback.choice.reason
        and "write AutoMixedPrecision('bf16')" in callback.choice.reason
    )
