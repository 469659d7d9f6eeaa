"""The swap to fake quantization: when it happens, and what it leaves as it was."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers import Perceptron, Plain, assert_same, data, llama, loader, seeded, texts, trainer, weights
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from torch import nn

from lightning_accel import (
    AccelModule,
    Distillation,
    DistillConfig,
    PruneConfig,
    Pruning,
    QuantConfig,
    QuantizationAwareTraining,
    export_model,
    load,
)
from lightning_accel.quantize import is_prepared, prepare_, unprepare_


class Active(Callback):
    """Whether the network was fake-quantized in the forward pass of each step."""

    def __init__(self) -> None:
        self.seen: list[bool] = []

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        self.seen.append(is_prepared(pl_module.model))
        assert trainer.callback_metrics["accel/quantization/active"] == float(self.seen[-1])


@pytest.mark.parametrize(
    ("begin", "options", "first"),
    [
        (0, {}, 0),
        (3, {}, 3),
        (0.5, {}, 4),
        (0.6, {}, 5),
        (0.5, {"max_steps": 6}, 3),
        (1, {"accumulate_grad_batches": 2}, 2),  # counted in optimizer steps, seen here in batches
    ],
)
def test_begin_is_an_optimizer_step_or_a_fraction_of_training(tmp_path, begin, options, first):
    active = Active()
    callbacks = [QuantizationAwareTraining(begin=begin, module="model"), active]
    trainer(tmp_path, callbacks, **options).fit(seeded(Plain), loader())
    assert active.seen == [index >= first for index in range(len(active.seen))]


def test_training_before_begin_is_bitwise_plain_training(tmp_path):
    class Keep(Callback):
        def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
            if trainer.global_step == 4:
                self.weights = weights(pl_module)

    plain, quantized = Keep(), Keep()
    trainer(tmp_path, [plain]).fit(seeded(Plain), loader())
    trainer(tmp_path, [QuantizationAwareTraining(begin=4, module="model"), quantized]).fit(seeded(Plain), loader())
    assert_same(plain.weights, quantized.weights)


def test_training_after_begin_is_bitwise_that_of_the_prepared_model(tmp_path):
    prepared, trained = seeded(Plain), seeded(Plain)
    prepare_(prepared.model, QuantConfig("int8"))
    trainer(tmp_path).fit(prepared, loader())
    trainer(tmp_path, [QuantizationAwareTraining(begin=0, module="model")]).fit(trained, loader())
    assert_same(weights(prepared), weights(trained))


class Scored(Plain):
    """Keeps the logits of what it scores."""

    def keep(self, batch: Any, batch_idx: int) -> None:
        self.logits = self.model(batch[0])

    validation_step = test_step = predict_step = keep


@pytest.mark.parametrize("stage", ["validate", "test", "predict"])
@pytest.mark.parametrize("begin", [0.5, 8], ids=["past-begin", "before-begin"])
def test_a_checkpoint_is_scored_as_the_network_that_was_trained(tmp_path, stage, begin):
    x = data(16)[:][0]
    keep = ModelCheckpoint(tmp_path, "{epoch}", save_top_k=-1)
    module = seeded(Scored)
    trainer(tmp_path, [QuantizationAwareTraining(begin=begin, module="model"), keep], max_epochs=3).fit(
        module, loader()
    )
    saved = tmp_path / f"epoch={2 if begin == 0.5 else 1}.ckpt"
    module.load_state_dict(torch.load(saved, weights_only=True)["state_dict"])
    with torch.no_grad():
        quantized = module.model(x)
        floating = unprepare_(module.model)(x)
    assert not torch.equal(quantized, floating)

    fresh = seeded(Scored, seed=5)
    score = getattr(trainer(tmp_path, [QuantizationAwareTraining(begin=begin, module="model")]), stage)
    score(fresh, loader(16, batch=16), ckpt_path=str(saved))
    assert is_prepared(fresh.model) == (begin == 0.5)
    assert torch.equal(fresh.logits, quantized if begin == 0.5 else floating)


class Shared(Perceptron):
    """The same layer stands in two places, and another's Parameter is tied to a third."""

    def __init__(self) -> None:
        super().__init__()
        self.again = self.second
        self.tied = nn.Linear(16, 16)
        self.tied.weight = self.second.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.second(self.first(x).relu()).relu()
        return self.head(self.tied(self.again(x)))


