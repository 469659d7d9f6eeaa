"""The teacher's answers on disk: the same loss as live, keys that travel, and what a cache refuses."""

from __future__ import annotations

import errno
import json
import resource
import subprocess
import sys
from collections import namedtuple
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from helpers import CLASSES, Perceptron, Plain, assert_same, data, llama, seeded, trainer, weights
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from test_distill_student import whisper
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Subset, TensorDataset
from transformers import BatchEncoding

from lightning_accel import (
    AccelModule,
    AutoMixedPrecision,
    Distillation,
    DistillConfig,
    Export,
    Keyed,
    TeacherCache,
    export_model,
    load,
    student_from,
)
from lightning_accel.distill import split_key
from lightning_accel.distill.cache import fingerprint
from lightning_accel.distill.given import check_given
from lightning_accel.distill.keyed import is_key, unchanged

CONFIG = DistillConfig(top_k=2)
STATES = DistillConfig(top_k=2, hidden={"second": "first"}, hidden_loss="mse")
DRAWN = replace(STATES, top_k=1, drawn=2)


def build(path: Any, teacher: Any = None, samples: Any = None, config: DistillConfig = CONFIG, **options: Any) -> Any:
    teacher = teacher if teacher is not None else seeded(Perceptron, 24, dropout=0.5, seed=3)
    keyed = Keyed(samples if samples is not None else data())
    options = {"batch_size": 8, "progress": False, **options}
    return TeacherCache.build(path, teacher, keyed, config, **options), keyed


class Sentences:
    """Ids of other lengths, as mappings; and the collate function that pads them."""

    def __init__(self, n: int = 12, seed: int = 0) -> None:
        generator = torch.Generator().manual_seed(seed)
        lengths = torch.randint(3, 11, (n,), generator=generator).tolist()
        self.ids = [torch.randint(1, 64, (length,), generator=generator) for length in lengths]

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, i: int) -> dict[str, Any]:
        return {"input_ids": self.ids[i], "labels": self.ids[i].clone()}


def pad(samples: list[dict[str, Any]], side: str = "right", key: bool = True) -> dict[str, torch.Tensor]:
    def padded(name: str, value: int) -> torch.Tensor:
        rows = [s[name] for s in samples]
        return nn.utils.rnn.pad_sequence(rows, True, value, side)

    ids = padded("input_ids", 0)
    batch = {"input_ids": ids, "attention_mask": (ids > 0).long(), "labels": padded("labels", -100)}
    return batch | ({"sample_key": torch.tensor([s["sample_key"] for s in samples])} if key else {})


