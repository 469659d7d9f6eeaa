"""int8-static: convolutions, and the BatchNorm that they absorb."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from lightning_accel import QuantConfig, prepare_, quantize_model
from lightning_accel.quantize import Int8StaticConv, calibrate_, convert_, freeze_, quantization_coverage, unprepare_
from lightning_accel.quantize.norms import NormWatch, fold_, folded_weight, norms_of
from lightning_accel.quantize.ops import row_codes, row_scales
from lightning_accel.select import count_flops

STATIC = QuantConfig("int8-static")


class Block(nn.Module):
    """conv - norm - ReLU - conv - norm, and a residual."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.conv1, self.conv2 = (nn.Conv2d(width, width, 3, padding=1, bias=False) for _ in range(2))
        self.norm1, self.norm2 = nn.BatchNorm2d(width), nn.BatchNorm2d(width)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(x + self.norm2(self.conv2(torch.relu(self.norm1(self.conv1(x))))))


def network(seed: int = 0) -> nn.Sequential:
    """A small residual network for [batch, 3, 12, 12] whose BatchNorms have lived a little."""
    torch.manual_seed(seed)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, stride=2), nn.BatchNorm2d(8), nn.ReLU(), Block(), nn.AdaptiveAvgPool2d(2), nn.Flatten(),
        nn.Linear(32, 5),
    )  # fmt: skip
    for norm in (m for m in model.modules() if isinstance(m, nn.BatchNorm2d)):
        live(norm)
    return model.eval()


def live(norm: Any) -> Any:
    """Other statistics than a new one's; a channel with weight 0, some with negative ones."""
    with torch.no_grad():
        norm.weight.uniform_(-1.5, 2.0)
        norm.weight[0] = 0.0
        norm.bias.normal_()
        norm.running_mean.normal_()
        norm.running_var.uniform_(0.2, 3.0)
    return norm.eval()


def images(count: int = 8, seed: int = 1) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(4, 3, 12, 12, generator=generator) for _ in range(count)]


def prepared(model: nn.Module, data: list[Tensor]) -> nn.Module:
    prepare_(model, STATIC)
    return calibrate_(model, data)


def disabled(model: nn.Module) -> nn.Module:
    for module in model.modules():
        if hasattr(module, "enabled"):
            module.enabled = False
    return model


def error_bound(conv: Int8StaticConv, terms: int) -> Tensor:
    """What the order of float additions may change, [out]: of sums of `terms` products of codes."""
    return (terms + 8) * 2.0**-24 * (terms * 255 * 127 * conv.scale.double().abs() + conv.bias.double().abs() + 1)


GEOMETRY = {
    "size": st.integers(5, 9),
    "channels": st.integers(1, 5),
    "out": st.integers(1, 20),
    "kernel": st.sampled_from([1, 2, 3, (1, 3), (3, 2)]),
    "stride": st.sampled_from([1, 2, (2, 1)]),
    "padding": st.sampled_from([0, 1, (0, 1), "same"]),
    "dilation": st.sampled_from([1, 2]),
    "mode": st.sampled_from(["zeros", "reflect", "circular", "replicate"]),
    "groups": st.sampled_from([1, 2, "depthwise", "multiplied"]),
    "norm": st.booleans(),
    "bias": st.booleans(),
    "seed": st.integers(0, 100),
}


@pytest.mark.filterwarnings("ignore:Using padding='same'")
@settings(deadline=None, max_examples=100)
@given(**GEOMETRY)
def test_a_converted_convolution_is_the_fake_quantized_one_with_its_norm(
    size: int, channels: int, out: int, kernel: Any, stride: Any, padding: Any, dilation: int, mode: str, groups: Any,
    norm: bool, bias: bool, seed: int,
) -> None:  # fmt: skip
    torch.manual_seed(seed)
    stride = 1 if padding == "same" else stride
    if groups == 2:
        channels, out = 2 * channels, 2 * out
    elif groups != 1:
        out, groups = channels * (2 if groups == "multiplied" else 1), channels
    conv = nn.Conv2d(channels, out, kernel, stride, padding, dilation, groups, bias, mode)
    data = [torch.randn(2, channels, size, size) for _ in range(8)]
    model = prepared(nn.Sequential(conv, live(nn.BatchNorm2d(out)) if norm else nn.Identity()).eval(), data)
    fake, converted = model(data[0]), convert_(copy.deepcopy(model))
    codes = row_codes(folded_weight(conv).flatten(1), row_scales(folded_weight(conv).flatten(1)))
    expected = codes.view(conv.weight.shape).permute(0, 2, 3, 1).flatten(1)
    assert torch.equal(converted[0].codes.float(), expected), "the same codes"
    y = converted(data[0])
    assert y.shape == fake.shape and isinstance(converted[1], nn.Identity)
    assert ((y.double() - fake.double()).abs() <= 4 * error_bound(converted[0], expected.shape[1])[:, None, None]).all()


