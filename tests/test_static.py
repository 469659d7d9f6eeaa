"""The compiled kernels of int8-static, bit by bit against their meaning in aten operators, on every path."""

from __future__ import annotations

import ctypes
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_kernel import PATHS
from torch import Tensor

from lightning_accel.engines import aoti
from lightning_accel.quantize.ops import tile
from lightning_accel.quantize.static import (
    MOST_INPUTS,
    int8_static_conv2d_reference,
    int8_static_linear_reference,
    static_sums,
)

Kernel = Callable[..., Tensor]

ENTRY = """
#include "{source}"
#define VISIBLE extern "C" __attribute__((visibility("default")))
VISIBLE void run_linear(const uint8_t* x, const int8_t* tiles, const int32_t* start, const float* scale,
    const float* bias, float* y, int64_t M, int64_t N, int64_t K) {{
  Weights w{{}}; w.tiles = tiles; w.start = start; w.scale = scale; w.bias = bias; w.N = N; w.K = K;
  linear(x, M, w, y);
}}
VISIBLE void run_conv2d(const uint8_t* x, const int8_t* tiles, const int32_t* start, const float* scale,
    const float* bias, float* y, int64_t batch, int64_t N, int64_t K, const int64_t* g) {{
  Weights w{{}}; w.tiles = tiles; w.start = start; w.scale = scale; w.bias = bias; w.N = N; w.K = K;
  conv2d({{x, g[0], g[1], g[2], g[3], g[4], g[5], g[6], g[7], g[8], g[9], g[10], g[11], g[12], g[13]}}, batch, w, y);
}}
"""


@pytest.fixture(scope="module", params=PATHS)
def library(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    directory = tmp_path_factory.mktemp("static")
    source, target = directory / "entry.cpp", directory / "kernel.so"
    source.write_text(ENTRY.format(source=aoti._KERNELS / "int8_static.cpp"))
    torch_libraries = Path(torch.__file__).parent / "lib"
    link = ["-shared", f"-L{torch_libraries}", f"-Wl,-rpath,{torch_libraries}", "-ltorch_cpu"]
    flags = [*aoti.kernel_flags(), *PATHS[request.param]]
    subprocess.run([aoti._compiler(), *flags, str(source), *link, "-o", str(target)], check=True)
    return ctypes.CDLL(str(target))


def call(function: ctypes._CFuncPtr, tensors: list[Tensor], *sizes: int) -> None:
    assert all(t.is_contiguous() for t in tensors)
    function(*[ctypes.c_void_p(t.data_ptr()) for t in tensors[:6]], *[ctypes.c_int64(n) for n in sizes],
             *[ctypes.c_void_p(t.data_ptr()) for t in tensors[6:]])  # fmt: skip


def layer(out: int, n: int, zero_point: int, seed: int) -> list[Tensor]:
    """Codes [out, n], start, scale and bias [out]."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randint(-127, 128, (out, n), generator=generator, dtype=torch.int8)
    scale, bias = torch.rand(out, generator=generator) * 1e-3, torch.randn(out, generator=generator)
    return [weight, static_sums(weight, zero_point), scale, bias]


def check_linear(library: ctypes.CDLL, codes: Tensor, parts: list[Tensor]) -> None:
    weight, start, scale, bias = parts
    y = torch.full((len(codes), len(weight)), torch.nan)
    sizes = len(codes), len(weight), codes.shape[1]
    call(library.run_linear, [codes, tile(weight), start, scale, bias, y], *sizes)
    assert torch.equal(y, int8_static_linear_reference(codes, *parts))


def check_conv(
    library: ctypes.CDLL, codes: Tensor, parts: list[Tensor], zero: int, kernel: tuple, stride: tuple, padding: tuple,
    dilation: tuple,
) -> None:  # fmt: skip
    weight, start, scale, bias = parts
    expected = int8_static_conv2d_reference(codes, *parts, zero, *kernel, stride, padding, dilation)
    y = torch.full(expected.shape, torch.nan)
    batch, *shape = codes.shape
    geometry = torch.tensor([*shape, *expected.shape[1:3], zero, *kernel, *stride, *padding, *dilation])
    tensors = [codes, tile(weight), start, scale, bias, y, geometry]
    call(library.run_conv2d, tensors, batch, len(weight), weight.shape[1])
    assert torch.equal(y, expected)


def random_codes(*shape: int, seed: int) -> Tensor:
    return torch.randint(0, 256, shape, generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)


def test_a_thousand_seeds_of_linear_layers_are_the_references_bit_by_bit(library: ctypes.CDLL) -> None:
    for seed in range(1000):
        rows, n, out = (1 + seed * step % most for step, most in ((7, 40), (13, 90), (11, 70)))
        zero = (0, 255, seed % 256)[seed % 3]
        check_linear(library, random_codes(rows, n, seed=seed), layer(out, n, zero, seed))


@settings(deadline=None, max_examples=100)
@given(
    st.integers(1, 3), st.integers(3, 12), st.integers(3, 12), st.integers(1, 20), st.integers(1, 40),
    st.tuples(st.integers(1, 3), st.integers(1, 3)), st.tuples(st.integers(1, 3), st.integers(1, 3)),
    st.tuples(st.integers(0, 2), st.integers(0, 2)), st.sampled_from([(1, 1), (1, 2), (2, 1)]),
    st.sampled_from([0, 7, 128, 255]), st.integers(0, 10**6),
)  # fmt: skip
def test_convolutions_are_the_references_bit_by_bit(
    library: ctypes.CDLL, batch: int, height: int, width: int, channels: int, out: int, kernel: tuple, stride: tuple,
    padding: tuple, dilation: tuple, zero: int, seed: int,
) -> None:  # fmt: skip
    height, width = (max(s, (k - 1) * d + 1) for s, k, d in zip((height, width), kernel, dilation, strict=True))
    parts = layer(out, kernel[0] * kernel[1] * channels, zero, seed)
    codes = random_codes(batch, height, width, channels, seed=seed)
    check_conv(library, codes, parts, zero, kernel, stride, padding, dilation)


@pytest.mark.parametrize(("rows", "n", "out"), [(512, 64, 96), (300, 384, 40), (128, 128, 512), (33, 1000, 17)])
def test_many_rows_in_blocks_and_in_place_and_on_several_threads(
    library: ctypes.CDLL, rows: int, n: int, out: int
) -> None:
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            check_linear(library, random_codes(rows, n, seed=threads), layer(out, n, 99, threads))
    finally:
        torch.set_num_threads(before)


def test_a_large_convolution_runs_in_parallel_and_is_the_same(library: ctypes.CDLL) -> None:
    parts = layer(48, 9 * 32, 11, 0)
    check_conv(library, random_codes(2, 28, 28, 32, seed=1), parts, 11, (3, 3), (1, 1), (1, 1), (1, 1))


@pytest.mark.parametrize("sign", [1, -1])
def test_extreme_codes_at_the_most_inputs_do_not_overflow(library: ctypes.CDLL, sign: int) -> None:
    weight = torch.full((2, MOST_INPUTS), sign * 127, dtype=torch.int8)
    parts = [weight, static_sums(weight, 0), torch.ones(2), torch.zeros(2)]
    codes = torch.full((6, MOST_INPUTS), 255, dtype=torch.uint8)
    check_linear(library, codes, parts)
    assert (int8_static_linear_reference(codes, *parts) == float(sign * 255 * 127 * MOST_INPUTS)).all()