def pad_left(samples: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    return pad(samples, "left")


def pad_without_key(samples: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    return pad(samples, key=False)


# --- the same answers -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("config", [CONFIG, STATES], ids=["logits", "hidden"])
@pytest.mark.parametrize("workers", [0, 2])
def test_training_from_the_cache_is_bitwise_training_from_the_live_teacher(tmp_path, config, workers):
    """Shuffled, with workers, in batches of another size than the cache was built with."""
    teacher = seeded(Perceptron, 24, dropout=0.5, seed=3)
    cache, keyed = build(tmp_path / "cache", teacher, config=config)
    found = []
    for source in (teacher, cache):
        module = seeded(Plain)
        torch.manual_seed(5)
        batches = DataLoader(keyed, batch_size=8, shuffle=True, num_workers=workers)
        trainer(tmp_path, [Distillation(config, teacher=source, student="model")]).fit(module, batches)
        found.append(weights(module))
    assert_same(*found)


def test_a_draw_from_one_class_trains_as_all_classes_of_the_live_teacher(tmp_path):
    teacher, config = seeded(Perceptron, 24, dropout=0.5, seed=3), DistillConfig(top_k=CLASSES - 1, drawn=3)
    cache, keyed = build(tmp_path / "cache", teacher, config=config)
    found = []
    for source, taught in ((teacher, DistillConfig()), (cache, config)):
        module = seeded(Plain, optimizer="sgd")
        batches = DataLoader(keyed, batch_size=8)
        trainer(tmp_path, [Distillation(taught, teacher=source, student="model")]).fit(module, batches)
        found.append(weights(module))
    for name, weight in found[0].items():
        assert torch.allclose(weight, found[1][name], atol=1e-6), name
    with pytest.raises(ValueError, match=r"drawn=3 is for a TeacherCache, .*DistillConfig\(top_k=None, drawn=0\)"):
        trainer(tmp_path, [Distillation(config, teacher=teacher)]).fit(seeded(Plain), DataLoader(keyed, batch_size=8))


@pytest.mark.parametrize("collate", [pad, pad_left])
def test_variable_lengths_padded_on_either_side_give_the_live_loss(tmp_path, collate):
    samples, teacher = Sentences(), llama(hidden_size=64)
    config = DistillConfig(top_k=8, hidden={"model.layers.1": "model.layers.0"})
    cache, keyed = build(tmp_path / "cache", teacher, samples, config, batch_size=5, collate_fn=collate)
    positions = sum(len(ids) for ids in samples.ids)
    assert (tmp_path / "cache" / "logits.values").stat().st_size == 4 * 8 * positions
    found = []
    for source in (teacher, cache):
        module = AccelModule(llama(), lr=1e-2)
        torch.manual_seed(5)
        batches = DataLoader(keyed, batch_size=4, shuffle=True, collate_fn=collate)
        fit = trainer(tmp_path, [Distillation(config, teacher=source, student="model")])
        fit.fit(module, batches)
        found.append({name: float(x) for name, x in fit.callback_metrics.items()})
    assert found[1] == pytest.approx(found[0], rel=1e-4) and found[0]["accel/distillation/hidden_loss"] > 0
    answer = cache.read(torch.tensor([keyed[i]["sample_key"] for i in (7, 2)]))
    assert answer.lengths[""].tolist() == [len(samples.ids[7]), len(samples.ids[2])]
    left = trainer(tmp_path, [Distillation(config, teacher=cache, student="model")])
    with pytest.raises(ValueError, match="the DataLoader's collate_fn gives other inputs"):
        short = DataLoader(keyed, batch_size=4, collate_fn=lambda s: {**pad(s), "labels": pad(s)["input_ids"] + 1})
        left.fit(AccelModule(llama()), short)


def test_an_encoder_decoder_is_cached_teacher_forced_on_its_labels(tmp_path):
    class Speech(AccelModule):
        def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
            return self.model(**batch).loss

    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(3, 97, (4, 6), generator=generator)
    labels[1, 4:] = labels[3, 2:] = -100
    sounds = torch.randn(4, 8, 40, generator=generator)
    samples = [{"input_features": x, "labels": y} for x, y in zip(sounds, labels, strict=True)]
    config = DistillConfig(top_k=4, hidden={"model.decoder.layers.1": "model.decoder.layers.3"})
    teacher = whisper()
    cache, keyed = build(tmp_path / "cache", teacher, samples, config, batch_size=2)
    found = []
    for source in (teacher, cache):
        module = Speech(student_from(teacher, layers={"decoder": 2}).train())
        fit = trainer(tmp_path, [Distillation(config, teacher=source, student="model")])
        fit.fit(module, DataLoader(keyed, batch_size=2))
        found.append(weights(module))
    assert_same(*found)
    assert cache.read(torch.tensor([keyed[1]["sample_key"]])).lengths[""].tolist() == [4]


def test_a_sample_is_read_by_its_key_whatever_its_place(tmp_path):
    teacher = seeded(Perceptron, 24, seed=3).eval()
    cache, keyed = build(tmp_path, teacher)
    x, _, keys = next(iter(DataLoader(keyed, batch_size=32, shuffle=True)))
    kept = cache.read(keys).logits
    with torch.no_grad():
        values, indices = (teacher(x) / 2).log_softmax(-1).topk(2)
    torch.testing.assert_close(kept.values, values)
    assert torch.equal(kept.indices.long(), indices) and len(cache) == 32
    again = TeacherCache(tmp_path).read(keys[:3]).logits
    assert torch.equal(again.values, kept.values[:3]) and again.classes == 3


def test_a_resumed_fit_with_the_cache_ends_bitwise_as_one_without_a_break(tmp_path):
    cache, keyed = build(tmp_path / "cache", config=STATES)

    def run(name: str, seed: int, resume: str | None = None) -> Any:
        module, keep = seeded(Plain, seed=seed), ModelCheckpoint(tmp_path / name, "{epoch}", save_top_k=-1)
        fit = trainer(tmp_path, [Distillation(STATES, teacher=cache, student="model"), keep], max_epochs=3)
        torch.manual_seed(seed)
        fit.fit(module, DataLoader(keyed, batch_size=8, shuffle=True), ckpt_path=resume)
        return weights(module)

    expected = run("whole", 1)
    assert_same(run("again", 2, str(tmp_path / "whole" / "epoch=0.ckpt")), expected)


def test_an_artifact_is_cached_as_the_model_that_it_was_exported_from(tmp_path):
    teacher = seeded(Perceptron, 24, seed=3).eval()
    options = {"example_inputs": (data(8)[:][0],), "engines": ("portable",), "measure": False}
    export_model(teacher, tmp_path / "artifact", **options)
    cache, keyed = build(tmp_path / "cache", load(tmp_path / "artifact"))
    expected, _ = build(tmp_path / "expected", teacher)
    keys = torch.tensor([keyed[i][-1] for i in range(32)])
    torch.testing.assert_close(cache.read(keys).logits.values, expected.read(keys).logits.values)


def test_a_folder_is_a_teacher_and_keys_reach_nobody_else(tmp_path):
    class Sees(Plain):
        def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
            x, y = batch
            return [x, y]

        def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
            assert len(batch) == 2

        def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
            x, y = batch
            assert isinstance(batch, list) and y.max() < 3
            return F.cross_entropy(self.model(x), y)

    _, keyed = build(tmp_path / "cache")
    export = Export(tmp_path / "model", module="model", engines=("portable",), measure=False)
    distillation = Distillation(CONFIG, teacher=str(tmp_path / "cache"))
    fit = trainer(tmp_path, [AutoMixedPrecision("auto"), distillation, export])
    fit.fit(seeded(Sees), DataLoader(keyed, batch_size=8))  # without validation the export scores training batches
    assert export.report is not None and fit.callback_metrics["accel/distillation/teacher_loss"] > 0
    live = trainer(tmp_path, [Distillation(CONFIG, teacher=seeded(Perceptron, seed=3))])
    live.fit(seeded(Sees), DataLoader(keyed, batch_size=8))


def test_a_cache_of_states_alone_needs_no_logits(tmp_path):
    config = DistillConfig(alpha=0.0, hidden={"second": "0"})
    teacher = nn.Sequential(nn.Linear(8, 24), nn.ReLU(), nn.Flatten(0))
    cache, keyed = build(tmp_path / "cache", teacher, config=config)
    fit = trainer(tmp_path, [Distillation(config, teacher=cache, student="model")])
    fit.fit(seeded(Plain), DataLoader(keyed, batch_size=8))
    assert fit.callback_metrics["accel/distillation/hidden_loss"] > 0


def test_a_dataset_of_inputs_alone_keeps_its_form(tmp_path):
    class Alone(Plain):
        def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
            x = batch[0] if tuples else batch
            assert isinstance(batch, list) == tuples and x.shape == (8, 8)
            return self.model(x).square().mean()

    for tuples in (True, False):
        samples = [(x,) if tuples else x for x, _ in data()]
        cache, keyed = build(tmp_path / str(tuples), samples=samples)
        fit = trainer(tmp_path, [Distillation(CONFIG, teacher=cache)])
        fit.fit(seeded(Alone), DataLoader(keyed, batch_size=8))
        assert fit.callback_metrics["accel/distillation/teacher_loss"] > 0


# --- keys -------------------------------------------------------------------------------------------------------------


def test_keys_are_taken_for_nothing_else_and_nothing_else_for_them():
    keyed = Keyed(data())
    x, y, keys = next(iter(DataLoader(keyed, batch_size=8)))
    assert is_key(keys) and not is_key(y) and not is_key(x) and not is_key(torch.zeros(8, dtype=torch.long))
    (left, right), found = split_key([x, y, keys])
    assert left is x and right is y and torch.equal(found, keys)
    assert split_key([x, y]) == ([x, y], None)
    times = torch.tensor([1_766_000_000_000_000_000, 1_766_000_000_000_000_001])  # a user's own, in nanoseconds
    assert not is_key(times) and split_key((x, times)) == ((x, times), None)
    assert split_key({"a": 1}) == ({"a": 1}, None)
    encoding = BatchEncoding({"input_ids": x, "sample_key": keys})
    rest, found = split_key(encoding)
    assert type(rest) is BatchEncoding and rest["input_ids"] is x and torch.equal(found, keys)
    assert "sample_key" not in rest and "sample_key" in encoding
    assert Keyed(data(seed=2)).fingerprint != keyed.fingerprint == Keyed(data()).fingerprint
    assert Keyed(data(seed=2))[3][-1] != keyed[3][-1] == Keyed(data())[3][-1]


def test_samples_without_keys_are_refused_with_the_lines_that_add_them(tmp_path):
    cache, _ = build(tmp_path / "cache")
    with pytest.raises(ValueError, match=r"no sample keys(.|\n)*data = lightning_accel\.Keyed\(dataset\)"):
        trainer(tmp_path, [Distillation(CONFIG, teacher=cache)]).fit(seeded(Plain), DataLoader(data(), batch_size=8))
    with pytest.raises(ValueError, match=r"write data = Keyed\(dataset\), and train on data too"):
        TeacherCache.build(tmp_path / "other", seeded(Perceptron), data(), CONFIG)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"A collate function of your own passes the key on: \{'sample_key'"):
        build(tmp_path / "other", llama(), Sentences(), collate_fn=pad_without_key)


def test_a_subset_keeps_the_keys_of_its_dataset(tmp_path):
    cache, keyed = build(tmp_path / "cache")
    part = DataLoader(Subset(keyed, [3, 5, 8, 13]), batch_size=2)
    fit = trainer(tmp_path, [Distillation(CONFIG, teacher=cache)])
    fit.fit(seeded(Plain), part)
    assert fit.global_step == 4


class Noisy:
    """Augments at random."""

    def __len__(self) -> int:
        return 12

    def __getitem__(self, i: int) -> tuple[torch.Tensor, int]:
        return data()[i][0] + torch.randn(8), i % 3


def test_random_augmentation_is_refused_unless_the_key_determines_it(tmp_path):
    with pytest.raises(ValueError, match=r"two readings of a sample of the Noisy differ.*Keyed\(dataset, views=4\)"):
        Keyed(Noisy())
    keyed = Keyed(Noisy(), views=4)
    assert len(keyed) == 48 and torch.equal(keyed[17][0], keyed[17][0])
    assert not torch.equal(keyed[5][0], keyed[17][0]) and keyed[5][1] == keyed[17][1]
    state = torch.get_rng_state()
    _ = keyed[3]
    assert torch.equal(torch.get_rng_state(), state)
    teacher = seeded(Perceptron, seed=3).eval()
    cache = TeacherCache.build(tmp_path, teacher, keyed, CONFIG, progress=False)
    x, _, keys = next(iter(DataLoader(keyed, batch_size=48, shuffle=True)))
    with torch.no_grad():
        torch.testing.assert_close(cache.read(keys).logits.values, (teacher(x) / 2).log_softmax(-1).topk(2).values)


def test_a_collate_function_that_draws_at_random_is_refused(tmp_path):
    def mask(samples: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        batch = pad(samples)
        return {**batch, "input_ids": batch["input_ids"].masked_fill(torch.rand(batch["input_ids"].shape) < 0.5, 1)}

    with pytest.raises(ValueError, match="the collate function gives another batch each time for the same sample"):
        build(tmp_path, llama(), Sentences(), collate_fn=mask)


def test_data_that_has_no_index_is_refused():
    class Stream(torch.utils.data.IterableDataset):
        def __iter__(self) -> Any:
            return iter(data())

    with pytest.raises(ValueError, match="a Stream has no length or no samples by index"):
        Keyed(Stream())
    with pytest.raises(ValueError, match="the dataset has 0 samples"):
        Keyed([])
    with pytest.raises(ValueError, match="views=0 must be at least 1"):
        Keyed(data(), views=0)


# --- a mismatch is an error -------------------------------------------------------------------------------------------


def changed_teacher() -> nn.Module:
    teacher = seeded(Perceptron, 24, dropout=0.5, seed=3)
    teacher.first.weight.data[0, 0] += 1e-3
    return teacher


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"teacher": changed_teacher()}, r"another teacher \(its classes, settings or weights differ\)"),
        ({"samples": data(seed=2)}, "built with other data"),
        ({"samples": data(31)}, "built with other data"),
        ({"config": DistillConfig(top_k=3)}, "built with top_k=2, not 3"),
        ({"config": DistillConfig(top_k=2, temperature=3.0)}, r"temperature=2\.0, not 3\.0"),
        ({"config": DistillConfig(top_k=2, drawn=1)}, "drawn=0, not 1"),
        ({"config": STATES}, r"hidden=\[\], not \['first'\]"),
    ],
    ids=["teacher", "data", "length", "top_k", "temperature", "drawn", "hidden"],
)
def test_a_cache_of_something_else_is_not_built_upon(tmp_path, options, message):
    build(tmp_path)
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    with pytest.raises(ValueError, match=message):
        build(tmp_path, **options)
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before


