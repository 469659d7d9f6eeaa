"""Teachers in every form, and what remains of them after a fit: nothing (contract 9)."""

from __future__ import annotations

import copy
import gc
import warnings
import weakref
from typing import Any

import pytest
import tiny
import torch
from helpers import Perceptron, Plain, assert_same, data, llama, loader, seeded, texts, trainer, weights
from lightning.pytorch.callbacks import Callback, EMAWeightAveraging, ModelCheckpoint
from test_distill_student import whisper
from torch import Tensor, nn

from lightning_accel import (
    AccelModule,
    Constant,
    Cubic,
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
    pseudo_labels,
    select,
    student_from,
)
from lightning_accel.artifact import load_weights
from lightning_accel.distill import LiveTeacher, guest, logits_of
from lightning_accel.quantize import unprepare_


def fitted(path: Any, teacher: Any, config: DistillConfig | None = None, module: Any = None, **options: Any) -> Any:
    """Weights after a fit with a teacher, and the trainer."""
    module = module if module is not None else seeded(Plain)
    distillation = Distillation(config, teacher=teacher, student="model", **options)
    fit = trainer(path, [distillation])
    fit.fit(module, loader())
    return weights(module), fit


class Lit(Plain):
    """A LightningModule without a forward of its own, and hyper-parameters that its checkpoint holds."""

    def __init__(self, hidden: int = 24) -> None:
        super().__init__(Perceptron(hidden))
        self.save_hyperparameters()


# --- forms ------------------------------------------------------------------------------------------------------------


def test_every_form_of_the_same_teacher_trains_the_same_weights(tmp_path):
    lit = seeded(Lit, seed=3)
    saver = trainer(tmp_path, [ModelCheckpoint(tmp_path)], max_epochs=1)
    saver.fit(lit, loader())
    saver.save_checkpoint(tmp_path / "teacher.ckpt")
    expected, _ = fitted(tmp_path, lit.model)
    assert_same(fitted(tmp_path, lit)[0], expected)
    assert_same(fitted(tmp_path, str(tmp_path / "teacher.ckpt"), teacher_class=Lit)[0], expected)
    compiled = torch.compile(lit.model, backend="eager")
    assert_same(fitted(tmp_path, compiled)[0], expected)


@pytest.mark.filterwarnings("ignore")
def test_hidden_states_of_a_compiled_teacher_are_those_of_the_plain_one(tmp_path):
    torch.compiler.reset()
    config = DistillConfig(hidden={"second": "first"}, hidden_loss="mse")
    teacher = seeded(Perceptron, 24, seed=3)
    expected, _ = fitted(tmp_path, teacher, config)
    assert_same(fitted(tmp_path, torch.compile(teacher, backend="eager"), config)[0], expected)


def test_an_artifact_teaches_what_its_model_teaches(tmp_path):
    teacher = seeded(Perceptron, 24, seed=3).eval()
    export_model(teacher, tmp_path / "artifact", example_inputs=(data(4)[:][0],), engines=("portable",), measure=False)
    expected, _ = fitted(tmp_path, teacher)
    for form in (str(tmp_path / "artifact"), load(tmp_path / "artifact")):
        found, _ = fitted(tmp_path, form)
        assert all(torch.allclose(found[name], expected[name], atol=1e-6) for name in expected)
    with pytest.raises(ValueError, match=r"an artifact, .*, which has no modules to take \['first'\] from"):
        fitted(tmp_path, load(tmp_path / "artifact"), DistillConfig(hidden={"first": "first"}))
    with pytest.raises(ValueError, match=r"which has no modules to take \['uniform'\] from"):
        fitted(tmp_path, load(tmp_path / "artifact"), DistillConfig(hidden="uniform"))


