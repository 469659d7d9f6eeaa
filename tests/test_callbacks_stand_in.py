"""The default metric: an artifact's loss is the one that the network would compute itself, or it is not reported."""

from __future__ import annotations

import warnings
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from helpers import FEATURES, Perceptron, Plain, data, loader, seeded, trainer
from helpers import llama as causal
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

import lightning_accel
from lightning_accel import Export

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from transformers import (
        BertConfig,
        BertForMaskedLM,
        BertForSequenceClassification,
        BertForTokenClassification,
        T5Config,
        T5ForConditionalGeneration,
        ViTConfig,
        ViTForImageClassification,
    )

N, LENGTH, CLASSES = 8, 6, 3
SIZES = {
    "vocab_size": 50,
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 16,
    "num_labels": CLASSES,
}


def export(path: Any, **options: Any) -> Export:
    return Export(path / "model", **({"module": "model", "engines": ("portable",), "measure": False} | options))


class Own(pl.LightningModule):
    """A user's module around a network that computes its loss from labels."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def training_step(self, batch: Any) -> Tensor:
        return self.model(**batch).loss

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.01)


class Indexed(Own):
    def training_step(self, batch: Any) -> Tensor:
        return self.model(**batch)[0]


class Tuple(Own):
    def training_step(self, batch: Any) -> Tensor:
        loss, logits = self.model(**batch, return_dict=False)[:2]
        return loss + 0 * logits.mean()


class Unlabelled(Own):
    def training_step(self, batch: Any) -> Tensor:
        labels = batch.pop("labels")
        logits = self.model(**batch, return_dict=False)[0]
        return F.cross_entropy(logits.flatten(0, -2), labels.flatten())


def tokens(*shape: int, classes: int = CLASSES) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(2)
    ids = torch.randint(2, 50, (N, LENGTH), generator=generator)
    labels = torch.randint(0, classes, (N, *shape), generator=generator)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}


def batches(columns: dict[str, Tensor]) -> DataLoader:
    rows = [{name: column[i] for name, column in columns.items()} for i in range(N)]
    return DataLoader(rows, batch_size=4)


def bert(kind: Any, **options: Any) -> nn.Module:
    return kind(BertConfig(**(SIZES | options)))


def vit() -> nn.Module:
    sizes = {k: v for k, v in SIZES.items() if k != "vocab_size"}
    return ViTForImageClassification(ViTConfig(image_size=8, patch_size=4, **sizes))


def t5() -> nn.Module:
    sizes = {"d_model": 16, "d_kv": 8, "d_ff": 16, "num_layers": 1, "num_heads": 2}
    return T5ForConditionalGeneration(T5Config(vocab_size=50, decoder_start_token_id=0, **sizes))


KINDS: dict[str, tuple[Any, Any]] = {
    "sequences": (lambda: bert(BertForSequenceClassification), tokens),
    "regression": (
        lambda: bert(BertForSequenceClassification, num_labels=1),
        lambda: tokens() | {"labels": torch.linspace(0, 1, N)},
    ),
    "tokens": (lambda: bert(BertForTokenClassification), lambda: tokens(LENGTH)),
    "masked": (lambda: bert(BertForMaskedLM), lambda: tokens(LENGTH, classes=50)),
    "images": (
        vit,
        lambda: {"pixel_values": torch.randn(N, 3, 8, 8), "labels": torch.arange(N) % CLASSES},
    ),
    "encoder-decoder": (
        t5,
        lambda: tokens(LENGTH, classes=50) | {"decoder_input_ids": tokens()["input_ids"]},
    ),
    "encoder-decoder of labels": (t5, lambda: tokens(LENGTH, classes=50)),
    "causal": (causal, lambda: tokens() | {"labels": tokens()["input_ids"]}),
}


def losses(model: nn.Module, loader: DataLoader) -> float:
    with torch.no_grad():
        return sum(float(model.eval()(**batch).loss) for batch in loader) / len(loader)


@pytest.mark.parametrize(
    ("kind", "step"),
    [*((kind, Own) for kind in KINDS), *((k, s) for k in ("tokens", "causal") for s in (Indexed, Tuple))],
)
def test_the_loss_of_an_artifact_is_the_one_that_the_network_computes_from_labels(tmp_path, kind, step):
    make, columns = KINDS[kind]
    module, exporting, loader = step(seeded(make)), export(tmp_path), batches(columns())
    trainer(tmp_path, [exporting], max_epochs=1).fit(module, loader)
    metrics = {m["name"]: m["value"] for m in exporting.report.manifest["metrics"]}
    assert metrics["loss (trained)"] == pytest.approx(losses(module.model, loader), rel=1e-5)
    assert metrics["loss (artifact)"] == pytest.approx(metrics["loss (trained)"], rel=1e-4)


@pytest.mark.parametrize("kind", ["tokens", "causal"])
def test_outputs_are_indexed_and_put_into_a_tuple_as_transformers_does(tmp_path, kind):
    make, columns = KINDS[kind]
    module, exporting = Unlabelled(seeded(make)), export(tmp_path)
    trainer(tmp_path, [exporting], max_epochs=1).fit(module, batches(columns()))
    metrics = {m["name"]: m["value"] for m in exporting.report.manifest["metrics"]}
    assert metrics["loss (artifact)"] == pytest.approx(metrics["loss (trained)"], rel=1e-4)


class Scored(nn.Module):
    """A network with a loss of its own; `how` says what of."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.inner, self.how = Perceptron(), how

    def forward(self, x: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
        logits = self.inner(x)
        if labels is None:
            return {"logits": logits}
        if self.how == "capped":
            logits = 2.0 * torch.tanh(logits / 2.0)
            logits.mul_(3.0)
        if self.how == "otherwise":
            return {"loss": F.cross_entropy(self.inner(x), labels), "logits": logits}
        if self.how == "other logits":
            logits = logits + F.one_hot(labels, 3)
        return {"loss": F.cross_entropy(logits, labels, label_smoothing=0.2), "logits": logits}


class Scores(Plain):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.model(batch[0], labels=batch[1])["loss"]

    validation_step = None  # type: ignore[assignment]


def test_outputs_that_a_network_changes_in_place_are_replaced_after_the_change():
    from lightning_accel.callbacks.stand_in import _with_loss

    network, (x, labels) = seeded(Scored, "capped"), data(8)[:]
    ours = torch.randn(8, 3)
    output = _with_loss({"logits": ours}, network, (x,), {"labels": labels})
    assert output["logits"] is ours and list(output) == ["loss", "logits"]
    assert output["loss"] == F.cross_entropy(ours, labels, label_smoothing=0.2)


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("otherwise", "what training_step returns does not depend on the network's outputs"),
        ("capped", "from the network's outputs alone training_step returns"),
        ("other logits", "from the network's outputs alone training_step returns"),
    ],
)
def test_a_loss_that_is_not_of_the_artifacts_outputs_is_a_warning_not_a_failure(tmp_path, how, message):
    exporting = export(tmp_path)
    match = rf"quality is not reported: the loss of an artifact cannot be computed \(.*{message}.*metric=\.\.\."
    with pytest.warns(UserWarning, match=match):
        trainer(tmp_path, [exporting]).fit(Scores(seeded(Scored, how)), loader())
    assert exporting.report.manifest["metrics"] == []
    assert lightning_accel.load(tmp_path / "model")(torch.randn(3, FEATURES))["logits"].shape == (3, 3)


