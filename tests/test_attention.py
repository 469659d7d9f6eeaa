"""Attention: unfused it is torch's, its projections round as linear layers do, and converted they hold integers."""

from __future__ import annotations

import copy
import pickle
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import tiny
import torch
from helpers import Plain, assert_same, seeded, trainer, weights
from kernels import linear_bound
from lightning.pytorch.callbacks import ModelCheckpoint
from test_quantize import snapshot
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_accel import (
    PruneConfig,
    QuantConfig,
    QuantizationAwareTraining,
    allocate,
    export_model,
    load,
    prepare_,
    prune_model_,
    quantize_model,
    select,
    sensitivity,
)
from lightning_accel.finalize import finalize, restore_
from lightning_accel.prune import apply_masks_
from lightning_accel.quantize import Int8Linear, calibrate_, convert_, is_prepared, quantization_coverage, unprepare_
from lightning_accel.quantize.attention import ConvertedAttention, FakeQuantizedAttention, UnfusedAttention
from lightning_accel.quantize.layers import Int4Linear

SCHEMES = ("int8", "int4-weight", "int4-int8")
ALL_SCHEMES = (*SCHEMES, "int8-static")
WIDTH, HEADS, BATCH, QUERIES, KEYS = 32, 4, 3, 5, 7

LAYERS: dict[str, dict[str, Any]] = {
    "length first": {},
    "batch first": {"batch_first": True},
    "no bias": {"bias": False, "batch_first": True},
    "three weights": {"kdim": 64, "vdim": 96, "batch_first": True},
    "more keys": {"add_bias_kv": True, "add_zero_attn": True},
}
# of each: whether it is self-attention, whether there is a batch, and the keyword arguments
CALLS: dict[str, tuple[bool, bool, Callable[[int], dict[str, Any]]]] = {
    "self": (True, True, lambda n: {"need_weights": False}),
    "self, weights": (True, True, lambda n: {}),
    "cross": (False, True, lambda n: {"need_weights": False}),
    "cross, weights of heads": (False, True, lambda n: {"average_attn_weights": False}),
    "unbatched": (False, False, lambda n: {"key_padding_mask": hidden(n)}),
    "unbatched, no weights": (True, False, lambda n: {"need_weights": False, "attn_mask": hidden(HEADS, QUERIES, n)}),
    "padding": (False, True, lambda n: {"key_padding_mask": hidden(BATCH, n), "need_weights": False}),
    "bool mask": (False, True, lambda n: {"attn_mask": hidden(QUERIES, n)}),
    "float mask": (False, True, lambda n: {"attn_mask": torch.randn(QUERIES, n), "need_weights": False}),
    "mask of heads": (False, True, lambda n: {"attn_mask": hidden(BATCH * HEADS, QUERIES, n), "need_weights": False}),
    "both masks": (True, True, lambda n: {"attn_mask": hidden(QUERIES, n), "key_padding_mask": hidden(BATCH, n)}),
    "causal": (True, True, lambda n: {"attn_mask": later(n), "is_causal": True, "need_weights": False}),
    "causal and padding": (
        True,
        True,
        lambda n: {"attn_mask": later(n), "is_causal": True, "key_padding_mask": hidden(BATCH, n)},
    ),
}
CASES = [(layer, call) for layer in LAYERS for call in CALLS if not (layer == "three weights" and CALLS[call][0])]


def hidden(*shape: int) -> Tensor:
    """A boolean mask which hides a third, never the first."""
    mask = torch.rand(shape) > 0.67
    mask[..., 0] = False
    return mask


def later(n: int) -> Tensor:
    return torch.ones(n, n, dtype=torch.bool).triu(1)


def attention(layer: str = "batch first", dropout: float = 0.0) -> nn.MultiheadAttention:
    torch.manual_seed(0)
    module = nn.MultiheadAttention(WIDTH, HEADS, dropout=dropout, **LAYERS[layer])
    for bias in (module.in_proj_bias, module.out_proj.bias):
        if bias is not None:
            nn.init.normal_(bias)
    return module