def test_an_artifact_of_a_causal_model_teaches_on_padded_batches(tmp_path, decoder):
    batch = {"input_ids": tiny.ids(4), "attention_mask": torch.ones(4, 10, dtype=torch.long)}
    batch["attention_mask"][:, 7:] = 0
    batch["labels"] = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    student = tiny.llama(seed=1)
    with torch.no_grad():
        inputs = batch["input_ids"], batch["attention_mask"]
        expected = distillation_loss(student(*inputs).logits[:, :6], load(decoder)(*inputs)[:, :6], 2.0)
    fit = trainer(tmp_path, [Distillation(teacher=str(decoder), student="model")], max_steps=1)
    fit.fit(AccelModule(student), torch.utils.data.DataLoader([batch], batch_size=None))
    assert float(fit.callback_metrics["accel/distillation/teacher_loss"]) == pytest.approx(expected.item(), rel=1e-4)


def test_a_folder_of_a_transformers_model_is_loaded_with_the_maps_that_are_asked_for(tmp_path):
    teacher = llama(hidden_size=64)
    teacher.save_pretrained(tmp_path / "teacher")
    student = llama()
    student.set_attn_implementation("eager")
    config = DistillConfig(attention="last", hidden="last")
    fit = trainer(tmp_path, [Distillation(config, teacher=str(tmp_path / "teacher"), student="model")], max_steps=1)
    fit.fit(AccelModule(student), texts())
    with torch.no_grad():
        ids = next(iter(texts()))["input_ids"]
        logits = llama()(ids).logits[:, :-1], teacher.eval()(ids).logits[:, :-1]
    found = fit.callback_metrics
    assert float(found["accel/distillation/teacher_loss"]) == pytest.approx(
        distillation_loss(*logits, 2.0).item(), rel=1e-4
    )
    assert found["accel/distillation/attention_loss"] > 0 and found["accel/distillation/hidden_loss"] > 0


@pytest.mark.parametrize("where", ["nowhere/at/all", "empty"])
def test_a_teacher_that_is_not_there_says_what_there_may_be(tmp_path, monkeypatch, where):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"a module, the folder or name of a transformers model, the folder of an art"):
        fitted(tmp_path, str(tmp_path / where))


def test_a_checkpoint_without_its_class_or_its_arguments_says_what_to_write(tmp_path):
    module = seeded(Plain)
    saver = trainer(tmp_path, max_epochs=1)
    saver.fit(AccelModule(module.model), loader())
    path = str(tmp_path / "teacher.ckpt")
    saver.save_checkpoint(path)
    with pytest.raises(ValueError, match=r"does not say of which class.*teacher_class=MyLightningModule"):
        fitted(tmp_path, path)
    with pytest.raises(ValueError, match=r"AccelModule needs arguments .*teacher = AccelModule\(\.\.\.\)"):
        fitted(tmp_path, path, teacher_class=AccelModule)


def test_a_lightning_module_with_several_networks_asks_which(tmp_path):
    class Two(Plain):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.other = self.model, Perceptron()
            del self.model

    with pytest.raises(ValueError, match=r"has no forward\(\), and its network is one of \['one', 'other'\]; write"):
        fitted(tmp_path, seeded(Two))


# --- its own former self ----------------------------------------------------------------------------------------------


def with_self(path: Any, order: int = 0, seed: int = 0, resume: str | None = None, epochs: int = 3) -> Any:
    """A fit that prunes from step 3 and quantizes from step 6 on, and learns from itself as it was before both."""
    found = [
        Distillation(DistillConfig(hidden={"second": "second"}), teacher="self", student="model"),
        Pruning(PruneConfig("unstructured", amount=0.5), Constant(3), module="model", every=1),
        QuantizationAwareTraining(QuantConfig("int8"), begin=6, module="model"),
    ]
    found = found[order:] + found[:order]
    module = seeded(Plain, seeded(Perceptron, dropout=0.1), seed=seed)
    torch.manual_seed(seed)
    fit = trainer(path, [*found, ModelCheckpoint(path, "{epoch}", save_top_k=-1), Keep()], max_epochs=epochs)
    fit.fit(module, loader(shuffle=True), ckpt_path=resume)
    return module, fit


