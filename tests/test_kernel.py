"""The compiled int8 kernel, bit by bit against its meaning in aten operators, on each of its paths."""

from __future__ import annotations

import ctypes
from collections.abc import Callable

import pytest
import torch
from compiled import Built
from hypothesis import given, settings
from hypothesis import strategies as st
from kernels import PATHS, compiled, source_of
from test_quantize import KINDS, kinds_of_rows
from torch import Tensor

from lightning_accel.quantize.converted import quantize_rows
from lightning_accel.quantize.ops import MOST_INT8_INPUTS, int8_embedding_reference, int8_linear_reference, tile

Kernel = Callable[[Tensor, Tensor, Tensor, Tensor | None], Tensor]
ENTRY = """
#include "{source}"
extern "C" __attribute__((visibility("default"))) void run(const float* x, const int8_t* w, const float* scale,
    const float* bias, float* y, int64_t M, int64_t N, int64_t K) {{
  const Layer only{{w, scale, bias, N}};
  linears(x, &only, 1, y, M, N, K);
}}
"""


@pytest.fixture(scope="module", params=PATHS)
def kernel(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Kernel:
    """The kernel's inner function as a small shared library, called on tensors."""
    library = compiled(ENTRY.format(source=source_of("int8_linear")), request.param, tmp_path_factory.mktemp("kernel"))
    function = ctypes.CDLL(str(library)).run

    def run(x: Tensor, tiles: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
        assert x.is_contiguous() and x.dtype == torch.float32
        y = torch.full((len(x), len(scale)), float("nan"))
        pointers = [ctypes.c_void_p(t.data_ptr() if t is not None else None) for t in (x, tiles, scale, bias, y)]
        function(*pointers, *(ctypes.c_int64(n) for n in (len(x), len(scale), x.shape[1])))
        return y

    return run


def layer(n: int, out: int, seed: int, with_bias: bool = True) -> tuple[Tensor, Tensor, Tensor | None]:
    """Codes [out, n], scales [out] and a bias [out]."""
    generator = torch.Generator().manual_seed(seed)
    weight, scale = quantize_rows(torch.randn(out, n, generator=generator))
    return weight, scale, torch.randn(out, generator=generator) if with_bias else None


def bits(x: Tensor) -> Tensor:
    """The bit patterns, all NaN as one."""
    return torch.where(x.isnan(), torch.nan, x).view(torch.int32)


def assert_bitwise(kernel: Kernel, x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None) -> None:
    expected = int8_linear_reference(x, weight, scale, bias)
    assert torch.equal(bits(kernel(x, tile(weight), scale, bias)), bits(expected))


@settings(deadline=None, max_examples=75)
@given(
    st.integers(1, 50),
    st.integers(1, 130),
    st.integers(1, 150),
    st.sampled_from(KINDS),
    st.booleans(),
    st.integers(0, 10**6),
)
def test_outputs_are_the_references_bit_by_bit(
    kernel: Kernel, rows: int, n: int, out: int, kind: str, with_bias: bool, seed: int
) -> None:
    assert_bitwise(kernel, kinds_of_rows(rows, n, kind, seed), *layer(n, out, seed, with_bias))


@pytest.mark.parametrize(("n", "out"), [(64, 64), (61, 67), (3, 1), (1, 15), (257, 200)])
def test_every_number_of_rows_and_ragged_sizes(kernel: Kernel, n: int, out: int) -> None:
    for rows in (*range(1, 18), 31, 32, 33, 128):
        for kind in KINDS:
            assert_bitwise(kernel, kinds_of_rows(rows, n, kind, rows), *layer(n, out, rows))


def test_large_enough_to_run_in_parallel_and_the_same_on_one_thread(kernel: Kernel) -> None:
    x, (weight, scale, bias) = kinds_of_rows(37, 250, "outlier"), layer(250, 1000, 1)
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            assert_bitwise(kernel, x, weight, scale, bias)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("bad", [float("nan"), -float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("place", [0, 15, 16, 20])
def test_a_row_with_a_non_finite_value_is_nan_and_its_neighbours_are_not(
    kernel: Kernel, bad: float, place: int
) -> None:
    x, (weight, scale, bias) = torch.randn(8, 21), layer(21, 33, 0)
    x[3, place] = bad
    y = kernel(x, tile(weight), scale, bias)
    assert y[3].isnan().all() and y[[0, 1, 2, 4, 5, 6, 7]].isfinite().all()
    assert_bitwise(kernel, x, weight, scale, bias)


def test_the_largest_sum_fits(kernel: Kernel) -> None:
    n = 2**31 // 127**2 // 16 * 16
    weight, x = torch.full((16, n), -127, dtype=torch.int8), torch.ones(2, n)
    y = kernel(x, tile(weight), torch.ones(16), None)
    assert torch.equal(y, torch.full((2, 16), float(-127 * 127 * n)) * (1 / torch.tensor(127.0)))


@pytest.mark.parametrize("rows", [1, 2, 6, 17])
def test_extreme_codes_of_every_sign_sum_exactly(kernel: Kernel, rows: int) -> None:
    """All codes 127 or -127 over the most inputs: rows and channels of one sign, of the other, and of both in turn."""
    n = MOST_INT8_INPUTS
    patterns = torch.stack([torch.ones(n), -torch.ones(n), 1.0 - 2.0 * (torch.arange(n) % 2)])
    x, weight = patterns[torch.arange(rows) % 3].contiguous(), (127 * patterns[torch.arange(17) % 3]).to(torch.int8)
    sums = 127 * 127 * (patterns.double() @ patterns.double().T)
    assert sums.abs().max() == 127 * 127 * n > 2**31 - 127 * 127
    expected = sums[torch.arange(rows) % 3][:, torch.arange(17) % 3].float() * (1 / torch.tensor(127.0))
    assert torch.equal(kernel(x, tile(weight), torch.ones(17), None), expected)


def test_products_of_torch_before_and_after_are_not_disturbed(kernel: Kernel) -> None:
    # oneDNN's AMX kernels keep what they configured in a thread
    x, (weight, scale, bias) = torch.randn(64, 96), layer(96, 64, 0)
    a, b = (torch.randint(-127, 128, (64, 128), dtype=torch.int8) for _ in range(2))
    half = torch.randn(64, 128).bfloat16()
    expected = torch._int_mm(a, b.t()), half @ half.t()
    for _ in range(3):
        assert_bitwise(kernel, x, weight, scale, bias)
        assert torch.equal(torch._int_mm(a, b.t()), expected[0])
        assert torch.equal(half @ half.t(), expected[1])


def test_denormals_and_signed_zeros(kernel: Kernel) -> None:
    x = torch.tensor([[1e-40, -1e-40, 0.0, -0.0], [1e-38, 1e-45, -0.0, 0.0], [-0.0, -0.0, -0.0, -0.0]])
    assert_bitwise(kernel, x, *layer(4, 20, 0))
    assert_bitwise(kernel, x, *layer(4, 20, 0, with_bias=False))


def test_memory_beyond_the_weights_and_inputs_is_not_used(kernel: Kernel) -> None:
    x, (weight, scale, bias) = torch.randn(5, 19), layer(19, 18, 0)
    guard = torch.full((5 * 19 + 64,), 1e30)
    guard[: 5 * 19] = x.flatten()
    ragged = guard[: 5 * 19].view(5, 19)
    assert torch.equal(kernel(ragged, tile(weight), scale, bias), kernel(x, tile(weight), scale, bias))
    assert (guard[5 * 19 :] == 1e30).all()


# --- inside a compiled program ----------------------------------------------------------------------------------------


@pytest.mark.aoti
@pytest.mark.parametrize(("batch", "length", "images"), [(1, 1, 1), (1, 13, 2), (3, 5, 3), (7, 1, 5), (16, 8, 128)])
@torch.no_grad()
def test_each_layer_of_a_compiled_program_is_the_reference_bit_by_bit(
    int8_layers: Built, batch: int, length: int, images: int
) -> None:
    from lightning_accel import QuantConfig, quantize_model

    generator = torch.Generator().manual_seed(batch)
    ids = torch.randint(0, 37, (batch, length), generator=generator)
    x = torch.randn(images, 5, 12, generator=generator)
    eager = quantize_model(int8_layers.eager, QuantConfig("int8"))(ids, x)
    compiled, portable = int8_layers.load("aoti")(ids, x), int8_layers.load("portable")(ids, x)
    assert list(compiled) == list(eager)
    for name in eager:
        assert torch.equal(bits(compiled[name]), bits(eager[name])), name
        assert torch.equal(bits(portable[name]), bits(eager[name])), name


@pytest.mark.aoti
@torch.no_grad()
def test_non_finite_rows_come_out_of_a_compiled_program_as_nan(int8_layers: Built) -> None:
    ids, x = torch.zeros(1, 1, dtype=torch.int64), torch.randn(3, 5, 12)
    x[1, 2, 3] = float("inf")
    compiled, portable = int8_layers.load("aoti")(ids, x), int8_layers.load("portable")(ids, x)
    assert compiled["narrow"].isnan().nonzero().tolist() == [[1, 2, 0]]
    for name in compiled:
        assert torch.equal(bits(compiled[name]), bits(portable[name])), name


@pytest.mark.aoti
def test_the_compiled_embedding_holds_the_references_rows(int8_layers: Built) -> None:
    weight, scale = quantize_rows(int8_layers.eager.embedding.weight.detach())
    ids = torch.arange(37)[:, None]
    compiled = int8_layers.load()(ids, torch.zeros(1, 5, 12))["embedding"]
    assert torch.equal(compiled, int8_embedding_reference(ids, weight, scale))