def test_a_complete_cache_is_opened_without_asking_the_teacher(tmp_path):
    class Counts(Perceptron):
        calls = 0

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            Counts.calls += 1
            return super().forward(x)

    for _ in range(2):
        build(tmp_path, seeded(Counts, seed=3))
        assert Counts.calls == 4


def test_other_data_in_the_loader_is_an_error_and_never_another_samples_answer(tmp_path):
    cache, keyed = build(tmp_path / "cache")
    for other in (Keyed(data(seed=2)), Keyed(data(16))):
        with pytest.raises(ValueError, match=r"the samples are not those that the cache .* was built with"):
            fit = trainer(tmp_path, [Distillation(CONFIG, teacher=cache)])
            fit.fit(seeded(Plain), DataLoader(other, batch_size=8))
        with pytest.raises(ValueError, match=r"sample 2 is not the one that the cache .* was built with"):
            cache.read(torch.tensor([keyed[0][-1], other[2][-1] + (1 << 40)]))
    with pytest.raises(ValueError, match="sample 32 is not the one"):
        cache.read(torch.tensor([Keyed(data(33))[32][-1]]))
    assert cache.read(torch.tensor([keyed[0][-1]])).logits is not None


def test_one_sample_that_has_changed_is_noticed_where_it_is_used(tmp_path):
    cache, _ = build(tmp_path / "cache")
    samples = [list(sample) for sample in data()]
    keyed = Keyed([tuple(sample) for sample in samples])
    changed = next(i for i in range(32) if i not in keyed.probes())
    keyed.dataset[changed] = (samples[changed][0] + 1e-6, samples[changed][1])
    with pytest.raises(ValueError, match=rf"sample {changed} is not the one that the cache"):
        fit = trainer(tmp_path, [Distillation(CONFIG, teacher=cache)])
        fit.fit(seeded(Plain), DataLoader(keyed, batch_size=8))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (DistillConfig(top_k=3), r"built with top_k=2, the config says 3; write DistillConfig\(top_k=2\)"),
        (DistillConfig(top_k=2, temperature=4.0), r"temperature=2\.0, the config says 4\.0"),
        (DistillConfig(top_k=2, drawn=3), r"built with drawn=0, the config says 3; write DistillConfig\(drawn=0\)"),
        (DistillConfig(top_k=2, hidden={"second": "first"}), r"holds no states of \['first'\]"),
        (DistillConfig(top_k=2, hidden="last"), r"write hidden=layer_map\(student, teacher, 'last'\)"),
        (DistillConfig(top_k=2, attention="last"), r"attention maps \('last'\) are not cached: .*attention=None"),
        (
            DistillConfig(top_k=2, attention={"second": "first"}),
            r"attention maps \(of the teacher's \['first'\]\) are not cached: .*teacher=teacher",
        ),
    ],
)
def test_what_the_cache_does_not_hold_is_refused_when_the_fit_begins(tmp_path, config, message):
    cache, keyed = build(tmp_path / "cache")
    with pytest.raises(ValueError, match=message):
        trainer(tmp_path, [Distillation(config, teacher=cache, student="model")]).fit(
            seeded(Plain), DataLoader(keyed, batch_size=8)
        )


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (DistillConfig(), r"write DistillConfig\(top_k=32\)"),
        (DistillConfig(top_k=2, hidden="uniform"), "a cache needs the names of the teacher's layers"),
        (DistillConfig(top_k=2, attention="last"), r"attention maps \('last'\) are not cached: .*attention=None"),
        (
            DistillConfig(top_k=2, attention={"second": "first"}),
            r"attention maps \(of the teacher's \['first'\]\) are not cached: .*teacher=teacher",
        ),
    ],
)
def test_what_cannot_be_cached_is_refused_before_the_teacher_is_asked(tmp_path, config, message):
    with pytest.raises(ValueError, match=message):
        build(tmp_path, config=config)


