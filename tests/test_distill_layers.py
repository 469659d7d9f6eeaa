"""Hidden states and attention maps in a fit: what is compared, projections, weights over progress, resume."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import tiny
import torch
from helpers import Perceptron, Plain, assert_same, data, llama, loader, seeded, texts, trainer, weights
from lightning.pytorch.callbacks import Callback, EMAWeightAveraging, ModelCheckpoint
from torch import nn
from torch.nn import functional as F

from lightning_accel import (
    AccelModule,
    Between,
    Constant,
    Distillation,
    DistillConfig,
    Export,
    Keyed,
    Linear,
    PruneConfig,
    Pruning,
    QuantizationAwareTraining,
    TeacherCache,
    attention_loss,
    hidden_loss,
)

HIDDEN = DistillConfig(hidden={"second": "first"}, hidden_loss="mse", hidden_weight=2.0)


def value(fit: Any, name: str) -> float:
    return float(fit.callback_metrics[f"accel/distillation/{name}"])


def projections(fit: Any) -> dict[str, torch.Tensor]:
    return next(c for c in fit.callbacks if isinstance(c, Distillation)).projections.weights


# --- what is compared -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("loss", ["cosine", "mse", "normalized-mse"])
def test_the_hidden_term_is_the_function_of_the_states_by_name(tmp_path, loss):
    config = DistillConfig(alpha=0.25, hidden={"second": "first", "first": "second"}, hidden_loss=loss, hidden_weight=3)
    teacher, module = seeded(Perceptron, 16, seed=3), seeded(Plain)
    student, (x, y) = copy.deepcopy(module.model), data(8)[:]
    fit = trainer(tmp_path, [Distillation(config, teacher=teacher, student="model")], max_steps=1)
    fit.fit(module, loader(8))
    with torch.no_grad():
        states = [(net.first(x), net.second(net.first(x).relu())) for net in (student, teacher)]
        expected = (
            hidden_loss(states[0][1], states[1][0], loss=loss) + hidden_loss(states[0][0], states[1][1], loss=loss)
        ) / 2
        logits = student(x), teacher(x)
    kl = (logits[1] / 2).softmax(-1) * ((logits[1] / 2).log_softmax(-1) - (logits[0] / 2).log_softmax(-1))
    assert value(fit, "hidden_loss") == pytest.approx(expected.item(), rel=1e-5)
    assert value(fit, "teacher_loss") == pytest.approx(4 * kl.sum(-1).mean().item(), rel=1e-4)
    assert value(fit, "task_loss") == pytest.approx(F.cross_entropy(logits[0], y).item(), rel=1e-5)


def test_the_gradient_is_that_of_the_weighted_sum(tmp_path):
    class Keep(Callback):
        def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
            self.gradient = pl_module.model.second.weight.grad.clone()

    config = DistillConfig(alpha=0.25, loss="js", hidden={"second": "second"}, hidden_loss="mse", hidden_weight=3.0)
    teacher, module, keep = seeded(Perceptron, 16, seed=3), seeded(Plain), Keep()
    student, (x, y) = copy.deepcopy(module.model), data(8)[:]
    trainer(tmp_path, [Distillation(config, teacher=teacher, student="model"), keep], max_steps=1).fit(
        module, loader(8)
    )
    from lightning_accel import distillation_loss

    states = [net.second(net.first(x).relu()) for net in (student, teacher)]
    logits = [net.head(state.relu()) for net, state in zip((student, teacher), states, strict=True)]
    loss = 0.75 * F.cross_entropy(logits[0], y) + 0.25 * distillation_loss(
        logits[0], logits[1].detach(), 2.0, loss="js"
    )
    loss = loss + 3.0 * F.mse_loss(states[0], states[1].detach())
    torch.testing.assert_close(keep.gradient, torch.autograd.grad(loss, student.second.weight)[0])


def test_padding_is_no_part_of_the_hidden_term(tmp_path):
    batch = next(iter(texts()))
    batch["attention_mask"][:, 8:] = 0
    config = DistillConfig(alpha=0.0, hidden="last", hidden_loss="normalized-mse")
    fit = trainer(tmp_path, [Distillation(config, teacher=llama(num_hidden_layers=3), student="model")], max_steps=1)
    fit.fit(AccelModule(llama()), torch.utils.data.DataLoader([batch], batch_size=None))
    inputs = {k: v for k, v in batch.items() if k != "labels"}
    with torch.no_grad():  # the states before the last norm, as the layers put them out
        kept: dict[str, list[torch.Tensor]] = {"student": [], "teacher": []}
        for name, net in (("student", llama()), ("teacher", llama(num_hidden_layers=3))):
            for layer in net.model.layers[-2:]:
                layer.register_forward_hook(lambda m, a, out, name=name: kept[name].append(out[:, :8]))
            net.eval()(**inputs)
    losses = [hidden_loss(s, t, loss="normalized-mse") for s, t in zip(kept["student"], kept["teacher"], strict=True)]
    assert value(fit, "hidden_loss") == pytest.approx(torch.stack(losses).mean().item(), rel=1e-4)


def eager(model: nn.Module) -> Any:
    model.set_attn_implementation("eager")  # type: ignore[operator]
    return model


def test_the_attention_term_is_the_function_of_the_maps(tmp_path):
    config = DistillConfig(alpha=0.0, attention="uniform")
    fit = trainer(tmp_path, [Distillation(config, teacher=eager(llama(hidden_size=64)), student="model")], max_steps=1)
    fit.fit(AccelModule(eager(llama())), texts(4))
    batch = next(iter(texts(4)))
    with torch.no_grad():
        maps = [
            eager(net).eval()(batch["input_ids"], output_attentions=True).attentions
            for net in (llama(), llama(hidden_size=64))
        ]
    expected = torch.stack([attention_loss(s, t) for s, t in zip(*maps, strict=True)]).mean()
    assert value(fit, "attention_loss") == pytest.approx(expected.item(), rel=1e-4) and expected > 0


def test_models_without_attention_maps_say_how_to_ask_for_them(tmp_path):
    config = DistillConfig(attention="last")
    for student, teacher, who in ((llama(), eager(llama()), "student"), (eager(llama()), llama(), "teacher")):
        distillation = Distillation(config, teacher=teacher, student="model")
        with pytest.raises(ValueError, match=rf"the {who}'s 'model\.layers\.0'.*attn_implementation='eager'"):
            trainer(tmp_path, [distillation], max_steps=1).fit(AccelModule(student), texts())


def test_a_regression_and_a_token_classifier_are_distilled(tmp_path):
    class Regression(Plain):
        def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
            return F.mse_loss(self.model(batch[0]), batch[1].float().unsqueeze(-1))

    networks = [seeded(nn.Linear, 8, 1, seed=i) for i in range(2)]
    with torch.no_grad():
        x = data(8)[:][0]
        expected = F.mse_loss(networks[0](x), networks[1](x)).item()
    fit = trainer(tmp_path, [Distillation(DistillConfig(loss="mse"), teacher=networks[1])], max_steps=1)
    fit.fit(Regression(networks[0]), loader(8))
    assert value(fit, "teacher_loss") == pytest.approx(expected, rel=1e-5)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from transformers import BertConfig, BertForTokenClassification

    config = BertConfig(
        vocab_size=97, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4, num_labels=5
    )
    student, teacher = (seeded(BertForTokenClassification, config, seed=i).eval() for i in range(2))
    ids = tiny.ids(4)
    labels = ids % 5
    labels[:, 3:] = -100
    with torch.no_grad():
        logits = [net(ids).logits[:, :3] / 2 for net in (student, teacher)]
    kl = (logits[1].softmax(-1) * (logits[1].log_softmax(-1) - logits[0].log_softmax(-1))).sum(-1).mean()
    fit = trainer(tmp_path, [Distillation(teacher=teacher)], max_steps=1)
    batches = torch.utils.data.DataLoader([{"input_ids": ids, "labels": labels}], batch_size=None)
    fit.fit(AccelModule(student), batches)
    assert value(fit, "teacher_loss") == pytest.approx(4 * kl.item(), rel=1e-4)


def test_prompts_without_labels_are_no_part_of_a_causal_models_term(tmp_path):
    student, teacher, batch = llama(), llama(hidden_size=64), next(iter(texts()))
    batch["labels"][:, :6] = -100
    with torch.no_grad():  # positions 5 to 10 predict the labels 6 to 11
        inputs = {k: v for k, v in batch.items() if k != "labels"}
        logits = [net.eval()(**inputs).logits[:, 5:11] / 2 for net in (student, teacher)]
    kl = (logits[1].softmax(-1) * (logits[1].log_softmax(-1) - logits[0].log_softmax(-1))).sum(-1).mean()
    fit = trainer(tmp_path, [Distillation(teacher=teacher)], max_steps=1)
    fit.fit(AccelModule(student), torch.utils.data.DataLoader([batch], batch_size=None))
    assert value(fit, "teacher_loss") == pytest.approx(4 * kl.item(), rel=1e-4)


# --- weights over progress --------------------------------------------------------------------------------------------


class Counting(Perceptron):
    """Counts its calls, a list a step of the fit that is given."""

    def __init__(self) -> None:
        super().__init__()
        self.steps: list[int] = []
        self.fit: Any = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.fit is not None:
            self.steps.append(self.fit.global_step)
        return super().forward(x)


@pytest.mark.parametrize(
    ("config", "called"),
    [
        (DistillConfig(alpha=0.0), []),
        (DistillConfig(alpha=Constant(5)), [5, 6, 7]),
        (DistillConfig(alpha=Between(1.0, 0.0, Constant(0.5))), [0, 1, 2, 3]),
        (DistillConfig(alpha=0.0, hidden={"first": "first"}, hidden_weight=Linear(0.5, 1.0)), [5, 6, 7]),
        (DistillConfig(alpha=0.0, hidden={"first": "first"}, hidden_weight=0.0), []),
    ],
)
def test_the_teacher_is_not_called_while_its_weights_are_0(tmp_path, config, called):
    teacher, module = seeded(Counting, seed=3), seeded(Plain)
    fit = trainer(tmp_path, [Distillation(config, teacher=teacher, student="model")])
    teacher.fit = fit
    fit.fit(module, loader())
    assert teacher.steps == called
    if not called:
        alone = seeded(Plain)
        trainer(tmp_path).fit(alone, loader())
        assert_same(weights(module), weights(alone))
        assert set(fit.callback_metrics) == {"train_loss", "accel/distillation/task_loss"}


def test_a_schedule_past_the_end_of_training_raises(tmp_path):
    distillation = Distillation(DistillConfig(alpha=Linear(0, 500)), teacher=seeded(Perceptron, seed=3))
    with pytest.raises(ValueError, match=r"ends at optimizer step 500, past the end of training \(8 steps\)"):
        trainer(tmp_path, [distillation]).fit(seeded(Plain), loader())


# --- projections ------------------------------------------------------------------------------------------------------


def test_projections_are_trained_and_in_nobodys_state(tmp_path):
    class Watch(Callback):
        def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
            (weight,) = projections(trainer).values()
            assert any(weight is p for p in optimizer.param_groups[0]["params"]) and weight.grad.abs().sum() > 0
            assert not [p for p in ema._average_model.parameters() if 77 in p.shape]
            self.first = getattr(self, "first", weight.detach().clone())

    teacher, module, watch = seeded(Perceptron, 77, seed=3), seeded(Plain), Watch()
    keys, parameters = list(module.state_dict()), list(map(id, module.parameters()))
    export = Export(tmp_path / "model", module="model", engines=("portable",), measure=False)
    ema = EMAWeightAveraging(decay=0.9)
    fit = trainer(tmp_path, [Distillation(HIDDEN, teacher=teacher, student="model"), watch, export, ema])
    fit.fit(module, loader())
    (weight,) = projections(fit).values()
    assert weight.shape == (77, 16) and not torch.equal(weight, watch.first)
    assert list(module.state_dict()) == keys and list(map(id, module.parameters())) == parameters
    saved = torch.load(export.checkpoint, weights_only=True)
    assert list(saved["state_dict"]) == keys
    states = [s for s in saved["callbacks"].values() if s.get("technique") == "distillation"]
    assert torch.equal(states[0]["projections"]["second"], weight)
    from lightning_accel.artifact import load_weights

    exported = load_weights(tmp_path / "model" / "weights.safetensors").values()
    assert not [t for t in exported if 77 in t.shape]
    assert len(fit.optimizers[0].param_groups[0]["params"]) == len(parameters) + 1


def test_projections_begin_alike_whatever_the_random_state(tmp_path):
    found = []
    for seed in (1, 2):
        config = DistillConfig(alpha=0.0, hidden={"second": "first"}, hidden_weight=1e-30)
        fit = trainer(tmp_path, [Distillation(config, teacher=seeded(Perceptron, 24), student="model")], max_steps=1)
        module = seeded(Plain, seed=seed, optimizer="sgd", lr=0.0)
        torch.manual_seed(seed)
        fit.fit(module, loader(8))
        found.append(projections(fit)["second"].detach().clone())
    assert torch.equal(*found) and found[0].std().item() == pytest.approx(16**-0.5, rel=0.2)


def test_equal_widths_need_no_projection(tmp_path):
    fit = trainer(tmp_path, [Distillation(HIDDEN, teacher=seeded(Perceptron, 16, seed=3), student="model")])
    fit.fit(seeded(Plain), loader())
    assert projections(fit) == {} and value(fit, "hidden_loss") > 0


@pytest.mark.parametrize("precision", ["bf16-true", "bf16-mixed", "64-true"])
def test_projections_are_float32_beside_a_student_of_another_precision(tmp_path, precision):
    distillation = Distillation(HIDDEN, teacher=seeded(Perceptron, 24, seed=3), student="model")
    fit = trainer(tmp_path, [distillation], precision=precision, max_steps=3)
    fit.fit(seeded(Plain), loader())
    assert projections(fit)["second"].dtype == torch.float32 and 0 < value(fit, "hidden_loss") < 10


def resumable(path: Any, seed: int, config: DistillConfig, resume: str | None = None) -> tuple[Any, Any]:
    teacher = seeded(Perceptron, 24, dropout=0.3, seed=5)
    keep = ModelCheckpoint(path, "{epoch}", save_top_k=-1)
    module = seeded(Plain, Perceptron(dropout=0.2), seed=seed)
    fit = trainer(path, [Distillation(config, teacher=teacher, student="model"), keep], max_epochs=3)
    torch.manual_seed(seed)
    fit.fit(module, loader(shuffle=True), ckpt_path=resume)
    assert fit.global_step == 12
    return module, fit


@pytest.mark.parametrize("begin", [0, 6])
def test_a_fit_with_projections_resumes_bitwise_before_and_after_they_are_made(tmp_path, begin):
    config = DistillConfig(hidden={"second": "first"}, hidden_weight=Between(0.0, 2.0, Constant(begin)))
    module, fit = resumable(tmp_path / "whole", 0, config)
    expected, projected = weights(module), projections(fit)["second"].detach()
    for epoch in (0, 1):
        resumed, again = resumable(tmp_path / "again", 9, config, str(tmp_path / "whole" / f"epoch={epoch}.ckpt"))
        assert_same(weights(resumed), expected)
        assert torch.equal(projections(again)["second"].detach(), projected)


def test_feature_maps_are_compared_channel_by_channel(tmp_path):
    class Images(Plain):
        def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
            return F.cross_entropy(self.model(batch[0]), batch[1])

    def net(width: int) -> nn.Module:
        return nn.Sequential(nn.Conv2d(1, width, 3), nn.ReLU(), nn.Flatten(), nn.Linear(36 * width, 3))

    config = DistillConfig(hidden={"0": "0"}, hidden_loss="mse")
    x = torch.utils.data.TensorDataset(torch.randn(8, 1, 8, 8), torch.arange(8) % 3)
    fit = trainer(tmp_path, [Distillation(config, teacher=net(5), student="model")])
    fit.fit(Images(net(4)), torch.utils.data.DataLoader(x, batch_size=4))
    assert projections(fit)["0"].shape == (5, 4) and value(fit, "hidden_loss") > 0


# --- hooks ------------------------------------------------------------------------------------------------------------


def test_layers_stay_hooked_through_configure_model_pruning_and_quantization(tmp_path):
    class Late(Plain):
        def __init__(self) -> None:
            super().__init__()
            self.model = None

        def configure_model(self) -> None:
            if self.model is None:
                self.model = seeded(Perceptron)

    class Each(Callback):
        def __init__(self) -> None:
            self.seen: list[float] = []

        def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
            self.seen.append(value(trainer, "hidden_loss"))

    each, qat = Each(), QuantizationAwareTraining(begin=4, module="model")
    pruning = Pruning(PruneConfig("neurons", amount=0.5), Constant(2), module="model")
    teacher = seeded(Perceptron, 24, seed=3)
    module = Late()
    trainer(tmp_path, [qat, Distillation(HIDDEN, teacher=teacher, student="model"), pruning, each]).fit(
        module, loader()
    )
    assert qat.prepared and len(each.seen) == 8 and len(set(each.seen)) == 8
    assert not any(m._forward_hooks or m._forward_pre_hooks for net in (module, teacher) for m in net.modules())


def test_a_module_that_another_library_puts_in_its_place_is_hooked_again(tmp_path):
    class Swap(Callback):
        def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, index: int) -> None:
            if trainer.global_step == 3:
                pl_module.model.second = copy.deepcopy(pl_module.model.second)
                for hooks in (pl_module.model.second._forward_hooks, pl_module.model._forward_hooks):
                    hooks.clear()
                pl_module.model = copy.copy(pl_module.model)

    fit = trainer(tmp_path, [Distillation(HIDDEN, teacher=seeded(Perceptron, 24, seed=3), student="model"), Swap()])
    module = seeded(Plain)
    fit.fit(module, loader())
    assert fit.global_step == 8
    assert not any(m._forward_hooks for m in module.modules())


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_gives_the_same_weights_or_says_what_to_write(tmp_path, reentrant):
    def fitted(checkpointing: bool) -> dict[str, torch.Tensor]:
        student = llama()
        if checkpointing:
            student.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
        config = DistillConfig(hidden={"model.layers.0.mlp": "model.layers.0.mlp"})
        module = AccelModule(student)
        teacher = llama(hidden_size=64)
        trainer(tmp_path, [Distillation(config, teacher=teacher, student="model")]).fit(module, texts())
        return weights(module)

    if reentrant:
        with pytest.raises(
            ValueError, match=r"model\.layers\.0\.mlp' gave a state without gradients.*use_reentrant=False"
        ):
            fitted(True)
    else:
        assert_same(fitted(True), fitted(False))


# --- what cannot be compared ------------------------------------------------------------------------------------------


class Unused(Perceptron):
    def __init__(self) -> None:
        super().__init__()
        self.unused = nn.Linear(1, 1)
        self.frozen = nn.Linear(8, 16).requires_grad_(False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) + 0 * self.frozen(x).sum()


@pytest.mark.parametrize(
    ("pairs", "message"),
    [
        ({"secnd": "first"}, "the student, a Unused, has no module 'secnd'; names are relative to it"),
        ({"second": "fourth"}, "the teacher, a Unused, has no module 'fourth'"),
        ({"unused": "first"}, "the student's 'unused' gave no hidden state in training_step: it was not called"),
        ({"first": "unused"}, "the teacher's 'unused', of a Unused, gave no hidden state"),
        ({"frozen": "first"}, "the student's 'frozen' gave a state without gradients: it is frozen"),
    ],
)
def test_layers_that_give_nothing_are_named(tmp_path, pairs, message):
    distillation = Distillation(DistillConfig(hidden=pairs), teacher=seeded(Unused, seed=3), student="model")
    with pytest.raises(ValueError, match=message):
        trainer(tmp_path, [distillation]).fit(seeded(Plain, seeded(Unused)), loader())


def test_layers_that_share_weights_are_ambiguous(tmp_path):
    class Shared(Perceptron):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = self.second(self.first(x).relu()).relu()
            return self.head(self.second(x).relu())

    distillation = Distillation(HIDDEN, teacher=seeded(Perceptron, seed=3), student="model")
    with pytest.raises(ValueError, match=r"'second' was called 2 times in 1 call\(s\) of the student"):
        trainer(tmp_path, [distillation]).fit(seeded(Plain, seeded(Shared)), loader())
    config = DistillConfig(hidden={"second": "second"})
    distillation = Distillation(config, teacher=seeded(Shared, seed=3), student="model")
    with pytest.raises(ValueError, match=r"the teacher's 'second', of a Shared, was called 2 times"):
        trainer(tmp_path, [distillation]).fit(seeded(Plain), loader())


def test_ids_outside_the_teachers_vocabulary_offer_sequence_level_distillation(tmp_path):
    distillation = Distillation(teacher=llama(vocab_size=20), student="model")
    sizes = r"\(the teacher's has 20 ids, the student's has 64 ids\)"
    with pytest.raises(ValueError, match=rf"{sizes} distil sequences: .*pseudo_labels"):
        trainer(tmp_path, [distillation]).fit(AccelModule(llama()), texts())


def test_a_teacher_whose_logits_are_not_finite_stops_the_fit(tmp_path):
    teacher = seeded(Perceptron, seed=3)
    teacher.head.bias.data[1] = torch.nan
    with pytest.raises(ValueError, match=r"teacher's logits are not finite: 8 NaN, 0 \+inf of 24"):
        trainer(tmp_path, [Distillation(teacher=teacher)]).fit(seeded(Plain), loader())


def test_a_mask_that_is_given_by_position_counts_as_one_by_name(tmp_path):
    class Positional(AccelModule):
        def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
            logits = self.model(batch["input_ids"], batch["attention_mask"]).logits
            return F.cross_entropy(logits.flatten(0, 1), batch["labels"].flatten())

    def terms(module: Any) -> list[float]:
        distillation = Distillation(DistillConfig(hidden="last"), teacher=llama(num_hidden_layers=3), student="model")
        fit = trainer(tmp_path, [distillation], max_steps=1)
        fit.fit(module(llama(), causal=True), torch.utils.data.DataLoader([batch], batch_size=None))
        return [value(fit, name) for name in ("teacher_loss", "hidden_loss")]

    batch = next(iter(texts()))
    batch["attention_mask"][:, 8:] = 0
    assert terms(Positional) == pytest.approx(terms(AccelModule), rel=1e-6)


class Segments(nn.Module):
    """Classes of pixels, [batch, classes, height, width] as torch.nn.functional.cross_entropy takes them."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.first, self.last = nn.Conv2d(3, width, 3, padding=1), nn.Conv2d(width, 5, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(self.first(x).relu())