@pytest.mark.parametrize("padding", [0, 2, "same"])
@pytest.mark.parametrize("batched", [True, False])
def test_one_dimensional_convolutions_and_single_samples(padding: Any, batched: bool) -> None:
    torch.manual_seed(0)
    data = [torch.randn(2, 4, 20) for _ in range(8)]
    model = nn.Sequential(nn.Conv1d(4, 6, 5, padding=padding), live(nn.BatchNorm1d(6)))
    model = prepared(model.eval(), data)
    converted = convert_(copy.deepcopy(model))
    fake = model(data[0])
    y = converted(data[0]) if batched else torch.stack([converted[0](x) for x in data[0]])
    assert isinstance(converted[0], Int8StaticConv) and y.shape == fake.shape
    torch.testing.assert_close(y, fake, atol=2e-6, rtol=1e-5)


def test_norms_are_found_where_they_take_the_convolutions_own_output() -> None:
    model = prepared(network(), images())
    assert norms_of(model) == {"0": "1", "3.conv1": "3.norm1", "3.conv2": "3.norm2"}


class Twice(nn.Module):
    """One convolution before two norms, two convolutions before one norm, and one with a ReLU between."""

    def __init__(self) -> None:
        super().__init__()
        self.convs = nn.ModuleList(nn.Conv2d(3, 3, 1) for _ in range(5))
        self.norms = nn.ModuleList(live(nn.BatchNorm2d(3)) for _ in range(4))
        self.norms[3] = nn.BatchNorm2d(3, track_running_stats=False)

    def forward(self, x: Tensor) -> Tensor:
        y = self.convs[0](x)
        y = self.norms[0](y) + self.norms[1](y)
        y = self.norms[2](self.convs[1](y)) + self.norms[2](self.convs[2](y))
        return self.norms[3](self.convs[4](self.norms[0](torch.relu(self.convs[3](y)))))


def test_where_partners_are_not_one_to_one_no_norm_is_absorbed() -> None:
    torch.manual_seed(0)
    model = prepared(Twice().eval(), images())
    assert norms_of(model) == {}
    converted = convert_(copy.deepcopy(model))
    assert all(isinstance(norm, nn.BatchNorm2d) for norm in converted.norms)
    torch.testing.assert_close(converted(images()[0]), model(images()[0]), atol=1e-4, rtol=1e-4)