def test_another_vocabulary_says_both_sizes(tmp_path):
    cache, keyed = build(tmp_path / "cache", nn.Linear(8, 5))
    with pytest.raises(ValueError, match=r"\(8, 3\) and \(8, 5\).*there are 3 and 5"):
        trainer(tmp_path, [Distillation(CONFIG, teacher=cache)]).fit(seeded(Plain), DataLoader(keyed, batch_size=8))


def test_other_lengths_than_those_of_the_cache_are_an_error(tmp_path):
    class Cuts(AccelModule):
        def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
            cut = int(batch_idx >= self.whole)
            return super().training_step({name: value[:, cut:] for name, value in batch.items()}, batch_idx)

    cache, keyed = build(tmp_path / "cache", llama(), Sentences(), collate_fn=pad)
    for whole, message in (
        (0, r"the student is called with input_ids \(4, 9\), which is not what the data give"),  # each epoch's first
        (1, r"positions of logits for these samples, the student has .*another tokenizer"),
    ):
        module = Cuts(llama())
        module.whole = whole
        with pytest.raises(ValueError, match=message):
            fit = trainer(tmp_path, [Distillation(CONFIG, teacher=cache, student="model")])
            fit.fit(module, DataLoader(keyed, batch_size=4, collate_fn=pad))


