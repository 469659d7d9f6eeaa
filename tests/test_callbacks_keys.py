"""Contracts 1 and 2: the user's model keeps its keys and Parameters, and the order of the callbacks does not matter."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from helpers import Perceptron, Plain, assert_same, data, llama, loader, seeded, texts, trainer, weights
from lightning.pytorch.callbacks import Callback
from torch import nn
from torch.nn import functional as F

from lightning_accel import (
    AccelModule,
    AutoMixedPrecision,
    Constant,
    Cubic,
    Distillation,
    DistillConfig,
    Export,
    PruneConfig,
    Pruning,
    QuantConfig,
    QuantizationAwareTraining,
)


class Watch(Callback):
    """Keys and Parameter identity of the user's model, after every batch."""

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        self.before = self.state(pl_module)
        self.batches = 0

    def state(self, pl_module: nn.Module) -> Any:
        keys = list(pl_module.state_dict())
        return keys, [(name, id(p)) for name, p in pl_module.named_parameters()], [type(b) for b in pl_module.buffers()]

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        assert self.state(pl_module) == self.before
        self.batches += 1


class Images(nn.Module):
    """A small image classifier with batch normalization and a feed-forward head."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten()
        )
        self.head = nn.Sequential(nn.Linear(16, 24), nn.ReLU(), nn.Linear(24, 3))

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        return self.head(self.features(image))


def images() -> Any:
    x = torch.randn(16, 1, 8, 8, generator=torch.Generator().manual_seed(2))
    dataset = torch.utils.data.TensorDataset(x, (x.mean((1, 2, 3)) > 0).long() + (x[:, 0, 0, 0] > 0).long())
    return torch.utils.data.DataLoader(dataset, batch_size=4)


TASKS: dict[str, Any] = {
    "perceptron": (lambda: Plain(seeded(Perceptron, dropout=0.1)), lambda: seeded(Perceptron, 32, seed=3), loader),
    "wrapped": (lambda: AccelModule(seeded(Perceptron)), lambda: seeded(Perceptron, 32, seed=3), loader),
    "llama": (lambda: AccelModule(llama()), lambda: llama(hidden_size=64), texts),
    "images": (lambda: AccelModule(seeded(Images)), lambda: seeded(Images, seed=3), images),
}


def callbacks(teacher: nn.Module, path: Any) -> list[Any]:
    return [
        AutoMixedPrecision("fp32"),
        Distillation(DistillConfig(2.0), teacher=teacher),
        Pruning(PruneConfig("neurons", amount=0.5), Cubic(begin=0.2, end=0.8), module="model", every=1),
        QuantizationAwareTraining(QuantConfig("int8"), begin=0.5, module="model"),
        Export(path / "model", module="model", engines=("portable",), measure=False),
    ]


@pytest.mark.parametrize("task", TASKS)
def test_keys_and_parameters_stay_with_all_callbacks(tmp_path, task):
    make, teacher, batches = TASKS[task]
    module, watch = make(), Watch()
    keys = list(module.state_dict())
    fit = trainer(tmp_path, [*callbacks(teacher(), tmp_path), watch])
    fit.fit(module, batches(), batches())
    assert watch.batches == fit.global_step > 3
    assert list(module.state_dict()) == keys
    assert not [k for k in keys if "weight_orig" in k or "mask" in k or "quantizer" in k]
    assert fit.callbacks[4].report is not None


class Wrapped(Plain):
    """Its training_step calls self(...), where Plain's calls self.model(...)."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.model(x)

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        return F.cross_entropy(self(batch[0]), batch[1])


def trained(path: Any, order: Any, make: Any = Plain) -> dict[str, torch.Tensor]:
    """Weights after a fit with dropout and shuffling, the callbacks in the given order."""
    module = seeded(make, seeded(Perceptron, dropout=0.1))
    torch.manual_seed(1)
    prune = PruneConfig("unstructured", amount=0.25)
    found = {
        "precision": AutoMixedPrecision("fp32"),
        "distillation": Distillation(teacher=seeded(Perceptron, 32, dropout=0.5, seed=3)),
        "neurons": Pruning(PruneConfig("neurons", amount=0.5), Cubic(0.1, 0.8), module="model", every=1),
        "weights": Pruning(prune, Cubic(0.2, 0.6), module="model", every=1),
        "quantization": QuantizationAwareTraining(begin=0.5, module="model"),
        "export": Export(path / "model", module="model", engines=("portable",), measure=False),
    }
    trainer(path, [found[name] for name in order], max_epochs=2).fit(module, loader(shuffle=True))
    return weights(module)