class Keep(Callback):
    """The weights before each step, and whether a teacher was there in it."""

    def __init__(self) -> None:
        self.before: list[dict[str, torch.Tensor]] = []
        self.taught: list[bool] = []

    def on_train_batch_start(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        self.before.append(weights(pl_module.model))

    def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
        self.taught.append("accel/distillation/teacher_loss" in trainer.callback_metrics)


def distillation_of(fit: Any) -> Distillation:
    return next(c for c in fit.callbacks if isinstance(c, Distillation))


def test_self_is_the_student_as_it_was_before_its_first_mask(tmp_path):
    _, fit = with_self(tmp_path)
    keep = next(c for c in fit.callbacks if isinstance(c, Keep))
    assert keep.taught == [False] * 2 + [True] * 10  # masks come with the end of the step that makes it 3
    former = distillation_of(fit)._former
    assert_same(dict(former), keep.before[2])
    assert not any((t == 0).float().mean() > 0.1 for t in former.values())


def test_self_does_not_depend_on_the_order_of_the_callbacks(tmp_path):
    expected = weights(with_self(tmp_path / "0")[0])
    for order in (1, 2):
        assert_same(weights(with_self(tmp_path / str(order), order)[0]), expected)


def test_self_resumes_bitwise_before_and_after_it_was_kept(tmp_path):
    module, fit = with_self(tmp_path / "whole", epochs=4)
    for epoch in (0, 1, 2):
        again, resumed = with_self(tmp_path / "again", 0, 9, str(tmp_path / "whole" / f"epoch={epoch}.ckpt"), epochs=4)
        assert_same(weights(again), weights(module))
        assert_same(dict(distillation_of(resumed)._former), dict(distillation_of(fit)._former))


def test_self_with_quantization_alone_is_the_float_student(tmp_path):
    class Ask(Callback):
        def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
            if trainer.global_step == 6:
                live = distillation_of(trainer)._live
                plain = copy.deepcopy(unprepare_(copy.deepcopy(pl_module.model)))
                plain.load_state_dict(live.model.state_dict())
                x = data(8)[:][0]
                self.same = torch.equal(live((x,), {}).logits, plain.eval()(x))
                self.types = {type(m).__name__ for m in live.model.modules()}
                self.hooks = sum(len(m._forward_hooks) for m in live.model.modules())

    ask = Ask()
    qat = QuantizationAwareTraining(begin=4, module="model")
    fit = trainer(tmp_path, [qat, Distillation(teacher="self", student="model"), ask])
    fit.fit(seeded(Plain), loader())
    assert ask.same and ask.types == {"Perceptron", "Linear", "Dropout"} and ask.hooks == 0


def test_self_keeps_what_the_students_own_hooks_make(tmp_path):
    module = seeded(Plain)
    module.model.second = nn.utils.weight_norm(module.model.second)
    module.model.first.register_forward_hook(lambda layer, args, output: output * 2)
    qat = QuantizationAwareTraining(begin=2, module="model")
    answers = Answers()
    trainer(tmp_path, [answers, qat, Distillation(teacher="self", student="model")]).fit(module, loader())
    before, asked = answers.found
    assert torch.equal(before, asked)


class Answers(Callback):
    """What the student puts out before quantization begins, and what its former self does."""

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if trainer.global_step == 2:
            plain = select.copy_model(pl_module.model).eval()
            with torch.no_grad():
                self.found = [plain(batch[0])]

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if trainer.global_step == 3:
            self.found.append(distillation_of(trainer)._live((batch[0],), {}).logits)


def test_self_and_projections_are_not_resumed_with_another_config(tmp_path):
    with_self(tmp_path / "whole", epochs=4)
    changed = Distillation(DistillConfig(alpha=0.3), teacher="self", student="model")
    qat = QuantizationAwareTraining(begin=6, module="model")
    fit = trainer(tmp_path, [changed, qat], max_epochs=5)
    with pytest.raises(ValueError, match=r"holds the student as it was before, of Distillation\(.*alpha=0\.5"):
        fit.fit(seeded(Plain), loader(), ckpt_path=str(tmp_path / "whole" / "epoch=2.ckpt"))


def test_self_needs_something_that_begins_and_a_name(tmp_path):
    with pytest.raises(ValueError, match="neither is in this fit; add Pruning or QuantizationAwareTraining"):
        fitted(tmp_path, "self")


# --- elsewhere ------------------------------------------------------------------------------------------------------


def test_inputs_go_to_the_device_on_which_the_teacher_lies():
    live = LiveTeacher(seeded(Perceptron).to("meta"))
    assert live((data(4)[:][0],), {}).logits.device.type == "meta"


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_teacher_on_a_gpu_stays_there_beside_a_student_on_the_cpu(tmp_path):
    teacher = seeded(Perceptron, 24, seed=3)
    expected, _ = fitted(tmp_path, teacher)
    found, _ = fitted(tmp_path, copy.deepcopy(teacher).cuda())
    assert all(torch.allclose(found[name], expected[name], atol=1e-4) for name in expected)


# --- a guest ----------------------------------------------------------------------------------------------------------


class Normalized(Perceptron):
    """With dropout and batch normalization, in train mode."""

    def __init__(self) -> None:
        super().__init__(77, dropout=0.5)
        self.norm = nn.BatchNorm1d(3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm(super().forward(x))


def test_a_guest_is_in_eval_mode_without_gradients_and_leaves_as_it_came() -> None:
    teacher = nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5), nn.BatchNorm1d(4)).train()
    teacher[1].eval()
    before, running = [m.training for m in teacher.modules()], teacher[2].running_mean.clone()
    x: Tensor = torch.randn(3, 4, requires_grad=True)
    with guest(teacher) as inside:
        assert not any(m.training for m in inside.modules())
        y = inside(x)
    assert not y.requires_grad and torch.equal(teacher[2].running_mean, running)
    assert [m.training for m in teacher.modules()] == before and torch.is_grad_enabled()
    with pytest.raises(RuntimeError), guest(teacher):
        raise RuntimeError
    assert [m.training for m in teacher.modules()] == before


