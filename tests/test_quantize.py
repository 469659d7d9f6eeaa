"""int8: fake-quantized, converted and an independent integer reference are compared bit by bit."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernels import linear_bound
from torch import Tensor, nn
from torch.nn.utils import prune

from lightning_accel import QuantConfig, export_model, prepare_, quantize_model
from lightning_accel._quiet import Conv1D
from lightning_accel.quantize import (
    Int8Embedding,
    Int8Linear,
    convert_,
    is_prepared,
    quantization_coverage,
    unprepare_,
)
from lightning_accel.quantize.config import SCHEMES
from lightning_accel.quantize.converted import quantize_rows
from lightning_accel.quantize.fake import Int8RowFakeQuantizer
from lightning_accel.quantize.ops import MOST_INT8_INPUTS, int8_linear_reference, row_codes, row_scales, tile, untile
from lightning_accel.select import count_flops

INT8 = QuantConfig("int8")


def kinds_of_rows(rows: int, n: int, kind: str, seed: int = 0) -> Tensor:
    """Rows [rows, n] of the kind that its name says."""
    x = torch.randn(rows, n, generator=torch.Generator().manual_seed(seed))
    if kind == "zeros":
        x[:: 2] = 0.0  # fmt: skip
    elif kind == "tiny":
        x *= 1e-35
    elif kind == "huge":
        x = x.sign() * torch.finfo(torch.float32).max
    elif kind == "outlier":
        x[:, 0] *= 1e4
    elif kind == "halves":  # every second value lies between two codes
        x = torch.round(x * 8).clamp(-127, 127) + 0.5 * (torch.arange(n) % 2)
        x[:, 0] = 127.0
    return x


KINDS = ["normal", "zeros", "tiny", "huge", "outlier", "halves"]
rows_and_kinds = {
    "rows": st.integers(1, 9),
    "n": st.integers(1, 70),
    "out": st.integers(1, 40),
    "kind": st.sampled_from(KINDS),
    "seed": st.integers(0, 1000),
}


def numpy_codes(x: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Codes and scales of rows, in NumPy's float32, written from the formula."""
    a = x.numpy()
    scale = np.maximum(np.abs(a).max(-1, keepdims=True), np.float32(1e-30)) / np.float32(127)
    return np.rint(a * (np.float32(1) / scale)), scale


def numpy_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """The integer product, exact in float64, and the float32 operations after it."""
    codes_x, scale_x = numpy_codes(x)
    codes_w, scale_w = numpy_codes(weight)
    sums = codes_x.astype(np.float64) @ codes_w.astype(np.float64).T
    with np.errstate(over="ignore"):
        y = sums.astype(np.float32) * scale_x * scale_w.T
    return torch.from_numpy(y if bias is None else y + bias.numpy())


# --- arithmetic -------------------------------------------------------------------------------------------------------


def test_codes_by_hand() -> None:
    x = torch.tensor([[127.0, -63.5, 0.5, 1.5], [0.0, 0.0, 0.0, 0.0], [-254.0, 2.0, 1.0, 3.0]])
    scales = row_scales(x)
    assert scales[0].item() == 1.0 and scales[2].item() == 2.0
    assert row_codes(x, scales).tolist() == [[127, -64, 0, 2], [0, 0, 0, 0], [-127, 1, 0, 2]], "half goes to even"


@settings(deadline=None, max_examples=100)
@given(**rows_and_kinds)
def test_codes_lie_in_127_and_dequantize_within_half_a_step(rows: int, n: int, out: int, kind: str, seed: int) -> None:
    x = kinds_of_rows(rows, n, kind, seed)
    scales = row_scales(x)
    codes = row_codes(x, scales)
    assert codes.abs().max() <= 127
    error = (codes.double() * scales.double() - x.double()).abs()
    assert (error <= scales.double() * (0.5 + 127 * 2.0**-22)).all(), "half a step, and the rounding of 1 / scale"


@settings(deadline=None, max_examples=100)
@given(**rows_and_kinds, with_bias=st.booleans())
def test_a_converted_layer_is_the_integer_reference_bit_by_bit(
    rows: int, n: int, out: int, kind: str, seed: int, with_bias: bool
) -> None:
    torch.manual_seed(seed)
    layer = nn.Linear(n, out, bias=with_bias)
    x = kinds_of_rows(rows, n, kind, seed)
    converted = quantize_model(nn.Sequential(layer), INT8)
    bias = layer.bias.detach() if with_bias else None
    assert torch.equal(converted(x), numpy_linear(x, layer.weight.detach(), bias))
    assert np.array_equal(converted[0].codes.numpy(), numpy_codes(layer.weight.detach())[0])


