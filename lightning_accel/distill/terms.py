"""Student and teacher side by side: one number a term."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .config import DistillConfig
from .layers import Projections
from .losses import TopK, attention_loss, distillation_loss, hidden_loss, label_mask
from .teacher import Answer


@dataclass(frozen=True)
class Positions:
    """Which positions of a batch are no padding, and which have a label; `None` where all are.

    Attributes:
        inputs: [batch, length] of the model's inputs.
        decoder: [batch, length] of the decoder's inputs, in encoder-decoder models.
        labels: of the logits' leading shape.
        encodes: an encoder-decoder model, whose logits and decoder states are at the positions of `decoder`.
        classes_first: logits are [batch, classes, ...], as `F.cross_entropy` takes those of images.
    """

    inputs: Tensor | None = None
    decoder: Tensor | None = None
    labels: Tensor | None = None
    encodes: bool = False
    classes_first: bool = False

    def classes_last(self, logits: Any) -> Any:
        """Logits [..., classes]; truncated ones are so already."""
        return logits.movedim(1, -1) if self.classes_first and isinstance(logits, Tensor) else logits

    def of(self, tensor: Tensor, name: str | None = None) -> Tensor | None:
        """The padding mask of logits (name `None`) or of a hidden state [..., width], where there is one."""
        decodes = self.encodes and (name is None or "decoder" in name)
        mask = self.decoder if decodes else self.inputs
        return mask.bool() if mask is not None and mask.shape == tensor.shape[:-1] else None


def positions_of(student: Any, kwargs: Mapping[str, Any], batch: Any, logits: Tensor | None, causal: bool) -> Positions:
    """The positions of one call: padding from its attention masks, labels from its inputs or from the batch.

    Args:
        batch: of the training step. Labels are its entry `labels`, the second item of a pair, or else the integers that
            have a -100.
        causal: position t predicts label t + 1.
    """
    encodes = bool(getattr(getattr(student, "config", None), "is_encoder_decoder", False))
    named = {**(batch if isinstance(batch, Mapping) else {}), **{k: v for k, v in kwargs.items() if v is not None}}
    counts, classes_first = None, False
    if logits is not None:
        candidates = _labels(named, batch)
        last = next((labels for labels in candidates if labels.shape == logits.shape[:-1]), None)
        first = next((labels for labels in candidates if labels.shape == logits[:, :1].squeeze(1).shape), None)
        classes_first = last is None and (logits.dim() == 4 or (logits.dim() == 3 and first is not None))
        labels = first if classes_first else last
        if labels is not None:
            counts = label_mask(labels, causal and not classes_first and labels.dim() == 2 and not encodes)
    decoder = named.get("decoder_attention_mask")
    if decoder is None and encodes:
        decoder = counts
    return Positions(named.get("attention_mask"), decoder, counts, encodes, classes_first)


def _labels(named: Mapping[str, Any], batch: Any) -> list[Tensor]:
    """What may be labels: the entry of that name, the second of a pair, or whatever has a -100."""
    pair = isinstance(batch, tuple | list) and len(batch) == 2
    known = named.get("labels", batch[1] if pair else None)
    rest = batch.values() if isinstance(batch, Mapping) else batch if isinstance(batch, tuple | list) else ()
    integers = [t for t in (rest if known is None else [known]) if isinstance(t, Tensor) and not t.is_floating_point()]
    return integers if known is not None else [t for t in integers if bool((t == -100).any())]


def compare(
    student: Answer,
    teacher: Answer,
    config: DistillConfig,
    terms: Mapping[str, Mapping[str, str]],
    projections: Projections,
    positions: Positions,
) -> dict[str, Tensor]:
    """The unweighted terms: `logits`, `hidden` (mean over pairs), `attention` (mean over pairs).

    Args:
        terms: the terms wanted -> pairs of names, student's to teacher's; none for the logits.

    Raises:
        ValueError: what cannot be compared; see `distillation_loss`, `hidden_loss` and `attention_loss`.
    """
    found: dict[str, Tensor] = {}
    if "logits" in terms:
        found["logits"] = _logits_term(student, teacher, config, positions)
    if "hidden" in terms:
        pairs = terms["hidden"].items()
        losses = [_hidden_term(s, t, student, teacher, config, projections, positions) for s, t in pairs]
        found["hidden"] = torch.stack(losses).mean()
    if "attention" in terms:
        losses = []
        for own, other in terms["attention"].items():
            maps = student.attention[own]
            _check_gradients(maps, own, "an attention map")
            mask = positions.of(maps[:, 0], own)  # [batch, queries, keys]
            losses.append(attention_loss(maps, teacher.attention[other].to(maps.device), mask))
        found["attention"] = torch.stack(losses).mean()
    return found


def _logits_term(student: Answer, teacher: Answer, config: DistillConfig, positions: Positions) -> Tensor:
    logits, expected = positions.classes_last(student.logits), positions.classes_last(teacher.logits)
    if not isinstance(logits, Tensor):
        raise ValueError("the student puts out no logits; write DistillConfig(alpha=0.0, hidden=...)")
    if expected is None:
        raise ValueError(
            "the teacher puts out no logits: they are a tensor, or the `logits` of a mapping or an object, not an item "
            "of a tuple; give a model with a head that gives them so, or write alpha=0.0"
        )
    if isinstance(expected, TopK):
        values, classes, tail = (part.to(logits.device) for part in expected[:3])
        expected = expected._replace(values=values, indices=classes, tail=tail)
    else:
        expected = expected.to(logits.device)
    padding, counts = positions.of(logits), positions.labels
    if teacher.lengths is not None:
        logits, counts = _as_cached(logits, padding, counts, teacher.lengths[""], "logits")
        padding = None
    mask = counts if padding is None else padding if counts is None else padding & counts
    return distillation_loss(logits, expected, config.temperature, mask, config.loss, config.top_k)


def _hidden_term(
    own: str,
    other: str,
    student: Answer,
    teacher: Answer,
    config: DistillConfig,
    projections: Projections,
    positions: Positions,
) -> Tensor:
    state, expected = student.hidden[own], teacher.hidden[other]
    _check_gradients(state, own, "a state")
    mask = positions.of(state, own)
    if teacher.lengths is not None:
        state, _ = _as_cached(state, mask, None, teacher.lengths[other], own)
        mask = None
    state = projections(own, state, expected.shape[-1])
    try:
        return hidden_loss(state, expected.to(state.device), mask, config.hidden_loss)
    except ValueError as error:
        raise ValueError(f"{own} and {other}: {error}") from error


def _check_gradients(tensor: Tensor, own: str, what: str) -> None:
    if not tensor.requires_grad:
        raise ValueError(
            f"the student's {own!r} gave {what} without gradients: it is frozen, or recomputed by a reentrant "
            "checkpoint; write use_reentrant=False (model.gradient_checkpointing_enable("
            "gradient_checkpointing_kwargs={'use_reentrant': False})), or name a trained layer"
        )


def _as_cached(
    tensor: Tensor, padding: Tensor | None, counts: Tensor | None, lengths: Tensor, what: str
) -> tuple[Tensor, Tensor | None]:
    """The student's positions one after the other, as a cache holds the teacher's; and which of them count."""
    own = torch.full((len(tensor),), tensor[0, ..., 0].numel()) if padding is None else padding.sum(1).cpu()
    if len(own) != len(lengths) or not torch.equal(own, lengths):
        raise ValueError(
            f"the cache holds {lengths.tolist()} positions of {what} for these samples, the student has "
            f"{own.tolist()}; it was built with another tokenizer, truncation or padding: build it again with the "
            "inputs of this training, and pass attention_mask where samples are padded"
        )
    if padding is None:
        return tensor.flatten(0, -2), None if counts is None else counts.flatten()
    return tensor[padding], None if counts is None else counts[padding]
