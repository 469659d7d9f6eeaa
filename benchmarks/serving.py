"""What serving an artifact costs beside its forwards: the first token of a process, a large cache, thousands of calls.

    make demo OUT=out/demo                                                  # the artifact that is served
    lightning-accel run benchmarks/serving.py start out/demo/model          # processes in turns
    lightning-accel run benchmarks/serving.py cache out/demo/model          # 256 slots against all positions
    lightning-accel run benchmarks/serving.py soak out/demo/model           # 20,000 generations

Goals: from the start of a process to its first token at most 0.5 s more than `import torch` takes; a cache with many
slots as fast as a small one at the same fill; memory and open files flat.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch
from tables import provenance

from lightning_accel import load
from lightning_accel.generate import Cache

IMPORT = "import torch"
FIRST_TOKEN = """
from lightning_accel import load
model = load({directory!r})
next(model.generate([[1, 2, 3]], 1, stream=True))
"""
FIRST_TEXT = """
from lightning_accel import load
model = load({directory!r})
next(model.generate_text("The", 8, stream=True))
"""


def start(directory: str, rounds: int, threads: int) -> None:
    """Seconds of whole processes, in turns."""
    programs = {"import torch": IMPORT, "first token": FIRST_TOKEN.format(directory=directory)}
    if any(asset["name"] == "tokenizer.json" for asset in load(directory).manifest["assets"]):
        programs["first text"] = FIRST_TEXT.format(directory=directory)
    seconds: dict[str, list[float]] = {name: [] for name in programs}
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    for turn in range(rounds + 1):
        for name, code in programs.items():
            began = time.perf_counter()
            subprocess.run([sys.executable, "-c", code], check=True, env=environment)
            if turn:
                seconds[name].append(time.perf_counter() - began)
    print("| process | s (least-most) | s over import torch |\n|---|---|---|")
    plain = statistics.median(seconds["import torch"])
    for name, found in seconds.items():
        middle = statistics.median(found)
        print(f"| {name} | {middle:.3f} ({min(found):.3f}-{max(found):.3f}) | {middle - plain:+.3f} |")


def cache(directory: str, rounds: int, filled: int = 128, new: int = 32) -> None:
    """Seconds a token at the same fill, in caches of different capacity, in turns."""
    model = load(directory)
    most = model.entry["cache"]["max_length"]
    capacities = [n for n in (256, 512, 1024, 2048, 4096, 8192) if filled + new <= n < most] + [most]
    seconds: dict[int, list[float]] = {capacity: [] for capacity in capacities}
    ids = torch.arange(filled)[None] % model.entry["cache"]["vocabulary"]
    one, first = torch.ones(1, 1, dtype=torch.bool), torch.zeros(1, 1, dtype=torch.int64)
    for turn in range(rounds + 1):
        for capacity in capacities:
            slots = Cache(model, 1, capacity)
            slots.step(ids, torch.ones_like(ids, dtype=torch.bool), torch.tensor([[filled - 1]]))
            began = time.perf_counter()
            for _ in range(new):
                slots.step(ids[:, :1], one, first)
            if turn:
                seconds[capacity].append((time.perf_counter() - began) / new)
    heads = "ms a token (least-most) | x the smallest |\n|---|---|---|"
    print(f"| capacity, {filled} to {filled + new} slots filled | {heads}")
    base = statistics.median(seconds[capacities[0]])
    for capacity, found in seconds.items():
        middle = statistics.median(found)
        spread = f"{1e3 * min(found):.2f}-{1e3 * max(found):.2f}"
        print(f"| {capacity} | {1e3 * middle:.2f} ({spread}) | {middle / base:.2f} |")


def soak(directory: str, calls: int) -> list[tuple[int, int, int]]:
    """(calls done, resident bytes, open files) at ten points of so many generations, printed as they come."""
    model = load(directory)
    rows: list[tuple[int, int, int]] = []
    vocabulary = model.entry["cache"]["vocabulary"]
    print("| generations | resident MB | open files |\n|---|---|---|")
    for call in range(calls + 1):
        if call % max(1, calls // 10) == 0:
            rows.append((call, resident(), len(os.listdir("/proc/self/fd"))))
            print(f"| {call:,} | {rows[-1][1] / 1e6:.1f} | {rows[-1][2]} |", flush=True)
        length, seed = 1 + call % 7, call
        options = {"temperature": 0.8, "seed": seed} if call % 2 else {}
        answer = model.generate([[(call + i) % vocabulary for i in range(length)]], 4, stop=(), stream=True, **options)
        for index, _ in enumerate(answer):
            if call % 5 == 0 and index:  # left in the middle
                break
    return rows


def resident() -> int:
    """Bytes of this process in memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("start", "cache", "soak"))
    parser.add_argument("directory")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--calls", type=int, default=20_000)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.what == "soak":
        soak(options.directory, options.calls)
    elif options.what == "start":
        start(options.directory, options.rounds, options.threads)
    else:
        cache(options.directory, options.rounds)
    print("\n" + provenance(options.threads))


if __name__ == "__main__":
    main()
