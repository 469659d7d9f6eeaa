"""Contract 9: the teacher is a guest; and what the student learns from it is the formula."""

from __future__ import annotations

import copy
import functools
from typing import Any

import pytest
import torch
from helpers import Perceptron, Plain, assert_same, data, llama, loader, seeded, texts, trainer, weights
from lightning.pytorch.callbacks import Callback
from torch import nn
from torch.nn import functional as F
from transformers import BertConfig, BertForSequenceClassification

from lightning_accel import AccelModule, Distillation, DistillConfig, Export, QuantizationAwareTraining


class Moody(Perceptron):
    """A teacher with dropout and batch normalization, left in train mode with gradients on by its owner."""

    def __init__(self) -> None:
        super().__init__(24, dropout=0.5)
        self.norm = nn.BatchNorm1d(3)
        self.calls: list[tuple[bool, bool]] = []

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls.append((self.norm.training, torch.is_grad_enabled()))
        return self.norm(super().forward(x))


def by_hand(logits: torch.Tensor, teacher: torch.Tensor, y: torch.Tensor, config: DistillConfig) -> torch.Tensor:
    """d loss / d logits = (1 - alpha)(p - onehot)/n + alpha T (p_T - q_T)/n, with softmax at 1 and at T."""
    p, p_soft = logits.softmax(-1), (logits / config.temperature).softmax(-1)
    q_soft = (teacher / config.temperature).softmax(-1)
    task = (1 - config.alpha) * (p - F.one_hot(y, 3))
    return (task + config.alpha * config.temperature * (p_soft - q_soft)) / len(y)


@pytest.mark.parametrize("config", [DistillConfig(2.0, 0.5), DistillConfig(4.0, 0.9), DistillConfig(1.0, 0.0)])
def test_the_gradient_is_the_one_derived_by_hand(tmp_path, config):
    class Compare(Callback):
        compared = 0

        def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, _: int) -> None:
            x, y = batch
            hidden = pl_module.model.second(pl_module.model.first(x).relu()).relu()
            gradient = by_hand(pl_module.model.head(hidden), teacher.eval()(x), y, config)
            self.expected = gradient.T @ hidden

        def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
            torch.testing.assert_close(pl_module.model.head.weight.grad, self.expected, rtol=1e-4, atol=1e-6)
            self.compared += 1

    teacher, compare = seeded(Perceptron, 24, seed=3), Compare()
    trainer(tmp_path, [Distillation(config, teacher=teacher), compare]).fit(seeded(Plain), loader())
    assert compare.compared == 8


def test_the_teacher_is_frozen_and_its_own_state_is_put_back(tmp_path):
    teacher = seeded(Moody, seed=3).train()
    teacher.second.requires_grad_(False)
    before, wants = weights(teacher), [p.requires_grad for p in teacher.parameters()]
    modes = [m.training for m in teacher.modules()]
    fit = trainer(tmp_path, [Distillation(teacher=teacher)])
    fit.fit(seeded(Plain), loader(), loader(16))
    assert teacher.calls == [(False, False)] * 8  # eval, no gradients, and called in training steps only
    assert_same(weights(teacher), before)
    assert [p.requires_grad for p in teacher.parameters()] == wants
    assert [m.training for m in teacher.modules()] == modes
    assert all(p.grad is None for p in teacher.parameters())
    theirs = {id(p) for p in teacher.parameters()}
    assert not theirs & {id(p) for group in fit.optimizers[0].param_groups for p in group["params"]}


def test_the_teacher_is_in_no_state_dict_checkpoint_or_artifact(tmp_path):
    teacher = seeded(Perceptron, 77, seed=3)
    module = seeded(Plain)
    keys = list(module.state_dict())
    export = Export(tmp_path / "model", module="model", engines=("portable",), measure=False)
    trainer(tmp_path, [Distillation(teacher=teacher), export]).fit(module, loader())
    assert list(module.state_dict()) == keys
    saved = torch.load(export.checkpoint, weights_only=True)
    from lightning_accel.artifact import load_weights

    tensors = [
        *torch.utils._pytree.tree_leaves(saved),
        *load_weights(tmp_path / "model" / "weights.safetensors").values(),
    ]
    assert not [t for t in tensors if isinstance(t, torch.Tensor) and 77 in t.shape]


