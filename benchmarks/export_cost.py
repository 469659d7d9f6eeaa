"""What an export costs: seconds and peak memory of capture and compile of int8 MiniLM, apart from everything after it.

    lightning-accel run benchmarks/export_cost.py --threads 2 --out out/export_cost

The goal is at most 60 s for capture and compile of the program that `load` takes, and at most 4 x the bytes of the
float32 weights. A process that has imported torch, its compiler and transformers holds more than that by itself, so the
peak is given above what the process held after it had exported a tiny model and before it made this one.
"""

from __future__ import annotations

import argparse
import gc
import importlib
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from encoders import float_model, inputs
from tables import provenance
from torch import nn

from lightning_accel import QuantConfig, export_model
from lightning_accel._worker import peak_rss

GOAL_SECONDS, GOAL_TIMES = 60, 4
PHASES = ("start", "finalize", "capture and compile", "portable program", "verify", "float reference", "timing")


def phase_of(said: str, verified: bool) -> str:
    """The phase that `export_model` enters when it says so; what it builds after verifying is the reference."""
    if said.startswith("building"):
        return "float reference" if verified else "portable program" if "portable" in said else "capture and compile"
    return {"finalizing": "finalize", "verifying": "verify"}.get(said.split()[0], "timing")


class Phases:
    """Seconds and peak memory of each phase; Linux forgets the peak of a process where it is asked to."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = dict.fromkeys(PHASES, 0.0)
        self.peaks: dict[str, int] = dict.fromkeys(PHASES, 0)
        self.now, self.since = "start", time.perf_counter()

    def enter(self, said: str) -> None:
        self.seconds[self.now] += time.perf_counter() - self.since
        self.peaks[self.now] = max(self.peaks[self.now], peak_rss())
        Path("/proc/self/clear_refs").write_text("5")
        self.now = phase_of(said, verified=self.peaks["verify"] > 0 or self.now == "verify")
        self.since = time.perf_counter()


def export(out: Path, threads: int) -> None:
    """One export in this process; prints what it took as JSON."""
    torch.set_num_threads(threads)
    tiny = nn.Sequential(nn.Linear(16, 16), nn.GELU(), nn.Linear(16, 16)).eval()
    with tempfile.TemporaryDirectory() as folder:  # without the compiler: its cache stays cold
        export_model(tiny, folder + "/tiny", example_inputs=(torch.randn(2, 16),), engines=("portable",), measure=False)
        importlib.import_module("torch._inductor.compile_fx")
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")
    held = peak_rss()
    model = float_model("minilm")
    phases = Phases()
    export_model(model, out, example_inputs=inputs(1, 128), quantize=QuantConfig("int8"), progress=phases.enter)
    phases.enter("done")
    print(json.dumps({
        "seconds": phases.seconds,
        "peaks": phases.peaks,
        "held": held,
        "started": resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024,
        "weights": sum(p.numel() * p.element_size() for p in model.parameters()),
    }))  # fmt: skip


def measure(out: Path, threads: int, cache: str) -> dict:
    """An export in a process of its own, with Inductor's cache in the folder `cache`."""
    environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": cache, "OMP_NUM_THREADS": str(threads)}
    environment["PYTHONPATH"] = os.pathsep.join(p for p in sys.path if p)
    command = [sys.executable, __file__, "--once", "--out", str(out), "--threads", str(threads)]
    printed = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True).stdout
    return json.loads(printed.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("out/export_cost"))
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--once", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.once:
        export(options.out, options.threads)
        return
    options.out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as cache:  # empty: the first export is cold
        found = {name: measure(options.out, options.threads, cache) for name in ("cold", "warm")}
    print("| minilm int8, 1 x 128 | " + " | ".join(f"{name} s | peak RSS MB" for name in found) + " |")
    print("|---" * (1 + 2 * len(found)) + "|")
    for phase in PHASES[1:]:
        cells = (f"{f['seconds'][phase]:.1f} | {f['peaks'][phase] / 1e6:.0f}" for f in found.values())
        print(f"| {phase} | " + " | ".join(cells) + " |")
    for name, f in found.items():
        peak, weights, held = max(f["peaks"][phase] for phase in PHASES[1:4]), f["weights"], f["held"]
        print(
            f"\n{name}: capture and compile {f['seconds']['capture and compile']:.1f} s (goal {GOAL_SECONDS} s); "
            f"peak until verification {peak / 1e6:.0f} MB = {peak / weights:.1f} x the {weights / 1e6:.0f} MB of fp32 "
            f"weights, {(peak - held) / weights:.1f} x above {held / 1e6:.0f} MB held before (goal {GOAL_TIMES} x); "
            f"the largest process that it started {f['started'] / 1e6:.0f} MB"
        )
    print("\nrandom weights\n" + provenance(options.threads))


if __name__ == "__main__":
    main()