def test_logits_are_found_in_what_models_put_out() -> None:
    logits, model = torch.randn(2, 3), tiny.bert()
    assert logits_of(logits) is logits and logits_of({"logits": logits, "loss": None}) is logits
    output = model(tiny.ids())
    assert logits_of(output) is output.logits
    for other in (None, torch.tensor([1, 2]), torch.randn(3), {"loss": logits}, (logits,), torch.zeros(2, 2).long()):
        assert logits_of(other) is None


CONFIG = DistillConfig(hidden={"second": "first"})


def test_a_teacher_that_is_put_into_train_mode_before_every_step_answers_the_same(tmp_path):
    class Trains(Callback):
        def on_train_batch_start(self, *_: Any) -> None:
            teacher.train()

    teacher = seeded(Normalized, seed=3)
    running = {name: t.clone() for name, t in teacher.state_dict().items()}
    calm, _ = fitted(tmp_path, copy.deepcopy(teacher).eval(), CONFIG)
    module = seeded(Plain)
    trainer(tmp_path, [Trains(), Distillation(CONFIG, teacher=teacher, student="model")]).fit(module, loader())
    assert_same(weights(module), calm)
    assert_same(weights(teacher), running)
    assert int(teacher.norm.num_batches_tracked) == 0


def test_the_teacher_is_in_no_count_copy_state_or_gradient(tmp_path):
    class Looks(Callback):
        def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
            theirs = {id(p) for p in teacher.parameters()}
            assert not theirs & {id(p) for p in pl_module.parameters()}
            assert not theirs & {id(p) for group in optimizer.param_groups for p in group["params"]}
            assert all(p.grad is None for p in teacher.parameters())
            self.trainable = sum(p.numel() for p in pl_module.parameters() if p.requires_grad)
            self.averaged = sum(p.numel() for p in ema._average_model.parameters())
            self.keys = [k for k in pl_module.state_dict() if "teacher" in k or "norm" in k]

    teacher, module, looks, ema = seeded(Normalized, seed=3), seeded(Plain), Looks(), EMAWeightAveraging(decay=0.5)
    own = sum(p.numel() for p in module.parameters())
    distillation = Distillation(CONFIG, teacher=teacher, student="model")
    trainer(tmp_path, [looks, distillation, ema]).fit(module, loader())
    assert looks.trainable == looks.averaged == own and looks.keys == []