class Reused(nn.Module):
    """A convolution whose output a BatchNorm takes, and something else too."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.conv, self.norm, self.how = nn.Conv2d(3, 3, 1), live(nn.BatchNorm2d(3)), how
        if how == "hook":
            self.conv.register_forward_hook(lambda module, args, y: 2 * y)
        if how == "input":
            self.norm.register_forward_pre_hook(lambda module, args: (args[0] + 1,))
        if how == "hook on the norm":
            self.norm.register_forward_hook(lambda module, args, y: 2 * y)
        if how == "taken":
            self.norm.register_forward_hook(lambda module, args, y: y + args[0])

    def forward(self, x: Tensor) -> Any:
        y = self.conv(x)
        if self.how == "in place":
            y.add_(1)
        if self.how == "item":
            y[:, 0] = 0
        if self.how == "inplace=True":
            F.relu(y, inplace=True)
        if self.how == "+=":
            y += x
        z = self.norm(y)
        if self.how == "output":
            return {"z": z, "y": y}
        return z + y if self.how == "residual" else torch.cat([z, y]) if self.how == "list" else z


REUSED = ["residual", "list", "output", "in place", "item", "hook", "input", "taken", "hook on the norm", "+="]
REUSED += ["inplace=True"]


@pytest.mark.parametrize("how", REUSED)
@torch.no_grad()
def test_what_else_uses_a_convolutions_output_finds_it_there(how: str) -> None:
    torch.manual_seed(0)
    model = Reused(how).eval()
    x = images()[0]
    expected, found = model(x), quantize_model(model, STATIC, images())(x)
    for a, b in zip(*(y.values() if isinstance(y, dict) else [y] for y in (expected, found)), strict=True):
        assert (a - b).norm() < 0.02 * a.norm()


@pytest.mark.parametrize("how", ["plain", "shape"])
def test_asking_for_shapes_and_checkpointed_layers_use_nothing(how: str) -> None:
    class Block(Reused):
        def forward(self, x: Tensor) -> Tensor:
            y = self.conv(x)
            assert how == "plain" or (y.shape == x.shape and y.dim() == 4 and y.size(1) == 3 and y.dtype == x.dtype)
            return self.norm(y)

    model = Block("").train()
    prepare_(model, STATIC)
    watch = NormWatch(model)
    for reentrant in (True, False):
        checkpoint(model, images()[0].requires_grad_(), use_reentrant=reentrant).sum().backward()
    assert watch.stop() == {"conv": "norm"} and not torch.overrides._get_current_function_mode()


def test_norms_are_found_in_a_compiled_network_too() -> None:
    torch.compiler.reset()
    model = network()
    compiled = torch.compile(model, backend="eager")
    prepare_(compiled, STATIC)
    calibrate_(compiled, images())
    assert norms_of(model) == {"0": "1", "3.conv1": "3.norm1", "3.conv2": "3.norm2"}


@pytest.mark.aoti
def test_a_network_that_inductor_compiled_before_is_watched_in_training() -> None:
    torch.compiler.reset()
    model = nn.Sequential(nn.Conv2d(3, 4, 3), live(nn.BatchNorm2d(4)), nn.Flatten(), nn.Linear(400, 2))
    compiled, x = torch.compile(model), images(6)[0]
    compiled(x).sum().backward()
    prepare_(compiled, STATIC)
    watch = NormWatch(compiled)
    compiled(x).sum().backward()
    fold_(model, watch.stop())
    assert norms_of(model) == {"0": "1"}
    compiled(x).sum().backward()


@pytest.mark.parametrize("train", [False, True])
def test_without_rounding_a_folded_network_computes_what_it_was(train: bool) -> None:
    model, x = network().train(train), images()[0]
    expected = copy.deepcopy(model)(x)
    prepare_(model, STATIC)
    disabled(model)
    fold_(model, {"0": "1", "3.conv1": "3.norm1", "3.conv2": "3.norm2"})
    torch.testing.assert_close(model(x), expected, atol=2e-5, rtol=2e-5)


def test_in_training_norms_use_the_batch_until_they_are_frozen() -> None:
    model, data = network().train(), images()
    prepare_(model, STATIC)
    watch = NormWatch(model)
    model(data[0])
    fold_(model, watch.stop())
    before = model[1].running_mean.clone()
    model(data[1])
    assert not torch.equal(model[1].running_mean, before)
    freeze_(model)
    before, statistics = copy.deepcopy(model.state_dict()), model[1].running_mean.clone()
    trained = model(data[2])
    assert torch.equal(model[1].running_mean, statistics) and list(before) == list(model.state_dict())
    assert torch.equal(model.eval()(data[2]), trained), "frozen, it trains on what is deployed"
    torch.testing.assert_close(convert_(copy.deepcopy(model))(data[2]), trained, atol=1e-4, rtol=1e-4)


def test_gradients_reach_weights_and_norms_and_frozen_norms_too() -> None:
    model, data = network().train(), images()
    prepare_(model, STATIC)
    watch = NormWatch(model)
    model(data[0])
    fold_(model, watch.stop())
    for frozen in (False, True):
        model.zero_grad()
        model(data[1]).square().sum().backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
        assert model[3].conv1.weight.grad.abs().sum() > 0 and model[3].norm2.weight.grad.abs().sum() > 0
        if not frozen:
            freeze_(model)


def test_keys_and_parameters_stay_and_unprepare_restores_exactly() -> None:
    model = network()
    keys, types = list(model.state_dict()), [type(m) for m in model.modules()]
    parameters, attributes = [id(p) for p in model.parameters()], [set(vars(m)) for m in model.modules()]
    prepared(model, images())
    freeze_(model)
    assert list(model.state_dict()) == keys and [id(p) for p in model.parameters()] == parameters
    unprepare_(model)
    assert [type(m) for m in model.modules()] == types
    assert [set(vars(m)) for m in model.modules()] == attributes


def test_a_convolutions_codes_do_not_move_with_the_statistics_of_a_batch() -> None:
    model = prepared(network(), images()).train()
    freeze_(model)
    codes = convert_(copy.deepcopy(model))[0].codes
    model(images(1, seed=7)[0] * 3)
    assert torch.equal(convert_(copy.deepcopy(model))[0].codes, codes)


def test_coverage_counts_convolutions_in_groups_too_and_names_transposed_ones() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3, groups=8), nn.Conv2d(8, 4, 1, groups=2),
        nn.ConvTranspose2d(4, 4, 2),
    ).eval()  # fmt: skip
    data = images()
    coverage = quantization_coverage(quantize_model(model, STATIC, data), count_flops(model, (data[0],), {}))
    entries = {e.name: e for e in coverage.entries}
    assert {e.done for name, e in entries.items() if name != "5"} == {"int8-static"} and entries["5"].done is None
    assert entries["0"].flops == 2 * 4 * 8 * 100 * 27 and "1" not in entries
    assert entries["3"].parameters == 72 and entries["3"].flops == 2 * 4 * 8 * 64 * 9


# --- subclasses -------------------------------------------------------------------------------------------------------


class Same(nn.Conv2d):
    """TensorFlow's padding for one size of images, as EfficientNet's ports have it."""

    def __init__(self, *args: Any, before: tuple[int, ...] = (0, 1, 0, 1), **options: Any) -> None:
        super().__init__(*args, **options)
        self.stride = [*self.stride]
        self.static_padding = nn.ZeroPad2d(before) if any(before) else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        x = self.static_padding(x)
        return F.conv2d(x, self.weight, self.bias, self.stride, self.padding, self.dilation, self.groups)


class Padded1d(nn.Conv1d):
    """Causal: it sees no later steps."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(F.pad(x, (self.dilation[0] * (self.kernel_size[0] - 1), 0)))


