"""AccelModule: a LightningModule around any `nn.Module` or transformers model."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torchmetrics import Metric, MetricCollection

from .distill import logits_of, split_key
from .distill.keyed import KEY
from .inputs import without_labels

Loss = Callable[[Tensor, Tensor], Tensor]


class AccelModule(pl.LightningModule):
    """Trains a network: loss, metrics, AdamW with linear warm-up and cosine decay.

    Batches are mappings of keyword inputs with `labels` (transformers), or `(input, target)`. The network is called
    without the labels and the loss computed here, so that an artifact can stand in for it. For a causal language
    model, whose labels are its input, logits and labels are shifted by one.

    Args:
        model: the network, as `self.model`.
        loss: (logits [n, classes], targets [n]) -> scalar; default cross-entropy that ignores -100.
        lr: peak learning rate.
        weight_decay: of AdamW, on parameters with two or more dimensions.
        warmup: share in [0, 1] of training with rising learning rate.
        metrics: torchmetrics updated with (logits, targets) in validation and test.
        causal: whether the model predicts the next token; `None` finds transformers' own models that do.

    Raises:
        ValueError: while training, with causal=None, where the labels are the input of a model that was not recognised.

    Example:
        >>> network = torch.nn.Linear(4, 2)
        >>> loss = AccelModule(network).training_step((torch.randn(8, 4), torch.zeros(8, dtype=torch.long)), 0)
        >>> loss.shape
        torch.Size([])
    """

    def __init__(
        self,
        model: nn.Module,
        loss: Loss | None = None,
        lr: float = 1e-3,
        weight_decay: float = 0.01,
        warmup: float = 0.05,
        metrics: Metric | MetricCollection | Mapping[str, Metric] | None = None,
        causal: bool | None = None,
    ) -> None:
        super().__init__()
        self.model = model
        self.loss = loss if loss is not None else nn.CrossEntropyLoss(ignore_index=-100)
        self.lr, self.weight_decay, self.warmup = lr, weight_decay, warmup
        self.causal = causal
        self.metrics = (
            None if metrics is None else MetricCollection(dict(metrics) if isinstance(metrics, Mapping) else metrics)
        )

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The network's output."""
        return self.model(*args, **kwargs)

    def logits_and_targets(self, batch: Any) -> tuple[Tensor, Tensor]:
        """Logits [n, classes] and targets [n] of a batch, or both as the network gives them if not classes."""
        if (isinstance(batch, Mapping) and KEY in batch) or (isinstance(batch, tuple | list) and len(batch) == 3):
            batch, _ = split_key(batch)  # of a `Keyed` dataset, outside of a fit with `Distillation`
        if isinstance(batch, Mapping):
            if "labels" not in batch:
                raise ValueError(f"the batch has no 'labels', only {sorted(batch)}; add them in the collate function")
            output, targets = self.model(**without_labels(batch)), batch["labels"]
        elif isinstance(batch, tuple | list) and len(batch) == 2:
            output, targets = self.model(batch[0]), batch[1]
        else:
            raise ValueError(
                f"a batch is a {type(batch).__name__}, expected (input, target) or a mapping with 'labels'; collate it "
                "so, or write your own LightningModule, the callbacks work with any"
            )
        logits = logits_of(output)
        if logits is None:
            raise ValueError(
                f"{type(self.model).__name__} puts out no logits; write your own LightningModule, the callbacks "
                "work with any"
            )
        if self._predicts_next(batch, logits, targets):
            logits, targets = logits[:, :-1], targets[:, 1:]
        if logits.dim() == targets.dim() + 1:
            logits, targets = logits.flatten(0, -2), targets.flatten()
        return logits, targets

    def _predicts_next(self, batch: Any, logits: Tensor, targets: Tensor) -> bool:
        from .capture import is_causal_lm
        from .select import unwrap

        fits = logits.dim() == 3 and logits.shape[:2] == targets.shape
        if self.causal and not fits:
            raise ValueError(
                f"causal=True needs logits [batch, length, classes] and labels [batch, length], got "
                f"{tuple(logits.shape)} and {tuple(targets.shape)}; leave causal=True out"
            )
        if self.causal is not None or not fits or not isinstance(batch, Mapping):
            return bool(self.causal)
        network = unwrap(getattr(self.model, "stands_in_for", self.model))
        if is_causal_lm(network):
            return True
        if _repeats(batch.get("input_ids"), targets):
            raise ValueError(
                f"the labels are the input_ids, and {type(network).__name__} is not known as a causal language model: "
                "it would learn to repeat each token; write AccelModule(model, causal=True) to predict the next one, "
                "or causal=False to predict the same one"
            )
        return False

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """The loss, logged as `train_loss`."""
        logits, targets = self.logits_and_targets(batch)
        loss = self.loss(logits, targets)
        self.log("train_loss", loss.detach(), prog_bar=True)
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        """Logs `val_loss` and the metrics."""
        self._evaluate(batch, "val")

    def test_step(self, batch: Any, batch_idx: int) -> None:
        """Logs `test_loss` and the metrics."""
        self._evaluate(batch, "test")

    def _evaluate(self, batch: Any, stage: str) -> None:
        logits, targets = self.logits_and_targets(batch)
        counted = int((targets != -100).sum())  # the mean over batches is then the mean over targets
        self.log(f"{stage}_loss", self.loss(logits, targets), prog_bar=True, batch_size=counted)
        if self.metrics is not None:
            self.metrics.update(logits, targets)
            self.log_dict({f"{stage}_{name}": metric for name, metric in self.metrics.items()})

    def configure_optimizers(self) -> Any:
        """AdamW, fused; the learning rate rises over `warmup` and falls to a tenth along a cosine."""
        parameters = [p for p in self.model.parameters() if p.requires_grad]
        groups = [
            {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": self.weight_decay},
            {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
        ]
        optimizer = torch.optim.AdamW(groups, lr=self.lr, betas=(0.9, 0.95), fused=_can_be_fused(parameters))
        optimizer._step_supports_amp_scaling = False  # a scaler unscales first, so that Lightning can clip
        total = self.trainer.estimated_stepping_batches
        if not 0 < total < float("inf"):
            return optimizer
        rise = max(1, round(self.warmup * total))
        schedulers = [
            torch.optim.lr_scheduler.LinearLR(optimizer, 1.0 / rise, total_iters=rise),
            torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, max(1, int(total) - rise), self.lr / 10),
        ]
        schedule = torch.optim.lr_scheduler.SequentialLR(optimizer, schedulers, milestones=[rise])
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def _can_be_fused(parameters: list[nn.Parameter]) -> bool:
    """Whether one kernel may do a step, several times faster than one operator after the other."""
    return all(p.is_floating_point() and p.device.type in ("cpu", "cuda") for p in parameters)


def _repeats(ids: Any, labels: Tensor) -> bool:
    """Whether all labels that count are the input; a few may be, where tokens were masked to be guessed."""
    if not isinstance(ids, Tensor) or ids.shape != labels.shape:
        return False
    counted = labels != -100
    return bool((ids == labels)[counted].all() and (counted.all() or counted.sum() >= 8))