def test_the_swap_keeps_hooks_shared_modules_ties_and_train_eval_state(tmp_path):
    module = seeded(Plain, seeded(Shared))
    model = module.model
    calls: list[str] = []
    model.first.register_forward_hook(lambda *_: calls.append("forward"))
    model.first.register_forward_pre_hook(lambda *_: calls.append("before"))
    model.first.register_full_backward_hook(lambda *_: calls.append("backward"))
    model.head.eval()

    class Eval(Callback):  # Lightning calls train() itself at the start of the fit
        def on_train_batch_start(self, trainer: Any, pl_module: Any, *_: Any) -> None:
            pl_module.model.head.eval()

    trainer(tmp_path, [Eval(), QuantizationAwareTraining(begin=2, module="model")], max_epochs=1).fit(module, loader())
    assert calls == ["before", "forward", "backward"] * 4
    assert type(model.first).__name__ == "FakeQuantizedLinear" and isinstance(model.first, nn.Linear)
    assert model.again is model.second and model.tied.weight is model.second.weight
    assert not model.head.training and model.first.training
    assert [m.training for m in model.head.children()] == [False, False]


def test_the_logits_that_distillation_compares_are_the_quantized_ones(tmp_path):
    class Student(Callback):
        def __init__(self) -> None:
            self.same: list[bool] = []

        def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, _: int) -> None:
            self.batch = batch

        def on_before_backward(self, trainer: Any, pl_module: Any, loss: torch.Tensor) -> None:
            distillation = next(c for c in trainer.callbacks if isinstance(c, Distillation))
            self.same.append(bool(torch.isclose(loss, self.expected(distillation, pl_module))))

        def expected(self, distillation: Distillation, pl_module: Any) -> torch.Tensor:
            with torch.no_grad():
                x, y = self.batch
                student, teacher = pl_module.model(x), distillation.teacher(x)
                kl = nn.functional.kl_div(
                    (student / 2).log_softmax(-1), (teacher / 2).log_softmax(-1), log_target=True, reduction="batchmean"
                )
                return 0.5 * nn.functional.cross_entropy(student, y) + 0.5 * 4 * kl

    student = Student()
    distillation = Distillation(DistillConfig(temperature=2.0, alpha=0.5), teacher=seeded(Perceptron, 32, seed=3))
    qat = QuantizationAwareTraining(begin=3, module="model")
    module = seeded(Plain)
    trainer(tmp_path, [distillation, qat, student]).fit(module, loader())
    assert student.same == [True] * 8 and is_prepared(module.model)


def test_a_tied_language_model_keeps_its_keys_and_its_tie(tmp_path):
    module = AccelModule(llama(tie_word_embeddings=True))
    keys = list(module.state_dict())
    qat = QuantizationAwareTraining(QuantConfig("int8"), begin=1, module="model")
    trainer(tmp_path, [qat]).fit(module, texts())
    assert list(module.state_dict()) == keys
    assert module.model.lm_head.weight is module.model.model.embed_tokens.weight
    assert qat.coverage.share_of_parameters > 0.95
    assert type(module.model.model.embed_tokens).__name__ == "FakeQuantizedEmbedding"


def test_overrides_are_relative_to_the_module_and_leave_it_alone(tmp_path):
    module = seeded(Plain)
    qat = QuantizationAwareTraining(QuantConfig("int8", overrides={"head": None}), begin=0, module="model")
    trainer(tmp_path, [qat]).fit(module, loader())
    assert type(module.model.head) is nn.Linear and type(module.model.first).__name__ == "FakeQuantizedLinear"
    state = qat.state_dict()
    assert state["quantized"] == {"model.first": "int8", "model.second": "int8"}
    assert "excluded by overrides" in str(qat.coverage)


def test_two_on_one_module_or_on_one_inside_of_the_other_raise_and_on_two_modules_coexist(tmp_path):
    other = QuantConfig("int8", overrides={"head": None})
    for nested in ("model", "model.head", ""):
        with pytest.raises(ValueError, match=rf"callbacks, on module='model' and module='{nested}'; keep one, with"):
            two = [QuantizationAwareTraining(other, module=nested), QuantizationAwareTraining(begin=1, module="model")]
            trainer(tmp_path, two).fit(seeded(Plain), loader())
    module = seeded(Plain)
    apart = [QuantizationAwareTraining(begin=b, module=f"model.{name}") for b, name in ((1, "first"), (5, "head"))]
    trainer(tmp_path, apart).fit(module, loader())
    assert [type(m).__name__ for m in (module.model.first, module.model.second, module.model.head)] == [
        "FakeQuantizedLinear",
        "Linear",
        "FakeQuantizedLinear",
    ]


def test_resuming_what_was_trained_with_another_config_raises(tmp_path):
    keep = ModelCheckpoint(tmp_path, "{epoch}", save_top_k=-1)
    trainer(tmp_path, [QuantizationAwareTraining(begin=0.5, module="model"), keep]).fit(seeded(Plain), loader())
    other = QuantizationAwareTraining(QuantConfig("int8", overrides={"head": None}), begin=0.5, module="model")
    before, after = (str(tmp_path / f"epoch={epoch}.ckpt") for epoch in (0, 1))
    with pytest.raises(ValueError, match=r"was trained by QuantizationAwareTraining.*Resume with the config"):
        trainer(tmp_path, [other], max_epochs=3).fit(seeded(Plain), loader(), ckpt_path=after)
    trainer(tmp_path, [other]).fit(seeded(Plain), loader(), ckpt_path=before)  # quantization had not begun


