"""manifest.json is what manifest.schema.json says, and says what is in the folder."""

from __future__ import annotations

import json
from importlib.resources import files
from pathlib import Path

import jsonschema
import pytest
import tiny

from lightning_accel.artifact import read_manifest

SCHEMA = json.loads(files("lightning_accel").joinpath("manifest.schema.json").read_text())


def problems(manifest: dict) -> list[str]:
    """What the schema finds wrong, as paths and messages."""
    validator = jsonschema.Draft202012Validator(SCHEMA)
    return [f"{error.json_path}: {error.message}" for error in validator.iter_errors(manifest)]


def test_the_schema_is_a_draft_2020_12_schema():
    jsonschema.Draft202012Validator.check_schema(SCHEMA)


def test_fresh_manifests_follow_the_schema(decoder, network):
    assert problems(read_manifest(decoder)) == []
    assert problems(read_manifest(network)) == []


def test_the_golden_manifest_follows_the_schema():
    assert problems(read_manifest(Path(__file__).parent / "data" / "golden")) == []


def test_measured_and_compiled_entries_follow_the_schema(decoder):
    manifest = read_manifest(decoder)
    portable = manifest["programs"][0]
    manifest["programs"].insert(
        0, {**portable, "engine": "aoti", "isa": ["avx2"], "arch": "x86_64", "layouts": {"0": [16, 4]}}
    )
    spread = {"median": 0.5, "least": 0.4, "most": 0.6, "n": 15}
    manifest["timings"] = [
        {
            "name": "artifact.decode",
            "seconds": 0.5,
            "spread": spread,
            "shape": "golden",
            "threads": 2,
            "engine": "aoti",
            "load_s": 0.1,
            "peak_rss_bytes": 1,
        }
    ]
    manifest["speedup"] = {"over_float_same_engine": {"decode": 2.0}, "over_eager": {"decode": 4.0}}
    assert problems(manifest) == []


@pytest.mark.parametrize(
    ("change", "where"),
    [
        (lambda m: m.pop("machine"), "$"),
        (lambda m: m.update(format=2), "$.format"),
        (lambda m: m.update(digest="0"), "$.digest"),
        (lambda m: m.update(programs=[]), "$.programs"),
        (lambda m: m["programs"][0].pop("cache"), "$.programs[0]"),
        (lambda m: m["programs"][0].update(file="../evil.pt2"), "$.programs[0].file"),
        (lambda m: m["programs"][0].update(engine="aoti"), "$.programs[0]"),
        (lambda m: m["programs"][0]["inputs"][0].update(shape=["batch"]), "$.programs[0].inputs[0].shape[0]"),
        (lambda m: m["weights"].update(sha256="0"), "$.weights.sha256"),
        (lambda m: m["coverage"][0].update(share_of_flops=1.5), "$.coverage[0].share_of_flops"),
        (lambda m: m["metrics"][0].update(direction="up"), "$.metrics[0].direction"),
    ],
)
def test_the_schema_finds_what_is_wrong(decoder, change, where):
    manifest = read_manifest(decoder)
    change(manifest)
    assert any(problem.startswith(f"{where}:") for problem in problems(manifest)), problems(manifest)


def test_sizes_are_those_of_the_files_that_the_default_load_needs(decoder):
    manifest = read_manifest(decoder)
    needed = {"manifest.json", "weights.safetensors", "decoder.portable.pt2", "tokenizer.json"}
    assert manifest["sizes"] == {"default_load_bytes": sum((decoder / name).stat().st_size for name in needed)}
    assert {file.name for file in decoder.iterdir()} == needed | {"golden.safetensors"}


def test_shapes_name_the_free_dimensions_and_their_limits(decoder, network):
    (ids,) = read_manifest(decoder)["programs"][0]["inputs"]
    assert ids["shape"][1] == {"name": "length", "min": 1, "max": tiny.POSITIONS}
    x, gain = read_manifest(network)["programs"][0]["inputs"]
    assert x["shape"] == gain["shape"] == [{"name": "batch", "min": 1, "max": 1024}, 16]


def test_coverage_names_every_skipped_module_with_a_reason(decoder):
    (coverage,) = read_manifest(decoder)["coverage"]
    skipped = [entry for entry in coverage["entries"] if not entry["done"]]
    assert len(skipped) == 2 * tiny.LAYERS + 2  # the norms, and the products between activations
    assert all(entry["reason"] for entry in skipped)
    assert 0.98 < coverage["share_of_parameters"] < 1.0
