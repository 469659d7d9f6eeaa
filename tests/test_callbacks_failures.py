"""What goes wrong: exports that fail, fits that end early, schedules and names that do not fit. Nothing is lost."""

from __future__ import annotations

import re
import resource
from typing import Any

import pytest
import torch
from helpers import Perceptron, Plain, assert_same, data, loader, seeded, trainer, weights
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from torch import nn

import lightning_accel
from lightning_accel import (
    Constant,
    Cubic,
    Distillation,
    Export,
    ExportError,
    Linear,
    PruneConfig,
    Pruning,
    QuantConfig,
)
from lightning_accel import QuantizationAwareTraining as QAT

NEURONS = PruneConfig("neurons", amount=0.5)


def export(path: Any, **options: Any) -> Export:
    return Export(path / "model", **({"module": "model", "engines": ("portable",), "measure": False} | options))


def techniques(module: str | None = None) -> list[Any]:
    return [Pruning(NEURONS, Linear(0.1, 0.5), module=module, every=1), QAT(begin=0.5, module=module)]


def outputs(path: Any) -> torch.Tensor:
    return lightning_accel.load(path)(data(16)[:][0])


def break_export(monkeypatch: Any) -> None:
    import lightning_accel.engines.portable as engine

    def build(*_: Any, **__: Any) -> None:
        raise OSError("no space left, says the test")

    monkeypatch.setattr(engine, "build", build)


@pytest.mark.parametrize("where", ["model", None], ids=["callbacks-on-the-network", "callbacks-on-everything"])
@pytest.mark.parametrize("source", ["last", "best"])
def test_a_failed_export_keeps_the_last_good_artifact_and_says_how_to_export_again(
    tmp_path, monkeypatch, where, source
):
    first = seeded(Plain, seed=5)
    trainer(tmp_path, [*techniques(where), export(tmp_path)]).fit(first, loader())
    good = outputs(tmp_path / "model")
    module = seeded(Plain)
    keep = ModelCheckpoint(tmp_path / "kept", "{epoch}", monitor="val_loss", save_top_k=-1)
    with monkeypatch.context() as broken, pytest.raises(ExportError) as caught:
        break_export(broken)
        callbacks = [*techniques(where), export(tmp_path, weights=source), keep]
        trainer(tmp_path, callbacks).fit(module, loader(), loader(16))
    message = str(caught.value)
    assert "no space left, says the test" in message and "The training is saved. To export again:" in message
    assert torch.equal(outputs(tmp_path / "model"), good)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["kept", "model", "model.ckpt"]
    # the line works as it is printed, in another process or here, with a model that was never trained
    line = re.search(r"lightning_accel\.export_model\(model, .*\)$", message)[0]
    assert ("kept" in line) == (source == "best")
    eval(line, {"lightning_accel": lightning_accel, "model": seeded(Perceptron, seed=9)})
    with torch.no_grad():
        expected = module.model(data(16)[:][0])
    assert torch.allclose(outputs(tmp_path / "model"), expected, atol=1e-5)
    stored = lightning_accel.artifact.load_weights(tmp_path / "model" / "weights.safetensors")
    assert sorted(t.shape for t in stored.values() if t.dtype == torch.int8) == [(3, 8), (8, 8), (8, 8)]


def test_the_line_that_exports_again_works_for_the_whole_module(tmp_path, monkeypatch):
    class Called(Plain):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.model(x)

        def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
            return nn.functional.cross_entropy(self(batch[0]), batch[1])

    module = seeded(Called)
    with monkeypatch.context() as broken, pytest.raises(ExportError) as caught:
        break_export(broken)
        trainer(tmp_path, [*techniques("model"), export(tmp_path, module=None)]).fit(module, loader())
    assert not (tmp_path / "model").exists()
    line = str(caught.value).splitlines()[-1].strip()
    eval(line, {"lightning_accel": lightning_accel, "model": seeded(Called, seed=9)})
    with torch.no_grad():
        assert torch.allclose(outputs(tmp_path / "model"), module(data(16)[:][0]), atol=1e-5)


