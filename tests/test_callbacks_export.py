"""The export after the fit: from what, to where, and what remains when it fails."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers import FEATURES, Perceptron, Plain, assert_same, data, loader, seeded, trainer, weights
from lightning.pytorch.callbacks import Callback, EMAWeightAveraging
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

import lightning_accel
from lightning_accel import Constant, Export, ExportError, Linear, PruneConfig, Pruning
from lightning_accel import QuantizationAwareTraining as QAT
from lightning_accel.artifact import load_weights

NEURONS = PruneConfig("neurons", amount=0.5)


def export(path: Any, module: str | None = "model", **options: Any) -> Export:
    return Export(path / "model", module=module, **({"engines": ("portable",), "measure": False} | options))


def techniques(module: str | None = "model") -> list[Any]:
    return [Pruning(NEURONS, Linear(0.1, 0.5), module=module, every=1), QAT(begin=0.5, module=module)]


class Around(Callback):
    """The live model before and after Export's hook."""

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        self.before = self.state(pl_module)

    def teardown(self, trainer: Any, pl_module: Any, stage: str) -> None:
        self.after = self.state(pl_module)

    def state(self, pl_module: nn.Module) -> Any:
        types = [(name, type(m), m.training, len(m._forward_hooks)) for name, m in pl_module.named_modules()]
        return types, [(id(p), p.requires_grad, p.dtype) for p in pl_module.parameters()], weights(pl_module)


def test_the_live_model_is_not_touched(tmp_path):
    around, module = Around(), seeded(Plain, seeded(Perceptron, dropout=0.1))
    trainer(tmp_path, [export(tmp_path), *techniques(), around]).fit(module, loader(), loader(16))
    assert around.before[0] == around.after[0] and around.before[1] == around.after[1]
    assert_same(around.before[2], around.after[2])
    assert module.model.training and type(module.model.first).__name__ == "FakeQuantizedLinear"


@pytest.mark.parametrize("where", ["model", None], ids=["callbacks-on-the-network", "callbacks-on-everything"])
def test_what_was_trained_is_what_is_exported(tmp_path, where):
    module = seeded(Plain)
    exporting = export(tmp_path)
    trainer(tmp_path, [*techniques(where), exporting]).fit(module, loader(), loader(16))
    artifact = lightning_accel.load(tmp_path / "model")
    x = data(16)[:][0]
    with torch.no_grad():
        assert torch.allclose(artifact(x), module.model(x), atol=1e-5)
    stored = load_weights(tmp_path / "model" / "weights.safetensors")
    assert sorted(t.shape for t in stored.values() if t.dtype == torch.int8) == [(3, 8), (8, 8), (8, 8)]
    assert exporting.report.directory == tmp_path / "model"


def test_the_default_metric_is_the_loss_of_the_users_own_training_step(tmp_path):
    class Own(Plain):
        """Batches are mappings with names of its own; the loss is not a plain cross-entropy; it draws noise."""

        def training_step(self, batch: Any) -> Any:  # type: ignore[override]
            noise = 0 * torch.rand(3)
            logits = self.model(batch["points"]) + noise
            loss = F.cross_entropy(logits, batch["classes"], label_smoothing=0.1) * (2 + 0 * self.trainer.current_epoch)
            self.log("train_loss", loss)
            return {"loss": loss, "logits": logits}

        validation_step = None  # type: ignore[assignment]

    def named() -> DataLoader:
        collate = torch.utils.data.default_collate
        return DataLoader(
            data(), 8, collate_fn=lambda rows: dict(zip(("points", "classes"), collate(rows), strict=True))
        )

    module = seeded(Own)
    exporting = export(tmp_path)
    trainer(tmp_path, [*techniques(), exporting]).fit(module, named())
    metrics = {m["name"]: m for m in exporting.report.manifest["metrics"]}
    artifact = lightning_accel.load(tmp_path / "model")
    with torch.no_grad():
        for name, network in (("loss (trained)", module.model), ("loss (artifact)", artifact)):
            losses = [F.cross_entropy(network(b["points"]), b["classes"], label_smoothing=0.1) * 2 for b in named()]
            assert metrics[name]["value"] == pytest.approx(torch.stack(losses).mean().item(), rel=1e-5)
    assert metrics["loss (float)"]["value"] != metrics["loss (trained)"]["value"]
    assert {m["n"] for m in metrics.values()} == {4} and metrics["loss (float)"]["direction"] == "lower"


