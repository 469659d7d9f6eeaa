"""Float convolutions in compiled programs: the depthwise kernel against float64, and the pass over programs."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernels import PATHS, compiled, source_of
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_accel import QuantConfig, export_model, load
from lightning_accel.capture import capture
from lightning_accel.engines.convolutions import DEPTHWISE, replace_convolutions
from lightning_accel.engines.linear import LINEAR, NONE, replace_linear
from lightning_accel.quantize.fused import ACTIVATIONS

Kernel = Callable[..., Tensor]
ENTRY = """
#include "{source}"
extern "C" __attribute__((visibility("default"))) void run(const float* x, const float* w, const float* bias, float* y,
    int64_t batch, int64_t H, int64_t W, int64_t C, int64_t out_height, int64_t out_width, int64_t kernel_height,
    int64_t kernel_width, int64_t stride_height, int64_t stride_width, int64_t top, int64_t left, int64_t down,
    int64_t across, int64_t activation) {{
  depthwise({{x, w, bias, H, W, C, out_height, out_width, kernel_height, kernel_width, stride_height, stride_width, top,
             left, down, across}}, batch, y, activation);
}}
"""


@pytest.fixture(scope="module", params=[name for name in PATHS if name in ("this machine", "AVX2")])
def kernel(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Kernel:
    """The kernel's inner function, called as F.conv2d with four paddings (left, right, top, bottom)."""
    library = compiled(ENTRY.format(source=source_of("depthwise")), request.param, tmp_path_factory.mktemp("depthwise"))
    function = ctypes.CDLL(str(library)).run

    def run(
        x: Tensor, weight: Tensor, bias: Tensor | None, stride: tuple[int, int], pads: tuple[int, int, int, int],
        dilation: tuple[int, int], activation: int = NONE,
    ) -> Tensor:  # fmt: skip
        shape = F.conv2d(F.pad(x, pads), weight, bias, stride, 0, dilation, len(weight)).permute(0, 2, 3, 1).shape
        image, kernel, y = x.permute(0, 2, 3, 1).contiguous(), weight.flatten(1).T.contiguous(), torch.empty(shape)
        y.fill_(float("nan"))
        pointers = [ctypes.c_void_p(t.data_ptr() if t is not None else None) for t in (image, kernel, bias, y)]
        numbers = (*image.shape, *shape[1:3], *weight.shape[2:], *stride, pads[2], pads[0], *dilation, activation)
        function(*pointers, *(ctypes.c_int64(n) for n in numbers))
        return y.permute(0, 3, 1, 2)

    return run


def drawn(seed: int, batch: int, channels: int, size: tuple[int, int], window: tuple[int, int]) -> tuple[Tensor, ...]:
    """x [B, C, H, W], a weight [C, 1, height, width] and a bias [C]."""
    generator = torch.Generator().manual_seed(seed)
    shapes = ((batch, channels, *size), (channels, 1, *window), (channels,))
    return tuple(torch.randn(shape, generator=generator) for shape in shapes)


@settings(deadline=None, max_examples=150)
@given(
    st.integers(0, 10**6), st.integers(1, 2), st.integers(1, 70), st.tuples(st.integers(1, 14), st.integers(1, 25)),
    st.tuples(st.integers(1, 5), st.integers(1, 5)), st.tuples(st.integers(1, 3), st.integers(1, 3)),
    st.tuples(*[st.integers(0, 6)] * 4), st.tuples(st.integers(1, 2), st.integers(1, 3)), st.booleans(),
)  # fmt: skip
def test_outputs_are_sums_of_the_exact_products(
    kernel: Kernel, seed: int, batch: int, channels: int, size: tuple[int, int], window: tuple[int, int],
    stride: tuple[int, int], pads: tuple[int, int, int, int], dilation: tuple[int, int], with_bias: bool,
) -> None:  # fmt: skip
    x, weight, bias = drawn(seed, batch, channels, size, window)
    sides = [pads[2] + size[0] + pads[3], pads[0] + size[1] + pads[1]]
    if any(side < (n - 1) * d + 1 for side, n, d in zip(sides, window, dilation, strict=True)):
        return  # smaller than a window
    given_bias = bias if with_bias else None
    y = kernel(x, weight, given_bias, stride, pads, dilation)
    padded, b = F.pad(x, pads).double(), None if given_bias is None else bias.double()
    exact = F.conv2d(padded, weight.double(), b, stride, 0, dilation, channels)
    terms = F.conv2d(padded.abs(), weight.double().abs(), None if b is None else b.abs(), stride, 0, dilation, channels)
    assert bool(((y - exact).abs() <= 2.0**-23 * (2 + window[0] * window[1]) * terms).all())


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activations_follow(kernel: Kernel, name: str) -> None:
    x, weight, bias = drawn(0, 2, 37, (9, 21), (3, 3))
    window = 4 * bias, (1, 1), (1, 1, 1, 1), (1, 1)
    y = kernel(x, weight, *window)
    got, exact = kernel(x, weight, *window, list(ACTIVATIONS).index(name)), ACTIVATIONS[name](y.double())
    assert bool(((got - exact).abs() <= 2.0**-20 * y.abs() + 1e-37).all())