def arguments(module: nn.MultiheadAttention, call: str) -> tuple[tuple[Tensor, Tensor, Tensor], dict[str, Any]]:
    """Query, key and value, and the keyword arguments of a call."""
    torch.manual_seed(1)
    same, batched, keywords = CALLS[call]

    def inputs(length: int, width: int) -> Tensor:
        shape = (BATCH, length) if module.batch_first else (length, BATCH)
        return torch.randn(*(shape if batched else (length,)), width)

    query = inputs(QUERIES, WIDTH)
    if same:
        return (query, query, query), keywords(QUERIES)
    return (query, inputs(KEYS, module.kdim), inputs(KEYS, module.vdim)), keywords(KEYS)


def enable(model: nn.Module, enabled: bool) -> None:
    for module in model.modules():
        if hasattr(module, "enabled"):
            module.enabled = enabled


def assert_near(one: Any, other: Any, bound: float) -> None:
    """Of outputs and of attention weights, `None` where there are none."""
    for a, b in zip(one, other, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            assert a.shape == b.shape and (a - b).abs().max() <= bound


class Encoder(nn.Module):
    """A classifier of padded sequences of ids; 0 is padding."""

    def __init__(self, width: int = WIDTH, inner: int = 64) -> None:
        super().__init__()
        self.embed = nn.Embedding(50, width)
        layer = nn.TransformerEncoderLayer(width, HEADS, inner, dropout=0.0, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2)
        self.head = nn.Linear(width, 3)

    def forward(self, ids: Tensor) -> Tensor:
        padding = ids == 0
        y = self.encoder(self.embed(ids), src_key_padding_mask=padding)
        return self.head(y.masked_fill(padding.unsqueeze(-1), 0.0).sum(1))


def encoder(**changes: int) -> Encoder:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch about nested tensors
        return seeded(Encoder, **changes).eval()


def ids(batch: int = 4, length: int = 9) -> Tensor:
    tokens = torch.randint(1, 50, (batch, length), generator=torch.Generator().manual_seed(2))
    tokens[1::2, length - 3 :] = 0
    return tokens


# --- the same as torch's ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize(("layer", "call"), CASES)
def test_without_rounding_it_is_torchs_within_float_rounding(layer: str, call: str, dropout: float) -> None:
    module = attention(layer, dropout)
    model = nn.ModuleList([copy.deepcopy(module)])
    prepare_(model, QuantConfig("int8"))
    assert type(model[0]) is FakeQuantizedAttention
    enable(model, False)
    inputs, keywords = arguments(module, call)
    for training in (True, False):
        torch.manual_seed(2)
        expected = module.train(training)(*inputs, **keywords)
        torch.manual_seed(2)
        assert_near(model.train(training)[0](*inputs, **keywords), expected, 1e-6)


@torch.no_grad()
@pytest.mark.parametrize("call", CALLS)
def test_torchs_fused_operator_computes_the_same(call: str) -> None:
    module = attention().eval()
    unfused: Any = copy.deepcopy(module)
    unfused.__class__ = UnfusedAttention
    inputs, keywords = arguments(module, call)
    assert_near(unfused(*inputs, **keywords), module(*inputs, **keywords), 1e-6)


@torch.no_grad()
@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("layer", ["batch first", "three weights"])
def test_rounded_it_is_torchs_with_rounded_inputs_and_weights(layer: str, scheme: str) -> None:
    module = attention(layer)
    inputs, keywords = arguments(module, "padding")
    model = nn.ModuleList([copy.deepcopy(module)])
    prepare_(model, QuantConfig(scheme))
    fake: Any = model[0]
    plain = module(*inputs, **keywords)[0]
    for name in ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight"):
        if (weight := getattr(module, name)) is not None:
            weight.copy_(fake.weight_fake_quantizer(weight))
    module.out_proj.weight.copy_(torch.eye(WIDTH))  # by which nothing is rounded
    module.out_proj.bias.zero_()
    rounded = [x if q is None else q(x) for x, q in zip(inputs, fake.quantizers(), strict=True)]
    expected = fake.out_proj(module(*rounded, **keywords)[0])
    noise = (expected - plain).norm()
    assert noise > 0 and (fake(*inputs, **keywords)[0] - expected).norm() <= 0.1 * noise, "a code may flip"


def test_what_it_cannot_take_is_refused() -> None:
    model = nn.ModuleList([attention()])
    prepare_(model, QuantConfig("int8"))
    x = torch.randn(2, 5, WIDTH)
    with pytest.raises(ValueError, match="is_causal=True is a hint about attn_mask"):
        model[0](x, x, x, is_causal=True)
    with pytest.raises(ValueError, match=r"attn_mask has shape \[1, 5\], expected \[5, 5\]"):
        model[0](x, x, x, attn_mask=torch.zeros(1, 5))
    with pytest.raises(ValueError, match=r"key_padding_mask has shape \[2, 4\], but there are 5 keys"):
        model[0](x, x, x, key_padding_mask=torch.zeros(2, 4))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        nested = torch.nested.nested_tensor([torch.randn(3, WIDTH), torch.randn(5, WIDTH)])
    with pytest.raises(ValueError, match="no nested tensors"):
        model[0](nested, nested, nested)


# --- conversion -------------------------------------------------------------------------------------------------------


def layer_bound(linear: Any, x: Tensor) -> Tensor:
    """Of the difference between a fake-quantized layer and its integer form."""
    x = x if linear.activation_fake_quantizer is None else linear.activation_fake_quantizer(x)
    return linear_bound(x, linear.weight_fake_quantizer(linear.weight), linear.bias)


@torch.no_grad()
@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("layer", LAYERS)
def test_each_converted_projection_is_the_fake_quantized_one_within_the_bound_of_a_linear_layer(
    layer: str, scheme: str
) -> None:
    model = nn.ModuleList([attention(layer)]).eval()
    inputs, _ = arguments(model[0], "cross")
    prepare_(model, QuantConfig(scheme))
    fake: Any = model[0]
    converted: Any = convert_(copy.deepcopy(model))[0]
    assert type(converted) is ConvertedAttention and type(converted).forward is type(fake).forward
    kind = Int8Linear if scheme == "int8" else Int4Linear
    names = ("q_proj", "k_proj", "v_proj", "out_proj")
    assert all(isinstance(getattr(converted, n), kind) and getattr(converted, n).scheme == scheme for n in names)
    linears = fake.linears()
    for (name, linear), x, ours, theirs in zip(
        linears.items(), inputs, fake.project(*inputs), converted.project(*inputs), strict=True
    ):
        assert ((ours - theirs).abs() <= layer_bound(linear, x)).all(), name
    last = fake.out_proj
    assert ((last(inputs[0]) - converted.out_proj(inputs[0])).abs() <= layer_bound(last, inputs[0])).all()
    if scheme == "int8":
        whole = torch.cat([linear.weight for linear in linears.values()]) if layer != "three weights" else None
        codes = [getattr(converted, n).weight for n in names[:3]]
        for name, rows in zip(names, codes, strict=False):
            assert torch.equal(rows, fake.weight_fake_quantizer(linears[name].weight))
        assert whole is None or torch.equal(torch.cat(codes), fake.weight_fake_quantizer(fake.in_proj_weight))


@torch.no_grad()
@pytest.mark.parametrize("scheme", ALL_SCHEMES)
@pytest.mark.parametrize(("layer", "call"), CASES)
def test_converted_it_computes_nearly_what_it_was_trained_to(layer: str, call: str, scheme: str) -> None:
    model = nn.ModuleList([attention(layer)]).eval()
    inputs, keywords = arguments(model[0], call)
    plain = model[0](*inputs, **keywords)
    prepare_(model, QuantConfig(scheme))
    calibrate_(model, 8 * [inputs], run=lambda model, inputs: model[0](*inputs, **keywords))
    fake = model[0](*inputs, **keywords)
    converted = convert_(model)[0](*inputs, **keywords)
    for a, b, c in zip(plain, fake, converted, strict=True):
        assert (a is None) == (c is None)
        if c is not None:
            assert (b - a).norm() > 0 and (c - b).norm() <= 0.1 * (b - a).norm(), "a code of out_proj's input may flip"


@torch.no_grad()
@pytest.mark.parametrize("scheme", ALL_SCHEMES)
def test_encoders_and_decoders_compute_nearly_what_they_were_trained_to(scheme: str) -> None:
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = nn.Transformer(WIDTH, HEADS, 1, 1, 64, dropout=0.0, batch_first=True).eval()
    source, target = torch.randn(2, 7, WIDTH), torch.randn(2, 5, WIDTH)
    masks = {"tgt_mask": nn.Transformer.generate_square_subsequent_mask(5), "tgt_is_causal": True}
    plain = model(source, target, **masks)
    coverage = prepare_(model, QuantConfig(scheme))
    assert [e.done for e in coverage.entries if "attn" in e.name] == 6 * [scheme]
    calibrate_(model, 8 * [(source, target)], run=lambda model, inputs: model(*inputs, **masks))
    fake, converted = model(source, target, **masks), convert_(model)(source, target, **masks)
    assert (converted - fake).norm() <= 0.2 * (fake - plain).norm()


def test_each_input_has_its_own_static_range() -> None:
    model = nn.ModuleList([attention("three weights")]).eval()
    (query, key, value), _ = arguments(model[0], "cross")
    prepare_(model, QuantConfig("int8-static"))
    calibrate_(model, 8 * [(query, 2 * key, 3 * value)], run=lambda model, inputs: model[0](*inputs))
    for quantizer, x in zip(model[0].quantizers(), (query, 2 * key, 3 * value), strict=True):
        assert quantizer.range.tolist() == [x.min(), x.max()]


def test_hooks_run_before_and_after_conversion_and_extra_keys_stay() -> None:
    model, calls = nn.ModuleList([attention("more keys")]).eval(), []
    model[0].register_forward_hook(lambda module, args, output: calls.append(type(module)))
    prepare_(model, QuantConfig("int8"))
    x = torch.randn(5, 2, WIDTH)
    model[0](x, x, x)
    converted = convert_(copy.deepcopy(model))
    converted[0](x, x, x)
    assert calls == [FakeQuantizedAttention, ConvertedAttention]
    assert list(dict(converted.named_parameters())) == ["0.bias_k", "0.bias_v"]
    assert torch.equal(converted[0].bias_k, model[0].bias_k) and not converted[0].training


def test_weights_that_are_not_finite_are_refused() -> None:
    model = nn.ModuleList([attention()])
    prepare_(model, QuantConfig("int8"))
    model[0].in_proj_weight.data[40, 3] = float("nan")
    before = snapshot(model)
    with pytest.raises(ValueError, match=r"0\.in_proj_weight holds NaN or infinite values; .* overrides=\{'0': None\}"):
        convert_(model)
    assert snapshot(model) == before


def test_pruned_weights_have_code_zero() -> None:
    model = nn.ModuleList([attention()])
    shapes = {"0.in_proj_weight": (3 * WIDTH, WIDTH), "0.out_proj.weight": (WIDTH, WIDTH)}
    masks = {name: torch.rand(shape) > 0.5 for name, shape in shapes.items()}
    prepare_(model, QuantConfig("int8"))
    apply_masks_(model, masks)
    converted = convert_(copy.deepcopy(model))[0]
    codes = torch.cat([converted.q_proj.weight, converted.k_proj.weight, converted.v_proj.weight])
    assert (codes[~masks["0.in_proj_weight"]] == 0).all() and codes.count_nonzero() > WIDTH * WIDTH
    assert (converted.out_proj.weight[~masks["0.out_proj.weight"]] == 0).all()


# --- the swap ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("layer", LAYERS)
def test_keys_and_parameters_stay_and_unprepare_restores_exactly(layer: str, scheme: str) -> None:
    model = nn.ModuleList([attention(layer), attention(layer).eval()])
    before = snapshot(model)
    first = prepare_(model, QuantConfig(scheme))
    during = snapshot(model)
    assert (during["keys"], during["parameters"]) == (before["keys"], before["parameters"])
    assert model[0].training and not model[1].training and not model[1].weight_fake_quantizer.training
    assert prepare_(model, QuantConfig(scheme)).as_dict() == first.as_dict() and snapshot(model) == during
    again = pickle.loads(pickle.dumps(model))
    inputs, keywords = arguments(model[1], "padding")
    assert torch.equal(again[1](*inputs, **keywords)[0], copy.deepcopy(model)[1](*inputs, **keywords)[0])
    assert snapshot(unprepare_(model)) == before


def test_a_pattern_for_attention_holds_for_its_last_layer_unless_that_has_one_of_its_own() -> None:
    def done(overrides: dict[str, str | None]) -> list[str | None]:
        model = nn.ModuleDict({"attention": attention(), "linear": nn.Linear(WIDTH, 2)})
        entries = {e.name: e.done for e in prepare_(model, QuantConfig("int8", overrides=overrides)).entries}
        types = [type(model["attention"]) is FakeQuantizedAttention, is_prepared(model["attention"].out_proj)]
        found = [entries["attention"], entries["attention.out_proj"]]
        assert types == [scheme is not None for scheme in found]
        assert (type(model["attention"]) is nn.MultiheadAttention) == (found == [None, None])
        return found

    assert done({}) == ["int8", "int8"]
    assert done({"attention": None}) == [None, None]
    assert done({"attention": "int4-int8"}) == ["int4-int8", "int4-int8"]
    assert done({"*.out_proj": None}) == ["int8", None]
    assert done({"attention": None, "*.out_proj": "int8"}) == [None, "int8"]


@torch.no_grad()
def test_the_last_layer_alone_is_rounded_and_converted_and_the_rest_can_follow() -> None:
    model, x = nn.ModuleList([attention()]).eval(), torch.randn(2, 5, WIDTH)
    before, plain = snapshot(model), model[0](x, x, x)[0]
    prepare_(model, QuantConfig(overrides={"0": None, "0.out_proj": "int8"}))
    fake = model[0](x, x, x)[0]
    converted = convert_(copy.deepcopy(model))
    assert type(converted[0]) is UnfusedAttention and isinstance(converted[0].out_proj, Int8Linear)
    assert (fake - plain).norm() > 0 and (converted[0](x, x, x)[0] - fake).norm() <= 0.1 * (fake - plain).norm()
    prepare_(model, QuantConfig("int8"))
    assert type(model[0]) is FakeQuantizedAttention and snapshot(unprepare_(model)) == before


def test_groups_that_divide_one_of_three_widths_only_fall_back() -> None:
    model = nn.ModuleList([nn.MultiheadAttention(WIDTH, HEADS, vdim=48)])
    with pytest.warns(UserWarning, match="0: int8 in place of int4-int8: groups of 32 do not divide its 48 inputs"):
        entries = prepare_(model, QuantConfig("int4-int8")).entries
    assert [e.done for e in entries] == ["int8", "int4-int8"]
    assert {m.fallback for m in convert_(model)[0].children()} == {entries[0].reason, None}


@torch.no_grad()
def test_no_fused_path_passes_by_the_fake_quantizers() -> None:
    model, tokens = encoder(), ids()
    prepare_(model, QuantConfig("int8"))
    trained = model.train()(tokens)
    called = []
    for name, module in model.named_modules():
        if name.endswith("fake_quantizer"):
            module.register_forward_hook(lambda *_, name=name: called.append(name))
    hooked = model.eval()(tokens)
    assert torch.equal(hooked, trained)
    names = [n for n, _ in model.named_modules() if n.endswith("fake_quantizer")]
    three = [n for n in names if n.endswith("self_attn.weight_fake_quantizer")]  # called for each of three weights
    assert len(three) == 2 and sorted(called) == sorted(names + three + three)
    for module in model.modules():
        module._forward_hooks.clear()
    assert torch.equal(model(tokens), trained), "hooks alone keep torch from its fused path"


def test_gradients_pass_the_rounding_to_every_parameter() -> None:
    model = nn.ModuleList([attention("more keys")])
    plain = copy.deepcopy(model)
    prepare_(model, QuantConfig("int8"))
    inputs, keywords = arguments(model[0], "cross")
    for each in (model, plain):
        each[0](*(x.requires_grad_() for x in inputs), **keywords)[0].square().sum().backward()
    for (name, one), (_, other) in zip(model.named_parameters(), plain.named_parameters(), strict=True):
        assert F.cosine_similarity(one.grad.flatten(), other.grad.flatten(), dim=0) > 0.95, name


def test_bf16_autocast_trains() -> None:
    model = nn.ModuleList([attention()])
    prepare_(model, QuantConfig("int8"))
    for call in ("padding", "both masks"):
        inputs, keywords = arguments(model[0], call)
        with torch.autocast("cpu", torch.bfloat16):
            y = model[0](*inputs, **keywords)[0]
        y.float().square().sum().backward()
        assert y.dtype == torch.bfloat16 and all(p.grad.isfinite().all() for p in model.parameters())


# --- with the others --------------------------------------------------------------------------------------------------


def test_coverage_names_the_projections_with_parameters_and_flops_counted_by_hand() -> None:
    model = nn.ModuleDict({"a": attention("three weights"), "b": attention("three weights")})

    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.parts = model

        def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return self.parts["a"](q, k, value=v)[0] + self.parts["b"](q, k, v, need_weights=False)[0]

    two = Two().eval()
    inputs, _ = arguments(model["a"], "cross")
    flops = select.count_flops(two, inputs, {})
    converted = quantize_model(two, QuantConfig("int8", overrides={"parts.b": None, "parts.b.out_proj": "int8"}))
    entries = {e.name: e for e in quantization_coverage(converted, flops).entries}
    q, k, v = (2 * BATCH * n * width * WIDTH for n, width in ((QUERIES, WIDTH), (KEYS, 64), (KEYS, 96)))
    figures = {name: (e.done, e.parameters, e.flops) for name, e in entries.items()}
    products = 2 * 2 * 2 * BATCH * QUERIES * KEYS * WIDTH
    assert figures == {
        "parts.a.q_proj": ("int8", WIDTH * WIDTH, q),
        "parts.a.k_proj": ("int8", 64 * WIDTH, k),
        "parts.a.v_proj": ("int8", 96 * WIDTH, v),
        "parts.a.out_proj": ("int8", WIDTH * WIDTH, q),
        "parts.b": (None, (WIDTH + 64 + 96) * WIDTH + 3 * WIDTH, q + k + v),
        "parts.b.out_proj": ("int8", WIDTH * WIDTH, q),
        "(attention and other products without weights)": (None, 0, products),
    }
    assert sum(flops for _, _, flops in figures.values()) == flops[""]


class Attending(nn.Module):
    """Logits [batch, 3] of points [batch, 8], taken for four tokens of two."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(2, WIDTH)
        self.attention = nn.MultiheadAttention(WIDTH, 2, batch_first=True)
        self.head = nn.Linear(WIDTH, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x.unflatten(-1, (4, 2)))
        return self.head((x + self.attention(x, x, x, need_weights=False)[0]).mean(1))


def points(n: int = 32) -> list[tuple[Tensor, Tensor]]:
    torch.manual_seed(3)
    return [(torch.randn(8), torch.tensor(i % 3)) for i in range(n)]


def test_a_checkpoint_holds_what_is_quantized_and_a_resumed_fit_is_bitwise_the_whole_one(tmp_path) -> None:
    def callbacks(path: Any) -> list[Any]:
        overrides = {"attention": "int4-int8", "*.out_proj": None, "embed": None}
        config = QuantConfig("int8", overrides=overrides)
        return [QuantizationAwareTraining(config, begin=3, module="model"), ModelCheckpoint(path, save_top_k=-1)]

    def loader() -> Any:
        return torch.utils.data.DataLoader(points(), batch_size=8)

    whole, resumed = seeded(Plain, seeded(Attending)), seeded(Plain, seeded(Attending, seed=5))
    trainer(tmp_path, callbacks(tmp_path / "a")).fit(whole, loader())
    first = next(p for p in (tmp_path / "a").iterdir() if "epoch=0" in p.name)
    trainer(tmp_path, callbacks(tmp_path / "b")).fit(resumed, loader(), ckpt_path=first, weights_only=True)
    assert_same(weights(whole), weights(resumed))
    last = next(p for p in (tmp_path / "b").iterdir() if "epoch=1" in p.name)
    saved = torch.load(last, weights_only=True)["callbacks"]
    quantized = next(s["quantized"] for s in saved.values() if s.get("technique") == "quantization")
    assert quantized == {"model.attention": "int4-int8", "model.head": "int8"}
    restored, x = restore_(Attending(), last, "model").model.eval(), torch.randn(4, 8)
    assert is_prepared(restored.head) and not is_prepared(nn.ModuleList([restored.embed, restored.attention.out_proj]))
    assert torch.equal(restored(x), whole.model.eval()(x))


def test_attention_and_its_last_layer_are_measured_and_allocated_apart() -> None:
    model = seeded(Attending)
    batches = list(torch.utils.data.DataLoader(points(), batch_size=16))
    found = sensitivity(model, batches, ("int8", "int4-int8"))
    assert sorted(found.increase) == ["attention", "attention.out_proj", "embed", "head"]
    assert found.size["attention"] == {"float": 12 * WIDTH**2, "int8": 3 * (WIDTH + 4) * WIDTH, "int4-int8": 54 * WIDTH}
    alone = copy.deepcopy(model).eval()
    prepare_(alone, QuantConfig(overrides={"attention": "int4-int8", "*.out_proj": None, "*": None}))
    with torch.no_grad():
        loss = sum(F.cross_entropy(alone(x), y).item() for x, y in batches) / len(batches)
    assert found.increase["attention"]["int4-int8"] == pytest.approx(loss - found.loss, abs=1e-6)
    overrides = allocate(found, size=0.2)
    entries = prepare_(copy.deepcopy(model), QuantConfig(overrides=overrides)).entries
    assert {e.name: e.done for e in entries} == overrides


@torch.no_grad()
@pytest.mark.parametrize("scheme", SCHEMES)
def test_an_exported_encoder_of_padded_sequences_is_verified(tmp_path, scheme: str) -> None:
    options: dict[str, Any] = {"engines": ("portable",), "measure": False}
    model, tokens = encoder(), ids()
    report = export_model(
        model, tmp_path / "a", example_inputs=(tokens,), data=[(ids(8),)], quantize=QuantConfig(scheme), **options
    )
    assert report.manifest["coverage"][0]["share_of_flops"] > 0.9
    converted = quantize_model(model, QuantConfig(scheme))
    for batch, length in ((1, 4), (7, 13)):
        x = ids(batch, length)
        assert torch.allclose(load(tmp_path / "a")(x), converted(x), atol=1e-5)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_the_batch_is_free_in_an_exported_program(scheme: str) -> None:
    converted = quantize_model(nn.TransformerEncoderLayer(WIDTH, HEADS, 64, batch_first=True), QuantConfig(scheme))
    batch = torch.export.Dim("batch", min=2, max=64)
    with torch.no_grad():
        program = torch.export.export(converted, (torch.randn(3, 6, WIDTH),), dynamic_shapes=({0: batch},)).module()
        x = torch.randn(11, 6, WIDTH)
        assert torch.allclose(program(x), converted(x), atol=1e-5)


def test_neurons_are_cut_out_beside_attention_in_int4() -> None:
    model, tokens = encoder(), ids()
    masks = prune_model_(model, PruneConfig("neurons", 0.5), example_inputs=(tokens,))
    prepare_(model, QuantConfig("int4-int8", overrides={"*.linear2": "int8"}))
    final = finalize(model, (tokens,), masks, None)
    assert final.deployed.encoder.layers[0].linear1.out_features == 32
    assert isinstance(final.deployed.encoder.layers[0].self_attn.q_proj, Int4Linear)


# --- attention made of linear layers ----------------------------------------------------------------------------------


class Packed(nn.Module):
    """One linear layer for query, key and value, split after it, as in timm, GPT-NeoX and Phi."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        return self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(-2))


@torch.no_grad()
@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_packed_linear_layer_that_is_split_after_it_is_quantized(tmp_path, scheme: str) -> None:
    model, x = seeded(Packed).eval(), torch.randn(3, 6, WIDTH, generator=torch.Generator().manual_seed(4))
    fake = copy.deepcopy(model)
    assert [e.done for e in prepare_(fake, QuantConfig(scheme)).entries] == [scheme, scheme]
    converted = convert_(copy.deepcopy(fake))
    linear = fake.qkv
    assert ((linear(x) - converted.qkv(x)).abs() <= layer_bound(linear, x)).all()
    assert (converted(x) - fake(x)).norm() <= 0.1 * (fake(x) - model(x)).norm()
    options: dict[str, Any] = {"engines": ("portable",), "measure": False}
    export_model(model, tmp_path / "a", example_inputs=(x,), quantize=QuantConfig(scheme), **options)
    assert torch.allclose(load(tmp_path / "a")(x[:2]), converted(x[:2]), atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("scheme", SCHEMES)
def test_grouped_query_attention_is_converted_as_it_was_trained(scheme: str) -> None:
    model, tokens = tiny.llama(num_key_value_heads=2, intermediate_size=64), tiny.ids(2, 12)
    plain = model(input_ids=tokens).logits
    prepare_(model, QuantConfig(scheme))
    fake = model.model.layers[0].self_attn
    assert (fake.q_proj.out_features, fake.k_proj.out_features, fake.v_proj.out_features) == (32, 16, 16)
    converted = convert_(copy.deepcopy(model))
    x = torch.randn(12, tiny.WIDTH)
    for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
        linear, integer = getattr(fake, name), getattr(converted.model.layers[0].self_attn, name)
        assert integer.scheme == scheme and ((linear(x) - integer(x)).abs() <= layer_bound(linear, x)).all()
    ours, theirs = model(input_ids=tokens).logits, converted(input_ids=tokens).logits
    assert (theirs - ours).norm() <= 0.1 * (ours - plain).norm()
