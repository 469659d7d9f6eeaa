"""The distillation study on small models and scikit-learn's digits, so without downloads; with them, in its quick form.

The toys go through the whole runner: fits, cells, the choice of a learning rate, exports, timings, tables.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import mean
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import WhisperConfig, WhisperForConditionalGeneration

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
pytestmark = pytest.mark.filterwarnings("ignore")
PROMPT, END, VOCABULARY = (12, 13), 11, 16
WORDS = ["one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "press"]  # ids 0 to 10


@pytest.fixture(autouse=True)
def importable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))


# --- digits -----------------------------------------------------------------------------------------------------------


class Block(nn.Module):
    """x + two linear layers of it."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.relu(self.up(x)))


class Net(nn.Module):
    """Digits to classes."""

    def __init__(self, blocks: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block(64) for _ in range(blocks))
        self.head = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def digits(settings: Any) -> Any:
    from distillation_tasks import Examples, in_turn
    from quality_tasks import shuffled
    from sklearn.datasets import load_digits

    x, y = load_digits(return_X_y=True)
    images, classes = torch.tensor(x, dtype=torch.float32) / 16, torch.tensor(y)
    train, *held_out = shuffled(len(x), settings)
    batches = [[{"x": images[part], "labels": classes[part]}] for part in held_out]
    examples = [{"x": images[i], "labels": int(classes[i])} for i in train]
    return Examples(examples, partial(in_turn, len(train)), None, *batches)


def digits_task(methods: dict[str, Any], **options: Any) -> Any:
    from distillation_tasks import ACCURACY, Source, Task
    from quality_tasks import TASKS, Settings, scores

    settings = Settings(train=640, validation=200, test=400, epochs=2, batch=32, lr=3e-3, begin=0.0)
    quick = replace(settings, train=320, epochs=1)
    score = partial(scores, TASKS["minilm"])
    source = Source("digits", settings, quick, digits, lambda: Net(4), score, ACCURACY)
    config = soft()
    return Task("two blocks, digits", source, lambda teacher: Net(2), 3, (1e-3, 3e-3), config, top_k=4,
                methods=methods, **options)  # fmt: skip


def soft() -> Any:
    from lightning_accel import DistillConfig

    return DistillConfig(temperature=2.0, alpha=0.7)


def read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text())


def test_every_method_is_tried_at_every_rate_and_the_best_on_validation_is_used(tmp_path: Path) -> None:
    from distillation import chosen, report, run_all
    from distillation_tasks import DRAWN, METHODS, Fit

    methods = METHODS | {DRAWN: (Fit("drawn"),)}
    tasks = {"digits": digits_task(methods)}
    run_all(tasks, [0, 1], tmp_path, quick=True)
    for method in methods:
        name = method.replace(" ", "")
        tried = [read(tmp_path / "digits/seed0" / f"{name}-{lr}.json") for lr in ("0.001", "0.003")]
        best = max(tried, key=lambda cell: mean(cell["validation"]))
        used = read(tmp_path / "digits/seed1" / f"{name}.json")
        assert chosen("digits", tasks["digits"], method, tmp_path)["lr"] == best["lr"] == used["lr"]
        assert len(used["scores"]) == 400 and used["teacher scores"] > 0.5
        assert used["bytes"] < 0.6 * used["teacher_bytes"]
    table = report(tasks, [0, 1], tmp_path)
    assert "| none | " in table and "±" in table.split("| cached | ")[1].split("\n")[0]
    ends = {path.stem: read(path)["objective"] for path in (tmp_path / "digits/seed0").glob("*.json")}
    assert all(0 < end < 3 for end in ends.values()) and all(
        f"batches, {method} against logits: +" in table.replace("-", "+") for method in ("cached", DRAWN)
    )
    taught = [ends[f"{name}-0.003"] for name in ("logits", "cached", "cached+drawn")]
    assert max(taught) < ends["none-0.003"], "what they minimize and it does not"
    assert "Validation split, seed 0, at rates of 0.001, 0.003: none " in table and "15 cells" in table
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.json")}
    run_all(tasks, [0, 1], tmp_path, quick=True)
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.json")} == before, "nothing ran twice"
    with pytest.raises(SystemExit, match="was made with other settings"):
        run_all(tasks, [0, 1], tmp_path, quick=False)