@pytest.mark.parametrize("top_k", [None, 2])
def test_classes_of_pixels_are_softened_over_the_classes(tmp_path, top_k):
    student, teacher = seeded(Segments, 4), seeded(Segments, 8, seed=3)
    images, classes = torch.randn(4, 3, 6, 7), torch.randint(5, (4, 6, 7))
    classes[:, :2] = -100
    data = Keyed(list(zip(images, classes, strict=True)))
    config = DistillConfig(temperature=1.0, top_k=top_k)
    with torch.no_grad():
        log_p, log_q = (net(images).log_softmax(1)[:, :, 2:].movedim(1, -1) for net in (student, teacher))
    if top_k:  # the two likeliest classes, and the others as one
        kept = log_q.topk(2).indices
        log_p, log_q = (
            torch.cat((x.gather(-1, kept), (1 - x.exp().gather(-1, kept).sum(-1, keepdim=True)).log()), -1)
            for x in (log_p, log_q)
        )
    expected = (log_q.exp() * (log_q - log_p)).sum(-1).mean()
    given = [teacher]
    if top_k:
        given.append(TeacherCache.build(tmp_path / "cache", teacher, data, config, progress=False))
    for source in given:
        fit = trainer(tmp_path, [Distillation(config, teacher=source, student="model")], max_steps=1)
        fit.fit(Plain(copy.deepcopy(student)), torch.utils.data.DataLoader(data, batch_size=4))
        assert value(fit, "teacher_loss") == pytest.approx(expected.item(), rel=1e-4)


