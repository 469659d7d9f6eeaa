"""Resuming from a checkpoint continues bit by bit, before, during and after every schedule."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from helpers import Perceptron, Plain, assert_same, data, loader, seeded, trainer, weights
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from torch import nn
from torch.utils.data import DataLoader

import lightning_accel
from lightning_accel import (
    AutoMixedPrecision,
    Constant,
    Distillation,
    DistillConfig,
    Export,
    Linear,
    PruneConfig,
    Pruning,
    QuantConfig,
    QuantizationAwareTraining,
)

EPOCHS = 6  # of four steps: pruning from step 6 to 14, quantization from step 18


def callbacks(path: Any, epochs: int = EPOCHS, monitor: str | None = None) -> list[Any]:
    every = ModelCheckpoint(path, "{epoch}", monitor=monitor, save_top_k=-1 if monitor else 1, every_n_epochs=1)
    if not monitor:
        every.save_top_k = -1
    return [
        Distillation(DistillConfig(2.0), teacher=seeded(Perceptron, 32, dropout=0.3, seed=5)),
        Pruning(PruneConfig("neurons", amount=0.5), Linear(0.25, 0.6), module="model", every=2),
        QuantizationAwareTraining(QuantConfig("int8"), begin=0.75, module="model"),
        AutoMixedPrecision("fp32"),
        every,
    ]


def module(seed: int = 0) -> Plain:
    return seeded(Plain, Perceptron(dropout=0.2), seed=seed)


def pruning_of(fit: Any) -> Pruning:
    return next(c for c in fit.callbacks if isinstance(c, Pruning))


@pytest.fixture(scope="module", params=[False, True], ids=["in-order", "shuffled"])
def whole(request, tmp_path_factory):
    """A fit of six epochs, with a checkpoint after each."""
    path = tmp_path_factory.mktemp("whole")
    fit, trained = trainer(path, callbacks(path), max_epochs=EPOCHS), module()
    torch.manual_seed(11)
    fit.fit(trained, loader(shuffle=request.param))
    return path, weights(trained), pruning_of(fit).masks, request.param


@pytest.mark.parametrize("epoch", range(EPOCHS - 1))
def test_a_resumed_fit_ends_with_bitwise_the_same_weights_and_masks(whole, tmp_path, epoch):
    path, expected, masks, shuffle = whole
    fit, resumed = trainer(tmp_path, callbacks(tmp_path), max_epochs=EPOCHS), module(seed=99)
    torch.manual_seed(99)
    fit.fit(resumed, loader(shuffle=shuffle), ckpt_path=str(path / f"epoch={epoch}.ckpt"))
    assert fit.global_step == 4 * EPOCHS
    assert_same(weights(resumed), expected)
    assert_same(pruning_of(fit).masks, masks)


@pytest.mark.parametrize("save", ["validation", "batch"])
def test_checkpoints_of_other_moments_resume_bitwise(tmp_path, save):
    """Checkpoints written inside the validation loop, or (then without one) in the last batch of an epoch."""

    def run(name: str, seed: int, resume: str | None = None) -> tuple[Any, Any]:
        extra, validation = callbacks(tmp_path / name, monitor="val_loss"), loader(16)
        if save == "batch":
            validation = None
            extra[-1] = ModelCheckpoint(tmp_path / name, "{step}", save_top_k=-1, every_n_train_steps=4)
        fit, trained = trainer(tmp_path, extra, max_epochs=4), module(seed)
        torch.manual_seed(seed)
        fit.fit(trained, loader(shuffle=True), validation, ckpt_path=resume)
        return fit, trained

    expected = weights(run("whole", 3)[1])
    name = "epoch=1.ckpt" if save == "validation" else "step=8.ckpt"
    fit, resumed = run("resumed", 4, str(tmp_path / "whole" / name))
    assert fit.global_step == 16
    assert_same(weights(resumed), expected)


def test_checkpoints_hold_plain_types_and_no_teacher(whole):
    path, _, _, _ = whole
    saved = torch.load(path / f"epoch={EPOCHS - 1}.ckpt", map_location="cpu", weights_only=True)
    shapes = {tuple(t.shape) for t in torch.utils._pytree.tree_leaves(saved) if isinstance(t, torch.Tensor)}
    assert not any(32 in shape for shape in shapes)  # the teacher's width
    assert set(saved["state_dict"]) == set(module().state_dict())
    states = {state["technique"]: state for state in saved["callbacks"].values() if "technique" in state}
    assert states["pruning"]["complete"] and states["quantization"]["complete"]
    assert states["pruning"]["total"] == 4 * EPOCHS
    config = states["distillation"].pop("config")
    assert config["temperature"] == 2.0 and config["alpha"] == 0.5
    assert states["distillation"] == {
        "technique": "distillation",
        "module": "",
        "total": 4.0 * EPOCHS,
        "projections": {},
        "former": None,
    }


class Progress(Callback):
    """The share pruned and whether quantization is simulated, after each step."""

    def __init__(self) -> None:
        self.seen: list[tuple[float, bool]] = []

    def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
        qat = next(c for c in trainer.callbacks if isinstance(c, QuantizationAwareTraining))
        self.seen.append((pruning_of(trainer).share, qat.prepared))


@pytest.mark.parametrize("epoch", [1, 2, 5])
def test_training_longer_after_a_resume_never_rewinds_a_schedule(whole, tmp_path, epoch):
    path, _, _, shuffle = whole
    saved = torch.load(path / f"epoch={epoch}.ckpt", weights_only=True)["callbacks"]
    share = next(s["share"] for s in saved.values() if s.get("technique") == "pruning")
    progress = Progress()
    fit = trainer(tmp_path, [*callbacks(tmp_path), progress], max_epochs=2 * EPOCHS)
    fit.fit(module(), loader(shuffle=shuffle), ckpt_path=str(path / f"epoch={epoch}.ckpt"))
    shares = [one for one, _ in progress.seen]
    assert shares == sorted(shares) and shares[0] >= share and shares[-1] == 1.0
    assert pruning_of(fit).total == 4 * EPOCHS  # fractions still mean the first fit's length
    begun = [prepared for _, prepared in progress.seen]
    assert begun.index(True) == max(0, 18 - 4 * (epoch + 1)) and all(begun[begun.index(True) :])


def test_resuming_in_the_middle_of_an_epoch_warns_where_the_loader_cannot_be_resumed(tmp_path):
    keep = ModelCheckpoint(tmp_path, "{step}", save_top_k=-1, every_n_train_steps=2)
    pruning = PruneConfig("unstructured", amount=0.5)
    trainer(tmp_path, [Pruning(pruning, Constant(1), module="model"), keep]).fit(module(), loader())
    fit = trainer(tmp_path, [Pruning(pruning, Constant(1), module="model")])
    with pytest.warns(UserWarning, match="dataloader is not resumable"):
        fit.fit(module(), loader(), ckpt_path=str(tmp_path / "step=2.ckpt"))


class Stateful(DataLoader):
    """A loader that can be resumed: it skips what was already given."""

    given = 0

    def __iter__(self) -> Any:
        return self._rest(super().__iter__(), self.given % len(self))

    def _rest(self, batches: Any, start: int) -> Any:
        for index, batch in enumerate(batches):
            if index >= start:
                self.given = index + 1
                yield batch

    def state_dict(self) -> dict[str, int]:
        return {"given": self.given}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.given = state["given"]


def test_a_loader_that_can_be_resumed_resumes_bitwise_in_the_middle_of_an_epoch(tmp_path):
    def run(name: str, seed: int, resume: str | None = None) -> Plain:
        extra = callbacks(tmp_path / name)[:-1]
        extra.append(ModelCheckpoint(tmp_path / name, "{step}", save_top_k=-1, every_n_train_steps=3))
        trained = module(seed)
        torch.manual_seed(seed)
        fit = trainer(tmp_path, extra, max_epochs=3)
        fit.fit(trained, Stateful(data(), batch_size=8), ckpt_path=resume)
        assert fit.global_step == 12
        return trained

    expected = weights(run("whole", 1))
    for step in (3, 6, 9):
        assert_same(weights(run(f"resumed{step}", 2, str(tmp_path / "whole" / f"step={step}.ckpt"))), expected)


def test_random_numbers_of_every_generator_continue_after_a_resume(tmp_path):
    import random

    import numpy as np

    class Noisy(Plain):
        drawn: list[tuple[float, float, float]]

        def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
            self.drawn.append((random.random(), float(np.random.rand()), float(torch.rand(()))))
            return super().training_step(batch, batch_idx)

    def run(resume: str | None = None) -> list[Any]:
        noisy = seeded(Noisy)
        noisy.drawn = []
        keep = ModelCheckpoint(tmp_path, "{epoch}", save_top_k=-1)
        trainer(tmp_path, [Pruning(PruneConfig(), module="model"), keep], max_epochs=3).fit(
            noisy, loader(), ckpt_path=resume
        )
        return noisy.drawn

    whole = run()
    assert run(str(tmp_path / "epoch=0.ckpt")) == whole[4:]


def test_pruned_and_quantized_state_is_restored_into_the_same_parameters(whole, tmp_path):
    """Optimizer state follows: the Parameters that the optimizer got are those that the callbacks work on."""

    class Identity(Callback):
        def on_train_start(self, trainer: Any, pl_module: nn.Module) -> None:
            self.before = [id(p) for p in pl_module.parameters()]
            optimized = {id(p) for group in trainer.optimizers[0].param_groups for p in group["params"]}
            assert optimized == set(self.before)

        def on_train_end(self, trainer: Any, pl_module: nn.Module) -> None:
            assert [id(p) for p in pl_module.parameters()] == self.before

    path, _, _, shuffle = whole
    fit = trainer(tmp_path, [*callbacks(tmp_path), Identity()], max_epochs=EPOCHS)
    resumed = module()
    keys = list(copy.deepcopy(resumed).state_dict())
    fit.fit(resumed, loader(shuffle=shuffle), ckpt_path=str(path / "epoch=4.ckpt"))
    assert list(resumed.state_dict()) == keys


@pytest.mark.parametrize("name", ["model", "another"])
@pytest.mark.filterwarnings("ignore:the checkpoint was written by")
@pytest.mark.filterwarnings("ignore:Be aware that when using")
def test_a_checkpoint_of_the_last_step_holds_the_inputs_that_the_export_needs(tmp_path, name):
    def export(name: str) -> Export:
        return Export(tmp_path / name, module="model", engines=("portable",), measure=False)

    fit = trainer(tmp_path, [export("model")])
    fit.fit(seeded(Plain), loader(), loader(16))
    fit.save_checkpoint(tmp_path / "last.ckpt")
    again, module = export(name), seeded(Plain, seed=5)
    trainer(tmp_path, [again]).fit(module, loader(), loader(16), ckpt_path=str(tmp_path / "last.ckpt"))
    x = data(4)[:][0]
    with torch.no_grad():
        assert torch.allclose(lightning_accel.load(tmp_path / name)(x), module.model(x), atol=1e-5)
    states = torch.load(again.checkpoint, weights_only=True)["callbacks"]
    assert torch.equal(states[again.state_key]["call"][0][0], data(2)[:][0])
