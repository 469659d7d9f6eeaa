"""The fake quantizer of static activations, and where its range comes from: calibration, training, or a saved state.

A range is a plain tensor: no state_dict holds it (contract 1), and it is no new buffer for Lightning's averages of
weights, which pair a network's buffers with those of a copy by their order. The callback saves it. While it is empty
nothing is rounded in training, and evaluation raises.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only

from .. import select
from .._quiet import FakeQuantizerBase
from .._warn import warn
from ..inputs import inputs_of_batch, split_inputs
from .norms import NormWatch, fold_, freeze_norms_, norms_of, thaw_norm_
from .observers import MOMENTUM, NonFinite, Sample, batch_range
from .ops import blocks
from .static import CODES, affine_parameters, affine_round

FEW_BATCHES = 8


class _RoundAffine(torch.autograd.Function):
    """Rounds to the codes of a range; the gradient passes inside of it (Bengio et al. 2013, arXiv:1308.3432)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, range_: Tensor) -> Tensor:
        scale, zero_point = affine_parameters(range_[0], range_[1])
        values = x.detach().reshape(-1, x.shape[-1])
        rounded, inside = torch.empty_like(values), torch.empty_like(values, dtype=torch.bool)
        low, high = -zero_point * scale, (CODES - zero_point) * scale
        for some, out, within in blocks(values, rounded, inside):
            affine_round(some, scale, zero_point, out=out)
            torch.ge(some, low, out=within).logical_and_(some <= high)
        ctx.save_for_backward(inside.view(x.shape))
        return rounded.view(x.shape)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        (inside,) = ctx.saved_tensors
        return gradients[0] * inside, None


class AffineFakeQuantizer(FakeQuantizerBase):
    """uint8 with one scale and zero point, computed as `static.affine_codes` computes it.

    Attributes:
        range: float32 [2], the least and the most that is represented; empty is [inf, -inf].
        frozen: training no longer moves the range.
        sample: where calibration takes note of values; they then pass as they are.
        name: of the module whose inputs they are.
    """

    def __init__(self, observer: str, name: str = "") -> None:
        super().__init__()
        self.enabled, self.observer, self.frozen, self.name = True, observer, False, name
        self._found = False  # as `found` was when it was last asked for, which waits for the device
        self.sample: Sample | None = None
        self.range = torch.tensor([torch.inf, -torch.inf])

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> AffineFakeQuantizer:
        """Follows the module to another device, and stays in float32."""
        self.range = self.range.to(fn(self.range).device)
        return super()._apply(fn, recurse)

    def forward(self, x: Tensor) -> Tensor:
        if not self.enabled or not x.numel():  # an expert without tokens
            return x
        if self.sample is not None:
            self.sample.add(x)
            return x
        if self.training:
            self._found = self._found or self.found
            if not (self.frozen and self._found) and not _recomputing():
                self._follow(x)
            if not (self._found or self.found):
                return x
        elif not self.found:
            raise ValueError(
                f"int8-static has no range of activations yet for {self.name or '<root>'!r}: train a step, with the "
                "model in training mode (model.train()), or write calibrate_(model, batches); if training never "
                f"runs it, overrides={{{self.name!r}: 'int8'}}"
            )
        # in training the loss shows a NaN; evaluated, it is what the kernel makes of it
        return _RoundAffine.apply(x if self.training else torch.where(x == x, x, 0.0), self.range)

    @property
    def found(self) -> bool:
        """Whether there is a range."""
        return bool(self.range[0] <= self.range[1])

    @torch.no_grad()
    def _follow(self, x: Tensor) -> None:
        """Moves the range to that of a batch; a batch with NaN or infinities says nothing (the loss shows them)."""
        new, old = batch_range(x, self.observer), self.range
        moved = torch.where(torch.isinf(old), new, old + MOMENTUM * (new - old))
        self.range.copy_(torch.where(torch.isfinite(new).all(), moved, old))

    def __repr__(self) -> str:
        low, high = self.range.tolist()
        return f"AffineFakeQuantizer(range=[{low:.4g}, {high:.4g}], observer={self.observer!r})"


def _recomputing() -> bool:
    """Whether this is called from a backward pass: activation checkpointing repeats the forward, with its range."""
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1


def average_(ranges: list[Tensor], add_up: Callable[[Tensor], Tensor]) -> None:
    """Gives each range [2] the mean of those that the ranks have found for it; one that none has found stays empty.

    Args:
        add_up: sums a tensor over the ranks.
    """
    own = torch.stack(ranges)
    found = own.isfinite().all(1, keepdim=True)
    sums = add_up(torch.cat([torch.where(found, own, 0.0), found.float()], 1))
    for range_, (low, high, ranks) in zip(ranges, sums, strict=True):
        if ranks:
            range_.copy_(torch.stack([low, high]) / ranks)


def affine_quantizers(model: nn.Module) -> dict[str, AffineFakeQuantizer]:
    """The fake quantizers of static activations, by name."""
    return {name: m for name, m in select.named_modules(model) if isinstance(m, AffineFakeQuantizer)}