def test_an_unnamed_student_that_is_the_module_itself_is_as_causal_as_its_network(tmp_path):
    class Forward(AccelModule):
        def forward(self, **inputs: Any) -> Any:
            return self.model(**inputs).logits

        def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
            labels = batch.pop("labels")
            logits = self(**batch)
            batch["labels"] = labels
            return F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())

    def term(**options: Any) -> float:
        fit = trainer(tmp_path, [Distillation(teacher=llama(hidden_size=64), **options)], max_steps=1)
        fit.fit(Forward(llama()), torch.utils.data.DataLoader([batch], batch_size=None))
        return value(fit, "teacher_loss")

    batch = next(iter(texts()))
    batch["labels"][:, :6] = -100
    assert term() == pytest.approx(term(student="model"), rel=1e-6)


def test_calls_without_gradients_are_no_part_of_any_term(tmp_path):
    class Looks(Plain):
        def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
            with torch.no_grad():
                self.model(batch[0] + 1)
            loss = super().training_step(batch, batch_idx)
            with torch.no_grad():
                self.model(batch[0] + 2)
            return loss

    def fitted(module: Any) -> dict[str, torch.Tensor]:
        teacher = seeded(Perceptron, 24, seed=3)
        trainer(tmp_path, [Distillation(HIDDEN, teacher=teacher, student="model")]).fit(module, loader())
        return weights(module)

    assert_same(fitted(seeded(Looks)), fitted(seeded(Plain)))


