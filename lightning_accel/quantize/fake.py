"""Fake quantization: training sees the rounding that the deployed kernel will do (Jacob et al. 2018).

`prepare_` changes the *class* of each module it touches and adds torchao fake quantizers without state, so that
Parameters, state_dict keys, hooks, shared modules and train/eval state stay what they were (contract 1); torchao's
own swap makes new modules and loses some of these. torchao has no symmetric per-token fake quantizer (it refuses
that configuration), so ours is written under its base class.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from .. import select
from .._quiet import Conv1D, FakeQuantizedLinear, FakeQuantizerBase
from . import attend
from .adapters import unswap_adapters_
from .attention import FakeQuantizedAttention, FakeQuantizedOutProjection, UnfusedAttention, projections
from .config import QuantConfig
from .int4 import round_groups
from .norms import FakeQuantizedConv1d, FakeQuantizedConv2d, thaw_norm_
from .ops import round_rows
from .padded import zero_padding
from .products import FakeQuantizedProducts
from .ranges import AffineFakeQuantizer


class _RoundRows(torch.autograd.Function):
    """codes * scale, with the gradient passed straight through (Bengio et al. 2013, arXiv:1308.3432)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return round_rows(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        return gradients[0]


class Int8RowFakeQuantizer(FakeQuantizerBase):
    """Symmetric int8, one scale a row (last dimension), computed as `ops.int8_linear` computes it."""

    def __init__(self) -> None:
        super().__init__()
        self.enabled = True

    def forward(self, x: Tensor) -> Tensor:
        return _RoundRows.apply(x) if self.enabled else x

    def __repr__(self) -> str:
        return "Int8RowFakeQuantizer()"


class _RoundGroups(torch.autograd.Function):
    """As `_RoundRows`, in groups of inputs."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, group: int) -> Tensor:
        return round_groups(weight, group)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return gradients[0], None


class Int4GroupFakeQuantizer(FakeQuantizerBase):
    """Symmetric int4, one float16 scale a group of inputs, computed as `int4.pack` is given it."""

    def __init__(self, group: int) -> None:
        super().__init__()
        self.enabled, self.group = True, group

    def forward(self, weight: Tensor) -> Tensor:
        return _RoundGroups.apply(weight, self.group) if self.enabled else weight

    def __repr__(self) -> str:
        return f"Int4GroupFakeQuantizer(group={self.group})"


class FakeQuantizedConv1D(Conv1D):
    """transformers' Conv1D (GPT-2's linear layer, weight [in, out]) with fake-quantized activations and weights."""

    activation_fake_quantizer: nn.Module | None
    weight_fake_quantizer: nn.Module

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight_fake_quantizer(self.weight.t())
        x = x if self.activation_fake_quantizer is None else self.activation_fake_quantizer(x)
        return F.linear(x, weight, self.bias)


class FakeQuantizedEmbedding(nn.Embedding):
    """nn.Embedding with fake-quantized rows: those that are looked up, not the whole table, which gives the same."""

    weight_fake_quantizer: nn.Module

    def forward(self, ids: Tensor) -> Tensor:
        return self.weight_fake_quantizer(super().forward(ids))


class UnfusedEncoderLayer(nn.TransformerEncoderLayer):
    """In eval mode too, calls its layers one by one: the fused operator would take their raw weights."""

    @property
    def activation_relu_or_gelu(self) -> int:  # type: ignore[override]
        return 0


class UnfusedEncoder(nn.TransformerEncoder):
    """Never packs padded sequences, which only the fused operator understands."""

    @property
    def use_nested_tensor(self) -> bool:  # type: ignore[override]
        return False


FAKE: dict[type[nn.Module], type[nn.Module]] = {
    nn.Linear: FakeQuantizedLinear,
    nn.Embedding: FakeQuantizedEmbedding,
    Conv1D: FakeQuantizedConv1D,
    nn.Conv1d: FakeQuantizedConv1d,
    nn.Conv2d: FakeQuantizedConv2d,
    nn.MultiheadAttention: FakeQuantizedAttention,
    NonDynamicallyQuantizableLinear: FakeQuantizedOutProjection,
}
PLAIN = {fake: plain for plain, fake in FAKE.items()}
FAKE[UnfusedAttention] = FakeQuantizedAttention  # its out_proj was prepared alone, before
UNFUSED: dict[type[nn.Module], type[nn.Module]] = {
    nn.MultiheadAttention: UnfusedAttention,
    nn.TransformerEncoderLayer: UnfusedEncoderLayer,
    nn.TransformerEncoder: UnfusedEncoder,
}
FUSED = {unfused: fused for fused, unfused in UNFUSED.items()}
FAKE_TYPES = tuple(PLAIN)
_ACTIVATIONS: dict[type[nn.Module], tuple[str, ...]] = {  # names of the quantizers of inputs, where not the usual one
    FakeQuantizedEmbedding: (),
    FakeQuantizedAttention: tuple(f"{name}_activation_fake_quantizer" for name in ("query", "key", "value")),
}


def unprepare_(model: nn.Module) -> nn.Module:
    """Takes the fake quantizers out again, in place; the weights are the trained ones, not rounded."""
    unswap_adapters_(model)
    for module in model.modules():
        attend.remove_products_(module)
        module.__dict__.pop("fallback", None)
        if type(module) in PLAIN:
            for quantizer in (*_activations(module), "weight_fake_quantizer"):
                delattr(module, quantizer)
            if (norm := module.__dict__.pop("norm", None)) is not None:
                thaw_norm_(norm)
            module.__dict__.pop("around", None)
            module.__class__ = module.__dict__.pop("float_class", PLAIN[type(module)])
        elif type(module) in FUSED:
            module.__class__ = FUSED[type(module)]
    return model


def is_prepared(model: nn.Module) -> bool:
    """Whether any module of `model` is fake-quantized."""
    return any(is_fake(module) for module in model.modules())


def is_fake(module: nn.Module | None) -> bool:
    return type(module) in PLAIN or isinstance(module, FakeQuantizedProducts)


def count_own(module: nn.Module) -> int:
    """Parameters that belong to the module itself, not to its children."""
    return select.count_parameters(module, recurse=False)


def shapes_of(module: Any) -> list[tuple[int, int]]:
    """Output channels and inputs of each weight of a module that can be quantized."""
    if isinstance(module, nn.MultiheadAttention):
        return [(len(weight), weight.shape[1]) for weight, _ in projections(module).values()]
    rows, inputs = module.weight.flatten(1).shape
    return [(inputs, rows) if isinstance(module, Conv1D) else (rows, inputs)]


def swap_class_(module: Any, name: str, scheme: str, config: QuantConfig) -> None:
    if type(module) not in FAKE:  # a convolution that pads with zeros
        module.__dict__.update(float_class=type(module), around=zero_padding(module))
        module.__class__ = nn.Conv1d if isinstance(module, nn.Conv1d) else nn.Conv2d
    module.__class__ = FAKE[type(module)]
    if isinstance(module, nn.Conv1d | nn.Conv2d):
        module.__dict__["norm"] = None
        module.__dict__.setdefault("around", None)
    for attribute in _activations(module):
        setattr(module, attribute, _activation_quantizer(name, scheme, config))
    module.weight_fake_quantizer = _weight_quantizer(scheme, config)
    device = next(module.parameters()).device
    for quantizer in module.children():
        if isinstance(quantizer, FakeQuantizerBase):
            quantizer.to(device).train(module.training)


def _activations(module: nn.Module) -> tuple[str, ...]:
    """Names under which a fake-quantized module has the quantizers of its inputs."""
    return _ACTIVATIONS.get(type(module), ("activation_fake_quantizer",))


def _activation_quantizer(name: str, scheme: str, config: QuantConfig) -> FakeQuantizerBase | None:
    if scheme == "int4-weight":
        return None
    return AffineFakeQuantizer(config.observer, name) if scheme == "int8-static" else Int8RowFakeQuantizer()


def _weight_quantizer(scheme: str, config: QuantConfig) -> FakeQuantizerBase:
    return Int4GroupFakeQuantizer(config.group_size) if scheme.startswith("int4") else Int8RowFakeQuantizer()


def scheme_of(module: Any) -> str | None:
    """The scheme of a fake-quantized module, `None` for any other."""
    if type(module) not in PLAIN:
        return None
    activation = getattr(module, "activation_fake_quantizer", None)
    if isinstance(module.weight_fake_quantizer, Int8RowFakeQuantizer):
        return "int8-static" if isinstance(activation, AffineFakeQuantizer) else "int8"
    return "int4-weight" if activation is None else "int4-int8"