@pytest.mark.parametrize("fails", [False, True])
def test_memory_comes_back_after_the_fit(tmp_path, fails):
    llama(hidden_size=64).save_pretrained(tmp_path / "teacher")
    seen: list[Any] = []

    class Watch(Callback):
        def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
            if not seen:
                seen.append(weakref.ref(distillation._live.model))

    class Text(AccelModule):
        def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
            if fails and batch_idx == 1:
                raise RuntimeError("as the test wants it")
            return super().training_step(batch, batch_idx)

    config = DistillConfig(hidden="last")
    distillation = Distillation(config, teacher=str(tmp_path / "teacher"), student="model")
    fit, module = trainer(tmp_path, [distillation, Watch()]), Text(llama())
    try:
        fit.fit(module, texts())
    except RuntimeError as error:
        assert fails and str(error) == "as the test wants it"
    gc.collect()
    assert seen[0]() is None
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in module.modules())


def test_a_teacher_comes_back_with_its_hooks_its_device_and_its_gradients_wishes(tmp_path):
    teacher = seeded(Normalized, seed=3)
    called: list[int] = []
    teacher.register_forward_hook(lambda *_: called.append(1))
    teacher.first.requires_grad_(False)
    fitted(tmp_path, teacher, CONFIG)
    assert len(called) == 8 and len(teacher._forward_hooks) == 1
    assert not teacher.first._forward_hooks and not teacher.first.weight.requires_grad
    assert teacher.second.weight.requires_grad and {p.device.type for p in teacher.parameters()} == {"cpu"}


def test_the_teacher_runs_in_the_students_autocast(tmp_path):
    class Sees(Perceptron):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            seen.append((torch.is_autocast_enabled("cpu"), super().forward(x).dtype))
            return super().forward(x)

    seen: list[Any] = []
    distillation = Distillation(teacher=seeded(Sees, seed=3))
    trainer(tmp_path, [distillation], precision="bf16-mixed", max_steps=2).fit(seeded(Plain), loader())
    assert seen == [(True, torch.bfloat16)] * 2


def test_gradient_accumulation_weighs_the_teacher_as_one_batch(tmp_path):
    found = []
    for batch, accumulate in ((16, 1), (8, 2)):
        module = seeded(Plain, optimizer="sgd")
        distillation = Distillation(CONFIG, teacher=seeded(Perceptron, 24, seed=3), student="model")
        fit = trainer(tmp_path, [distillation], accumulate_grad_batches=accumulate)
        fit.fit(module, loader(batch=batch))
        found.append(weights(module))
    assert all(torch.allclose(found[0][name], found[1][name], atol=1e-6) for name in found[0])


def test_validate_test_and_predict_never_load_or_ask_a_teacher(tmp_path):
    class Predicts(Plain):
        def predict_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
            return self.model(batch[0])

    module = seeded(Predicts)
    fit = trainer(tmp_path, [Distillation(CONFIG, teacher="there/is/none", student="model")])
    alone = trainer(tmp_path).validate(module, loader(16), verbose=False)
    assert fit.validate(module, loader(16), verbose=False) == alone
    fit.test(module, loader(16), verbose=False)
    assert len(fit.predict(module, loader(16))) == 2


def test_pruning_quantization_and_distillation_of_layers_are_one_fit_with_one_artifact(tmp_path):
    def fit(backwards: bool) -> dict[str, torch.Tensor]:
        module = seeded(Plain)
        callbacks = [
            Distillation(CONFIG, teacher=seeded(Perceptron, 77, seed=3), student="model"),
            Pruning(PruneConfig("neurons", amount=0.5), Cubic(0.1, 0.6), module="model", every=1),
            QuantizationAwareTraining(begin=0.6, module="model"),
            Export(tmp_path / "model", module="model", engines=("portable",), measure=False),
        ]
        trainer(tmp_path, callbacks[::-1] if backwards else callbacks).fit(module, loader())
        return weights(module)

    assert_same(fit(False), fit(True))
    assert not [t for t in load_weights(tmp_path / "model" / "weights.safetensors").values() if 77 in t.shape]


# --- sequences --------------------------------------------------------------------------------------------------------


class Speech(AccelModule):
    """A user's step, which gives labels to a transformers model."""

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        return self.model(**batch).loss