def test_a_metric_of_ones_own_gets_the_batches_of_the_validation_loader(tmp_path):
    seen = []

    def accuracy(model: Any, batches: Any) -> float:
        seen.append([len(x) for x, _ in batches])
        return float(torch.cat([model(x).argmax(-1) == y for x, y in batches]).float().mean())

    accuracy.higher_is_better = True  # type: ignore[attr-defined]
    exporting = export(tmp_path, metric=accuracy)

    class Several(Plain):
        def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None: ...

    trainer(tmp_path, [exporting]).fit(seeded(Several), loader(), {"one": loader(20), "other": loader(8)})
    rows = exporting.report.manifest["metrics"]
    assert [(r["name"], r["direction"], r["n"]) for r in rows[:1]] == [("accuracy (float)", "higher", 3)]
    assert seen == [[8, 8, 4]] * 3


def test_manual_optimization_is_exported_and_its_quality_said_to_be_unknown(tmp_path):
    class Manual(Plain):
        automatic_optimization = False

        def training_step(self, batch: Any, batch_idx: int) -> None:
            self.optimizers().zero_grad()
            self.manual_backward(super().training_step(batch, batch_idx))
            self.optimizers().step()

    exporting = export(tmp_path)
    with pytest.warns(UserWarning, match=r"quality is not reported: a manual training_step has no loss to reuse"):
        trainer(tmp_path, [*techniques(), exporting]).fit(seeded(Manual), loader(), loader(16))
    assert exporting.report.manifest["metrics"] == []
    assert exporting.report.manifest["programs"][0]["verification"]["positions"] == 16


def test_a_network_called_with_positional_and_named_inputs_is_exported_by_name(tmp_path):
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = Perceptron()

        def forward(self, x: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
            return self.inner(x * scale) + bias

    class Calls(Plain):
        def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
            x, y = batch
            return F.cross_entropy(self.model(x, torch.ones_like(x), bias=torch.ones(len(x), 3)), y)

        validation_step = None  # type: ignore[assignment]

    module = seeded(Calls, seeded(Two))
    trainer(tmp_path, [export(tmp_path)]).fit(module, loader())
    artifact = lightning_accel.load(tmp_path / "model")
    x = data(4)[:][0]
    with torch.no_grad():
        expected = module.model(x, 2 * x, torch.zeros(4, 3))
    assert torch.allclose(artifact(x, 2 * x, torch.zeros(4, 3)), expected, atol=1e-5)
    assert torch.allclose(artifact(x=x, scale=2 * x, bias=torch.zeros(4, 3)), expected, atol=1e-5)


class Callable(Plain):
    """A LightningModule whose forward is what is deployed: it normalizes, then asks its network."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.model((x - 0.1) / 2).softmax(-1)

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        return F.nll_loss(self(batch[0]).log(), batch[1])

    validation_step = None  # type: ignore[assignment]


def test_the_whole_lightning_module_is_exported_through_its_forward(tmp_path):
    module, exporting = seeded(Callable), export(tmp_path, module=None)
    trainer(tmp_path, [*techniques(None), exporting]).fit(module, loader())
    x = data(16)[:][0]
    with torch.no_grad():
        assert torch.allclose(lightning_accel.load(tmp_path / "model")(x), module(x), atol=1e-4)
    metrics = {m["name"]: m["value"] for m in exporting.report.manifest["metrics"]}
    assert metrics["loss (artifact)"] == pytest.approx(metrics["loss (trained)"], rel=1e-3)


def test_a_whole_module_that_is_never_called_needs_its_inputs_named(tmp_path):
    with pytest.raises(ExportError, match=r"the Plain was never called during training.*module='name of the network'"):
        trainer(tmp_path, [export(tmp_path, module=None)]).fit(seeded(Plain), loader())

    class Forward(Callable):
        training_step = Plain.training_step

    module = seeded(Forward)
    exporting = export(tmp_path, module=None, example_inputs=(torch.randn(4, FEATURES),))
    with pytest.warns(UserWarning, match="quality is not reported: training_step does not call it"):
        trainer(tmp_path, [exporting]).fit(module, loader())
    x = data(8)[:][0]
    with torch.no_grad():
        assert torch.allclose(lightning_accel.load(tmp_path / "model")(x), module(x), atol=1e-5)


@pytest.mark.parametrize("first", [True, False], ids=["export-first", "export-last"])
def test_averaged_and_masked_weights_are_what_is_exported(tmp_path, first):
    module, exporting = seeded(Plain), export(tmp_path)
    pruning = Pruning(PruneConfig("unstructured", amount=0.5), Constant(6), module="model")
    rest = [pruning, EMAWeightAveraging(decay=0.9)]
    trainer(tmp_path, [exporting, *rest] if first else [*rest, exporting]).fit(module, loader())
    stored = load_weights(tmp_path / "model" / "weights.safetensors")
    weight = next(t for name, t in stored.items() if name.endswith("first.weight"))
    assert torch.equal(weight, module.model.first.weight)
    assert (weight == 0).float().mean() == 0.5