def test_large_images_are_the_same_on_any_number_of_threads(kernel: Kernel) -> None:
    x, weight, bias = drawn(0, 2, 80, (40, 50), (5, 5))
    window, threads = (bias, (2, 1), (2, 2, 2, 2), (1, 1)), torch.get_num_threads()
    found = kernel(x, weight, *window)
    try:
        for count in (1, 3):
            torch.set_num_threads(count)
            assert torch.equal(kernel(x, weight, *window), found)
    finally:
        torch.set_num_threads(threads)


def test_what_is_not_finite_stays_where_it_is_seen(kernel: Kernel) -> None:
    x, weight, _ = drawn(0, 1, 20, (9, 30), (3, 3))
    x[0, 4, 5, 7] = float("nan")
    y = kernel(x, weight, None, (1, 1), (1, 1, 1, 1), (1, 1), list(ACTIVATIONS).index("relu6"))
    seen = torch.zeros_like(y, dtype=torch.bool)
    seen[0, 4, 4:7, 6:9] = True
    assert torch.equal(y.isnan(), seen)


# --- programs ---------------------------------------------------------------------------------------------------------


def normed(*layers: nn.Module) -> nn.Sequential:
    """The layers, with statistics and weights of norms that are not those of a new one."""
    for layer in layers:
        if isinstance(layer, nn.BatchNorm2d):
            layer.running_mean = torch.randn(layer.num_features)
            layer.running_var = torch.rand(layer.num_features) + 0.5
            if layer.affine:
                nn.init.uniform_(layer.weight, 0.5, 2)
                nn.init.normal_(layer.bias)
    return nn.Sequential(*layers).eval()


class Block(nn.Module):
    """An inverted residual as in EfficientNet-Lite, padded on one side more than on the other where it strides."""

    def __init__(self, inner: nn.Module, stride: int = 1, pad: tuple[int, int, int, int] = (1, 1, 1, 1)) -> None:
        super().__init__()
        self.expand = normed(nn.Conv2d(8, 24, 1, bias=False), nn.BatchNorm2d(24), inner)
        self.pad = nn.ZeroPad2d(pad)
        self.depthwise = normed(nn.Conv2d(24, 24, 3, stride, groups=24, bias=False), nn.BatchNorm2d(24), inner)
        self.project = normed(nn.Conv2d(24, 8, 1), nn.BatchNorm2d(8))
        self.stride = stride

    def forward(self, x: Tensor) -> Tensor:
        y = self.project(self.depthwise(self.pad(self.expand(x))))
        return x + y if self.stride == 1 else y


def network() -> nn.Module:
    torch.manual_seed(0)
    stem = normed(nn.ZeroPad2d((1, 1, 1, 1)), nn.Conv2d(3, 8, 3, 2, bias=False), nn.BatchNorm2d(8), nn.ReLU6())
    blocks = Block(nn.ReLU6()), Block(nn.SiLU(), 2, (0, 1, 0, 1)), Block(nn.ReLU())
    return nn.Sequential(stem, *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5)).eval()


def _replaced(model: nn.Module, x: Tensor) -> tuple[set[str], list[torch.fx.Node]]:
    """Names of the weights that operators have, and the calls; the program computes what it did."""
    (captured,) = capture(model.eval(), (x,)).values()
    program = captured.export(captured.module)
    with torch.no_grad():
        expected = captured.module(x)[0]
        names = set(replace_convolutions(program))
        torch.testing.assert_close(program.module()(x)[0], expected, rtol=1e-4, atol=1e-5)
    return names, [node for node in program.graph.nodes if node.op == "call_function"]


def test_a_network_of_blocks_keeps_its_stem_only() -> None:
    names, calls = _replaced(network(), torch.randn(2, 3, 30, 26))
    assert names == {f"model.{i}.{part}.0.weight" for i in (1, 2, 3) for part in ("expand", "depthwise", "project")}
    targets = [node.target for node in calls]
    assert torch.ops.aten.batch_norm.default not in targets and torch.ops.aten.pad.default not in targets
    (stem,) = [node for node in calls if node.target is torch.ops.aten.conv2d.default]
    assert list(stem.args[4]) == [1, 1]  # type: ignore[arg-type]
    code = list(ACTIVATIONS).index
    taken = [node.args[-1] for node in calls if node.target is DEPTHWISE]
    assert taken == [code("relu6"), code("silu"), code("relu")]
    residuals = [node.args[3] is not None for node in calls if node.target is LINEAR]
    assert residuals == [False, True, False, False, False, True]
    taken = [node.args[-1] for node in calls if node.target is LINEAR]
    assert taken == [code("relu6"), NONE, code("silu"), NONE, code("relu"), NONE]


