"""Attention's products in int8: training, conversion, the operator, coverage, and the models that have them."""

from __future__ import annotations

import copy
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_accel import PruneConfig, QuantConfig, export_model, load, prepare_, quantize_model
from lightning_accel.prune import prune_model_, shrink_model
from lightning_accel.quantize import convert_, quantization_coverage, unprepare_
from lightning_accel.quantize.ops import row_codes, row_scales
from lightning_accel.quantize.products import FakeQuantizedProducts, Int8Products, int8_attention
from lightning_accel.select import count_flops

INT8 = QuantConfig("int8", attention=True)


def drawn(b: int, h: int, g: int, rows: int, keys: int, d: int, e: int, seed: int = 0) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(seed)
    shapes = (b, h, rows, d), (b, g, keys, d), (b, g, keys, e)
    return tuple(torch.randn(shape, generator=generator) * 2 for shape in shapes)


def rounding_bound(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float) -> tuple[Tensor, Tensor]:
    """What the formula gives in float64 without rounding shares, and what rounding them to codes may change.

    A code is off by 1/2 at most, and by a little more where float32 has rounded before: scores of size s are off by
    2^-22 s, so their exponentials by that factor.
    """
    (cq, sq), (ck, sk), (cv, sv) = ((row_codes(x, row_scales(x)).double(), row_scales(x).double()) for x in (q, k, v))
    ck, sk, cv, sv = (x.repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (ck, sk, cv, sv))
    scores = cq @ ck.mT * sq * scale * sk.mT
    if mask is not None:
        scores = scores.masked_fill(~mask, -math.inf) if mask.dtype == torch.bool else scores + mask.double()
    top = scores.amax(-1, keepdim=True)
    e = torch.exp(scores - torch.where(top == -math.inf, 0.0, top))
    weighted, total = e * sv.mT, e.sum(-1, keepdim=True).clamp_min(1e-300)
    step = weighted.amax(-1, keepdim=True) / 255
    size = torch.where(scores == -math.inf, 0.0, scores).abs().amax(-1, keepdim=True)
    off = (0.5 + 255 * 2.0**-20 * (1 + size)) * step * cv.abs().sum(-2, keepdim=True) / total
    return weighted @ cv / total, off + 1e-30


@pytest.mark.parametrize("groups", [1, 2, 4])
def test_operator_is_attention_up_to_the_rounding_of_its_codes(groups: int) -> None:
    q, k, v = drawn(2, 4, groups, 7, 33, 16, 24)
    mask = torch.rand(2, 1, 1, 33, generator=torch.Generator().manual_seed(1)) > 0.3
    found = int8_attention(q, k, v, mask, 0.25)
    expected, bound = rounding_bound(q, k, v, mask, 0.25)
    assert ((found - expected).abs() <= bound).all()
    float_ = F.scaled_dot_product_attention(q, k, v, mask, scale=0.25, enable_gqa=groups != 4)
    assert (found - float_).norm() <= 0.02 * float_.norm()
    assert found.transpose(1, 2).is_contiguous()


def test_padding_and_other_rows_change_nothing() -> None:
    q, k, v = drawn(2, 3, 3, 5, 20, 8, 8)
    seen = torch.ones(2, 1, 1, 20, dtype=torch.bool)
    seen[0, ..., 12:] = False
    found = int8_attention(q, k, v, seen, 0.3)
    k[0, :, 12:], v[0, :, 12:] = 1e3, -1e4
    torch.testing.assert_close(int8_attention(q, k, v, seen, 0.3), found, rtol=0, atol=0)
    alone = int8_attention(q[:1], k[:1, :, :12], v[:1, :, :12], None, 0.3)
    torch.testing.assert_close(alone, found[:1], rtol=1e-6, atol=1e-6)


