"""The tasks of `distillation.py`: teachers and their data, students, and the fits that are compared."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import quality_tasks as q
import torch
from quality_tasks import Batch, Settings
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_accel import DistillConfig, PruneConfig, QuantConfig, student_from


@dataclass(frozen=True)
class Examples:
    """What is learnt from and scored on.

    Args:
        train: samples by index.
        order: seed and settings -> batches of indices, of all epochs, in order.
        collate: samples to a batch; `None` for torch's own.
        validation, test: batches.
    """

    train: Sequence[Any]
    order: Callable[[int, Settings], list[list[int]]]
    collate: Callable[[list[Any]], Batch] | None
    validation: list[Batch]
    test: list[Batch]


@dataclass(frozen=True)
class Unit:
    """What a score is, how it is printed, and whether less of it is better."""

    name: str
    scale: int
    form: str
    lower: bool = False


ACCURACY = Unit("accuracy %", 100, ".2f")
LOSS, WER = Unit("loss/token", 1, ".4f", lower=True), Unit("WER %", 100, ".2f", lower=True)


@dataclass(frozen=True)
class Source:
    """A teacher and its data.

    Args:
        scores: of a model on batches, one an example.
        tuned: the teacher is fine-tuned first, for each seed; else it is what `build` gives.
    """

    name: str
    settings: Settings
    quick: Settings
    load: Callable[[Settings], Examples]
    build: Callable[[], nn.Module]
    scores: Callable[[nn.Module, list[Batch]], Tensor]
    unit: Unit
    tuned: bool = True


@dataclass(frozen=True)
class Fit:
    """One call of `Trainer.fit`, on its share of the steps: what is done in it.

    Args:
        teach: `""`, or `"live"`, `"hidden"` (of a live teacher, states too), `"cached"` or `"drawn"` (cached, half of
            the classes drawn).
    """

    teach: str = ""
    prune: bool = False
    quantize: bool = False


Method = tuple[Fit, ...]  # fits of equal length, one after the other; none for the student as it starts
DRAWN = "cached + drawn"  # as many classes, half of them drawn
METHODS: dict[str, Method] = {
    "none": (Fit(),),
    "logits": (Fit("live"),),
    "logits + hidden": (Fit("hidden"),),
    "cached": (Fit("cached"),),
}
ONE_FIT: dict[str, Method] = {
    "one fit": (Fit("live", prune=True, quantize=True),),
    "three fits": (Fit("live"), Fit(prune=True), Fit(quantize=True)),
    "none": (Fit(),),
    "distillation alone": (Fit("live"),),
    "pruning alone": (Fit(prune=True),),
    "quantization alone": (Fit(quantize=True),),
}


@dataclass(frozen=True)
class Task:
    """A teacher, a student of it, and how the student is trained.

    Args:
        student: from the teacher.
        top_k: classes of a cache.
        rates: peak learning rates that each method may choose from.
        network: where the layers of `layer_map` are, below teacher and student.
        control: the method that the others are compared with.
        example: inputs that the artifacts of the methods are timed with, by keyword, by the name of their size; empty
            for a task whose artifacts are not timed.
        prune, quantize: what fits do that do so.
        deployed: the model that is exported, of what was trained.
    """

    title: str
    source: Source
    student: Callable[[Any], nn.Module]
    epochs: int
    rates: tuple[float, ...]
    config: DistillConfig
    network: str = ""
    top_k: int = 32
    methods: dict[str, Method] = field(default_factory=lambda: METHODS)
    control: str = "none"
    example: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    prune: PruneConfig = field(default_factory=lambda: PruneConfig("neurons", amount=0.5))
    quantize: QuantConfig = field(default_factory=lambda: QuantConfig("int8"))
    deployed: Callable[[Any], nn.Module] = lambda model: model


def some(*names: str) -> dict[str, Method]:
    """These of the methods."""
    return {name: METHODS[name] for name in names}


# --- MiniLM and SmolLM2, on the data of quality.py --------------------------------------------------------------------


def glosses(settings: Settings) -> Examples:
    """WordNet's glosses and their files."""
    train = q.gloss_examples(settings)[0]
    data = q.load_glosses(settings)
    return Examples(train, lambda seed, s: q.pools(train, seed, s), q.collate, data.validation, data.test)


def brown(settings: Settings) -> Examples:
    """Blocks of the Brown corpus, labels the same."""
    data = q.load_brown(replace(settings, epochs=1))
    train = [{"input_ids": row, "labels": row} for batch in data.train(0) for row in batch["input_ids"]]
    return Examples(train, partial(in_turn, len(train)), None, data.validation, data.test)


def in_turn(n: int, seed: int, settings: Settings) -> list[list[int]]:
    """Batches of `n` samples, drawn anew in each epoch."""
    draw, size, found = random.Random(seed), settings.batch, []
    for _ in range(settings.epochs):
        order = draw.sample(range(n), n)
        found += [order[k : k + size] for k in range(0, n, size)]
    return found


def minilm_student(layers: int, width: float | None) -> Callable[[Any], nn.Module]:
    """A classifier around a smaller encoder, with the teacher's last layer where its width allows it."""

    def make(teacher: Any) -> nn.Module:
        from real_models import Classifier

        encoder = student_from(teacher.encoder, layers=layers, **({} if width is None else {"width": width}))
        student = Classifier(encoder, teacher.classifier.out_features)
        if width is None:
            student.classifier.load_state_dict(teacher.classifier.state_dict())
        return student

    return make


