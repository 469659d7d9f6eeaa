"""The loss of a model on a batch, where none is given."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from .distill import logits_of

_WRITE = "write loss=lambda model, batch: cross_entropy(model(batch[0]), batch[1])"


def default_loss(model: nn.Module, batch: Any) -> Tensor:
    """The loss that the model puts out for a mapping with labels, or the cross-entropy of (input, classes).

    Raises:
        ValueError: the model puts out no loss or no logits, or the second item is not of classes.
    """
    if isinstance(batch, Mapping):
        loss = getattr(model(**batch), "loss", None)
        if loss is None:
            raise ValueError(f"a loss is needed, and the model gives none for {sorted(batch)}; {_WRITE}")
        return loss
    if not (isinstance(batch, tuple | list) and len(batch) == 2 and isinstance(batch[1], Tensor)):
        raise ValueError(f"a loss is needed; give batches with labels, (input, classes), or {_WRITE}")
    logits = logits_of(model(batch[0]))
    if logits is None or batch[1].is_floating_point():
        what = "the model puts out no logits" if logits is None else f"targets of {batch[1].dtype} are no classes"
        raise ValueError(f"a loss is needed, and {what}; {_WRITE}")
    return F.cross_entropy(logits, batch[1])
