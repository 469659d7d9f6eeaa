"""Which checkpoints can be read when the best is looked for."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
from helpers import Plain, loader, seeded, trainer
from lightning.pytorch.callbacks import ModelCheckpoint

from lightning_accel import Export, ExportError


@dataclass
class Widths:
    """A hyperparameter of the user's own type."""

    hidden: int = 16


class Configured(Plain):
    def __init__(self, widths: Widths) -> None:
        super().__init__()
        self.save_hyperparameters()


def test_a_checkpoint_with_hyperparameters_that_are_not_safe_to_load_is_named(tmp_path):
    keep = ModelCheckpoint(tmp_path / "kept", "{epoch}", monitor="val_loss", save_top_k=1)
    export = Export(tmp_path / "model", module="model", weights="best", engines=("portable",), measure=False)
    with pytest.raises(ExportError, match=r"self\.save_hyperparameters\(ignore=\['config'\]\), or write") as caught:
        trainer(tmp_path, [export, keep]).fit(seeded(Configured, Widths()), loader(), loader(16))
    assert f"the checkpoint {keep.best_model_path} holds objects" in str(caught.value)
