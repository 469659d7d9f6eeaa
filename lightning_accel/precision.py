"""Mixed precision: which number format trains fastest here, measured, and whether its gradients stay finite."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from . import select

PRECISIONS = ("auto", "bf16", "fp16", "fp32")
GAIN = 1.05  # auto leaves fp32 only for a step at least this much faster


@dataclass
class PrecisionChoice:
    """The chosen precision, the seconds of the fastest training step in each candidate, and why."""

    precision: str
    reason: str
    seconds: dict[str, float] = field(default_factory=dict)


def autocast(precision: str, device: torch.device) -> AbstractContextManager:
    """The autocast context of a precision (`nullcontext` for fp32)."""
    if precision == "fp32":
        return nullcontext()
    return torch.autocast(device.type, dtype=torch.bfloat16 if precision == "bf16" else torch.float16)


def candidates(device: torch.device) -> tuple[str, ...]:
    """Precisions worth timing on a device; fp16 on a CPU is not (no fast kernels, and a scaler beside)."""
    if device.type == "cuda":
        return ("fp32", "bf16", "fp16") if torch.cuda.is_bf16_supported() else ("fp32", "fp16")
    return ("fp32", "bf16")


def choose_precision(
    model: nn.Module,
    step: Callable[[Any], torch.Tensor],
    device: torch.device,
    names: Sequence[str] | None = None,
    repeats: int = 5,
    budget: float = 3.0,
) -> PrecisionChoice:
    """Times forward and backward of `step(copy of model)` in each candidate, in turns, and chooses the fastest.

    The model and torch's random state stay what they were. fp32 is kept unless another is 5 % faster.

    Args:
        step: computes the loss of one real batch.
        names: candidates beside fp32; by default those that the device may be fast in.
        repeats, budget: so many rounds, and up to four times as many within so many seconds: short steps need more of
            them to give the same choice in the next run.
    """
    names = tuple(dict.fromkeys(("fp32", *(candidates(device) if names is None else names))))
    trial = copy.deepcopy(model)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        rounds, begun = 0, time.perf_counter()
        while rounds <= repeats or (rounds <= 4 * repeats and time.perf_counter() - begun < budget):
            for name in names:
                start = time.perf_counter()
                with autocast(name, device):
                    loss = step(trial)
                loss.backward()
                if device.type == "cuda":
                    torch.cuda.synchronize(device)
                elapsed = time.perf_counter() - start
                trial.zero_grad(set_to_none=True)
                if rounds:  # the first round warms up
                    seconds[name].append(elapsed)
            rounds += 1
    fastest = {name: min(times) for name, times in seconds.items()}  # what else runs here only ever adds time
    best = min(fastest, key=lambda name: fastest[name])
    if best != "fp32" and fastest["fp32"] / fastest[best] < GAIN:
        best = "fp32"
    others = ", ".join(f"{n} {fastest['fp32'] / s:.2f} x" for n, s in fastest.items() if n != "fp32")
    verb = "stays in fp32" if best == "fp32" else f"trains in {best}"
    return PrecisionChoice(best, f"{verb}: speed of a training step over fp32, measured here: {others}", fastest)


def first_nonfinite_gradient(model: nn.Module) -> str | None:
    """Name of the first parameter, in module order, whose gradient holds an infinity or a NaN."""
    gradients = {name: p.grad for name, p in select.named_parameters(model).items() if p.grad is not None}
    values = {name: g.coalesce().values() if g.is_sparse else g for name, g in gradients.items()}
    named = [(name, value) for name, value in values.items() if value.numel()]
    if not named:
        return None
    norms = torch.stack([norm.float() for norm in torch._foreach_norm([g for _, g in named], float("inf"))])
    bad = (~torch.isfinite(norms)).nonzero()
    return named[int(bad[0])][0] if len(bad) else None
