"""The quality study in its quick form, on the packages it reads, and its statistics on figures made by hand."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import scipy.stats
import torch

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"


@pytest.fixture(autouse=True)
def importable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))


def python(script: str, *arguments: str, timeout: float = 500) -> subprocess.CompletedProcess:
    command = [sys.executable, str(BENCHMARKS / script), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=timeout)


@pytest.fixture(scope="module")
def quick(tmp_path_factory: pytest.TempPathFactory) -> Path:
    fetched = python("real_data.py")
    if fetched.returncode and not os.environ.get("CI"):
        pytest.skip(f"no real data: {fetched.stderr.splitlines()[-1]}")
    assert fetched.returncode == 0, fetched.stderr
    out = tmp_path_factory.mktemp("quality")
    done = python("quality.py", "--quick", "--seeds", "0", "--out", str(out))
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return out


def saved(out: Path, name: str) -> dict:
    return json.loads((out / f"{name}.json".replace(", ", "-")).read_text())


@pytest.mark.slow
def test_each_cell_scores_the_same_held_out_examples(quick: Path) -> None:
    from quality_tasks import TASKS

    for task, schemes in ((name, task.schemes) for name, task in TASKS.items()):
        control = saved(quick, f"{task}/seed0/float")
        assert control["settings"]["test"] == len(control["scores"])
        for scheme in schemes:
            for method in TASKS[task].methods:
                cell = saved(quick, f"{task}/seed0/{method}-{scheme}")
                assert len(cell["scores"]) == len(control["scores"])
                assert cell["settings"] == control["settings"]
                assert cell["share_of_flops"] > 0.9 and cell["bytes"] < 0.3 * cell["float_bytes"]


@pytest.mark.slow
def test_the_language_models_weights_are_read_right(quick: Path) -> None:
    control = saved(quick, "smollm2/seed0/float")
    assert control["before"] < 4.5  # nats a token of a validation block; a wrong layout gives 10
    assert saved(quick, "smollm2/seed0/ptq-int4-weight")["validation"][0] == pytest.approx(control["before"], abs=0.5)


@pytest.mark.slow
def test_finished_cells_are_not_run_again_and_other_settings_are_refused(quick: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in quick.rglob("float.json")}
    again = python("quality.py", "--quick", "--seeds", "0", "--tasks", "minilm", "--out", str(quick))
    assert again.returncode == 0 and "| int8 QAT |" in again.stdout and "not run" not in again.stdout
    assert {path: path.stat().st_mtime_ns for path in quick.rglob("float.json")} == before
    other = python("quality.py", "--seeds", "0", "--tasks", "minilm", "--out", str(quick))
    assert other.returncode == 1 and "was made with other settings" in other.stderr


@pytest.mark.parametrize("task", ["minilm", "smollm2", "cnn"])
def test_a_missing_download_raises_with_the_command(task: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from quality_tasks import TASKS

    monkeypatch.setenv("LIGHTNING_ACCEL_DATA", str(tmp_path))
    with pytest.raises(FileNotFoundError, match=r"run: python benchmarks/real_data\.py "):
        TASKS[task].load(TASKS[task].quick)


def test_splits_are_disjoint_and_the_same_each_time() -> None:
    from quality_tasks import TASKS, shuffled

    settings = TASKS["minilm"].settings
    parts = shuffled(30_000, settings)
    assert [len(part) for part in parts] == [settings.train, settings.validation, settings.test]
    assert len(set().union(*map(set, parts))) == sum(map(len, parts))
    assert parts == shuffled(30_000, settings)


def test_the_interval_is_that_of_paired_differences_over_examples() -> None:
    from quality_report import paired

    differences = torch.randn(1, 400, dtype=torch.float64) * 0.1 + 1
    mean, half = paired(differences)
    assert mean == pytest.approx(differences.mean().item())
    assert half == pytest.approx(1.9659 * differences.std().item() / 20, rel=1e-4)  # t of 399 degrees of freedom


def test_seeds_that_disagree_widen_the_interval() -> None:
    from quality_report import paired

    noise = torch.randn(3, 400, dtype=torch.float64)
    noise = noise - noise.mean(1, keepdim=True)
    alike, apart = paired(noise)[1], paired(noise + torch.tensor([[-1.0], [0.0], [1.0]]))[1]
    error = noise.mean(0).var().item() / 400
    degrees = (error + 1 / 3) ** 2 / (error**2 / 399 + (1 / 3) ** 2 / 2)
    assert 2 < degrees < 2.1 and alike == pytest.approx(1.966 * error**0.5, rel=1e-3)
    assert apart**2 == pytest.approx(scipy.stats.t.ppf(0.975, degrees) ** 2 * (error + 1 / 3))


def test_of_two_seeds_that_differ_the_interval_covers_the_mean_as_often_as_it_says() -> None:
    """Drawn 2,000 times: seeds differ by more than examples do, and 1.96 standard errors would cover 7 in 10."""
    from quality_report import paired

    draw = torch.Generator().manual_seed(0)
    drawn = [torch.randn(2, 50, generator=draw) * 0.1 + torch.randn(2, 1, generator=draw) for _ in range(2000)]
    covered = [abs(mean) <= half for mean, half in map(paired, drawn)]
    assert 0.93 < sum(covered) / len(covered) < 0.97


def test_recovery_is_the_share_of_ptqs_increase_that_qat_does_not_have() -> None:
    from quality_report import recovered

    ptq = 0.2 + 0.01 * torch.randn(3, 100, dtype=torch.float64)
    share, low, high = recovered(ptq, 0.25 * ptq)
    assert share == pytest.approx(0.75) and low == pytest.approx(0.75) and high == pytest.approx(0.75)
    share, low, high = recovered(ptq, 0.05 + 0.01 * torch.randn(3, 100, dtype=torch.float64))
    assert low < 0.75 < high and high - low < 0.05


def test_calibration_batches_hold_no_labels() -> None:
    from quality_tasks import inputs_of

    batch = {"input_ids": torch.zeros(1, 2), "labels": torch.zeros(1, 2)}
    assert list(inputs_of(batch)) == ["input_ids"]
    assert inputs_of((batch["input_ids"], batch["labels"])) is batch["input_ids"]


def test_brown_text_has_no_tags_and_printed_punctuation() -> None:
    from real_data import _untagged

    text = "\tThe/at jury/nn said/vbd ,/, ``/`` No/rb 3//cd evidence/nn ''/'' (/( see/vb )/) ./.\n\n\n"
    assert _untagged(text) == 'The jury said, "No 3/ evidence" (see).'
