"""LightningCLI: every callback, config and schedule from YAML."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from helpers import Perceptron, Plain, loader
from lightning.pytorch.cli import LightningCLI

import lightning_accel
from lightning_accel import (
    AutoMixedPrecision,
    Cubic,
    Distillation,
    DistillConfig,
    Export,
    PruneConfig,
    Pruning,
    QuantConfig,
    QuantizationAwareTraining,
)

YAML = """
seed_everything: 1
trainer:
  accelerator: cpu
  devices: 1
  logger: false
  enable_progress_bar: false
  enable_model_summary: false
  enable_checkpointing: false
  num_sanity_val_steps: 0
  max_epochs: 3
  callbacks:
    - class_path: lightning_accel.AutoMixedPrecision
      init_args:
        precision: fp32
        patience: 5
    - class_path: lightning_accel.Distillation
      init_args:
        config:
          temperature: 3.0
          alpha: 0.25
        teacher:
          class_path: helpers.Perceptron
          init_args:
            hidden: 32
        student: model
    - class_path: lightning_accel.Pruning
      init_args:
        config:
          structure: neurons
          amount: 0.5
          scope: global
          overrides:
            second: 0.25
        schedule:
          class_path: lightning_accel.Cubic
          init_args:
            begin: 0.1
            end: 6
        module: model
        every: 2
    - class_path: lightning_accel.QuantizationAwareTraining
      init_args:
        config:
          scheme: int8
          overrides:
            head: null
        begin: 0.6
        module: model
    - class_path: lightning_accel.Export
      init_args:
        directory: {path}/model
        module: model
        engines: [portable]
        measure: false
        weights: last
        metric: test_callbacks_cli.accuracy
model:
  lr: 0.02
