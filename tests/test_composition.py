"""Every scheme beside what else a fit may hold: what was trained, bit by bit, and that in the artifact."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import Plain, assert_same, seeded, trainer, weights
from lightning.pytorch.callbacks import Callback, EMAWeightAveraging, ModelCheckpoint, WeightAveraging
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from lightning_accel import (
    Constant,
    Distillation,
    DistillConfig,
    Export,
    PruneConfig,
    Pruning,
    QuantConfig,
    QuantizationAwareTraining,
    distillation_loss,
    export_model,
    load,
    prepare_,
    quantize_model,
    select,
    shrink_model,
)
from lightning_accel.artifact import load_weights
from lightning_accel.distill import combine
from lightning_accel.finalize import restore_
from lightning_accel.quantize import int4, is_prepared
from lightning_accel.quantize.ranges import freeze_
from lightning_accel.schedule import position

SCHEMES = [  # each is tested beside everything below
    "int8",
    "int4-weight",
    "int4-int8",
    "int8-static",
]
each_scheme = pytest.mark.parametrize("scheme", SCHEMES)

INPUTS, WIDTH, CLASSES, BATCH = 32, 64, 3, 8
LAYERS = ("first", "second", "head")


class Net(nn.Module):
    """ReLU layers whose inputs groups of 32 divide."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(INPUTS, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.head = nn.Linear(WIDTH, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.relu(self.second(F.relu(self.first(x)))))


def points(n: int = 4 * BATCH) -> TensorDataset:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(n, INPUTS, generator=generator)
    return TensorDataset(x, (x @ torch.randn(INPUTS, CLASSES, generator=generator)).argmax(-1))


def loader(shuffle: bool = False) -> DataLoader:
    """Four batches of eight."""
    return DataLoader(points(), batch_size=BATCH, shuffle=shuffle)


def fit(path: Path, scheme: str, callbacks: Any = (), net: Any = None, begin: int = 2, **options: Any) -> Plain:
    """Two epochs of QAT; returns the trained module."""
    module = Plain(net if net is not None else seeded(Net))
    qat = QuantizationAwareTraining(QuantConfig(scheme), begin=begin, module="model")
    trainer(path, [qat, *callbacks], **options).fit(module, loader())
    return module


def export(path: Path) -> Export:
    return Export(path / "artifact", module="model", engines=("portable",), measure=False)


def integers(model: nn.Module, scheme: str) -> dict[str, Tensor]:
    """Names and tensors of the converted form of a prepared model."""
    model = quantize_model(select.unwrap(model), QuantConfig(scheme))
    return dict(model.named_buffers()) | dict(model.named_parameters())


def codes(layer: Any) -> Tensor:
    """Integer codes [out, in] of a converted layer."""
    if layer.codes.dim() == 2:
        return layer.codes
    return int4.unpack(layer.codes, layer.scale, layer.out_features)[0].flatten(1)


@torch.no_grad()
def assert_exported(model: nn.Module, scheme: str, artifact: Path) -> None:
    """The artifact holds the integers of `model` bitwise, and computes what it does to float rounding.

    In a layer after the first, float rounding may move an activation to the code beside it: in two rows of 64 at most.
    """
    stored = {n.removeprefix("model."): t for n, t in load_weights(artifact / "weights.safetensors").items()}
    expected = integers(model, scheme)
    assert {f"{name}.codes" for name in LAYERS} <= set(expected) <= set(stored)
    assert_same(expected, {name: stored[name] for name in expected})
    x, training = points(64)[:][0], model.training
    y, trained = load(artifact)(x), model.eval()(x)  # in training, ranges would follow the input
    model.train(training)
    difference = (y - trained).abs().amax(-1)
    assert difference.max() <= 0.01 * trained.abs().max() and int((difference > 1e-5).sum()) <= 2
    assert int((y.argmax(-1) == trained.argmax(-1)).sum()) == 64


# --- with the Trainer's options and a teacher -------------------------------------------------------------------------