def smollm2_student(teacher: Any) -> nn.Module:
    """34.6 M parameters of 134.5 M: ten layers of thirty, two thirds of the width."""
    return student_from(teacher, layers=10, width=2 / 3)


def tokens(*sizes: tuple[int, int]) -> dict[str, dict[str, Tensor]]:
    """Inputs of an encoder, batch x length."""
    ids = {(b, n): torch.randint(1000, 20000, (b, n), generator=torch.Generator().manual_seed(0)) for b, n in sizes}
    return {f"{b} x {n}": {"input_ids": x, "attention_mask": torch.ones_like(x)} for (b, n), x in ids.items()}


# --- Fashion-MNIST ----------------------------------------------------------------------------------------------------

MEAN, SPREAD = 0.286, 0.353  # of Fashion-MNIST's pixels in [0, 1], as quality_tasks.load_fashion normalizes them


class Upscaled(nn.Module):
    """A network of ImageNet's images over Fashion-MNIST's [n, 1, 28, 28], seen larger and in three channels."""

    def __init__(self, network: nn.Module, size: int) -> None:
        super().__init__()
        self.network, self.size = network, size

    def forward(self, x: Tensor) -> Tensor:
        grey = F.interpolate((x * SPREAD + MEAN) * 255, (self.size, self.size), mode="bilinear", antialias=True)
        return self.network(((grey - 127) / 128).expand(-1, 3, -1, -1))


def fashion_teacher() -> nn.Module:
    """EfficientNet-Lite0 at 64 x 64, a new last layer."""
    from real_models import efficientnet

    return Upscaled(efficientnet(classes=10, size=64), 64)


def small_cnn(teacher: Any) -> nn.Module:
    """19 thousand parameters, a two-hundredth of the teacher's: three blocks, their mean over positions, a layer."""
    return nn.Sequential(q.block(1, 16), q.block(16, 32, 2), q.block(32, 48, 2), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
                         nn.Linear(48, 10))  # fmt: skip


def fashion(settings: Settings) -> Examples:
    """Images and classes; validation is a part of the 60,000 training images."""
    data = q.load_fashion(replace(settings, epochs=1))
    train = [(x, y) for images, classes in data.train(0) for x, y in zip(images, classes.tolist(), strict=True)]
    return Examples(train, partial(in_turn, len(train)), None, data.validation, data.test)


# --- all --------------------------------------------------------------------------------------------------------------


def as_quality(name: str, load: Callable[[Settings], Examples]) -> Source:
    """The teacher of a task of quality.py."""
    task = q.TASKS[name]
    unit = LOSS if task.loss else ACCURACY
    return Source(name, task.settings, task.quick, load, task.build, partial(q.scores, task), unit)


def tasks() -> dict[str, Task]:
    """All tasks by name."""
    from distillation_speech import SPEECH, half_of_the_decoder

    minilm, smollm2 = as_quality("minilm", glosses), as_quality("smollm2", brown)
    minilm = replace(minilm, name="minilm-3-epochs", settings=replace(minilm.settings, epochs=3))  # as its students
    images = Source(
        "efficientnet-4-epochs",  # as its students
        Settings(train=12000, validation=2000, test=10000, epochs=4, batch=64, lr=1e-3, begin=0.0, precision=q.BF16),
        Settings(train=64, validation=32, test=64, epochs=1, batch=16, lr=1e-3, begin=0.0),
        fashion, fashion_teacher, partial(q.scores, q.TASKS["cnn"]), ACCURACY,
    )  # fmt: skip
    soft = DistillConfig(temperature=2.0, alpha=0.7)
    return {
        "minilm-3": Task("MiniLM of 3 layers, WordNet glosses", minilm, minilm_student(3, None), 3, (1e-4, 3e-4),
                         soft, "encoder"),
        "minilm-2-half": Task("MiniLM of 2 layers, half as wide, WordNet glosses", minilm, minilm_student(2, 0.5), 3,
                              (3e-4, 1e-3), soft, "encoder"),
        "smollm2-quarter": Task("a quarter of SmolLM2-135M, Brown corpus", smollm2, smollm2_student, 1, (3e-4, 1e-3),
                                replace(soft, temperature=1.0), "model", methods=METHODS | {DRAWN: (Fit("drawn"),)}),
        "fashion-cnn": Task("CNN (19 k) of EfficientNet-Lite0, Fashion-MNIST", images, small_cnn, 4,
                            (5e-3, 1e-2, 2e-2), soft, methods=some("none", "logits", "cached")),
        "whisper-2": Task("Whisper tiny.en with 2 of 4 decoder layers, Asterisk's prompts", SPEECH, half_of_the_decoder,
                          12, (1e-4, 3e-4), replace(soft, temperature=1.0), "decoder",
                          methods={"as it starts": ()} | some("none", "logits", "logits + hidden")),
        "one-fit": Task("MiniLM, half of the neurons pruned, int8, WordNet glosses", minilm,
                        lambda teacher: q.build_minilm(), 2, (3e-4,), soft, methods=ONE_FIT, control="one fit",
                        example=tokens((1, 128), (8, 128))),
    }  # fmt: skip