def test_attention_maps_need_gradients_and_a_finite_teacher(tmp_path):
    student, teacher = eager(llama()), eager(llama(hidden_size=64))
    student.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": True})
    config = DistillConfig(attention="last")
    with pytest.raises(ValueError, match=r"gave an attention map without gradients.*use_reentrant=False"):
        trainer(tmp_path, [Distillation(config, teacher=teacher, student="model")]).fit(AccelModule(student), texts())
    maps = torch.full((1, 2, 3, 3), torch.nan)
    with pytest.raises(ValueError, match="the teacher's attention maps are not finite"):
        attention_loss(torch.ones(1, 2, 3, 3), maps)
    counted = torch.tensor([[True, True, False]])
    maps[:, :, :2] = 1.0
    assert attention_loss(torch.ones(1, 2, 3, 3), maps, counted) == 0.0


@pytest.mark.parametrize("who", ["student", "teacher"])
def test_a_compiled_model_that_was_called_before_says_how_to_hook_it(tmp_path, who):
    models = {"student": seeded(Perceptron), "teacher": seeded(Perceptron, 24, seed=3)}
    compiled = torch.compile(models[who], backend="eager")
    with torch.set_grad_enabled(who == "student"):
        compiled.train(who == "student")(data(8)[:][0])
    models[who] = compiled
    distillation = Distillation(HIDDEN, teacher=models["teacher"], student="model")
    try:
        trainer(tmp_path, [distillation]).fit(Plain(models["student"]), loader())
    except ValueError as error:
        assert "call torch.compiler.reset() first" in str(error)
        torch.compiler.reset()
        trainer(tmp_path, [distillation]).fit(Plain(models["student"]), loader())
    else:
        pytest.fail("torch.compile has taken the hooks; the message can go")