@settings(deadline=None, max_examples=50)
@given(**rows_and_kinds)
def test_fake_quantized_codes_are_the_converted_codes(rows: int, n: int, out: int, kind: str, seed: int) -> None:
    x = kinds_of_rows(rows, n, kind, seed)
    codes, scales = quantize_rows(x)
    assert torch.equal(Int8RowFakeQuantizer()(x), codes.float() * scales[:, None])
    assert np.array_equal(codes.numpy(), numpy_codes(x)[0])


def test_fake_quantized_and_converted_layers_agree_to_float_rounding() -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(64, 48)), torch.randn(128, 64)
    prepare_(model, INT8)
    fake, converted = model(x), convert_(copy.deepcopy(model))(x)
    rounded, weight = model[0].activation_fake_quantizer(x), model[0].weight_fake_quantizer(model[0].weight)
    assert ((fake.double() - converted.double()).abs() <= linear_bound(rounded, weight, model[0].bias)).all()


def test_a_thousand_layers_have_the_same_codes_and_sums_fake_quantized_converted_and_in_tiles() -> None:
    for seed in range(1000):
        torch.manual_seed(seed)
        n, out = 1 + seed % 67, 1 + seed % 20
        kind, model = KINDS[seed % len(KINDS)], nn.Sequential(nn.Linear(n, out))
        x = kinds_of_rows(1 + seed % 5, n, kind, seed)
        prepare_(model, INT8)
        fake, rounded = model[0], model[0].activation_fake_quantizer(x)
        weight, y = fake.weight_fake_quantizer(fake.weight), fake(x)
        layer = convert_(model)[0]
        codes, scales = quantize_rows(x)
        assert torch.equal(codes.float() * scales[:, None], rounded), seed
        assert torch.equal(layer.weight, weight), seed
        assert torch.equal(untile(tile(layer.codes), out, n), layer.codes), seed
        assert torch.equal(layer(x), numpy_linear(x, fake.weight.detach(), fake.bias.detach())), seed
        if kind != "huge":  # float32 does not hold their products
            assert ((layer(x).double() - y.double()).abs() <= linear_bound(rounded, weight, fake.bias)).all(), seed


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_a_row_with_a_non_finite_value_comes_out_as_nan_and_no_other(bad: float) -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(20, 6)), torch.randn(5, 20)
    x[2, 7] = bad
    converted = quantize_model(model, INT8)
    prepare_(model, INT8)
    for y in (converted(x), model(x)):
        assert y[2].isnan().all() and y[[0, 1, 3, 4]].isfinite().all()


@pytest.mark.parametrize("shape", [(7,), (3, 7), (2, 3, 7), (2, 1, 4, 7), (0, 7)])
def test_any_leading_dimensions_are_rows(shape: tuple[int, ...]) -> None:
    converted = quantize_model(nn.Sequential(nn.Linear(7, 5)), INT8)
    x = torch.randn(shape)
    assert torch.equal(converted(x), converted(x.reshape(-1, 7)).reshape(*shape[:-1], 5))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_the_output_has_the_inputs_dtype(dtype: torch.dtype) -> None:
    converted, x = quantize_model(nn.Sequential(nn.Linear(7, 5)), INT8), torch.randn(3, 7).to(dtype)
    assert converted(x).dtype == dtype and torch.equal(converted(x), converted(x.float()).to(dtype))


