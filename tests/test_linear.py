"""The compiled float32 linear kernel against float64, and its pass over programs."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from pathlib import Path

import pytest
import tiny
import torch
from compiled import Built
from hypothesis import given, settings
from hypothesis import strategies as st
from kernels import PATHS, compiled, linear_bound, source_of
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import T5Config, T5ForConditionalGeneration

from lightning_accel import QuantConfig, export_model, load
from lightning_accel.artifact import read_manifest
from lightning_accel.capture import capture
from lightning_accel.engines.linear import NONE, replace_linear, tile
from lightning_accel.engines.portable import _untile
from lightning_accel.quantize.fused import ACTIVATIONS

Kernel = Callable[..., Tensor]
ENTRY = """
#include "{source}"
extern "C" __attribute__((visibility("default"))) void run(const float* x, const float* w, const float* bias,
    const float* residual, float* y, int64_t M, int64_t N, int64_t K, int64_t activation) {{
  linear(x, w, bias, residual, y, M, N, K, activation);
}}
"""


@pytest.fixture(scope="module", params=[name for name in PATHS if name in ("this machine", "AVX2")])
def kernel(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Kernel:
    """The kernel's inner function as a small shared library, called with a plain weight [out, n]."""
    library = compiled(ENTRY.format(source=source_of("linear")), request.param, tmp_path_factory.mktemp("linear"))
    function = ctypes.CDLL(str(library)).run

    def run(
        x: Tensor, weight: Tensor, bias: Tensor | None, activation: int = NONE, residual: Tensor | None = None
    ) -> Tensor:
        y, tiles = torch.full((len(x), len(weight)), float("nan")), tile(weight)
        pointers = [ctypes.c_void_p(t.data_ptr() if t is not None else None) for t in (x, tiles, bias, residual, y)]
        function(*pointers, *(ctypes.c_int64(n) for n in (len(x), len(weight), x.shape[1], activation)))
        return y

    return run


def drawn(rows: int, n: int, out: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """x [rows, n], a weight [out, n] and a bias [out]."""
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(size, generator=generator) for size in ((rows, n), (out, n), (out,)))  # type: ignore[return-value]