def test_hooks_and_wrapper_are_gone_after_the_fit(tmp_path):
    module = seeded(Plain)
    trainer(tmp_path, [Distillation(teacher=seeded(Perceptron, seed=3))]).fit(module, loader())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in module.modules())
    assert "training_step" not in module.__dict__


def test_hooks_and_wrapper_are_gone_after_a_fit_that_failed(tmp_path):
    class Fails(Plain):
        def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
            if batch_idx == 1:
                raise RuntimeError("as the test wants it")
            return super().training_step(batch, batch_idx)

    module = seeded(Fails)
    export = Export(tmp_path / "model", module="model", engines=("portable",), measure=False)
    with pytest.raises(RuntimeError, match="as the test wants it"):
        callbacks = [
            export,
            Distillation(teacher=seeded(Perceptron, seed=3)),
            QuantizationAwareTraining(module="model"),
        ]
        trainer(tmp_path, callbacks).fit(module, loader())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in module.modules())
    assert not {"training_step", "setup", "configure_model"} & set(module.__dict__)


def test_an_own_training_step_of_the_instance_comes_back_after_the_fit(tmp_path):
    module = seeded(Plain)
    calls: list[int] = []

    def training_step(batch: Any, batch_idx: int) -> torch.Tensor:
        calls.append(batch_idx)
        return Plain.training_step(module, batch, batch_idx)

    module.training_step = training_step  # type: ignore[method-assign]
    trainer(tmp_path, [Distillation(teacher=seeded(Perceptron, seed=3))], max_epochs=1).fit(module, loader())
    assert calls == [0, 1, 2, 3] and module.training_step is training_step


def test_validation_test_and_prediction_are_untouched(tmp_path):
    class Predicts(Plain):
        def predict_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
            return self.model(batch[0])

    teacher, module = seeded(Moody, seed=3), seeded(Predicts)
    fit = trainer(tmp_path, [Distillation(teacher=teacher)])
    alone = trainer(tmp_path).validate(module, loader(16), verbose=False)
    assert fit.validate(module, loader(16), verbose=False) == alone
    fit.test(module, loader(16), verbose=False)
    fit.predict(module, loader(16))
    assert teacher.calls == []


class Mixture(Plain):
    """Two networks that put out logits."""

    def __init__(self) -> None:
        super().__init__()
        self.other = Perceptron()

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        x, y = batch
        return {"loss": F.cross_entropy(self.model(x) + self.other(x), y), "extra": 1}


def test_an_ambiguous_student_raises_with_the_candidates_and_a_name_settles_it(tmp_path):
    with pytest.raises(
        ValueError, match=r"several modules put out logits: \['model', 'other'\]; name .*student='model'"
    ):
        trainer(tmp_path, [Distillation(teacher=seeded(Perceptron, seed=3))]).fit(seeded(Mixture), loader())
    distillation = Distillation(teacher=seeded(Perceptron, seed=3), student="other")
    fit = trainer(tmp_path, [distillation])
    fit.fit(seeded(Mixture), loader())
    assert fit.callback_metrics["accel/distillation/teacher_loss"] > 0


def test_a_student_that_is_never_called_or_does_not_exist_raises(tmp_path):
    unused = Distillation(teacher=seeded(Perceptron, seed=3), student="unused")
    module = seeded(Plain)
    module.unused = nn.Linear(1, 1)
    with pytest.raises(ValueError, match="training_step never called 'unused' with gradients; name what it calls"):
        trainer(tmp_path, [unused]).fit(module, loader())
    with pytest.raises(ValueError, match=r"there is no module 'modle' in Plain; .*model"):
        trainer(tmp_path, [Distillation(teacher=seeded(Perceptron), student="modle")]).fit(seeded(Plain), loader())


