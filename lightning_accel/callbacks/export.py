"""When to export: once, after the fit, when every schedule has ended; training is never lost."""

from __future__ import annotations

import copy
import os
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict
from itertools import islice
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn
from torch import nn

from .. import artifact, select
from ..export import ExportError, ExportReport, Metric, export_model
from ..loaded import Output
from ..prune import Masks
from .base import AccelCallback, InputRecorder, example_of
from .precision import _loss
from .pruning import Pruning

_BATCHES = 8  # held-out batches for verification and the default metric


class Export(AccelCallback):
    """Writes one artifact in `on_fit_end`, verified against the trained model and measured against the float model.

    A checkpoint, `DIRECTORY.ckpt`, is written first; a failed export leaves the last good artifact and prints the line
    that exports again from the checkpoint. Export sees what the Pruning and QuantizationAwareTraining callbacks did.

    Args:
        directory: where the artifact goes; an older one is replaced when the new one is complete.
        module: the submodule to export, default the whole LightningModule.
        data: held-out batches; default the first of the validation (or training) loader.
        metric: (model, batches) -> float, lower is better unless it has `higher_is_better = True`; default the loss
            that `training_step` returns.
        weights: `"last"`, or `"best"` of the checkpoints written after every schedule had ended.
        engines, example_inputs, dynamic_shapes, reference, measure, min_speedup, assets: as in `export_model`.
        allow_incomplete: export even if the fit ended before a schedule did.

    Example:
        >>> from lightning_accel import Export
        >>> export = Export("out/model", module="model", engines=("aoti", "portable"))
    """

    technique = "export"

    def __init__(
        self,
        directory: str | Path,
        module: str | None = None,
        *,
        data: Iterable[Any] | None = None,
        metric: Metric | None = None,
        weights: str = "last",
        engines: Sequence[str] = ("aoti", "portable"),
        example_inputs: Any = None,
        dynamic_shapes: Any = None,
        reference: str | Path | None = None,
        measure: bool = True,
        min_speedup: float | None = None,
        assets: Mapping[str, str | Path] | None = None,
        allow_incomplete: bool = False,
    ) -> None:
        super().__init__(None, module)
        if weights not in ("last", "best"):
            raise ValueError(f"weights={weights!r} is unknown; write 'last' or 'best'")
        self.directory = Path(directory)
        self.data, self.metric, self.weights = data, metric, weights
        self.example_inputs, self.allow_incomplete = example_inputs, allow_incomplete
        self._options = {
            "engines": tuple(engines),
            "dynamic_shapes": dynamic_shapes,
            "reference": reference,
            "measure": measure,
            "min_speedup": min_speedup,
            "assets": assets,
        }
        self.report: ExportReport | None = None
        self._recorder: InputRecorder | None = None

    @property
    def state_key(self) -> str:
        """Directory and module."""
        return f"Export(directory={str(self.directory)!r}, module={self.module!r})"

    @property
    def checkpoint(self) -> Path:
        """Where training is saved before the export."""
        return self.directory.with_name(self.directory.name + ".ckpt")

    def bind(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Fails now, not after the fit, where the directory cannot be written or weights='best' has no checkpoints."""
        artifact.check_destination(self.directory)
        if self.weights == "best" and not _checkpoint_callbacks(trainer):
            raise ValueError("weights='best' needs a ModelCheckpoint(monitor=..., save_top_k=-1) among the callbacks")
        self._recorder = InputRecorder(self.target(pl_module))

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Ctrl-C leaves a checkpoint; nothing is exported."""
        if isinstance(exception, KeyboardInterrupt):
            self._save_checkpoint(trainer)

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Takes the recording hook off."""
        if self._recorder is not None:
            self._recorder.remove()

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Saves a checkpoint on all ranks, then exports on rank 0; every rank learns of a failure."""
        if trainer.fast_dev_run:  # type: ignore[attr-defined]
            rank_zero_warn("fast_dev_run: nothing is exported")
            return
        assert self._recorder is not None
        self._recorder.remove()
        self._save_checkpoint(trainer)
        error: Exception | None = None
        if trainer.is_global_zero:
            try:
                self.report = self._export(trainer, pl_module)
            except Exception as caught:
                error = caught
        failed = trainer.strategy.broadcast(None if error is None else f"{type(error).__name__}: {error}")
        if failed is not None:
            raise ExportError(
                f"the export failed: {failed}\nThe training is saved. To export again:\n"
                f"    lightning_accel.export_model(model, {str(self.directory)!r}, "
                f"checkpoint={str(self.checkpoint)!r}, module={self.module!r}, example_inputs=...)"
            ) from error
        rank_zero_info(str(self.report))

    def _save_checkpoint(self, trainer: pl.Trainer) -> None:
        partial = self.checkpoint.with_name(f".{self.checkpoint.name}.partial")
        trainer.save_checkpoint(partial)
        if trainer.is_global_zero:
            os.replace(partial, self.checkpoint)

    def _export(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> ExportReport:
        late = [
            c.technique
            for c in trainer.callbacks  # type: ignore[attr-defined]
            if isinstance(c, AccelCallback) and not getattr(c, "complete", True)
        ]
        if late and not self.allow_incomplete:
            raise ExportError(
                f"the fit ended before {' and '.join(late)} did; train to the end of the schedules, or write "
                "Export(..., allow_incomplete=True)"
            )
        module = self.target(pl_module)
        inputs = example_of(self._recorder, pl_module, self.example_inputs, not self.module)
        if isinstance(inputs, tuple) and len(inputs) == 2 and isinstance(inputs[1], dict):
            raise ExportError(
                "the module is called with positional and keyword inputs; give example_inputs={'name': x, ...}"
            )
        best = self._best(trainer) if self.weights == "best" else None
        batches = self._batches(trainer)
        return export_model(
            module,
            self.directory,
            example_inputs=inputs,
            checkpoint=best,
            module=self.module,
            masks=None if best else self._masks(trainer),
            data=batches,
            metric=self.metric or _training_loss(pl_module, self.module),
            configs={
                type(c).__name__: asdict(c.config)
                for c in trainer.callbacks  # type: ignore[attr-defined]
                if isinstance(c, AccelCallback) and c.config is not None
            },
            **self._options,
        )

    def _masks(self, trainer: pl.Trainer) -> Masks | None:
        prefix = f"{self.module}." if self.module else ""
        masks: Masks = {}
        for callback in trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(callback, Pruning):
                masks |= {
                    name.removeprefix(prefix): mask
                    for name, mask in callback.full_masks().items()
                    if name.startswith(prefix)
                }
        return masks or None

    def _batches(self, trainer: pl.Trainer) -> list[Any]:
        if self.data is not None:
            return list(self.data)
        loaders = trainer.val_dataloaders or trainer.train_dataloader
        loader = loaders[0] if isinstance(loaders, list) else loaders
        return list(islice(iter(loader), _BATCHES)) if loader is not None else []

    def _best(self, trainer: pl.Trainer) -> str:
        """The best checkpoint written after every schedule had ended."""
        for callback in _checkpoint_callbacks(trainer):
            sign = 1.0 if callback.mode == "min" else -1.0
            for path, _ in sorted(callback.best_k_models.items(), key=lambda item: sign * float(item[1])):
                states = torch.load(path, map_location="cpu", weights_only=True)["callbacks"].values()
                if all(s.get("complete", True) for s in states if isinstance(s, dict)):
                    return path
        raise ExportError(
            "no checkpoint written after the schedules ended is left; write ModelCheckpoint(save_top_k=-1), "
            "or Export(weights='last')"
        )

    def state_dict(self) -> dict[str, Any]:
        """Where the artifact goes."""
        return self.saved(directory=str(self.directory))


def _checkpoint_callbacks(trainer: pl.Trainer) -> list[ModelCheckpoint]:
    return [c for c in trainer.checkpoint_callbacks if isinstance(c, ModelCheckpoint) and c.monitor is not None]


def _training_loss(pl_module: pl.LightningModule, name: str) -> Metric | None:
    """The default metric: the mean loss of the module's own `training_step`, with another network in its place."""
    if not pl_module.automatic_optimization:
        rank_zero_warn(
            "the artifact's quality is not reported: a manual training_step has no loss to reuse; "
            "write Export(..., metric=...)"
        )
        return None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        host = copy.deepcopy(pl_module).cpu().eval()
    original = select.get_module(host, name)

    def loss(model: Callable[..., Any], batches: Sequence[Any]) -> float:
        stand_in = _StandIn(model, original)
        if name:
            parent, _, child = name.rpartition(".")
            setattr(host.get_submodule(parent), child, stand_in)
        else:
            host.forward = stand_in.forward  # type: ignore[method-assign]
        with warnings.catch_warnings():  # there is no trainer to log to
            warnings.simplefilter("ignore")
            return sum(float(_loss(host, batch)) for batch in batches) / len(batches)

    return loss


class _StandIn(nn.Module):
    """A network or an artifact where a LightningModule expects its own: labels are taken out, their loss put in."""

    def __init__(self, model: Callable[..., Any], original: nn.Module) -> None:
        super().__init__()
        self._model, self._original = [model], [original]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        model, original = self._model[0], self._original[0]
        if isinstance(model, nn.Module):
            return model(*args, **kwargs)
        labels = kwargs.pop("labels", None)
        entry = model.entry  # type: ignore[attr-defined]
        known = {"input_ids", "attention_mask"} if entry["cache"] else {spec["name"] for spec in entry["inputs"]}
        output = model(*args, **{k: v for k, v in kwargs.items() if k in known and v is not None})
        if entry["cache"]:
            output = Output(logits=output)
        if labels is not None and isinstance(output, dict):
            config: Any = original.config
            output["loss"] = original.loss_function(
                logits=output["logits"], labels=labels, vocab_size=config.vocab_size
            )  # type: ignore[operator]
        return output

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.__dict__["_original"][0], name)
