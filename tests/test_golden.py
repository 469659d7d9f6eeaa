"""An artifact written once, in format 1, is still read, verified and run."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

from lightning_accel import load
from lightning_accel.engines import portable
from lightning_accel.generate import Cache
from lightning_accel.verify import DriftError, verify_artifact, verify_golden

DATA = Path(__file__).parent / "data"
EXPECTED = json.loads((DATA / "golden.json").read_text())
pytestmark = pytest.mark.skipif(
    portable.unusable(EXPECTED) is not None, reason=f"written by torch {EXPECTED['torch']}, later than this one"
)


def test_the_golden_artifact_is_verified():
    lines = verify_artifact(DATA / "golden")
    assert lines[0] == "files: 4, hashes as written"
    assert len(lines) == 2 and lines[1].startswith("portable: golden inputs again")


def test_a_program_whose_cache_is_wrong_is_drift_although_whole_prompts_are_right(monkeypatch: pytest.MonkeyPatch):
    step = Cache.step

    def forgets(cache: Cache, *inputs: Tensor) -> Tensor:
        for tensor in cache.tensors:
            tensor[:, : cache.filled] = 0.0
        return step(cache, *inputs)

    model = load(DATA / "golden")
    right = verify_golden(model)
    monkeypatch.setattr(Cache, "step", forgets)
    with pytest.raises(DriftError):
        verify_golden(model)
    assert right < 1e-5


def test_the_golden_artifact_generates_the_stored_ids():
    model = load(DATA / "golden")
    assert model.generate(EXPECTED["prompts"], 10).tolist() == EXPECTED["ids"]


def test_the_golden_artifact_gives_each_prompt_alone_what_it_gives_in_a_batch():
    model = load(DATA / "golden")
    alone = [model.generate(prompt, 10)[0].tolist() for prompt in EXPECTED["prompts"]]
    assert alone == EXPECTED["ids"]


def test_the_golden_artifact_is_a_small_one():
    assert sum(file.stat().st_size for file in (DATA / "golden").iterdir()) < 100_000
    assert torch.tensor(EXPECTED["ids"]).shape == (3, 10)