def test_a_student_called_twice_has_no_single_answer(tmp_path):
    class Twice(Plain):
        def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
            return F.cross_entropy(self.model(batch[0]), batch[1]) + self.model(-batch[0]).mean()

    cache, keyed = build(tmp_path / "cache")
    with pytest.raises(ValueError, match="calls the student 2 times, and a cache holds one answer a sample"):
        trainer(tmp_path, [Distillation(CONFIG, teacher=cache)]).fit(seeded(Twice), DataLoader(keyed, batch_size=8))


class Around(torch.utils.data.Dataset):
    """Changes samples behind their keys, from the fifth on."""

    def __init__(self, dataset: Any) -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, i: int) -> Any:
        x, y, key = self.dataset[i]
        return (x if i < 4 else x + 1), y, key


class Changes(Plain):
    """What reaches the network is not what the data give."""

    def __init__(self, where: str) -> None:
        super().__init__()
        self.where = where

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        return [batch[0] + torch.randn(8), batch[1]] if self.where == "hook" else batch

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        x, y = batch
        x = {"step": (x - 3) * 2, "shape": x.view(-1, 4).view(len(x), -1)}.get(self.where, x)
        return F.cross_entropy(self.model(x), y)


@pytest.mark.parametrize("where", ["hook", "step", "around", "shape"])
def test_what_is_changed_on_the_way_from_the_data_to_the_student_is_an_error(tmp_path, where):
    cache, keyed = build(tmp_path / "cache")
    loader = DataLoader(Around(keyed) if where == "around" else keyed, batch_size=8, shuffle=True)
    fit = trainer(tmp_path, [Distillation(CONFIG, teacher=cache)])
    if where == "shape":
        fit.fit(seeded(Changes, where), loader)
        assert fit.callback_metrics["accel/distillation/teacher_loss"] > 0
        return
    message = "a Around changes samples after" if where == "around" else (
        r"the student is called with x \(8, 8\), which is not what the data give .*; or give the teacher itself"
    )  # fmt: skip
    with pytest.raises(ValueError, match=message):
        fit.fit(seeded(Changes, where), loader)


class Measured:
    """Points that are computed in the default dtype, with a product that autocast would take."""

    turn = torch.randn(8, 8, generator=torch.Generator().manual_seed(0))

    def __len__(self) -> int:
        return 32

    def __getitem__(self, i: int) -> tuple[torch.Tensor, torch.Tensor]:
        x, y = data()[i]
        return torch.tensor([0.1 * j for j in range(8)]) / 0.17 + x @ self.turn, y


@pytest.mark.parametrize("precision", ["32-true", "64-true", "bf16-true", "bf16-mixed"])
def test_samples_are_read_again_as_the_loader_reads_them_whatever_the_precision(tmp_path, precision):
    teacher = seeded(Perceptron, 24, seed=3)
    with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16-mixed"):
        cache, keyed = build(tmp_path / "cache", teacher, Measured())
    losses = []
    for source in (cache, teacher):
        fit = trainer(tmp_path, [Distillation(CONFIG, teacher=source)], precision=precision)
        torch.manual_seed(3)
        fit.fit(seeded(Plain), DataLoader(keyed, batch_size=8, shuffle=True))
        losses.append(float(fit.callback_metrics["accel/distillation/teacher_loss"]))
    near = {"32-true": 1e-6, "bf16-mixed": 1e-6}.get(precision, 0.2)  # elsewhere inputs of the teachers are rounded
    assert losses[0] == pytest.approx(losses[1], rel=near)


