"""Contract 4 on whole models of six kinds, in the quick form of benchmarks/fidelity.py: 20 steps of training each."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

from lightning_accel.artifact import read_manifest
from lightning_accel.quantize.config import SCHEMES

BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"
LEAST_SHARE = {"mlp": 1.0, "cnn": 1.0, "vit": 0.97}  # of FLOPs; the others' attention is a larger part, in small models


@pytest.fixture(scope="module")
def fidelity() -> Any:
    sys.path.insert(0, str(BENCHMARKS))
    try:
        import fidelity
    finally:
        sys.path.remove(str(BENCHMARKS))
    return fidelity


@pytest.mark.filterwarnings("ignore::UserWarning:lightning", "ignore::UserWarning:torch")
@pytest.mark.parametrize(
    ("name", "scheme"),
    [
        *(("mlp", scheme) for scheme in SCHEMES),
        ("llama", "int4-weight"),
        ("gpt2", "int4-int8"),
        ("bert", "int8"),
        ("vit", "int8, attention"),
        ("vit", "int8-static"),
        ("cnn", "int8-static"),
    ],
)
def test_what_was_trained_is_what_is_exported(fidelity: Any, tmp_path: Path, name: str, scheme: str) -> None:
    fidelity.run(name, scheme, 0, tmp_path / "model", 20, ("portable",))
    manifest = read_manifest(tmp_path / "model")
    (program,) = manifest["programs"]
    figures = program["verification"]
    print("\n".join(fidelity.rows(name, scheme, 0, tmp_path / "model")))
    assert figures["kl_noise"] is None, "noise need not be looked at"
    rounding = 2e-8  # float32 tells divergences apart no finer
    assert figures["kl_plain"] > 0 and figures["kl_trained"] <= 0.05 * figures["kl_plain"] + rounding
    assert figures["agreement_over_margin"] == 1.0 and figures["agreement"] > 0.99
    assert figures["over_margin"] > 0.5, "or agreement over it says little"
    losses = {metric["name"]: metric["value"] for metric in manifest["metrics"]}
    assert losses["loss (artifact)"] == pytest.approx(losses["loss (trained)"], abs=1e-3)
    (coverage,) = manifest["coverage"]
    assert coverage["share_of_flops"] >= LEAST_SHARE.get(name, 0.92)
    assert scheme.removesuffix(", attention") in coverage["technique"]
    attention = [entry["done"] for entry in coverage["entries"] if entry["name"].endswith("products")]
    assert attention == (["int8"] * fidelity.LAYERS if scheme.endswith(", attention") else [])