def test_cells_of_a_seed_share_start_batches_and_steps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import distillation as d
    from distillation_tasks import ONE_FIT

    task, seen = digits_task(ONE_FIT), {}
    settings = d.settings_of(task, quick=True)
    real = d.fit_on

    def fit_on(model: nn.Module, training: Any, loader: Any, seed: int, *callbacks: Any) -> None:
        first = next(iter(model.parameters())).detach().clone()
        seen.setdefault(method, []).append((first, [*loader.batch_sampler], [type(c).__name__ for c in callbacks]))
        real(model, training, loader, seed, *callbacks)

    d.teacher_of(task, 0, settings, tmp_path)
    monkeypatch.setattr(d, "fit_on", fit_on)
    for method in ("none", "one fit", "three fits"):
        d.run(d.Cell("digits", method, 0, 1e-3), task, settings, tmp_path)
    assert all(torch.equal(seen[name][0][0], seen["none"][0][0]) for name in seen)
    batches = {name: [batch for _, part, _ in fits for batch in part] for name, fits in seen.items()}
    assert batches["one fit"] == batches["none"] == batches["three fits"]
    assert [len(part) for _, part, _ in seen["three fits"]] == [10, 10, 10]
    assert [names for _, _, names in seen["three fits"]] == [
        ["Distillation"], ["Pruning"], ["QuantizationAwareTraining"]
    ]  # fmt: skip
    assert [names for _, _, names in seen["one fit"]] == [
        ["Distillation", "Pruning", "QuantizationAwareTraining"]
    ]  # fmt: skip


def test_one_fit_and_three_end_in_the_same_deployed_model_which_is_exported_and_timed(tmp_path: Path) -> None:
    from distillation import report, run_all
    from distillation_latency import measure
    from distillation_tasks import ONE_FIT

    from lightning_accel import load
    from lightning_accel.select import count_parameters

    example = {"8": {"x": torch.randn(8, 64, generator=torch.Generator().manual_seed(0))}}
    methods = {name: ONE_FIT[name] for name in ("one fit", "three fits", "none")}
    task = replace(digits_task(methods, control="one fit", example=example), rates=(3e-3,))
    with pytest.raises(FileNotFoundError, match="'none' of digits has not been trained at all of its rates"):
        measure("digits", task, tmp_path, 1)
    run_all({"digits": task}, [0], tmp_path, quick=True)
    one, three, plain = (read(tmp_path / f"digits/seed0/{name}-0.003.json") for name in ("onefit", "threefits", "none"))
    assert one["bytes"] == three["bytes"] < 0.2 * plain["bytes"]  # half of the neurons, a byte a weight
    models = {name: torch.load(tmp_path / f"digits/seed0/{name}-0.003.pt", weights_only=False)
              for name in ("onefit", "threefits", "none")}  # fmt: skip
    assert count_parameters(models["onefit"]) == count_parameters(models["threefits"])
    assert models["onefit"].blocks[1].up.weight.shape == models["threefits"].blocks[1].up.weight.shape == (64, 64)
    (path,) = measure("digits", task, tmp_path, 1, engines=("portable",), rounds=1)
    table = read(path)["table"]
    assert all(f"| {name} | " in table for name in methods) and "threads 1" in table
    loaded = load(tmp_path / "digits/artifacts/onefit-8", engine="portable")
    assert loaded(**example["8"]).shape == (8, 10)
    (again,) = measure("digits", task, tmp_path, 1, engines=("portable",))
    assert read(again)["table"] == table, "nothing was measured twice"
    said = report({"digits": task}, [0], tmp_path)
    assert "gain over one fit, 95 %" in said and table.splitlines()[2] in said


