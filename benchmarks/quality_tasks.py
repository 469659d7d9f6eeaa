"""The tasks of `quality.py`: data, network, training settings and score of each."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import real_data
import torch
from tables import ATTENTION
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_accel.quantize.config import SCHEMES

Batch = Any  # a mapping of inputs with labels, or (inputs, labels)


@dataclass(frozen=True)
class Settings:
    """How a float control and its quantized twin are trained; both the same."""

    train: int  # examples in an epoch
    validation: int
    test: int
    epochs: int
    batch: int
    lr: float
    begin: float  # share of training before quantization is simulated
    precision: str = "32-true"
    calibration: int = 8  # training batches that a scheme with static ranges sees after training
    taught_lr: float | None = None  # of QAT taught by the control, where the validation split prefers another one


@dataclass(frozen=True)
class Data:
    """Training batches of a seed, in order, and the held-out batches that all cells share."""

    train: Callable[[int], list[Batch]]
    validation: list[Batch]
    test: list[Batch]


@dataclass(frozen=True)
class Task:
    """One row group of the report.

    Args:
        loss: whether scores are nats a token (each of a block); else they are 1 where an example is right.
        methods: what is compared with the float control (`quality.py` says what each is).
    """

    title: str
    schemes: tuple[str, ...]
    settings: Settings
    quick: Settings
    load: Callable[[Settings], Data]
    build: Callable[[], nn.Module]
    loss: bool = False
    methods: tuple[str, ...] = ("ptq", "qat")


def inputs_of(batch: Batch) -> Any:
    """A batch without its labels, as calibration takes it."""
    return {k: v for k, v in batch.items() if k != "labels"} if isinstance(batch, dict) else batch[0]


@torch.no_grad()
def scores(task: Task, model: nn.Module, batches: list[Batch]) -> Tensor:
    """One score an example (see `Task`), in the order of the batches."""
    found = []
    model.eval()
    for batch in batches:
        labels = batch["labels"] if isinstance(batch, dict) else batch[1]
        output = model(**inputs_of(batch)) if isinstance(batch, dict) else model(batch[0])
        if task.loss:
            logits = output.logits[:, :-1].float().transpose(1, 2)
            found.append(F.cross_entropy(logits, labels[:, 1:], reduction="none").mean(1))
        else:
            found.append((output.argmax(-1) == labels).float())
    return torch.cat(found)


def shuffled(n: int, settings: Settings) -> list[list[int]]:
    """Disjoint training, validation and test indices out of `n`; the same for all seeds."""
    order = list(range(n))
    random.Random(2026).shuffle(order)
    sizes = settings.test, settings.validation, settings.train
    if sum(sizes) > n:
        raise ValueError(f"{sizes} examples of {n} were asked for")
    test, validation = order[: sizes[0]], order[sizes[0] : sum(sizes[:2])]
    return [order[sum(sizes[:2]) : sum(sizes)], validation, test]


# --- MiniLM on WordNet -----------------------------------------------------------------------------------------------

LENGTH = 48  # tokens of a gloss at most
POOL = 32  # batches that are sorted by length together, so that little is padding


Gloss = dict[str, Any]  # input_ids, a list, and its class as labels


def gloss_examples(settings: Settings) -> list[list[Gloss]]:
    """Training, validation and test examples."""
    from real_models import minilm_tokenizer

    texts, classes = real_data.glosses()
    tokenizer = minilm_tokenizer()
    tokenizer.enable_truncation(LENGTH)
    return [
        [{"input_ids": e.ids, "labels": classes[i]}
         for i, e in zip(part, tokenizer.encode_batch([texts[i] for i in part]), strict=True)]
        for part in shuffled(len(texts), settings)
    ]


def pools(glosses: list[Gloss], seed: int, settings: Settings) -> list[list[int]]:
    """Batches of indices for all epochs, in order: examples of about one length together."""
    draw, found = random.Random(seed), []
    for _ in range(settings.epochs):
        order = draw.sample(range(len(glosses)), len(glosses))
        size, many = settings.batch, POOL * settings.batch
        sorted_ = [sorted(order[i : i + many], key=lambda i: len(glosses[i]["input_ids"]))
                   for i in range(0, len(order), many)]
        made = [pool[k : k + size] for pool in sorted_ for k in range(0, len(pool), size)]
        found += draw.sample(made, len(made))
    return found


def collate(glosses: list[Gloss]) -> Batch:
    """A padded batch, with the keys of the examples where they have some."""
    batch = pad([g["input_ids"] for g in glosses], [g["labels"] for g in glosses])
    if "sample_key" in glosses[0]:
        batch["sample_key"] = torch.tensor([g["sample_key"] for g in glosses])
    return batch


def load_glosses(settings: Settings) -> Data:
    train, *held_out = gloss_examples(settings)

    def batches(part: list[Gloss]) -> list[Batch]:
        part = sorted(part, key=lambda g: len(g["input_ids"]))
        return [collate(part[k : k + 128]) for k in range(0, len(part), 128)]

    def epochs(seed: int) -> list[Batch]:
        return [collate([train[i] for i in some]) for some in pools(train, seed, settings)]

    return Data(epochs, *map(batches, held_out))


def pad(rows: list[list[int]], labels: list[int]) -> dict[str, Tensor]:
    """Rows of ids filled up with 0."""
    ids = nn.utils.rnn.pad_sequence([torch.tensor(row) for row in rows], batch_first=True)
    lengths = torch.tensor([len(row) for row in rows])
    mask = torch.arange(ids.shape[1]) < lengths[:, None]
    return {"input_ids": ids, "attention_mask": mask.long(), "labels": torch.tensor(labels)}


def build_minilm() -> nn.Module:
    from real_models import minilm

    return minilm(26)


# --- SmolLM2 on the Brown corpus -------------------------------------------------------------------------------------

BLOCK = 256  # tokens


def load_brown(settings: Settings) -> Data:
    """Blocks of whole documents for training, validation and test; no document is in two of them."""
    from real_models import smollm2_tokenizer

    texts = list(real_data.brown().values())
    random.Random(2026).shuffle(texts)
    encoded = iter(smollm2_tokenizer().encode_batch(texts, add_special_tokens=False))

    def take(blocks: int) -> list[Tensor]:
        found: list[Tensor] = []
        while len(found) < blocks:  # a few blocks of each document, so that there are many of them
            ids = torch.tensor(next(encoded).ids)
            found += list(ids[: len(ids) // BLOCK * BLOCK].view(-1, BLOCK)[:4])
        return found[:blocks]

    test, validation, train = take(settings.test), take(settings.validation), take(settings.train)

    def batches(part: list[Tensor], size: int) -> list[Batch]:
        return [{"input_ids": torch.stack(part[k : k + size]), "labels": torch.stack(part[k : k + size])}
                for k in range(0, len(part), size)]

    def epochs(seed: int) -> list[Batch]:
        draw = random.Random(seed)
        return [b for _ in range(settings.epochs) for b in batches(draw.sample(train, len(train)), settings.batch)]

    return Data(epochs, batches(validation, 8), batches(test, 8))


def build_smollm2() -> nn.Module:
    from real_models import smollm2

    return smollm2()


# --- a CNN on Fashion-MNIST ------------------------------------------------------------------------------------------


def load_fashion(settings: Settings) -> Data:
    """Validation is a part of the 60,000 training images; test is of the 10,000."""
    (images, classes), (test_images, test_classes) = (real_data.fashion_mnist(s) for s in ("train", "t10k"))
    train, validation, _ = shuffled(len(images), replace(settings, test=0))

    def batches(x: Tensor, y: Tensor, size: int) -> list[Batch]:
        x = (x.float() / 255 - 0.286) / 0.353
        return list(zip(x.split(size), y.split(size), strict=True))

    def epochs(seed: int) -> list[Batch]:
        draw, found = random.Random(seed), []
        for _ in range(settings.epochs):
            order = draw.sample(train, len(train))
            found += batches(images[order], classes[order], settings.batch)
        return found

    test = batches(test_images[: settings.test], test_classes[: settings.test], 500)
    return Data(epochs, batches(images[validation], classes[validation], 500), test)


def block(inputs: int, outputs: int, stride: int = 1) -> nn.Sequential:
    """A convolution of 3 x 3, BatchNorm and ReLU."""
    return nn.Sequential(nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU())


class Residual(nn.Module):
    """x + two blocks of it."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.blocks = nn.Sequential(block(width, width), block(width, width))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.blocks(x)


