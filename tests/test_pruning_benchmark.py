"""The pruning study on small networks and random data: its cells, its tables, what it says of a saliency."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from torch import nn
from torch.nn import functional as F

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"


class Classes(nn.Module):
    """Attention of four heads and a feed-forward block over embedded tokens, three classes."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.qkv, self.out = nn.Embedding(tiny.VOCABULARY, 16), nn.Linear(16, 48), nn.Linear(16, 16)
        self.block, self.head = nn.Sequential(nn.Linear(16, 48), nn.ReLU(), nn.Linear(48, 16)), nn.Linear(16, 3)

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        x = self.embed(input_ids)
        q, k, v = self.qkv(x).view(*x.shape[:2], 3, -1, 4).permute(2, 0, 3, 1, 4)
        mask = attention_mask[:, None, None].bool()
        x = x + self.out(F.scaled_dot_product_attention(q, k, v, mask).transpose(1, 2).flatten(2))
        return self.head((x + self.block(x)).mean(1))


@pytest.fixture(scope="module")
def study() -> Any:
    """The runner, with three tasks of small networks and random data in place of its own."""
    patch = pytest.MonkeyPatch()
    patch.syspath_prepend(str(BENCHMARKS))
    import pruning
    import pruning_tasks as p
    import quality_tasks as q

    settings = q.Settings(train=32, validation=8, test=32, epochs=1, batch=8, lr=1e-3, begin=0.0, calibration=2)

    def batches(n: int, seed: int, kind: str) -> list[Any]:
        found = []
        for k in range(n // settings.batch):
            if kind == "image":
                x = torch.randn(settings.batch, 1, 28, 28, generator=torch.Generator().manual_seed(97 * seed + k))
                found.append((x, (x.mean((1, 2, 3)) > 0).long()))
                continue
            ids = tiny.ids(settings.batch, 12, seed=97 * seed + k)
            labels = ids if kind == "text" else ids[:, 0] % 3
            found.append({"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels})
        return found

    def task(title: str, build: Any, kind: str) -> Any:
        def load(settings: Any) -> Any:
            held_out = (batches(n, seed, kind) for n, seed in ((settings.validation, 51), (settings.test, 52)))
            return q.Data(lambda seed: batches(settings.train, 60 + seed, kind), *held_out)

        return q.Task(title, (), settings, settings, load, build, loss=kind == "text")

    made = {
        "minilm": task("classes", Classes, "class"),
        "smollm2": task("text", lambda: tiny.llama(num_hidden_layers=4), "text"),
        "cnn": task("images", q.build_cnn, "image"),
    }
    for name, own in made.items():
        patch.setitem(q.TASKS, name, own)
        patch.setitem(p.TASKS, name, dataclasses.replace(
            p.TASKS[name], settings=settings, quick=settings, rates=(1e-3, 3e-3) if name == "minilm" else (1e-3,),
            amounts=(0.25, 0.5) if name == "minilm" else p.TASKS[name].amounts, length=12))  # fmt: skip
    yield pruning
    patch.undo()


@pytest.fixture(scope="module")
def out(study: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All cells of seed 0, and one task's of seed 1."""
    folder = tmp_path_factory.mktemp("pruning")
    study.run_all(["minilm", "smollm2"], [0], folder, quick=True)
    study.run_all(["minilm"], [1], folder, quick=True)
    return folder


def cell(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text())


def test_each_saliency_has_the_same_cells_and_the_tuning_budget_of_random(study: Any, out: Path) -> None:
    names = {path.name for path in (out / "minilm" / "seed0").iterdir()}
    for saliency in ("l2", "taylor", "random"):
        rates = {f"{saliency}-0.5-lr0.001.json", f"{saliency}-0.5-lr0.003.json"}
        assert {n for n in names if n.startswith(saliency)} == rates | {f"{saliency}-0.25.json"}
    assert {p.name for p in (out / "minilm" / "seed1").iterdir()} == {
        "dense.json", "l2-0.5.json", "taylor-0.5.json", "random-0.5.json"
    }  # fmt: skip
    best = study.chosen("minilm", "random", out)["lr"]
    assert cell(out / "minilm" / "seed1" / "random-0.5.json")["lr"] == best


def test_the_share_of_flops_is_gone_from_the_network_that_is_scored(out: Path) -> None:
    for amount in (0.25, 0.5):
        path = next((out / "minilm" / "seed0").glob(f"taylor-{amount}*.json"))
        found = cell(path)
        assert 1 - found["left"]["flops"] / found["dense"]["flops"] == pytest.approx(amount, abs=0.09)
        assert found["left"]["flops"] <= (1 - amount) * found["dense"]["flops"] * 1.001
        assert len(found["scores"]) == 32 and found["left"]["bytes"] < found["dense"]["bytes"]


def test_half_of_the_channels_are_gone(study: Any, tmp_path: Path) -> None:
    task = study.TASKS["cnn"]
    found = study.run(study.Cell("cnn", "l2", 0.5, 0, 1e-3), task, task.quick, tmp_path)
    assert found["shapes"]["0.0.weight"] == [16, 1, 3, 3] and found["shapes"]["6.weight"] == [10, 48]


def test_the_widths_are_those_of_the_amount_whatever_the_saliency(out: Path) -> None:
    widths = [cell(out / "minilm" / "seed0" / f"{s}-0.25.json")["shapes"] for s in ("l2", "taylor", "random")]
    assert widths[0] == widths[1] == widths[2]


def test_depth_and_width_leave_sixty_percent_of_the_parameters_and_the_same_shape_from_random(out: Path) -> None:
    folder = out / "smollm2" / "seed0"
    for variant in ("depth", "width"):
        learned, fresh = (cell(folder / f"{name}-0.4-lr0.001.json") for name in (variant, f"{variant}-random-weights"))
        assert learned["shapes"] == fresh["shapes"]
        assert 0.4 < learned["left"]["parameters"] / learned["dense"]["parameters"] <= 0.6
        assert learned["start"] != fresh["start"]
        assert len(learned["start"]) == len(learned["scores"]) == 32
    assert cell(folder / "dense-lr0.001.json")["left"] == cell(folder / "dense-lr0.001.json")["dense"]


def test_finished_cells_are_not_run_again_and_other_settings_are_refused(
    study: Any, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*.json")}
    study.run_all(["minilm", "smollm2"], [0], out, quick=True)
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*.json")} == before
    task = study.TASKS["minilm"]
    other = dataclasses.replace(task, quick=dataclasses.replace(task.quick, batch=4))
    monkeypatch.setitem(study.TASKS, "minilm", other)
    with pytest.raises(SystemExit, match="was made with other settings"):
        study.run_all(["minilm"], [0], out, quick=True)


def test_latency_is_measured_once_for_the_shapes_of_the_cells_and_plotted(study: Any, out: Path) -> None:
    assert "not measured" in study.tables(["minilm"], [0, 1], out)
    study.measure_latency("minilm", out, quick=True)
    path = out / "minilm" / "latency" / "latency.json"
    measured = cell(path)
    assert set(measured["amounts"]) == {"0", "0.25", "0.5"} and measured["machine"]["threads"] == 1
    assert all(amount["median"] > 0 and amount["n"] == 3 for amount in measured["amounts"].values())
    text = study.tables(["minilm"], [0, 1], out)
    assert "not measured" not in text and "| dense | 100.0% | 100.0% |" in text
    assert (out / "minilm" / "latency.png").read_bytes().startswith(b"\x89PNG")
    written = path.stat().st_mtime_ns
    study.measure_latency("minilm", out, quick=True)
    assert path.stat().st_mtime_ns == written


def test_latencies_of_other_shapes_are_refused(study: Any, out: Path) -> None:
    from pruning_report import report

    task = study.TASKS["minilm"]
    found = {("l2", 0.25, 0): study.saved("minilm", "l2", 0.25, 0, out)}
    times = {"amounts": {a: {"median": 1.0, "shapes": {}} for a in ("0", "0.25")}, "machine": {}}
    with pytest.raises(SystemExit, match="not those whose latency was measured"):
        report(task, found, times, loss=False)


@pytest.mark.parametrize(("gain", "said"), [(0.2, "beats random"), (0.0, "**does not beat** random")])
def test_a_saliency_that_does_not_beat_random_is_said_to(study: Any, gain: float, said: str) -> None:
    from pruning_report import report

    draw = torch.Generator().manual_seed(0)

    def made(share: float, seed: int) -> dict[str, Any]:
        right = (torch.rand(2000, generator=draw) < share).double().tolist()
        sizes = {"parameters": 1.0, "flops": 1.0}
        rest = {"settings": {}, "machine": {}, "versions": {}, "lr": 1e-3, "seconds": 1.0, "shapes": {}}
        return {"scores": right, "left": sizes, "dense": sizes, **rest}

    shares = {"dense": 0.8, "taylor": 0.6 + gain, "random": 0.6}
    found = {(v, 0.5, seed): made(share, seed) for v, share in shares.items() for seed in range(3)}
    text = report(study.TASKS["cnn"], found, None, loss=False)
    (line,) = (line for line in text.splitlines() if line.startswith("- taylor, 50% gone"))
    assert said in line
    assert not any(line.startswith("- random") for line in text.splitlines())


@pytest.mark.slow
def test_the_quick_form_runs_on_the_packages_that_it_reads(tmp_path: Path) -> None:
    fetched = subprocess.run([sys.executable, str(BENCHMARKS / "real_data.py")], capture_output=True, text=True)
    if fetched.returncode and not os.environ.get("CI"):
        pytest.skip(f"no real data: {fetched.stderr.splitlines()[-1]}")
    assert fetched.returncode == 0, fetched.stderr
    command = [sys.executable, str(BENCHMARKS / "pruning.py"), "--quick", "--seeds", "0", "--out", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert "| depth, 40% gone |" in done.stdout and "| taylor, 50% gone |" in done.stdout