@pytest.mark.parametrize(
    ("batch", "given", "fits"),
    [
        ({"x": 1, "strong": 2}, {"x": 1}, True),
        ({"x": 1, "strong": 2}, {"x": 2}, False),
        ({"x": 1, "strong": 2}, {"image": 2}, True),  # the teacher was asked by the names in its own forward
        ([1, 2, 3], {"x": 1}, True),
        ([1, 2, 3], {"x": 2}, False),
        ([1, 2, 3], {"other": 2, "x": 1}, True),
        ([{"ids": 1, "mask": 2}, 3], {"args": ({"ids": 1, "mask": 2},)}, True),
        ([BatchEncoding({"ids": 1}), 3], {"ids": 2}, False),
        ([BatchEncoding({"ids": 1}), 3], {"ids": 1}, True),
        (1, {"x": 1}, True),
        (1, {"x": 1, "mask": "constant"}, True),
        (1, {"x": 1, "noise": "constant"}, False),
        (1, {"x": 1, "mask": "ones"}, True),
        (1, {"x": 1, "weights": "ones"}, False),
        (1, {"x": 1, "token_type_ids": "zeros"}, True),
        (1, {"x": 1, "position_ids": "range"}, True),
        ({"x": 1, "mask": "zeros"}, {"x": 1, "mask": "ones"}, False),
    ],
)
def test_arguments_are_those_of_the_batch_by_name_or_say_nothing(batch, given, fits):
    constant, zeros = torch.randn(4, generator=torch.Generator().manual_seed(9)), torch.zeros(4, dtype=torch.long)
    known: dict[Any, torch.Tensor] = {"ones": torch.ones(4), "zeros": zeros, "range": torch.arange(4)}
    known |= {i: torch.randn(4, generator=torch.Generator().manual_seed(i)) for i in (1, 2, 3)}

    def tensors(value: Any) -> Any:
        if isinstance(value, dict | BatchEncoding):
            return type(value)({name: tensors(item) for name, item in value.items()})
        return type(value)(map(tensors, value)) if isinstance(value, list | tuple) else known[value].clone()

    given = {name: constant if value == "constant" else tensors(value) for name, value in given.items()}
    constants = [constant] if "mask" in given else []
    if fits:
        check_given(tensors(batch), nn.Identity(), given, constants)
    else:
        with pytest.raises(ValueError, match=r"the student is called with \w+ \(4,\), which is not what the data give"):
            check_given(tensors(batch), nn.Identity(), given, constants)


def test_keys_leave_validation_batches_too_and_an_accel_module_takes_none(tmp_path):
    from torch.utils.data import random_split

    cache, keyed = build(tmp_path / "cache")
    train, held_out = (DataLoader(part, batch_size=8) for part in random_split(keyed, [24, 8]))
    fit = trainer(tmp_path, [Distillation(CONFIG, teacher=cache)])
    fit.fit(seeded(Plain), train, held_out)
    assert fit.callback_metrics["val_loss"] > 0
    module = AccelModule(seeded(Perceptron))
    trainer(tmp_path).validate(module, held_out, verbose=False)
    mappings = Keyed([{"x": x, "labels": y} for x, y in data()])
    trainer(tmp_path).validate(module, DataLoader(mappings, batch_size=8), verbose=False)


def test_batches_that_cannot_carry_keys_say_what_to_write(tmp_path):
    cache, keyed = build(tmp_path)
    with pytest.raises(ValueError, match=r"let the loader make the batches: DataLoader\(data, batch_size=32\)"):
        cache.check_loader(DataLoader(keyed, batch_size=None))
    Batch = namedtuple("Batch", "x y key")
    with pytest.raises(ValueError, match="makes a Batch, a named tuple, of samples and keys"):
        build(tmp_path / "other", collate_fn=lambda s: Batch(*torch.utils.data.default_collate(s)))


def test_a_mask_that_training_step_makes_counts_as_another_input_unless_it_masks_nothing(tmp_path):
    class Makes(AccelModule):
        def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
            mask = torch.ones_like(batch["input_ids"]) if whole else batch["input_ids"] % 2
            return self.model(**batch, attention_mask=mask).loss

    samples = [{"input_ids": row, "labels": row} for row in tiny.ids(8, 6) % 64]
    cache, keyed = build(tmp_path / "cache", llama(), samples)
    for whole in (True, False):
        fit = trainer(tmp_path, [Distillation(CONFIG, teacher=cache, student="model")])
        if whole:
            fit.fit(Makes(llama()), DataLoader(keyed, batch_size=4))
            continue
        with pytest.raises(ValueError, match=r"is called with attention_mask \(4, 6\)|positions of logits"):
            fit.fit(Makes(llama()), DataLoader(keyed, batch_size=4))