# --- where labels and padding are found -------------------------------------------------------------------------------


def kl(student: torch.Tensor, teacher: torch.Tensor, counted: torch.Tensor) -> float:
    """At temperature 2, over the positions that count."""
    log_p, log_q = (logits.double().div(2).log_softmax(-1)[counted] for logits in (student, teacher))
    return 4 * float((log_q.exp() * (log_q - log_p)).sum(-1).mean())


class Answers(AccelModule):
    """A causal language model's own step; labels are taken out of the batch."""

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        labels = batch.pop("labels")
        output = self.model(**batch)
        logits = getattr(output, "logits", output)
        return F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())


class Wrapped(nn.Module):
    """A transformers model in a module of one's own."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = llama()

    def forward(self, **inputs: Any) -> torch.Tensor:
        return self.inner(**inputs).logits


@pytest.mark.parametrize("student", [llama, Wrapped])
def test_labels_are_known_that_training_step_takes_out_and_shifted_for_a_causal_model_inside(tmp_path, student):
    batch, teacher = next(iter(texts())), llama(hidden_size=64)
    batch["labels"][:, :6] = -100
    inputs = {k: v for k, v in batch.items() if k != "labels"}
    counted = torch.zeros_like(batch["labels"], dtype=torch.bool)
    counted[:, 5:11] = True  # these predict the labels 6 to 11
    with torch.no_grad():
        expected = kl(llama().eval()(**inputs).logits, teacher.eval()(**inputs).logits, counted)
    fit = trainer(tmp_path, [Distillation(teacher=teacher, student="model")], max_steps=1)
    fit.fit(Answers(student()), torch.utils.data.DataLoader([batch], batch_size=None))
    assert value(fit, "teacher_loss") == pytest.approx(expected, rel=1e-4)


def test_labels_at_the_end_of_a_tuple_and_a_mask_of_another_name(tmp_path):
    class Tokens(Plain):
        def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
            ids, mask, labels = batch
            return F.cross_entropy(self.model(ids, attention_mask=mask).logits.flatten(0, 1), labels.flatten())

    class Named(Plain):
        def forward(self, ids: torch.Tensor, seen: torch.Tensor) -> Any:
            return self.model(input_ids=ids, attention_mask=seen)

        def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
            return self(batch["input_ids"], batch["attention_mask"]).logits.square().mean()

    student, teacher = tiny.bert(), tiny.bert(seed=3)
    from transformers import BertForTokenClassification

    student, teacher = (seeded(BertForTokenClassification, student.config, seed=i).eval() for i in range(2))
    ids = tiny.ids(4)
    mask, labels = torch.ones_like(ids), ids % 2
    labels[:, :6] = -100
    with torch.no_grad():
        expected = kl(student(ids).logits, teacher(ids).logits, labels != -100)
    fit = trainer(tmp_path, [Distillation(teacher=teacher, student="model")], max_steps=1)
    fit.fit(Tokens(copy.deepcopy(student)), torch.utils.data.DataLoader([(ids, mask, labels)], batch_size=None))
    assert value(fit, "teacher_loss") == pytest.approx(expected, rel=1e-4)

    mask[:, 6:] = 0
    with torch.no_grad():
        expected = kl(student(ids, attention_mask=mask).logits, teacher(ids, attention_mask=mask).logits, mask.bool())
    whole = Named(teacher)
    fit = trainer(tmp_path, [Distillation(teacher=whole)], max_steps=1)
    batch = {"input_ids": ids, "attention_mask": mask}
    fit.fit(Named(copy.deepcopy(student)), torch.utils.data.DataLoader([batch], batch_size=None))
    assert value(fit, "teacher_loss") == pytest.approx(expected, rel=1e-4)


def test_classes_of_pixels_at_another_resolution_than_the_labels_are_the_second_dimension(tmp_path):
    class Coarse(Plain):
        def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
            return F.cross_entropy(F.interpolate(self.model(batch[0]), scale_factor=2), batch[1])

    student, teacher = seeded(Segments, 4), seeded(Segments, 8, seed=3)
    images, classes = torch.randn(4, 3, 6, 7), torch.randint(5, (4, 12, 14))
    with torch.no_grad():
        logits = [net(images).movedim(1, -1) for net in (student, teacher)]
    expected = kl(*logits, torch.ones(4, 6, 7, dtype=torch.bool))
    fit = trainer(tmp_path, [Distillation(teacher=teacher, student="model")], max_steps=1)
    fit.fit(Coarse(student), torch.utils.data.DataLoader([(images, classes)], batch_size=None))
    assert value(fit, "teacher_loss") == pytest.approx(expected, rel=1e-4)


def test_one_number_a_sample_is_a_regression(tmp_path):
    class Squeezed(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x).squeeze(-1)

    class Regression(Plain):
        def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
            return F.mse_loss(self.model(batch[0]), batch[1].float())

    student, teacher = (seeded(Squeezed, 8, 1, seed=i) for i in range(2))
    with torch.no_grad():
        x = data(8)[:][0]
        expected = F.mse_loss(student(x), teacher(x)).item()
    fit = trainer(tmp_path, [Distillation(DistillConfig(loss="mse"), teacher=teacher, student="model")], max_steps=1)
    fit.fit(Regression(student), loader(8))
    assert value(fit, "teacher_loss") == pytest.approx(expected, rel=1e-5)


def test_states_of_a_one_dimensional_convolution_are_compared_channel_by_channel(tmp_path):
    class Sound(nn.Module):
        def __init__(self, channels: int) -> None:
            super().__init__()
            self.first, self.head = nn.Conv1d(1, channels, 3), nn.Linear(channels, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.head(self.first(x.unsqueeze(1)).relu().mean(-1))

    student, teacher = seeded(Sound, 6), seeded(Sound, 6, seed=3)
    with torch.no_grad():
        x = data(8)[:][0].unsqueeze(1)
        expected = 1 - torch.cosine_similarity(student.first(x), teacher.first(x), 1).mean().item()
    config = DistillConfig(alpha=0.0, hidden={"first": "first"})
    fit = trainer(tmp_path, [Distillation(config, teacher=teacher, student="model")], max_steps=1)
    fit.fit(Plain(student), loader(8))
    assert value(fit, "hidden_loss") == pytest.approx(expected, rel=1e-5)


# --- what is written over ---------------------------------------------------------------------------------------------


def between(inplace: bool) -> nn.Sequential:
    return seeded(lambda: nn.Sequential(nn.Linear(8, 8), nn.ReLU(inplace=inplace), nn.Linear(8, 3)))


class Shifts(nn.Module):
    """Writes over its input."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = between(False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner(x.sub_(3.0))


