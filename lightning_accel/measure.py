"""Is it faster here? Targets are timed in separate worker processes that take turns, and compared as ratios.

Two multi-threaded engines in one process were seen to reverse a ranking, and the speed of a machine drifts; so each
target has its own process (`lightning_accel._worker`), one works at a time, and the rounds are interleaved.
"""

from __future__ import annotations

import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from importlib.metadata import packages_distributions, version
from pathlib import Path
from typing import Any

import torch

from .artifact import program_files


@dataclass(frozen=True)
class Target:
    """What a worker loads: the directory of an artifact, or `"module:function"`.

    The function gets `arguments` and returns a dict from workload names to functions that do the work once and
    return the seconds that it took; an attribute `shape` of such a function says on what.
    """

    source: str
    arguments: Mapping[str, Any] | None = None
    engine: str | None = None


@dataclass(frozen=True)
class Spread:
    """Seconds of one workload: median, least and most of `n` runs."""

    median: float
    least: float
    most: float
    n: int


@dataclass(frozen=True)
class Measurement:
    """One target: its workloads, seconds to load, and peak resident memory of its process in bytes.

    Attributes:
        rounds: by workload the median of each round's runs; those of two targets with the same index ran in turns.
    """

    seconds: dict[str, Spread]
    shapes: dict[str, str]
    load_s: float
    peak_rss_bytes: int
    rounds: dict[str, list[float]]


def compare(
    targets: Mapping[str, Target],
    *,
    threads: int | None = None,
    rounds: int = 5,
    repeat: int = 3,
    pause: float = 0.0,
    progress: Callable[[str], None] | None = None,
) -> dict[str, Measurement]:
    """Times every workload of every target, in turns.

    Args:
        targets: name -> what to load.
        threads: of torch in each worker; default torch.get_num_threads().
        rounds: interleaved rounds; in each, every target runs every workload `repeat` times, the first round is
            warm-up and does not count.
        pause: seconds before each turn, for threads of the last one that still spin, as some runtimes' do.

    Raises:
        RuntimeError: a worker failed; the message holds what it printed.
    """
    threads = threads or torch.get_num_threads()
    workers: dict[str, _Worker] = {}
    try:
        for name, target in targets.items():
            if progress:
                progress(f"loading {name}")
            workers[name] = _Worker(target, threads)
        times: dict[str, dict[str, list[list[float]]]] = {
            name: {w: [] for w in worker.workloads} for name, worker in workers.items()
        }
        for turn in range(rounds + 1):
            for name, worker in workers.items():
                if progress:
                    progress(f"measuring {name}, round {turn} of {rounds}")
                time.sleep(pause)
                for workload in worker.workloads:
                    seconds = worker.ask({"run": workload, "repeat": repeat})["seconds"]
                    if turn:
                        times[name][workload].append(seconds)
        return {
            name: Measurement(
                {w: _spread([t for turn in turns for t in turn]) for w, turns in times[name].items()},
                worker.workloads,
                worker.load_s,
                worker.ask({"close": True})["peak_rss_bytes"],
                {w: [statistics.median(turn) for turn in turns] for w, turns in times[name].items()},
            )
            for name, worker in workers.items()
        }
    finally:
        for worker in workers.values():
            worker.stop()


def _spread(seconds: list[float]) -> Spread:
    return Spread(statistics.median(seconds), min(seconds), max(seconds), len(seconds))


class _Worker:
    """A worker process and its conversation: one JSON object a line each way."""

    def __init__(self, target: Target, threads: int) -> None:
        environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "TOKENIZERS_PARALLELISM": "false"}
        environment["PYTHONPATH"] = os.pathsep.join(p for p in sys.path if p)
        self.target = target
        # a pipe that nobody reads would stop a talkative target
        self.printed = tempfile.TemporaryFile("w+")  # noqa: SIM115  closed in `stop`
        self.process = subprocess.Popen(
            [sys.executable, "-m", "lightning_accel._worker"],
            text=True,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.printed,
            env=environment,
        )
        try:
            ready = self.ask({**asdict(target), "threads": threads})
        except BaseException:
            self.stop()
            raise
        self.load_s: float = ready["load_s"]
        self.workloads: dict[str, str] = ready["workloads"]

    def ask(self, message: Mapping[str, Any]) -> dict[str, Any]:
        assert self.process.stdin and self.process.stdout
        try:
            self.process.stdin.write(json.dumps(message) + "\n")
            self.process.stdin.flush()
            line = self.process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            self.process.wait()
            self.printed.seek(0)
            raise RuntimeError(f"the worker for {self.target.source} stopped:\n{self.printed.read()[-4000:]}")
        return json.loads(line)

    def stop(self) -> None:
        self.process.kill()
        self.process.communicate()
        self.printed.close()


def machine(threads: int | None = None) -> dict[str, Any]:
    """The machine, as it belongs beside every figure."""
    capabilities = torch.cpu.get_capabilities()
    return {
        "cpu": capabilities.get("cpu_name") or platform.processor(),
        "architecture": platform.machine(),
        "vnni": bool(capabilities.get("avx512_vnni") or capabilities.get("avx_vnni")),
        "amx": bool(capabilities.get("amx_int8")),
        "cores": os.cpu_count(),
        "threads": threads or torch.get_num_threads(),
        "system": platform.system(),
        "python": platform.python_version(),
    }


def versions(*modules: str) -> dict[str, str]:
    """Versions of what the figures depend on, and of the packages that have `modules`."""
    names = ["torch", "torchao", "lightning", "transformers", "torchmetrics", "lightning-accel"]
    if modules:
        owners = packages_distributions()  # onnxruntime may be that of onnxruntime-gpu
        names += [owners[module][0] for module in modules if module in owners]
    return {name: torch.__version__ if name == "torch" else version(name) for name in names}


def size_on_disk(directory: Path, manifest: Mapping[str, Any]) -> dict[str, int]:
    """Bytes of all that the default load needs, and of what the other engines have besides."""
    files: dict[str, set[str]] = {}  # of each engine
    for entry in manifest["programs"]:
        own = files.setdefault(entry["engine"], set())
        own |= {file["file"] for file in program_files(entry)}
        own |= {manifest["weights"]["file"]} if entry.get("weights") else set()
    needed = {"manifest.json"} | {asset["file"] for asset in manifest.get("assets", ())}
    needed |= files[manifest["programs"][0]["engine"]]
    sizes = {"default_load_bytes": sum((directory / name).stat().st_size for name in needed)}
    for engine, own in files.items():
        if extra := own - needed:
            sizes[f"{engine}_bytes"] = sum((directory / name).stat().st_size for name in extra)
    return sizes