@torch.no_grad()
def calibrate_(
    model: nn.Module,
    batches: Iterable[Any] | None,
    run: Callable[[nn.Module, Any], Any] | None = None,
    *,
    all_reached: bool = True,
) -> nn.Module:
    """Finds the ranges of static activations of a prepared model, and which BatchNorm follows which convolution.

    Args:
        batches: mappings of keyword inputs (labels are left out, but for an encoder-decoder model, whose answers they
            are), tensors, or tuples whose first item is the input; in the dtype of the model, or are brought into it.
        run: calls the model with a batch, if it takes other batches than these.
        all_reached: raise where no batch reaches a module; else it stays without a range.

    Raises:
        ValueError: no batches, NaN or infinite values, or a module that no batch reaches.

    >>> from lightning_accel import QuantConfig, prepare_
    >>> model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2)).eval()
    >>> _ = prepare_(model, QuantConfig("int8-static"))
    >>> _ = calibrate_(model, [torch.rand(4, 8) for _ in range(8)])
    >>> model[2].activation_fake_quantizer.found
    True
    """
    quantizers = affine_quantizers(model)
    if not quantizers:
        return model
    if batches is None:
        raise ValueError("int8-static finds its ranges in data; write calibration=loader, some batches of inputs")
    run = run or _run
    for name, quantizer in quantizers.items():
        quantizer.sample = Sample(name.rpartition(".")[0])
    count = 0
    try:
        with select.evaluating(model):
            for batch in batches:
                watch = NormWatch(model) if count == 0 else None
                try:
                    run(model, batch)
                except NonFinite as error:
                    raise ValueError(f"batch {count} of the calibration data {error}; look at the batch") from error
                finally:
                    norms = {} if watch is None else watch.stop()
                fold_(model, norms)
                count += 1
        _set_ranges(quantizers, count, all_reached)
    finally:
        for quantizer in quantizers.values():
            quantizer.sample = None
    return model


def _run(model: Any, batch: Any) -> None:
    dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
    inputs = inputs_of_batch(model, batch)
    if not any(isinstance(leaf, Tensor) for leaf in tree_leaves(inputs)):
        kind = type(batch).__name__
        raise ValueError(f"a batch of the calibration data is a {kind} without tensors; write torch.as_tensor(...)")
    inputs = tree_map_only(Tensor, lambda t: t.to(dtype) if t.is_floating_point() else t, inputs)
    args, kwargs = split_inputs(inputs)
    try:
        model(*args, **kwargs)
    except NonFinite:
        raise
    except ValueError as error:
        decodes = getattr(getattr(model, "config", None), "is_encoder_decoder", False) and model.can_generate()
        if not decodes or kwargs.keys() & {"decoder_input_ids", "decoder_inputs_embeds"}:
            raise
        raise ValueError(
            f"{type(model).__name__} decodes an answer, and the calibration data has none ({error}); give mappings "
            "with labels or decoder_input_ids"
        ) from error


def _set_ranges(quantizers: dict[str, AffineFakeQuantizer], count: int, all_reached: bool) -> None:
    if count == 0:
        raise ValueError("the calibration data is empty; write calibration=loader with some batches of inputs")
    if count < FEW_BATCHES:
        warn(
            f"ranges from {count} batches of calibration data; values outside of them are cut off, {FEW_BATCHES} or "
            "more batches are safer"
        )
    unseen = [name.rpartition(".")[0] for name, q in quantizers.items() if q.sample is not None and not q.sample.parts]
    if unseen and all_reached:
        raise ValueError(
            f"no batch of the calibration data reaches {unseen[0]!r}; write overrides={{{unseen[0]!r}: None}} or 'int8'"
        )
    for quantizer in quantizers.values():
        if quantizer.sample is not None and quantizer.sample.parts:
            quantizer.range.copy_(quantizer.sample.find_range(quantizer.observer))


def freeze_(model: nn.Module) -> None:
    """From here on training moves neither ranges nor the statistics of BatchNorms that convolutions absorb."""
    for quantizer in affine_quantizers(model).values():
        quantizer.frozen = True
    freeze_norms_(model)


def thaw_(model: nn.Module) -> None:
    """Undoes `freeze_`."""
    for quantizer in affine_quantizers(model).values():
        quantizer.frozen = False
    for norm in norms_of(model).values():
        thaw_norm_(select.get_module(model, norm))


def static_state(model: nn.Module, prefix: str = "") -> dict[str, Any]:
    """Ranges, and the BatchNorm of each convolution, as plain types; names begin with `prefix`."""
    quantizers = affine_quantizers(model)
    return {
        "ranges": {prefix + name: q.range.tolist() for name, q in quantizers.items() if q.found},
        "norms": {prefix + conv: prefix + norm for conv, norm in norms_of(model).items()},
        "frozen": any(q.frozen for q in quantizers.values()),
    }


def load_static_state_(model: nn.Module, state: dict[str, Any], prefix: str = "") -> None:
    """Puts what `static_state` gave into a prepared model, as far as it has modules of those names."""
    for name, quantizer in affine_quantizers(model).items():
        if (range_ := state["ranges"].get(prefix + name)) is not None:
            quantizer.range.copy_(torch.tensor(range_))
    norms = {c: n for c, n in state["norms"].items() if c.startswith(prefix) and n.startswith(prefix)}
    fold_(model, {c.removeprefix(prefix): n.removeprefix(prefix) for c, n in norms.items()})
    if state["frozen"]:
        freeze_(model)
