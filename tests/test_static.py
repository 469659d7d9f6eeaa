"""int8 with static activations: its arithmetic, and its kernels bit by bit against the references on every path."""

from __future__ import annotations

import ctypes
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernels import PATHS, compiled, source_of
from torch import Tensor

from lightning_accel.quantize import static
from lightning_accel.quantize.ops import tile

Pair = tuple[int, int]
Sides = tuple[int, int, int, int]  # top, left, bottom, right

ENTRY = """
#include "{source}"
#define RUN extern "C" __attribute__((visibility("default"))) void
#define PARTS const int8_t* tiles, const int32_t* start, const float* scale, const float* bias
Weights weights(int64_t N, int64_t K, PARTS) {{
  Weights w{{}};
  w.tiles = tiles, w.start = start, w.scale = scale, w.bias = bias, w.N = N, w.K = K;
  return w;
}}
RUN run_linear(const uint8_t* x, PARTS, float* y, int64_t M, int64_t N, int64_t K) {{
  const Weights w = weights(N, K, tiles, start, scale, bias);
  linear(x, M, w, Scaled{{{{w}}, y}});
}}
RUN run_conv2d(const uint8_t* x, PARTS, float* y, int64_t B, int64_t H, int64_t W, int64_t C, int64_t OH, int64_t OW,
    int64_t N, int64_t groups, int64_t zero, int64_t kh, int64_t kw, int64_t sh, int64_t sw, int64_t top, int64_t left,
    int64_t dh, int64_t dw) {{
  const Windows windows{{x, H, W, C, OH, OW, zero, kh, kw, sh, sw, top, left, dh, dw}};
  const Weights w = weights(N, kh * kw * C / groups, tiles, start, scale, bias);
  conv2d(windows, B, groups, w, Scaled{{{{w}}, y}});
}}
RUN run_conv2d_coded(const uint8_t* x, PARTS, const float* factor, uint8_t* y, int64_t B, int64_t H, int64_t W,
    int64_t C, int64_t OH, int64_t OW, int64_t N, int64_t groups, int64_t zero, int64_t kh, int64_t kw, int64_t sh,
    int64_t sw, int64_t top, int64_t left, int64_t dh, int64_t dw, int64_t out_zero, int64_t least, int64_t most) {{
  const Windows windows{{x, H, W, C, OH, OW, zero, kh, kw, sh, sw, top, left, dh, dw}};
  const Weights w = weights(N, kh * kw * C / groups, tiles, start, scale, bias);
  const Affine as{{*factor, int32_t(out_zero), int32_t(least), int32_t(most)}};
  conv2d(windows, B, groups, w, Coded{{{{w}}, as, y}});
}}
"""