class Kept(nn.Module):
    """What has to stay: norms that cannot go in, weights with other uses, windows that are no operator's."""

    def __init__(self) -> None:
        super().__init__()
        self.twice, self.norm, self.other = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), nn.BatchNorm2d(4)
        self.bare, self.plain = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4, affine=False)
        self.read, self.groups = nn.Conv2d(4, 4, 1), nn.Conv2d(4, 8, 3, padding=1, groups=4)
        self.strided, self.wide = nn.Conv2d(8, 4, 1, stride=2), nn.Conv2d(4, 4, 1).double()
        self.mirrored = nn.Conv2d(4, 4, 3, padding=1, padding_mode="reflect", groups=4)
        normed(*(m for m in self.modules() if isinstance(m, nn.BatchNorm2d)))

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.twice(x)) + self.other(self.twice(x + 1))
        x = self.plain(self.bare(x)) + self.read(x) * self.read.weight.sum()
        x = self.strided(F.pad(self.groups(x), (1, 1, 1, 1), value=2.0))
        return self.wide(x.double()).float() + self.mirrored(x)


def test_what_no_operator_knows_stays() -> None:
    names, calls = _replaced(Kept(), torch.randn(2, 4, 8, 9))
    assert names == {"model.mirrored.weight"}  # its image was padded before
    assert [node.target for node in calls].count(torch.ops.aten.batch_norm.default) == 3


def test_a_norm_goes_into_a_convolution_with_a_bias_and_one_without() -> None:
    for bias in (True, False):
        layers = normed(nn.Conv2d(3, 6, 3, padding=1, bias=bias), nn.BatchNorm2d(6), nn.Conv2d(6, 6, 3, groups=6))
        _, calls = _replaced(layers, torch.randn(2, 3, 7, 7))
        assert not any(node.target is torch.ops.aten.batch_norm.default for node in calls)


class Layers(nn.Module):
    """Layers for code that is given: what the pass has to leave as it is, or to get right all the same."""

    def __init__(self, code: Callable[[Any, Tensor], Tensor]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.code, self.linear = code, nn.Linear(6, 6)
        self.point, self.deep, self.full = nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 3, groups=8), nn.Conv2d(8, 8, 3)
        self.norm, self.kind = normed(nn.BatchNorm2d(8))[0], nn.BatchNorm1d(8).eval()
        nn.init.uniform_(self.kind.weight, 2, 3)
        self.number, self.table = nn.Parameter(torch.randn(1)), nn.Parameter(torch.randn(8, 3))
        self.register_buffer("kernel", torch.randn(8, 8, 3, 3))
        self.register_buffer("shift", torch.randn(8))

    def forward(self, x: Tensor) -> Tensor:
        return self.code(self, x * 1.5)


CODE: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "view of 1 x 1": lambda m, x: m.point(x).relu().view(x.shape[0], -1),
    "view of 3 x 3": lambda m, x: F.max_pool2d(m.full(x).relu(), 2).contiguous().view(x.shape[0], -1),
    "view of channels": lambda m, x: m.deep(x).view(x.shape[0] * 8, -1),
    "complex": lambda m, x: torch.view_as_real(torch.view_as_complex(m.point(x)[..., :2].unflatten(-1, (1, 2)))),
    "strided": lambda m, x: m.point(x).as_strided((2, 5), (3, 1)),
    "written before the shortcut": lambda m, x: (lambda y, x: m.point(x) + y)(m.point(x), F.relu(x, inplace=True)),
    "written before the residual": lambda m, x: (lambda y, x: y + x)(m.linear(x), x.relu_()),
    "written before the norm": lambda m, x: (lambda y, x: m.norm(y).mean() + x)(m.full(x), x.relu_()),
    "written before padding": lambda m, x: (lambda p, x: m.full(p) + x)(F.pad(x, (1, 1, 1, 1)), x.relu_()),
    "written before a depthwise": lambda m, x: (lambda p, x: m.deep(p) + x)(F.pad(x, (1, 1, 1, 1)), x.relu_()),
    "written before the activation": lambda m, x: (lambda y, x: F.relu(y) + x)(m.linear(x), x.add_(1)),
    "written after a flattening": lambda m, x: (lambda y: (y.flatten(1).clamp_(-0.1, 0.1), y)[1])(m.point(x)),
    "written through a reshape": lambda m, x: (lambda y: (y.reshape(2, -1).sub_(1), y * 2)[1])(m.full(x)),
    "written in part": lambda m, x: (lambda y: (y.reshape(-1)[:7].fill_(3), y)[1])(m.point(x)),
    "weight in a buffer": lambda m, x: m.norm(F.conv2d(x, m.kernel)),
    "bias in a buffer": lambda m, x: m.norm(F.conv2d(x, m.full.weight, m.shift)),
    "shift in a buffer": lambda m, x: F.batch_norm(F.conv2d(x, m.full.weight), m.shift, m.shift**2, m.shift, m.shift),
    "negative dimensions": lambda m, x: m.linear(x).permute(0, -1, 1, -2) + x.permute(0, 3, 1, 2),
    "one number of padding": lambda m, x: F.conv2d(x, m.full.weight, None, 1, [1]),
    "one number of dilation": lambda m, x: F.conv2d(x, m.deep.weight, None, 1, [1], [2], 8),
    "no batch": lambda m, x: m.kind(F.conv2d(x[0], m.point.weight)),
    "in place": lambda m, x: F.relu6(m.point(F.silu(m.norm(m.full(x)), inplace=True)).add_(1), inplace=True),
}  # fmt: skip