def assert_within_rounding(y: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    exact = F.linear(x.double(), weight.double(), None if bias is None else bias.double())
    assert bool(((y - exact).abs() <= linear_bound(x, weight, bias)).all())


@settings(deadline=None, max_examples=75)
@given(st.integers(1, 50), st.integers(1, 130), st.integers(1, 150), st.booleans(), st.integers(0, 10**6))
def test_outputs_are_sums_of_the_exact_products(
    kernel: Kernel, rows: int, n: int, out: int, with_bias: bool, seed: int
) -> None:
    x, weight, bias = drawn(rows, n, out, seed)
    assert_within_rounding(kernel(x, weight, bias if with_bias else None), x, weight, bias if with_bias else None)


@pytest.mark.parametrize("n", [1024, 2048])
@pytest.mark.parametrize("rows", [1, 8, 9, 25, 130])
def test_rows_that_lie_whole_pages_apart(kernel: Kernel, rows: int, n: int) -> None:
    x, weight, bias = drawn(rows, n, 70, rows)
    assert_within_rounding(kernel(x, weight, bias), x, weight, bias)


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activations_follow(kernel: Kernel, name: str) -> None:
    for rows, n, out in ((1, 5, 3), (14, 40, 75), (25, 1024, 33)):
        x, weight, bias = drawn(rows, n, out, n)
        y = kernel(x, weight, bias)
        exact = ACTIVATIONS[name](y.double())
        got = kernel(x, weight, bias, list(ACTIVATIONS).index(name))
        assert bool(((got - exact).abs() <= 2.0**-20 * y.abs() + 1e-37).all())


@pytest.mark.parametrize("activation", [NONE, *range(len(ACTIVATIONS))])
def test_a_residual_is_added_before_the_activation(kernel: Kernel, activation: int) -> None:
    for rows, n, out in ((1, 5, 3), (14, 40, 75), (25, 1024, 33)):
        x, weight, bias = drawn(rows, n, out, n)
        residual = torch.randn(rows, out)
        y = kernel(x, weight, bias) + residual
        exact = y if activation == NONE else list(ACTIVATIONS.values())[activation](y.double())
        got = kernel(x, weight, bias, activation, residual)
        assert bool(((got - exact).abs() <= 2.0**-20 * y.abs() + 1e-37).all())


@pytest.mark.parametrize(("n", "out"), [(96, 40), (1024, 20), (1024, 300), (576, 1536)])
def test_a_row_depends_neither_on_the_others_nor_on_threads(kernel: Kernel, n: int, out: int) -> None:
    x, weight, bias = drawn(31, n, out, n)
    together, threads = kernel(x, weight, bias), torch.get_num_threads()
    for row in (0, 11, 12, 30):
        assert torch.equal(kernel(x[row : row + 1].clone(), weight, bias), together[row : row + 1])
    try:
        for count in (1, 3):
            torch.set_num_threads(count)
            assert torch.equal(kernel(x, weight, bias), together)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_stays_in_its_row(kernel: Kernel, bad: float) -> None:
    x, weight, bias = drawn(13, 33, 45, 0)
    expected = kernel(x, weight, bias)
    x[4, 7] = bad
    y, rest = kernel(x, weight, bias), torch.arange(13) != 4
    assert not y[4].isfinite().any() and torch.equal(y[rest], expected[rest])


@pytest.mark.parametrize("shape", [(70, 33), (32, 32), (5, 64), (64, 5)])
def test_tiles_of_both_kinds_give_the_weight_back(shape: tuple[int, int]) -> None:
    weight = torch.randn(shape)
    for transposed in (False, True):
        assert torch.equal(_untile(tile(weight, transposed), list(shape)), weight)


# --- programs ---------------------------------------------------------------------------------------------------------


class Uses(nn.Module):
    """A weight in two layers, one that is read in another way too, one in float64, products with columns, biases of one
    number, and a constant of more numbers than are written into the code."""

    def __init__(self, wide: torch.dtype = torch.float64) -> None:
        super().__init__()
        self.shared, self.read, self.wide = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 3, dtype=wide)
        self.table, self.level = nn.Embedding(40, 8), nn.Parameter(torch.ones(1))
        self.columns, self.one = nn.Parameter(torch.randn(8, 6)), nn.Parameter(torch.randn(4, 6))

    def forward(self, ids: Tensor) -> Tensor:
        x = self.shared(self.table(ids))
        x = self.read(self.shared(x.transpose(1, 2).contiguous().transpose(1, 2)))
        x = x + self.read.weight.sum()
        wide = self.wide(x.to(self.wide.bias.dtype)).float().sum(-1, keepdim=True)
        columns = F.linear(F.silu(F.relu(x @ self.columns)), self.one, self.level).sum(-1, keepdim=True)
        y = F.linear(x, self.table.weight, self.level.expand(40)) + wide + columns
        return y * torch.tensor([0.5 * i for i in range(40)])


def _tiled(model: nn.Module, inputs: dict[str, Tensor] | tuple) -> set[str]:
    (captured,) = capture(model, inputs).values()
    program = captured.export(captured.module)
    names = set(replace_linear(program))
    operators = [str(node.target) for node in program.graph.nodes]
    assert bool(names) == ("lightning_accel.linear_tiled.default" in operators)
    return names


def test_weights_with_other_uses_and_dtypes_stay() -> None:
    assert _tiled(Uses(), (torch.randint(40, (2, 5)),)) == {
        "model.shared.weight", "model.table.weight", "model.columns"
    }  # fmt: skip


class Odd(nn.Module):
    """Products that the operator does not know: of vectors, of complex numbers, of a weight with itself."""

    def __init__(self) -> None:
        super().__init__()
        self.vector, self.square = nn.Parameter(torch.randn(6)), nn.Parameter(torch.randn(6, 6))
        self.turn = nn.Parameter(torch.randn(5, 6, dtype=torch.complex64))

    def forward(self, x: Tensor) -> Tensor:
        turned = F.linear(x.to(torch.complex64), self.turn).abs().sum(-1)
        twice = torch.addmm(self.vector, self.square, self.square)
        deep = F.linear(x.reshape(-1, 1, 1, 1, 1, 1, 1, 1, 6), twice).sum((1, 2, 3, 4, 5, 6, 7, 8))
        return F.linear(x, self.vector) + turned + deep


def test_products_that_the_operator_does_not_know_stay() -> None:
    assert not _tiled(Odd(), (torch.randn(3, 6),))


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_an_activation_that_alone_takes_the_output_goes_into_the_operator(name: str) -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(6, 8), nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            x = ACTIVATIONS[name](self.first(x))
            y = self.second(x)
            return ACTIVATIONS[name](y) + y

    (captured,) = capture(Two(), (torch.randn(3, 6),)).values()
    program = captured.export(captured.module)
    x = torch.randn(3, 6)
    expected = captured.module(x)[0]
    replace_linear(program)
    codes = [n.args[-1] for n in program.graph.nodes if "linear_tiled" in str(n.target)]
    assert codes == [list(ACTIVATIONS).index(name), NONE]
    torch.testing.assert_close(program.module()(x)[0], expected)