def test_a_teacher_that_would_be_trained_raises(tmp_path):
    module = seeded(Plain)
    message = r"is part of the LightningModule, in 'model\.first\.weight', so .*copy\.deepcopy\(model\)"
    with pytest.raises(ValueError, match=message):
        trainer(tmp_path, [Distillation(teacher=module.model)]).fit(module, loader())
    module.old = seeded(Perceptron, seed=3).requires_grad_(False)
    around = nn.Sequential(module.old, nn.Identity())
    for teacher in (module.old, around, torch.compile(module.old, backend="eager")):
        with pytest.raises(ValueError, match=r"is part of the LightningModule, in 'old\.first\.weight'"):
            trainer(tmp_path, [Distillation(teacher=teacher, student="model")]).fit(module, loader())

    class Outside(Plain):
        def configure_optimizers(self) -> Any:
            return torch.optim.SGD([*self.parameters(), *teacher.parameters()], lr=0.1)

    teacher = seeded(Perceptron, seed=3)
    before = weights(teacher)
    with pytest.raises(ValueError, match=r"teacher's parameter 'first\.weight' is in the optimizer SGD"):
        trainer(tmp_path, [Distillation(teacher=teacher)]).fit(seeded(Outside), loader())
    assert_same(weights(teacher), before)


def test_a_frozen_part_of_the_student_may_be_the_teachers_too(tmp_path):
    module, teacher = seeded(Plain), seeded(Perceptron, seed=3)
    module.model.first = teacher.first.requires_grad_(False)
    fit = trainer(tmp_path, [Distillation(teacher=teacher, student="model")])
    fit.fit(module, loader())
    assert fit.callback_metrics["accel/distillation/teacher_loss"] > 0


@pytest.mark.filterwarnings("ignore")
def test_the_same_labels_in_another_order_are_refused(tmp_path):
    def classifier(names: list[str], key: Any = int) -> nn.Module:
        config = BertConfig(vocab_size=64, hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
                            intermediate_size=16, num_labels=3)  # fmt: skip
        model = BertForSequenceClassification(config)
        model.config.id2label = {key(i): name for i, name in enumerate(names)}
        return model

    batch = {"input_ids": torch.arange(8).view(2, 4), "labels": torch.tensor([0, 1])}
    batches = torch.utils.data.DataLoader([batch], batch_size=None)
    module = AccelModule(classifier(["a", "b", "c"]))
    fit = trainer(tmp_path, [Distillation(teacher=classifier(["c", "b", "a"]), student="model")])
    with pytest.raises(ValueError, match="class 0 is 'a' to the student and 'c' to the teacher"):
        fit.fit(module, batches)
    states = DistillConfig(alpha=0.0, hidden={"bert.encoder.layer.0": "bert.encoder.layer.0"})
    for teacher, config in (
        (classifier(["x", "y", "z"]), None),
        (classifier(["a", "b", "c"], str), None),
        (classifier(["c", "b", "a"]), states),
    ):
        trainer(tmp_path, [Distillation(config, teacher=teacher, student="model")]).fit(module, batches)


def test_another_librarys_wrapper_around_training_step_stays_and_holds_no_teacher(tmp_path):
    class Wraps(Callback):
        def on_train_start(self, trainer: Any, pl_module: Any) -> None:
            inner = pl_module.training_step

            @functools.wraps(inner)
            def outer(*args: Any, **kwargs: Any) -> Any:
                calls.append(1)
                return inner(*args, **kwargs)

            pl_module.__dict__["training_step"] = outer

    calls: list[int] = []
    module, teacher = seeded(Plain), seeded(Moody, seed=3)
    trainer(tmp_path, [Distillation(teacher=teacher), Wraps()], max_epochs=1).fit(module, loader())
    assert len(calls) == len(teacher.calls) == 4 and "training_step" in module.__dict__
    trainer(tmp_path, max_epochs=1).fit(module, loader())
    assert len(calls) == 8 and len(teacher.calls) == 4


def test_logits_of_another_shape_raise_with_both_shapes(tmp_path):
    teacher = nn.Linear(8, 5)
    with pytest.raises(ValueError, match=r"student and teacher logits differ: \(8, 3\) and \(8, 5\)"):
        trainer(tmp_path, [Distillation(teacher=teacher)]).fit(seeded(Plain), loader())


def test_what_is_no_teacher_raises_when_it_is_written(tmp_path):
    with pytest.raises(ValueError, match=r"teacher is a int; it is a module, the folder or name of a transformers"):
        Distillation(teacher=3)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"write teacher='self', student='model'"):
        Distillation(teacher="self")
    with pytest.raises(ValueError, match=r"the teacher puts out no logits.*give a model with a head"):
        trainer(tmp_path, [Distillation(teacher=nn.Flatten(0))]).fit(seeded(Plain), loader())


