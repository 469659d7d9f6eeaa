"""Cutting before training, saliencies measured while training, and optimizer state of pruned weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

import pytest
import tiny
import torch
from helpers import Perceptron, Plain, assert_same, data, llama, loader, seeded, texts, trainer, weights
from lightning.pytorch.callbacks import Callback, EMAWeightAveraging, ModelCheckpoint
from test_callbacks_keys import Watch

import lightning_accel
from lightning_accel import (
    AccelModule,
    Constant,
    Cubic,
    Export,
    Linear,
    PruneConfig,
    Pruning,
    QuantConfig,
    QuantizationAwareTraining,
    load_checkpoint,
    prune_model_,
    quantize_model,
    shrink_model,
)
from lightning_accel.quantize import unprepare_
from lightning_accel.select import count_flops

X = data(4)[:][0]
IDS = {"input_ids": torch.randint(3, 64, (2, 10), generator=torch.Generator().manual_seed(0))}


def cutting(**changes: Any) -> Pruning:
    return Pruning(PruneConfig("neurons", 0.5), module="model", cut_first=True, example_inputs=(X,), **changes)


class Sizes(Watch):
    """Keys and identity from the first batch on: the cut comes before."""

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None: ...

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        super().setup(trainer, pl_module, "fit")


def every_epoch(path: Path) -> ModelCheckpoint:
    return ModelCheckpoint(path, "{epoch}", save_top_k=-1)


def test_the_network_is_cut_before_the_optimizer_is_made(tmp_path):
    module, pruning, sizes = seeded(Plain), cutting(), Sizes()
    expected = seeded(Plain)
    masks = prune_model_(expected.model, pruning.config, example_inputs=(X,))
    expected.model = shrink_model(expected.model, masks, example_inputs=(X,))
    network, fit = module.model, trainer(tmp_path, [pruning, sizes])
    fit.fit(module, loader())
    trainer(tmp_path).fit(expected, loader())
    assert module.model is network and network.first.out_features == 8 and sizes.batches == 8
    assert {tuple(p.shape) for g in fit.optimizers[0].param_groups for p in g["params"]} == {
        tuple(p.shape) for p in network.parameters()
    }
    assert_same(weights(module), weights(expected))
    assert pruning.complete and not pruning.masks and fit.callback_metrics["accel/pruning/amount"] == 0.5


@pytest.mark.parametrize("epoch", [0, 1])
def test_a_fit_that_cuts_first_resumes_bitwise_from_a_dense_network(tmp_path, epoch):
    def run(name: str, seed: int, resume: str | None = None) -> Any:
        torch.manual_seed(seed)
        masked = Pruning(PruneConfig("unstructured", 0.5), Linear(0.2, 0.8), module="model", every=1)
        module = seeded(Plain, seeded(Perceptron, dropout=0.2, seed=seed))
        fit = trainer(tmp_path / name, [masked, cutting(), every_epoch(tmp_path / name)], max_epochs=3)
        fit.fit(module, loader(shuffle=True), ckpt_path=resume)
        return module

    whole = weights(run("whole", 0))
    path = tmp_path / "whole" / f"epoch={epoch}.ckpt"
    assert_same(weights(run("again", 7, str(path))), whole)
    last = str(tmp_path / "whole" / "epoch=2.ckpt")
    network = load_checkpoint(last, Perceptron())
    assert_same({f"model.{n}": t for n, t in weights(network).items()}, whole)
    assert_same(weights(load_checkpoint(last, Plain())), whole)
    with pytest.raises(ValueError, match=r"there is no checkpoint .*nowhere.ckpt"):
        load_checkpoint(tmp_path / "nowhere.ckpt", Perceptron())


@pytest.mark.parametrize("order", [1, -1])
def test_cut_first_and_trained_with_fake_quantization_is_training_the_cut_network_with_it(tmp_path, order):
    def simulated() -> QuantizationAwareTraining:
        return QuantizationAwareTraining(QuantConfig("int8"), begin=0.5, module="model")

    together = seeded(Plain)
    trainer(tmp_path, [cutting(), simulated()][::order]).fit(together, loader())
    dense = seeded(Perceptron)
    masks = prune_model_(dense, PruneConfig("neurons", 0.5), example_inputs=(X,))
    small = Plain(shrink_model(dense, masks, example_inputs=(X,)))
    trainer(tmp_path, [simulated()]).fit(small, loader())
    assert_same(weights(together), weights(small))
    converted = quantize_model(together.model, QuantConfig("int8"))
    shapes = [tuple(t.shape) for n, t in converted.named_buffers() if t.dtype == torch.int8]
    assert shapes == [(8, 8), (8, 8), (3, 8)]
    with torch.no_grad():
        trained = together.model.eval()(X)
        error = (converted.eval()(X) - trained).abs().max().item()
        plain = (unprepare_(together.model)(X) - trained).abs().max().item()
    assert error <= 1e-5 < plain  # it was trained with the rounding that the converted network has


def test_a_second_fit_cuts_no_more(tmp_path):
    module, pruning = seeded(Plain), cutting()
    for _ in range(2):
        trainer(tmp_path, [pruning]).fit(module, loader())
        assert module.model.first.out_features == 8


@pytest.mark.parametrize("order", [1, -1])
def test_a_cut_network_is_exported_and_exported_again_from_its_checkpoint(tmp_path, order):
    module = seeded(Plain)
    options: Any = {"engines": ("portable",), "measure": False}
    masked = Pruning(PruneConfig("neurons", 0.25), Constant(2), module="model", example_inputs=(X,))
    export = Export(tmp_path / "model", module="model", **options)
    trainer(tmp_path, [cutting(), masked, export][::order]).fit(module, loader(), loader(16))
    assert int(masked.masks["first.bias"].sum()) == 6
    torch.testing.assert_close(lightning_accel.load(tmp_path / "model")(X), module.model(X))
    lightning_accel.export_model(Perceptron(), tmp_path / "again", checkpoint=export.checkpoint, **options)
    torch.testing.assert_close(lightning_accel.load(tmp_path / "again")(X), module.model(X))


@pytest.mark.parametrize("structure", ["hidden", ("neurons", "heads", "layers")])
def test_what_cannot_be_masked_is_cut_first_in_a_transformer(tmp_path, structure):
    config = PruneConfig(structure, 0.5)
    with pytest.raises(ValueError, match=r"measured on data before training; write calibration"):
        Pruning(PruneConfig("layers"), cut_first=True)
    batches = [{"input_ids": batch["input_ids"]} for batch in texts()]
    data = {"example_inputs": IDS, "calibration": batches if "layers" in structure else None}
    pruning = Pruning(config, module="model", cut_first=True, **data)
    module = AccelModule(llama())
    trainer(tmp_path, [pruning, every_epoch(tmp_path)], max_epochs=1).fit(module, texts())
    if structure == "hidden":
        assert module.model.lm_head.in_features == 16
    else:
        assert len(module.model.model.layers) == 1 and module.model.config.num_hidden_layers == 1
    again = load_checkpoint(tmp_path / "epoch=0.ckpt", llama())
    assert_same(weights(again), weights(module.model))
    torch.testing.assert_close(again.eval()(**IDS).logits, module.model.eval()(**IDS).logits)


def test_layers_of_a_post_norm_model_are_not_masked_in_training(tmp_path):
    class Bert(Plain):
        def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
            return self.model(**IDS).logits.square().mean()

    pruning = Pruning(PruneConfig("layers", 0.5), module="model")
    with pytest.raises(ValueError, match=r"layers of 'bert.encoder.layer' cannot be masked .*cut_first=True"):
        trainer(tmp_path, [pruning]).fit(Bert(tiny.bert()), loader())


def test_arguments_that_do_not_go_together_are_refused(tmp_path):
    config = PruneConfig("neurons")
    with pytest.raises(ValueError, match="has no schedule; leave out schedule="):
        Pruning(config, Cubic(0.1, 0.5), cut_first=True)
    with pytest.raises(ValueError, match="unstructured zeros have no physical form to cut"):
        Pruning(PruneConfig(), cut_first=True)
    with pytest.raises(ValueError, match="calibration= is for cut_first=True"):
        Pruning(config, calibration=[X])
    with pytest.raises(ValueError, match=r"inputs are unknown; give .* example_inputs="):
        trainer(tmp_path, [Pruning(config, module="model", cut_first=True)]).fit(Plain(), loader())
    other = Pruning(PruneConfig("neurons", 0.25), cut_first=True, example_inputs=(X,))
    with pytest.raises(ValueError, match=r"two Pruning callbacks cut first in module='.*write one, with several"):
        trainer(tmp_path, [cutting(), other]).fit(Plain(), loader())
    with pytest.raises(ValueError, match="EMAWeightAveraging copies the network before it is cut"):
        trainer(tmp_path, [cutting(), EMAWeightAveraging()]).fit(Plain(), loader())
    trainer(tmp_path, [every_epoch(tmp_path)]).fit(Plain(), loader())
    with pytest.raises(ValueError, match=r"checkpoint was not cut by this Pruning\(cut_first=True\)"):
        trainer(tmp_path, [cutting()]).fit(Plain(), loader(), ckpt_path=str(tmp_path / "epoch=0.ckpt"))


# --- saliencies measured on the training batches ----------------------------------------------------------------------


@pytest.mark.parametrize("saliency", ["taylor", "wanda", "activation", "random"])
def test_a_fit_with_a_measured_saliency_resumes_bitwise(tmp_path, saliency):
    def run(name: str, seed: int, resume: str | None = None) -> Any:
        torch.manual_seed(seed)
        config = PruneConfig("neurons", 0.5, saliency=saliency)
        pruning = Pruning(config, Linear(0.2, 0.8), module="model", every=3)
        module = seeded(Plain, seed=seed)
        fit = trainer(tmp_path / name, [pruning, every_epoch(tmp_path / name)], max_epochs=4)
        fit.fit(module, loader(shuffle=True), loader(16), ckpt_path=resume)
        assert pruning.complete and int(pruning.masks["first.bias"].sum()) == 8
        return module

    whole = weights(run("whole", 0))
    for epoch in (0, 1, 2):
        assert_same(weights(run(f"again {epoch}", 7, str(tmp_path / "whole" / f"epoch={epoch}.ckpt"))), whole)


def test_taylor_leaves_out_gradients_that_overflowed(tmp_path):
    class Overflows(Plain):
        """The first batch has an infinite gradient, and no step, as where fp16 overflows."""

        def on_after_backward(self) -> None:
            if self.trainer.fit_loop.epoch_loop.batch_idx == 0:
                self.model.second.weight.grad[3, 3] = float("inf")

        def on_before_optimizer_step(self, optimizer: Any) -> None:
            if self.trainer.fit_loop.epoch_loop.batch_idx == 0:
                optimizer.zero_grad()

    class Seen(Callback):
        counts: ClassVar[list[dict[str, float]]] = []

        def on_train_batch_end(self, *_: Any) -> None:
            self.counts.append({name: float(count) for name, count in pruning.progress.means.counts.items()})

    pruning = Pruning(PruneConfig("neurons", 0.5, saliency="taylor"), Constant(4), module="model", every=1)
    trainer(tmp_path, [pruning, Seen()], max_epochs=1).fit(seeded(Overflows, optimizer="sgd", lr=0.0), loader())
    assert [set(counts.values()) for counts in Seen.counts] == [set(), {1.0}, {2.0}, set()]


def test_cutting_first_takes_a_loss_of_ones_own(tmp_path):
    batches, seen = list(loader()), []

    def loss(model: Any, batch: Any) -> Any:
        seen.append(len(batch[0]))
        return torch.nn.functional.cross_entropy(model(batch[0]), batch[1])

    config = PruneConfig("neurons", 0.5, saliency="taylor", scope="sensitivity")
    options: dict[str, Any] = {"module": "model", "cut_first": True, "example_inputs": (X,), "calibration": batches}
    numbers = options | {"calibration": [(x, y.float()) for x, y in batches]}
    with pytest.raises(ValueError, match=r"a loss is needed, and targets of torch\.float32 are no classes"):
        trainer(tmp_path, [Pruning(config, **numbers)]).fit(seeded(Plain), loader())
    pruning = Pruning(config, **options, loss=loss)
    module = seeded(Plain)
    trainer(tmp_path, [pruning]).fit(module, loader())
    assert seen and set(seen) == {8} and pruning.complete and module.model.first.out_features < 16
    with pytest.raises(ValueError, match="loss= is for cut_first=True"):
        Pruning(PruneConfig("neurons", saliency="taylor"), schedule=Constant(0.0), loss=loss)


@pytest.mark.filterwarnings("ignore:.*groups of 32 do not divide")
def test_layers_pruned_in_a_fit_that_trains_int4_are_exported(tmp_path):
    pruning = Pruning(PruneConfig("layers", 0.5), Linear(0.2, 0.5), module="model", every=1)
    qat = QuantizationAwareTraining(QuantConfig("int4-weight", group_size=32), begin=0.6, module="model")
    export = Export(tmp_path / "artifact", engines=("portable",), module="model", measure=False)
    module = AccelModule(llama(num_hidden_layers=4, intermediate_size=64))
    trainer(tmp_path, [pruning, qat, export], max_epochs=3).fit(module, texts())
    manifest = lightning_accel.load(tmp_path / "artifact").manifest
    names = {entry["name"] for entry in manifest["coverage"][1]["entries"] if entry["done"] == "int4-weight"}
    assert {int(name.split(".")[2]) for name in names if ".layers." in name} == {0, 1}


def test_layers_are_pruned_in_training_by_what_they_do_to_the_batches(tmp_path):
    def run(name: str, seed: int, resume: str | None = None) -> Any:
        torch.manual_seed(seed)
        pruning = Pruning(PruneConfig("layers", 0.5), Linear(0.3, 0.7), module="model", every=1)
        module = AccelModule(llama(num_hidden_layers=4))
        fit = trainer(tmp_path / name, [pruning, every_epoch(tmp_path / name)], max_epochs=4)
        fit.fit(module, texts(), ckpt_path=resume)
        return module, pruning

    module, pruning = run("whole", 0)
    shrunk: Any = shrink_model(module.model, pruning.masks, example_inputs=IDS)
    assert len(shrunk.model.layers) == 2 and shrunk.config.num_hidden_layers == 2
    torch.testing.assert_close(shrunk.eval()(**IDS).logits, module.model.eval()(**IDS).logits)
    assert_same(weights(run("again", 7, str(tmp_path / "whole" / "epoch=1.ckpt"))[0]), weights(module))


def test_a_saliency_that_has_seen_nothing_waits_for_a_batch(tmp_path):
    pruning = Pruning(PruneConfig("layers", 0.5), Constant(0.0), module="model")
    trainer(tmp_path, [pruning], max_epochs=1).fit(AccelModule(llama()), texts())
    assert pruning.complete and sum(not mask.any() for mask in pruning.masks.values()) == 9


@pytest.mark.parametrize("of", ["parameters", "flops"])
def test_a_share_of_the_whole_model_is_reached_in_training(tmp_path, of):
    pruning = Pruning(PruneConfig("neurons", 0.3, of=of), Linear(0.2, 0.8), module="model", every=1)
    module = seeded(Plain)
    trainer(tmp_path, [pruning]).fit(module, loader())
    small = shrink_model(module.model, pruning.masks, example_inputs=(X,))
    left, before = (
        sum(p.numel() for p in model.parameters()) if of == "parameters" else count_flops(model, (X,), {})[""]
        for model in (small, module.model)
    )
    assert 0.7 - 0.09 <= left / before <= 0.7  # a unit of both groups is up to 9 % of this network


class Moments(Callback):
    """The optimizer's state of what masks drop, after each batch."""

    def __init__(self, pruning: Pruning) -> None:
        self.pruning, self.largest, self.updates = pruning, [], 0

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        parameters = dict(pl_module.named_parameters())
        for name, mask in self.pruning.full_masks().items():
            for key, value in trainer.optimizers[0].state[parameters[name]].items():
                if key != "step":
                    self.largest.append(value[~mask.expand_as(value)].abs().max().item() if not mask.all() else 0.0)
                else:
                    assert value > 0


@pytest.mark.parametrize("optimizer", ["adam", "sgd"])
def test_momentum_of_pruned_neurons_is_cleared_and_stays_zero(tmp_path, optimizer):
    pruning = Pruning(PruneConfig("neurons", 0.5), Linear(0.2, 0.8), module="model", every=1)
    moments = Moments(pruning)
    trainer(tmp_path, [moments, pruning]).fit(seeded(Plain, optimizer=optimizer), loader())
    assert len(moments.largest) > 20 and not any(moments.largest)