class Dynamic(nn.Conv2d):
    """Pads as much as the size asks."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(F.pad(x, (0, x.shape[-1] % 2)))


class Noting(nn.Conv2d):
    """Keeps its last input."""

    def forward(self, x: Tensor) -> Tensor:
        self.last = x
        return super().forward(x)


class Ones(nn.Conv2d):
    """Pads with ones."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(F.pad(x, (1, 1), value=1.0))


class Cut(nn.Conv2d):
    """Takes a pixel off."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(F.pad(x, (-1, 0)))


class Standardized(nn.Conv2d):
    """Convolves with another weight than its own."""

    def forward(self, x: Tensor) -> Tensor:
        return self._conv_forward(x, self.weight - self.weight.mean(), self.bias)


class Doubled(nn.Conv2d):
    """Computes more than the convolution."""

    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


class Unbiased(nn.Conv2d):
    """Has a bias and leaves it out."""

    def forward(self, x: Tensor) -> Tensor:
        return self._conv_forward(x, self.weight, None)


class Strided(nn.Conv2d):
    """Another stride than it says."""

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.weight, self.bias, 2)


class InTraining(nn.Conv2d):
    """Something else in training."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(F.pad(x, (1, 1)) if self.training else x)


GEOMETRY_OF_SUBCLASSES = {
    "before": st.tuples(*[st.integers(0, 2)] * 4),
    "kernel": st.sampled_from([1, 3, (3, 2)]),
    "stride": st.sampled_from([1, 2]),
    "padding": st.sampled_from([0, 1, (0, 2), "same"]),
    "groups": st.sampled_from([1, 2, 6]),
    "bias": st.booleans(),
    "seed": st.integers(0, 100),
}


@pytest.mark.filterwarnings("ignore:Using padding='same'")
@settings(deadline=None, max_examples=60)
@given(**GEOMETRY_OF_SUBCLASSES)
def test_a_subclass_that_only_pads_is_quantized_and_restored(
    before: tuple[int, ...], kernel: Any, stride: int, padding: Any, groups: int, bias: bool, seed: int
) -> None:
    torch.manual_seed(seed)
    stride = 1 if padding == "same" else stride
    conv = Same(6, 6, kernel, stride, padding, groups=groups, bias=bias, before=before)
    model = nn.Sequential(conv, live(nn.BatchNorm2d(6))).eval()
    plain, data = copy.deepcopy(model), [torch.randn(2, 6, 6, 7) for _ in range(8)]
    keys, attributes = list(model.state_dict()), [set(vars(m)) for m in model.modules()]
    prepared(model, data)
    assert list(model.state_dict()) == keys and model[0].__dict__["norm"] is model[1]
    fake, converted = model(data[0]), convert_(copy.deepcopy(model))
    y = converted(data[0])
    terms = conv.weight[0].numel()
    assert y.shape == plain(data[0]).shape and isinstance(converted[0], Int8StaticConv)
    assert ((y.double() - fake.double()).abs() <= 4 * error_bound(converted[0], terms)[:, None, None]).all()
    unprepare_(model)
    assert [type(m) for m in model.modules()] == [type(m) for m in plain.modules()]
    assert [set(vars(m)) for m in model.modules()] == attributes
    assert torch.equal(model(data[0]), plain(data[0]))