def test_training_goes_on_from_the_checkpoint_of_a_failed_export(tmp_path, monkeypatch):
    whole = seeded(Plain)
    trainer(tmp_path, techniques("model"), max_epochs=3).fit(whole, loader())
    module, callbacks = seeded(Plain), [*techniques("model"), export(tmp_path)]
    callbacks[0].schedule, callbacks[1].begin = Linear(1, 6), 6
    with monkeypatch.context() as broken, pytest.raises(ExportError):
        break_export(broken)
        trainer(tmp_path, callbacks).fit(module, loader())
    saved = torch.load(callbacks[2].checkpoint, weights_only=True)
    assert_same({name: t for name, t in saved["state_dict"].items()}, weights(module))
    again = [*techniques("model"), export(tmp_path)]
    again[0].schedule, again[1].begin = Linear(1, 6), 6
    resumed = seeded(Plain, seed=7)
    fit = trainer(tmp_path, again, max_epochs=3)
    fit.fit(resumed, loader(), ckpt_path=str(callbacks[2].checkpoint))
    assert fit.global_step == 12 and (tmp_path / "model" / "manifest.json").exists()


@pytest.mark.filterwarnings("ignore:the artifact's quality is not reported")
def test_weights_that_are_not_finite_are_not_exported(tmp_path):
    class Diverges(Plain):
        def on_train_end(self) -> None:
            with torch.no_grad():
                self.model.second.weight[0, 0] = float("nan")

    with pytest.raises(ExportError, match=r"second\.weight holds NaN or infinite values; the training diverged"):
        trainer(tmp_path, [export(tmp_path)]).fit(seeded(Diverges), loader())
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model.ckpt"]


# --- the best checkpoint ---


class Worse(Plain):
    """The logged metric rises from epoch to epoch, so that the first checkpoint is the best."""

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", float(self.current_epoch))


def test_best_is_the_best_of_the_checkpoints_after_every_schedule(tmp_path):
    keep = ModelCheckpoint(tmp_path / "kept", "{epoch}", monitor="val_loss", save_top_k=-1)
    exporting = export(tmp_path, weights="best")
    module = seeded(Worse)
    trainer(tmp_path, [*techniques(), exporting, keep], max_epochs=5).fit(module, loader(), loader(16))
    # pruning ends at step 10 and quantization begins then, in the third epoch; of those after, the third is the best
    assert [p.name for p in sorted((tmp_path / "kept").iterdir())] == [f"epoch={i}.ckpt" for i in range(5)]
    assert exporting._source == tmp_path / "kept" / "epoch=2.ckpt"
    saved = torch.load(exporting._source, weights_only=True)["state_dict"]
    probe = seeded(Plain, seed=3)
    probe.load_state_dict(saved)
    from lightning_accel.quantize import prepare_

    prepare_(probe.model, QuantConfig("int8"))
    with torch.no_grad():
        expected = probe.model(data(16)[:][0])
        assert not torch.allclose(module.model(data(16)[:][0]), expected, atol=1e-3)
    assert torch.allclose(outputs(tmp_path / "model"), expected, atol=1e-5)


@pytest.mark.parametrize("options", [{"save_top_k": 1}, {"save_top_k": -1, "save_weights_only": True}])
def test_best_raises_where_no_checkpoint_after_the_schedules_is_left(tmp_path, options):
    keep = ModelCheckpoint(tmp_path / "kept", "{epoch}", monitor="val_loss", **options)
    with pytest.raises(ExportError, match=r"no checkpoint written after the schedules ended.*save_top_k=-1"):
        trainer(tmp_path, [*techniques(), export(tmp_path, weights="best"), keep], max_epochs=4).fit(
            seeded(Worse), loader(), loader(16)
        )
    assert (tmp_path / "model.ckpt").exists() and not (tmp_path / "model").exists()


def test_best_without_a_monitored_checkpoint_raises_before_training(tmp_path):
    with pytest.raises(ValueError, match=r"weights='best' needs checkpoints.*ModelCheckpoint\(monitor='val_loss'"):
        trainer(tmp_path, [export(tmp_path, weights="best")]).fit(Untrained(), loader())


# --- before the first step ---


class Untrained(Plain):
    """Fails the test if a step is trained."""

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        raise AssertionError("a step was trained")


def config(**overrides: Any) -> PruneConfig:
    return PruneConfig("unstructured", amount=0.5, **overrides)


