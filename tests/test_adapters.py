"""LoRA of peft: the merged weight is what training rounds, what the artifact holds, and no adapter is left in it."""

from __future__ import annotations

import copy
import pickle
import warnings
from typing import Any

import pytest
import tiny
import torch
from helpers import Plain, assert_same, llama, seeded, texts, trainer, weights
from test_composition import LAYERS, Net, assert_exported, each_scheme, export, fit, integers, loader, points
from torch import Tensor, nn

from lightning_accel import (
    AccelModule,
    PruneConfig,
    Pruning,
    QuantConfig,
    QuantizationAwareTraining,
    export_model,
    load,
    prepare_,
    quantize_model,
)
from lightning_accel.artifact import load_weights
from lightning_accel.finalize import restore_
from lightning_accel.quantize import convert_, unprepare_
from lightning_accel.quantize.adapters import merge_adapters, merged_weight

peft = pytest.importorskip("peft")


def lora(net: Any = None, seed: int = 0, targets: tuple[str, ...] = ("first", "second"), **options: Any) -> Any:
    """`Net` with adapters that are not zero."""
    torch.manual_seed(seed)
    net = net if net is not None else seeded(Net)
    model = peft.get_peft_model(net, peft.LoraConfig(r=4, target_modules=list(targets), **options))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, 0.1)
    return model


def layer(model: Any, name: str) -> Any:
    return model.get_submodule(f"base_model.model.{name}")


def by_merging(model: Any) -> nn.Module:
    """What peft itself makes of it."""
    return copy.deepcopy(model).merge_and_unload()


@each_scheme
def test_qat_on_lora_exports_the_merged_codes_that_training_rounded(tmp_path, scheme):
    model = lora()
    before = weights(model)
    module = fit(tmp_path, scheme, [export(tmp_path)], model)
    after = weights(model)
    assert list(after) == list(before), "keys stay"
    changed = {name for name in after if not torch.equal(after[name], before[name])}
    assert changed == {name for name in after if "lora_" in name} and len(changed) == 4, "only adapters are trained"
    assert_exported(by_merging(module.model), scheme, tmp_path / "artifact")
    stored = load_weights(tmp_path / "artifact" / "weights.safetensors")
    assert {name.removeprefix("model.").partition(".")[0] for name in stored} == set(LAYERS)
    with torch.no_grad():
        x = points()[:][0]
        assert torch.equal(module.model(x), by_merging(module.model)(x)), "training computes what merging gives"


@each_scheme
def test_a_checkpoint_of_lora_holds_what_is_merged_into_the_codes(tmp_path, scheme):
    model = lora()
    module = Plain(model)
    fitting = trainer(tmp_path, [QuantizationAwareTraining(QuantConfig(scheme), begin=2, module="model")])
    fitting.fit(module, loader())
    fitting.save_checkpoint(tmp_path / "last.ckpt")
    restored = restore_(lora(seed=7), tmp_path / "last.ckpt", "model").model
    expected = integers(by_merging(model), scheme)
    assert_same(integers(restored, scheme), expected)
    x = points()[:][0]
    assert torch.equal(restored(x), model(x))


def test_gradients_of_adapters_are_those_of_the_rounded_merged_weight() -> None:
    model, x, upstream = lora(), torch.randn(5, 32), torch.randn(5, 64)
    prepare_(model, QuantConfig("int8"))
    first = layer(model, "first")
    first(x).backward(upstream)
    rounded = first.base_layer.activation_fake_quantizer(x)
    a, b, scaling = first.lora_A["default"].weight, first.lora_B["default"].weight, first.scaling["default"]
    assert torch.allclose(b.grad, scaling * upstream.T @ rounded @ a.T, atol=1e-4)
    assert torch.allclose(a.grad, scaling * b.T @ (upstream.T @ rounded), atol=1e-4)
    assert first.base_layer.weight.grad is None


def test_autocast_rounds_the_weight_that_the_export_computes() -> None:
    first = layer(lora(), "first")
    expected = merged_weight(first)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(merged_weight(first), expected) and expected.dtype == torch.float32


def test_adapters_themselves_are_not_quantized_and_the_coverage_says_why() -> None:
    entries = {e.name: (e.done, e.reason) for e in prepare_(lora(), QuantConfig("int4-int8")).entries}
    reason = "part of an adapter, which is merged into its base layer"
    assert entries["base_model.model.first.base_layer"] == ("int4-int8", None)
    assert {entries[f"base_model.model.{n}.lora_{p}.default"] for n in LAYERS[:2] for p in "AB"} == {(None, reason)}
    assert len(entries) == 7


def test_unprepare_copies_and_pickles_leave_pefts_own_layer() -> None:
    model, x = lora(), points()[:][0]
    plain = model(x)
    prepare_(model, QuantConfig("int8"))
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(other(x), model(x)) and not torch.equal(other(x), plain)
        assert torch.equal(unprepare_(other)(x), plain)
        assert type(layer(other, "first")) is peft.tuners.lora.layer.Linear
    assert not torch.equal(model(x), plain)