def test_a_causal_convolution_in_one_dimension_is_quantized() -> None:
    torch.manual_seed(0)
    data = [torch.randn(2, 4, 20) for _ in range(8)]
    model = prepared(nn.Sequential(Padded1d(4, 6, 3, dilation=2)).eval(), data)
    converted = convert_(copy.deepcopy(model))
    torch.testing.assert_close(converted(data[0]), model(data[0]), atol=2e-6, rtol=1e-5)
    later = data[0].clone()
    later[..., 11:] = 9.0
    assert torch.equal(converted(later)[..., :11], converted(data[0])[..., :11])


OTHERS = [Dynamic, Noting, Ones, Cut, Standardized, Doubled, Unbiased, Strided, InTraining]


@pytest.mark.parametrize("kind", OTHERS)
def test_a_subclass_that_computes_anything_else_stays_in_float(kind: type[nn.Conv2d]) -> None:
    model = nn.Sequential(kind(3, 4, 3), nn.Conv2d(4, 4, 1)).eval()
    before, expected = set(vars(model[0])), model[0](images()[0])
    reasons = {e.name: e.reason for e in prepare_(model, STATIC).entries}
    assert reasons == {"0": "a subclass of Conv2d may compute something else", "1": None}
    assert type(model[0]) is kind and before == set(vars(model[0])) - {"fallback", "last"}
    assert torch.equal(model[0](images()[0]), expected)


def test_a_subclass_with_a_hook_on_its_padding_or_a_forward_of_its_own_stays_in_float() -> None:
    hooked, own = Same(3, 4, 3), Same(3, 4, 3)
    hooked.static_padding.register_forward_hook(lambda module, args, y: 2 * y)
    own.forward = lambda x: x[:, :1]  # type: ignore[method-assign]
    coverage = prepare_(nn.Sequential(hooked, own, Same(3, 4, 3)), STATIC)
    assert [e.done for e in coverage.entries] == [None, None, "int8-static"]
    assert [e.kind for e in coverage.entries] == ["Same"] * 3
    assert [e.kind for e in prepare_(nn.Sequential(prepared(Same(3, 4, 3), images())), STATIC).entries] == ["Same"]


def test_other_schemes_say_what_to_write_for_convolutions() -> None:
    reasons = {e.name: e.reason for e in prepare_(network(), QuantConfig("int8")).entries}
    assert reasons["0"] == "int8 has no form of convolutions; write overrides={'pattern': 'int8-static'} for it"
    config = QuantConfig("int8", overrides={"*conv*": "int8-static", "0": "int8-static"})
    model = quantize_model(network(), config, images())
    assert isinstance(model[3].conv1, Int8StaticConv) and type(model[6]).__name__ == "Int8Linear"


def test_masked_weights_are_zero_codes() -> None:
    model = network()
    with torch.no_grad():
        model[3].conv1.weight[:, ::2] = 0.0
    converted = quantize_model(model, STATIC, images())
    assert not converted[3].conv1.codes.view(8, 3, 3, 8)[..., ::2].any()


def test_a_norm_with_statistics_that_cannot_be_is_named() -> None:
    model = prepared(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)).eval(), images())
    model[1].running_var[2] = -1.0
    with pytest.raises(ValueError, match="the BatchNorm after '0' makes its folded weight NaN or infinite"):
        convert_(model)


@pytest.mark.parametrize("dims", [1, 2])
def test_the_weight_of_a_converted_convolution_is_the_folded_one_in_float(dims: int) -> None:
    torch.manual_seed(0)
    conv = (nn.Conv1d if dims == 1 else nn.Conv2d)(3, 5, 3)
    norm = (nn.BatchNorm1d if dims == 1 else nn.BatchNorm2d)(5)
    model = prepared(nn.Sequential(conv, norm).eval(), [torch.randn(2, 3, *(7,) * dims) for _ in range(8)])
    converted = convert_(copy.deepcopy(model))[0]
    expected = conv.weight_fake_quantizer(folded_weight(conv).flatten(1)).view(conv.weight.shape)
    torch.testing.assert_close(converted.weight, expected, atol=1e-7, rtol=1e-6)
    said = ("in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation", "groups", "padding_mode")
    assert [getattr(converted, name) for name in said] == [getattr(conv, name) for name in said]