@pytest.mark.parametrize(
    ("callback", "message"),
    [
        (
            lambda: Pruning(config(), Cubic(2, 9), module="model"),
            r"ends at optimizer step 9, past the end .* \(8 steps\)",
        ),
        (lambda: Pruning(config(), Linear(7, 0.5), module="model"), r"inverted in a training of 8 .* 7 > 4"),
        (lambda: QAT(begin=8, module="model"), r"begin=8\) is past the end of training \(8 optimizer steps\)"),
        (lambda: QAT(begin=1.0, module="model"), r"begin=1\.0\) is past the end of training"),
        (lambda: Pruning(config(), module="modle"), r"there is no module 'modle' in Untrained; .* module='model'"),
        (lambda: QAT(module="model.third"), r"there is no module 'model\.third'.*model\.first"),
        (lambda: Pruning(config(overrides={"*.mlp": 0.1}), module="model"), r"'\*\.mlp' matches no module; .*'first'"),
        (lambda: QAT(QuantConfig(overrides={"lm_head": None}), module="model"), r"'lm_head' matches no module"),
        (lambda: Pruning(config(overrides={"*": None}), module="model"), r"every module is excluded by overrides"),
        (lambda: Pruning(config(), module="model.dropout"), r"found nothing to prune in Dropout"),
        (lambda: Export("model", module="modle"), r"there is no module 'modle'"),
        (lambda: Export(__file__), r"is a file; give Export another directory"),
        (lambda: Export("tests", module="model"), r"is not an artifact .*; give Export another directory"),
    ],
)
def test_what_does_not_fit_raises_before_the_first_step(tmp_path, monkeypatch, callback, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests" / "precious.txt").touch()
    with pytest.raises((ValueError, FileExistsError), match=message):
        trainer(tmp_path, [callback()]).fit(Untrained(), loader())
    assert [p.name for p in tmp_path.rglob("*")] == ["tests", "precious.txt"]


@pytest.mark.parametrize(
    ("module", "config", "message"),
    [
        (Plain, PruneConfig("neurons", overrides={"*.mlp": 0.1}), r"'\*\.mlp' matches no module; .*'first'"),
        (lambda: Plain(nn.Linear(8, 3)), PruneConfig("neurons"), "neurons pruning found nothing to prune in Linear"),
    ],
)
def test_neurons_that_do_not_fit_raise_before_the_first_step_however_late_the_schedule(
    tmp_path, module, config, message
):
    pruning = Pruning(config, Constant(7), module="model")
    fit = trainer(tmp_path, [pruning])
    with pytest.raises(ValueError, match=message):
        fit.fit(module(), loader())
    assert fit.global_step == 0


def test_neurons_of_a_module_that_is_never_called_raise_before_the_first_step(tmp_path):
    module = seeded(Plain)
    module.unused = Perceptron()
    fit = trainer(tmp_path, [Pruning(NEURONS, Constant(7), module="unused")])
    with pytest.raises(ValueError, match=r"the Perceptron was never called during training.*example_inputs=\(x,\)"):
        fit.fit(module, loader())
    assert fit.global_step == 0


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (lambda: Cubic(0.6, 0.1), r"ends before it begins; write Cubic\(begin=0\.1, end=0\.6\)"),
        (lambda: Linear(1.5), r"a fraction of training lies in \[0, 1\]; write 1 for the optimizer step"),
        (lambda: QAT(begin=-1), "an optimizer step is at least 0"),
        (lambda: PruneConfig(amount=1.0), r"amount=1\.0 is outside \[0, 1\)"),
        (lambda: PruneConfig(amount="0.5"), r"amount='0\.5' is no number: it is a share, write amount=0\.5 for half"),
        (lambda: PruneConfig(amount=None), r"amount=None is no number"),
        (lambda: PruneConfig(overrides={"*": True}), r"amount=True is no number"),
        (
            lambda: PruneConfig(overrides=["head"]),
            r"overrides=\['head'\] is no mapping; write overrides=\{'head\.\*': None\}",
        ),
        (
            lambda: Pruning("neurons"),
            r"'neurons' is no PruneConfig; write Pruning\(PruneConfig\('neurons', amount=0\.5\)\)",
        ),
        (lambda: Pruning(0.5), r"0\.5 is no PruneConfig"),
        (
            lambda: Pruning(config(), schedule="cubic"),
            r"'cubic' is no Schedule; write schedule=Cubic\(begin=0\.1, end=0\.6",
        ),
        (lambda: Pruning(config(), every=0.5), r"every=0\.5 must be at least 1 optimizer step; write every=10"),
        (lambda: Pruning(config(), module=nn.Linear(1, 1)), r"Linear is no name; write module='model' for self\.model"),
        (
            lambda: Distillation("x", teacher=nn.Identity()),
            r"'x' is no DistillConfig; write Distillation\(DistillConfig\(",
        ),
        (lambda: Export("."), r"'\.' is no name of a directory to be made; write Export\('out/model'\)"),
        (lambda: Export(""), r"'' is no name of a directory"),
        (lambda: Export(None), r"None is no name of a directory"),
        (lambda: QuantConfig("int5"), r"unknown scheme 'int5'; write QuantConfig\('int8'\)"),
        (lambda: Pruning(config(), every=0), "every=0 must be at least 1 optimizer step"),
        (lambda: Export("x", weights="first"), "weights='first' is unknown; write 'last' or 'best'"),
    ],
)
def test_wrong_settings_raise_when_they_are_written(wrong, message):
    with pytest.raises(ValueError, match=message):
        wrong()


