"""The loss of a model on a batch, where none is given."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from .distill import logits_of

_OWN = "write loss=lambda model, batch: cross_entropy(model(batch[0]), batch[1])"


def has_loss(batch: Any) -> bool:
    """Whether `default_loss` may be asked of it: a mapping with labels, or (input, targets)."""
    if isinstance(batch, Mapping):
        return "labels" in batch
    return isinstance(batch, tuple | list) and len(batch) > 1 and isinstance(batch[1], Tensor)


def default_loss(model: nn.Module, batch: Any) -> Tensor:
    """The loss that the model puts out for a mapping with labels, or the cross-entropy of (input, targets).

    Targets are classes, or probabilities of them in the shape of the logits.

    Raises:
        ValueError: the model puts out no loss or no logits, or targets are neither.
    """
    if isinstance(batch, Mapping):
        loss = getattr(model(**batch), "loss", None)
        if loss is None:
            raise ValueError(
                f"a loss is needed, and the model gives none for {sorted(batch)}; give batches with labels, or write "
                "loss=lambda model, batch: ..."
            )
        return loss
    if not has_loss(batch):
        raise ValueError(f"a loss is needed; give batches with labels, (input, classes), or {_OWN}")
    logits, targets = logits_of(model(batch[0])), batch[1]
    if logits is None:
        raise ValueError(f"a loss is needed, and the model puts out no logits; {_OWN}")
    if targets.is_floating_point() and not _are_probabilities(targets, logits):
        raise ValueError(f"a loss is needed, and targets of {targets.dtype} are no classes; {_OWN}")
    try:
        return F.cross_entropy(logits, targets)
    except (IndexError, RuntimeError) as error:
        shapes = f"logits {list(logits.shape)} and targets {list(targets.shape)}"
        raise ValueError(f"a loss is needed, and {shapes} have no cross-entropy ({error}); {_OWN}") from error


def _are_probabilities(targets: Tensor, logits: Tensor) -> bool:
    whole = targets.sum(1) if targets.dim() > 1 else targets
    return targets.shape == logits.shape and bool((targets >= 0).all() and ((whole - 1).abs() < 1e-3).all())
