"""The main job, on its small settings, as its users run it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from lightning_accel import artifact

ROOT = Path(__file__).parent.parent
ROWS = {"eager_fp32", "engine_fp32", "artifact"}
FIGURES = {"loss", "perplexity", "prefill_ms", "decode_tokens_per_s", "size_bytes", "peak_rss_bytes", "load_s"}


@pytest.fixture(scope="module")
def quick(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("quick")
    command = [sys.executable, "-m", "lightning_accel.cli", "run", "recipes/gpt.py", "--quick", "--out", str(out)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return out


@pytest.mark.aoti
def test_the_main_job_costs_at_most_3_percent_of_the_controls_loss(quick: Path) -> None:
    report = json.loads((quick / "report.json").read_text())
    assert all(report[row].keys() >= FIGURES for row in ROWS)
    assert report["engine_fp32"]["loss"] == pytest.approx(report["eager_fp32"]["loss"], rel=1e-4)
    assert report["artifact"]["loss"] <= 1.03 * report["engine_fp32"]["loss"]
    assert report["quantized_share_of_flops"] > 0.8
    assert report["artifact"]["size_bytes"] <= 0.45 * report["eager_fp32"]["size_bytes"]  # code is much of a tiny model


@pytest.mark.aoti
def test_the_main_jobs_artifact_is_whole_pruned_and_quantized(quick: Path) -> None:
    manifest = artifact.read_manifest(quick / "model")
    assert [program["engine"] for program in manifest["programs"]] == ["aoti", "portable"]
    assert {coverage["technique"] for coverage in manifest["coverage"]} == {"pruning", "int8 quantization"}
    assert [asset["name"] for asset in manifest["assets"]] == ["tokenizer.json"]
    assert (quick / "report.md").read_text().startswith("| | loss |")