def test_rows_that_see_nothing_are_zero_and_bad_numbers_spread_in_their_rows_only() -> None:
    q, k, v = drawn(1, 1, 1, 3, 6, 8, 8)
    mask = torch.ones(1, 1, 3, 6, dtype=torch.bool)
    mask[..., 1, :] = False
    assert int8_attention(q, k, v, mask, 0.3)[0, 0, 1].eq(0).all()
    q[0, 0, 2, 5] = math.inf
    found = int8_attention(q, k, v, mask, 0.3)[0, 0]
    assert found[2].isnan().all() and found[:2].isfinite().all()


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 9), st.integers(1, 40), st.sampled_from([1, 3, 8, 32]), st.integers(0, 10_000), st.booleans())
def test_training_rounds_as_the_operator(rows: int, keys: int, d: int, seed: int, masked: bool) -> None:
    q, k, v = drawn(2, 4, 2, rows, keys, d, d, seed)
    v[0, 0] = 0.0
    mask = torch.rand(2, 1, rows, keys, generator=torch.Generator().manual_seed(seed)) > 0.2 if masked else None
    trained = FakeQuantizedProducts()(q, k, v, mask, None)
    expected, bound = rounding_bound(q, k, v, mask, d**-0.5)
    assert ((trained - expected).abs() <= bound).all()
    converted = Int8Products()(q, k, v, mask, None)
    assert torch.equal(trained, converted)


def test_gradients_pass_straight_through() -> None:
    q, k, v = (x.requires_grad_() for x in drawn(2, 2, 2, 6, 9, 16, 16))
    grad = torch.randn(2, 2, 6, 16, generator=torch.Generator().manual_seed(1))
    given_ = torch.autograd.grad(FakeQuantizedProducts()(q, k, v, None, None), (q, k, v), grad)
    float_ = torch.autograd.grad(F.scaled_dot_product_attention(q, k, v), (q, k, v), grad)
    for mine, torchs in zip(given_, float_, strict=True):
        assert (mine - torchs).norm() <= 0.05 * torchs.norm()


def bert_batch() -> dict[str, Tensor]:
    ids = tiny.ids(4, 12)
    mask = torch.ones_like(ids)
    mask[1, 7:] = 0
    return {"input_ids": ids, "attention_mask": mask}


def assert_as_trained(found: Tensor, trained: Tensor, other: Tensor) -> None:
    """Samples [B, ..] differ by next to nothing, beside what another form does; one of them may have had a tie."""
    off, by = ((x - trained).flatten(1).norm(dim=1) for x in (found, other))
    assert off.median() <= 0.02 * by.median() and off.max() <= by.max()


def encoder_layer(inner: int = 64) -> nn.Module:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(32, 4, inner, batch_first=True)
    return nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)


def test_bert_is_prepared_and_taken_back() -> None:
    model = tiny.bert().eval()
    before, keys = tiny.logits(model(**bert_batch())), list(model.state_dict())
    coverage = prepare_(model, INT8)
    found = {e.name: e.done for e in coverage.entries if e.name.endswith(".products")}
    assert set(found.values()) == {"int8"} and len(found) == model.config.num_hidden_layers
    assert list(model.state_dict()) == keys and model.config._attn_implementation == "sdpa"
    with torch.no_grad():
        trained = tiny.logits(model(**bert_batch()))
    assert not torch.equal(trained, before)
    prepare_(model, INT8)  # changes nothing
    torch.testing.assert_close(tiny.logits(model(**bert_batch())), trained, rtol=0, atol=0)
    torch.testing.assert_close(tiny.logits(unprepare_(model)(**bert_batch())), before, rtol=0, atol=0)
    assert not any(isinstance(module, FakeQuantizedProducts) for module in model.modules())