OPTIONS: dict[str, dict[str, Any]] = {
    "bf16-mixed": {"precision": "bf16-mixed"},
    "accumulated": {"accumulate_grad_batches": 2},
    "clipped by norm": {"gradient_clip_val": 0.05},
    "clipped by value": {"gradient_clip_val": 0.01, "gradient_clip_algorithm": "value"},
}
ALL = OPTIONS["bf16-mixed"] | OPTIONS["accumulated"] | OPTIONS["clipped by norm"]
DISTILL = DistillConfig(temperature=2.0)


def by_hand(scheme: str, options: dict[str, Any], teacher: nn.Module | None, begin: int = 2) -> dict[str, Tensor]:
    """Weights after the same training in a loop of torch's own."""
    model = seeded(Net)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    accumulate, clip = options.get("accumulate_grad_batches", 1), options.get("gradient_clip_val")
    steps, total = 0, 8 // accumulate
    for _ in range(2):
        for index, (x, y) in enumerate(loader()):
            if steps >= begin and not is_prepared(model):
                prepare_(model, QuantConfig(scheme))
            if steps >= position(0.9, total):
                freeze_(model)  # ranges, in the scheme that has some
            with torch.autocast("cpu", torch.bfloat16, enabled="precision" in options):
                logits = model(x)
                loss = F.cross_entropy(logits, y)
                if teacher is not None:
                    with torch.no_grad():
                        expected = teacher(x)
                    terms = {"logits": distillation_loss(logits, expected, DISTILL.temperature)}
                    loss = combine(loss, terms, {"logits": DISTILL.alpha})
            (loss / accumulate).backward()
            if (index + 1) % accumulate == 0:
                if clip and "gradient_clip_algorithm" in options:
                    nn.utils.clip_grad_value_(model.parameters(), clip)
                elif clip:
                    assert float(nn.utils.clip_grad_norm_(model.parameters(), clip)) > clip
                optimizer.step()
                optimizer.zero_grad()
                steps += 1
    assert steps == total
    return weights(model)


@each_scheme
@pytest.mark.parametrize("name", [*OPTIONS, "distilled", "all"])
def test_training_is_bitwise_that_of_a_loop_by_hand(tmp_path, scheme, name):
    options = ALL if name == "all" else OPTIONS.get(name, {})
    teacher = seeded(Net, seed=5) if name in ("distilled", "all") else None
    callbacks = [Distillation(DISTILL, teacher=teacher, student="model")] if teacher is not None else []
    assert_same(weights(fit(tmp_path, scheme, callbacks, **options).model), by_hand(scheme, options, teacher))


@each_scheme
def test_bf16_accumulation_clipping_and_a_teacher_are_exported_as_trained_and_hooks_survive(tmp_path, scheme):
    net, seen = seeded(Net), []

    def hook(module: nn.Module, args: Any, output: Tensor) -> None:
        if torch.is_grad_enabled():
            seen.append((type(module).__name__, output.dtype))

    net.first.register_forward_hook(hook)
    teacher = Distillation(DISTILL, teacher=seeded(Net, seed=5), student="model")
    module = fit(tmp_path, scheme, [teacher, export(tmp_path)], net, **ALL)
    plain, fake = ("Linear", torch.bfloat16), ("FakeQuantizedLinear", torch.bfloat16)
    assert seen == [plain] * 4 + [fake] * 4  # from the second optimizer step on, of two batches each
    assert {n for n, m in net.named_modules() if m._forward_hooks} == {"first"}
    assert {p.dtype for p in net.parameters()} == {torch.float32}
    assert_exported(module.model, scheme, tmp_path / "artifact")


# --- averaged weights -------------------------------------------------------------------------------------------------


class ByHand(Callback):
    """The weights after each optimizer step, averaged as `update(average, weight, n)` says."""

    def __init__(self, update: Callable[[Tensor, Tensor, int], Tensor]) -> None:
        self.update, self.count = update, 0

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        now = weights(pl_module.model)
        if self.count:
            now = {name: self.update(self.average[name], tensor, self.count) for name, tensor in now.items()}
        else:
            self.average = now
        self.average, self.last, self.count = now, weights(pl_module.model), self.count + 1