class Residuals(nn.Module):
    """What is added to layers: the input, another layer, an output twice, what is smaller, what was written over."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(6, 6) for _ in range(7))

    def forward(self, x: Tensor) -> Tensor:
        a, b, c, d, e, f, g = self.layers
        x = F.relu(x + a(x))
        x = F.gelu(b(x)) + x  # not before the activation
        x = c(x) + d(x)
        y = e(x)
        x = x + y * y.sum()
        x = torch.add(f(x), x, alpha=2) + x[:1]
        y = g(x)
        y += x
        return y


def test_what_is_added_to_the_output_goes_into_the_operator() -> None:
    (captured,) = capture(Residuals(), (torch.randn(3, 6),)).values()
    program = captured.export(captured.module)
    x = torch.randn(3, 6)
    expected = captured.module(x)[0]
    replace_linear(program)
    calls = [n.args for n in program.graph.nodes if "linear_tiled" in str(n.target)]
    assert [args[3] is not None for args in calls] == [True, False, False, True, False, False, True]
    code = list(ACTIVATIONS).index
    assert [args[-1] for args in calls] == [code("relu"), code("gelu"), NONE, NONE, NONE, NONE, NONE]
    torch.testing.assert_close(program.module()(x)[0], expected)


def test_every_linear_layer_of_transformers_models_is_found() -> None:
    for model in (tiny.llama(), tiny.gpt2()):
        layers = [m for m in model.modules() if type(m).__name__ in ("Linear", "Conv1D")]
        assert len(_tiled(model, {"input_ids": tiny.ids(2, 7)})) == len(layers)


@pytest.mark.aoti
@pytest.mark.parametrize("quantized", [False, True])
def test_programs_are_what_the_model_is(tmp_path: Path, quantized: bool) -> None:
    torch.manual_seed(0)
    model = Uses(torch.float32).eval()
    data = [(torch.randint(40, (3, 6)),) for _ in range(4)]
    kept = dict.fromkeys(("shared", "read", "table"))
    quantize = QuantConfig("int8", overrides=kept) if quantized else None
    export_model(model, tmp_path / "a", example_inputs=data[0], data=data, quantize=quantize, measure=False)
    compiled, portable = (load(tmp_path / "a", engine=name) for name in ("aoti", "portable"))
    with torch.no_grad():
        for shape in ((1, 2), (2, 7), (17, 3)):
            ids = torch.randint(40, shape)
            torch.testing.assert_close(compiled(ids), portable(ids), rtol=1e-4, atol=1e-4)
            if not quantized:
                torch.testing.assert_close(compiled(ids), model(ids), rtol=1e-5, atol=1e-5)


@pytest.mark.aoti
def test_programs_of_one_model_may_hold_a_weight_in_two_layouts(tmp_path: Path) -> None:
    torch.manual_seed(0)
    sizes: dict[str, int] = {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 1, "num_heads": 4, "vocab_size": 97}
    model = T5ForConditionalGeneration(T5Config(**sizes, decoder_start_token_id=0)).eval()  # type: ignore[arg-type]
    ids = torch.randint(3, 97, (2, 9))
    export_model(model, tmp_path / "a", example_inputs={"input_ids": ids}, measure=False)
    tokens = [load(tmp_path / "a", engine=name).generate(ids, max_new_tokens=12) for name in ("aoti", "portable")]
    assert torch.equal(*tokens)
    with torch.no_grad():
        given = {"input_ids": ids, "decoder_input_ids": ids[:, :4]}
        found = load(tmp_path / "a", engine="aoti")(**given)
        torch.testing.assert_close(found, model(**given).logits, rtol=1e-4, atol=1e-4)


@pytest.mark.aoti
def test_the_folder_holds_a_float_weight_once(gpt2_fp32: Built) -> None:
    manifest = read_manifest(gpt2_fp32.directory)
    compiled, portable = ({e["engine"]: e for e in manifest["programs"]}[name] for name in ("aoti", "portable"))
    stored = (gpt2_fp32.directory / manifest["weights"]["file"]).stat().st_size
    own = sum(p.numel() * p.element_size() for p in gpt2_fp32.eager.parameters())
    assert compiled["weights"] and portable["layouts"] and own < stored < 1.5 * own