def build_cnn() -> nn.Module:
    """0.24 M parameters: three blocks, a residual block, the mean over positions, a linear layer."""
    return nn.Sequential(block(1, 32), block(32, 64, 2), block(64, 96, 2), Residual(96), nn.AdaptiveAvgPool2d(1),
                         nn.Flatten(), nn.Linear(96, 10))


# --- all -------------------------------------------------------------------------------------------------------------

BF16 = "bf16-mixed"  # twice as fast as float32 on a CPU with AMX
FOUR_BITS = ("int4-weight", "int4-int8")
TASKS = {
    "minilm": Task(
        "MiniLM-L6 (22.7 M), WordNet gloss -> 26 lexicographer files",
        (*SCHEMES, f"int8{ATTENTION}"),
        Settings(train=11000, validation=1000, test=8000, epochs=1, batch=32, lr=3e-4, begin=0.0, precision=BF16),
        Settings(train=64, validation=32, test=64, epochs=1, batch=16, lr=3e-4, begin=0.0, precision=BF16),
        load_glosses, build_minilm,
    ),
    "smollm2": Task(
        "SmolLM2-135M, Brown corpus",
        FOUR_BITS,
        Settings(train=300, validation=16, test=64, epochs=1, batch=1, lr=5e-5, begin=0.0, precision=BF16,
                 taught_lr=1e-4),
        Settings(train=4, validation=1, test=2, epochs=1, batch=2, lr=1e-5, begin=0.0, precision=BF16),
        load_brown, build_smollm2, loss=True, methods=("ptq", "taught", "qat"),
    ),
    "cnn": Task(
        "CNN with BatchNorm (0.24 M), Fashion-MNIST",
        ("int8-static",),
        Settings(train=50000, validation=2000, test=10000, epochs=2, batch=128, lr=5e-3, begin=0.5),
        Settings(train=512, validation=100, test=500, epochs=1, batch=64, lr=2e-3, begin=0.5),
        load_fashion, build_cnn,
    ),
}