@each_scheme
def test_the_exponential_average_is_what_is_exported_and_what_the_checkpoint_holds(tmp_path, scheme):
    hand = ByHand(lambda average, weight, n: 0.5 * average + (1 - 0.5) * weight)
    exporting = export(tmp_path)
    module = fit(tmp_path, scheme, [exporting, EMAWeightAveraging(decay=0.5), hand])
    assert hand.count == 8
    assert_same(weights(module.model), hand.average)
    assert_exported(module.model, scheme, tmp_path / "artifact")
    last = copy.deepcopy(module.model)
    last.load_state_dict(hand.last)
    assert not torch.equal(integers(last, scheme)["second.codes"], integers(module.model, scheme)["second.codes"])
    restored = restore_(seeded(Net, seed=9), exporting.checkpoint, "model").model
    assert_same(integers(restored, scheme), integers(module.model, scheme))


@each_scheme
def test_the_mean_of_all_steps_is_what_is_left_after_the_fit(tmp_path, scheme):
    hand = ByHand(lambda average, weight, n: average + (weight - average) / (n + 1))
    module = fit(tmp_path, scheme, [WeightAveraging(), hand])
    assert is_prepared(module.model) and hand.count == 8
    for name, tensor in weights(module.model).items():
        assert torch.allclose(tensor, hand.average[name], rtol=0, atol=1e-7), name


