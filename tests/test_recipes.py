"""The main job, on its small settings, as its users run it."""

from __future__ import annotations

import json
import runpy
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


@pytest.mark.aoti
def test_the_main_jobs_artifact_is_whole_pruned_and_quantized(quick: Path) -> None:
    manifest = artifact.read_manifest(quick / "model")
    assert [program["engine"] for program in manifest["programs"]] == ["aoti", "portable"]
    assert {coverage["technique"] for coverage in manifest["coverage"]} == {"pruning", "int8 quantization"}
    assert [asset["name"] for asset in manifest["assets"]] == ["tokenizer.json"]
    assert (quick / "report.md").read_text().startswith("| | loss |")


def paragraphs(size: int) -> str:
    """Lines of Python's documentation in paragraphs of 300 characters, `size` characters in all."""
    from pydoc_data.topics import topics

    text = " ".join(" ".join(topics.values()).split())[:size]
    return "\n\n".join(text[i : i + 300] for i in range(0, len(text), 300))


@pytest.mark.parametrize("length", [0, 4_000])
def test_too_short_a_text_is_refused_with_how_much_is_needed(tmp_path: Path, length: int) -> None:
    text = tmp_path / "short.txt"
    text.write_text(paragraphs(length))
    command = [sys.executable, "recipes/gpt.py", "--quick", "--text", str(text), "--out", str(tmp_path / "out")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=100)
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    said = done.stderr.splitlines()[-1]
    assert said.startswith("too little text: ") and "of at least 512 tokens" in said and "30 kB or more" in said


@pytest.mark.parametrize("name", ["QUICK", "FULL"])
def test_as_much_text_as_is_asked_for_is_enough(tmp_path: Path, name: str) -> None:
    recipe = runpy.run_path(str(ROOT / "recipes" / "gpt.py"), run_name="recipe")
    settings, text = recipe[name], tmp_path / "enough.txt"
    with pytest.raises(SystemExit) as caught:
        recipe["require"]({"train": 0}, settings)
    kilobytes = int(str(caught.value).partition("a file of ")[2].partition(" kB")[0])
    text.write_text(paragraphs(1000 * kilobytes))
    parts = recipe["split"](recipe["documents"](text), settings.megabytes)
    tokenizer = recipe["train_tokenizer"](parts["train"], settings.vocabulary, tmp_path / "tokenizer.json")
    recipe["require"]({part: len(recipe["encode"](tokenizer, found)) for part, found in parts.items()}, settings)