NAMES = ("precision", "distillation", "neurons", "weights", "quantization", "export")
ORDERS = [
    tuple(reversed(NAMES)),
    ("weights", "neurons", "quantization", "distillation", "export", "precision"),
    ("export", "quantization", "weights", "precision", "neurons", "distillation"),
]


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    return trained(tmp_path_factory.mktemp("reference"), NAMES)


@pytest.mark.parametrize("order", ORDERS, ids=lambda order: "-".join(name[:4] for name in order))
def test_any_order_of_the_callbacks_trains_bitwise_the_same_weights(tmp_path, reference, order):
    assert_same(trained(tmp_path, order), reference)


def test_every_order_of_three_callbacks_trains_bitwise_the_same_weights(tmp_path):
    names = ("neurons", "weights", "quantization")
    results = [trained(tmp_path, order) for order in itertools.permutations(names)]
    for result in results[1:]:
        assert_same(result, results[0])


def test_calling_the_module_or_its_network_trains_the_same_weights(tmp_path, reference):
    assert_same(trained(tmp_path, NAMES, Wrapped), reference)


def test_a_network_wrapped_by_torch_compile_trains_the_same_weights_under_its_own_keys(tmp_path, reference):
    def compiled(model: nn.Module) -> Plain:
        return Plain(torch.compile(model, backend="eager"))  # dynamo, guards and hooks, without a compiler

    found = trained(tmp_path, NAMES, compiled)
    assert list(found) == [name.replace("model.", "model._orig_mod.") for name in reference]
    assert_same({name.replace("._orig_mod", ""): tensor for name, tensor in found.items()}, reference)


def test_export_leaves_the_random_state_and_so_a_following_fit_unchanged(tmp_path):
    def drawn(*callbacks: Any) -> torch.Tensor:
        torch.manual_seed(5)
        trainer(tmp_path, callbacks).fit(seeded(Plain), loader(shuffle=True), loader(16, shuffle=True))
        return torch.rand(3)

    export = Export(tmp_path / "model", module="model", engines=("portable",), measure=False)
    assert torch.equal(drawn(), drawn(export))


class Linear(Plain):
    """Trains an nn.Sequential perceptron with the squared error, plain SGD."""

    def __init__(self) -> None:
        super().__init__(nn.Sequential(nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 3)))

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        x, y = batch
        return 0.5 * (self.model(x) - F.one_hot(y, 3)).square().sum() / len(x)

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def gradients(model: nn.Sequential, x: torch.Tensor, y: torch.Tensor) -> dict[str, torch.Tensor]:
    """dJ/dW = dJ/da da/dz dz/dW of J = |a2 - y|^2 / 2n, a2 = z2, a1 = relu(z1), by hand."""
    w1, b1, w2, b2 = (p.detach().double() for p in model.parameters())
    x, target = x.double(), F.one_hot(y, 3).double()
    z1 = x @ w1.T + b1
    a1 = z1.clamp_min(0)
    dz2 = (a1 @ w2.T + b2 - target) / len(x)  # dJ/da2 * da2/dz2, da2/dz2 = 1
    da1 = dz2 @ w2
    dz1 = da1 * (z1 > 0)  # da1/dz1
    return {"0.weight": dz1.T @ x, "0.bias": dz1.sum(0), "2.weight": dz2.T @ a1, "2.bias": dz2.sum(0)}


@pytest.mark.parametrize("pruned", [False, True], ids=["dense", "pruned"])
def test_gradients_are_those_derived_by_hand(tmp_path, pruned):
    class Compare(Callback):
        compared = 0

        def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
            self.expected = gradients(pl_module.model, *batch)

        def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
            for name, parameter in pl_module.model.named_parameters():
                torch.testing.assert_close(parameter.grad.double(), self.expected[name], rtol=1e-4, atol=1e-6)
                self.compared += 1

    module, compare = seeded(Linear), Compare()
    pruning = Pruning(PruneConfig("neurons", amount=0.5), Constant(1), module="model")
    trainer(tmp_path, [compare, pruning] if pruned else [compare]).fit(module, loader())
    assert compare.compared == 32
    if pruned:  # a pruned neuron's bias and weights are zero, so z1 = 0 there and nothing flows back
        x, y = data()[:8]
        gone = ~pruning.masks["0.bias"]
        assert gone.sum() == 3
        assert not gradients(module.model, x, y)["0.weight"][gone].any()


def test_a_step_under_pruning_is_the_plain_step_times_the_mask(tmp_path):
    plain, pruned = seeded(Linear), seeded(Linear)
    pruning = Pruning(PruneConfig("unstructured", amount=0.5), Constant(1), module="model")
    trainer(tmp_path, max_steps=1).fit(plain, loader())
    trainer(tmp_path, [pruning], max_steps=1).fit(pruned, loader())
    for name, mask in pruning.masks.items():
        assert torch.equal(pruned.model.get_parameter(name), plain.model.get_parameter(name) * mask)