def speech() -> dict[str, torch.Tensor]:
    labels = tiny.ids(2, 6)
    labels[1, 4:] = -100
    return {"input_features": torch.randn(2, 8, 40, generator=torch.Generator().manual_seed(0)), "labels": labels}


def test_an_encoder_decoder_is_distilled_teacher_forced_on_its_labels(tmp_path):
    teacher = whisper()
    student = student_from(teacher, layers={"decoder": 2})
    batch = speech()
    with torch.no_grad():
        logits = [model(**batch).logits for model in (student, teacher)]
        expected = distillation_loss(*logits, 2.0, batch["labels"] != -100)
    config = DistillConfig(hidden={"model.decoder.layers.1": "model.decoder.layers.3"}, hidden_loss="mse")
    fit = trainer(tmp_path, [Distillation(config, teacher=teacher, student="model")], max_steps=1)
    fit.fit(Speech(student.train()), torch.utils.data.DataLoader([batch], batch_size=None))
    found = fit.callback_metrics
    assert float(found["accel/distillation/teacher_loss"]) == pytest.approx(expected.item(), rel=1e-4)
    assert found["accel/distillation/hidden_loss"] > 0


def test_pseudo_labels_are_what_the_teacher_generates_without_prompt_start_and_padding():
    teacher = whisper()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = pseudo_labels(teacher, [speech()], max_new_tokens=5, do_sample=False)
        ids = teacher.generate(input_features=speech()["input_features"], max_new_tokens=5, do_sample=False)
    assert len(found) == 2
    for row, whole in zip(found, ids, strict=True):
        ids = whole.tolist()
        start = 1 if ids[0] == teacher.config.decoder_start_token_id else 0
        end = ids.index(2, start) + 1 if 2 in ids[start:] else len(ids)
        assert row.tolist() == ids[start:end]
    causal = tiny.llama()
    causal.train()
    prompts = {"input_ids": tiny.ids(2, 4), "labels": tiny.ids(2, 4)}
    prompts["attention_mask"] = torch.tensor([[0, 1, 1, 1], [1, 1, 1, 1]])
    found = pseudo_labels(causal, [prompts, prompts], max_new_tokens=5, do_sample=False)
    assert causal.training and len(found) == 4
    whole = causal.eval().generate(prompts["input_ids"], attention_mask=prompts["attention_mask"], max_new_tokens=5)
    for row, ids in zip(found[:2], whole, strict=True):
        assert row.tolist() == ids[4 : 4 + len(row)].tolist()
        assert len(row) == 5 or row[-1] == 2


def test_an_artifact_makes_pseudo_labels_too(decoder):
    found = pseudo_labels(load(decoder), [{"input_ids": tiny.ids(2, 4)}], max_new_tokens=3)
    assert [row.tolist() for row in found] == load(decoder).generate(tiny.ids(2, 4), 3).tolist()


def test_what_cannot_generate_is_refused():
    with pytest.raises(ValueError, match=r"a Sequential, has no generate\(\)"):
        pseudo_labels(tiny.mlp(), [])
    with pytest.raises(ValueError, match=r"tokenizer\.padding_side = 'left'"):
        pseudo_labels(tiny.llama(), [{"input_ids": tiny.ids(1, 3), "attention_mask": torch.tensor([[1, 1, 0]])}])


def test_an_artifacts_pseudo_labels_know_padding_and_the_end(decoder):
    teacher = load(decoder)
    prompts = tiny.ids(2, 4)
    padded = torch.cat((torch.zeros(2, 3, dtype=torch.int64), prompts), 1)
    mask = torch.cat((torch.zeros(2, 3, dtype=torch.int64), torch.ones_like(prompts)), 1)
    (first, _), (second, _) = (pseudo_labels(teacher, [batch], max_new_tokens=6) for batch in (
        {"input_ids": prompts}, {"input_ids": padded, "attention_mask": mask}))  # fmt: skip
    assert first.tolist() == second.tolist(), "padding on the left is no prompt"
    with pytest.raises(ValueError, match=r"tokenizer\.padding_side = 'left'"):
        pseudo_labels(teacher, [{"input_ids": padded.flip(1), "attention_mask": mask.flip(1)}])
    whole = teacher.generate(prompts, 6)
    stop = int(whole[0, 2])
    rows = pseudo_labels(teacher, [{"input_ids": prompts}], max_new_tokens=6, stop=(stop,))
    assert rows[0].tolist() == whole[0, : whole[0].tolist().index(stop) + 1].tolist(), "up to and with the end"


