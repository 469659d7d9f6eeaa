"""What pruning measures before it decides: means over calibration batches, latencies, losses and costs of targets."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .. import select
from ..capture import call_example
from ..inputs import ExampleInputs, inputs_of_batch
from ..loss import default_loss
from .allocate import Costs
from .config import PruneConfig
from .groups import Group
from .latency import Calls, LatencyCosts, Timer, latency_table, time_in_turns
from .losses import loss_table
from .saliency import SALIENCIES, Means, add_gradients, observe_blocks, observe_inputs, saliency

Tables = dict[str, list[Any]]  # what was measured of each target, in plain types


def measure(
    model: nn.Module,
    targets: Sequence[Group],
    config: PruneConfig,
    calibration: Iterable[Any] | None,
    loss: Callable[[nn.Module, Any], Tensor] | None = None,
) -> Means:
    """What the saliency of `config` needs to know of the calibration batches; nothing for those that need none.

    Raises:
        ValueError: it needs some, and there are none.
    """
    means, needs = Means(), needed(config)
    if not needs:
        return means
    batches = list(calibration) if calibration is not None else []
    if not batches:
        names = sorted({config.saliency_of(s) for s in config.structures} - {"l1", "l2", "random"})
        raise ValueError(
            f"saliency={names[0]!r} is measured on data; write calibration=[batch, ...], some batches of inputs, "
            "or a saliency that needs none: saliency='l2'"
        )
    handles = observe_inputs(model, means) if "inputs" in needs else []
    if "blocks" in needs:
        handles += observe_blocks(model, [unit for target in targets for unit in target.units], means)
    try:
        with select.evaluating(model):
            for batch in batches:
                if "gradients" in needs:
                    _measure_gradients(model, targets, batch, loss or default_loss, means)
                if needs - {"gradients"}:
                    call_example(model, inputs_of_batch(model, batch))
    finally:
        for handle in handles:
            handle.remove()
    return means


def needed(config: PruneConfig) -> set[str]:
    """What the saliencies of a config need beside the weights."""
    return {SALIENCIES[config.saliency_of(structure)] for structure in config.structures} - {""}


def _measure_gradients(
    model: nn.Module, targets: Sequence[Group], batch: Any, loss: Callable[[nn.Module, Any], Tensor], means: Means
) -> None:
    before = {p: p.grad for p in model.parameters()}
    try:
        for parameter in before:
            parameter.grad = None
        with torch.enable_grad():
            loss(model, batch).backward()
        add_gradients(means, targets, select.all_parameters(model))
    finally:
        for parameter, gradient in before.items():
            parameter.grad = gradient


def saliencies_of(model: nn.Module, targets: list[Group], config: PruneConfig, means: Means | None) -> list[Tensor]:
    """The saliencies of each target's units, [width] each."""
    parameters = select.all_parameters(model)
    return [saliency(config.saliency_of(t.kind), t, parameters, means, config.seed) for t in targets]


def measure_tables(
    model: nn.Module,
    targets: list[Group],
    config: PruneConfig,
    calls: Calls | None,
    *,
    means: Means | None = None,
    calibration: Sequence[Any] = (),
    loss: Callable[[nn.Module, Any], Tensor] | None = None,
    timer: Timer = time_in_turns,
) -> Tables:
    """What the amount or scope of `config` needs to be measured of each target, in plain types: `"latency"` curves
    (`latency_table`), `"losses"` (`loss_table`); empty where it needs nothing.

    Raises:
        ValueError: example inputs or batches missing.
    """
    tables: Tables = {}
    if config.needs_latency:
        if not calls:
            raise ValueError("latency is measured on a forward and needs example_inputs=(x,)")
        tables["latency"] = latency_table(model, targets, calls, config.round_to, timer)
    if config.scope == "sensitivity":
        if not calibration:
            raise ValueError(
                "scope='sensitivity' measures losses; write calibration=[batch, ...], some with labels, or "
                "(input, classes)"
            )
        saliencies = saliencies_of(model, targets, config, means)
        tables["losses"] = loss_table(model, targets, saliencies, calibration, loss or default_loss)
    return tables


def costs_of(
    model: nn.Module,
    targets: list[Group],
    config: PruneConfig,
    calls: Mapping[str, ExampleInputs] | None,
    tables: Tables | None = None,
    counted: Mapping[str, float] | None = None,
) -> Costs | LatencyCosts | None:
    """What `compute_masks` needs to reach a share of parameters, FLOPs or, by the tables, latency; `None` for a share
    of units.

    Args:
        counted: `Costs.costs` of the same model, in place of counting again.
    """
    if config.of == "latency":
        return LatencyCosts(targets, (tables or {})["latency"])
    return None if config.of == "units" else Costs(model, targets, config.of, calls, counted)