class Divides(Plain):
    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        logits = self.model(batch[0])
        logits /= 0.5
        return F.cross_entropy(logits, batch[1])


STATE = DistillConfig(alpha=0.0, hidden={"0": "0"})


@pytest.mark.parametrize(
    ("module", "student", "teacher", "config", "message"),
    [
        (Plain, between(True), between(False), STATE, "'0' puts out is changed in place.*inplace=False"),
        (Plain, between(False), between(True), STATE, "'0' puts out is changed in place.*inplace=False"),
        (Divides, between(False), between(False), None, r"logits in place; write logits = logits / 2, not logits /= 2"),
        (Plain, Shifts(), between(False), None, "the student, a Shifts, changes its inputs in place"),
        (Plain, between(False), Shifts(), None, "the teacher, a Shifts, changes its inputs in place"),
    ],
    ids=["student's state", "teacher's state", "logits", "student's inputs", "teacher's inputs"],
)
def test_what_is_written_over_before_it_is_compared_is_named(tmp_path, module, student, teacher, config, message):
    distillation = Distillation(config, teacher=copy.deepcopy(teacher), student="model")
    with pytest.raises(ValueError, match=message):
        trainer(tmp_path, [distillation]).fit(module(copy.deepcopy(student)), loader())


@pytest.mark.parametrize("config", [HIDDEN, DistillConfig(alpha=Between(0.9, 0.1))], ids=["projections", "schedule"])
def test_a_learning_rate_is_found_beside_a_teacher(tmp_path, config):
    from lightning.pytorch.tuner import Tuner

    module = seeded(Plain)
    fit = trainer(tmp_path, [Distillation(config, teacher=seeded(Perceptron, 24, seed=3), student="model")])
    before = weights(module)
    assert Tuner(fit).lr_find(module, loader(), num_training=6, update_attr=False) is not None
    assert_same(weights(module), before)
    fit.fit(module, loader())
    assert fit.global_step == 8