def test_what_no_cache_can_hold_is_refused_while_it_is_built(tmp_path):
    class LengthFirst(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.turned, self.head = nn.Linear(1, 2), nn.Linear(16, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            states = self.turned(x.T.unsqueeze(-1))  # [length, batch, width]
            return self.head(states.movedim(1, 0).flatten(1))

    states = DistillConfig(top_k=2, hidden={"second": "turned"})
    with pytest.raises(ValueError, match=r"of 7 samples the teacher gives what 'turned' puts out of shape \(8, 7, 2\)"):
        build(tmp_path / "length", LengthFirst(), data(14), states, batch_size=7)
    for name, message in (("head", "logits are not finite: "), ("first", "hidden states are not finite")):
        teacher = seeded(Perceptron, 24, seed=3)
        getattr(teacher, name).bias.data[0] = torch.nan
        config = STATES if name == "head" else DistillConfig(alpha=0.0, hidden={"second": "first"})
        with pytest.raises(ValueError, match=message):
            build(tmp_path / name, teacher, config=config)


def test_a_progress_bar_is_shown_unless_it_is_not_wanted(tmp_path, capsys):
    build(tmp_path / "quiet")
    assert not capsys.readouterr().out
    build(tmp_path / "shown", progress=True)
    assert "asking the teacher about 32 samples" in capsys.readouterr().out


# --- damage -----------------------------------------------------------------------------------------------------------

KILLED = """
import os, signal, sys
sys.path.insert(0, {tests!r})
from test_distill_cache import *

class Dies(Perceptron):
    calls = 0
    def forward(self, x):
        Dies.calls += 1
        if Dies.calls == 3:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().forward(x)
Dies.__name__ = "Perceptron"
build({path!r}, seeded(Dies, 24, dropout=0.5, seed=3), config=DRAWN)
"""


def test_a_killed_build_continues_and_ends_with_the_same_bytes(tmp_path):
    code = KILLED.format(tests=str(Path(__file__).parent), path=str(tmp_path / "killed"))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, timeout=120)
    assert done.returncode == -9, done.stderr.decode()[-2000:]
    killed = tmp_path / "killed"
    assert json.loads((killed / "cache.json").read_text())["complete"] is False
    with pytest.raises(ValueError, match=r"is incomplete; write TeacherCache\.build\("):
        TeacherCache(killed)
    with open(killed / "logits.values", "ab") as file:
        file.write(b"half a row")
    calls: list[int] = []

    class Counts(Perceptron):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            calls.append(len(x))
            return super().forward(x)

    Counts.__name__ = "Perceptron"
    build(killed, seeded(Counts, 24, dropout=0.5, seed=3), config=DRAWN)
    assert sum(calls) in (16, 24)  # of 32; what was in the file's buffer when it was killed is asked again
    build(tmp_path / "whole", config=DRAWN)
    files = sorted(file.name for file in killed.iterdir())
    assert files == sorted(file.name for file in (tmp_path / "whole").iterdir())
    assert all((killed / name).read_bytes() == (tmp_path / "whole" / name).read_bytes() for name in files)


@pytest.mark.parametrize("name", ["keys", "logits.values", "logits.tail", "logits.lengths", "hidden1.values"])
def test_a_truncated_cache_is_an_error(tmp_path, name):
    build(tmp_path, config=STATES)
    content = (tmp_path / name).read_bytes()
    for damaged in (content[:-4], content + b"1234", b""):
        (tmp_path / name).write_bytes(damaged)
        with pytest.raises(ValueError, match=rf"{name} has \d+ bytes, expected \d+: it is truncated or damaged"):
            TeacherCache(tmp_path)
    (tmp_path / name).unlink()
    with pytest.raises(ValueError, match="has 0 bytes"):
        build(tmp_path, config=STATES)


def test_a_folder_without_a_cache_or_with_a_damaged_manifest_says_so(tmp_path):
    with pytest.raises(ValueError, match=r"holds no cache; write TeacherCache\.build\("):
        TeacherCache(tmp_path)
    (tmp_path / "cache.json").write_text("{")
    with pytest.raises(ValueError, match="is damaged"):
        TeacherCache(tmp_path)
    (tmp_path / "cache.json").write_text('{"format": 99}')
    with pytest.raises(ValueError, match="has format 99, this version reads 2"):
        TeacherCache(tmp_path)


def test_a_full_disk_is_an_error_and_the_build_continues_afterwards(tmp_path):
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1500, before[1]))
    try:
        with pytest.raises(OSError, match=r"could not be written .*run the same line again: it continues") as caught:
            build(tmp_path / "full", config=STATES)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert caught.value.errno == errno.EFBIG
    cache, _ = build(tmp_path / "full", config=STATES)
    build(tmp_path / "whole", config=STATES)
    assert len(cache) == 32
    for file in (tmp_path / "whole").iterdir():
        assert (tmp_path / "full" / file.name).read_bytes() == file.read_bytes()


def test_the_cached_teacher_costs_no_forward_and_little_disk(tmp_path):
    class Forwards(Callback):
        count = 0

    def count(*_: Any) -> None:
        Forwards.count += 1

    teacher = seeded(Perceptron, 24, seed=3)
    cache, keyed = build(tmp_path / "cache", teacher)
    teacher.register_forward_hook(count)
    trainer(tmp_path, [Distillation(CONFIG, teacher=cache)]).fit(seeded(Plain), DataLoader(keyed, batch_size=8))
    assert Forwards.count == 0
    size = sum(file.stat().st_size for file in (tmp_path / "cache").iterdir() if not file.name.endswith("json"))
    assert size == 32 * (2 * 4 + 2 * 4 + 4 + 4 + 8)  # values, indices, tail, length, key


def test_tensors_of_a_tensor_dataset_alone_get_a_key():
    x, key = Keyed(TensorDataset(torch.zeros(3, 2)))[2]
    assert x.shape == (2,) and key % 2**30 == 2
    x, key = Keyed([torch.zeros(2), torch.ones(2)])[1]
    assert x.tolist() == [1.0, 1.0]
    assert split_key([x.unsqueeze(0), torch.tensor([key])])[0].shape == (1, 2)


