"""Physical shrinking: units that the masks zeroed are cut out, and the model computes the same with smaller layers."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from .. import select
from .._warn import warn
from ..capture import call_example, flatten_output
from ..inputs import ExampleInputs
from ..loss import default_loss, has_loss
from . import cut
from .config import PruneConfig
from .groups import all_groups
from .keep import Masks
from .latency import Timer, time_in_turns
from .layers import pass_through
from .losses import Loss, mean_loss
from .masks import apply_masks_, prune_model_


def shrink_model(
    model: nn.Module,
    masks: Masks,
    *,
    example_inputs: ExampleInputs,
    calibration: Iterable[Any] | None = None,
    loss: Loss | None = None,
) -> nn.Module:
    """A copy of `model` without the units that `masks` drop; it computes what the masked model computes.

    A unit (neuron, head, channel, layer) is cut out where the masks drop all of its weights. Masks of single weights
    have no physical form and are left as zeros. Gains of RMSNorms over a width that is cut (`"hidden"`) are rescaled;
    a LayerNorm over it computes something else than in the masked model, and a warning says by how much. Layers of
    post-norm transformers are left out, which is not what masking them does; the cut model is only seen to run.

    A transformers model that is shrunk saves itself with `save_pretrained`. Where its configuration can say the new
    widths, `from_pretrained` loads it; where not, the configuration carries a record, and
    `lightning_accel.load_checkpoint` does.

    Args:
        calibration: batches to measure the loss on, masked and cut, where the two differ by construction.
        loss: (model, batch) -> scalar; by default that which a transformers model puts out for a batch with labels, or
            the cross-entropy of (input, classes).

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
    return shrunk_with_record(model, masks, example_inputs, calibration, loss)[0]


def shrunk_with_record(
    model: nn.Module,
    masks: Masks,
    example_inputs: ExampleInputs,
    calibration: Iterable[Any] | None = None,
    loss: Loss | None = None,
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
    comparable = all(w["exact"] for w in record["widths"] if w["left"] < w["of"])
    dropped = {name: layers["gone"] for name, layers in record["layers"].items()}
    passes = pass_through(masked, dropped, example_inputs)
    said, change = _check_outputs(masked, model, example_inputs, record, comparable and passes)
    if not comparable and passes and change > 1e-3:
        batches = list(calibration) if calibration is not None else []
        measurable = [b for b in batches if loss is not None or has_loss(b)]
        _report_change(said, change, masked, model, measurable, loss)
    return model, record


def plan_model(
    model: nn.Module,
    config: PruneConfig,
    example_inputs: ExampleInputs,
    calibration: Iterable[Any] | None = None,
    timer: Timer = time_in_turns,
    loss: Loss | None = None,
) -> dict[str, Any]:
    """The record of what `prune_model_` and `shrink_model` would cut out of `model`, which stays as it is.

    Raises:
        ValueError: as those two.
    """
    model = copy.deepcopy(select.unwrap(model))
    batches = None if calibration is None else list(calibration)
    masks = prune_model_(model, config, example_inputs=example_inputs, calibration=batches, timer=timer, loss=loss)
    record = shrunk_with_record(model, masks, example_inputs, batches, loss)[1]
    if cut.is_empty(record):
        raise ValueError(f"{config!r} cuts nothing out of {type(model).__name__}; write a larger amount")
    return record


@torch.no_grad()
def _check_outputs(
    masked: nn.Module, shrunk: nn.Module, example_inputs: ExampleInputs, record: dict[str, Any], comparable: bool
) -> tuple[str, float]:
    """What was cut in words, and how far the shrunk model's outputs are from the masked one's: ||a - b|| / ||b||, the
    largest over outputs.

    Raises:
        ValueError: the shrunk model does not run, or, where it is comparable, computes something else.
    """
    from ..quantize import unprepare_

    kinds = {w["name"]: w["kind"] for w in record["widths"] if w["left"] < w["of"]} or dict.fromkeys(
        record["layers"], "layers"
    )
    names = sorted(kinds)
    said = f"cutting {kinds[names[0]]} out of {names[0]!r}" + (
        f" and {len(names) - 1} others" if len(names) > 1 else ""
    )
    help_ = f"exclude it: overrides={{{names[0]!r}: None}}"
    if kinds[names[0]] in ("heads", "hidden"):
        help_ += (
            ", or let the code take heads and widths from num_heads, head_dim and the shapes of tensors, as in "
            ".view(b, n, -1, self.head_dim) and .reshape(b, n, -1)"
        )
    try:
        models = (unprepare_(masked), unprepare_(copy.deepcopy(shrunk)))
        outputs = [flatten_output(call_example(model.eval(), example_inputs))[0] for model in models]
    except Exception as error:
        raise ValueError(f"{said} leaves a model that does not run ({error}); {help_}") from error
    most = 0.0
    for ours, theirs in zip(*outputs, strict=True):
        if ours.shape != theirs.shape:
            if comparable:
                raise ValueError(f"{said} changes what the model computes; {help_}")
            most = float("inf")
            continue
        distance, size = (ours - theirs).norm().item(), ours.norm().item()
        if comparable and not distance <= 1e-3 * size + 1e-6:
            raise ValueError(f"{said} changes what the model computes; {help_}")
        most = max(most, distance / size if size else distance)
    return said, most


@torch.no_grad()
def _report_change(
    said: str, change: float, masked: nn.Module, shrunk: nn.Module, batches: list[Any], loss: Loss | None
) -> None:
    """Warns of what a cut changes that a normalization sees, with the loss where there are batches that have one."""
    text = (
        f"{said} changes what the model computes, since a normalization over fewer values differs: its outputs for the "
        f"example inputs by {change:.1%}"
    )
    if batches:
        try:
            models = masked.eval(), copy.deepcopy(shrunk).eval()
            found = [mean_loss(model, batches, loss or default_loss) for model in models]
            text += f", the loss from {found[0]:.4f} masked to {found[1]:.4f} cut ({len(batches)} batches)"
        except ValueError as error:
            if loss is not None:
                raise
            text += f"; of the loss: {error}"
    else:
        text += "; for the loss, write shrink_model(..., calibration=[batch, ...])"
    warn(f"{text}. Train it further")