def test_an_encoder_decoder_artifact_makes_pseudo_labels(tmp_path):
    teacher, batch = whisper().eval(), speech()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        export_model(teacher, tmp_path / "speech", example_inputs={
            "input_features": batch["input_features"], "decoder_input_ids": torch.tensor([[1, 2], [1, 2]])
        }, engines=("portable",), measure=False)  # fmt: skip
    artifact = load(tmp_path / "speech", engine="portable")
    rows = pseudo_labels(artifact, [batch], max_new_tokens=4, stop=())
    whole = artifact.generate(batch["input_features"], max_new_tokens=4, stop=())
    assert [row.tolist() for row in rows] == whole.tolist()


def test_a_second_fit_of_the_callback_begins_anew(tmp_path):
    """What the first one kept, its student and its projections, teaches nothing in the second."""
    config = DistillConfig(alpha=0.0, hidden={"second": "first"}, hidden_loss="mse")
    teacher = seeded(Perceptron, 24, seed=3)
    once = Distillation(config, teacher=teacher, student="model")
    modules = [seeded(Plain), seeded(Plain)]
    for module in modules:
        trainer(tmp_path, [once]).fit(module, loader())
    assert_same(weights(modules[0]), weights(modules[1]))

    class Taught(Callback):
        def __init__(self) -> None:
            self.steps: list[bool] = []

        def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
            self.steps.append(distillation_of(trainer)._live is not None)

    own = Distillation(teacher="self", student="model")
    seen = []
    for _ in range(2):
        taught = Taught()
        quantization = QuantizationAwareTraining(begin=4, module="model")
        trainer(tmp_path, [own, quantization, taught]).fit(seeded(Plain), loader())
        seen.append(taught.steps)
    assert seen[0] == seen[1] == [False] * 4 + [True] * 4


def test_self_cannot_be_what_was_cut_before_the_first_step(tmp_path):
    x = data(8)[:][0]
    pruning = Pruning(PruneConfig("neurons", amount=0.5), module="model", cut_first=True, example_inputs=(x,))
    with pytest.raises(ValueError, match=r"cut the student before there is a step.*copy\.deepcopy\(module\.model\)"):
        trainer(tmp_path, [pruning, Distillation(teacher="self", student="model")]).fit(seeded(Plain), loader())


def test_a_teacher_in_a_path_and_one_that_takes_other_inputs(tmp_path):
    llama().save_pretrained(tmp_path / "teacher")
    one, other = (AccelModule(llama(hidden_size=64)) for _ in range(2))
    for module, teacher in ((one, tmp_path / "teacher"), (other, str(tmp_path / "teacher"))):
        trainer(tmp_path, [Distillation(teacher=teacher, student="model")], max_steps=1).fit(module, texts())
    assert_same(weights(one), weights(other))

    class Narrow(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = llama()

        def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
            return self.inner(input_ids).logits

    with pytest.raises(ValueError, match=r"called with \['attention_mask'\], which the teacher, a Narrow, does not"):
        trainer(tmp_path, [Distillation(teacher=Narrow(), student="model")]).fit(AccelModule(llama()), texts())


def test_pseudo_labels_end_where_generation_was_told_to_end():
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=12, hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, eos_token_id=2,
        pad_token_id=0,
    )  # fmt: skip
    teacher = seeded(LlamaForCausalLM, config)
    prompts = {"input_ids": torch.randint(3, 12, (6, 4), generator=torch.Generator().manual_seed(0))}
    torch.manual_seed(0)
    rows = pseudo_labels(teacher, [prompts], max_new_tokens=12, do_sample=True, eos_token_id=5)
    ended = [row.tolist() for row in rows if 5 in row.tolist()]
    assert ended and all(row.index(5) == len(row) - 1 for row in ended)
    assert any(2 in row.tolist()[:-1] for row in rows), "which is no end here"