class Attends(nn.Module):
    """Four numbers of each sample as rows, through attention; its heads are in no weight and no name."""

    def __init__(self, heads: int) -> None:
        super().__init__()
        self.attention, self.head = nn.MultiheadAttention(8, heads, batch_first=True), nn.Linear(8, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        rows = x.unsqueeze(1).expand(-1, 4, -1) * torch.arange(1, 5).view(4, 1)
        return self.head(self.attention(rows, rows, rows)[0].mean(1))


class Scaled(Perceptron):
    """A factor that is no parameter."""

    def __init__(self, factor: float = 1.0, saved: bool = True) -> None:
        super().__init__(24)
        self.factor = factor
        self.register_buffer("shift", torch.full((), factor), persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) * self.factor


def between(activation: nn.Module) -> nn.Sequential:
    return nn.Sequential(nn.Linear(8, 8), activation, nn.Linear(8, 3))


@pytest.mark.parametrize(
    ("make", "settings"),
    [(between, (nn.ReLU(), nn.Tanh())), (between, (nn.LeakyReLU(0.1), nn.LeakyReLU(0.2))), (Attends, (2, 4)),
     (Scaled, (1.0, 2.0))],
    ids=["activation", "slope", "heads", "factor"],
)  # fmt: skip
def test_a_teacher_of_equal_weights_and_other_settings_is_another_teacher(tmp_path, make, settings):
    teachers = [seeded(make, setting, seed=3) for setting in settings]
    assert_same(teachers[0].state_dict(), teachers[1].state_dict())
    build(tmp_path, teachers[0])
    with pytest.raises(ValueError, match=r"another teacher \(its classes, settings or weights differ\)"):
        build(tmp_path, teachers[1])
    build(tmp_path, seeded(make, settings[0], seed=3))


def test_a_transformers_teacher_is_told_by_its_configuration_not_by_its_folder(tmp_path):
    teacher = llama()
    for name in ("here", "there"):
        teacher.save_pretrained(tmp_path / name)
    first, second = (type(teacher).from_pretrained(tmp_path / name) for name in ("here", "there"))
    assert fingerprint(first) == fingerprint(second) == fingerprint(torch.compile(first))
    scaled = tiny.gpt2(scale_attn_by_inverse_layer_idx=True)  # said by the configuration alone
    assert fingerprint(nn.Sequential(scaled)) != fingerprint(nn.Sequential(tiny.gpt2()))
    assert fingerprint(llama(rms_norm_eps=1e-3)) != fingerprint(llama())
    other = llama(rope_parameters={"rope_type": "default", "rope_theta": 500.0})
    assert_same(other.state_dict(), llama().state_dict())
    assert fingerprint(other) != fingerprint(llama())


def test_a_build_that_was_stopped_before_it_said_so_is_completed(tmp_path):
    build(tmp_path)
    manifest = json.loads((tmp_path / "cache.json").read_text())
    (tmp_path / "cache.json").write_text(json.dumps(manifest | {"complete": False}))
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir() if file.name != "cache.json"}
    cache, _ = build(tmp_path)
    assert len(cache) == 32 and json.loads((tmp_path / "cache.json").read_text()) == manifest
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir() if file.name != "cache.json"} == before


def test_a_collate_function_that_mixes_samples_at_random_is_refused(tmp_path):
    def mix(samples: list[Any]) -> Any:
        x, y, keys = torch.utils.data.default_collate(samples)
        return 0.7 * x + 0.3 * x[torch.randperm(len(x))], y, keys

    with pytest.raises(ValueError, match="the collate function gives another batch each time"):
        build(tmp_path, collate_fn=mix)


def test_states_alone_need_alpha_0(tmp_path):
    with pytest.raises(ValueError, match=r"alpha=0\.5 weighs logits, .*write top_k=32, or alpha=0\.0"):
        build(tmp_path, config=DistillConfig(hidden={"second": "first"}))
    cache, keyed = build(tmp_path, config=DistillConfig(alpha=0.0, hidden={"second": "first"}))
    assert cache.read(torch.tensor([keyed[0][-1]])).hidden["first"].shape == (1, 24)


def test_a_layer_that_the_student_has_not_is_named_and_leaves_no_hook(tmp_path):
    cache, keyed = build(tmp_path, config=STATES)
    config, module = DistillConfig(top_k=2, hidden={"secnd": "first"}, hidden_loss="mse"), seeded(Plain)
    with pytest.raises(ValueError, match=r"the student, a Perceptron, has no module 'secnd'.*second"):
        trainer(tmp_path, [Distillation(config, teacher=cache, student="model")]).fit(module, DataLoader(keyed, 8))
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in module.modules())


def test_samples_that_a_key_cannot_join_are_refused():
    Sample = namedtuple("Sample", "x y")
    with pytest.raises(ValueError, match=r"named tuples, which a key cannot join; .*sample\._asdict\(\)"):
        Keyed([Sample(torch.zeros(2), 0)])

    class Own:
        """Noise from a generator that no key can seed."""

        generator = torch.Generator().manual_seed(0)

        def __len__(self) -> int:
            return 4

        def __getitem__(self, i: int) -> Any:
            return torch.randn(2, generator=self.generator), i

    with pytest.raises(ValueError, match="It draws from a generator of its own; draw from torch's"):
        Keyed(Own(), views=4)


def test_what_changes_samples_behind_their_keys_is_refused(tmp_path):
    cache, keyed = build(tmp_path)
    with pytest.raises(ValueError, match=r"a Around changes samples after they were given their keys.*Keyed\(dataset"):
        cache.check_loader(DataLoader(Around(keyed), batch_size=8))
    cache.check_loader(DataLoader(Subset(keyed, [3, 1]), batch_size=2))
    single = Keyed([torch.randn(8) for _ in range(4)])
    assert unchanged(single[2]) and not unchanged((single[2][0] + 1, single[2][1]))
    named = Keyed([{"x": torch.randn(8), "y": 1}])[0]
    assert unchanged(named) and not unchanged({**named, "y": 2}) and unchanged((1, 2))