class Convolutions(nn.Module):
    """Convolutions with BatchNorm, whose statistics are buffers, and a head that groups of 32 divide."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv1d(4, 8, 3, padding=1), nn.BatchNorm1d(8)
        self.head = nn.Linear(64, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.relu(self.norm(self.conv(x.view(-1, 4, 8)))).flatten(1))


@each_scheme
def test_averages_pair_the_buffers_of_batch_norms_with_themselves(tmp_path, scheme):
    hand = ByHand(lambda average, weight, n: 0.5 * average + (1 - 0.5) * weight)
    module = fit(tmp_path, scheme, [EMAWeightAveraging(decay=0.5), hand], seeded(Convolutions))
    found = weights(module.model)
    del found["norm.num_batches_tracked"]  # an integer
    assert_same(found, {name: hand.average[name] for name in found})
    assert list(dict(module.model.named_buffers())) == [
        "norm.running_mean", "norm.running_var", "norm.num_batches_tracked",
    ]  # fmt: skip


def test_ranges_stay_in_float32_in_a_network_of_another_format():
    model = seeded(Net).train()
    prepare_(model, QuantConfig("int8-static"))
    model(points()[:][0])
    before = model.first.activation_fake_quantizer.range.clone()
    model.to(torch.bfloat16)
    after = model.first.activation_fake_quantizer.range
    assert after.dtype == torch.float32 and torch.equal(after, before) and not torch.equal(before, before.bfloat16())


# --- pruning ----------------------------------------------------------------------------------------------------------


@each_scheme
def test_pruned_zeros_are_zeros_in_the_integer_codes_of_the_artifact(tmp_path, scheme):
    pruning = Pruning(PruneConfig("unstructured", amount=0.5), Constant(2), module="model")
    module = fit(tmp_path, scheme, [export(tmp_path), pruning], begin=4)
    assert_exported(module.model, scheme, tmp_path / "artifact")
    converted = quantize_model(module.model, QuantConfig(scheme))
    masks = {name: pruning.masks[f"{name}.weight"] for name in LAYERS}
    for name, mask in masks.items():
        found = codes(getattr(converted, name))
        assert found.shape == mask.shape and not found[~mask].any(), name
        assert found[mask].count_nonzero() > 0.5 * mask.sum(), name
    total = INPUTS * WIDTH + WIDTH * WIDTH + WIDTH * CLASSES
    assert sum(int((~mask).sum()) for mask in masks.values()) == total // 2


@each_scheme
@pytest.mark.filterwarnings("ignore:.*groups of 32 do not divide")
def test_neurons_trained_away_then_quantized_are_the_quantized_model_of_the_shrunk_one(tmp_path, scheme):
    pruning = Pruning(PruneConfig("neurons", amount=0.5), Constant(2), module="model")
    module = seeded(Plain, seeded(Net))
    trainer(tmp_path, [pruning]).fit(module, loader())
    x, directory = points(64)[:][0], tmp_path / "artifact"
    export_model(
        module.model, directory, example_inputs=(x,), masks=pruning.masks, quantize=QuantConfig(scheme), data=[x],
        calibration=[x] * 8, engines=("portable",), measure=False,
    )  # fmt: skip
    small = shrink_model(module.model, pruning.masks, example_inputs=(x,))
    shrunk = quantize_model(small, QuantConfig(scheme), calibration=[x] * 8)
    assert [codes(getattr(shrunk, name)).shape for name in LAYERS] == [(32, 32), (32, 32), (3, 32)]
    stored = {n.removeprefix("model."): t for n, t in load_weights(directory / "weights.safetensors").items()}
    tensors = dict(shrunk.named_buffers())
    assert_same(tensors, {name: stored[name] for name in tensors})
    with torch.no_grad():
        assert (load(directory)(x) - shrunk(x)).abs().max() <= 1e-5


# --- torch.compile ----------------------------------------------------------------------------------------------------


def wrapped(net: Net, backend: Any) -> Any:
    return torch.compile(net, backend=backend)


def in_place(net: Net, backend: Any) -> Any:
    net.compile(backend=backend)
    net.second.compile(backend=backend)
    return net


@each_scheme
@pytest.mark.parametrize("how", [wrapped, in_place])
def test_a_compiled_network_is_compiled_anew_when_quantization_begins_and_exported(tmp_path, scheme, how):
    graphs: list[int] = []

    def backend(graph: Any, inputs: Any) -> Any:  # dynamo, guards and hooks, without a compiler
        graphs.append(len(graph.graph.nodes))
        return graph.forward

    torch.compiler.reset()
    net = seeded(Net)
    module = fit(tmp_path, scheme, [export(tmp_path)], how(net, backend))
    assert len(graphs) >= 2 and graphs[-1] > graphs[0]  # the second holds the rounding
    assert_same(weights(net), by_hand(scheme, {}, None))
    assert next(iter(module.model.state_dict())) == ("_orig_mod.first.weight" if how is wrapped else "first.weight")
    assert_exported(net, scheme, tmp_path / "artifact")


# --- resume -----------------------------------------------------------------------------------------------------------

EPOCHS, BEGIN = 3, 6  # of four steps: checkpoints at 4 (before it begins), 8 (within) and 12 (at the end)


def resumable(path: Path, scheme: str, seed: int, resume: str | None = None, exporting: bool = True) -> Plain:
    module = seeded(Plain, seeded(Net, seed=seed))
    keep = ModelCheckpoint(path, "{epoch}", save_top_k=-1)
    qat = QuantizationAwareTraining(QuantConfig(scheme), begin=BEGIN, module="model")
    torch.manual_seed(seed)
    fitting = trainer(path, [qat, keep, *([export(path)] if exporting else [])], max_epochs=EPOCHS)
    fitting.fit(module, loader(shuffle=True), ckpt_path=resume)
    assert fitting.global_step == 4 * EPOCHS
    return module


@pytest.fixture(scope="module", params=SCHEMES)
def whole(request, tmp_path_factory):
    """A fit of three epochs without a break, with a checkpoint after each."""
    path = tmp_path_factory.mktemp("whole")
    return request.param, path, resumable(path, request.param, seed=0)


@pytest.mark.parametrize("epoch", range(EPOCHS), ids=["before-begin", "within", "at-the-end"])
@pytest.mark.filterwarnings("ignore:Be aware that when using")
def test_a_resumed_fit_ends_bitwise_as_the_one_without_a_break_and_exports_after_the_last_step_too(
    whole, tmp_path, epoch
):
    scheme, path, expected = whole
    checkpoint = path / f"epoch={epoch}.ckpt"
    states = torch.load(checkpoint, weights_only=True)["callbacks"]
    assert [s["prepared"] for s in states.values() if s.get("technique") == "quantization"] == [epoch >= 1]
    last = epoch == EPOCHS - 1
    resumed = resumable(tmp_path, scheme, seed=9, resume=str(checkpoint), exporting=last)
    assert_same(weights(resumed.model), weights(expected.model))
    assert_same(integers(resumed.model, scheme), integers(expected.model, scheme))
    if last:
        assert_exported(expected.model, scheme, tmp_path / "artifact")