# --- speech -----------------------------------------------------------------------------------------------------------


def whisper() -> WhisperForConditionalGeneration:
    """A small English Whisper, random, whose answers differ from clip to clip."""
    torch.manual_seed(0)
    sizes = {"d_model": 32, "encoder_layers": 1, "decoder_layers": 4, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48}
    ids = {"pad_token_id": END, "bos_token_id": END, "eos_token_id": END, "decoder_start_token_id": PROMPT[0]}
    heads = {"encoder_attention_heads": 4, "decoder_attention_heads": 4}
    limits = {"max_target_positions": 200, "max_source_positions": 50, "vocab_size": VOCABULARY}
    never = {"suppress_tokens": [3, *PROMPT, 14, 15], "begin_suppress_tokens": [5, END]}
    model = WhisperForConditionalGeneration(WhisperConfig(**sizes, **ids, **heads, **limits)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0.0, 0.3)
    model.generation_config.update(**never)
    return model


def spell(ids: list[int]) -> str:
    return " ".join(WORDS[i] for i in ids)


def spoken(settings: Any) -> Any:
    """Random states; what is said in a clip is what the teacher hears, but for the last word."""
    from distillation_speech import SpeechDecoder, collate, in_batches, sample
    from distillation_tasks import Examples, in_turn

    states = torch.randn(settings.train + 12, 50, 32, generator=torch.Generator().manual_seed(1))
    heard = SpeechDecoder(whisper(), PROMPT, END).transcribe(states, longest=5)
    texts = [spell([*ids[:-1], (ids[-1] + 1) % 11]) for ids in heard]
    encode = lambda text: [WORDS.index(word) for word in text.split()]  # noqa: E731
    train = [sample(s, t, encode, PROMPT, END) for s, t in zip(states, texts, strict=True)][:-12]
    held_out = [in_batches(states[k : k + 6], texts[k : k + 6], 4) for k in (settings.train, settings.train + 6)]
    return Examples(train, partial(in_turn, len(train)), collate, *held_out)


def test_transcribing_with_a_cache_is_decoding_the_whole_each_time_and_rows_are_independent() -> None:
    from distillation_speech import SpeechDecoder

    model = SpeechDecoder(whisper(), PROMPT, END)
    states = torch.randn(6, 50, 32, generator=torch.Generator().manual_seed(2))
    found = model.transcribe(states, longest=12)
    assert len({tuple(ids) for ids in found}) > 1, "the clips differ"
    for row, ids in enumerate(found):
        assert model.transcribe(states[row : row + 1], longest=12) == [ids]
        for k in range(min(len(ids) + 1, 12)):
            logits = model(states[row : row + 1], torch.tensor([[*PROMPT, *ids[:k]]]))[0, -1].detach()
            logits[[3, *PROMPT, 14, 15, *([5, END] if k == 0 else [])]] = -torch.inf
            assert int(logits.argmax()) == (ids[k] if k < len(ids) else END)


def test_prompt_and_padding_are_no_labels() -> None:
    from distillation_speech import collate, sample

    states = torch.zeros(2, 3)
    samples = [sample(states, text, lambda t: [WORDS.index(w) for w in t.split()], PROMPT, END) for text in ("two", "")]
    batch = collate(samples)
    assert batch["decoder_input_ids"].tolist() == [[12, 13, 1], [12, 13, 11]]
    assert batch["labels"].tolist() == [[-100, 1, 11], [-100, 11, -100]]
    assert batch["states"].shape == (2, 2, 3)


