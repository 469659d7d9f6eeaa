"""Heads, channels and neurons of many architectures: cut out, a model computes what it did with them masked."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
import transformers as tf
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_accel import PruneConfig, Pruning, QuantConfig, export_model, load, prune_model_, shrink_model
from lightning_accel.capture import call_example, flatten_output
from lightning_accel.prune.groups import all_groups
from lightning_accel.select import count_parameters

SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
BOTH = {
    "vocab_size": tiny.VOCABULARY, "d_model": 32, "encoder_layers": 2, "decoder_layers": 2,
    "encoder_attention_heads": 4, "decoder_attention_heads": 4, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48,
}  # fmt: skip
SPEECH = {"num_mel_bins": 16, "max_source_positions": 20, "max_target_positions": 30}
TOKENS = {"input_ids": tiny.ids()}
TARGETS = {"decoder_input_ids": tiny.ids()[:, :7]}


def numbers(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1))


class Fused(nn.Module):
    """Attention over one projection of queries, keys and values, in a residual block."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.qkv, self.out, self.head = (nn.Linear(*n) for n in ((8, 16), (16, 48), (16, 16), (16, 4)))

    def forward(self, x: Tensor) -> Tensor:
        x = self.inner(x)
        q, k, v = self.qkv(x).view(*x.shape[:2], 3, -1, 4).permute(2, 0, 3, 1, 4)
        return self.head(x + self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)))


class Odd(nn.Module):
    """A shared layer, halves of a gated width, two widths side by side, a width folded into another dimension."""

    def __init__(self) -> None:
        super().__init__()
        self.shared, self.gated, self.beside = nn.Linear(8, 8), nn.Linear(8, 24), nn.Linear(8, 6)
        self.joined, self.folded = nn.Linear(18, 10), nn.Linear(40, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.shared(torch.relu(self.shared(x)))
        a, b = self.gated(x).chunk(2, -1)
        x = torch.cat([a * torch.sigmoid(b), self.beside(x)], -1)
        return self.folded(torch.tanh(self.joined(x)).transpose(1, 2).reshape(len(x), -1))


def whisper() -> nn.Module:
    ids = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1}
    return tf.WhisperForConditionalGeneration(tf.WhisperConfig(**BOTH, **SPEECH, **ids))


def wav2vec2() -> nn.Module:
    convolutions = {"conv_dim": (16, 16), "conv_kernel": (5, 3), "conv_stride": (4, 2), "num_conv_pos_embeddings": 8}
    config = tf.Wav2Vec2Config(vocab_size=20, **SMALL, **convolutions, num_conv_pos_embedding_groups=2)
    return tf.Wav2Vec2ForCTC(config)


def t5() -> nn.Module:
    shape = {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4}
    return tf.T5ForConditionalGeneration(tf.T5Config(vocab_size=tiny.VOCABULARY, **shape, decoder_start_token_id=0))


def resnet() -> nn.Module:
    shape = {"embedding_size": 8, "hidden_sizes": [16, 32], "depths": [2, 2], "layer_type": "basic"}
    return tf.ResNetForImageClassification(tf.ResNetConfig(**shape, num_labels=5))


def mobilenet() -> nn.Module:
    config = tf.MobileNetV2Config(depth_multiplier=0.35, image_size=32, num_labels=5)
    return tf.MobileNetV2ForImageClassification(config)


def efficientnet() -> nn.Module:
    return tf.EfficientNetForImageClassification(
        tf.EfficientNetConfig(
            image_size=32, width_coefficient=0.25, depth_coefficient=0.3, hidden_dim=320, num_labels=5,
            in_channels=[32, 16, 24], out_channels=[16, 24, 40], kernel_sizes=[3, 3, 5], strides=[1, 2, 2],
            num_block_repeats=[1, 2, 1], expand_ratios=[1, 6, 6], depthwise_padding=[],
        )
    )  # fmt: skip


def swin() -> nn.Module:
    shape = {"image_size": 32, "patch_size": 2, "embed_dim": 16, "depths": [2, 2], "num_heads": [2, 4]}
    return tf.SwinForImageClassification(tf.SwinConfig(**shape, window_size=4, num_labels=5))


def convnext() -> nn.Module:
    return tf.ConvNextForImageClassification(
        tf.ConvNextConfig(hidden_sizes=[16, 32], depths=[2, 2], num_stages=2, layer_scale_init_value=1.0, num_labels=5)
    )


