"""The compiled kernel of attention with integer products against the formula in float64 and against the reference."""

from __future__ import annotations

import ctypes
import math

import pytest
import torch
from attending import (
    LAYOUTS,
    MASKS,
    Kernel,
    assert_same_with_any_number_of_threads,
    caller,
    library_of,
    masks,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from kernels import PATHS
from test_products import rounding_bound
from torch import Tensor

from lightning_accel.engines import aoti
from lightning_accel.quantize.products import int8_attention_reference

LEAST = torch.finfo(torch.float32).min
pytestmark = pytest.mark.skipif(
    aoti.slow_kernels({"isa": aoti.isa()}) is not None, reason="without AVX512-VNNI programs take the reference"
)

FORMS = """
extern "C" __attribute__((visibility("default"))) void powers_of(float* x, int64_t n) {
  for (int64_t i = 0; i < n; i += 16) _mm512_storeu_ps(x + i, power(_mm512_loadu_ps(x + i)));
}
"""


@pytest.fixture(scope="module", params=[name for name in PATHS if name in ("this machine", "no AMX")])
def library(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    return library_of("int8_attention", request.param, tmp_path_factory.mktemp("int8_attention"), FORMS)


@pytest.fixture(scope="module")
def kernel(library: ctypes.CDLL) -> Kernel:
    return caller(library)


def assert_close(y: Tensor, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float) -> None:
    """Within what rounding shares may change; but for codes that lie between two, the reference's numbers."""
    expected, bound = rounding_bound(q, k, v, mask, scale)
    off = (y - expected).abs()
    assert (off <= bound).all(), (off / bound).max()
    reference = int8_attention_reference(q, k, v, mask, scale)
    size = reference.abs().amax((-2, -1), keepdim=True)
    assert ((y - reference).abs() > 1e-5 * size + 1e-30).any(-1).float().mean() <= 0.5
    assert (y - reference).norm() <= 2e-3 * reference.norm() + 1e-30


@settings(deadline=None, max_examples=200)
@given(
    st.integers(1, 2),
    st.sampled_from([(1, 1), (3, 3), (4, 2), (6, 1)]),
    st.sampled_from([1, 2, 3, 5, 8, 11, 16, 17, 33, 47, 48, 49, 64, 100]),
    st.sampled_from([1, 2, 3, 15, 16, 17, 31, 33, 63, 64, 65, 128, 200, 513]),
    st.sampled_from([1, 5, 8, 16, 24, 32, 40, 64, 80, 128]),
    st.sampled_from([1, 3, 16, 32, 33, 64, 100]),
    st.sampled_from([kind for kind in MASKS if kind != "causal"]),
    st.lists(st.sampled_from(list(LAYOUTS)), min_size=3, max_size=3),
    st.sampled_from([1.0, 0.01, 4.0]),
    st.integers(0, 10**6),
)
def test_outputs_are_those_of_the_formula(
    kernel: Kernel,
    b: int,
    heads: tuple,
    rows: int,
    keys: int,
    d: int,
    e: int,
    kind: str,
    layouts: list,
    size: float,
    seed: int,
) -> None:
    torch.manual_seed(seed)
    h, groups = heads
    q = LAYOUTS[layouts[0]](b, h, rows, d).mul_(size)
    k, v = LAYOUTS[layouts[1]](b, groups, keys, d), LAYOUTS[layouts[2]](b, groups, keys, e)
    v.mul_(torch.rand(b, groups, keys, 1).mul_(6).exp())  # scales that differ from key to key
    v[0, 0, 0] = 0.0
    mask = masks(kind, b, h, rows, keys)
    assert_close(kernel(q, k, v, mask), q, k, v, mask, d**-0.5)


def test_long_sequences(kernel: Kernel) -> None:
    torch.manual_seed(0)
    q, k, v = torch.randn(1, 2, 70, 64), torch.randn(1, 1, 1500, 64), torch.randn(1, 1, 1500, 64)
    assert_close(kernel(q, k, v), q, k, v, None, 0.125)
    rising = k * torch.linspace(0.1, 8, 1500)[:, None]
    assert_close(kernel(q, rising, v), q, rising, v, None, 0.125)


@pytest.mark.parametrize("kind", ["bool", "float"])
def test_a_row_that_sees_nothing_is_zero(kernel: Kernel, kind: str) -> None:
    q, k, v = (torch.randn(2, 2, n, 32) for n in (20, 90, 90))
    seen = torch.ones(2, 1, 20, 90, dtype=torch.bool)
    seen[0, 0, 7] = False
    mask = seen if kind == "bool" else torch.zeros(seen.shape).masked_fill(~seen, -math.inf)
    y = kernel(q, k, v, mask)
    assert (y[0, :, 7] == 0).all() and (y[0, :, 8] != 0).any()
    hidden = torch.zeros(2, 1, 1, 90, dtype=torch.bool)
    assert (kernel(q, k, v, hidden) == 0).all()
    assert torch.equal(kernel(q, k[:, :, :0], v[:, :, :0]), torch.zeros(2, 2, 20, 32))


def test_a_row_masked_by_the_least_number_is_the_mean(kernel: Kernel) -> None:
    q, k, v = (torch.randn(1, 2, n, 32) for n in (20, 50, 50))
    for shape in ((1, 1, 20, 50), (1, 1, 1, 50)):
        y = kernel(q, k, v, torch.full(shape, LEAST))
        assert (y - v.mean(2, keepdim=True)).abs().max() <= 0.02


def test_hidden_keys_change_nothing(kernel: Kernel) -> None:
    q, k, v = (torch.randn(1, 2, n, 32) for n in (20, 50, 50))
    for shape in ((1, 1, 1, 50), (1, 1, 20, 50)):
        seen = torch.ones(shape, dtype=torch.bool)
        seen[..., 40:] = False
        y = kernel(q, k, v, seen)
        other, values = k.clone(), v.clone()
        other[:, :, 40:], values[:, :, 40:] = 1e4, -1e5
        assert torch.equal(kernel(q, other, values, seen), y)
        torch.testing.assert_close(kernel(q, k[:, :, :40], v[:, :, :40]), y, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("one", [False, True])
def test_what_is_not_finite_propagates_as_in_the_reference(kernel: Kernel, bad: float, one: bool) -> None:
    for where in range(4):
        torch.manual_seed(where)
        tensors = [torch.randn(2, 2, n, 32) for n in (20, 50, 50)]
        mask = torch.zeros(2, 1, 1 if one else 20, 50)
        if where == 3:
            mask[0, 0, -1, 3] = bad
        else:
            tensors[where][0, 1, 3, 5] = bad
        y, expected = kernel(*tensors, mask), int8_attention_reference(*tensors, mask, 32**-0.5)
        assert torch.equal(y.isnan(), expected.isnan())
        torch.testing.assert_close(y, expected, equal_nan=True, rtol=0, atol=0.02)


def test_the_number_of_threads_does_not_change_a_bit(kernel: Kernel) -> None:
    q, k, v = torch.randn(1, 4, 150, 32), torch.randn(1, 2, 700, 32), torch.randn(1, 2, 700, 32)
    assert_same_with_any_number_of_threads(kernel, q, k, v)


def test_powers_are_within_4e_6_where_they_become_codes(library: ctypes.CDLL) -> None:
    x = torch.cat([torch.linspace(-90, 0, 1 << 20), torch.tensor([0.0, -200.0, -1e30, -math.inf] + [0.0] * 12)])
    y = x.clone()
    library.powers_of(ctypes.c_void_p(y.data_ptr()), ctypes.c_int64(len(y)))
    expected = 255 * x.double().exp()
    normal = expected > 1e-37
    off = (y - expected).abs() / expected
    assert off[x >= -16].max() <= 4e-6 and off[normal].max() <= 1e-5
    assert (y[~normal] <= 1.2e-37).all() and (y[-16:][1:4] == 0).all() and round(float(y[-16])) == 255