"""


class Module(Plain):
    def __init__(self, lr: float = 0.01, hidden: int = 16) -> None:
        super().__init__(Perceptron(hidden), lr=lr)


class Data(pl.LightningDataModule):
    def train_dataloader(self) -> Any:
        return loader()

    def val_dataloader(self) -> Any:
        return loader(16)


def accuracy(model: Any, batches: Any) -> float:
    return float(torch.cat([model(x).argmax(-1) == y for x, y in batches]).float().mean())


accuracy.higher_is_better = True  # type: ignore[attr-defined]


@pytest.fixture(autouse=True)
def _seed_stays_here(monkeypatch):
    monkeypatch.setenv("PL_GLOBAL_SEED", "1")  # seed_everything sets it, for all later processes


def run(path: Any, *arguments: str) -> LightningCLI:
    (path / "config.yaml").write_text(YAML.replace("{path}", str(path)))
    return LightningCLI(
        Module, Data, args=["fit", "--config", str(path / "config.yaml"), *arguments], save_config_callback=None
    )


def test_yaml_configures_every_callback_and_the_fit_exports(tmp_path):
    cli = run(tmp_path)
    precision, distillation, pruning, qat, export = (
        next(c for c in cli.trainer.callbacks if isinstance(c, kind))
        for kind in (AutoMixedPrecision, Distillation, Pruning, QuantizationAwareTraining, Export)
    )
    assert (precision.precision, precision.patience) == ("fp32", 5)
    assert distillation.config == DistillConfig(temperature=3.0, alpha=0.25)
    assert isinstance(distillation.teacher, Perceptron) and distillation.teacher.first.out_features == 32
    assert pruning.config == PruneConfig("neurons", amount=0.5, scope="global", overrides={"second": 0.25})
    assert pruning.schedule == Cubic(begin=0.1, end=6) and pruning.every == 2
    assert isinstance(pruning.schedule.begin, float) and isinstance(pruning.schedule.end, int)
    assert qat.config == QuantConfig("int8", overrides={"head": None}) and qat.begin == 0.6
    assert type(qat.config) is QuantConfig and type(pruning.config) is PruneConfig
    assert export.report.manifest["metrics"][0]["name"] == "accuracy (float)"
    assert export.report.manifest["metrics"][0]["direction"] == "higher"
    assert pruning.complete and qat.complete
    x = torch.randn(5, 8)
    with torch.no_grad():
        assert torch.allclose(lightning_accel.load(tmp_path / "model")(x), cli.model.model(x), atol=1e-5)


def test_the_command_line_overrides_the_yaml(tmp_path):
    more = '{"class_path": "lightning_accel.QuantizationAwareTraining", "init_args": {"begin": 2}}'
    cli = run(tmp_path, "--trainer.callbacks=null", f"--trainer.callbacks+={more}", "--model.hidden=8")
    qat = next(c for c in cli.trainer.callbacks if isinstance(c, QuantizationAwareTraining))
    assert qat.begin == 2 and qat.config == QuantConfig() and qat.complete
    assert cli.model.model.first.out_features == 8


@pytest.mark.parametrize(
    ("written", "wrong", "message"),
    [
        ("amount: 0.5", "amount: 1.5", r"amount=1\.5 is outside \[0, 1\)"),
        ("scheme: int8", "scheme: int7", r"unknown scheme 'int7'"),
        ("end: 6", "end: 1.5", r"a fraction of training lies in \[0, 1\]"),
        ("begin: 0.6", "begin: 99", r"begin=99\) is past the end of training"),
    ],
)
def test_wrong_values_in_yaml_raise_with_what_to_write(tmp_path, monkeypatch, capsys, written, wrong, message):
    import test_callbacks_cli

    monkeypatch.setattr(test_callbacks_cli, "YAML", YAML.replace(written, wrong))
    with pytest.raises((SystemExit, ValueError)) as caught:
        test_callbacks_cli.run(tmp_path)
    said = str(caught.value) + capsys.readouterr().err
    import re

    assert re.search(message, said), said


DISTILLATION = """
          temperature: 3.0
          alpha:
            class_path: lightning_accel.Between
            init_args:
              first: 0.9
              last: 0.1
              schedule:
                class_path: lightning_accel.Linear
                init_args: {begin: 0.0, end: 0.5}
          loss: js
          top_k: 2
          hidden:
            second: first
          hidden_loss: mse
          hidden_weight:
            class_path: lightning_accel.Cubic
            init_args: {begin: 0, end: 4}
        teacher: TEACHER
        student: model
"""


def test_layers_weights_over_progress_and_a_folder_as_teacher_come_from_yaml(tmp_path, monkeypatch):
    import test_callbacks_cli

    from lightning_accel import Between, Keyed, Linear, TeacherCache

    class Keys(Data):
        def train_dataloader(self) -> Any:
            return torch.utils.data.DataLoader(keyed, batch_size=8)

    expected = DistillConfig(
        3.0, Between(0.9, 0.1, Linear(0.0, 0.5)), "js", top_k=2, hidden={"second": "first"}, hidden_loss="mse",
        hidden_weight=Cubic(begin=0, end=4),
    )
    keyed = Keyed(loader().dataset)
    TeacherCache.build(tmp_path / "cache", Perceptron(32), keyed, expected, progress=False)
    start, end = YAML.index("          temperature: 3.0"), YAML.index("    - class_path: lightning_accel.Pruning")
    written = DISTILLATION.lstrip("\n").replace("TEACHER", str(tmp_path / "cache"))
    monkeypatch.setattr(test_callbacks_cli, "YAML", YAML[:start] + written + YAML[end:])
    monkeypatch.setattr(test_callbacks_cli, "Data", Keys)
    cli = test_callbacks_cli.run(tmp_path)
    distillation = next(c for c in cli.trainer.callbacks if isinstance(c, Distillation))
    assert distillation.config == expected and distillation.teacher == str(tmp_path / "cache")
    assert distillation.projections.weights["second"].shape == (32, 16)
