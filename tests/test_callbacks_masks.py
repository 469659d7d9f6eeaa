"""Pruned weights stay zero, whatever the training loop does."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers import Plain, Perceptron, assert_same, data, loader, seeded, trainer, weights
from lightning.pytorch.callbacks import Callback
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
