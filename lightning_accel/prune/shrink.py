"""Physical shrinking: units that the masks zeroed are cut out, and the model computes the same with smaller layers."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from .. import select
from ..capture import call_example, flatten_output
from ..inputs import ExampleInputs
from . import cut
from .config import PruneConfig
from .groups import all_groups
from .layers import pass_through
from .masks import Masks, apply_masks_, prune_model_


def shrink_model(model: nn.Module, masks: Masks, *, example_inputs: ExampleInputs) -> nn.Module:
    """A copy of `model` without the units that `masks` drop; it computes what the masked model computes.

    A unit (neuron, head, channel, layer) is cut out where the masks drop all of its weights. Masks of single weights
    have no physical form and are left as zeros. Where a normalization runs over the width (`"hidden"`) or behind the
    sum of a residual block (layers of post-norm transformers), the cut model computes something else than the masked
    one and is only seen to run.

    A transformers model that is shrunk saves itself with `save_pretrained`. Where its configuration can say the new
    widths, `from_pretrained` loads it; where not, the configuration carries a record, and
    `lightning_accel.load_checkpoint` does.

    Raises:
        ValueError: the masks belong to another model, drop units that cannot be cut out, or the cut model does not run
            or computes something else.

    >>> model = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 2))
    >>> from lightning_accel import PruneConfig, prune_model_
    >>> inputs = (torch.randn(2, 8),)
    >>> masks = prune_model_(model, PruneConfig("neurons", 0.75), example_inputs=inputs)
    >>> shrink_model(model, masks, example_inputs=inputs)[0]
    Linear(in_features=8, out_features=8, bias=True)
    """
    return shrunk_with_record(model, masks, example_inputs)[0]


def shrunk_with_record(
    model: nn.Module, masks: Masks, example_inputs: ExampleInputs
) -> tuple[nn.Module, dict[str, Any]]:
    """`shrink_model`, and the record of what it cut out, for `cut.replay_`."""
    model = copy.deepcopy(select.unwrap(model))
    apply_masks_(model, masks)
    groups = all_groups(model, example_inputs) if cut.cuts_widths(model, masks) else []
    record = cut.plan(model, masks, groups)
    if cut.is_empty(record):
        return model, record
    masked = copy.deepcopy(model)
    cut.replay_(model, record)
    cut.note_in_config(model, record)
    exact = {g.name: g.exact for g in groups}
    comparable = all(exact.get(w["name"], True) for w in record["widths"] if w["left"] < w["of"])
    dropped = {name: layers["gone"] for name, layers in record["layers"].items()}
    _check_outputs(masked, model, example_inputs, record, comparable and pass_through(masked, dropped, example_inputs))
    return model, record


def plan_model(
    model: nn.Module, config: PruneConfig, example_inputs: ExampleInputs, calibration: Iterable[Any] | None = None
) -> dict[str, Any]:
    """The record of what `prune_model_` and `shrink_model` would cut out of `model`, which stays as it is.

    Raises:
        ValueError: as those two.
    """
    model = copy.deepcopy(select.unwrap(model))
    masks = prune_model_(model, config, example_inputs=example_inputs, calibration=calibration)
    record = shrunk_with_record(model, masks, example_inputs)[1]
    if cut.is_empty(record):
        raise ValueError(f"{config!r} cuts nothing out of {type(model).__name__}; write a larger amount")
    return record


@torch.no_grad()
def _check_outputs(
    masked: nn.Module, shrunk: nn.Module, example_inputs: ExampleInputs, record: dict[str, Any], comparable: bool
) -> None:
    """Raises ValueError where the shrunk model does not run, or computes something else than the masked one."""
    from ..quantize import unprepare_

    kinds = {w["name"]: w["kind"] for w in record["widths"] if w["left"] < w["of"]} or dict.fromkeys(
        record["layers"], "layers"
    )
    names = sorted(kinds)
    said = f"cutting {kinds[names[0]]} out of {names[0]!r}" + (
        f" and {len(names) - 1} others" if len(names) > 1 else ""
    )
    help_ = f"exclude it: overrides={{{names[0]!r}: None}}"
    try:
        models = (unprepare_(masked), unprepare_(copy.deepcopy(shrunk)))
        outputs = [flatten_output(call_example(model.eval(), example_inputs))[0] for model in models]
    except Exception as error:
        raise ValueError(f"{said} leaves a model that does not run ({error}); {help_}") from error
    if not comparable:
        return  # a normalization sees other values than in the masked model
    for ours, theirs in zip(*outputs, strict=True):
        if ours.shape != theirs.shape or (ours - theirs).norm() > 1e-3 * ours.norm() + 1e-6:
            raise ValueError(f"{said} changes what the model computes; {help_}")
