"""Contract 10: under DDP masks, phases and choices are those of rank 0, and a failure is everybody's."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import Perceptron, Plain, assert_same, data, loader, seeded, trainer, weights
from two_ranks import DISTILL

import lightning_accel
from lightning_accel import Distillation


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """What two ranks report of a fit, of the same fit resumed after its first epoch, and of one whose export fails."""
    path = tmp_path_factory.mktemp("ranks")
    script = Path(__file__).with_name("two_ranks.py")
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PL_")} | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, script, path], env=environment, timeout=300, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return path, [torch.load(path / f"rank{rank}.pt", weights_only=True) for rank in range(2)]


def test_masks_phases_and_choices_are_identical_on_both_ranks(ranks):
    _, (one, other) = ranks
    one, other = one["whole"], other["whole"]
    assert (one["rank"], other["rank"], one["world"], other["world"]) == (0, 1, 2, 2)
    assert one["error"] is None and other["error"] is None
    assert_same(one["masks"], other["masks"])
    assert_same(one["weights"], other["weights"])
    assert one["prepared"] and other["prepared"]
    assert int(one["masks"]["model.first.bias"].sum()) == 8


def test_both_ranks_time_and_the_choice_of_rank_0_is_taken_by_both(ranks):
    _, (one, other) = ranks
    assert (one["timed"], other["timed"]) == (1, 1)
    assert one["whole"]["choice"] == other["whole"]["choice"]
    assert one["whole"]["choice"]["precision"] == "bf16"  # rank 1 measured otherwise


def test_a_step_in_which_the_ranks_wait_for_each_other_is_timed_as_often_on_each(ranks):
    _, (one, other) = ranks
    timed, trained = 6 * 2, 4  # rounds of two candidates; batches
    for rank in (one, other):
        assert rank["timing waits"]["gathered"] == [(2, 8, 8)] * (timed + trained)
    assert one["auto"] == other["auto"] and set(one["auto"]["seconds"]) == {"fp32", "bf16"}
    assert_same(one["timing waits"]["weights"], other["timing waits"]["weights"])


def test_an_export_runs_a_step_with_all_gather_on_rank_0_alone(ranks):
    path, (one, other) = ranks
    assert other["export alone"]["gathered"] == [(2, 8, 8)] * 4
    assert set(one["export alone"]["gathered"][4:]) == {(8, 8)}
    manifest = json.loads((path / "alone" / "manifest.json").read_text())
    assert "loss (artifact)" in {metric["name"] for metric in manifest["metrics"]}


def test_the_export_happens_once_and_computes_what_was_trained(ranks):
    path, (one, other) = ranks
    assert one["whole"]["reports"] == [True, True] and other["whole"]["reports"] == [False, False]
    x = data(16)[:][0]
    network, whole = (lightning_accel.load(path / "first" / name) for name in ("network", "whole"))
    assert torch.equal(network(x), whole(x))
    manifest = json.loads((path / "first" / "whole" / "manifest.json").read_text())
    assert manifest["programs"][0]["inputs"][0]["shape"][1:] == [8]  # forward's input, not training_step's batch
    assert not list((path / "first").glob(".*"))


def test_a_resumed_fit_is_bitwise_the_same_on_both_ranks(ranks):
    _, both = ranks
    for one in both:
        assert one["timed again"] == 0
        assert_same(one["resumed"]["masks"], one["whole"]["masks"])
        assert_same(one["resumed"]["weights"], one["whole"]["weights"])


def test_a_failed_export_on_rank_0_raises_on_both_and_hangs_nobody(ranks):
    path, both = ranks
    for one in both:
        assert "ExportError: the export failed: OSError: no space left, says the test" in one["failed"]["error"]
        assert "lightning_accel.export_model(model, " in one["failed"]["error"]
    assert sorted(p.name for p in (path / "third").iterdir()) == ["epoch=0.ckpt", "epoch=1.ckpt", "network.ckpt"]


def test_a_checkpoint_that_rank_0_cannot_write_raises_on_both_and_hangs_nobody(ranks):
    path, both = ranks
    for one in both:
        assert one["unsaved"].startswith(
            f"ExportError: the checkpoint {path / 'fourth' / 'model.ckpt'} cannot be written"
        )
    assert not (path / "fourth").exists() or list((path / "fourth").iterdir()) == []


def test_both_ranks_end_with_the_same_ranges(ranks):
    _, (one, other) = ranks
    assert one["static"]["state"] == other["static"]["state"] and len(one["static"]["state"]["ranges"]) == 3
    assert_same(one["static"]["weights"], other["static"]["weights"])


def test_projections_are_trained_alike_on_both_ranks_as_on_one_with_their_batches_together(ranks, tmp_path):
    _, (one, other) = ranks
    teacher, module = seeded(Perceptron, 24, seed=3), seeded(Plain, optimizer="sgd")
    distillation = Distillation(DISTILL, teacher=teacher, student="model")
    trainer(tmp_path, [distillation]).fit(module, loader(batch=16))
    expected = weights(module) | distillation.projections.state_dict()
    for rank in (one, other):
        assert_same(rank["in order"]["projections"], one["in order"]["projections"])
        assert_same(rank["in order"]["weights"], one["in order"]["weights"])
        found = rank["in order"]["weights"] | rank["in order"]["projections"]
        assert found.keys() == expected.keys() and found["second"].shape == (24, 16)
        assert all(torch.allclose(found[name], expected[name], atol=1e-5) for name in expected)


def test_no_gradient_of_a_teacher_is_averaged_over_the_ranks(ranks):
    _, (one, other) = ranks
    own = sum(tensor.numel() * tensor.element_size() for tensor in one["distilled"]["weights"].values())
    assert one["distilled"]["buckets"] == other["distilled"]["buckets"] == own


def test_a_cache_built_by_both_ranks_teaches_what_the_live_teacher_does_and_resumes(ranks):
    _, both = ranks
    for rank in both:
        for name in ("weights", "projections"):
            assert_same(rank["cached"][name], rank["distilled"][name])
            assert_same(rank["distilled again"][name], rank["distilled"][name])


def test_both_ranks_have_the_same_former_self_and_keep_it(ranks):
    _, (one, other) = ranks
    assert int(one["former"]["former"]["1.num_batches_tracked"]) > 0
    for rank in (one, other):
        for name in ("former", "former again"):
            assert_same(rank[name]["former"], one["former"]["former"])


def test_masks_that_each_rank_measures_and_cuts_of_networks_that_differ_are_those_of_both(ranks):
    _, (one, other) = ranks
    one, other = one["measured"], other["measured"]
    assert_same(one["masks"], other["masks"])
    assert_same(one["weights"], other["weights"])
    assert one["record"] == other["record"] and one["record"]["tensors"]
    assert_same(one["cut"], other["cut"])


def test_flops_are_those_of_one_batch_and_what_was_measured_before_a_checkpoint_counts_once(ranks):
    path, (one, other) = ranks
    for name in ("middle", "middle again"):
        assert one[name]["counted"] == other[name]["counted"] == one["middle"]["counted"]
        assert_same(one[name]["masks"], other[name]["masks"])
        assert_same(one[name]["weights"], one["middle"]["weights"])
    assert one["middle"]["counted"]["first.weight"] == 2 * 8 * 8 * 16  # a whole batch of 8, though rank 1 has 4
    callbacks = torch.load(path / "middle" / "epoch=0.ckpt", weights_only=True)["callbacks"]
    (saved,) = (state for key, state in callbacks.items() if key.startswith("Pruning"))
    assert {float(count) for count in saved["means"]["counts"].values()} == {2 * (8 + 4)}  # two steps of two ranks


def test_latencies_are_measured_on_rank_0_alone_and_both_prune_by_them(ranks):
    _, (one, other) = ranks
    one, other = one["latency"], other["latency"]
    assert one["timed"] == 2 and other["timed"] == 0
    assert one["tables"] == other["tables"] and len(one["tables"]["latency"]) == 2
    assert_same(one["masks"], other["masks"])
    assert not all(mask.all() for mask in one["masks"].values())


def state(path: Path) -> Any:
    return torch.load(path, weights_only=True)["lightning_accel_rng"]


def test_the_random_state_of_each_rank_is_saved(ranks):
    path, _ = ranks
    states = state(path / "first" / "epoch=0.ckpt")
    assert len(states) == 2
    assert not torch.equal(states[0]["torch"], states[1]["torch"])