def distilbert() -> nn.Module:
    shape = {"dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 48, "max_position_embeddings": 40}
    return tf.DistilBertForSequenceClassification(tf.DistilBertConfig(vocab_size=tiny.VOCABULARY, **shape))


def bart() -> nn.Module:
    return tf.BartForConditionalGeneration(tf.BartConfig(**BOTH, max_position_embeddings=40))


IMAGES = {"pixel_values": numbers(2, 3, 32, 32)}
CASES: dict[str, tuple[Callable[[], nn.Module], Any, dict[str, int]]] = {  # groups of each kind that are cut exactly
    "mlp": (tiny.mlp, (numbers(5, 8),), {"neurons": 2}),
    "llama": (lambda: tiny.llama(num_key_value_heads=2), TOKENS, {"heads": 2, "neurons": 2}),
    "gpt2": (tiny.gpt2, TOKENS, {"heads": 2, "neurons": 2}),
    "bert": (tiny.bert, TOKENS, {"heads": 2, "neurons": 3}),
    "distilbert": (distilbert, TOKENS, {"heads": 2, "neurons": 3}),
    "vit": (tiny.vit, {"pixel_values": numbers(2, 3, 16, 16)}, {"heads": 2, "neurons": 2}),
    "swin": (swin, IMAGES, {"heads": 4, "neurons": 4}),
    "t5": (t5, TOKENS | TARGETS, {"heads": 4, "neurons": 4}),
    "bart": (bart, TOKENS | TARGETS, {"heads": 6, "neurons": 4}),
    "whisper": (whisper, TARGETS | {"input_features": numbers(2, 16, 40)}, {"heads": 6, "neurons": 4, "channels": 1}),
    "wav2vec2": (wav2vec2, {"input_values": numbers(2, 400)}, {"heads": 2, "neurons": 2}),
    "resnet": (resnet, IMAGES, {"channels": 7}),
    "mobilenet": (mobilenet, IMAGES, {"channels": 25}),
    "efficientnet": (efficientnet, IMAGES, {"channels": 10}),
    "convnext": (convnext, IMAGES, {"neurons": 4}),
    "fused qkv": (Fused, (numbers(2, 5, 8),), {"heads": 1, "neurons": 1}),
    "odd": (Odd, (numbers(2, 4, 8),), {"neurons": 3}),
}  # fmt: skip


def built(case: str) -> tuple[nn.Module, Any, dict[str, int]]:
    make, inputs, kinds = CASES[case]
    torch.manual_seed(0)
    model = make()
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    for norm in norms:  # as after training; else random convolutions put out next to nothing
        norm.momentum = 1.0
    if norms:
        logits(model.train(), inputs)
    return model.eval(), inputs, kinds


def logits(model: nn.Module, inputs: Any) -> Tensor:
    with torch.no_grad():
        return tiny.logits(model(**inputs) if isinstance(inputs, dict) else model(*inputs))


@pytest.mark.parametrize("case", CASES)
def test_units_are_found(case: str) -> None:
    model, inputs, kinds = built(case)
    found: dict[str, int] = {}
    for group in all_groups(model, inputs):
        found[group.kind] = found.get(group.kind, 0) + 1
    found.pop("hidden", None)
    assert found == kinds


@pytest.mark.parametrize(("case", "kind"), [(case, kind) for case, (_, _, kinds) in CASES.items() for kind in kinds])
def test_cut_out_is_what_was_masked(case: str, kind: str) -> None:
    model, inputs, _ = built(case)
    dense, before = logits(model, inputs), count_parameters(model)
    masks = prune_model_(model, PruneConfig(kind, 0.5), example_inputs=inputs)
    masked = logits(model, inputs)
    shrunk = shrink_model(model, masks, example_inputs=inputs)
    scale = masked.abs().max().item()
    assert (logits(shrunk, inputs) - masked).abs().max().item() <= 1e-5 * scale
    assert (masked - dense).abs().max().item() > 1e-3 * scale, "half of the units did nothing"
    assert count_parameters(shrunk) < before


@pytest.mark.parametrize("eps", [1e-10, 1e-6, 1e-3])
def test_hidden_widths_behind_rms_norms_are_cut_with_their_gains_and_eps_rescaled(eps: float) -> None:
    model, inputs = tiny.llama(rms_norm_eps=eps), TOKENS
    masks = prune_model_(model, PruneConfig("hidden", 0.25), example_inputs=inputs)
    masked = logits(model, inputs)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        shrunk = shrink_model(model, masks, example_inputs=inputs)
    assert (logits(shrunk, inputs) - masked).abs().max() <= 1e-5 * masked.abs().max()
    assert shrunk.config.rms_norm_eps == pytest.approx(eps * 32 / 24)
    assert count_parameters(shrunk) < 0.8 * count_parameters(model)
    gain, cut = model.model.norm.weight, shrunk.model.norm.weight  # 24 of 32 units
    torch.testing.assert_close(cut, gain[masks["model.norm.weight"]] * (32 / 24) ** 0.5)


@pytest.mark.parametrize("case", ["gpt2", "bert", "vit"])
def test_what_a_hidden_width_behind_layer_norms_changes_is_said(case: str) -> None:
    model, inputs, _ = built(case)
    masks = prune_model_(model, PruneConfig("hidden", 0.25), example_inputs=inputs)
    masked = logits(model, inputs)
    with pytest.warns(UserWarning, match="changes what the model computes") as said:
        shrunk = shrink_model(model, masks, example_inputs=inputs)
    found = re.search(r"example inputs by ([\d.]+)%; for the loss, write shrink_model", str(said[0].message))
    with torch.no_grad():
        outputs = [flatten_output(call_example(m.eval(), inputs))[0] for m in (shrunk, model)]
    change = max(((a - b).norm() / b.norm()).item() for a, b in zip(*outputs, strict=True))
    assert found and float(found[1]) == pytest.approx(100 * change, abs=0.06)
    assert logits(shrunk, inputs).shape == masked.shape and count_parameters(shrunk) < 0.8 * count_parameters(model)


def test_the_loss_before_and_after_a_hidden_width_is_cut_is_said() -> None:
    model, inputs, _ = built("gpt2")
    batch = {**inputs, "labels": inputs["input_ids"]}
    masks = prune_model_(model, PruneConfig("hidden", 0.25), example_inputs=inputs)
    with pytest.warns(UserWarning, match="the loss from") as said:
        shrunk = shrink_model(model, masks, example_inputs=inputs, calibration=[batch])
    found = re.search(r"loss from ([\d.]+) masked to ([\d.]+) cut \(1 batches\)", str(said[0].message))
    assert found
    losses = [m(**batch).loss.item() for m in (model, shrunk)]
    assert [float(found[1]), float(found[2])] == pytest.approx(losses, abs=1e-4)
    pair = (batch["input_ids"], batch["labels"])  # classes of positions: cross_entropy wants them in another shape
    with pytest.warns(UserWarning, match="; of the loss: a loss is needed, and logits .* have no cross-entropy"):
        shrink_model(model, masks, example_inputs=inputs, calibration=[pair])


def test_heads_that_share_keys_go_together() -> None:
    model = tiny.llama(num_key_value_heads=2)
    masks = prune_model_(model, PruneConfig("heads", 0.5), example_inputs=TOKENS)
    attention = shrink_model(model, masks, example_inputs=TOKENS).model.layers[0].self_attn
    assert (attention.q_proj.out_features, attention.k_proj.out_features, attention.o_proj.in_features) == (16, 8, 16)


@torch.no_grad()
@pytest.mark.parametrize("case", ["llama", "gpt2"])
def test_decoding_with_a_cache_follows_the_heads_that_are_left(case: str, tmp_path: Path) -> None:
    model, inputs, _ = built(case)
    masks = prune_model_(model, PruneConfig("heads", 0.5), example_inputs=inputs)
    shrunk, ids = shrink_model(model, masks, example_inputs=inputs), inputs["input_ids"]
    expected = ids
    for _ in range(12):
        expected = torch.cat([expected, shrunk(input_ids=expected).logits[:, -1:].argmax(-1)], 1)
    options: Any = {"masks": masks, "engines": ("portable",), "measure": False, "data": [inputs]}
    export_model(model, tmp_path / "float", **options)
    assert torch.equal(load(tmp_path / "float").generate(ids, max_new_tokens=12), expected[:, ids.shape[1] :])
    export_model(model, tmp_path / "int8", quantize=QuantConfig("int8"), **options)  # verified


def test_parts_that_are_compiled_are_cut_under_their_own_names() -> None:
    model, x = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4)).eval(), numbers(5, 8)
    model[0] = torch.compile(model[0], backend="eager")
    masks = prune_model_(model, PruneConfig("neurons", 0.5), example_inputs=(x,))
    shrunk = shrink_model(model, masks, example_inputs=(x,))
    assert shrunk[2].in_features == 8
    torch.testing.assert_close(shrunk(x), model(x))


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_the_width_of_a_single_shared_head_stays(attention: str) -> None:
    model = tiny.llama(num_key_value_heads=1, attn_implementation=attention)
    found = {(group.kind, group.name.rpartition(".")[2]) for group in all_groups(model, TOKENS)}
    assert found == {("neurons", "gate_proj"), ("hidden", "embed_tokens")}


def test_a_width_that_is_written_into_the_code_is_refused_by_name() -> None:
    class Rigid(Fused):
        def forward(self, x: Tensor) -> Tensor:
            x = self.inner(x)
            q, k, v = self.qkv(x).view(*x.shape[:2], 3, 4, 4).permute(2, 0, 3, 1, 4)
            return self.head(x + self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)))

    model, inputs = Rigid().eval(), (numbers(2, 5, 8),)
    masks = prune_model_(model, PruneConfig("heads", 0.5), example_inputs=inputs)
    with pytest.raises(ValueError, match=r"cutting heads out of 'qkv' leaves a model that does not run .*'qkv': None"):
        shrink_model(model, masks, example_inputs=inputs)


def test_hidden_widths_are_not_masked_in_training() -> None:
    with pytest.raises(ValueError, match="Cut first, then train"):
        Pruning(PruneConfig("hidden"))
