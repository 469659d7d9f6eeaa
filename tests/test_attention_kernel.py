"""The compiled attention kernel against float64, on its tile, vector and plain paths; its pass over programs."""

from __future__ import annotations

import ctypes
import math
from collections.abc import Callable

import pytest
import tiny
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
from compiled import Built
from hypothesis import given, settings
from hypothesis import strategies as st
from kernels import PATHS
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_accel.capture import capture
from lightning_accel.engines import aoti
from lightning_accel.engines.attention import attention, replace_attention

UNIT = 2.0**-24  # of rounding to float32
LEAST = torch.finfo(torch.float32).min

EXPONENTIALS = """
extern "C" __attribute__((visibility("default"))) int exponentials_of(float* x, int64_t n) {
#ifdef VNNI
  for (int64_t i = 0; i < n; i += 16) _mm512_storeu_ps(x + i, exponential(_mm512_loadu_ps(x + i)));
  return 1;
#else
  return 0;
#endif
}
"""


@pytest.fixture(scope="module", params=[name for name in PATHS if name not in ("AVX-VNNI", "plain")])
def library(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    return library_of("attention", request.param, tmp_path_factory.mktemp("attention"), EXPONENTIALS)


@pytest.fixture(scope="module")
def kernel(library: ctypes.CDLL) -> Kernel:
    return caller(library)


def exact(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, is_causal: bool, scale: float) -> tuple[Tensor, Tensor]:
    """Attention in float64, and what float32 may be off by.

    A score is a sum of D products: off by d = (D + 4) u scale |q| |k| + 2 u |mask|, u = 2^-24, with every rounding in
    the same direction. A share, exp of a difference of scores over a sum of shares, is off by the factor exp(2 d), and
    by (S + 16) u from exp, S additions and a division; as much again for the product with the values.
    """
    q, k, v = (x.double() for x in (q, k, v))
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    scores, off = q @ k.mT * scale, (q.abs() @ k.abs().mT) * abs(scale) * (q.shape[-1] + 4) * UNIT
    if is_causal:
        mask = torch.ones(q.shape[2], k.shape[2]).tril().bool()
    if mask is not None and mask.dtype == torch.bool:
        mask = torch.zeros(mask.shape).masked_fill(~mask, -math.inf)
    if mask is not None:
        scores, off = scores + mask, off + mask.abs().double() * 2 * UNIT
    top = scores.amax(-1, keepdim=True)
    seen = torch.exp(scores - torch.where(top == -math.inf, 0.0, top))
    shares = seen / seen.sum(-1, keepdim=True).clamp_min(1e-300)
    worst = torch.where(scores > top - 120, off, 0.0).amax(-1, keepdim=True)  # of others, shares and errors are none
    bound = (torch.expm1(2 * worst) + 2 * (k.shape[2] + 16) * UNIT) * (shares @ v.abs()) + 1e-35
    return shares @ v, bound


def assert_close(kernel: Kernel, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, **options) -> None:
    """Within the bound of `exact`."""
    is_causal, scale = options.get("is_causal", False), options.get("scale", q.shape[-1] ** -0.5)
    expected, bound = exact(q, k, v, mask, is_causal, scale)
    off = (kernel(q, k, v, mask, is_causal, scale) - expected).abs()
    assert (off <= bound).all(), (off / bound).max()


@settings(deadline=None, max_examples=150)
@given(
    st.integers(1, 2),
    st.sampled_from([(1, 1), (3, 3), (4, 2), (6, 1)]),
    st.sampled_from([1, 2, 3, 5, 8, 11, 16, 17, 32, 33, 47, 64, 100, 131]),
    st.sampled_from([1, 2, 15, 16, 17, 31, 32, 33, 48, 64, 100, 128, 200, 513]),
    st.sampled_from([1, 5, 8, 16, 24, 32, 40, 64, 80, 128]),
    st.sampled_from(MASKS),
    st.lists(st.sampled_from(list(LAYOUTS)), min_size=3, max_size=3),
    st.sampled_from([1.0, 0.01, 12.0]),
    st.integers(0, 10**6),
)
def test_outputs_are_as_close_to_float64_as_float32_can_be(
    kernel: Kernel, b: int, heads: tuple, rows: int, keys: int, d: int, kind: str, layouts: list, size: float, seed: int
) -> None:
    torch.manual_seed(seed)
    h, groups = heads
    q = LAYOUTS[layouts[0]](b, h, rows, d).mul_(size)
    k, v = LAYOUTS[layouts[1]](b, groups, keys, d), LAYOUTS[layouts[2]](b, groups, keys, d)
    assert_close(kernel, q, k, v, masks(kind, b, h, rows, keys), is_causal=kind == "causal")


@pytest.mark.parametrize("size", [1.0, 12.0])
@pytest.mark.parametrize("rows", [1, 16, 24, 64])
def test_the_mean_error_is_about_torchs(kernel: Kernel, rows: int, size: float) -> None:
    torch.manual_seed(0)
    q, k, v = torch.randn(8, 4, rows, 64).mul_(size), torch.randn(8, 4, 96, 64), torch.randn(8, 4, 96, 64)
    expected, _ = exact(q, k, v, None, False, 0.125)
    ours, torchs = kernel(q, k, v) - expected, F.scaled_dot_product_attention(q, k, v) - expected
    assert ours.square().mean() <= 1.5**2 * torchs.square().mean()


@pytest.mark.parametrize("rows", [1, 7, 16, 20, 40])
def test_every_width_up_to_two_registers_and_values_of_another_width(kernel: Kernel, rows: int) -> None:
    torch.manual_seed(rows)
    for d in range(1, 34):
        q, k = torch.randn(1, 2, rows, d), torch.randn(1, 2, 37, d)
        for wide in (d, 3, 70):
            expected, bound = exact(q, k, v := torch.randn(1, 2, 37, wide), None, False, d**-0.5)
            assert ((kernel(q, k, v) - expected).abs() <= bound).all()


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize(("rows", "keys"), [(1, 2000), (40, 1500), (1100, 1100), (600, 40), (40, 600)])
def test_sequences_longer_than_a_block(kernel: Kernel, rows: int, keys: int, is_causal: bool) -> None:
    torch.manual_seed(0)
    q, k, v = torch.randn(1, 2, rows, 24), torch.randn(1, 1, keys, 24), torch.randn(1, 1, keys, 24)
    assert_close(kernel, q, k, v, is_causal=is_causal)
    rising = k * torch.linspace(0.1, 8, keys)[:, None]  # the largest score comes late: sums so far are corrected
    assert_close(kernel, q, rising, v, is_causal=is_causal)


@pytest.mark.parametrize("rows", [1, 4, 20, 40])
@pytest.mark.parametrize("kind", ["bool", "float"])
def test_a_row_that_sees_nothing_is_zero_as_torchs_is(kernel: Kernel, rows: int, kind: str) -> None:
    q, k, v = (torch.randn(2, 2, n, 16) for n in (rows, 600, 600))
    seen = torch.ones(2, 1, rows, 600, dtype=torch.bool)
    seen[0, 0, rows // 2] = False
    seen[1, 0, 0, :550] = False  # nothing in the first block
    mask = seen if kind == "bool" else torch.zeros(seen.shape).masked_fill(~seen, -math.inf)
    assert (kernel(q, k, v, mask)[0, :, rows // 2] == 0).all()
    assert (F.scaled_dot_product_attention(q, k, v, mask)[0, :, rows // 2] == 0).all()
    assert_close(kernel, q, k, v, mask)


@pytest.mark.parametrize("rows", [1, 4, 20, 40])
def test_no_keys_give_zeros_as_torch_gives(kernel: Kernel, rows: int) -> None:
    q, k, v = torch.randn(1, 2, rows, 8), torch.randn(1, 2, 0, 8), torch.randn(1, 2, 0, 8)
    assert torch.equal(kernel(q, k, v), torch.zeros(1, 2, rows, 8))
    assert torch.equal(F.scaled_dot_product_attention(q, k, v), torch.zeros(1, 2, rows, 8))


@pytest.mark.parametrize("rows", [1, 4, 20, 40])
def test_a_row_masked_by_the_least_number_is_the_mean_as_torchs_is(kernel: Kernel, rows: int) -> None:
    q, k, v = (torch.randn(1, 2, n, 16) for n in (rows, 50, 50))
    mask = torch.where(torch.rand(1, 1, rows, 50) < 0.5, 0.0, LEAST)
    mask[..., 0, :] = LEAST
    y = kernel(q, k, v, mask)
    torch.testing.assert_close(y, F.scaled_dot_product_attention(q, k, v, mask), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(y[..., 0, :], v.mean(2), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("rows", [1, 4, 20, 40])
def test_large_scores_do_not_overflow(kernel: Kernel, rows: int) -> None:
    q, k, v = (torch.randn(1, 2, n, 16) for n in (rows, 70, 70))
    for size in (1e3, 1e9, 1e18):  # scores up to 1e37
        y = kernel(q * size, k * size, v, None)
        scores = (q.double() * size) @ (k.double().mT * size)
        sure = scores.topk(2).values.diff().abs().squeeze(-1) > 1e-5 * scores.abs().amax(-1) + 1e3
        largest = v.gather(2, scores.argmax(-1, keepdim=True).expand(-1, -1, -1, 16))
        assert sure.any() and torch.equal(y[sure], largest[sure])


@pytest.mark.parametrize("rows", [1, 4, 20, 40])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_propagates_as_in_torch(kernel: Kernel, rows: int, bad: float) -> None:
    for where in range(4):
        torch.manual_seed(where)
        tensors = [torch.randn(2, 2, n, 16) for n in (rows, 50, 50)]
        mask = torch.zeros(2, 1, rows, 50)
        if where == 3:
            mask[0, 0, rows - 1, 3] = bad
        else:
            tensors[where][0, 1, min(3, rows - 1), 5] = bad
        y, expected = kernel(*tensors, mask), F.scaled_dot_product_attention(*tensors, mask)
        torch.testing.assert_close(y, expected, equal_nan=True, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("rows", [1, 6, 24, 150])
def test_the_number_of_threads_does_not_change_a_bit(kernel: Kernel, rows: int) -> None:
    q, k, v = torch.randn(1, 4, rows, 32), torch.randn(1, 2, 700, 32), torch.randn(1, 2, 700, 32)
    assert_same_with_any_number_of_threads(kernel, q, k, v)


def test_products_of_torch_before_and_after_are_not_disturbed(kernel: Kernel) -> None:
    q, a = torch.randn(1, 1, 64, 32), torch.randn(64, 128).bfloat16()  # oneDNN keeps how it configured AMX in a thread
    expected, product = kernel(q, q, q), a @ a.t()
    for _ in range(3):
        assert torch.equal(kernel(q, q, q), expected)
        assert torch.equal(a @ a.t(), product)


def test_exp_is_within_1_1_units_in_the_last_place(library: ctypes.CDLL) -> None:
    x = torch.cat([torch.linspace(-87.33, 0, 1 << 21), -torch.logspace(-30, 1, 1 << 16)])
    x = torch.nn.functional.pad(x, (0, -len(x) % 16))
    y, special = x.clone(), torch.tensor([0.0, -0.0, -88.0, -1e30, -math.inf, math.nan] + [0.0] * 10)
    if not library.exponentials_of(ctypes.c_void_p(y.data_ptr()), ctypes.c_int64(len(y))):
        pytest.skip("this build has the C library's")
    expected = x.double().exp()
    _, exponent = torch.frexp(expected)
    assert ((y - expected).abs() / torch.ldexp(torch.ones_like(expected), exponent - 24)).max() < 1.1
    library.exponentials_of(ctypes.c_void_p(special.data_ptr()), ctypes.c_int64(16))
    assert special[:5].tolist() == [1.0, 1.0, 0.0, 0.0, 0.0] and special[5].isnan()


# --- the operator and the pass ----------------------------------------------------------------------------------------


def test_the_operator_is_torchs_and_lies_as_its_fake_says() -> None:
    q, k, v = torch.randn(2, 4, 5, 8), torch.randn(2, 2, 7, 8), torch.randn(2, 2, 7, 8)
    for mask, is_causal in ((None, False), (None, True), (torch.rand(2, 1, 5, 7) < 0.8, False)):
        y = attention(q, k, v, mask, is_causal)
        expected = F.scaled_dot_product_attention(q, k, v, mask, is_causal=is_causal, enable_gqa=True)
        assert torch.equal(y, expected) and y.transpose(1, 2).is_contiguous()
        arguments = (q, k, v, mask, is_causal, 8**-0.5)
        tests = ("test_schema", "test_faketensor", "test_autograd_registration")
        torch.library.opcheck(torch.ops.lightning_accel.attention.default, arguments, test_utils=tests)


IMAGES, TOKENS = (torch.randn(2, 3, 16, 16),), {"input_ids": tiny.ids(3, 12)}
MASKED = {**TOKENS, "attention_mask": torch.ones(3, 12, dtype=torch.int64)}


@pytest.mark.parametrize(
    ("make", "inputs"),
    [(tiny.bert, MASKED), (tiny.bert, TOKENS), (tiny.vit, IMAGES), (tiny.gpt2, TOKENS), (tiny.llama, TOKENS)],
)
def test_the_attention_of_each_layer_is_replaced_and_means_the_same(make: Callable, inputs: dict | tuple) -> None:
    (captured,) = capture(make(), inputs).values()
    program = captured.export(captured.module)
    expected = program.module()(*captured.example)
    assert replace_attention(program) == tiny.LAYERS
    for y, before in zip(program.module()(*captured.example), expected, strict=True):
        assert torch.equal(y, before)


class Attends(nn.Module):
    def __init__(self, **options) -> None:
        super().__init__()
        self.options = options

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, **self.options)


def replaced(q: Tensor, k: Tensor, v: Tensor, **options) -> int:
    program = torch.export.export(Attends(**options), (q, k, v), strict=False)
    count = replace_attention(program)
    assert options.get("dropout_p") or torch.equal(program.module()(q, k, v), Attends(**options)(q, k, v))
    return count


def test_only_float32_attention_without_dropout_is_replaced() -> None:
    q, k = torch.randn(2, 4, 5, 8), torch.randn(2, 2, 5, 8)
    assert replaced(q, q, q) == replaced(q, q, q, is_causal=True) == replaced(q, k, k, enable_gqa=True) == 1
    assert replaced(q, q, q, scale=0.3) == replaced(q, q, q, attn_mask=torch.ones(5, 5).tril().bool()) == 1
    assert replaced(q, q, q, attn_mask=torch.randn(4, 1, 5)) == 1
    assert replaced(q, q, q, dropout_p=0.1) == 0
    assert replaced(q.double(), q.double(), q.double()) == replaced(q[0], q[0], q[0]) == 0
    assert replaced(q, k[:, :1], k[:, :1]) == replaced(q, q[:1], q[:1]) == 0  # broadcast heads, a broadcast batch


# --- inside compiled programs -----------------------------------------------------------------------------------------


def attends_with_torch(built: Built, engine: str, *inputs, **named) -> bool:
    model = built.load(engine)
    with torch.no_grad(), torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        model(*inputs, **named)
    return any("scaled_dot_product" in event.name for event in profile.events())


@pytest.mark.aoti
@pytest.mark.skipif(aoti.slow_kernels({"isa": aoti.isa()}) is not None, reason="torch's attention is faster there")
def test_compiled_programs_call_the_kernel_and_portable_ones_torch(
    bert_int8: Built, llama_int8: Built, gpt2_fp32: Built
) -> None:
    for built, inputs in ((bert_int8, MASKED), (llama_int8, TOKENS), (gpt2_fp32, TOKENS)):
        assert not attends_with_torch(built, "aoti", **inputs)
        assert attends_with_torch(built, "portable", **inputs)