def test_a_module_with_nothing_to_quantize_raises_before_training(tmp_path):
    class Convolution(Plain):
        def __init__(self) -> None:
            super().__init__(nn.Sequential(nn.Conv1d(8, 3, 1)))

        def on_train_start(self) -> None:
            raise AssertionError("training began")

    with pytest.raises(ValueError, match=r"touched nothing; quantization needs nn\.Linear"):
        trainer(tmp_path, [QuantizationAwareTraining(module="model")]).fit(Convolution(), loader())


def test_pruned_weights_stay_zero_under_fake_quantization(tmp_path):
    module = seeded(Plain)
    pruning = Pruning(PruneConfig("neurons", amount=0.5), module="model")
    trainer(tmp_path, [QuantizationAwareTraining(module="model"), pruning]).fit(module, loader())
    assert not module.model.first.weight[~pruning.masks["first.bias"]].any()
    assert int((module.model.first.weight.abs().sum(1) == 0).sum()) == 8


def test_int4_and_neurons_in_one_fit_raise_before_training_unless_the_layers_after_them_are_int8(tmp_path):
    from lightning_accel import PruneConfig, Pruning

    def callbacks(**options):
        neurons = Pruning(PruneConfig("neurons", amount=0.5), module="model")
        return [neurons, QuantizationAwareTraining(QuantConfig("int4-int8", **options), begin=1, module="model")]

    with pytest.raises(ValueError, match=r"cutting neurons out changes which inputs share a scale in int4"):
        trainer(tmp_path, callbacks()).fit(seeded(Plain), loader())
    overrides = {"first": "int8", "second": "int8", "head": "int8"}
    trainer(tmp_path, callbacks(overrides=overrides)).fit(seeded(Plain), loader())


def test_a_scheme_in_place_of_a_config_is_refused_when_it_is_written():
    with pytest.raises(ValueError, match=r"config is 'int8', expected a QuantConfig; write QuantConfig\('int8'\)"):
        QuantizationAwareTraining("int8")


@pytest.mark.parametrize("scheme", ["int8", "int8-static"])
@pytest.mark.parametrize("apart", [["model.first", "model.head"], ["model.head"]])
def test_a_checkpoint_of_layers_quantized_alone_exports_them_from_their_parent(tmp_path, scheme, apart):
    module, keep = seeded(Plain), ModelCheckpoint(tmp_path, "last")
    qat = [QuantizationAwareTraining(QuantConfig(scheme), begin=1, module=name) for name in apart]
    trainer(tmp_path, [*qat, keep]).fit(module, loader())
    assert [c.state_dict()["quantized"] for c in qat] == [{name: scheme} for name in apart]
    x = data(16)[:][0]
    for part in ("model", *apart):
        network, trained = (m.get_submodule(part) for m in (seeded(Plain, seed=5).eval(), module.eval()))
        inputs = torch.randn(16, trained.in_features) if part == "model.head" else x
        options = {"example_inputs": (inputs,), "engines": ("portable",), "measure": False, "module": part}
        export_model(network, tmp_path / "out", checkpoint=tmp_path / "last.ckpt", **options)
        exported = load(tmp_path / "out")
        with torch.no_grad():
            torch.testing.assert_close(exported(inputs), trained(inputs), atol=1e-6, rtol=1e-6)


class NamedLikePatterns(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleDict({"a*": nn.Linear(8, 8), "ab": nn.Linear(8, 8), "c[0]": nn.Linear(8, 3)})

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers.values():
            x = layer(x).tanh()
        return x


def test_a_checkpoint_of_names_that_read_like_patterns_is_exported(tmp_path):
    module, keep = Plain(seeded(NamedLikePatterns)), ModelCheckpoint(tmp_path, "last")
    config = QuantConfig("int8", overrides={"layers.ab": None})
    trainer(tmp_path, [QuantizationAwareTraining(config, module="model"), keep]).fit(module, loader())
    x = data(16)[:][0]
    options = {"example_inputs": (x,), "engines": ("portable",), "measure": False, "module": "model"}
    report = export_model(NamedLikePatterns(), tmp_path / "out", checkpoint=tmp_path / "last.ckpt", **options)
    done = {entry["name"]: entry["done"] for entry in report.manifest["coverage"][0]["entries"]}
    assert done == {"layers.a*": "int8", "layers.ab": None, "layers.c[0]": "int8"}
    with torch.no_grad():
        torch.testing.assert_close(load(tmp_path / "out")(x), module.eval().model(x), atol=1e-6, rtol=1e-6)