@pytest.mark.parametrize("name", CODE)
def test_code_that_depends_on_memory_computes_what_it_did(name: str) -> None:
    x = torch.randn(2, 8, 8, 6)
    model = Layers(CODE[name]).eval()
    (captured,) = capture(model, (x,)).values()
    with torch.no_grad():
        expected = captured.module(x)[0]
        for whole in (False, True):
            program = captured.export(captured.module)
            replace_convolutions(program)
            replace_linear(program)
            program = program.run_decompositions() if whole else program
            found = program.module()(x)[0]
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
            assert found.stride() == expected.stride() or found.dim() < 2


def test_convolutions_in_place_are_fused_as_others_are() -> None:
    names, calls = _replaced(Layers(CODE["in place"]), torch.randn(2, 8, 8, 6))
    assert "model.point.weight" in names and not any("batch_norm" in str(node.target) for node in calls)


@pytest.mark.aoti
def test_a_bias_that_lies_apart_in_memory(tmp_path: Path) -> None:
    def code(m: Any, x: Tensor) -> Tensor:
        y = F.conv2d(x, m.point.weight, m.number.expand(8)) + F.conv2d(x, m.full.weight[:, :, :1, :1], m.table[:, 1])
        return F.conv2d(y, m.deep.weight, m.table[:, 2], groups=8)

    model, x = Layers(code).eval(), torch.randn(2, 8, 8, 6)
    export_model(model, tmp_path / "a", example_inputs=(x,), measure=False)
    with torch.no_grad():
        torch.testing.assert_close(load(tmp_path / "a", engine="aoti")(x), model(x), rtol=1e-4, atol=1e-5)


@pytest.mark.aoti
def test_programs_are_what_the_model_is(tmp_path: Path) -> None:
    model, images = network(), [torch.randn(2, 3, 30, 26) for _ in range(3)]
    given = {"example_inputs": (images[0],), "data": [(x,) for x in images], "measure": False}
    export_model(model, tmp_path / "float", **given)  # type: ignore[arg-type]
    compiled = load(tmp_path / "float", engine="aoti")
    with torch.no_grad():
        for rows in (1, 2, 5):
            x = torch.randn(rows, 3, 30, 26)
            for given_x in (x, x.contiguous(memory_format=torch.channels_last)):
                torch.testing.assert_close(compiled(given_x), model(x), rtol=1e-4, atol=1e-5)
    kept = {"1.expand.0": None, "1.depthwise.0": None}
    config = QuantConfig("int8-static", overrides=kept)
    export_model(model, tmp_path / "int8", quantize=config, calibration=given["data"], **given)  # type: ignore[arg-type]
    parts = [load(tmp_path / "int8", engine=name)(images[0]) for name in ("aoti", "portable")]
    torch.testing.assert_close(*parts, rtol=1e-3, atol=1e-3)


@pytest.mark.aoti
def test_a_network_of_nothing_else(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 20, 1), nn.ReLU(), nn.Conv2d(20, 20, 5, padding=2, groups=20)).eval()
    x = torch.randn(2, 3, 9, 11)
    export_model(model, tmp_path / "a", example_inputs=(x,), measure=False)
    with torch.no_grad():
        for name in ("aoti", "portable"):
            torch.testing.assert_close(load(tmp_path / "a", engine=name)(x), model(x), rtol=1e-4, atol=1e-5)