@dataclass
class Layer:
    """int8 weights [N, K] with what belongs to them."""

    weight: Tensor
    start: Tensor
    scale: Tensor
    bias: Tensor
    zero_point: int

    @classmethod
    def random(cls, n: int, k: int, zero_point: int, generator: torch.Generator) -> Layer:
        weight = torch.randint(-127, 128, (n, k), generator=generator, dtype=torch.int8)
        scale, bias = torch.rand(n, generator=generator), torch.randn(n, generator=generator)
        return cls(weight, static.static_sums(weight, zero_point), scale, bias, zero_point)

    def rest(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.start, self.scale, self.bias


class Kernels:
    """The kernels' inner functions in a small shared library, called on tensors."""

    def __init__(self, library: Path) -> None:
        self.library = ctypes.CDLL(str(library))

    def _call(
        self, name: str, tensors: tuple[Tensor, ...], shape: tuple[int, ...], *sizes: int, dtype: Any = torch.float32
    ) -> Tensor:
        assert all(t.is_contiguous() for t in tensors)
        count = int(np.prod(shape))
        y = torch.full((count + 64,), float("nan") if dtype is torch.float32 else 77, dtype=dtype)
        y[count:] = 7.0
        pointers = [ctypes.c_void_p(t.data_ptr()) for t in (*tensors, y)]
        getattr(self.library, name)(*pointers, *map(ctypes.c_int64, sizes))
        assert (y[count:] == 7.0).all(), "written past the end"
        return y[:count].view(shape)

    def linear(self, x: Tensor, layer: Layer) -> Tensor:
        n, k = layer.weight.shape
        return self._call("run_linear", (x, tile(layer.weight), *layer.rest()), (len(x), n), len(x), n, k)

    def conv2d(
        self, x: Tensor, layer: Layer, kernel: Pair, stride: Pair, padding: Sides, dilation: Pair, groups: int,
        coded: tuple[float, int, int, int] | None = None,
    ) -> Tensor:  # fmt: skip
        """`coded`: factor, zero point, least and most of codes that come out in place of floats."""
        n = len(layer.weight)
        shape = static.conv2d_shape(x.shape[:3], n, *kernel, *stride, *padding, *dilation)
        sizes = (*x.shape, *shape[1:3], n, groups, layer.zero_point, *kernel, *stride, *padding[:2], *dilation)
        tensors = (x, tile(layer.weight), *layer.rest())
        if coded is None:
            return self._call("run_conv2d", tensors, shape, *sizes)
        tensors = (*tensors, torch.tensor(coded[0]))
        return self._call("run_conv2d_coded", tensors, shape, *sizes, *coded[1:], dtype=torch.uint8)


@pytest.fixture(scope="module", params=PATHS)
def kernels(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Kernels:
    library = compiled(ENTRY.format(source=source_of("int8_static")), request.param, tmp_path_factory.mktemp("kernel"))
    return Kernels(library)


def codes(*shape: int, generator: torch.Generator) -> Tensor:
    return torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8)


def assert_linear(kernels: Kernels, x: Tensor, layer: Layer) -> None:
    expected = static.int8_static_linear_reference(x, layer.weight, *layer.rest())
    assert torch.equal(kernels.linear(x, layer), expected)


def assert_conv2d(
    kernels: Kernels, x: Tensor, layer: Layer, kernel: Pair, stride: Pair, padding: Sides, dilation: Pair,
    groups: int = 1,
) -> None:  # fmt: skip
    expected = static.int8_static_conv2d_reference(
        x, layer.weight, *layer.rest(), layer.zero_point, *kernel, stride, padding, dilation, groups
    )
    found = kernels.conv2d(x, layer, kernel, stride, padding, dilation, groups)
    assert torch.equal(found.nan_to_num(), expected.nan_to_num())
    factor, zero = 150.0 / (1.0 + float(expected.abs().nan_to_num(0, 0, 0).max())), layer.zero_point
    codes = static.codes_by_factor(expected, factor, zero)
    for least, most in ((0, 255), (zero, 255), (zero // 2, min(zero + 90, 255))):
        found = kernels.conv2d(x, layer, kernel, stride, padding, dilation, groups, (factor, zero, least, most))
        assert torch.equal(found, codes.clamp(least, most))


# --- arithmetic -------------------------------------------------------------------------------------------------------

ranges = st.tuples(*[st.floats(-(2.0**100), 2.0**100, width=32)] * 2).map(sorted)
BITS = torch.arange(-(2**31), 2**31, 40009).to(torch.int32).view(torch.float32)  # every kind of float32, NaN among them


def numpy_codes(x: Tensor, scale: float, zero_point: int) -> np.ndarray:
    """Written from the formula."""
    inverse = np.float32(1) / np.float32(scale)
    with np.errstate(all="ignore"):
        values = np.clip(np.rint(x.numpy() * inverse) + np.float32(zero_point), 0, 255)
    return np.where(np.isnan(values), np.float32(zero_point), values).astype(np.uint8)


def test_codes_by_hand() -> None:
    scale, zero_point = static.affine(-32.0, 95.5)
    assert (scale, zero_point) == (0.5, 64)
    x = torch.tensor([-32.0, 95.5, 0.0, 0.25, 0.75, -0.25, 1e9, -1e9, float("inf"), -float("inf"), float("nan")])
    expected = [0, 255, 64, 64, 66, 64, 255, 0, 255, 0, 64]
    assert static.affine_codes(x, scale, zero_point).tolist() == expected, "half goes to even, NaN is 0"


@settings(deadline=None, max_examples=300)
@given(ranges)
def test_every_range_contains_zero_exactly(ends: list[float]) -> None:
    scale, zero_point = static.affine(*ends)
    assert scale > 0 and scale == np.float32(scale) and 0 <= zero_point <= 255
    code = static.affine_codes(torch.tensor([0.0, -0.0]), scale, zero_point)
    assert code.tolist() == [zero_point, zero_point]
    assert ((code.float() - zero_point) * scale == 0).all()


@settings(deadline=None, max_examples=200)
@given(ranges, st.integers(0, 1000))
def test_values_in_the_range_are_off_by_no_more_than_a_step(ends: list[float], seed: int) -> None:
    low, high = min(ends[0], 0.0), max(ends[1], 0.0)
    scale, zero_point = static.affine(low, high)
    share = torch.rand(100, generator=torch.Generator().manual_seed(seed)).double()
    x = (low + share * (high - low)).float()
    values = (static.affine_codes(x, scale, zero_point).double() - zero_point) * scale
    assert ((values - x.double()).abs() <= 1.001 * scale).all(), "half a step, and half of the zero point's at an end"


@settings(deadline=None, max_examples=100)
@given(ranges, st.integers(0, 1000))
def test_codes_are_numpys_bit_by_bit(ends: list[float], seed: int) -> None:
    scale, zero_point = static.affine(*ends)
    x = torch.cat([BITS, torch.randn(1000, generator=torch.Generator().manual_seed(seed)) * 99 * scale])
    assert np.array_equal(static.affine_codes(x, scale, zero_point).numpy(), numpy_codes(x, scale, zero_point))


def test_codes_are_the_same_compiled() -> None:
    scale, zero_point = static.affine(-1.7, 3.3)
    compiled = torch.compile(lambda x: static.affine_codes(torch.relu(x) - 1, scale, zero_point), dynamic=True)
    halves = torch.arange(-600, 600) * scale / 2 + 1  # where contraction or another rounding would show
    for x in (BITS, halves, torch.randn(1001) * 2):
        assert torch.equal(compiled(x), static.affine_codes(torch.relu(x) - 1, scale, zero_point))


@pytest.mark.parametrize("ends", [(float("nan"), 1.0), (0.0, float("nan")), (-float("inf"), 0.0), (-3e38, 3e38)])
def test_a_range_that_is_not_finite_is_refused(ends: tuple[float, float]) -> None:
    with pytest.raises(ValueError, match="is not finite in float32"):
        static.affine(*ends)


@pytest.mark.parametrize("groups", [1, 2, 6])
@pytest.mark.parametrize("zero_point", [0, 7, 255])
def test_the_references_sums_are_those_of_float64(zero_point: int, groups: int) -> None:
    generator = torch.Generator().manual_seed(zero_point)
    x, layer = codes(2, 9, 8, 6, generator=generator), Layer.random(6, 3 * 2 * 6 // groups, zero_point, generator)
    stride, (top, left, bottom, right), dilation = (2, 1), (1, 2, 0, 3), (1, 2)
    y = static.int8_static_conv2d_reference(
        x, layer.weight, *layer.rest(), zero_point, 3, 2, stride, (top, left, bottom, right), dilation, groups
    )
    weight = layer.weight.double().view(6, 3, 2, -1).permute(0, 3, 1, 2)
    values = torch.nn.functional.pad(x.double().permute(0, 3, 1, 2) - zero_point, (left, right, top, bottom))
    sums = torch.nn.functional.conv2d(values, weight, None, stride, 0, dilation, groups).permute(0, 2, 3, 1)
    assert torch.equal(y, sums.float() * layer.scale + layer.bias), "padding is 0"
    layer = Layer.random(6, 30, zero_point, generator)
    rows = x.flatten(1)[:, :30].contiguous()
    sums = (rows.double() - zero_point) @ layer.weight.double().T
    y = static.int8_static_linear_reference(rows, layer.weight, *layer.rest())
    assert torch.equal(y, sums.float() * layer.scale + layer.bias)


def test_operators_are_registered_with_the_shapes_of_free_sizes() -> None:
    generator = torch.Generator().manual_seed(0)
    layer = Layer.random(5, 12, 9, generator)
    operators, rest = torch.ops.lightning_accel, (tile(layer.weight), *layer.rest())
    torch.library.opcheck(
        operators.int8_static_linear_tiled.default, (codes(2, 3, 12, generator=generator), *rest),
    )  # fmt: skip
    convolution = (codes(2, 7, 6, 2, generator=generator), *rest, 9, 3, 2, 2, 1, 1, 0, 2, 1, 1, 2, 1)
    torch.library.opcheck(operators.int8_static_conv2d_tiled.default, convolution)
    torch.library.opcheck(operators.int8_static_conv2d_coded.default, (*convolution, 0.5, 9, 9, 255))


@pytest.mark.parametrize("tiled", [False, True])
def test_a_convolution_is_exported_with_free_batch_and_image(tiled: bool) -> None:
    layer = Layer.random(5, 3 * 3 * 2, 9, torch.Generator().manual_seed(0))
    weight = tile(layer.weight) if tiled else layer.weight
    function = static.int8_static_conv2d_tiled if tiled else static.int8_static_conv2d_reference

    class Convolution(torch.nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            image = static.affine_codes(x, 0.013, 9).permute(0, 2, 3, 1).contiguous()
            return function(image, weight, *layer.rest(), 9, 3, 3, (2, 1), (1, 0, 0, 1), (1, 2))

    free = {0: torch.export.Dim("batch"), 2: torch.export.Dim("height", min=8), 3: torch.export.Dim("width", min=8)}
    program = torch.export.export(Convolution(), (torch.randn(2, 2, 9, 10),), dynamic_shapes=(free,)).module()
    for x in (torch.randn(1, 2, 9, 10), torch.randn(5, 2, 14, 8)):
        assert torch.equal(program(x), Convolution()(x))


# --- kernels ----------------------------------------------------------------------------------------------------------

zero_points = st.sampled_from([0, 1, 127, 128, 255])
pairs = st.tuples(st.integers(1, 3), st.integers(1, 3))


def test_a_thousand_layers_are_the_references_bit_by_bit(kernels: Kernels) -> None:
    for seed in range(1000):
        generator, choose = torch.Generator().manual_seed(seed), random.Random(seed)
        zero_point, n = choose.choice([0, 255, choose.randint(0, 255)]), choose.randint(1, 40)
        rows, k = choose.randint(1, 40), choose.choice([1, 2, 3, 4, 27, 63, 64, 65, 100, 128])
        assert_linear(kernels, codes(rows, k, generator=generator), Layer.random(n, k, zero_point, generator))
        kernel, stride, dilation = ((choose.randint(1, 3), choose.randint(1, 2)) for _ in range(3))
        padding, c = tuple(choose.randint(0, 3) for _ in range(4)), choose.choice([1, 2, 3, 4, 7, 16, 65])
        x = codes(choose.randint(1, 3), choose.randint(7, 10), choose.randint(3, 9), c, generator=generator)
        layer = Layer.random(n, kernel[0] * kernel[1] * c, zero_point, generator)
        assert_conv2d(kernels, x, layer, kernel, stride, padding, dilation)
        layer = Layer.random(c, kernel[0] * kernel[1], zero_point, generator)
        assert_conv2d(kernels, x, layer, kernel, stride, padding, dilation, groups=c)


@settings(deadline=None, max_examples=60)
@given(st.integers(1, 80), st.integers(1, 300), st.integers(1, 150), zero_points, st.integers(0, 10**6))
def test_linear_is_the_reference_bit_by_bit(
    kernels: Kernels, rows: int, k: int, n: int, zero_point: int, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    assert_linear(kernels, codes(rows, k, generator=generator), Layer.random(n, k, zero_point, generator))


@settings(deadline=None, max_examples=100)
@given(
    st.tuples(st.integers(1, 4), st.integers(1, 20), st.integers(1, 20), st.integers(1, 70)),
    st.integers(1, 80),
    pairs,
    pairs,
    st.tuples(*[st.integers(0, 4)] * 4),
    pairs,
    zero_points,
    st.integers(0, 10**6),
)
def test_convolutions_are_the_reference_bit_by_bit(
    kernels: Kernels, shape: tuple[int, int, int, int], n: int, kernel: Pair, stride: Pair, padding: Sides,
    dilation: Pair, zero_point: int, seed: int,
) -> None:  # fmt: skip
    fits = [shape[1 + i] + padding[i] + padding[2 + i] > (kernel[i] - 1) * dilation[i] for i in (0, 1)]
    if all(fits):
        generator = torch.Generator().manual_seed(seed)
        layer = Layer.random(n, kernel[0] * kernel[1] * shape[3], zero_point, generator)
        assert_conv2d(kernels, codes(*shape, generator=generator), layer, kernel, stride, padding, dilation)


@settings(deadline=None, max_examples=100)
@given(
    st.tuples(st.integers(1, 3), st.integers(1, 12), st.integers(1, 12), st.integers(2, 150)),
    st.tuples(st.integers(1, 6), st.integers(1, 6)),
    pairs,
    st.tuples(*[st.integers(0, 4)] * 4),
    pairs,
    zero_points,
    st.integers(0, 10**6),
)
def test_depthwise_convolutions_are_the_reference_bit_by_bit(
    kernels: Kernels, shape: tuple[int, int, int, int], kernel: Pair, stride: Pair, padding: Sides, dilation: Pair,
    zero_point: int, seed: int,
) -> None:  # fmt: skip
    fits = [shape[1 + i] + padding[i] + padding[2 + i] > (kernel[i] - 1) * dilation[i] for i in (0, 1)]
    if all(fits):
        generator, groups = torch.Generator().manual_seed(seed), shape[3]
        layer = Layer.random(groups, kernel[0] * kernel[1], zero_point, generator)
        assert_conv2d(kernels, codes(*shape, generator=generator), layer, kernel, stride, padding, dilation, groups)


@pytest.mark.parametrize(("k", "n"), [(64, 64), (192, 130), (61, 67), (1, 15), (1152, 48)])
def test_every_number_of_rows(kernels: Kernels, k: int, n: int) -> None:
    generator = torch.Generator().manual_seed(k)
    layer = Layer.random(n, k, 100, generator)
    for rows in (*range(1, 20), 31, 32, 33, 64, 127, 128, 600):
        assert_linear(kernels, codes(rows, k, generator=generator), layer)


def test_layers_of_networks(kernels: Kernels) -> None:
    generator = torch.Generator().manual_seed(0)
    for c, size, n, kernel, stride, padding in ((3, 57, 64, 7, 2, 3), (64, 14, 64, 3, 1, 1), (96, 9, 200, 1, 2, 0),
                                                (256, 7, 256, 3, 1, 1), (64, 28, 33, 1, 1, 0)):  # fmt: skip
        layer = Layer.random(n, kernel * kernel * c, 3, generator)
        x = codes(2, size, size, c, generator=generator)
        assert_conv2d(kernels, x, layer, (kernel, kernel), (stride, stride), (padding,) * 4, (1, 1))
    for c, size, kernel, stride in ((32, 20, 3, 1), (96, 15, 3, 2), (240, 9, 5, 1), (1152, 7, 5, 1)):
        layer = Layer.random(c, kernel * kernel, 3, generator)
        x, padding = codes(2, size, size, c, generator=generator), kernel // 2
        assert_conv2d(kernels, x, layer, (kernel, kernel), (stride, stride), (padding,) * 4, (1, 1), groups=c)


@pytest.mark.parametrize("rows", [1, 3, 33])
def test_the_largest_sums_fit(kernels: Kernels, rows: int) -> None:
    """Every code 255 (or 0), every weight 127 or -127, and as many inputs as an int32 holds."""
    k = static.MOST_INPUTS
    assert 255 * 127 * k < 2**31 <= 255 * 127 * (k + 1)
    weight = torch.full((18, k), 127, dtype=torch.int8)
    weight[1::2] = -127
    sign = torch.tensor([1.0, -1.0]).repeat(9)
    for zero_point in (0, 255):
        layer = Layer(weight, static.static_sums(weight, zero_point), torch.ones(18), torch.zeros(18), zero_point)
        for code in (0, 255):
            x = torch.full((rows, k), code, dtype=torch.uint8)
            assert_linear(kernels, x, layer)
            expected = sign * float((code - zero_point) * 127 * k)
            assert torch.equal(kernels.linear(x, layer), expected.expand(rows, 18))


@pytest.mark.parametrize("groups", [1, 20])
def test_codes_of_outputs_that_are_not_finite_are_those_of_activations(kernels: Kernels, groups: int) -> None:
    generator = torch.Generator().manual_seed(0)
    layer, x = Layer.random(20, 9 * 20 // groups, 8, generator), codes(1, 5, 5, 20, generator=generator)
    layer.bias[1], layer.bias[2], layer.bias[17], layer.scale[18] = torch.nan, torch.inf, -torch.inf, torch.inf
    layer.bias[3], layer.bias[4] = 1e30, -1e30
    assert_conv2d(kernels, x, layer, (3, 3), (1, 1), (0,) * 4, (1, 1), groups)


def test_large_enough_to_run_in_parallel_and_the_same_on_one_thread(kernels: Kernels) -> None:
    generator = torch.Generator().manual_seed(0)
    wide, tall = Layer.random(500, 150, 8, generator), Layer.random(40, 150, 8, generator)
    conv, before = Layer.random(24, 9 * 16, 8, generator), torch.get_num_threads()
    few, many = codes(37, 150, generator=generator), codes(900, 150, generator=generator)
    aligned, in_place = Layer.random(96, 64, 8, generator), codes(1024, 64, generator=generator)
    images = codes(5, 28, 28, 16, generator=generator)
    deep, depthwise = codes(3, 28, 28, 100, generator=generator), Layer.random(100, 9, 8, generator)
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            assert_linear(kernels, few, wide)
            assert_linear(kernels, many, tall)
            assert_linear(kernels, in_place, aligned)
            assert_conv2d(kernels, images, conv, (3, 3), (1, 1), (1,) * 4, (1, 1))
            assert_conv2d(kernels, deep, depthwise, (3, 3), (1, 1), (1,) * 4, (1, 1), groups=100)
    finally:
        torch.set_num_threads(before)


def test_an_empty_batch_is_empty(kernels: Kernels) -> None:
    generator = torch.Generator().manual_seed(0)
    assert kernels.linear(codes(0, 20, generator=generator), Layer.random(5, 20, 0, generator)).shape == (0, 5)