@given(st.integers(1, 40), st.integers(1, 40))
def test_tiles_hold_every_weight_and_zeros_beside(rows: int, n: int) -> None:
    weight = torch.randint(-127, 128, (rows, n), dtype=torch.int8)
    tiles = tile(weight)
    assert tiles.shape == (-(-rows // 16), -(-n // 4), 16, 4)
    assert torch.equal(untile(tiles, rows, n), weight)
    assert int(tiles.int().abs().sum()) == int(weight.int().abs().sum())
    assert tiles[(rows - 1) // 16, (n - 1) // 4, (rows - 1) % 16, (n - 1) % 4] == weight[-1, -1]


@pytest.mark.parametrize("layout", ["contiguous", "transposed", "sliced", "double"])
def test_the_tiled_operator_takes_any_layout(layout: str) -> None:
    from lightning_accel.quantize.ops import int8_linear_tiled

    torch.manual_seed(0)
    weight, scale = quantize_rows(torch.randn(9, 12))
    x = {
        "contiguous": torch.randn(6, 12),
        "transposed": torch.randn(12, 6).t(),
        "sliced": torch.randn(6, 24)[:, ::2],
        "double": torch.randn(6, 12).double(),
    }[layout]
    y = int8_linear_tiled(x, tile(weight), scale)
    assert y.dtype == x.dtype and torch.equal(y, int8_linear_reference(x.contiguous(), weight, scale))


# --- prepare_ ---------------------------------------------------------------------------------------------------------


def snapshot(model: nn.Module) -> dict[str, Any]:
    return {
        "keys": list(model.state_dict()),
        "parameters": [id(p) for p in model.parameters()],
        "types": [type(m) for m in model.modules()],
        "modes": [m.training for m in model.modules()],
        "attributes": [set(vars(m)) for m in model.modules()],
    }


@pytest.mark.parametrize("make", [tiny.mlp, tiny.llama, tiny.gpt2, tiny.bert, tiny.convnet])
def test_preparing_keeps_keys_and_parameters_and_unprepare_restores_exactly(make: Any) -> None:
    model = make().train()
    model.get_submodule(next(n for n, m in model.named_modules() if isinstance(m, nn.Linear))).eval()
    before = snapshot(model)
    prepare_(model, INT8)
    during = snapshot(model)
    assert is_prepared(model) and during["types"] != before["types"]
    assert (during["keys"], during["parameters"]) == (before["keys"], before["parameters"])
    assert snapshot(unprepare_(model)) == before and not is_prepared(model)


def test_train_and_eval_state_of_each_module_stay() -> None:
    model = tiny.mlp().train()
    model[2].eval()
    prepare_(model, INT8)
    assert model[0].training and not model[2].training and not model[2].weight_fake_quantizer.training


def test_preparing_twice_changes_nothing() -> None:
    model = tiny.llama()
    first = prepare_(model, INT8)
    before, quantizer = snapshot(model), model.lm_head.weight_fake_quantizer
    second = prepare_(model, INT8)
    assert snapshot(model) == before and model.lm_head.weight_fake_quantizer is quantizer
    assert first.as_dict() == second.as_dict()


def test_forward_hooks_survive_preparation_and_conversion() -> None:
    model, x = tiny.mlp(), torch.randn(4, 8)
    model[2].register_forward_hook(lambda module, args, output: output * 2.0)
    plain = tiny.mlp()
    prepare_(model, INT8)
    prepare_(plain, INT8)
    plain[2].weight.data *= 2.0
    plain[2].bias.data *= 2.0
    assert torch.allclose(model(x), plain(x), atol=1e-5)
    assert torch.allclose(convert_(model)(x), convert_(plain)(x), atol=1e-5)


@pytest.mark.parametrize(
    "build", [lambda a: nn.Sequential(a, nn.ReLU(), a), lambda a: nn.ModuleList([a, nn.Sequential(a)])]
)
def test_a_shared_module_stays_shared(build: Any) -> None:
    model = build(nn.Linear(8, 8))
    prepare_(model, INT8)
    assert sum(isinstance(m, nn.Linear) for m in model.modules()) == 1
    converted = convert_(model)
    assert not is_prepared(converted) and sum(isinstance(m, Int8Linear) for m in converted.modules()) == 1


def test_modules_behind_wrappers_are_prepared_and_converted() -> None:
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

    model, x = tiny.mlp(), torch.randn(4, 8)
    expected = quantize_model(model, INT8)(x)
    model[2] = checkpoint_wrapper(model[2])
    assert torch.equal(quantize_model(model, QuantConfig(overrides={"2": "int8"}))(x), expected)


def test_overrides_exclude_and_the_first_match_wins() -> None:
    model = tiny.mlp()
    coverage = prepare_(model, QuantConfig(overrides={"0": "int8", "[02]": None}))
    assert [type(model[i]).__name__ for i in (0, 2, 4)] == ["FakeQuantizedLinear", "Linear", "FakeQuantizedLinear"]
    assert [e.reason for e in coverage.entries] == [None, "excluded by overrides", None]
    with pytest.raises(ValueError, match="'head' matches no module"):
        prepare_(model, QuantConfig(overrides={"head": None}))


def test_an_unknown_scheme_is_refused_when_the_config_is_built() -> None:
    with pytest.raises(ValueError, match=r"unknown scheme 'int9'; write QuantConfig\('int8'\)"):
        QuantConfig("int9")
    with pytest.raises(ValueError, match="unknown scheme 'int4'"):
        QuantConfig(overrides={"*": "int4"})


def test_nothing_to_quantize_raises_with_the_reasons() -> None:
    with pytest.raises(ValueError, match=r"touched nothing; quantization needs.*\(0: int8 has no form of convolutions"):
        prepare_(nn.Sequential(nn.Conv2d(3, 3, 3)), INT8)
    with pytest.raises(ValueError, match=r"touched nothing.*excluded by overrides"):
        prepare_(tiny.mlp(), QuantConfig(overrides={"*": None}))
    with pytest.raises(ValueError, match="nothing in the model is fake-quantized"):
        convert_(tiny.mlp())


class Clipped(nn.Linear):
    """A linear layer that computes something else."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).clamp(-1, 1)


class Attention(nn.MultiheadAttention):
    """Attention that computes something else."""


def test_what_cannot_be_quantized_is_skipped_with_the_reason() -> None:
    model = nn.ModuleDict(
        {
            "attention": Attention(8, 2),
            "clipped": Clipped(8, 8),
            "normalized": nn.Embedding(4, 4, max_norm=1.0),
            "sparse": nn.Embedding(4, 4, sparse=True),
            "convolution": nn.Conv2d(3, 3, 3),
            "linear": nn.Linear(8, 8),
        }
    )
    reasons = {e.name: e.reason for e in prepare_(model, INT8).entries}
    assert reasons["attention"].startswith("Attention calls a fused function with raw weights")
    assert "fused function with raw weights" in reasons["attention.out_proj"]
    assert reasons["clipped"] == "a subclass of Linear may compute something else"
    assert "max_norm or sparse" in reasons["normalized"] and reasons["normalized"] == reasons["sparse"]
    assert reasons["convolution"].startswith("int8 has no form of convolutions") and reasons["linear"] is None
    assert [n for n, m in model.named_children() if is_prepared(m)] == ["linear"]


@pytest.mark.parametrize("masked", [False, True])
@torch.no_grad()
def test_a_fused_encoder_computes_the_same_in_train_and_eval_mode(masked: bool) -> None:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True)
    model, x = nn.TransformerEncoder(layer, 2), torch.randn(2, 5, 16)
    padding = torch.tensor([[False] * 5, [False, False, True, True, True]]) if masked else None
    before = snapshot(model)
    prepare_(model, INT8)
    trained = model.train()(x, src_key_padding_mask=padding)
    real = ~padding if masked else torch.ones(2, 5, dtype=torch.bool)
    assert torch.allclose(model.eval()(x, src_key_padding_mask=padding)[real], trained[real], atol=1e-5)
    converted = convert_(copy.deepcopy(model))(x, src_key_padding_mask=padding)
    assert torch.allclose(converted[real], trained[real], atol=5e-2)
    assert snapshot(unprepare_(model.train())) == before


def test_a_subclassed_encoder_layer_keeps_its_fused_weights() -> None:
    class Mine(nn.TransformerEncoderLayer):
        pass

    model = nn.Sequential(Mine(16, 2, 32, batch_first=True), nn.Linear(16, 2))
    reasons = {e.name: e.reason for e in prepare_(model, INT8).entries}
    assert reasons["0.linear1"].startswith("Mine calls a fused function") and reasons["1"] is None


def test_the_gradient_passes_straight_through() -> None:
    x, gradient = torch.randn(3, 8, requires_grad=True), torch.randn(3, 8)
    Int8RowFakeQuantizer()(x).backward(gradient)
    assert torch.equal(x.grad, gradient)


def test_gradients_of_a_layer_are_those_of_its_rounded_operands() -> None:
    torch.manual_seed(0)
    layer, x = nn.Linear(8, 4), torch.randn(5, 8, requires_grad=True)
    model, upstream = nn.Sequential(layer), torch.randn(5, 4)
    prepare_(model, INT8)
    model(x).backward(upstream)
    rounded_x, rounded_w = Int8RowFakeQuantizer()(x.detach()), Int8RowFakeQuantizer()(layer.weight.detach())
    assert torch.allclose(layer.weight.grad, upstream.T @ rounded_x, atol=1e-6)
    assert torch.allclose(x.grad, upstream @ rounded_w, atol=1e-6)


def test_bf16_autocast_trains_with_float32_gradients() -> None:
    model = tiny.mlp()
    prepare_(model, INT8)
    with torch.autocast("cpu", torch.bfloat16):
        y = model(torch.randn(4, 8))
    y.float().square().sum().backward()
    assert y.dtype == torch.bfloat16
    assert all(p.grad.dtype == torch.float32 and p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("again", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"])
@torch.no_grad()
def test_a_prepared_model_can_be_copied_and_pickled(again: Any) -> None:
    model, ids = tiny.gpt2(), tiny.ids()
    prepare_(model, INT8)
    other = again(model)
    assert torch.equal(model(ids).logits, other(ids).logits)
    assert other.lm_head.weight is other.transformer.wte.weight and other.lm_head.weight is not model.lm_head.weight
    unprepare_(other)
    assert is_prepared(model)


# --- conversion -------------------------------------------------------------------------------------------------------


def test_conv1d_is_a_linear_layer_with_its_weight_transposed() -> None:
    torch.manual_seed(0)
    conv, linear, x = Conv1D(6, 10), nn.Linear(10, 6), torch.randn(2, 3, 10)
    with torch.no_grad():
        linear.weight.copy_(conv.weight.t())
        linear.bias.copy_(conv.bias.uniform_())
    ours, theirs = quantize_model(nn.Sequential(conv), INT8), quantize_model(nn.Sequential(linear), INT8)
    assert torch.equal(ours(x), theirs(x)) and ours[0].weight.is_contiguous()
    prepare_(conv_model := nn.Sequential(conv), INT8)
    prepare_(linear_model := nn.Sequential(linear), INT8)
    assert torch.allclose(conv_model(x), linear_model(x), rtol=0, atol=1e-6), "the sum's order may differ, no more"


@pytest.mark.parametrize("make", [tiny.gpt2, tiny.llama])
def test_a_tied_head_shares_one_integer_tensor(make: Any) -> None:
    model = quantize_model(make(), INT8)
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    assert isinstance(embedding, Int8Embedding) and isinstance(head, Int8Linear)
    assert head.codes is embedding.codes and head.scale is embedding.scale
    assert sum(b.numel() for b in dict.fromkeys(model.buffers()) if b.dtype == torch.int8) == sum(
        p.numel() for p in make().parameters() if p.dim() == 2
    )


def test_a_head_excluded_from_quantization_keeps_its_float_weight() -> None:
    model = quantize_model(tiny.llama(tie_word_embeddings=False), QuantConfig(overrides={"lm_head": None}))
    assert type(model.lm_head) is nn.Linear and isinstance(model.model.embed_tokens, Int8Embedding)
    assert torch.equal(model.lm_head.weight, tiny.llama(tie_word_embeddings=False).lm_head.weight)


@pytest.mark.parametrize("excluded", ["lm_head", "model.embed_tokens"])
def test_a_tied_pair_is_excluded_together_and_the_coverage_says_why(excluded: str) -> None:
    model = tiny.llama()
    coverage = prepare_(model, QuantConfig(overrides={excluded: None}))
    reasons = {e.name: e.reason for e in coverage.entries if e.done is None and "norm" not in e.name}
    (other,) = {"lm_head", "model.embed_tokens"} - {excluded}
    assert reasons == {
        excluded: "excluded by overrides",
        other: f"shares its weight with {excluded!r}, excluded by overrides",
    }
    converted = convert_(model)
    assert converted.lm_head.weight is converted.model.embed_tokens.weight


def test_an_embedding_row_is_its_codes_times_its_scale() -> None:
    torch.manual_seed(0)
    embedding, ids = nn.Embedding(11, 6, padding_idx=0), torch.tensor([[0, 3, 10], [3, 3, 1]])
    prepare_(model := nn.Sequential(embedding), INT8)
    fake = model(ids)
    converted = convert_(model)
    assert torch.equal(converted(ids), fake)
    assert torch.equal(converted(ids)[0, 0], torch.zeros(6))


def test_a_bare_layer_is_converted_too() -> None:
    torch.manual_seed(0)
    layer, x = nn.Linear(8, 4), torch.randn(3, 8)
    converted = quantize_model(layer, INT8)
    assert isinstance(converted, Int8Linear) and type(layer) is nn.Linear
    assert torch.equal(converted(x), quantize_model(nn.Sequential(layer), INT8)(x))


def test_quantizing_leaves_the_model_alone_and_gives_an_eval_copy() -> None:
    model = tiny.llama().train()
    before, weights = snapshot(model), copy.deepcopy(model.state_dict())
    converted = quantize_model(model, INT8)
    assert snapshot(model) == before and all(torch.equal(weights[n], t) for n, t in model.state_dict().items())
    assert not any(m.training for m in converted.modules()) and not any(p.requires_grad for p in converted.parameters())


def test_a_model_that_qat_prepared_keeps_its_exceptions(tmp_path: Path) -> None:
    model, config = tiny.mlp(), QuantConfig(overrides={"4": None})
    prepare_(model, config)
    assert type(quantize_model(model, config)[4]) is nn.Linear
    options: Any = {"example_inputs": (torch.randn(2, 8),), "engines": ("portable",), "measure": False}
    for refused in (
        lambda: quantize_model(model, INT8),
        lambda: export_model(model, tmp_path / "a", quantize=INT8, **options),
    ):
        with pytest.raises(ValueError, match=r"'4' is not prepared, as other modules are, and the config asks int8"):
            refused()
    export_model(model, tmp_path / "a", quantize=config, **options)


OTHERS = {
    "int4-int8": ("int8", "int4-int8 in groups of 32", INT8, QuantConfig("int4-int8")),
    "in float": ("int8", "float", INT8, QuantConfig(overrides={"0": None})),
    "group": (
        "int4-weight in groups of 32", "int4-weight in groups of 64",
        QuantConfig("int4-weight"), QuantConfig("int4-weight", group_size=64),
    ),
    "observer": (
        "int8-static with observer='minmax'", "int8-static with observer='mse'",
        QuantConfig("int8-static"), QuantConfig("int8-static", observer="mse"),
    ),
}  # fmt: skip


@pytest.mark.parametrize("how", OTHERS)
def test_a_module_prepared_otherwise_is_refused_by_name(tmp_path: Path, how: str) -> None:
    now, then, first, second = OTHERS[how]
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 4))
    prepare_(model, first)
    said = rf"'0' is prepared as {now}, the config asks {then}; write unprepare_\(model\) first"
    for refused in (
        lambda: prepare_(model, second),
        lambda: quantize_model(model, second),
        lambda: export_model(model, tmp_path / "a", example_inputs=(torch.randn(2, 64),), quantize=second),
    ):
        with pytest.raises(ValueError, match=said):
            refused()
    prepare_(unprepare_(model), second)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_preparing_embeddings_and_attention_again_with_the_same_config_is_the_same(scheme: str) -> None:
    model = nn.ModuleList([nn.Embedding(9, 32), nn.MultiheadAttention(32, 2), nn.Linear(32, 5)])
    first = prepare_(model, QuantConfig(scheme))
    assert prepare_(model, QuantConfig(scheme)).as_dict() == first.as_dict()


def test_an_unknown_scheme_is_answered_with_the_line_to_write() -> None:
    with pytest.raises(ValueError, match=r"unknown scheme 'int4'; write QuantConfig\('int4-weight'\)"):
        QuantConfig("int4")
    with pytest.raises(ValueError, match=r"unknown scheme 'int4'; write overrides=\{'lm_\{head': 'int4-weight'\}"):
        QuantConfig("int8", overrides={"lm_{head": "int4"})


def test_a_module_without_an_integer_form_is_named_with_the_scheme() -> None:
    entries = prepare_(nn.Sequential(nn.Linear(32, 4), nn.LayerNorm(4)), QuantConfig("int4-int8")).entries
    assert [entry.reason for entry in entries] == [None, "no int4-int8 form of this module"]


def test_warnings_point_at_the_users_line() -> None:
    model, config = nn.Sequential(nn.Linear(48, 4)), QuantConfig("int4-int8")
    with pytest.warns(UserWarning, match="groups of 32 do not divide") as caught:
        quantize_model(model, config)
        prepare_(model, config)
    assert [Path(w.filename).name for w in caught] == ["test_quantize.py"] * 2


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("head", [None, "int8"], ids=["a-float-layer-left", "all-integers"])
def test_what_is_quantized_already_is_not_prepared_converted_quantized_or_exported(
    tmp_path: Path, scheme: str, head: str | None
) -> None:
    model, x = tiny.mlp(features=32, hidden=64), torch.randn(4, 32)
    converted = quantize_model(model, QuantConfig(scheme, overrides={"4": head}), calibration=[x] * 8)
    before = snapshot(converted)
    options: dict[str, Any] = {"example_inputs": (x,), "engines": ("portable",), "measure": False}
    for again in (
        lambda: prepare_(converted, INT8),
        lambda: convert_(converted),
        lambda: quantize_model(converted, INT8),
        lambda: export_model(converted, tmp_path / "a", **options),
        lambda: export_model(converted, tmp_path / "a", quantize=INT8, **options),
    ):
        with pytest.raises(ValueError, match=r"already quantized \(0 holds integers.*keep the float model, and write"):
            again()
    assert snapshot(converted) == before and not (tmp_path / "a").exists()


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("what", ["weight", "bias"])
def test_weights_that_are_not_finite_are_refused_by_name_and_nothing_is_replaced(
    what: str, bad: float, scheme: str
) -> None:
    model, config = tiny.mlp(features=32, hidden=64), QuantConfig(scheme)
    with torch.no_grad():
        getattr(model[2], what).view(64, -1)[3, 0] = bad
    with pytest.raises(ValueError, match=rf"2\.{what} holds NaN or infinite values"):
        quantize_model(model, config, calibration=[torch.zeros(4, 32)])
    prepare_(model, config)
    before = snapshot(model)
    with pytest.raises(ValueError, match=rf"2\.{what}"):
        convert_(model)
    assert snapshot(model) == before


def test_a_layer_whose_int32_sums_could_overflow_stays_in_float_and_one_at_the_limit_is_exact() -> None:
    assert MOST_INT8_INPUTS == 133_144 and 127**2 * MOST_INT8_INPUTS < 2**31 <= 127**2 * (MOST_INT8_INPUTS + 1)
    model = nn.Sequential(nn.Linear(MOST_INT8_INPUTS + 1, 2), nn.Linear(2, 2))
    reasons = {e.name: e.reason for e in prepare_(model, INT8).entries}
    assert reasons == {"0": "int32 sums over more than 133,144 inputs could overflow", "1": None}
    with pytest.warns(UserWarning, match="groups of 32 do not divide"):  # int4 would fall back to int8
        fallen = prepare_(unprepare_(model), QuantConfig("int4-int8"))
    assert [e.done for e in fallen.entries] == [None, "int8"]
    layer = nn.Linear(MOST_INT8_INPUTS, 2, bias=False)
    with torch.no_grad():
        layer.weight.fill_(-1.0)
    y = quantize_model(layer, INT8)(torch.ones(1, MOST_INT8_INPUTS))
    assert torch.equal(y, torch.full((1, 2), float(-(127**2) * MOST_INT8_INPUTS)) * (1 / torch.tensor(127.0)) ** 2)


def test_pruned_zeros_survive_conversion() -> None:
    model = tiny.mlp()
    with torch.no_grad():
        model[0].weight[model[0].weight.abs() < 0.2] = 0.0
        model[2].weight[5] = 0.0
    converted = quantize_model(model, INT8)
    assert (converted[0].codes[model[0].weight == 0] == 0).all() and (converted[2].codes[5] == 0).all()


@torch.no_grad()
@pytest.mark.parametrize("make", [tiny.llama, tiny.gpt2, tiny.bert])
def test_a_whole_model_computes_nearly_what_its_fake_quantized_self_does(make: Any) -> None:
    model, ids = make(), tiny.ids(2, 20)
    plain = model(input_ids=ids).logits
    prepare_(model, INT8)
    fake, converted = model(input_ids=ids).logits, quantize_model(model, INT8)(input_ids=ids).logits
    noise = (fake - plain).square().mean().sqrt()
    assert noise > 0 and (converted - fake).square().mean().sqrt() <= 0.1 * noise


def test_coverage_of_a_converted_model_names_what_stays_float() -> None:
    coverage = quantization_coverage(quantize_model(tiny.mlp(), QuantConfig(overrides={"2": None})))
    total = sum(p.numel() for p in tiny.mlp().parameters())
    weights = 24 * 8 + 3 * 24
    assert {e.name: e.done for e in coverage.entries} == {"0": "int8", "2": None, "4": "int8"}
    assert coverage.share_of_parameters == weights / (weights + 24 * 24 + 24) > weights / total


@pytest.mark.parametrize("scheme", ["int8", "int4-weight", "int4-int8"])
def test_the_weight_of_a_converted_layer_is_the_rounded_one_in_float(scheme: str) -> None:
    """Models cast activations to the dtype of `layer.weight`: it must not be int8."""
    torch.manual_seed(0)
    model = nn.ModuleList([nn.Linear(32, 20), nn.Embedding(20, 32), Conv1D(20, 32)])
    prepare_(model, QuantConfig(scheme))
    converted = convert_(copy.deepcopy(model))
    for fake, integer, transposed in zip(model, converted, (False, False, True), strict=True):
        expected = fake.weight_fake_quantizer(fake.weight.t() if transposed else fake.weight)
        assert integer.weight.dtype == torch.float32 and torch.equal(integer.weight, expected)


class Recurrent(nn.Module):
    """A recurrent layer before a linear one."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm, self.head = nn.LSTM(8, 16, batch_first=True), nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.lstm(x)[0])


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_recurrent_layer_is_named_with_its_share_of_flops(scheme: str) -> None:
    torch.manual_seed(0)
    model, x = Recurrent().eval(), torch.randn(2, 5, 8)
    config = QuantConfig(scheme, overrides={"head": "int8"})
    converted = quantize_model(model, config, calibration=8 * [x])
    coverage = quantization_coverage(converted, count_flops(model, (x,), {}))
    (lstm,) = (e for e in coverage.entries if e.name == "lstm")
    assert lstm.done is None and lstm.reason and lstm.flops == 2 * 2 * 5 * (8 * 64 + 16 * 64)
    assert coverage.share_of_flops == pytest.approx(16 * 4 / (8 * 64 + 16 * 64 + 16 * 4))
    assert "lstm" in str(coverage)


@pytest.mark.parametrize("scheme", ["int8", "int8-static", "int4-weight", "int4-int8"])
def test_integers_as_input_are_refused_as_by_a_float_layer(scheme: str) -> None:
    model = quantize_model(nn.Sequential(nn.Linear(32, 4)), QuantConfig(scheme), [torch.randn(4, 32)] * 8)
    with pytest.raises(ValueError, match=r"input of a quantized layer is torch.int64, .*write x.float\(\)"):
        model(torch.ones(2, 32, dtype=torch.long))
    assert model(torch.ones(2, 32, dtype=torch.bfloat16)).dtype == torch.bfloat16


@pytest.mark.parametrize(
    "hook",
    [torch.nn.utils.weight_norm, torch.nn.utils.spectral_norm, lambda module: prune.identity(module, "weight")],
)
@pytest.mark.filterwarnings("ignore:.*weight_norm")
def test_weights_that_a_hook_makes_are_left_out_by_name(hook: Any) -> None:
    model = nn.Sequential(hook(nn.Linear(8, 8)), nn.Linear(8, 2)).eval()
    coverage = prepare_(model, INT8)
    assert [(e.done, str(e.reason)[:12]) for e in coverage.entries] == [(None, "a hook makes"), ("int8", "None")]
    x = torch.randn(4, 8)
    expected = model(x)
    assert torch.allclose(quantize_model(model, INT8)(x), expected, atol=1e-5), "its weight has a graph"
    assert torch.allclose(convert_(model)(x), expected, atol=1e-5) and type(model[0]) is nn.Linear


@pytest.mark.parametrize("scheme", [None, False, "None", ""])
def test_a_scheme_of_none_says_how_to_leave_modules_in_float(scheme: Any) -> None:
    with pytest.raises(ValueError, match=r"the scheme .* names none; .*or to leave modules in float overrides="):
        QuantConfig(scheme)


def test_a_number_is_no_pattern() -> None:
    with pytest.raises(ValueError, match=r"overrides has the key 2, no pattern; write '2', in quotes"):
        QuantConfig(overrides={2: None})  # type: ignore[dict-item]