def test_a_training_of_unknown_length_needs_steps(tmp_path):
    class Endless(torch.utils.data.IterableDataset):
        def __iter__(self) -> Any:
            return iter(data(16))

    endless = torch.utils.data.DataLoader(Endless(), batch_size=8)
    with pytest.raises(
        ValueError, match=r"the fraction 0\.5 needs a training of known length.*Trainer\(max_steps=\.\.\.\)"
    ):
        trainer(tmp_path, [Pruning(config(), Constant(0.5), module="model")]).fit(Untrained(), endless)
    module, pruning = seeded(Plain), Pruning(config(), Constant(2), module="model")
    trainer(tmp_path, [pruning]).fit(module, endless)
    assert pruning.complete


def test_a_fit_that_ends_before_a_schedule_is_exported_only_when_asked_to(tmp_path):
    class Stops(Plain):
        def on_train_epoch_end(self) -> None:
            self.trainer.should_stop = True

    late = [Pruning(NEURONS, Linear(0.1, 0.9), module="model"), QAT(begin=0.8, module="model")]
    with pytest.raises(ExportError, match=r"the fit ended before pruning and quantization did.*allow_incomplete=True"):
        trainer(tmp_path, [*late, export(tmp_path)], max_epochs=4).fit(seeded(Stops), loader())
    assert (tmp_path / "model.ckpt").exists() and not (tmp_path / "model").exists()
    late = [Pruning(NEURONS, Linear(0.1, 0.9), module="model"), QAT(begin=0.8, module="model")]
    asked = export(tmp_path, allow_incomplete=True)
    module = seeded(Stops)
    trainer(tmp_path, [*late, asked], max_epochs=4).fit(module, loader())
    with torch.no_grad():
        assert torch.allclose(outputs(tmp_path / "model"), module.model(data(16)[:][0]), atol=1e-5)


def test_fast_dev_run_exports_nothing_and_says_so(tmp_path):
    with pytest.warns(UserWarning, match="fast_dev_run: nothing is exported"):
        trainer(tmp_path, [*techniques(), export(tmp_path)], fast_dev_run=True).fit(seeded(Plain), loader(), loader(16))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.filterwarnings("ignore:the artifact's quality is not reported")
def test_optimizers_that_step_by_hand_and_seldom_need_schedules_in_steps(tmp_path):
    class Seldom(Plain):
        """Two optimizers, of which the second steps at every other batch: 12 steps in 8 batches, not 16."""

        automatic_optimization = False

        def training_step(self, batch: Any, batch_idx: int) -> None:
            first, second = self.optimizers()
            self.manual_backward(super().training_step(batch, batch_idx))
            for optimizer in (first, second)[: 1 + batch_idx % 2]:
                optimizer.step()
                optimizer.zero_grad()

        def configure_optimizers(self) -> Any:
            layers = (self.model.first, self.model.second)
            return [torch.optim.SGD(layer.parameters(), lr=0.1) for layer in layers]

    def pruning(end: int | float) -> Pruning:
        return Pruning(config(), Linear(0, end), module="model")

    message = (
        r"ended before pruning did; .*every optimizer is taken to step once a batch: .*write ints.*optimizer steps"
    )
    with pytest.raises(ExportError, match=message):
        trainer(tmp_path, [pruning(0.9), export(tmp_path)]).fit(seeded(Seldom), loader())
    trainer(tmp_path, [pruning(11), export(tmp_path)]).fit(seeded(Seldom), loader())
    assert (tmp_path / "model" / "manifest.json").exists()


def test_a_full_disk_at_the_checkpoint_is_an_export_error_and_leaves_no_partial_file(tmp_path):
    class FillsTheDisk(Callback):
        def on_train_end(self, *_: Any) -> None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))

    before, module = resource.getrlimit(resource.RLIMIT_FSIZE), seeded(Plain)
    fit = trainer(tmp_path, [export(tmp_path), FillsTheDisk()])
    try:
        with pytest.raises(ExportError) as caught:
            fit.fit(module, loader())
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    message = str(caught.value)
    assert f"the checkpoint {tmp_path / 'model.ckpt'} cannot be written (OSError: " in message
    assert "File too large" in message and "make room" in message
    assert list(tmp_path.iterdir()) == []
    fit.save_checkpoint(tmp_path / "other.ckpt")  # as the message says
    assert_same(torch.load(tmp_path / "other.ckpt", weights_only=True)["state_dict"], weights(module))