def test_half_of_the_decoder_is_its_first_and_last_layers_and_hears_with_the_teachers_words(tmp_path: Path) -> None:
    from distillation import report, run_all
    from distillation_speech import SpeechDecoder, half_of_the_decoder, scores
    from distillation_tasks import WER, Source, Task, some
    from quality_tasks import Settings
    from word_errors import word_errors

    teacher = SpeechDecoder(whisper(), PROMPT, END)
    student = half_of_the_decoder(teacher)
    assert len(student.decoder.layers) == 2 and len(teacher.decoder.layers) == 4
    for own, other in ((0, 0), (1, 3)):
        pairs = zip(student.decoder.layers[own].parameters(), teacher.decoder.layers[other].parameters(), strict=True)
        assert all(torch.equal(a, b) and a is not b for a, b in pairs)
    assert student.head.weight is student.decoder.embed_tokens.weight, "still tied"
    settings = Settings(train=12, validation=6, test=6, epochs=0, batch=4, lr=0.0, begin=0.0)
    source = Source("toy", settings, settings, spoken, lambda: SpeechDecoder(whisper(), PROMPT, END),
                    partial(scores, spell), WER, tuned=False)  # fmt: skip
    methods = {"as it starts": ()} | some("none", "logits + hidden", "cached")
    task = Task("toy", source, half_of_the_decoder, 2, (3e-3,), soft(), "decoder", 4, methods)
    run_all({"toy": task}, [0], tmp_path, quick=True)
    found = {name: read(tmp_path / f"toy/seed0/{name.replace(' ', '')}-0.003.json") for name in methods}
    held_out = spoken(settings).test
    pairs = [word_errors(text, spell(ids)) for batch in held_out
             for text, ids in zip(batch["texts"], student.transcribe(batch["states"]), strict=True)]  # fmt: skip
    errors, words = zip(*pairs, strict=True)
    assert mean(found["as it starts"]["scores"]) == pytest.approx(sum(errors) / sum(words), abs=1e-5)
    assert found["none"]["fit_seconds"] > 0
    assert all(len(cell["scores"]) == 6 for cell in found.values())
    said, kept = report({"toy": task}, [0], tmp_path), sorted(found["none"]["scores"])[:3]
    assert "| toy | WER % | gain over none, 95 % |" in said
    assert "Without the 3 worst clips of each cell: " in said and f"; none {100 * mean(kept):.2f}" in said


# --- the real tasks ---------------------------------------------------------------------------------------------------


def test_the_tasks_are_those_of_the_study_with_a_control_and_an_equal_budget_each() -> None:
    from distillation import cells
    from distillation_tasks import tasks

    every = tasks()
    assert {"minilm-3", "minilm-2-half", "smollm2-quarter", "fashion-cnn", "whisper-2", "one-fit"} == set(every)
    for name, task in every.items():
        assert task.control in task.methods and (len(task.rates) >= 2 or name == "one-fit")
        found = list(cells({name: task}, [0, 1, 2]))
        assert len(found) == len({cell.path(Path()) for cell in found})
        trained = [method for method, fits in task.methods.items() if fits]
        assert {sum(cell.method == method for cell in found) for method in trained} == {len(task.rates) + 2}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("script", "task"),
    [*(("distillation.py", name) for name in ("minilm-3", "smollm2-quarter", "fashion-cnn", "whisper-2", "one-fit")),
     ("compressed.py", "minilm")],
)  # fmt: skip
def test_the_quick_form_runs_on_the_real_files(script: str, task: str, tmp_path: Path) -> None:
    def python(script: str, *arguments: str) -> subprocess.CompletedProcess:
        command = [sys.executable, str(BENCHMARKS / script), *arguments]
        return subprocess.run(command, capture_output=True, text=True, timeout=500)

    fetched = python("real_data.py")
    if fetched.returncode and not os.environ.get("CI"):
        pytest.skip(f"no real data: {fetched.stderr.splitlines()[-1]}")
    assert fetched.returncode == 0, fetched.stderr
    seeds = ["--seeds", "0"] if script == "distillation.py" else []
    done = python(script, "--quick", "--tasks", task, *seeds, "--out", str(tmp_path))
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert "not run" not in done.stdout and "test examples, seeds [0]" in done.stdout
