"""When to export: once, after the fit, when every schedule has ended; training is never lost."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict
from itertools import islice
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn
from rich.console import Console
from torch import Tensor
from torch.utils._pytree import tree_leaves

from .. import artifact
from ..export import ExportError, ExportReport, Metric, check_options, export_model
from ..inputs import ExampleInputs, first_rows, split_inputs
from ..prune import Masks
from .base import AccelCallback
from .checkpoints import best_checkpoint, monitored
from .inputs import InputRecorder, example_of, held_out_batches, held_out_split, in_float32
from .pruning import Pruning
from .random_state import random_state, set_random_state
from .step import on_batches, reaching, training_loss

_BATCHES = 8  # held-out batches for verification and the default metric
_ROWS = 8  # of a recorded batch, as golden inputs


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
        engines, example_inputs, dynamic_shapes, reference, measure, min_speedup, assets, processor: as in
            `export_model`.
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
        engines: Sequence[str] | str = ("aoti", "portable"),
        example_inputs: Any = None,
        dynamic_shapes: Any = None,
        reference: str | Path | None = None,
        measure: bool = True,
        min_speedup: float | None = None,
        assets: Mapping[str, str | Path] | None = None,
        processor: Any = None,
        allow_incomplete: bool = False,
    ) -> None:
        super().__init__(None, module)
        check_options(engines, measure, min_speedup)
        if weights not in ("last", "best"):
            raise ValueError(f"weights={weights!r} is unknown; write 'last' or 'best'")
        if not isinstance(directory, str | os.PathLike) or Path(directory).name in ("", ".."):
            raise ValueError(f"{directory!r} is no name of a directory to be made; write Export('out/model')")
        self.directory = Path(directory)
        self.data, self.metric, self.weights = data, metric, weights
        self.example_inputs, self.allow_incomplete = example_inputs, allow_incomplete
        self._options = {
            "engines": engines if isinstance(engines, str) else tuple(engines),
            "dynamic_shapes": dynamic_shapes,
            "reference": None if reference is None else str(reference),
            "measure": measure,
            "min_speedup": min_speedup,
            "assets": None if assets is None else {name: str(path) for name, path in assets.items()},
            "processor": str(processor) if isinstance(processor, Path) else processor,
        }
        self._source = self.checkpoint  # what is exported again after a failure
        self.report: ExportReport | None = None
        self._recorder: InputRecorder | None = None
        self._saved_call: Any = None  # recorded before the checkpoint that the fit resumes from

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
        o = self._options
        check_options(o["engines"], o["measure"], o["min_speedup"], o["reference"], o["assets"])
        same = [c for c in self.siblings(trainer) if isinstance(c, Export) and c.directory == self.directory]
        if len(same) > 1:
            raise ValueError(f"two Export callbacks write to {self.directory}; give each a directory of its own")
        if self.weights == "best":
            monitored(trainer)
        self._recorder, self._saved_call = InputRecorder(self.target(pl_module)), None

    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Takes the recorded inputs over, from an Export to another directory too: the fit may have no step left."""
        super().on_load_checkpoint(trainer, pl_module, checkpoint)
        states = [s for s in checkpoint.get("callbacks", {}).values() if isinstance(s, dict)]
        calls = [s["call"] for s in states if s.get("technique") == "export" and s["module"] == self.module]
        self._saved_call = next((call for call in calls if call is not None), None)

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Ctrl-C leaves a checkpoint; nothing is exported. Rank 0 waits for nobody: the others may not know."""
        super().on_exception(trainer, pl_module, exception)
        interrupted = isinstance(exception, KeyboardInterrupt) and trainer.optimizers and trainer.is_global_zero
        if interrupted and (failed := self._write_checkpoint(trainer)) is not None:
            rank_zero_warn(failed)

    def release(self, pl_module: pl.LightningModule) -> None:
        """Takes the recording hook off."""
        if self._recorder is not None:
            self._recorder.remove()

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Saves a checkpoint on all ranks, then exports on rank 0; every rank learns of a failure."""
        if trainer.fast_dev_run:  # type: ignore[attr-defined]
            rank_zero_warn("fast_dev_run: nothing is exported")
            return
        self.release(pl_module)
        for callback in self.siblings(trainer):
            if isinstance(callback, Pruning):  # averaged weights are masked first, wherever it stands in the list
                callback.on_fit_end(trainer, pl_module)
        unsaved = trainer.strategy.broadcast(self._write_checkpoint(trainer))
        if unsaved is not None:
            raise ExportError(unsaved)
        error: Exception | None = None
        if trainer.is_global_zero:
            state = random_state()
            try:
                self.report = self._export(trainer, pl_module)
            except Exception as caught:
                error = caught
            set_random_state(state)
        message = None if error is None else (f"{type(error).__name__}: {error}", self._again())
        failed = trainer.strategy.broadcast(message)
        if failed is not None:
            raise ExportError(
                f"the export failed: {failed[0]}\nThe training is saved. To export again:\n    {failed[1]}"
            ) from error
        rank_zero_info(str(self.report))

    def _again(self) -> str:
        """The line that exports again."""
        defaults = Export(self.directory)._options
        options = {name: value for name, value in self._options.items() if value != defaults[name]}
        arguments = {"checkpoint": str(self._source), "module": self.module or None, **options}
        shown = {name: name if hasattr(value, "save_pretrained") else repr(value) for name, value in arguments.items()}
        written = ", ".join(f"{name}={value}" for name, value in shown.items())
        return f"lightning_accel.export_model(model, {str(self.directory)!r}, {written})"

    def _write_checkpoint(self, trainer: pl.Trainer) -> str | None:
        """What went wrong, in words. Not by Trainer.save_checkpoint: the other ranks would wait in it for good."""
        partial = self.checkpoint.with_name(f".{self.checkpoint.name}.partial")
        checkpoint = trainer._checkpoint_connector.dump_checkpoint(weights_only=False)
        try:
            trainer.strategy.save_checkpoint(checkpoint, partial)
            if trainer.is_global_zero:
                os.replace(partial, self.checkpoint)
        except (OSError, RuntimeError) as error:  # torch's own writer raises RuntimeError
            return (
                f"the checkpoint {self.checkpoint} cannot be written ({type(error).__name__}: {error}), so nothing is "
                "exported; make room or the directory writable, and in this process call "
                "trainer.save_checkpoint('other.ckpt'): the trained weights are in memory only"
            )
        finally:
            if trainer.is_global_zero:
                with suppress(OSError):
                    partial.unlink(missing_ok=True)
        return None

    def _export(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> ExportReport:
        scheduled = [c for c in self.siblings(trainer) if hasattr(c, "complete")]
        late = [c.technique for c in scheduled if not c.complete]
        if late and not self.allow_incomplete:
            raise ExportError(
                f"the fit ended before {' and '.join(late)} did; train to the end of the schedules, or write "
                f"Export(..., allow_incomplete=True){_by_hand(pl_module)}"
            )
        module = self.target(pl_module)
        best = best_checkpoint(trainer, [c.state_key for c in scheduled]) if self.weights == "best" else None
        self._source = Path(best or self.checkpoint)
        if self._recorder is not None and not self._recorder.calls and self._saved_call is not None:
            self._recorder.calls.append(self._saved_call)
        example = example_of(self._recorder, pl_module, module, self.example_inputs)
        if self.example_inputs is None:  # a training batch, of which the artifact keeps some rows
            example = first_rows(example, _ROWS)
        held_out, metric = self._held_out(pl_module, self._batches(trainer), example)
        split = "given" if self.data is not None else held_out_split(trainer)
        with Console().status(f"exporting to {self.directory}") as status:
            return export_model(
                module,
                self.directory,
                example_inputs=example,
                checkpoint=best,
                module=self.module,
                masks=None if best else self._masks(trainer),
                data=held_out,
                split=split,
                metric=metric,
                configs={c.state_key: asdict(c.config) for c in self.siblings(trainer) if c.config is not None},
                progress=lambda message: status.update(f"exporting to {self.directory}: {message}"),
                **self._options,
            )

    def _held_out(
        self, pl_module: pl.LightningModule, batches: list[Any], example: ExampleInputs
    ) -> tuple[list[Any], Metric | None]:
        """What reaches the exported module in these batches, and the metric of a network on the batches."""
        reason = "training_step does not call it"
        try:
            inputs = reaching(pl_module, self.module, batches)
        except Exception as error:  # `data` need not be what training_step takes
            inputs, reason = [], f"training_step cannot be run again ({type(error).__name__}: {error})"
        metric = self.metric
        if metric is None:
            unknown = reason if pl_module.automatic_optimization else "a manual training_step has no loss to reuse"
            if inputs and pl_module.automatic_optimization:
                try:
                    metric = training_loss(pl_module, self.module, batches[0], inputs[0])
                except Exception as error:  # whatever the network computes its loss from
                    unknown = f"the loss of an artifact cannot be computed ({type(error).__name__}: {error})"
            if metric is None:
                rank_zero_warn(f"the artifact's quality is not reported: {unknown}; write Export(..., metric=...)")
        if not inputs:
            inputs = batches if self.data is not None else [example]
            if self.data is None:
                rank_zero_warn(f"verified on example inputs only: {reason}; write Export(..., data=...)")
        return inputs, metric and on_batches(metric, batches)

    def _masks(self, trainer: pl.Trainer) -> Masks | None:
        prefix = f"{self.module}." if self.module else ""
        masks: Masks = {}
        for callback in trainer.callbacks:  # type: ignore[attr-defined]
            for name, mask in callback.full_masks().items() if isinstance(callback, Pruning) else ():
                if name.startswith(prefix):
                    name = name.removeprefix(prefix)
                    masks[name] = masks[name] & mask if name in masks else mask
        return masks or None

    def _batches(self, trainer: pl.Trainer) -> list[Any]:
        batches = self.data if self.data is not None else islice(held_out_batches(trainer), _BATCHES)
        return [in_float32(batch) for batch in batches]

    def state_dict(self) -> dict[str, Any]:
        """Where the artifact goes, and inputs to export it with again."""
        calls = self._recorder.calls if self._recorder is not None else []
        if self.example_inputs is not None:
            calls = [split_inputs(self.example_inputs)]
        call = first_rows(calls[0], 2) if calls else self._saved_call
        plain = all(isinstance(leaf, Tensor | bool | int | float | str | None) for leaf in tree_leaves(call))
        return self.saved(directory=str(self.directory), call=call if plain else None)


def _by_hand(pl_module: pl.LightningModule) -> str:
    """What to do where fractions of training cannot be known."""
    if pl_module.automatic_optimization:
        return ""
    return (
        "; with manual optimization every optimizer is taken to step once a batch: where yours do not, write ints in "
        "place of fractions (optimizer steps, counted over all optimizers)"
    )
