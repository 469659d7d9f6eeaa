"""How a model is called: example inputs as a tuple or a dict, and what torch.export says of a model that it refuses."""

from __future__ import annotations

import inspect
import traceback
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

ExampleInputs = tuple | Mapping[str, Any]


def split_inputs(example_inputs: ExampleInputs) -> tuple[tuple, dict[str, Any]]:
    """Example inputs as (args, kwargs): a dict is keyword inputs, a tuple positional ones."""
    if isinstance(example_inputs, Mapping):
        return (), dict(example_inputs)
    if isinstance(example_inputs, torch.Tensor):
        return (example_inputs,), {}
    return tuple(example_inputs), {}


def copy_inputs(example_inputs: ExampleInputs) -> tuple[tuple, dict[str, Any]]:
    """`split_inputs` with the tensors copied, for a model that writes to its inputs (an in-place activation)."""
    return torch.utils._pytree.tree_map_only(torch.Tensor, torch.Tensor.clone, split_inputs(example_inputs))


def first_rows(example_inputs: ExampleInputs, rows: int, length: int | None = None) -> ExampleInputs:
    """At most the first `rows` of a batch, and of its second dimension the first `length`.

    Inputs without a common first dimension (for `length`, a common second one) are left as they are.
    """
    tensors = [t for t in torch.utils._pytree.tree_leaves(example_inputs) if isinstance(t, torch.Tensor)]

    def cut(dim: int, count: int | None, inputs: Any) -> Any:
        sizes = {t.shape[dim] if t.dim() > dim else -1 for t in tensors}
        if count is None or len(sizes) != 1 or -1 in sizes:
            return inputs
        narrow = torch.utils._pytree.tree_map_only
        return narrow(torch.Tensor, lambda t: t.narrow(dim, 0, min(count, t.shape[dim])).clone(), inputs)

    return cut(1, length, cut(0, rows, example_inputs))


def without_labels(kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Keyword inputs without labels, so that a model computes no loss of its own."""
    return {name: value for name, value in kwargs.items() if name not in ("labels", "label")}


def with_decoder_inputs(module: torch.nn.Module, kwargs: dict[str, Any]) -> dict[str, Any]:
    """Keyword inputs with what transformers' encoder-decoder models make of labels, which no artifact is given."""
    labels, config = kwargs.get("labels"), getattr(module, "config", None)
    given = kwargs.get("decoder_input_ids") is not None or kwargs.get("decoder_inputs_embeds") is not None
    decodes = getattr(config, "is_encoder_decoder", False)
    if labels is None or given or not decodes or not _is_answer(module, labels):
        return kwargs
    if (prepare := getattr(module, "prepare_decoder_input_ids_from_labels", None)) is not None:
        return {**kwargs, "decoder_input_ids": prepare(labels)}
    start, pad = getattr(config, "decoder_start_token_id", None), getattr(config, "pad_token_id", None)
    if start is None:
        return kwargs
    ids = torch.cat((torch.full_like(labels[:, :1], start), labels[:, :-1]), 1)  # as Whisper does without a method
    return {**kwargs, "decoder_input_ids": ids.masked_fill(ids == -100, start if pad is None else pad)}


def _is_answer(module: Any, labels: Any) -> bool:
    """Whether labels are ids [N, T] that the module decodes, and not classes."""
    generates = getattr(module, "can_generate", lambda: True)()
    return generates and isinstance(labels, torch.Tensor) and labels.dim() == 2 and not labels.is_floating_point()


def inputs_of_batch(model: torch.nn.Module, batch: Any) -> ExampleInputs:
    """The model's inputs in a batch of a loader: those of a mapping that it takes, or a tuple's first item.

    An encoder-decoder model of transformers gets decoder inputs that it would make of the labels.
    """
    if isinstance(batch, Mapping):
        batch = with_decoder_inputs(model, dict(batch))
        parameters = inspect.signature(model.forward).parameters
        open_ended = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
        return {k: v for k, v in without_labels(batch).items() if v is not None and (k in parameters or open_ended)}
    return (batch,) if isinstance(batch, torch.Tensor) else (batch[0],)


def explain_export(error: Exception) -> str:
    """What torch.export says, without its advice for torch's own developers: the reason and the user's line."""
    reason = "\n".join(str(error).strip().split("\n\n")[0].splitlines()[:4])
    ours = (str(Path(torch.__file__).parent), str(Path(__file__).parent))
    frames = [f for f in traceback.extract_tb(error.__traceback__) if not f.filename.startswith((*ours, "<"))]
    where = f'\n  File "{frames[-1].filename}", line {frames[-1].lineno}\n    {frames[-1].line}' if frames else ""
    return f"{type(error).__name__}: {reason}{where}"
