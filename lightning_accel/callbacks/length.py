"""How long a fit is, in the steps that schedules count."""

from __future__ import annotations

import math

import lightning.pytorch as pl
from lightning.pytorch.callbacks import GradientAccumulationScheduler


def total_steps(trainer: pl.Trainer, pl_module: pl.LightningModule) -> float:
    """Optimizer steps of this fit, as `trainer.global_step` counts them; `inf` where the length is unknown.

    With manual optimization every optimizer is taken to step once a batch.
    """
    steps = float(trainer.estimated_stepping_batches)
    batches, epochs = trainer.num_training_batches, trainer.max_epochs or -1
    if steps < 0:  # an iterable dataset without a length, and no max_steps
        return math.inf
    if epochs < 0 or math.isinf(batches):
        return steps
    changing = [c for c in trainer.callbacks if isinstance(c, GradientAccumulationScheduler)]  # type: ignore[attr-defined]
    if not pl_module.automatic_optimization:
        steps = batches * epochs * max(len(trainer.optimizers), 1)
    elif changing:  # the estimate takes the first epoch's number of batches for all
        steps = sum(math.ceil(batches / changing[0].get_accumulate_grad_batches(epoch)) for epoch in range(epochs))
    return steps if trainer.max_steps == -1 else min(steps, trainer.max_steps)
