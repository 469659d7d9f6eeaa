"""How long a fit is, in the steps that schedules count."""

from __future__ import annotations

import lightning.pytorch as pl


def total_steps(trainer: pl.Trainer, pl_module: pl.LightningModule) -> float:
    """Optimizer steps of this fit, as `trainer.global_step` counts them; `inf` where the length is unknown.

    With manual optimization every optimizer is taken to step once a batch.
    """
    steps = float(trainer.estimated_stepping_batches)
    if steps < 0:  # an iterable dataset without a length, and no max_steps
        return float("inf")
    if pl_module.automatic_optimization or not trainer.max_epochs or trainer.max_epochs < 0:
        return steps
    batches = float(trainer.num_training_batches) * trainer.max_epochs * max(len(trainer.optimizers), 1)
    return batches if trainer.max_steps == -1 else min(batches, trainer.max_steps)
