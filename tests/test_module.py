"""AccelModule: the loss, the metrics, the optimizer and its schedule."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers import Perceptron, llama, loader, seeded, texts, trainer
from lightning.pytorch.callbacks import Callback
from torch import nn
from torch.nn import functional as F
from torchmetrics.classification import MulticlassAccuracy

from lightning_accel import AccelModule, Export, Pruning, QuantizationAwareTraining
from lightning_accel.prune import PruneConfig


def test_the_loss_of_a_causal_language_model_is_transformers_own():
    model, batch = llama().eval(), next(iter(texts()))
    batch["labels"][:, :3] = -100
    with torch.no_grad():
        ours = AccelModule(model).training_step(batch, 0)
        assert torch.allclose(ours, model(**batch).loss, rtol=1e-6)


class Wrapped(nn.Module):
    """A causal language model inside another module, as PEFT has it."""

    def __init__(self) -> None:
        super().__init__()
        self.base = llama()

    def forward(self, **inputs: torch.Tensor) -> Any:
        return self.base(**inputs)


def test_a_causal_model_that_is_not_recognised_raises_and_is_shifted_when_it_is_said():
    model, batch = Wrapped().eval(), next(iter(texts()))
    for masked in (0, 9):  # of 12; three a row are left
        batch["labels"][:, :masked] = -100
        with pytest.raises(ValueError, match=r"Wrapped is not known.*write AccelModule\(model, causal=True\)"):
            AccelModule(model).training_step(batch, 0)
        with torch.no_grad():
            ours = AccelModule(model, causal=True).training_step(batch, 0)
            assert torch.allclose(ours, model(**batch).loss, rtol=1e-6)


def test_a_model_said_not_to_be_causal_is_not_shifted():
    batch = next(iter(texts()))
    for model in (llama(), Wrapped()):
        logits = model.eval()(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        expected = F.cross_entropy(logits.flatten(0, 1), batch["labels"].flatten())
        assert torch.equal(AccelModule(model, causal=False).training_step(batch, 0), expected)


def test_a_masked_model_whose_few_targets_happen_to_be_the_input_does_not_raise():
    model, batch = Wrapped().eval(), next(iter(texts()))
    batch["labels"][:, 1:] = -100
    assert batch["labels"].ne(-100).sum() == 4
    assert AccelModule(model).training_step(batch, 0).isfinite()


def test_causal_in_an_input_and_target_batch_is_shifted_and_needs_a_target_a_token():
    model, ids = seeded(nn.Embedding, 64, 64), torch.arange(12).view(2, 6)
    expected = F.cross_entropy(model(ids)[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    assert torch.equal(AccelModule(model, causal=True).training_step((ids, ids), 0), expected)
    with pytest.raises(ValueError, match=r"got \(2, 6, 64\) and \(2,\); leave causal=True out"):
        AccelModule(model, causal=True).training_step((ids, ids[:, 0]), 0)


def test_the_loss_of_a_token_classifier_is_not_shifted():
    class Tags(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Embedding(64, 5)

        def forward(self, input_ids: torch.Tensor) -> dict[str, torch.Tensor]:
            return {"logits": self.table(input_ids)}

    model = seeded(Tags)
    ids = torch.arange(12).view(2, 6)
    batch = {"input_ids": ids, "labels": ids % 5}
    expected = F.cross_entropy(model.table(ids).flatten(0, 1), (ids % 5).flatten())
    assert torch.equal(AccelModule(model).training_step(batch, 0), expected)


def test_the_score_of_an_exported_token_classifier_is_not_shifted_either(tmp_path):
    class Tags(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.Sequential(nn.Embedding(64, 16), nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 5))

        def forward(self, input_ids: torch.Tensor) -> dict[str, torch.Tensor]:
            return {"logits": self.layers(input_ids)}

    class Only(AccelModule):
        def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
            batch = {"input_ids": batch["input_ids"], "labels": batch["input_ids"] % 5}
            return super().training_step(batch, batch_idx)

        validation_step = None  # type: ignore[assignment]

    module = Only(seeded(Tags))
    export = Export(tmp_path / "model", module="model", engines=("portable",), measure=False)
    callbacks = [Pruning(PruneConfig("neurons"), module="model"), QuantizationAwareTraining(module="model"), export]
    trainer(tmp_path, callbacks).fit(module, texts())
    with torch.no_grad():
        module.eval()
        losses = []
        for batch in texts():
            ids = batch["input_ids"]
            losses.append(F.cross_entropy(module.model(ids)["logits"].flatten(0, 1), (ids % 5).flatten()))
    scores = {m["name"]: m["value"] for m in export.report.manifest["metrics"]}
    assert scores["loss (trained)"] == pytest.approx(torch.stack(losses).mean().item(), rel=1e-5)
    assert scores["loss (artifact)"] == pytest.approx(scores["loss (trained)"], rel=1e-3)


@pytest.mark.parametrize("given", ["one", "mapping"])
def test_metrics_are_those_of_the_whole_validation_set(tmp_path, given):
    metric = MulticlassAccuracy(3, average="micro")
    module = AccelModule(seeded(Perceptron), metrics=metric if given == "one" else {"accuracy": metric})
    fit = trainer(tmp_path)
    fit.fit(module, loader(), loader(20))
    with torch.no_grad():
        right = torch.cat([module.model(x).argmax(-1) == y for x, y in loader(20)])
        losses = [(F.cross_entropy(module.model(x), y), len(y)) for x, y in loader(20)]
    name = "val_MulticlassAccuracy" if given == "one" else "val_accuracy"
    assert float(fit.callback_metrics[name]) == pytest.approx(right.float().mean().item())
    expected = sum(float(loss) * n for loss, n in losses) / 20
    assert float(fit.callback_metrics["val_loss"]) == pytest.approx(expected, rel=1e-6)
    assert trainer(tmp_path).test(module, loader(20), verbose=False)[0]["test_loss"] == pytest.approx(
        expected, rel=1e-6
    )


class Rates(Callback):
    def __init__(self) -> None:
        self.seen: list[float] = []

    def on_train_batch_start(self, trainer: Any, *_: Any) -> None:
        self.seen.append(trainer.optimizers[0].param_groups[0]["lr"])


def test_the_learning_rate_rises_over_the_warmup_and_falls_to_a_tenth(tmp_path):
    rates = Rates()
    trainer(tmp_path, [rates], max_epochs=10).fit(AccelModule(seeded(Perceptron), lr=0.1, warmup=0.25), loader())
    assert rates.seen.index(max(rates.seen)) == 10 and max(rates.seen) == pytest.approx(0.1)
    assert rates.seen[0] == pytest.approx(0.01)
    assert rates.seen[10:] == sorted(rates.seen[10:], reverse=True)
    assert 0.01 <= rates.seen[-1] < 0.011


def test_the_learning_rate_is_constant_where_the_length_is_unknown(tmp_path):
    rates = Rates()
    trainer(tmp_path, [rates], max_time={"seconds": 1}).fit(AccelModule(seeded(Perceptron), lr=0.1), loader())
    assert set(rates.seen) == {0.1}


def test_weight_decay_leaves_biases_alone(tmp_path):
    fit, module = trainer(tmp_path, max_steps=1), AccelModule(seeded(Perceptron), weight_decay=0.3)
    module.model.second.requires_grad_(False)
    fit.fit(module, loader())
    decayed, others = fit.optimizers[0].param_groups
    assert (decayed["weight_decay"], others["weight_decay"]) == (0.3, 0.0)
    assert [p.dim() for p in decayed["params"]] == [2, 2] and [p.dim() for p in others["params"]] == [1, 1]


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_the_fused_step_is_that_of_plain_adamw_and_is_clipped_under_amp_too(tmp_path, precision):
    """Lightning refuses to clip for fused optimizers under every AMP, though only fp16 scales its gradients."""

    def fitted(module):
        fit = trainer(tmp_path, max_epochs=4, precision=precision, gradient_clip_val=0.1)
        fit.fit(module, loader())
        return fit.optimizers[0], torch.cat([p.detach().flatten() for p in module.parameters()])

    class Plain(AccelModule):
        def configure_optimizers(self):
            found = super().configure_optimizers()
            found["optimizer"].param_groups[0]["fused"] = found["optimizer"].param_groups[1]["fused"] = False
            return found

    start = torch.cat([p.detach().flatten() for p in seeded(Perceptron).parameters()])
    (ours, fused), (theirs, plain) = fitted(AccelModule(seeded(Perceptron))), fitted(Plain(seeded(Perceptron)))
    assert all(group["fused"] for group in ours.param_groups)
    assert not any(group["fused"] for group in theirs.param_groups)
    assert (fused - plain).norm() < 1e-3 * (plain - start).norm()


def test_complex_parameters_are_trained_without_the_fused_step(tmp_path):
    class Spectrum(nn.Module):
        def __init__(self):
            super().__init__()
            self.filter, self.last = nn.Parameter(torch.ones(8, dtype=torch.complex64)), nn.Linear(8, 4)

        def forward(self, x):
            return self.last(torch.fft.ifft(torch.fft.fft(x) * self.filter).real)

    module = AccelModule(seeded(Spectrum), lr=0.1)
    trainer(tmp_path, max_epochs=1).fit(module, loader())
    assert (module.model.filter - 1).abs().max() > 0.01


@pytest.mark.parametrize(
    ("model", "batch", "message"),
    [
        (Perceptron(), {"x": torch.ones(2, 8)}, r"the batch has no 'labels', only \['x'\]; add them"),
        (Perceptron(), torch.ones(2, 8), r"a batch is a Tensor, expected \(input, target\) or a mapping"),
        (
            nn.Flatten(0),
            (torch.ones(2, 8), torch.ones(2)),
            "Flatten puts out no logits; write your own LightningModule",
        ),
    ],
)
def test_what_does_not_fit_raises_with_what_to_write(model, batch, message):
    with pytest.raises(ValueError, match=message):
        AccelModule(model).training_step(batch, 0)


def test_another_loss_gets_the_networks_output_and_the_target(tmp_path):
    module = AccelModule(nn.Linear(8, 3), loss=nn.MSELoss())
    x, y = torch.randn(4, 8), torch.randn(4, 3)
    assert torch.equal(module.training_step((x, y), 0), (module.model(x) - y).square().mean())
    assert torch.equal(module(x), module.model(x))