def test_converting_merges_a_copy() -> None:
    model, x = lora(), points()[:][0]
    prepare_(model, QuantConfig("int8"))
    fake, before = model(x), weights(model)
    converted = convert_(model)
    assert isinstance(converted, Net) and (converted(x) - fake).abs().max() <= 1e-5
    assert_same(weights(model), before)


def test_several_adapters_and_a_merged_one_count_once() -> None:
    model, x = lora(), points()[:][0]
    model.add_adapter("other", peft.LoraConfig(r=2, target_modules=["second"], init_lora_weights=False))
    model.base_model.set_adapter(["default", "other"])
    with torch.no_grad():
        expected = model(x)
        for merge in (False, True):
            if merge:
                model.merge_adapter()
            assert torch.allclose(merge_adapters(model)(x), expected, atol=1e-5)
            assert (quantize_model(model, QuantConfig("int8"))(x) - expected).norm() <= 0.02 * expected.norm()


def test_a_float_export_holds_one_matrix_a_layer_and_computes_the_same(tmp_path) -> None:
    model, x = lora(modules_to_save=["head"]), points()[:][0]
    before = weights(model)
    export_model(model, tmp_path / "a", example_inputs=(x,), engines=("portable",), measure=False)
    stored = load_weights(tmp_path / "a" / "weights.safetensors")
    assert sorted(tuple(t.shape) for t in stored.values() if t.dim() == 2) == [(3, 64), (64, 32), (64, 64)]
    with torch.no_grad():
        assert (load(tmp_path / "a")(x) - model(x)).abs().max() <= 1e-5
    assert_same(weights(model), before)


def test_a_language_model_with_lora_is_exported_with_its_cache(tmp_path) -> None:
    net = llama(intermediate_size=64, num_hidden_layers=1)
    model = lora(net, targets=("q_proj", "down_proj"), task_type="CAUSAL_LM")
    module = AccelModule(model, causal=True)
    qat = QuantizationAwareTraining(QuantConfig("int4-int8"), begin=1, module="model")
    trainer(tmp_path, [qat, export(tmp_path)], max_epochs=1).fit(module, texts(), texts(4))
    ids, artifact = tiny.ids() % 64, load(tmp_path / "artifact")
    with torch.no_grad():
        assert (artifact(input_ids=ids) - model.eval()(input_ids=ids).logits).abs().max() <= 1e-4
    assert artifact.generate(ids[:, :4].tolist(), max_new_tokens=4).shape == (2, 4)
    assert not [name for name in load_weights(tmp_path / "artifact" / "weights.safetensors") if "lora" in name]


def test_an_adapter_of_a_tied_head_leaves_the_embedding_as_it_was() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # peft about ties
        model = lora(llama(tie_word_embeddings=True), targets=("lm_head",))
    merged: Any = merge_adapters(model)
    embedding: Tensor = merged.get_input_embeddings().weight
    assert torch.equal(embedding, model.get_input_embeddings().weight) and merged.lm_head.weight is not embedding
    with torch.no_grad():
        assert torch.allclose(merged(tiny.ids() % 64).logits, model(tiny.ids() % 64).logits, atol=1e-5)


@pytest.mark.parametrize("options", [{"use_dora": True}, {"lora_bias": True}], ids=["dora", "bias"])
def test_other_adapters_are_refused_with_the_line_to_write_and_quantized_once_merged(options) -> None:
    model, x = lora(**options), points()[:][0]
    before = [type(m) for m in model.modules()]
    with pytest.raises(ValueError, match=r"base_model\.model\.first has an adapter .*not plain LoRA.*merge_and_unload"):
        prepare_(model, QuantConfig("int8"))
    assert [type(m) for m in model.modules()] == before
    with pytest.raises(ValueError, match=r"model = model\.merge_and_unload\(\), and quantize that"):
        quantize_model(model, QuantConfig("int8"))
    quantized, merged = quantize_model(by_merging(model), QuantConfig("int8"))(x), by_merging(model)(x)
    assert (quantized - merged).norm() <= 0.02 * merged.norm()
    prepare_(model, QuantConfig("int8", overrides={"*.base_layer": None}))


def test_dropout_of_lora_is_said_to_fall_away() -> None:
    with pytest.warns(UserWarning, match=r"lora_dropout is not applied.*first, .*second.*write lora_dropout=0\.0"):
        prepare_(lora(lora_dropout=0.1), QuantConfig("int8"))


def test_pruning_with_adapters_is_refused_before_training_and_at_the_export(tmp_path) -> None:
    model, x = lora(), points()[:][0]
    with pytest.raises(ValueError, match=r"first has an adapter, whose merging fills pruned weights again; write"):
        trainer(tmp_path, [Pruning(PruneConfig(), module="model")]).fit(Plain(model), loader())
    masks = {"base_model.model.first.base_layer.weight": torch.zeros(64, 32, dtype=torch.bool)}
    with pytest.raises(ValueError, match=r"merging fills pruned weights again.*merge_and_unload"):
        export_model(model, tmp_path / "a", example_inputs=(x,), masks=masks, engines=("portable",), measure=False)