def test_manual_optimization_and_two_teachers_are_refused_with_what_to_write(tmp_path):
    class Manual(Plain):
        automatic_optimization = False

    teacher = seeded(Perceptron, seed=3)
    with pytest.raises(
        ValueError, match=r"automatic optimization; .*lightning_accel\.distillation_loss\(student_logits"
    ):
        trainer(tmp_path, [Distillation(teacher=teacher)]).fit(seeded(Manual), loader())
    with pytest.raises(ValueError, match=r"two Distillation callbacks.*order.*distillation_loss"):
        two = [Distillation(teacher=teacher), Distillation(DistillConfig(3.0), teacher=copy.deepcopy(teacher))]
        trainer(tmp_path, two).fit(seeded(Plain), loader())


def test_padding_is_no_part_of_the_teachers_loss(tmp_path):
    student, teacher = llama(), llama(hidden_size=64)
    module = AccelModule(student)
    distillation = Distillation(DistillConfig(2.0), teacher=teacher)
    batch = next(iter(texts()))
    batch["attention_mask"][:, 8:] = 0
    fit = trainer(tmp_path, [distillation], max_steps=1)
    fit.fit(module, torch.utils.data.DataLoader([batch], batch_size=None))
    with torch.no_grad():  # from fresh copies, whose weights no step has changed
        inputs = {k: v for k, v in batch.items() if k != "labels"}
        logits = [m.eval()(**inputs).logits[:, :8] / 2 for m in (llama(), llama(hidden_size=64))]
    kl = (logits[1].softmax(-1) * (logits[1].log_softmax(-1) - logits[0].log_softmax(-1))).sum(-1).mean()
    assert fit.callback_metrics["accel/distillation/teacher_loss"] == pytest.approx(4 * kl.item(), rel=1e-4)


def test_the_teachers_term_is_averaged_over_several_calls_and_none_skips_the_batch(tmp_path):
    class Twice(Plain):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            x, y = batch
            return F.cross_entropy(self.model(x), y) + F.cross_entropy(self.model(-x), y) if batch_idx else None

    module, teacher = seeded(Twice), seeded(Perceptron, seed=3)
    start = copy.deepcopy(module.model)
    fit = trainer(tmp_path, [Distillation(DistillConfig(1.0), teacher=teacher)], limit_train_batches=2, max_epochs=1)
    fit.fit(module, loader())
    assert fit.global_step == 2  # Lightning counts the batch without a loss
    x = data()[8:16][0]
    with torch.no_grad():
        terms = [F.kl_div(start(z).log_softmax(-1), teacher(z).softmax(-1), reduction="batchmean") for z in (x, -x)]
    expected = torch.stack(terms).mean().item()
    assert fit.callback_metrics["accel/distillation/teacher_loss"] == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(("teachers", "precision"), [(torch.float32, "bf16-true"), (torch.bfloat16, "32-true")])
def test_a_teacher_of_another_precision_is_asked_in_its_own(tmp_path, teachers, precision):
    class Makes(Perceptron):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            assert x.dtype == teachers
            return super().forward(x) + self.head(torch.zeros(len(x), 16))

    teacher = seeded(Makes, seed=3).to(teachers)
    before, fit = weights(teacher), trainer(tmp_path, [Distillation(teacher=teacher)], precision=precision)
    fit.fit(seeded(Plain), loader())
    assert float(fit.callback_metrics["accel/distillation/teacher_loss"]) > 0
    assert_same(weights(teacher), before)
    assert torch.get_default_dtype() == torch.float32


def test_a_student_that_puts_out_a_tuple_is_told_what_logits_are(tmp_path):
    class Pair(Perceptron):
        def forward(self, x: torch.Tensor) -> Any:
            return super().forward(x), x

    class Takes(Plain):
        def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
            return F.cross_entropy(self.model(batch[0])[0], batch[1])

    with pytest.raises(ValueError, match=r"the student 'model' puts out no logits: .* not an item of a tuple"):
        distillation = Distillation(teacher=seeded(Perceptron, seed=3), student="model")
        trainer(tmp_path, [distillation]).fit(Takes(seeded(Pair)), loader())