@pytest.mark.parametrize("make", [tiny.bert, tiny.vit, encoder_layer])
def test_converted_is_what_was_trained(make: Any) -> None:
    model = make().eval()
    inputs = {tiny.bert: bert_batch()}.get(make, {"x": torch.randn(3, 3, 16, 16)})
    inputs = {"src": torch.randn(3, 9, 32)} if make is encoder_layer else inputs
    call = (lambda m: m(inputs["x"])) if make is tiny.vit else lambda m: m(**inputs)
    prepare_(model, INT8)
    with torch.no_grad():
        trained = tiny.logits(call(model))
        converted = convert_(copy.deepcopy(model)).eval()
        out = tiny.logits(call(converted))
        float_ = tiny.logits(call(unprepare_(copy.deepcopy(model))))
    assert sum(isinstance(m, Int8Products) for m in converted.modules()) >= 2
    assert_as_trained(out, trained, float_)


SMALL = {"num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64, "hidden_size": 32}
BOTH = {"d_model": 32} | {
    f"{side}_{name}": size
    for side in ("encoder", "decoder")
    for name, size in {"layers": 2, "attention_heads": 4, "ffn_dim": 64}.items()
}
SPEECH = {"conv_dim": (32, 32), "conv_stride": (5, 2), "conv_kernel": (10, 3), "num_conv_pos_embeddings": 16}
T5 = {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4}
ENCODERS: dict[str, tuple[str, dict[str, Any]]] = {
    "T5EncoderModel": ("T5Config", T5),
    "BartModel": ("BartConfig", BOTH),
    "WhisperModel": ("WhisperConfig", BOTH | {"pad_token_id": 0, "max_source_positions": 20}),
    "RobertaModel": ("RobertaConfig", SMALL),
    "DistilBertModel": ("DistilBertConfig", {"dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 64}),
    "CLIPVisionModel": ("CLIPVisionConfig", SMALL | {"image_size": 32, "patch_size": 8}),
    "Wav2Vec2Model": ("Wav2Vec2Config", SMALL | SPEECH | {"num_conv_pos_embedding_groups": 4}),
}
OTHER_INPUTS = {
    "WhisperModel": {"input_features": (2, 80, 40)},
    "CLIPVisionModel": {"pixel_values": (2, 3, 32, 32)},
    "Wav2Vec2Model": {"input_values": (2, 400)},
}


def encoder(name: str) -> tuple[Any, dict[str, Tensor]]:
    """An encoder of transformers with random weights, and inputs, padded where it takes a mask."""
    torch.manual_seed(0)
    config, sizes = ENCODERS[name]
    model = getattr(transformers, name)(getattr(transformers, config)(**sizes))
    inputs = {key: torch.randn(shape) for key, shape in OTHER_INPUTS.get(name, {}).items()} or bert_batch()
    return getattr(model, "encoder" if sizes is BOTH or name == "WhisperModel" else "base_model").eval(), inputs


@pytest.mark.parametrize("name", ENCODERS)
def test_encoders_of_transformers(name: str) -> None:
    model, inputs = encoder(name)
    mask = inputs.get("attention_mask")
    with torch.no_grad():
        float_ = model(**inputs).last_hidden_state
        coverage = prepare_(model, INT8)
        trained = model(**inputs).last_hidden_state
        converted = convert_(copy.deepcopy(model))(**inputs).last_hidden_state
        if mask is not None:  # what is hidden is not seen
            inputs["input_ids"] = torch.where(mask.bool(), inputs["input_ids"], 1)
            assert torch.equal(model(**inputs).last_hidden_state[mask.bool()], trained[mask.bool()])
    assert [e.done for e in coverage.entries if e.name.endswith("products")] == ["int8"] * 2
    assert 0 < (trained - float_).norm() <= 0.05 * float_.norm()
    assert_as_trained(converted, trained, float_)


def test_a_causal_encoder_and_one_that_is_asked_for_maps() -> None:
    torch.manual_seed(0)
    shape = SMALL | {"vocab_size": 97, "eos_token_id": 2, "bos_token_id": 1, "pad_token_id": 0}
    model = transformers.CLIPTextModel(transformers.CLIPTextConfig(**shape)).eval()
    inputs = {"input_ids": tiny.ids(2, 9)}
    with torch.no_grad():
        float_ = model(**inputs).last_hidden_state
        prepare_(model, INT8)
        trained = model(**inputs).last_hidden_state
        converted = convert_(copy.deepcopy(model))(**inputs).last_hidden_state
        inputs["input_ids"][:, 5:] = 7  # later tokens are not seen
        assert torch.equal(model(**inputs).last_hidden_state[:, :5], trained[:, :5])
    assert 0 < (trained - float_).norm() <= 0.05 * float_.norm()
    assert_as_trained(converted, trained, float_)
    maps = tiny.bert()
    maps.config._attn_implementation, maps.config.output_attentions = "eager", True
    reasons = [e.reason for e in prepare_(maps, INT8).entries if e.name.endswith("products")]
    assert len(reasons) == tiny.LAYERS and all("config.output_attentions = False" in str(r) for r in reasons)


def test_a_model_without_such_attention_is_told() -> None:
    with pytest.warns(UserWarning, match="attention=True found no attention in Sequential"):
        prepare_(tiny.mlp(), INT8)


def test_a_pickled_model_runs_in_another_process(tmp_path: Path) -> None:
    model = tiny.bert().eval()
    prepare_(model, INT8)
    with torch.no_grad():
        torch.save((model, bert_batch(), tiny.logits(model(**bert_batch()))), tmp_path / "model.pt")
    code = (
        "import sys, torch; model, batch, expected = torch.load(sys.argv[1], weights_only=False)\n"
        "with torch.no_grad(): assert torch.allclose(model(**batch).logits, expected, atol=1e-5)"
    )
    subprocess.run([sys.executable, "-c", code, tmp_path / "model.pt"], check=True)


def test_a_weight_that_a_parametrization_makes_is_named() -> None:
    model = encoder("Wav2Vec2Model")[0]
    for scheme in ("int8", "int8-static"):
        coverage = prepare_(copy.deepcopy(model), QuantConfig(scheme))  # type: ignore[arg-type]
        reasons = [str(e.reason) for e in coverage.entries if e.name.endswith("pos_conv_embed.conv")]
        assert len(reasons) == 1 and "parametrize.remove_parametrizations" in reasons[0]


def test_training_under_autocast_sums_codes_exactly() -> None:
    q, k, v = (x.bfloat16() for x in drawn(2, 4, 2, 5, 40, 64, 64))
    expected = FakeQuantizedProducts()(q, k, v, None, None)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(FakeQuantizedProducts()(q, k, v, None, None), expected)


def test_a_prepared_model_is_converted_as_it_was_prepared() -> None:
    model = tiny.bert().eval()
    prepare_(model, INT8)
    with torch.no_grad():
        trained, converted = tiny.logits(model(**bert_batch())), quantize_model(model, INT8)
        float_ = tiny.logits(unprepare_(copy.deepcopy(model))(**bert_batch()))
        assert_as_trained(tiny.logits(converted(**bert_batch())), trained, float_)
    with pytest.raises(ValueError, match="attention=True"):
        quantize_model(model, QuantConfig("int8"))
    model = tiny.bert()
    prepare_(model, QuantConfig("int8"))
    with pytest.raises(ValueError, match="products' is not prepared"):
        quantize_model(model, INT8)


def test_masks_of_multihead_attention() -> None:
    torch.manual_seed(0)
    layer = nn.MultiheadAttention(32, 4, batch_first=True).eval()
    x, padding = torch.randn(2, 6, 32), torch.zeros(2, 6, dtype=torch.bool)
    padding[0, 4:] = True
    causal = nn.Transformer.generate_square_subsequent_mask(6)
    given_ = {"key_padding_mask": padding.float().masked_fill(padding, -math.inf), "attn_mask": causal}
    expected, weights = layer(x, x, x, **given_)
    prepare_(layer, QuantConfig("int8", overrides={"*out_proj": None, "": None}, attention=True))
    for options in ({}, {"is_causal": True, "need_weights": False}):
        found, seen = layer(x, x, x, **given_, **options)
        assert 0 < (found - expected).norm() <= 0.03 * expected.norm()
        assert seen is None or torch.allclose(seen, weights, atol=1e-6)


def test_layers_that_decode_and_layers_that_are_excluded_are_named() -> None:
    coverage = prepare_(tiny.llama(), INT8)
    reasons = {e.name: e.reason for e in coverage.entries if e.name.endswith("products")}
    assert reasons and all("cache" in str(reason) for reason in reasons.values())
    model = tiny.bert()
    coverage = prepare_(model, QuantConfig("int8", attention=True, overrides={"*.layer.0.*.products": None}))
    left = [e for e in coverage.entries if e.name.endswith("products") and e.done is None]
    assert [e.reason for e in left] == ["excluded by overrides"] and "layer.0." in left[0].name
    with pytest.raises(ValueError, match="attention=True"):
        prepare_(model, QuantConfig("int8"))
    with pytest.raises(ValueError, match="write attention=True"):
        QuantConfig(attention="int8")  # type: ignore[arg-type]


def test_coverage_counts_the_products() -> None:
    model = tiny.bert().eval()
    flops = count_flops(model, (), bert_batch())
    converted = quantize_model(model, INT8)
    with_products = quantization_coverage(converted, flops)
    without = quantization_coverage(quantize_model(model, QuantConfig("int8")), flops)
    left = next(e.flops for e in without.entries if e.name.startswith("(attention"))
    counted = sum(e.flops or 0 for e in with_products.entries if e.name.endswith("products"))
    assert counted == left and with_products.share_of_flops == 1.0 > (without.share_of_flops or 0)


@pytest.mark.parametrize("engine", ["portable", "aoti", "aoti_avx2", "onnx"])
def test_export_of_bert(engine: str, tmp_path: Any) -> None:
    exported_equals_converted(tiny.bert().eval(), bert_batch(), engine, tmp_path / "a")


def test_export_through_openvino(tmp_path: Any) -> None:
    # one scale a row is one a layer there, if all layers have as many inputs
    exported_equals_converted(encoder_layer(32).eval(), {"src": torch.randn(3, 9, 32)}, "openvino", tmp_path / "a")


def exported_equals_converted(model: nn.Module, inputs: dict[str, Tensor], engine: str, path: Path) -> None:
    for package in {"onnx": ("onnxscript", "onnxruntime"), "openvino": ("onnxscript", "openvino")}.get(engine, ()):
        pytest.importorskip(package)
    engines = tuple(dict.fromkeys((engine, "portable")))
    export_model(model, path, example_inputs=inputs, quantize=INT8, engines=engines, measure=False)
    found = tiny.logits(load(path, engine=engine)(**inputs))
    with torch.no_grad():
        expected, without = (tiny.logits(quantize_model(model, c)(**inputs)) for c in (INT8, QuantConfig("int8")))
    assert_as_trained(found, expected, without)  # attention in float would differ by as much as `without`


def test_heads_are_cut_out_of_a_prepared_model() -> None:
    model, inputs = tiny.bert().eval(), bert_batch()
    masks = prune_model_(model, PruneConfig("heads", amount=0.5), example_inputs=inputs)
    prepare_(model, INT8)
    with torch.no_grad():
        masked = tiny.logits(model(**inputs))
        shrunk = shrink_model(model, masks, example_inputs=inputs)
        assert sum(isinstance(m, FakeQuantizedProducts) for m in shrunk.modules()) == tiny.LAYERS
        assert sum(p.numel() for p in shrunk.parameters()) < sum(p.numel() for p in model.parameters())
        out = tiny.logits(shrunk(**inputs))
    assert (out - masked).norm() <= 1e-4 * masked.norm()
