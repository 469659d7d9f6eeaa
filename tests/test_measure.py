"""Worker processes: turns, figures, and what happens when one fails."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_accel.measure import Spread, Target, compare, machine, size_on_disk, versions


def test_two_targets_take_turns_and_the_first_round_does_not_count() -> None:
    said: list[str] = []
    targets = {"a": Target("toys:counting", {"start": 7}), "b": Target("toys:counting")}
    measured = compare(targets, rounds=3, repeat=2, progress=said.append)
    assert list(measured) == ["a", "b"]
    assert measured["a"].seconds["first"] == Spread(median=5.5, least=3.0, most=8.0, n=6), "1 and 2 were the warm-up"
    assert measured["a"].seconds["second"] == Spread(7.0, 7.0, 7.0, 6) and measured["b"].seconds["second"].median == 0.0
    assert measured["a"].rounds == {"first": [3.5, 5.5, 7.5], "second": [7.0, 7.0, 7.0]}
    turns = [message for message in said if message.startswith("measuring")]
    assert turns == [f"measuring {name}, round {turn} of 3" for turn in range(4) for name in "ab"]
    assert measured["a"].load_s > 0 and measured["a"].peak_rss_bytes > 50e6


def test_workers_have_the_threads_that_are_asked_for() -> None:
    for threads in (1, 2):
        assert compare({"a": Target("toys:threads")}, threads=threads, rounds=1)["a"].seconds["threads"].most == threads


def test_peak_memory_is_of_the_worker_alone() -> None:
    measured = compare({"a": Target("toys:hungry"), "b": Target("toys:threads")}, rounds=1, repeat=1)
    assert measured["a"].peak_rss_bytes - measured["b"].peak_rss_bytes > 250e6


def test_a_target_may_print_more_than_a_pipe_holds() -> None:
    assert compare({"a": Target("toys:talkative")}, rounds=1, repeat=1)["a"].seconds["talk"].median == 1.0


@pytest.mark.parametrize(
    ("source", "cause"),
    [
        ("toys:broken", "LookupError: no weights of that name"),
        ("toys:failing", "StopIteration"),
        ("no/such/directory", "is not an artifact"),
    ],
)
def test_a_worker_that_fails_is_a_clear_error_with_what_it_printed(source: str, cause: str) -> None:
    with pytest.raises(RuntimeError, match=rf"(?s)the worker for {source} stopped:.*Traceback.*{cause}"):
        compare({"bad": Target(source)}, rounds=2)


def test_a_target_that_does_not_exist_is_named_and_stops_the_others() -> None:
    with pytest.raises(RuntimeError, match=r"(?s)the worker for toys:absent stopped:.*has no attribute 'absent'"):
        compare({"good": Target("toys:counting"), "bad": Target("toys:absent")})


def test_a_short_model_is_measured_within_its_positions(decoder: Path) -> None:
    measured = compare({"a": Target(str(decoder))}, rounds=1, repeat=1)["a"]
    assert set(measured.seconds) == {"prefill", "decode"} and min(s.least for s in measured.seconds.values()) > 0


def test_a_module_is_measured_on_its_golden_inputs(network: Path) -> None:
    measured = compare({"a": Target(str(network), engine="portable")}, rounds=1, repeat=1)["a"]
    assert set(measured.seconds) == {"forward"}


def manifest_of(directory: Path) -> dict[str, Any]:
    return json.loads((directory / "manifest.json").read_text())


def test_sizes_count_all_that_the_default_load_needs(decoder: Path) -> None:
    sizes = size_on_disk(decoder, manifest := manifest_of(decoder))
    needed = ["manifest.json", "decoder.portable.pt2", "weights.safetensors", "tokenizer.json"]
    assert sizes == {"default_load_bytes": sum((decoder / name).stat().st_size for name in needed)}
    assert manifest["sizes"] == sizes, "the manifest's own size included"


def test_machine_and_versions_stand_beside_every_figure() -> None:
    assert versions()["torch"] == torch.__version__ and set(versions()) >= {"torchao", "lightning", "transformers"}
    here = machine(threads=3)
    assert here["threads"] == 3 and here["cores"] >= 1 and here["cpu"] and isinstance(here["vnni"], bool)