@pytest.mark.parametrize("where", ["model", None], ids=["network", "whole"])
def test_double_precision_is_exported_and_scored_in_single_precision(tmp_path, where):
    class Double(Plain):
        def forward(self, x: Tensor) -> Tensor:
            return self.model(x)

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return F.cross_entropy(self(batch[0]), batch[1])

        validation_step = None  # type: ignore[assignment]

    x, y = data()[:]
    doubles = DataLoader(torch.utils.data.TensorDataset(x.double(), y), batch_size=8)
    exporting = export(tmp_path, module=where)
    module = seeded(Double).double()
    trainer(tmp_path, [exporting]).fit(module, doubles)
    assert module.model.first.weight.dtype == torch.float64
    metrics = {m["name"]: m["value"] for m in exporting.report.manifest["metrics"]}
    with torch.no_grad():
        expected = float(F.cross_entropy(module(x.double()), y))
    assert metrics["loss (artifact)"] == pytest.approx(expected, rel=1e-5)


def test_an_iterable_loader_without_a_length_is_what_the_artifact_is_scored_on(tmp_path):
    class Stream(torch.utils.data.IterableDataset):
        def __iter__(self) -> Any:
            return iter(data(16))

    exporting = export(tmp_path)
    trainer(tmp_path, [exporting], max_steps=2).fit(seeded(Plain), DataLoader(Stream(), batch_size=4))
    metric = exporting.report.manifest["metrics"][0]
    assert (metric["n"], metric["split"]) == (4, "training")
